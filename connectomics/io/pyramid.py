"""Pyramids: the coarser levels of a multiscale.

Level k has voxels of 2^k v, its first centre at t + (2^k - 1)/2 v and ceil(n / 2^k) voxels, so that all levels start at
the same face. A raw voxel is the mean of the 2x2x2 voxels below it (of those that exist, at an odd end), rounded to
nearest for integers; a label voxel is the voxel of level 0 with index 2^k i + 2^(k-1), the one whose cell begins at the
centre, which is also what `Multiscale.read_nearest` takes on a tie.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.errors import InputError
from connectomics.geometry import VoxelGrid

# planes of the shrunken volume made at a time, so that the float sums stay small beside the volume
_PLANES = 16


def level_grids(grid: VoxelGrid, levels: int) -> list[VoxelGrid]:
    """The grids of levels 0 .. levels - 1 of a pyramid on ``grid``."""
    if levels < 1:
        raise InputError(f"a pyramid needs at least one level, found levels={levels}")
    grids = []
    for k in range(levels):
        factor = 2**k
        size = [factor * v for v in grid.voxel_size]
        first = [t + (factor - 1) / 2 * v for t, v in zip(grid.translation, grid.voxel_size, strict=True)]
        shape = [-(-n // factor) for n in grid.shape]
        grids.append(VoxelGrid(tuple(size), tuple(first), tuple(shape)))
    return grids


def halve_raw(data: NDArray[Any]) -> NDArray[Any]:
    """Mean over 2x2x2 voxels, (D, H, W) to (ceil(D/2), ceil(H/2), ceil(W/2)), same dtype, integers rounded."""
    exact: type[np.floating[Any]] = np.float64 if data.dtype.itemsize > 2 else np.float32
    out = np.empty([-(-n // 2) for n in data.shape], dtype=data.dtype)
    for z in range(0, out.shape[0], _PLANES):
        sums: NDArray[Any] = data[2 * z : 2 * (z + _PLANES)].astype(exact)
        for axis in range(3):
            sums = _pair_sum(sums, axis)
        sums = sums / 8
        out[z : z + _PLANES] = np.rint(sums) if data.dtype.kind in "iu" else sums
    return out


def level_of_labels(data: NDArray[Any], level: int) -> NDArray[Any]:
    """Level ``level`` of a label volume (D, H, W), taken from level 0."""
    if level == 0:
        return data
    z, y, x = (label_index(n, level) for n in data.shape)
    return data[z][:, y][:, :, x]


def label_index(n: int, level: int, begin: int = 0, count: int | None = None) -> NDArray[np.int64]:
    """Along an axis of ``n`` voxels: the level-0 voxel behind each of ``count`` voxels of ``level`` from ``begin``."""
    if level == 0:
        return np.arange(begin, n if count is None else begin + count)
    stop = -(-n // 2**level) if count is None else begin + count
    return np.minimum(np.arange(begin, stop) * 2**level + 2 ** (level - 1), n - 1)


def _pair_sum(data: NDArray[Any], axis: int) -> NDArray[Any]:
    """Sums of neighbours along ``axis``; a last voxel without a partner counts twice, which leaves it its own mean."""
    data = np.moveaxis(data, axis, 0)
    sums = data[0::2].copy()
    partners = data[1::2]
    sums[: len(partners)] += partners
    if len(partners) < len(sums):
        sums[-1] *= 2
    return np.moveaxis(sums, 0, axis)
