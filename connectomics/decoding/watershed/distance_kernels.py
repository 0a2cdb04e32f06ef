"""Squared distances to the background in whole numbers: the same to the bit whatever part of a volume is looked at."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from connectomics.decoding.blocks.component_kernels import Flags, Ints, Ints32


@numba.njit(cache=True, nogil=True)
def along_z(mask: Flags, begin: int, out: Ints32, weight: int, cap: int) -> None:
    """Squared distance along z to the nearest voxel that is not in ``mask`` (d, h, w), at most ``cap``.

    Args:
        begin: the plane of ``mask`` that the first plane of ``out`` (e, h, w) is of.
        weight: square of the voxel's edge along z.
    """
    depth, height, width = mask.shape
    end = begin + out.shape[0]
    far = depth + 1
    steps = np.full((height, width), far, np.int32)
    for z in range(end):  # planes since the last background; kept in `out` until the way back
        for y in range(height):
            for x in range(width):
                if not mask[z, y, x]:
                    steps[y, x] = 0
                elif steps[y, x] < far:
                    steps[y, x] += 1
                if z >= begin:
                    out[z - begin, y, x] = steps[y, x]
    steps[:] = far
    for z in range(depth - 1, begin - 1, -1):
        for y in range(height):
            for x in range(width):
                if not mask[z, y, x]:
                    steps[y, x] = 0
                elif steps[y, x] < far:
                    steps[y, x] += 1
                if z < end:
                    k = np.int64(out[z - begin, y, x])
                    k = k if k < steps[y, x] else np.int64(steps[y, x])
                    out[z - begin, y, x] = cap if k >= far or weight * k * k > cap else weight * k * k


@numba.njit(cache=True, nogil=True)
def along_line(f: Ints, n: int, weight: int, cap: int, place: Any, start: Any, out: Any) -> None:
    """out[i] = min over j of f[j] + weight (i - j)^2, at most ``cap``, for a line of n values.

    The lower envelope of parabolas (Felzenszwalb & Huttenlocher 2012, "Distance transforms of sampled functions") in
    whole numbers, so that the least value is found exactly. A zero is lowest at its own place: what lies between two
    of them is a line by itself.

    Args:
        place, start: (n + 1,) scratch: the parabolas of the envelope and where each begins to be the lowest.
    """
    low = 0
    while low < n:
        if f[low] == 0:
            out[low] = 0
            low += 1
            continue
        high = low
        while high < n and f[high] != 0:
            high += 1
        top = -1
        for q in range(max(low - 1, 0), min(high + 1, n)):
            if f[q] >= cap:
                continue
            at = low
            while top >= 0:
                v = place[top]
                # the first i at which the parabola of q is no higher than that of v
                up = f[q] - f[v] + weight * (q * q - v * v)
                at = -((-up) // (2 * weight * (q - v)))
                if at > start[top]:
                    break
                top -= 1
            if top < 0:
                at = low
            if at < high:
                top += 1
                place[top] = q
                start[top] = max(at, low)
        if top < 0:
            out[low:high] = cap
        else:
            k = 0
            for i in range(low, high):
                while k < top and start[k + 1] <= i:
                    k += 1
                step = i - place[k]
                out[i] = min(f[place[k]] + weight * step * step, cap)
        low = high


@numba.njit(cache=True, nogil=True)
def along_rows(values: Ints32, begin: int, out: Ints32, weight: int, cap: int, outside: int) -> None:
    """`along_line` along the last axis of ``values`` (d, h, w); ``out`` (d, h, e) takes what begins at ``begin``.

    ``outside``: if not 0, ``out`` takes heights: minus the values, and ``outside`` where they are zero. ``out`` may be
    the beginning of ``values`` itself.
    """
    width = values.shape[2]
    line, result = np.empty(width, np.int64), np.empty(width, np.int64)
    place, start = np.empty(width + 1, np.int64), np.empty(width + 1, np.int64)
    for z in range(values.shape[0]):
        for y in range(values.shape[1]):
            for x in range(width):
                line[x] = values[z, y, x]
            along_line(line, width, weight, cap, place, start, result)
            for x in range(out.shape[2]):
                d = result[begin + x]
                out[z, y, x] = d if outside == 0 else (outside if d == 0 else -d)
