"""Numba kernels of measuring, in a module of their own so that importing the package does not import Numba.

Labels of a block are 0 (background) and 1..n, with a margin around the block's own voxels as far as the volume goes:
``low`` and ``high`` (3,) are begin and end (exclusive) of its own voxels.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

from connectomics.decoding.blocks.component_kernels import add_voxel

#: Kinds of steps to one of the 26 neighbors, by the axes they run along: 4 z + 2 y + x - 1.
KINDS = 7


@numba.njit(cache=True, nogil=True)
def _steps_out(labels: NDArray[np.uint32], z: int, y: int, x: int, found: NDArray[np.int64]) -> bool:
    """Count, by kind, the neighbors of a voxel with another label; return whether there are any."""
    label = labels[z, y, x]
    depth, height, width = labels.shape
    some = False
    for v in range(max(z - 1, 0), min(z + 2, depth)):
        for u in range(max(y - 1, 0), min(y + 2, height)):
            for t in range(max(x - 1, 0), min(x + 2, width)):
                if labels[v, u, t] != label:
                    found[4 * abs(v - z) + 2 * abs(u - y) + abs(t - x) - 1] += 1
                    some = True
    return some


@numba.njit(cache=True, nogil=True)
def measure(
    labels: NDArray[np.uint32],
    low: NDArray[np.int64],
    high: NDArray[np.int64],
    origin: NDArray[np.int64],
    sizes: NDArray[np.int64],
    sums: NDArray[np.int64],
    boxes: NDArray[np.int64],
    steps: NDArray[np.int64],
) -> None:
    """Add a block to the measures of its labels; row i is label i + 1.

    Args:
        origin: (3,) the volume's voxel at index (0, 0, 0) of ``labels``.
        sizes, sums, boxes, steps: (n,), (n, 3), (n, 6), (n, KINDS), see `Instances`.
    """
    for z in range(low[0], high[0]):
        for y in range(low[1], high[1]):
            for x in range(low[2], high[2]):
                if labels[z, y, x] == 0:
                    continue
                k = np.int64(labels[z, y, x]) - 1
                add_voxel(k, z + origin[0], y + origin[1], x + origin[2], sizes, boxes, sums)
                _steps_out(labels, z, y, x, steps[k])


@numba.njit(cache=True, nogil=True)
def surface_labels(
    labels: NDArray[np.uint32], low: NDArray[np.int64], high: NDArray[np.int64], steps: NDArray[np.int64]
) -> NDArray[np.uint32]:
    """Return the block's own voxels: the label if one of 26 neighbors has another one, else 0; adds to ``steps``."""
    found = np.zeros((high[0] - low[0], high[1] - low[1], high[2] - low[2]), np.uint32)
    for z in range(low[0], high[0]):
        for y in range(low[1], high[1]):
            for x in range(low[2], high[2]):
                label = labels[z, y, x]
                if label != 0 and _steps_out(labels, z, y, x, steps[np.int64(label) - 1]):
                    found[z - low[0], y - low[1], x - low[2]] = label
    return found


@numba.njit(cache=True, nogil=True)
def add_near(
    labels: NDArray[np.uint32], low: NDArray[np.int64], near: NDArray[np.bool_], steps: NDArray[np.int64]
) -> None:
    """Add the steps of the block's own voxels that are ``near`` (shape as `surface_labels`) to ``steps`` (n, KINDS)."""
    for z in range(near.shape[0]):
        for y in range(near.shape[1]):
            for x in range(near.shape[2]):
                if near[z, y, x]:
                    k = np.int64(labels[z + low[0], y + low[1], x + low[2]]) - 1
                    _steps_out(labels, z + low[0], y + low[1], x + low[2], steps[k])
