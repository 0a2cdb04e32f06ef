"""Hold out a part of labelled crops: cut each along its longest side into a training, a validation and a test part.

For data that comes without test crops. The result is a data root of its own (raw is linked, labels are copied) with a
crop table and a truth, laid out as the challenge's, so that everything after it is the same as for the challenge.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.cellmap.catalog import EM, GROUND_TRUTH, Catalog, Crop, LabelArray
from connectomics.cellmap.classes import is_instance_class
from connectomics.cellmap.crop_table import CropTable, TableEntry
from connectomics.errors import InputError
from connectomics.geometry import VoxelGrid
from connectomics.io.location import local_path
from connectomics.io.store import is_s3
from connectomics.io.write import create_array, create_multiscale, ensure_group

_SHARES = (0.6, 0.15, 0.25)  # training, validation, test
_BLOCK = (256, 256, 256)  # voxels held at once


@dataclass(frozen=True)
class Carved:
    """Where the parts are: the root, the table and the truth of the test parts, and the validation crops' keys."""

    root: Path
    crop_table: Path
    truth: Path
    train: tuple[str, ...]
    val: tuple[str, ...]


def carve(root: str | Path, out: str | Path, datasets: Sequence[str], classes: Sequence[str]) -> Carved:
    """Cut every crop of ``datasets`` that has one of ``classes``; ``out`` must not exist.

    Part k of crop N (1 training, 2 validation, 3 test) becomes crop ``10 N + k``. Local roots only. Raises `InputError`
    where ``out`` exists, or where a test part holds unknown voxels of a class (the score has no word for unknown).
    """
    target = local_path(out)
    if target.exists():
        raise InputError(f"{target} exists; delete it or give another folder")
    if is_s3(str(root)):
        raise InputError(f"{root} is remote; only a local data root can be cut: fetch it first")
    crops = Catalog.open(str(root)).crops(datasets, None, classes)
    names = [crop.name for crop in crops]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(
            f"{twice} is in several of {', '.join(datasets)}, and a truth has room for one; cut each alone"
        )
    temporary = target.with_name(target.name + ".part")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        carved = _write(crops, temporary, target, classes)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return carved


def _write(crops: Sequence[Crop], temporary: Path, target: Path, classes: Sequence[str]) -> Carved:
    """Fill ``temporary``, which becomes ``target``."""
    entries: list[TableEntry] = []
    train: list[str] = []
    val: list[str] = []
    for crop in crops:
        zarr = temporary / crop.dataset / f"{crop.dataset}.zarr"
        if not zarr.exists():
            ensure_group(zarr / GROUND_TRUTH)
            (zarr / EM).mkdir(parents=True)
            (zarr / EM / "fibsem-uint8").symlink_to(Path(crop.raw).resolve(), target_is_directory=True)
        number = 10 * int(crop.name.removeprefix("crop"))
        written: set[int] = set()
        for name in classes:
            if name not in crop.labels:
                continue
            for part, grid in enumerate(_parts(crop, crop.labels[name]), start=1):
                if grid.size == 0:
                    continue  # the class's array does not reach this part of the crop
                written.add(part)
                if part < 3:
                    _copy(crop.labels[name], grid, zarr / GROUND_TRUTH / f"crop{number + part}" / name)
                else:
                    entry = TableEntry(number + part, crop.dataset, name, grid)
                    _copy_truth(crop.labels[name], entry, temporary / "truth.zarr" / entry.crop_name / name)
                    entries.append(entry)
        for part, keys in ((1, train), (2, val)):
            if part in written:
                keys.append(f"{crop.dataset}/crop{number + part}")
    CropTable(tuple(entries)).save(temporary / "test_crops.csv")
    return Carved(target, target / "test_crops.csv", target / "truth.zarr", tuple(train), tuple(val))


def _parts(crop: Crop, label: LabelArray) -> list[VoxelGrid]:
    """The label's grid cut at the same world positions for every class of the crop."""
    axis = int(np.argmax(crop.box.extent))
    begin, length = crop.box.begin[axis], crop.box.extent[axis]
    grid = label.grid
    cuts = [0]
    for share in np.cumsum(_SHARES)[:-1]:
        face = begin + share * length
        cuts.append(int(np.clip(round((face - grid.box.begin[axis]) / grid.voxel_size[axis]), 0, grid.shape[axis])))
    cuts.append(grid.shape[axis])
    parts = []
    for lo, hi in pairwise(cuts):
        first, shape = [0, 0, 0], list(grid.shape)
        first[axis], shape[axis] = lo, hi - lo
        parts.append(grid.crop(first, shape))
    return parts


def _copy(label: LabelArray, part: VoxelGrid, location: Path) -> None:
    absent = unknown = 0
    for _, values in _blocks(label, part):
        present, known = label.annotation.decode(values)
        absent += int((known & ~present).sum())
        unknown += int((~known).sum())
    annotation = replace(label.annotation, counts={"absent": absent, "unknown": unknown})
    ensure_group(location.parent)
    writer = create_multiscale(location, [part], label.source.levels[0].dtype, attrs=annotation.to_attrs())[0]
    for begin, values in _blocks(label, part):
        writer.write(begin, values)


def _copy_truth(label: LabelArray, entry: TableEntry, location: Path) -> None:
    """The test part as the scorer takes it. Where a class is scored by instances but was annotated as a mask, its
    26-connected components are the instances (this holds the part's mask and ids in memory)."""
    split = is_instance_class(entry.class_name) and label.annotation.kind == "semantic"
    attrs = {"voxel_size": list(entry.grid.voxel_size), "translation": list(entry.grid.translation)}
    ensure_group(location.parent)
    dtype = np.dtype(np.uint32) if split else label.source.levels[0].dtype
    writer = create_array(location, entry.grid.shape, dtype, attrs=attrs)
    mask = np.zeros(entry.grid.shape, bool) if split else None
    for begin, values in _blocks(label, entry.grid):
        present, known = label.annotation.decode(values)
        if not known.all():
            raise InputError(
                f"{label.location}: the part that would be held out for testing has unknown voxels; "
                "the score has no word for unknown, so leave this class out"
            )
        if mask is None:
            writer.write(begin, np.where(present, values, 0).astype(values.dtype))
        else:
            mask[tuple(slice(b, b + n) for b, n in zip(begin, values.shape, strict=True))] = present
    if mask is not None:
        import cc3d

        writer.write((0, 0, 0), cc3d.connected_components(mask, connectivity=26).astype(np.uint32))


def _blocks(label: LabelArray, part: VoxelGrid) -> Iterator[tuple[tuple[int, int, int], NDArray[Any]]]:
    """The stored values of a part of the label's grid: (begin in the part, values)."""
    for begin, block in part.blocks(_BLOCK):
        yield begin, label.read_stored(np.round(label.grid.to_index(block.translation)).astype(int), block.shape)
