"""Hold out a part of labelled crops: cut each along its longest side into a training, a validation and a test part.

For data that comes without test crops. The result is a data root of its own (raw is linked, labels are copied) with a
crop table and a truth, laid out as the challenge's, so that everything after it is the same as for the challenge.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from connectomics.cellmap.catalog import EM, GROUND_TRUTH, Catalog, Crop, LabelArray
from connectomics.cellmap.crop_table import CropTable, TableEntry
from connectomics.errors import InputError
from connectomics.geometry import VoxelGrid
from connectomics.io.write import create_array, ensure_group, write_multiscale

_SHARES = (0.6, 0.15, 0.25)  # training, validation, test


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
    target = Path(out)
    if target.exists():
        raise InputError(f"{target} exists; delete it or give another folder")
    temporary = target.with_name(target.name + ".part")
    shutil.rmtree(temporary, ignore_errors=True)
    catalog = Catalog.open(str(root))
    entries: list[TableEntry] = []
    train: list[str] = []
    val: list[str] = []
    for crop in catalog.crops(datasets, None, classes):
        zarr = temporary / crop.dataset / f"{crop.dataset}.zarr"
        if not zarr.exists():
            ensure_group(zarr / GROUND_TRUTH)
            (zarr / EM).mkdir(parents=True)
            (zarr / EM / "fibsem-uint8").symlink_to(Path(crop.raw).resolve(), target_is_directory=True)
        number = 10 * int(crop.name.removeprefix("crop"))
        for name in classes:
            if name not in crop.labels:
                continue
            for part, grid in enumerate(_parts(crop, crop.labels[name]), start=1):
                if part < 3:
                    _copy(crop.labels[name], grid, zarr / GROUND_TRUTH / f"crop{number + part}" / name)
                else:
                    entry = TableEntry(number + part, crop.dataset, name, grid)
                    _copy_truth(crop.labels[name], entry, temporary / "truth.zarr" / entry.crop_name / name)
                    entries.append(entry)
        train.append(f"{crop.dataset}/crop{number + 1}")
        val.append(f"{crop.dataset}/crop{number + 2}")
    CropTable(tuple(entries)).save(temporary / "test_crops.csv")
    temporary.rename(target)
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
    values, _ = label.source.read_level(0, np.round(label.grid.to_index(part.translation)).astype(int), part.shape)
    present, known = label.annotation.decode(values)
    counts = {"absent": int((known & ~present).sum()), "unknown": int((~known).sum())}
    annotation = replace(label.annotation, counts=counts)
    ensure_group(location.parent)
    write_multiscale(location, values, part, levels=1, kind="label", attrs=annotation.to_attrs())


def _copy_truth(label: LabelArray, entry: TableEntry, location: Path) -> None:
    begin = np.round(label.grid.to_index(entry.grid.translation)).astype(int)
    values, _ = label.source.read_level(0, begin, entry.grid.shape)
    present, known = label.annotation.decode(values)
    if not known.all():
        raise InputError(
            f"{label.location}: the part that would be held out for testing has {int((~known).sum())} unknown voxels; "
            "the score has no word for unknown, so leave this class out"
        )
    values = np.where(present, values, 0).astype(values.dtype)
    attrs = {"voxel_size": list(entry.grid.voxel_size), "translation": list(entry.grid.translation)}
    ensure_group(location.parent)
    create_array(location, values.shape, values.dtype, attrs=attrs).write((0, 0, 0), values)
