"""Numba kernels for labels, in a separate module so that importing the package does not import numba."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

_MORE = np.float32(1.0 + 1e-4)  # a larger weight wins only if it exceeds rounding


@numba.njit(cache=True, nogil=True)
def encode_rows(
    words: NDArray[np.uint64], start: int, rows: NDArray[np.uint64], used: int, codes: NDArray[np.uint32]
) -> tuple[int, int]:
    """Number the columns of ``words`` (n words, voxels) by equal rows of the table ``rows`` (capacity, n words).

    Starts at voxel ``start`` with ``used`` rows and adds a row for every new column. Returns the voxel it reached (not
    the last one if the table is full) and the number of rows in use. Neighbors are usually equal, so the last row is
    tried first, then a hash table with open addressing.
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


@numba.njit(cache=True, nogil=True)
def vote(
    values: NDArray[Any], present: NDArray[np.bool_],
    z_first: NDArray[np.int64], z_count: NDArray[np.int64], z_weights: NDArray[np.float32],
    y_first: NDArray[np.int64], y_count: NDArray[np.int64], y_weights: NDArray[np.float32],
    x_first: NDArray[np.int64], x_count: NDArray[np.int64], x_weights: NDArray[np.float32],
    out: NDArray[np.uint64],
) -> None:  # fmt: skip
    """The value with the largest weight in every target voxel among the ``present`` source voxels; 0 if there is none.

    values, present: the source (d, h, w). The tables of the three axes are those of `io.resample.AxisTable`. Writes
    ``out`` (D, H, W). Few values meet in a voxel, and neighbors are usually equal, so a short list holds them.
    """
    most = z_count.max() * y_count.max() * x_count.max()
    met, weights = np.empty(most, np.uint64), np.empty(most, np.float32)
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            for k in range(out.shape[2]):
                n, last = 0, 0
                for a in range(z_count[i]):
                    for b in range(y_count[j]):
                        weight = z_weights[i, a] * y_weights[j, b]
                        z, y = z_first[i] + a, y_first[j] + b
                        for c in range(x_count[k]):
                            x = x_first[k] + c
                            if not present[z, y, x]:
                                continue
                            value = np.uint64(values[z, y, x])
                            if n == 0 or met[last] != value:
                                last = 0
                                while last < n and met[last] != value:
                                    last += 1
                                if last == n:
                                    met[n], weights[n] = value, np.float32(0.0)
                                    n += 1
                            weights[last] += weight * x_weights[k, c]
                best = 0
                for m in range(1, n):
                    if weights[m] > weights[best] * _MORE:
                        best = m
                out[i, j, k] = met[best] if n else np.uint64(0)


@numba.njit(cache=True, nogil=True)
def look_up(codes: NDArray[Any], table: NDArray[Any], out: NDArray[Any]) -> None:
    """``out = table[codes]`` of flat arrays; ``numpy.take`` would convert the codes to eight-byte indices first."""
    for v in range(codes.size):  # unsigned indices: numba need not handle negative ones
        out[np.uint64(v)] = table[np.uint64(codes[np.uint64(v)])]


@numba.njit(inline="always")
def _mix(key: NDArray[np.uint64], n_words: int) -> np.uint64:
    """A hash of a row: multiply and fold, as in splitmix64."""
    value = np.uint64(0x9E3779B97F4A7C15)
    for w in range(n_words):
        value = (value ^ key[w]) * np.uint64(0xBF58476D1CE4E5B9)
        value ^= value >> np.uint64(29)
    return value
