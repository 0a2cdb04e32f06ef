"""Numba kernels for resampling, in a separate module so that importing the package does not import numba."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

_ZERO, _ONE, _FULL = np.float32(0), np.float32(1), np.float32(255)


@numba.njit(cache=True, nogil=True)
def weighted_sums(
    block: NDArray[Any],
    z_first: NDArray[np.int64], z_count: NDArray[np.int64], z_weight: NDArray[np.float32],
    y_first: NDArray[np.int64], y_count: NDArray[np.int64], y_weight: NDArray[np.float32],
    x_first: NDArray[np.int64], x_count: NDArray[np.int64], x_weight: NDArray[np.float32],
    out: NDArray[np.float32],
    quantized: NDArray[np.uint8],
) -> None:  # fmt: skip
    """out[t, u, v] = sum over k, l, m of z_weight[t, k] y_weight[u, l] x_weight[v, m] block[z_first[t] + k, ...].

    If ``quantized`` is not empty, it becomes rint(255 out), with ``out``, of one row only, from 0 to 1. For each output
    row the source rows are summed first (contiguous, vectorized), then the row is resampled along x: the only temporary
    is one row.
    """
    x_low, x_high, copied = block.shape[2], 0, True
    for v in range(len(x_first)):
        copied &= x_count[v] == 1 and x_weight[v, 0] == 1 and x_first[v] == x_first[0] + v
        if x_count[v] > 0:
            x_low = min(x_low, x_first[v])
            x_high = max(x_high, x_first[v] + x_count[v])
    row = np.zeros(block.shape[2], dtype=np.float32)
    for t in range(len(z_first)):
        for u in range(len(y_first)):
            first = True
            for k in range(z_count[t]):
                for m in range(y_count[u]):
                    weight = z_weight[t, k] * y_weight[u, m]
                    source = block[z_first[t] + k, y_first[u] + m]
                    if first:
                        for x in range(x_low, x_high):
                            row[x] = weight * np.float32(source[x])
                        first = False
                    else:
                        for x in range(x_low, x_high):
                            row[x] += weight * np.float32(source[x])
            line = out[0, 0] if quantized.size else out[t, u]
            if first:  # no source row: outside the block
                line[:] = 0
            elif copied:
                summed = row[x_low:x_high]
                for v in range(len(line)):  # numba compiles a slice assignment, with its message, for seconds
                    line[v] = summed[v]
            else:
                for v in range(len(line)):
                    total = np.float32(0)
                    for k in range(x_count[v]):
                        total += x_weight[v, k] * row[x_first[v] + k]
                    line[v] = total
            if quantized.size:
                stored = quantized[t, u]
                for v in range(len(line)):
                    stored[v] = np.uint8(np.int32(np.rint(min(max(line[v], _ZERO), _ONE) * _FULL)))


@numba.njit(cache=True, nogil=True)
def majority_of_eight(data: NDArray[Any], out: NDArray[Any]) -> None:
    """out[z, y, x] = the most frequent value of data[2z:2z+2, 2y:2y+2, 2x:2x+2], the largest on a tie."""
    depth, height, width = data.shape
    for z in range(out.shape[0]):
        for y in range(out.shape[1]):
            for x in range(out.shape[2]):
                best = data[2 * z, 2 * y, 2 * x]
                most = 0
                for i in range(8):
                    a, b, c = 2 * z + (i >> 2), 2 * y + ((i >> 1) & 1), 2 * x + (i & 1)
                    if a >= depth or b >= height or c >= width:
                        continue
                    value = data[a, b, c]
                    count = 0
                    for j in range(8):
                        d, e, f = 2 * z + (j >> 2), 2 * y + ((j >> 1) & 1), 2 * x + (j & 1)
                        if d < depth and e < height and f < width and data[d, e, f] == value:
                            count += 1
                    if count > most or (count == most and value > best):
                        best, most = value, count
                out[z, y, x] = best
