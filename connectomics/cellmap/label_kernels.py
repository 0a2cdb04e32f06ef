"""The numba kernels of this package (apart, so that importing the package does not import numba)."""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray


@numba.njit(cache=True, nogil=True)
def encode_rows(
    words: NDArray[np.uint64], start: int, rows: NDArray[np.uint64], used: int, codes: NDArray[np.uint32]
) -> tuple[int, int]:
    """Number the columns of ``words`` (n words, voxels) by equal rows of the table ``rows`` (capacity, n words).

    Begins at voxel ``start`` with ``used`` rows taken and adds rows for what is new. Returns the voxel it came to (less
    than all where the table is full) and the number of rows in use. Neighbours are alike as a rule, so the last row is
    tried first; then a hash table with open addressing.
    """
    n_words, n_voxels = words.shape
    capacity = rows.shape[0]
    size = 1
    while size < 4 * capacity:
        size *= 2
    slots = np.full(size, -1, np.int64)
    for row in range(used):
        place = np.int64(_mix(rows[row], n_words) & np.uint64(size - 1))
        while slots[place] >= 0:
            place = (place + 1) & (size - 1)
        slots[place] = row
    last = 0
    key = np.empty(n_words, np.uint64)
    for voxel in range(start, n_voxels):
        same = True
        for w in range(n_words):
            key[w] = words[w, voxel]
            if key[w] != rows[last, w]:
                same = False
        if not same:
            place = np.int64(_mix(key, n_words) & np.uint64(size - 1))
            found = False
            while slots[place] >= 0:
                row = slots[place]
                equal = True
                for w in range(n_words):
                    if key[w] != rows[row, w]:
                        equal = False
                        break
                if equal:
                    last, found = row, True
                    break
                place = (place + 1) & (size - 1)
            if not found:
                if used == capacity:
                    return voxel, used
                for w in range(n_words):
                    rows[used, w] = key[w]
                slots[place] = used
                last = used
                used += 1
        codes[voxel] = last
    return n_voxels, used


@numba.njit(inline="always")
def _mix(key: NDArray[np.uint64], n_words: int) -> np.uint64:
    """A hash of a row: multiply and fold, as in splitmix64."""
    value = np.uint64(0x9E3779B97F4A7C15)
    for w in range(n_words):
        value = (value ^ key[w]) * np.uint64(0xBF58476D1CE4E5B9)
        value ^= value >> np.uint64(29)
    return value
