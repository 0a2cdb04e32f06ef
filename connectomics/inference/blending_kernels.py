"""Numba kernels for values of blocks, in a separate module so that importing the package does not import numba."""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

from connectomics.inference.probability_values import HIGHEST, LOWEST

_ZERO, _ONE, _FULL = np.float32(0), np.float32(1), np.float32(255)


@numba.njit(cache=True, nogil=True, error_model="numpy")
def quantized(
    sums: NDArray[np.float32], x: int, out: NDArray[np.uint8], begin: int, end: int, z0: int, z1: int
) -> bool:
    """out[..., begin:end] = rint(255 p), with p = sums / weights from ``x`` on, from 0 to 1; 0 without a weight.

    ``sums`` (C + 1, d, h, w) hold the weights last; planes ``z0`` to ``z1`` are done. Returns whether all quotients are
    probabilities (False also for NaN). Plane by plane, so that its weights stay in the cache; rows are vectorized.
    """
    channels, _, height, _ = out.shape
    n = end - begin
    row = np.empty(n, np.float32)
    fine = True
    for z in range(z0, z1):
        for c in range(channels):
            for y in range(height):
                values, weights = sums[c, z, y, x : x + n], sums[channels, z, y, x : x + n]
                inside = np.int32(0)
                for i in range(n):
                    weight = weights[i]
                    value = values[i] / (weight if weight != _ZERO else _ONE)
                    inside += np.int32((value >= LOWEST) & (value <= HIGHEST))
                    row[i] = np.rint(min(max(value, _ZERO), _ONE) * _FULL)
                stored = out[c, z, y, begin:end]
                for i in range(n):
                    stored[i] = np.uint8(np.int32(row[i]))
                fine &= inside == n
    return fine


@numba.njit(cache=True, nogil=True)
def rounded(
    values: NDArray[np.float32],
    part: tuple[int, int, int],
    out: NDArray[np.uint8],
    into: tuple[int, int, int],
    shape: tuple[int, int, int],
) -> bool:
    """out = rint(255 p), p being ``values`` from 0 to 1: ``shape`` voxels from ``part`` on, stored from ``into`` on.

    Both are (C, d, h, w) and contiguous: with strides known, rows are vectorized. Returns whether all values are
    probabilities (False also for NaN).
    """
    depth, height, width = shape
    fine = True
    for c in range(values.shape[0]):
        for z in range(depth):
            for y in range(height):
                given = values[c, part[0] + z, part[1] + y, part[2] : part[2] + width]
                stored = out[c, into[0] + z, into[1] + y, into[2] : into[2] + width]
                inside = np.int32(0)
                for i in range(width):
                    value = given[i]
                    inside += np.int32((value >= LOWEST) & (value <= HIGHEST))
                    stored[i] = np.uint8(np.int32(np.rint(min(max(value, _ZERO), _ONE) * _FULL)))
                fine &= inside == width
    return fine
