"""Writing a phantom's volumes: raw with its pyramid, label arrays with their annotation, the test crops' truth."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.cellmap.classes import is_instance_class
from connectomics.geometry import VoxelGrid
from connectomics.io.write import (
    ArrayWriter,
    build_levels,
    create_array,
    create_multiscale,
    ensure_group,
    update_attrs,
    write_multiscale,
)
from connectomics.phantom.layout import CropPlan, DatasetPlan
from connectomics.phantom.options import CropInfo
from connectomics.phantom.scene import Part, Scene, class_mask

RAW_LEVELS = 4
# Rendered at a time: whole chunks, some 60 MB with class, owner and grey value.
_RAW_BLOCK = (128, 256, 256)
# Labels compress to almost nothing, so larger chunks mean fewer files.
_LABEL_CHUNKS = (128, 128, 128)
UNKNOWN = 255


def write_raw(root: Path, plan: DatasetPlan, scene: Scene) -> None:
    """The raw volume at ``{root}/{dataset}/{dataset}.zarr/recon-1/em/fibsem-uint8``, block by block."""
    where = recon(root, plan.name) / "em" / "fibsem-uint8"
    (writer,) = create_multiscale(where, [plan.raw], np.uint8, name="fibsem-uint8")
    for begin, grid in plan.raw.blocks(_RAW_BLOCK):
        writer.write(begin, scene.raw(grid))
    build_levels(where, RAW_LEVELS, "raw")


def write_training_crop(root: Path, plan: DatasetPlan, scene: Scene, crop: CropPlan) -> CropInfo:
    """One crop below ``recon-1/labels/groundtruth``: a multiscale with annotation attributes for each class."""
    where = recon(root, plan.name) / "labels" / "groundtruth" / f"crop{crop.number}"
    ensure_group(where)
    voxels: dict[str, int] = {}
    objects: dict[str, int] = {}
    unknown: dict[str, int] = {}
    rendered = _Rendered(scene)
    for name, grid in crop.grids.items():
        values = rendered.label(name, grid)
        encoding = _encoding(name, crop)
        if is_instance_class(name):
            last = objects[name] = int(values.max(initial=0))
            if name in crop.partial:  # no object may have the number of unknown
                values[values >= UNKNOWN] += 1
            elif name == next((n for n in crop.shifted_id if objects.get(n)), None) and last < UNKNOWN:
                values[values == last] = UNKNOWN
        elif (encoding["absent"], encoding["present"]) != (0, 1):
            values = np.where(values != 0, np.uint8(encoding["present"]), np.uint8(encoding["absent"]))
        voxels[name] = int(np.count_nonzero(values != encoding["absent"]))
        if name in crop.partial:
            part = _unlooked(values)
            voxels[name] -= int(np.count_nonzero(part != encoding["absent"]))
            unknown[name] = part.size
            part[...] = encoding["unknown"]
        _write_labels(where / name, name, values, grid, encoding, all_known=name in crop.shifted_id)
    return CropInfo(plan.name, f"crop{crop.number}", False, crop.finest, voxels, objects, unknown)


def write_test_crop(truth: Path, plan: DatasetPlan, scene: Scene, crop: CropPlan) -> CropInfo:
    """One crop of the truth: plain arrays with ``voxel_size`` and ``translation``, 0/1 or ids from 1."""
    rendered = _Rendered(scene)
    voxels: dict[str, int] = {}
    objects: dict[str, int] = {}
    for name, grid in crop.grids.items():
        values = rendered.label(name, grid)
        writer = create_array(truth / f"crop{crop.number}" / name, grid.shape, values.dtype, grid=grid)
        writer.write((0, 0, 0), values)
        voxels[name] = int(np.count_nonzero(values))
        if is_instance_class(name):
            objects[name] = int(values.max(initial=0))
    return CropInfo(plan.name, f"crop{crop.number}", True, crop.finest, voxels, objects, {})


def recon(root: Path, dataset: str) -> Path:
    """The group that holds a data set's raw and labels."""
    return root / dataset / f"{dataset}.zarr" / "recon-1"


class _Rendered:
    """A scene on the grids of a crop, each rendered once."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self._parts: dict[VoxelGrid, Part] = {}

    def label(self, name: str, grid: VoxelGrid) -> NDArray[Any]:
        """uint8 0/1, or uint16 (uint32 for many objects) ids renumbered to 1..n in the order of their world ids."""
        if grid not in self._parts:
            self._parts[grid] = self._scene.render(grid, raw=False)
        part = self._parts[grid]
        if not is_instance_class(name):
            return class_mask(part.atoms, name).astype(np.uint8)
        ids = self._scene.instances_of(part, name)
        there = np.flatnonzero(np.bincount(ids.ravel(), minlength=1)[1:]) + 1
        numbers = np.zeros(int(ids.max(initial=0)) + 1, np.uint16 if len(there) < 65535 else np.uint32)
        numbers[there] = np.arange(1, len(there) + 1)
        return numbers[ids]


def _encoding(name: str, crop: CropPlan) -> dict[str, int]:
    if name == crop.odd_encoding:
        return {"absent": 1, "present": 2, "unknown": 0}
    if not is_instance_class(name):
        return {"absent": 0, "present": 1, "unknown": UNKNOWN}
    if name in crop.shifted_id or name in crop.partial:
        return {"absent": 0, "unknown": UNKNOWN}
    return {"absent": 0}


def _unlooked(values: NDArray[Any]) -> NDArray[Any]:
    """The part of a crop that nobody has looked at: the last quarter of its longest axis (a view)."""
    axis = int(np.argmax(values.shape))
    first = values.shape[axis] - values.shape[axis] // 4
    return values[tuple(slice(first, None) if a == axis else slice(None) for a in range(3))]


def _write_labels(
    where: Path, name: str, values: NDArray[Any], grid: VoxelGrid, encoding: Mapping[str, int], all_known: bool
) -> None:
    """A class's multiscale; the group says what its numbers mean, and each level how many voxels are of which state."""
    levels = 1
    while levels < 3 and min(grid.shape) >= 24 * 2**levels:
        levels += 1
    kind = "instance_segmentation" if is_instance_class(name) else "semantic_segmentation"
    annotation = {"annotation_type": {"encoding": dict(encoding), "type": kind}, "class_name": name}
    attrs = {"cellmap": {"annotation": annotation}}
    write_multiscale(where, values, grid, levels=levels, kind="label", attrs=attrs, chunks=_LABEL_CHUNKS)
    for level in range(levels):
        array = ArrayWriter.open(where / f"s{level}")
        stored = array.read((0, 0, 0), array.shape) if level else values
        counts = {state: int(np.count_nonzero(stored == n)) for state, n in encoding.items() if state != "present"}
        if all_known:  # the number of unknown stands for an object here
            counts["unknown"] = 0
        update_attrs(where / f"s{level}", {"cellmap": {"annotation": {**annotation, "complement_counts": counts}}})
