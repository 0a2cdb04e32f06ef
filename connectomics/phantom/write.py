"""Writing a phantom: raw with its pyramid, label arrays with their annotation, the test crops' ground truth."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics import __version__
from connectomics.cellmap.classes import is_instance_class
from connectomics.cellmap.crop_table import CropTable, TableEntry
from connectomics.errors import WriteError, as_write_error
from connectomics.geometry import VoxelGrid
from connectomics.io.artifacts import publish
from connectomics.io.location import local_path
from connectomics.io.multiscale import PlainArray
from connectomics.io.replacing import not_ours, unfinished_folder
from connectomics.io.write import (
    build_levels,
    create_array,
    create_multiscale,
    ensure_group,
    update_attrs,
    write_multiscale,
)
from connectomics.phantom import kinds, layout
from connectomics.phantom.layout import CropPlan, DatasetPlan
from connectomics.phantom.options import CropInfo, PhantomInfo, PhantomOptions
from connectomics.phantom.scene import Scene, class_mask

_MARK = "phantom.json"
_RAW_LEVELS = 4
# Rendered at a time: whole chunks, some 60 MB with class, owner and gray value.
_RAW_BLOCK = (128, 256, 256)
# Labels compress to almost nothing, so larger chunks mean fewer files.
_LABEL_CHUNKS = (128, 128, 128)
_UNKNOWN = 255


def make_phantom(
    out: str | Path, options: PhantomOptions | None = None, progress: Callable[[str], None] | None = None
) -> PhantomInfo:
    """Write a phantom to the folder ``out``; it appears there complete or not at all.

    The folder holds the data sets in CellMap's layout, ``test_crops.csv`` (the crop table of the test crops),
    ``truth.zarr`` (their labels in the scorer's layout) and ``phantom.json`` (options, grids, objects and crops).

    Args:
        out: a folder that does not exist or is empty, or with ``options.overwrite`` one that holds a phantom.
        options: by default those of the demo's phantom.
        progress: called with a line of text before each step.

    Raises:
        WriteError: ``out`` is not empty, or cannot be written.
        InputError: the crops do not fit.
    """
    wanted = options or PhantomOptions()
    target = local_path(out).absolute()
    _check_target(target, wanted.overwrite)
    with as_write_error(f"cannot write a phantom to {target}", "nothing was kept"), unfinished_folder(target) as part:
        part.mkdir(parents=True)
        info = _write(part, wanted, progress or (lambda line: None))
        publish(part, target)
    return replace(info, root=target)


def _write(root: Path, options: PhantomOptions, progress: Callable[[str], None]) -> PhantomInfo:
    infos: list[CropInfo] = []
    table: list[TableEntry] = []
    raw: dict[str, VoxelGrid] = {}
    objects: dict[str, dict[str, int]] = {}
    info = PhantomInfo(root, raw, (), objects)
    ensure_group(info.truth)
    for plan in layout.datasets(options):
        progress(f"{plan.name}: placing a cell in {plan.raw}")
        scene = plan.scene()
        raw[plan.name] = plan.raw
        objects[plan.name] = {k.name: scene.objects.count(i) for i, k in enumerate(kinds.KINDS)}
        for crop in layout.crops(plan, scene, options):
            progress(f"{plan.name}: crop{crop.number}, {len(crop.grids)} classes, {crop.finest}")
            if crop.test:
                infos.append(write_test_crop(info.truth, plan, scene, crop))
                table.extend(TableEntry(crop.number, plan.name, n, g) for n, g in crop.grids.items())
            else:
                infos.append(write_training_crop(root, plan, scene, crop))
        progress(f"{plan.name}: raw")
        write_raw(root, plan, scene)
    CropTable(tuple(table)).save(info.crop_table)
    record = {  # no paths and no times, so that the same options give the same bytes
        "artefact": "phantom",
        "version": __version__,
        "options": {k: v for k, v in asdict(options).items() if k != "overwrite"},
        "datasets": {n: {"raw": raw[n].to_dict(), "objects": objects[n]} for n in raw},
        "crops": [{**asdict(c), "grid": c.grid.to_dict()} for c in infos],
    }
    (root / _MARK).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return replace(info, crops=tuple(infos))


def _check_target(target: Path, overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise WriteError(f"cannot write a phantom to {target}: it is a file; choose a folder")
    if target.is_dir() and any(target.iterdir()):
        if not overwrite:
            raise WriteError(
                f"{target} is there already and not empty; choose another folder, or overwrite it (--overwrite)"
            )
        try:
            made = json.loads((target / _MARK).read_text(encoding="utf-8"))
            own = {_MARK, "test_crops.csv", "truth.zarr", *made["datasets"]} if made["artefact"] == "phantom" else set()
        except (OSError, ValueError, KeyError, TypeError):
            own = set()
        foreign = [path for path in sorted(target.iterdir()) if path.name not in own]
        if foreign:
            raise not_ours(foreign[0] if own else target, "phantom")


def write_raw(root: Path, plan: DatasetPlan, scene: Scene) -> None:
    """Write the raw volume to ``{root}/{dataset}/{dataset}.zarr/recon-1/em/fibsem-uint8``, block by block."""
    where = recon(root, plan.name) / "em" / "fibsem-uint8"
    (writer,) = create_multiscale(where, [plan.raw], np.uint8, name="fibsem-uint8")
    for begin, grid in plan.raw.blocks(_RAW_BLOCK):
        writer.write(begin, scene.render(grid).raw)
    build_levels(where, _RAW_LEVELS, "raw")


def write_training_crop(root: Path, plan: DatasetPlan, scene: Scene, crop: CropPlan) -> CropInfo:
    """Write one crop below ``recon-1/labels/groundtruth``: a multiscale with annotation attributes for each class."""
    where = recon(root, plan.name) / "labels" / "groundtruth" / f"crop{crop.number}"
    ensure_group(where)
    info = CropInfo(plan.name, f"crop{crop.number}", False, crop.finest, {}, {}, {})
    for name, grid, values in _labels(scene, crop):
        encoding = _encoding(name, crop)
        if is_instance_class(name):
            last = info.objects[name] = int(values.max(initial=0))
            if name in crop.partial:  # no object may have the number of unknown
                values[values >= _UNKNOWN] += 1
            elif name == next((n for n in crop.shifted_id if info.objects.get(n)), None) and last < _UNKNOWN:
                values[values == last] = _UNKNOWN
        elif (encoding["absent"], encoding["present"]) != (0, 1):
            values = np.where(values != 0, np.uint8(encoding["present"]), np.uint8(encoding["absent"]))
        info.voxels[name] = int(np.count_nonzero(values != encoding["absent"]))
        if name in crop.partial:  # the last quarter of the longest axis is not annotated
            axis = int(np.argmax(values.shape))
            part = np.moveaxis(values, axis, 0)[values.shape[axis] - values.shape[axis] // 4 :]
            info.voxels[name] -= int(np.count_nonzero(part != encoding["absent"]))
            info.unknown[name] = part.size
            part[...] = encoding["unknown"]
        _write_labels(where / name, name, values, grid, encoding, all_known=name in crop.shifted_id)
    return info


def write_test_crop(truth: Path, plan: DatasetPlan, scene: Scene, crop: CropPlan) -> CropInfo:
    """Write one crop of the ground truth: plain arrays with ``voxel_size`` and ``translation``, 0/1 or ids from 1."""
    info = CropInfo(plan.name, f"crop{crop.number}", True, crop.finest, {}, {}, {})
    for name, grid, values in _labels(scene, crop):
        writer = create_array(truth / info.name / name, grid.shape, values.dtype, grid=grid)
        writer.write((0, 0, 0), values)
        info.voxels[name] = int(np.count_nonzero(values))
        if is_instance_class(name):
            info.objects[name] = int(values.max(initial=0))
    return info


def recon(root: Path, dataset: str) -> Path:
    """Return the group that holds a data set's raw and labels."""
    return root / dataset / f"{dataset}.zarr" / "recon-1"


def _labels(scene: Scene, crop: CropPlan) -> Iterator[tuple[str, VoxelGrid, NDArray[Any]]]:
    """Class, grid and values: uint8 0/1, or uint16 (uint32 for many objects) ids renumbered to 1..n in their order."""
    parts = {grid: scene.render(grid, raw=False) for grid in {*crop.grids.values()}}
    for name, grid in crop.grids.items():
        if is_instance_class(name):
            ids = scene.instances_of(parts[grid], name)
            known = np.flatnonzero(np.bincount(ids.ravel(), minlength=1)[1:]) + 1
            numbers = np.zeros(int(ids.max(initial=0)) + 1, np.uint16 if len(known) < 65535 else np.uint32)
            numbers[known] = np.arange(1, len(known) + 1)
            yield name, grid, numbers[ids]
        else:
            yield name, grid, class_mask(parts[grid].atoms, name).astype(np.uint8)


def _encoding(name: str, crop: CropPlan) -> dict[str, int]:
    if name == crop.odd_encoding:
        return {"absent": 1, "present": 2, "unknown": 0}
    if not is_instance_class(name):
        return {"absent": 0, "present": 1, "unknown": _UNKNOWN}
    if name in crop.shifted_id or name in crop.partial:
        return {"absent": 0, "unknown": _UNKNOWN}
    return {"absent": 0}


def _write_labels(
    where: Path, name: str, values: NDArray[Any], grid: VoxelGrid, encoding: dict[str, int], all_known: bool
) -> None:
    """Write a class's multiscale: the group says what its values mean, each level how many voxels have which state."""
    levels = 1
    while levels < 3 and min(grid.shape) >= 24 * 2**levels:
        levels += 1
    kind = "instance_segmentation" if is_instance_class(name) else "semantic_segmentation"
    annotation = {"annotation_type": {"encoding": encoding, "type": kind}, "class_name": name}
    attrs = {"cellmap": {"annotation": annotation}}
    write_multiscale(where, values, grid, levels=levels, kind="label", attrs=attrs, chunks=_LABEL_CHUNKS)
    for level in range(levels):
        stored = PlainArray.open(where / f"s{level}").read() if level else values
        counts = {state: int(np.count_nonzero(stored == n)) for state, n in encoding.items() if state != "present"}
        if all_known:  # the number of unknown stands for an object here
            counts["unknown"] = 0
        update_attrs(where / f"s{level}", {"cellmap": {"annotation": {**annotation, "complement_counts": counts}}})
