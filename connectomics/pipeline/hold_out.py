"""Hold out test data from a labeled data set: cut each crop into a training, a validation and a test part.

For data that comes without test crops, as in ``pytc demo --data``. The result is a data root (raw is linked, labels are
copied) with a crop table and ground truth in the challenge's layout, so the later steps work as for the challenge.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from connectomics.cellmap.catalog import EM, GROUND_TRUTH, Catalog, Crop, LabelArray
from connectomics.cellmap.classes import is_instance_class
from connectomics.cellmap.crop_table import CropTable, TableEntry
from connectomics.cellmap.summary import label_counts
from connectomics.data.splits import leaks
from connectomics.errors import InputError
from connectomics.geometry import VoxelGrid, slices_of
from connectomics.io.write import create_array, create_multiscale, ensure_group

log = logging.getLogger(__name__)

_SHARES = (0.6, 0.15, 0.25)  # training, validation, test


def hold_out(dataset: Path, out: Path, classes: Sequence[str]) -> tuple[list[str], list[str]]:
    """Cut every crop of a data set along its longest side and write the parts to the new data root ``out``, with
    ``test_crops.csv`` and ``truth.zarr`` of the test parts; return the keys of the training and the validation crops.

    Part k of crop N (1 training, 2 validation, 3 test) becomes crop ``10 N + k``. The score leaves out what is unknown
    in a test part, and classes of which nothing is known there. A crop that overlaps a larger one is left out.

    Args:
        dataset: local folder ``{root}/{dataset}``. classes: only these are copied; a crop needs at least one of them.

    Raises:
        InputError: ``out`` exists, or nothing is known in any test part.
    """
    if out.exists():
        raise InputError(f"{out} exists; delete it or choose another folder")
    found, crops = Catalog.open(str(dataset.parent)).crops([dataset.name], None, classes), list[Crop]()
    for crop in sorted(found, key=lambda crop: -math.prod(crop.box.extent)):
        if pairs := leaks(crops, [crop]):  # a part for training could lie in the test part of another crop
            log.warning("%s overlaps %s and is left out", crop.key, pairs[0][0].key)
        else:
            crops.append(crop)
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        written = _write(dataset.name, crops, part, classes)
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    train, val = ([f"{dataset.name}/crop{n}" for n in sorted(written) if n % 10 == k] for k in (1, 2))
    return train, val


def _write(dataset: str, crops: Sequence[Crop], out: Path, classes: Sequence[str]) -> set[int]:
    """Write all parts; return the numbers of the crops that they became."""
    zarr = out / dataset / f"{dataset}.zarr"
    ensure_group(zarr / GROUND_TRUTH)
    (zarr / EM).mkdir(parents=True)
    (zarr / EM / "fibsem-uint8").symlink_to(Path(crops[0].raw).resolve(), target_is_directory=True)
    entries: list[TableEntry] = []
    written: set[int] = set()
    for crop in crops:
        number = 10 * int(crop.name.removeprefix("crop"))
        for name in (name for name in classes if name in crop.labels):
            for part, grid in enumerate(_parts(crop, crop.labels[name]), start=1):
                if grid.size == 0:
                    continue  # the class's array does not reach this part of the crop
                written.add(number + part)
                if part < 3:
                    _copy(crop.labels[name], grid, zarr / GROUND_TRUTH / f"crop{number + part}" / name)
                else:
                    entry = TableEntry(number + part, dataset, name, grid)
                    if _copy_truth(crop.labels[name], entry, out / "truth.zarr" / f"crop{number + part}" / name):
                        entries.append(entry)
    if not entries:
        raise InputError(
            f"nothing is known of {', '.join(classes)} in the test parts, the last quarter of each crop; annotate more"
        )
    CropTable(tuple(entries)).save(out / "test_crops.csv")
    return written


def _parts(crop: Crop, label: LabelArray) -> list[VoxelGrid]:
    """Cut a label's grid at the world positions that are the same for every class of the crop."""
    axis = int(np.argmax(crop.box.extent))
    grid, length = label.grid, crop.box.extent[axis]
    faces = [crop.box.begin[axis] + share * length for share in np.cumsum(_SHARES)[:-1]]
    cuts = [round((face - grid.box.begin[axis]) / grid.voxel_size[axis]) for face in faces]
    parts = []
    for low, high in pairwise([0, *np.clip(cuts, 0, grid.shape[axis]).tolist(), grid.shape[axis]]):
        first, shape = [0, 0, 0], list(grid.shape)
        first[axis], shape[axis] = low, high - low
        parts.append(grid.crop(first, shape))
    return parts


def _copy(label: LabelArray, part: VoxelGrid, location: Path) -> None:
    counts = label_counts(label, part)
    counts.pop("present")
    attrs = replace(label.annotation, counts=counts).to_attrs()
    ensure_group(location.parent)
    (writer,) = create_multiscale(location, [part], label.source.levels[0].dtype, attrs=attrs)
    for block in label.blocks(part):
        writer.write(block.begin, block.stored)


def _copy_truth(label: LabelArray, entry: TableEntry, location: Path) -> bool:
    """Write a test part in the scorer's layout, with a mask if something is unknown; return whether anything is known.

    If a class is scored by instances but was annotated as a mask, its 26-connected components are the instances; mask
    and IDs of the part are then held in memory.
    """
    counts = label_counts(label, entry.grid)
    if counts["unknown"] == entry.grid.size:
        return False
    split = is_instance_class(entry.class_name) and label.annotation.kind == "semantic"
    attrs = {"voxel_size": list(entry.grid.voxel_size), "translation": list(entry.grid.translation)}
    ensure_group(location.parent)
    dtype = np.dtype(np.uint32) if split else label.source.levels[0].dtype
    writer = create_array(location, entry.grid.shape, dtype, attrs=attrs)
    scored = create_array(f"{location}_mask", entry.grid.shape, np.uint8, attrs=attrs) if counts["unknown"] else None
    mask = np.zeros(entry.grid.shape if split else (0, 0, 0), bool)
    for begin, block, stored, present, known in label.blocks(entry.grid):
        if scored is not None:
            scored.write(begin, known.astype(np.uint8))
        if split:
            mask[slices_of(begin, block.shape)] = present
        else:
            writer.write(begin, np.where(present, stored, 0).astype(stored.dtype))
    if split:
        import cc3d

        writer.write((0, 0, 0), cc3d.connected_components(mask, connectivity=26).astype(np.uint32))
    return True
