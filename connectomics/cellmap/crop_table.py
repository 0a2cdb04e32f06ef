"""The crop table: the arrays that a submission must hold, one row per crop and class, with its grid."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from importlib import resources
from io import StringIO
from pathlib import Path
from typing import Any

from connectomics.errors import InputError, MetadataError, MissingError, unknown_name
from connectomics.geometry import Box, Triple, VoxelGrid, index, triple
from connectomics.io import store
from connectomics.io.write import write_file

_COLUMNS = ("crop_name", "dataset", "class_label", "voxel_size", "translation", "shape")


def csv_rows(text: str, columns: Sequence[str], where: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the rows of a CSV table, each with its place ("file line 3") for messages.

    Raises `MetadataError` if one of ``columns`` is missing or a row leaves one empty.
    """
    reader = csv.DictReader(text.splitlines())
    missing = [c for c in columns if c not in (reader.fieldnames or ())]
    if missing:
        raise MetadataError(f"{where}: columns {missing} are missing; expected {','.join(columns)} (commas)")
    for number, row in enumerate(reader, start=2):
        place = f"{where} line {number}"
        blank = [c for c in columns if not (row[c] or "").strip()]
        if blank:
            raise MetadataError(f"{place}: {', '.join(blank)} is empty")
        yield place, row


@dataclass(frozen=True)
class TableEntry:
    """One array: its crop's number, its data set and class, and its grid (nm, z y x, center of the first voxel)."""

    crop: int
    dataset: str
    class_name: str
    grid: VoxelGrid

    @property
    def crop_name(self) -> str:
        """The crop's name in paths, ``crop557``."""
        return f"crop{self.crop}"


@dataclass(frozen=True)
class CropTable:
    """An immutable crop table. Iterate over it for its rows."""

    entries: tuple[TableEntry, ...]

    def __iter__(self) -> Iterator[TableEntry]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    @classmethod
    def load(cls, path: str | Path) -> CropTable:
        """Read a ``.csv`` (the official manifest's columns) or a ``.json`` (crops with grids) table.

        Raises `MissingError` if the file does not exist, and `MetadataError` naming the row that cannot be read.
        """
        file = Path(path)
        if not file.is_file():
            raise MissingError(
                f"no crop table at {file}; give a .csv or .json file, or 'challenge' for the built-in one"
            )
        return cls.parse(file.read_bytes(), str(file), is_json=file.suffix == ".json")

    @classmethod
    def parse(cls, data: bytes, where: str, *, is_json: bool) -> CropTable:
        """Read the content of a table; ``where`` names it in messages. Raises `MetadataError`."""
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise MetadataError(f"{where} is no text file (UTF-8); a crop table is a .csv or .json file") from error
        entries = _from_json(text, where) if is_json else _from_csv(text, where)
        if not entries:
            raise MetadataError(f"{where}: the crop table has no rows")
        seen: set[tuple[int, str]] = set()
        dataset_of: dict[int, str] = {}
        for entry in entries:
            if dataset_of.setdefault(entry.crop, entry.dataset) != entry.dataset:
                both = f"{dataset_of[entry.crop]} and {entry.dataset}"
                raise MetadataError(f"{where}: {entry.crop_name} is in {both}; give each crop its own number")
            if (entry.crop, entry.class_name) in seen:
                raise MetadataError(f"{where}: {entry.crop_name}/{entry.class_name} is listed twice")
            seen.add((entry.crop, entry.class_name))
        return cls(tuple(entries))

    @classmethod
    def challenge(cls) -> CropTable:
        """Return the challenge's table: 16 test crops of 6 data sets, 413 arrays."""
        file = resources.files("connectomics.cellmap").joinpath("tables/test_crops.json")
        return cls.parse(file.read_bytes(), "the built-in crop table", is_json=True)

    @classmethod
    def resolve(cls, table: CropTable | str | Path) -> CropTable:
        """Return a table as it is, the built-in one for ``"challenge"``, or the one at a path."""
        if isinstance(table, CropTable):
            return table
        return cls.challenge() if str(table) == "challenge" else cls.load(table)

    @classmethod
    def of_root(cls, root: str) -> CropTable:
        """Return the test crops of a data root, local or s3://: its ``test_crops.csv``, else the challenge's table."""
        own = store.join(root, "test_crops.csv")
        found = store.read_bytes(own)
        return cls.challenge() if found is None else cls.parse(found, own, is_json=False)

    def save(self, path: str | Path) -> None:
        """Write the table as CSV with the official manifest's columns, in one step."""
        stream = StringIO(newline="")
        writer = csv.writer(stream)
        writer.writerow(_COLUMNS)
        for e in self.entries:
            lists = (e.grid.voxel_size, e.grid.translation, e.grid.shape)
            writer.writerow([e.crop, e.dataset, e.class_name, *(f"[{';'.join(map(str, v))}]" for v in lists)])
        write_file(Path(path), stream.getvalue().encode())

    def select(
        self,
        crops: Iterable[int | str] | None = None,
        classes: Iterable[str] | None = None,
        datasets: Iterable[str] | None = None,
    ) -> CropTable:
        """Return the rows of these crops (557 or ``crop557``), classes and data sets; None means all.

        Raises `UnknownNameError` for a name that no row has, with the nearest one.
        """
        numbers = None if crops is None else {_crop_number(c, "the selection") for c in crops}
        rows = self.entries
        for what, field, wanted in (("crop", "crop", numbers), ("class", "class_name", classes),
                                    ("data set", "dataset", datasets)):  # fmt: skip
            if wanted is None:
                continue
            names, there = set(wanted), {getattr(e, field) for e in self}
            for name in names - there:
                raise unknown_name(what, str(name), map(str, there), "the crop table")
            rows = tuple(e for e in rows if getattr(e, field) in names)
        return CropTable(rows)

    def crops(self) -> dict[int, list[TableEntry]]:
        """Return the rows by crop number, in the table's order."""
        grouped: dict[int, list[TableEntry]] = {}
        for entry in self:
            grouped.setdefault(entry.crop, []).append(entry)
        return grouped

    def boxes(self) -> dict[tuple[str, str], Box]:
        """Return the box around all rows of each crop, by data set and name of the crop."""
        return {
            (rows[0].dataset, rows[0].crop_name): reduce(Box.hull, [row.grid.box for row in rows])
            for rows in self.crops().values()
        }


def _crop_number(value: Any, where: str) -> int:
    text = str(value).removeprefix("crop")
    if not text.isdigit():
        raise InputError(f"{where}: expected a crop as number or crop<number>, got {value!r}")
    return int(text)


def _from_csv(text: str, where: str) -> list[TableEntry]:
    entries = []
    for place, row in csv_rows(text, _COLUMNS, where):
        values = {c: _numbers(row[c], c, place) for c in ("voxel_size", "translation", "shape")}
        crop = _crop_number(row["crop_name"], place)
        entries.append(TableEntry(crop, row["dataset"], row["class_label"], _grid(values, place)))
    return entries


def _from_json(text: str, where: str) -> list[TableEntry]:
    names = {"voxel_size": "voxel_size_nm_zyx", "translation": "translation_nm_zyx", "shape": "shape_zyx"}
    entries = []
    try:
        for crop in json.loads(text):
            place = f"{where}: crop {crop['crop']}"
            for grid in crop["grids"]:
                values = {name: triple(grid[key], f"{where}: {key}") for name, key in names.items()}
                number, dataset = _crop_number(crop["crop"], where), str(crop["dataset"])
                entries += [TableEntry(number, dataset, str(name), _grid(values, place)) for name in grid["classes"]]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise MetadataError(f"{where}: not a crop table in JSON ({type(error).__name__}: {error})") from error
    return entries


def _numbers(text: str, column: str, where: str) -> Triple:
    try:
        parts = text.strip().strip("[]()").replace(",", ";").split(";")
        return triple([float(p) for p in parts], f"{where}: {column}")
    except ValueError as error:
        raise MetadataError(f"{where}: {column} must be three numbers like [8.0;8.0;8.0], got {text!r}") from error


def _grid(values: dict[str, Triple], where: str) -> VoxelGrid:
    """The grid of a row; refuses voxel sizes that are not positive and shapes that are not whole numbers from 1."""
    size, shape = values["voxel_size"], values["shape"]
    if min(size) <= 0:
        raise MetadataError(f"{where}: voxel_size must be positive nm, got {list(size)}")
    if min(shape) < 1 or any(n != int(n) for n in shape):
        raise MetadataError(f"{where}: shape must be whole numbers of voxels from 1, got {list(shape)}")
    return VoxelGrid(size, values["translation"], index(shape))
