"""Resample between voxel grids: linear or area-averaged values for raw, nearest for labels, exact fractions.

A table per axis (`AxisTable`) gives the source voxels of each target voxel and their weights; one numba kernel applies
the three tables. Source voxel j covers [j, j + 1) in face coordinates.

Raw (`linear`), per axis: linear interpolation at the target center if the target voxel is at most as large as the
source voxel, else the average over the target voxel's box; never the nearest value. If the voxel sizes do not divide
each other, the box average of a staircase is off by up to 1/8 source voxel; the two end weights are balanced so that
the center of mass is the target center. So both cases reproduce a linear ramp exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.errors import InputError
from connectomics.geometry import VoxelGrid

# Overlaps and offsets below a millionth of a source voxel are rounding errors of nanometers.
_SLIVER = 1e-6
# Nominally equal positions and voxel sizes differ by the rounding of decimal metadata (as in geometry.grid).
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class AxisTable:
    """Along one axis, target voxel i is the sum over k < count[i] of weights[i, k] * source[first[i] + k].

    ``first`` and ``count`` are int64 (n,), ``weights`` float32 (n, K); a count of 0 means that no source overlaps.
    """

    first: NDArray[np.int64]
    count: NDArray[np.int64]
    weights: NDArray[np.float32]

    @property
    def span(self) -> tuple[int, int]:
        """Begin and end (exclusive) of the source voxels used; (0, 0) if there are none."""
        used = self.count > 0
        if not used.any():
            return 0, 0
        return int(self.first[used].min()), int((self.first + self.count)[used].max())

    def part(self, begin: int, end: int) -> AxisTable:
        """Return the table of target voxels ``begin`` to ``end``."""
        return AxisTable(self.first[begin:end], self.count[begin:end], self.weights[begin:end])

    def shifted(self, begin: int) -> AxisTable:
        """Return the table for a source block that starts at source voxel ``begin``."""
        return AxisTable(np.where(self.count > 0, self.first - begin, 0), self.count, self.weights)


#: Of the axes z, y and x.
Tables = Sequence[AxisTable]


def linear(
    block: NDArray[Any], block_grid: VoxelGrid, target_grid: VoxelGrid, out: NDArray[np.uint8] | None = None
) -> NDArray[Any]:
    """Return raw values of ``block`` (D, H, W) on ``block_grid`` at the voxels of ``target_grid``; float32.

    If ``out`` is given, probabilities p are stored there as uint8, round(255 p).

    Per axis linear interpolation, or the box average if the target is coarser (see the module). Beyond the block its
    edge values are repeated; a target voxel partly beyond it is the average over the part inside.
    """
    _check(block, block_grid)
    return apply(block, raw_tables(block_grid, target_grid), out)


def area_fraction(block: NDArray[Any], block_grid: VoxelGrid, target_grid: VoxelGrid) -> NDArray[np.float32]:
    """Return the exact mean of ``block`` (bool, integer or float; D, H, W) over each target voxel's box; float32.

    For a mask that is the share of the target voxel that the mask fills. Parts beyond the block do not count (see
    `area_coverage`); a target voxel wholly beyond it is 0.
    """
    _check(block, block_grid)
    if block.dtype.kind in "bu" and not block.any():
        return np.zeros(target_grid.shape, dtype=np.float32)
    return apply(block, overlap_tables(block_grid, target_grid)[0])


def area_coverage(block_grid: VoxelGrid, target_grid: VoxelGrid) -> NDArray[np.float32]:
    """Return the share of each target voxel's box inside the block's box, 0 to 1; float32, target shape."""
    z, y, x = overlap_tables(block_grid, target_grid)[1]
    return (z[:, None, None] * y[:, None] * x).astype(np.float32)


def nearest(block: NDArray[Any], block_grid: VoxelGrid, target_grid: VoxelGrid) -> NDArray[Any]:
    """Return, for each target center, the value of the block voxel whose cell contains it; 0 beyond the block.

    On a tie (the center lies on a face) it is the voxel that begins there: floor(index + 1/2).
    """
    _check(block, block_grid)
    out = np.zeros(target_grid.shape, dtype=block.dtype)
    kept = [np.flatnonzero(axis) for axis in inside_axes(block_grid, target_grid)]
    if all(len(k) for k in kept):
        z, y, x = (i[k] for i, k in zip(nearest_indices(block_grid, target_grid), kept, strict=True))
        box = tuple(slice(int(k[0]), int(k[-1]) + 1) for k in kept)
        out[box] = take(block, z, y, x)
    return out


def take(block: NDArray[Any], z: NDArray[np.int64], y: NDArray[np.int64], x: NDArray[np.int64]) -> NDArray[Any]:
    """Return ``block`` at the product of three index lists; runs of consecutive indices are sliced, not gathered."""
    out = block
    for axis, index in enumerate((z, y, x)):
        if len(index) > 0 and index[-1] - index[0] == len(index) - 1 and bool(np.all(np.diff(index) == 1)):
            cut: Any = slice(int(index[0]), int(index[-1]) + 1)
        else:
            cut = index
        out = out[(slice(None),) * axis + (cut,)]
    return out


def nearest_indices(source: VoxelGrid, target: VoxelGrid) -> list[NDArray[np.int64]]:
    """Return, per axis, the source voxel whose cell contains each target center, not clipped to the source."""
    return [np.floor(_centers(source, target, axis) + 0.5 + _TOLERANCE).astype(np.int64) for axis in range(3)]


def inside_axes(source: VoxelGrid, target: VoxelGrid) -> list[NDArray[np.bool_]]:
    """Return, per axis, whether each target center lies in the source's box (begin face included, end face not)."""
    return [(i >= 0) & (i < n) for i, n in zip(nearest_indices(source, target), source.shape, strict=True)]


def raw_tables(source: VoxelGrid, target: VoxelGrid) -> Tables:
    """Return the tables of `linear` from the whole ``source`` grid to ``target``."""
    return [
        _balanced_area(source, target, axis)
        if target.voxel_size[axis] > source.voxel_size[axis] * (1 + _TOLERANCE)
        else _interpolation(source, target, axis)
        for axis in range(3)
    ]


def overlap_tables(source: VoxelGrid, target: VoxelGrid) -> tuple[Tables, list[NDArray[np.float64]]]:
    """Return the tables of `area_fraction`, and per axis the covered share of each target voxel (float64, 0 to 1)."""
    tables, shares = [], []
    for axis in range(3):
        first, count, weights = _overlap_weights(source, target, axis)
        covered = weights.sum(axis=1)
        mean = weights / np.where(count > 0, covered, 1)[:, None]
        tables.append(AxisTable(first, count, mean.astype(np.float32)))
        shares.append(np.clip(covered / (target.voxel_size[axis] / source.voxel_size[axis]), 0, 1))
    return tables, shares


def apply(block: NDArray[Any], tables: Tables, quantized: NDArray[np.uint8] | None = None) -> NDArray[Any]:
    """Return the target values, float32, of a source ``block`` (D, H, W) to which the tables' indices refer; or in
    ``quantized`` as round(255 p)."""
    from connectomics.io.resample_kernels import weighted_sums

    z, y, x = tables
    shape = (len(z.first), len(y.first), len(x.first)) if quantized is None else (1, 1, len(x.first))
    out = np.zeros(shape, dtype=np.float32)
    if out.size == 0 or block.size == 0:
        return out
    source = block.view(np.uint8) if block.dtype == np.bool_ else block
    if source.dtype not in (np.uint8, np.uint16, np.float32):
        source = source.astype(np.float32)
    weighted_sums(
        np.ascontiguousarray(source), *(z.first, z.count, z.weights), *(y.first, y.count, y.weights),
        *(x.first, x.count, x.weights), out, np.empty((0, 0, 0), np.uint8) if quantized is None else quantized,
    )  # fmt: skip
    return out if quantized is None else quantized


def all_present(present: NDArray[np.bool_], tables: Tables) -> NDArray[np.bool_]:
    """Return whether all source voxels of each target voxel are ``present`` (bool block, D H W); target shape."""
    missing = ~present
    for axis, table in enumerate(tables):
        totals = np.cumsum(np.insert(missing, 0, False, axis=axis), axis=axis, dtype=np.int32)
        missing = np.take(totals, table.first + table.count, axis=axis) > np.take(totals, table.first, axis=axis)
    return ~missing


def _centers(source: VoxelGrid, target: VoxelGrid, axis: int) -> NDArray[np.float64]:
    """Target centers along ``axis`` as fractional source indices."""
    world = target.translation[axis] + target.voxel_size[axis] * np.arange(target.shape[axis], dtype=np.float64)
    return (world - source.translation[axis]) / source.voxel_size[axis]


def _interpolation(source: VoxelGrid, target: VoxelGrid, axis: int) -> AxisTable:
    n = source.shape[axis]
    centers = np.clip(_centers(source, target, axis), 0, max(n - 1, 0))
    first = np.floor(centers + _SLIVER).astype(np.int64)
    fraction = centers - first
    fraction[fraction < _SLIVER] = 0
    count = np.where(fraction > 0, 2, 1) if n else np.zeros_like(first)
    return AxisTable(first, count.astype(np.int64), np.stack([1 - fraction, fraction], axis=1).astype(np.float32))


def _overlap_weights(
    source: VoxelGrid, target: VoxelGrid, axis: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """First source voxel, number of them and overlaps in source voxels (n, K), for the target boxes along an axis."""
    n = source.shape[axis]
    half = 0.5 * target.voxel_size[axis] / source.voxel_size[axis]
    middle = _centers(source, target, axis) + 0.5
    low, high = np.clip(middle - half, 0, n), np.clip(middle + half, 0, n)
    first = np.floor(low + _SLIVER).astype(np.int64)
    count = np.ceil(high - _SLIVER).astype(np.int64) - first
    count[high - low <= _SLIVER] = 0
    first[count <= 0] = 0
    count = np.maximum(count, 0)
    steps = np.arange(max(1, int(count.max(initial=0))))
    cells = first[:, None] + steps
    weights = np.minimum(high[:, None], cells + 1) - np.maximum(low[:, None], cells)
    weights[steps >= count[:, None]] = 0
    return first, count, np.maximum(weights, 0)


def _balanced_area(source: VoxelGrid, target: VoxelGrid, axis: int) -> AxisTable:
    n = source.shape[axis]
    first, count, weights = _overlap_weights(source, target, axis)
    if n == 0:
        return AxisTable(first, count, weights.astype(np.float32))
    centers = _centers(source, target, axis)
    size = target.voxel_size[axis] / source.voxel_size[axis]
    covered = weights.sum(axis=1)
    beyond = count == 0  # wholly outside: repeat the edge value
    first[beyond] = np.clip(np.floor(centers[beyond] + 0.5), 0, n - 1).astype(np.int64)
    count[beyond] = 1
    weights[beyond, 0] = 1
    weights /= weights.sum(axis=1, keepdims=True)
    # Balance: move weight between the two end voxels until the center of mass is the target center, only for boxes
    # wholly inside. No weight becomes negative: it keeps at least 1 - 1/(2 span) of its value.
    rows = np.flatnonzero((covered > size - _TOLERANCE) & (count > 1))
    last = count[rows] - 1
    mass = (weights[rows] * np.arange(weights.shape[1])).sum(axis=1) + first[rows]
    move = (centers[rows] - mass) / last
    weights[rows, last] += move
    weights[rows, 0] -= move
    return AxisTable(first, count, weights.astype(np.float32))


def _check(block: NDArray[Any], block_grid: VoxelGrid) -> None:
    if block.shape != block_grid.shape:
        raise InputError(f"the block has shape {block.shape}, its grid {block_grid.shape}; they must agree")
