"""The table of arrays that a submission must hold: one row a crop and class, with its grid."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from connectomics.errors import InputError, MetadataError, MissingError, unknown_name
from connectomics.geometry import Triple, VoxelGrid, triple

_COLUMNS = ("crop_name", "dataset", "class_label", "voxel_size", "translation", "shape")


@dataclass(frozen=True)
class TableEntry:
    """One array: its crop's number, its data set and class, and its grid (nm, z y x, centre of the first voxel)."""

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

        Raises `MissingError` where there is no file and `MetadataError` naming the row that cannot be read.
        """
        file = Path(path)
        if not file.is_file():
            raise MissingError(
                f"no crop table at {file}; give a .csv or .json file, or 'challenge' for the shipped one"
            )
        try:
            text = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise MetadataError(f"{file} is no text file (UTF-8); a crop table is a .csv or .json file") from error
        entries = _from_json(text, str(file)) if file.suffix == ".json" else _from_csv(text, str(file))
        return cls._checked(entries, str(file))

    @classmethod
    def challenge(cls) -> CropTable:
        """The challenge's own table: 16 test crops of 6 data sets, 413 arrays."""
        text = resources.files("connectomics.cellmap").joinpath("tables/test_crops.json").read_text(encoding="utf-8")
        return cls._checked(_from_json(text, "the shipped crop table"), "the shipped crop table")

    @classmethod
    def resolve(cls, table: CropTable | str | Path) -> CropTable:
        """A table as it is, ``"challenge"`` for the shipped one, anything else as a path."""
        if isinstance(table, CropTable):
            return table
        return cls.challenge() if str(table) == "challenge" else cls.load(table)

    @classmethod
    def _checked(cls, entries: list[TableEntry], where: str) -> CropTable:
        if not entries:
            raise MetadataError(f"{where}: the crop table has no rows")
        seen: set[tuple[int, str]] = set()
        for entry in entries:
            if (entry.crop, entry.class_name) in seen:
                raise MetadataError(f"{where}: {entry.crop_name}/{entry.class_name} is listed twice")
            seen.add((entry.crop, entry.class_name))
        return cls(tuple(entries))

    def save(self, path: str | Path) -> None:
        """Write as CSV in the official manifest's columns (temporary name, then rename)."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(target.name + ".part")
        with temporary.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(_COLUMNS)
            for e in self.entries:
                lists = (e.grid.voxel_size, e.grid.translation, e.grid.shape)
                writer.writerow([e.crop, e.dataset, e.class_name, *("[" + ";".join(map(str, v)) + "]" for v in lists)])
        temporary.replace(target)

    def select(
        self,
        crops: Iterable[int | str] | None = None,
        classes: Iterable[str] | None = None,
        datasets: Iterable[str] | None = None,
    ) -> CropTable:
        """The rows of these crops (557 or ``crop557``), classes and data sets; None means all.

        Raises `UnknownNameError` for a name that no row has, with the nearest one that some row has.
        """
        wanted_crops = None if crops is None else {_crop_number(c, "the selection") for c in crops}
        wanted_classes = None if classes is None else set(classes)
        wanted_sets = None if datasets is None else set(datasets)
        known = (
            ("crop", wanted_crops, {e.crop for e in self}),
            ("class", wanted_classes, {e.class_name for e in self}),
            ("data set", wanted_sets, {e.dataset for e in self}),
        )
        for what, wanted, there in known:
            for name in wanted or ():
                if name not in there:
                    raise unknown_name(what, str(name), map(str, there), "the crop table")
        return CropTable(
            tuple(
                e
                for e in self
                if (wanted_crops is None or e.crop in wanted_crops)
                and (wanted_classes is None or e.class_name in wanted_classes)
                and (wanted_sets is None or e.dataset in wanted_sets)
            )
        )

    def crops(self) -> dict[int, list[TableEntry]]:
        """The rows by crop number, in the table's order."""
        grouped: dict[int, list[TableEntry]] = {}
        for entry in self:
            grouped.setdefault(entry.crop, []).append(entry)
        return grouped


def _crop_number(value: Any, where: str) -> int:
    text = str(value).removeprefix("crop")
    if not text.isdigit():
        raise InputError(f"{where}: a crop is a number or crop<number>, found {value!r}")
    return int(text)


def _from_csv(text: str, where: str) -> list[TableEntry]:
    reader = csv.DictReader(text.splitlines())
    absent = [c for c in _COLUMNS if c not in (reader.fieldnames or ())]
    if absent:
        raise MetadataError(f"{where}: columns {absent} are absent; a crop table has {', '.join(_COLUMNS)}")
    entries = []
    for number, row in enumerate(reader, start=2):
        place = f"{where} line {number}"
        blank = [c for c in _COLUMNS if not (row[c] or "").strip()]
        if blank:
            raise MetadataError(f"{place}: {', '.join(blank)} is empty")
        size, first = _floats(row["voxel_size"], "voxel_size", place), _floats(row["translation"], "translation", place)
        entries.append(
            TableEntry(
                crop=_crop_number(row["crop_name"], place),
                dataset=row["dataset"],
                class_name=row["class_label"],
                grid=_grid(size, first, _floats(row["shape"], "shape", place), place),
            )
        )
    return entries


def _from_json(text: str, where: str) -> list[TableEntry]:
    try:
        crops = json.loads(text)
        return [
            TableEntry(
                crop=_crop_number(crop["crop"], where),
                dataset=str(crop["dataset"]),
                class_name=str(name),
                grid=_grid(
                    triple(grid["voxel_size_nm_zyx"], f"{where}: voxel_size_nm_zyx"),
                    triple(grid["translation_nm_zyx"], f"{where}: translation_nm_zyx"),
                    triple(grid["shape_zyx"], f"{where}: shape_zyx"),
                    f"{where}: crop {crop['crop']}",
                ),
            )
            for crop in crops
            for grid in crop["grids"]
            for name in grid["classes"]
        ]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise MetadataError(f"{where}: not a crop table in JSON ({type(error).__name__}: {error})") from error


def _floats(text: str | None, column: str, where: str) -> Triple:
    parts = (text or "").strip().strip("[]()").replace(",", ";").split(";")
    try:
        return triple([float(p) for p in parts], f"{where}: {column}")
    except ValueError as error:
        raise MetadataError(f"{where}: {column} must be three numbers like [8.0;8.0;8.0], found {text!r}") from error


def _grid(voxel_size: Triple, translation: Triple, shape: Triple, where: str) -> VoxelGrid:
    """The grid of a row; a size that is not positive and a shape that is not of whole numbers from 1 are refused."""
    if min(voxel_size) <= 0:
        raise MetadataError(f"{where}: voxel_size must be positive nm, found {list(voxel_size)}")
    if min(shape) < 1 or any(n != int(n) for n in shape):
        raise MetadataError(f"{where}: shape must be whole numbers of voxels from 1, found {list(shape)}")
    return VoxelGrid(voxel_size, translation, (int(shape[0]), int(shape[1]), int(shape[2])))
