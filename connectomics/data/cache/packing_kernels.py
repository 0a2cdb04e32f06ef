"""The numba kernel of the cache (apart, so that importing the package does not import numba)."""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray


@numba.njit(cache=True, nogil=True)
def scan_codes(
    codes: NDArray[np.uint32],
    begin: tuple[int, int, int],
    rows: int,
    columns: int,
    starts: NDArray[np.int64],
    members: NDArray[np.int64],
    seeds: NDArray[np.uint64],
    priorities: NDArray[np.uint64],
    places: NDArray[np.int64],
    used: NDArray[np.int64],
    histogram: NDArray[np.int64],
) -> None:
    """Count the codes of a block, and keep for each class the voxels with the smallest priorities.

    A voxel's priority for a class is a pseudo-random number of the class's seed and the voxel's place in the lattice
    alone, so the voxels kept in the end are a uniform sample without replacement, whatever the order of blocks.

    Args:
        codes: (d, h, w). begin: lattice index of the block's first voxel. rows, columns: the lattice's H and W.
        starts, members: the classes present in state k are ``members[starts[k]:starts[k + 1]]``.
        seeds: (C,). priorities, places: (C, most), a heap for each class, the largest priority first; ``used`` (C,)
            says how much of it is filled. A place is the voxel's index in the lattice, flat.
        histogram: (K,) voxels of each state, added to.
    """
    depth, height, width = codes.shape
    most = priorities.shape[1]
    for z in range(depth):
        for y in range(height):
            place = ((begin[0] + z) * rows + begin[1] + y) * columns + begin[2]
            for x in range(width):
                code = codes[z, y, x]
                histogram[code] += 1
                for m in range(starts[code], starts[code + 1]):
                    c = members[m]
                    priority = _mix(seeds[c], place + x)
                    heap, where, n = priorities[c], places[c], used[c]
                    if n < most:
                        at = n
                        used[c] = n + 1
                        while at > 0:
                            above = (at - 1) // 2
                            if heap[above] >= priority:
                                break
                            heap[at], where[at] = heap[above], where[above]
                            at = above
                        heap[at], where[at] = priority, place + x
                    elif priority < heap[0]:
                        at = 0
                        while True:
                            below = 2 * at + 1
                            if below >= most:
                                break
                            if below + 1 < most and heap[below + 1] > heap[below]:
                                below += 1
                            if heap[below] <= priority:
                                break
                            heap[at], where[at] = heap[below], where[below]
                            at = below
                        heap[at], where[at] = priority, place + x


@numba.njit(inline="always")
def _mix(seed: np.uint64, place: int) -> np.uint64:
    """Number ``place`` of the stream splitmix64 of a seed (Steele, Lea and Flood 2014)."""
    value = seed + np.uint64(place + 1) * np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
