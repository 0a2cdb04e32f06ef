"""Whether an array of a submission lies where the crop table says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from connectomics.cellmap.crop_table import TableEntry
from connectomics.errors import InputError
from connectomics.geometry import Triple, VoxelGrid, triple
from connectomics.submission.archive import ArchivedArray
from connectomics.submission.findings import Finding

# The names under which the official scorer looks for them, in this order; of longer lists the last three count.
_VOXEL_SIZE = ("voxel_size", "resolution", "scale")
_TRANSLATION = ("translation", "offset")
_EXPORT = "export it on the table's grid"


def check_grid(array: ArchivedArray, entry: TableEntry) -> list[Finding]:
    """Compare voxel size, translation, shape and axis order with the table."""
    target, path = entry.grid, array.path
    shape = (array.shape[0], array.shape[1], array.shape[2])
    try:
        size = _attribute(array.attrs, _VOXEL_SIZE)
        first = _attribute(array.attrs, _TRANSLATION)
        if size is not None and min(size) <= 0:
            raise InputError(f"voxel_size must be positive, found {size}")
    except InputError as error:
        return [Finding("error", "attributes", path, str(error), "three numbers, nm, z y x", _EXPORT)]
    findings = []
    if size is None:
        findings.append(_without(path, "voxel_size", list(target.voxel_size), shape, target))
    if first is None:
        findings.append(_without(path, "translation", list(target.translation), shape, target))
    swapped = _axis_order(path, size, first, shape, target)
    if swapped:
        return findings + swapped
    if size is None or first is None:
        if size is not None and not _same(size, target.voxel_size):
            findings.append(_wrong(path, "voxel-size", f"voxel_size {_text(size)}", _text(target.voxel_size)))
        return findings
    return findings + _placed(path, VoxelGrid(size, first, shape), target)


def _placed(path: str, own: VoxelGrid, target: VoxelGrid) -> list[Finding]:
    """Whether an array with all of its attributes lies on the table's grid, or at least covers it."""
    if _same(own.voxel_size, target.voxel_size) and own.shape == target.shape:
        shift = target.to_index(own.translation)
        worst = float(np.max(np.abs(shift)))
        if worst < 1e-3:
            return []
        what = f"translation {_text(own.translation)}, off by {_text([float(s) for s in shift])} voxels"
        hint = "it is the centre of the first voxel, not its corner; " if abs(worst - 0.5) < 1e-3 else ""
        if worst >= 0.5:
            return [_wrong(path, "translation", what, _text(target.translation), hint)]
        return [Finding("warning", "translation", path, what, _text(target.translation), hint + _EXPORT)]
    if own.shape == target.shape:
        what = f"voxel_size {_text(own.voxel_size)} with the table's shape"
        return [_wrong(path, "voxel-size", what, _text(target.voxel_size), "the portal would stretch it; ")]
    share = math.prod(target.box.intersect(own.box).extent) / max(math.prod(target.box.extent), 1e-300)
    differs = "voxel size" if not _same(own.voxel_size, target.voxel_size) else "shape"
    rule = "voxel-size" if differs == "voxel size" else "shape"
    if share < 1 - 1e-6:
        what = f"{own}, which covers {share:.1%} of the crop"
        return [_wrong(path, rule, what, str(target), "the rest counts as background; ")]
    advice = "the portal resamples it by its own rules; " + _EXPORT
    return [Finding("warning", rule, path, f"{own}, another {differs}", str(target), advice)]


def _axis_order(
    path: str, size: Triple | None, first: Triple | None, shape: Sequence[int], target: VoxelGrid
) -> list[Finding]:
    """Values that are the table's in another order."""
    findings = []
    for name, own, wanted in (
        ("voxel_size", size, target.voxel_size),
        ("translation", first, target.translation),
        ("shape", tuple(float(n) for n in shape), tuple(float(n) for n in target.shape)),
    ):
        # A shape in another order is a wrong one only where the voxel size says that it should be the table's.
        if own is None or _same(own, wanted) or (name == "shape" and size is not None and not _permuted(size, target)):
            continue
        if _same(sorted(own), sorted(wanted)):
            what = f"{name} {_text(own)}, the table's in another order"
            findings.append(_wrong(path, "axis-order", what, f"{_text(wanted)} (z, y, x)"))
    return findings


def _permuted(size: Sequence[float], target: VoxelGrid) -> bool:
    return _same(sorted(size), sorted(target.voxel_size))


def _without(path: str, name: str, value: list[float], shape: Sequence[int], target: VoxelGrid) -> Finding:
    """An absent attribute: harmless for the score where the shape is the crop's, else the array is misplaced."""
    rule = "no-voxel-size" if name == "voxel_size" else "no-translation"
    if tuple(shape) == target.shape:
        advice = "add it; the portal takes the array as lying on the crop, whose shape it has"
        return Finding("warning", rule, path, f"no attribute {name}", f"{name} = {value}", advice)
    what = f"no attribute {name} and shape {tuple(shape)}"
    advice = "the portal would centre or pad it; " + _EXPORT
    return Finding("error", rule, path, what, f"{name} = {value} and shape {target.shape}", advice)


def _attribute(attrs: dict[str, Any], names: Sequence[str]) -> Triple | None:
    for name in names:
        if attrs.get(name) is not None:
            value = attrs[name]
            return triple(value[-3:] if isinstance(value, list) else value, name)
    return None


def _wrong(path: str, rule: str, found: str, expected: str, hint: str = "") -> Finding:
    return Finding("error", rule, path, found, expected, hint + _EXPORT)


def _same(one: Sequence[float], other: Sequence[float]) -> bool:
    return bool(np.allclose(one, other, rtol=1e-5, atol=1e-6))


def _text(values: Sequence[float]) -> str:
    return "[" + ", ".join(f"{v:.8g}" for v in values) + "]"
