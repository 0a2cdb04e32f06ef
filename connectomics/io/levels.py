"""Downsampling by two: the coarser levels of a multiscale.

All levels start at the same face; level k has ceil(n / 2^k) voxels. A raw voxel is the mean of the 2x2x2 voxels below
it (of the existing ones, at an odd end), rounded for integers. A label voxel is their most frequent value, the largest
on a tie: that keeps thin objects and, with the usual encoding of 255, keeps unknown unknown.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.errors import InputError
from connectomics.geometry import VoxelGrid

# Planes of the output computed at a time, so that the float sums stay small.
_PLANES = 16


def level_grids(grid: VoxelGrid, levels: int) -> list[VoxelGrid]:
    """Return the grids of levels 0 .. levels - 1 of a pyramid on ``grid``."""
    if levels < 1:
        raise InputError(f"a pyramid needs at least one level, got levels={levels}")
    grids = []
    for factor in (2**k for k in range(levels)):
        size = tuple(factor * v for v in grid.voxel_size)
        first = tuple(t + (factor - 1) / 2 * v for t, v in zip(grid.translation, grid.voxel_size, strict=True))
        grids.append(VoxelGrid(size, first, tuple(-(-n // factor) for n in grid.shape)))
    return grids


def halve_raw(data: NDArray[Any]) -> NDArray[Any]:
    """Return the mean over 2x2x2 voxels, (D, H, W) to (ceil(D/2), ...), same dtype, integers rounded."""
    exact: type[np.floating[Any]] = np.float64 if data.dtype.itemsize > 2 else np.float32
    out = np.empty([-(-n // 2) for n in data.shape], dtype=data.dtype)
    for z in range(0, out.shape[0], _PLANES):
        sums: NDArray[Any] = data[2 * z : 2 * (z + _PLANES)].astype(exact)
        if any(n % 2 for n in sums.shape):  # a last voxel without a partner counts twice, so its mean is itself
            sums = np.pad(sums, [(0, n % 2) for n in sums.shape], "edge")
        for _ in range(3):  # axis 0 becomes the last one, so the third turn restores the order
            sums = np.moveaxis(sums[0::2] + sums[1::2], 0, 2)
        sums = sums / 8
        out[z : z + _PLANES] = np.rint(sums) if data.dtype.kind in "iu" else sums
    return out


def halve_labels(data: NDArray[Any]) -> NDArray[Any]:
    """Return the most frequent value of each 2x2x2 voxels, the largest on a tie; shapes as `halve_raw`, same dtype."""
    from connectomics.io.resample_kernels import majority_of_eight

    out = np.empty([-(-n // 2) for n in data.shape], dtype=data.dtype)
    majority_of_eight(np.ascontiguousarray(data), out)
    return out
