"""A folder of labels to tables: one CSV a class and one a contact, over all crops, with a summary.

``{out}/{class}.csv``: `COLUMNS`, a row an instance. ``{out}/contacts_{A}_{B}_{NM}nm.csv``: `CONTACT_COLUMNS`, a row an
instance of A, with or without contact. Each appears whole, in one step, when its last crop is measured.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.decoding.decode import find_arrays
from connectomics.decoding.labels import BLOCK
from connectomics.decoding.measure.contacts import Contacts, ContactSpec, measure_contacts
from connectomics.decoding.measure.instances import Instances, measure_instances
from connectomics.errors import IncompleteError, MetadataError, MissingError, WriteError, unknown_name
from connectomics.io import store
from connectomics.io.multiscale import Multiscale

COLUMNS = (
    "dataset", "crop", "id", "voxels", "volume_nm3", "surface_nm2", "sphericity",
    "centroid_z_nm", "centroid_y_nm", "centroid_x_nm",
    "begin_z_nm", "begin_y_nm", "begin_x_nm", "end_z_nm", "end_y_nm", "end_x_nm", "touches_border",
)  # fmt: skip
CONTACT_COLUMNS = ("dataset", "crop", "id", "surface_nm2", "contact_nm2", "partners", "partner_ids")
#: Told after each block: how many of this array's are done, how many there are, and which array it is.
Progress = Callable[[int, int, str], None]
_Place = tuple[str, str, str]
_ROWS = 100_000


def measure_labels(
    labels_dir: str | Path,
    output_dir: str | Path,
    *,
    classes: Collection[str] | None = None,
    datasets: Collection[str] | None = None,
    crops: Collection[str] | None = None,
    contacts: Sequence[ContactSpec] = (),
    block: Sequence[int] = BLOCK,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure the instances of a folder of labels, ``{dataset}.zarr/{crop}/{class}``, and write the tables.

    A semantic class (attribute ``connectomics.kind``) is measured as one instance, 1. Arrays without that attribute
    hold ids. Tables that are there already are replaced.

    Args:
        classes, datasets, crops: only these; by default all. Contacts may name other classes than ``classes``.
        contacts: measured in every crop that holds both classes.
        block, progress: see `measure_instances`.

    Returns:
        For JSON: ``labels``, and lists ``classes`` and ``contacts`` with the totals of each table and its ``file``.

    Raises:
        MissingError: no labels there, or no crop holds both classes of a contact. UnknownNameError: a class, data set
            or crop that is not there. IncompleteError: labels are half written. MetadataError: not labels; all these
            before anything is measured. InputError: a distance too far. WriteError.
    """
    root, out = Path(labels_dir), Path(output_dir)
    places = _select(root, datasets, crops)
    known = {name for _, _, name in places}
    for name in [*(classes or ()), *(n for spec in contacts for n in (spec.of, spec.to))]:
        if name not in known:
            raise unknown_name("class", name, known, str(root))
    wanted = [name for name in sorted(known) if not classes or name in classes]
    pairs = {spec: _places_of_both(places, spec, root) for spec in contacts}
    needed = {*wanted, *(n for spec in contacts for n in (spec.of, spec.to))}
    opened = {place: _open(root, place) for place in places if place[2] in needed}
    summary: dict[str, Any] = {"labels": str(root), "classes": [], "contacts": []}
    for name in wanted:
        chosen = {place: opened[place] for place in places if place[2] == name}
        summary["classes"].append(_measure_class(out, name, chosen, block, progress))
    for spec, crops_with_both in pairs.items():
        summary["contacts"].append(_measure_contact(out, spec, crops_with_both, opened, block, progress))
    return summary


def _select(root: Path, datasets: Collection[str] | None, crops: Collection[str] | None) -> list[_Place]:
    places = list(find_arrays(root))
    if not places:
        raise MissingError(f"no labels in {root}: expected {{dataset}}.zarr/{{crop}}/{{class}}; run decode first")
    for what, index, asked in (("data set", 0, datasets), ("crop", 1, crops)):
        there = {place[index] for place in places}
        for name in asked or ():
            if name not in there:
                raise unknown_name(what, name, there, str(root))
        places = [place for place in places if not asked or place[index] in asked]
    return places


def _places_of_both(places: Sequence[_Place], spec: ContactSpec, root: Path) -> list[tuple[_Place, _Place]]:
    found = [(place, (*place[:2], spec.to)) for place in places if place[2] == spec.of]
    both = [pair for pair in found if pair[1] in places]
    if not both:
        raise MissingError(f"contact {spec}: no crop in {root} holds both classes")
    return both


def _open(root: Path, place: _Place) -> tuple[Multiscale, bool]:
    """The labels, and whether they are semantic; checked to be labels and to be whole."""
    dataset, crop, name = place
    source = Multiscale.open(str(root / f"{dataset}.zarr" / crop / name))
    about = store.read_attrs(source.location).get("connectomics", {})
    if about and about.get("artefact") != "labels":
        raise MetadataError(f"{source.location}: expected labels, found {about.get('artefact')}; run decode on it")
    if about and about.get("complete") is not True:
        raise IncompleteError(f"{source.location} is only half written; run decode to its end first")
    if source.levels[0].dtype.kind not in "uib":
        raise MetadataError(f"{source.location}: labels must be whole numbers, found {source.levels[0].dtype}")
    return source, about.get("kind") == "semantic"


def _measure_class(
    out: Path,
    name: str,
    sources: dict[_Place, tuple[Multiscale, bool]],
    block: Sequence[int],
    progress: Progress | None,
) -> dict[str, Any]:
    volumes: list[NDArray[np.float64]] = []
    voxels, surface, at_border = 0, 0.0, 0
    path = out / f"{name}.csv"
    with _table(path, COLUMNS) as writer:
        for place, (source, semantic) in sources.items():
            tell = None if progress is None else partial(_tell, progress, "/".join(place))
            found = measure_instances(source, semantic=semantic, block=block, progress=tell)
            for rows in _instance_rows(found):
                writer.writerows([*place[:2], *row] for row in rows)
            volumes.append(found.volume)
            voxels += int(found.sizes.sum())
            surface += float(found.surface.sum())
            at_border += int(found.touches_border.sum())
    every = np.concatenate(volumes)
    return {
        "class": name,
        "kind": "semantic" if all(semantic for _, semantic in sources.values()) else "instance",
        "crops": len(sources),
        "instances": len(every),
        "touch_border": at_border,
        "voxels": voxels,
        "volume_nm3": float(every.sum()),
        "median_volume_nm3": float(np.median(every)) if len(every) else None,
        "surface_nm2": surface,
        "file": str(path),
    }


def _instance_rows(found: Instances) -> Iterator[list[list[Any]]]:
    columns = np.column_stack([found.volume, found.surface, found.sphericity, found.centroid, found.box])
    border = found.touches_border
    for start in range(0, len(found), _ROWS):
        part = slice(start, start + _ROWS)
        yield [
            [i, voxels, _number(row[0]), _number(row[1]), "" if math.isnan(row[2]) else f"{row[2]:.5f}",
             *map(_number, row[3:]), int(touches)]
            for i, voxels, row, touches in zip(
                found.ids[part].tolist(), found.sizes[part].tolist(), columns[part].tolist(), border[part], strict=True
            )
        ]  # fmt: skip


def _measure_contact(
    out: Path,
    spec: ContactSpec,
    pairs: Sequence[tuple[_Place, _Place]],
    opened: dict[_Place, tuple[Multiscale, bool]],
    block: Sequence[int],
    progress: Progress | None,
) -> dict[str, Any]:
    path = out / f"contacts_{spec.of}_{spec.to}_{spec.nm:g}nm.csv"
    total, with_contact, number, area, surface = 0, 0, 0, 0.0, 0.0
    with _table(path, CONTACT_COLUMNS) as writer:
        for of, to in pairs:
            (one, one_semantic), (two, two_semantic) = opened[of], opened[to]
            tell = None if progress is None else partial(_tell, progress, f"{of[0]}/{of[1]} {spec}")
            found = measure_contacts(
                one, two, spec.nm, semantic=(one_semantic, two_semantic), block=block, progress=tell
            )
            writer.writerows([*of[:2], *row] for row in _contact_rows(found))
            total += len(found)
            with_contact += sum(bool(p) for p in found.partners)
            number += sum(len(p) for p in found.partners)
            area += float(found.area.sum())
            surface += float(found.surface.sum())
    return {
        "of": spec.of,
        "to": spec.to,
        "nm": spec.nm,
        "crops": len(pairs),
        "instances": total,
        "with_contact": with_contact,
        "pairs": number,
        "contact_nm2": area,
        "surface_nm2": surface,
        "file": str(path),
    }


def _contact_rows(found: Contacts) -> Iterator[list[Any]]:
    for i, surface, area, partners in zip(
        found.ids.tolist(), found.surface.tolist(), found.area.tolist(), found.partners, strict=True
    ):
        yield [i, _number(surface), _number(area), len(partners), " ".join(map(str, partners))]


def _number(value: float) -> str:
    return f"{value:.3f}"


def _tell(progress: Progress, name: str, done: int, number: int) -> None:
    progress(done, number, name)


class _Rows:
    """Writes rows of CSV; an error of the disk is a `WriteError`, one of a row's maker is left as it is."""

    def __init__(self, file: Any, path: Path) -> None:
        self._writer, self._path = csv.writer(file, lineterminator="\n"), path

    def writerows(self, rows: Iterable[Sequence[Any]]) -> None:
        made = list(rows)
        try:
            self._writer.writerows(made)
        except OSError as error:
            raise _failed(self._path, error) from error


@contextmanager
def _table(path: Path, columns: Sequence[str]) -> Iterator[_Rows]:
    """A CSV that takes its place when the block ends without an error, and is removed otherwise."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = temporary.open("w", encoding="utf-8", newline="")
        except OSError as error:
            raise _failed(path, error) from error
        with file:
            rows = _Rows(file, path)
            rows.writerows([columns])
            yield rows
            try:
                file.flush()
            except OSError as error:
                raise _failed(path, error) from error
        temporary.replace(path)
    finally:
        if temporary.exists():
            temporary.unlink()


def _failed(path: Path, error: OSError) -> WriteError:
    return WriteError(f"cannot write {path}: {error.strerror or error}; check the folder and its free space")
