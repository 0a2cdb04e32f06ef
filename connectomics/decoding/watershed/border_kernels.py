"""The numba kernel of the borders between blocks."""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

from connectomics.decoding.watershed.forest_kernels import slot


@numba.njit(cache=True, nogil=True)
def border_edges(
    low: NDArray[np.uint32],
    high: NDArray[np.uint32],
    low_height: NDArray[np.int32],
    high_height: NDArray[np.int32],
    low_number: NDArray[np.int64],
    high_number: NDArray[np.int64],
    reach: int,
) -> tuple[
    NDArray[np.int64],
    NDArray[np.int64],
    NDArray[np.int64],
    NDArray[np.int64],
    NDArray[np.int32],
    NDArray[np.int32],
]:
    """The first edge between every two labels that touch across a border between blocks.

    Args:
        low, high: (h, w) labels on its two sides, 0 nothing; with the voxels' heights and numbers in the volume.
        reach: largest sum of the steps along both axes between voxels that are neighbours.

    Returns:
        The labels on both sides, the number of the worse and of the better voxel, their heights; each (m,).
    """
    keys = np.full(1 << 10, -1, np.int64)
    numbers = np.empty((1 << 10, 2), np.int64)
    levels = np.empty((1 << 10, 2), np.int32)
    count = 0
    rows, columns = low.shape
    side = min(reach, 1)
    for y in range(rows):
        for x in range(columns):
            if low[y, x] == 0:
                continue
            here, h = low_number[y, x], low_height[y, x]
            for v in range(max(0, y - side), min(rows, y + side + 1)):
                for u in range(max(0, x - side), min(columns, x + side + 1)):
                    if high[v, u] == 0 or abs(v - y) + abs(u - x) > reach:
                        continue
                    there, g = high_number[v, u], high_height[v, u]
                    if h < g or (h == g and here < there):
                        worse, better, worse_height, better_height = there, here, g, h
                    else:
                        worse, better, worse_height, better_height = here, there, h, g
                    key = (np.int64(low[y, x]) << 32) | np.int64(high[v, u])
                    at = slot(keys, key)
                    if keys[at] == -1:
                        keys[at] = key
                        count += 1
                    elif not (
                        worse_height < levels[at, 0]
                        or (worse_height == levels[at, 0] and worse < numbers[at, 0])
                        or (
                            worse == numbers[at, 0]
                            and (
                                better_height < levels[at, 1]
                                or (better_height == levels[at, 1] and better < numbers[at, 1])
                            )
                        )
                    ):
                        continue
                    numbers[at, 0], numbers[at, 1] = worse, better
                    levels[at, 0], levels[at, 1] = worse_height, better_height
            if 4 * count > len(keys):
                old_keys, old_numbers, old_levels = keys, numbers, levels
                keys = np.full(4 * len(keys), -1, np.int64)
                numbers = np.empty((len(keys), 2), np.int64)
                levels = np.empty((len(keys), 2), np.int32)
                for k in range(len(old_keys)):
                    if old_keys[k] != -1:
                        at = slot(keys, old_keys[k])
                        keys[at], numbers[at], levels[at] = old_keys[k], old_numbers[k], old_levels[k]
    chosen = np.flatnonzero(keys != -1)
    both = keys[chosen]
    return (
        both >> 32,
        both & 0xFFFFFFFF,
        numbers[chosen, 0],
        numbers[chosen, 1],
        levels[chosen, 0],
        levels[chosen, 1],
    )
