"""The numba kernels of this package (apart, so that importing the package does not import numba).

Labels of a block come as 0 (background) and 1..n, with a margin around the block's own voxels as far as the volume
goes: ``low`` and ``high`` (3,) are the begin and the end (exclusive) of its own voxels.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

from connectomics.decoding.blocks.component_kernels import add_voxel

#: Kinds of steps to one of the 26 neighbours, by the axes that they run along: 4 z + 2 y + x - 1.
KINDS = 7


@numba.njit(cache=True, nogil=True)
def _steps_out(labels: NDArray[np.uint32], z: int, y: int, x: int, found: NDArray[np.int64]) -> bool:
    """Count, by kind, the neighbours of a voxel that hold another label; True where there is any."""
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

    origin (3,): the volume's voxel at index (0, 0, 0) of ``labels``. sizes (n,): voxels. sums (n, 3): of z, y and x in
    voxels of the volume. boxes (n, 6): smallest and largest z y x.
    steps (n, KINDS): pairs of a voxel of the label and a neighbour (26) with another, by kind.
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
def rim(
    labels: NDArray[np.uint32], low: NDArray[np.int64], high: NDArray[np.int64], steps: NDArray[np.int64]
) -> NDArray[np.uint32]:
    """The block's own voxels: the label where a neighbour (26) holds another one, else 0. Adds to ``steps`` (n, KINDS)
    as `measure` does."""
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
    """Add to ``steps`` (n, KINDS) those of the block's own voxels where ``near`` (the shape of `rim`) holds."""
    for z in range(near.shape[0]):
        for y in range(near.shape[1]):
            for x in range(near.shape[2]):
                if near[z, y, x]:
                    k = np.int64(labels[z + low[0], y + low[1], x + low[2]]) - 1
                    _steps_out(labels, z + low[0], y + low[1], x + low[2], steps[k])
