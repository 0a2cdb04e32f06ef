"""The numba kernels of this package (apart, so that importing the package does not import numba)."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray


@numba.njit(cache=True, nogil=True)
def measure(
    labels: NDArray[Any],
    begin: NDArray[np.int64],
    shape: NDArray[np.int64],
    sizes: NDArray[np.int64],
    first: NDArray[np.int64],
    boxes: NDArray[np.int32],
    sums: NDArray[np.int64],
) -> None:
    """Measure the objects 1..n of a block that starts at voxel ``begin`` of a volume of ``shape``; row i is object i+1.

    sizes (n,): voxels. first (n,): number of its first voxel in z-y-x order of the volume. boxes (n, 6): smallest z y x
    and largest z y x, both inside. sums (n, 3): sums of z, y and x. All must come as zeros.
    """
    for z in range(labels.shape[0]):
        gz = z + begin[0]
        for y in range(labels.shape[1]):
            gy = y + begin[1]
            row = (gz * shape[1] + gy) * shape[2] + begin[2]
            for x in range(labels.shape[2]):
                label = labels[z, y, x]
                if label == 0:
                    continue
                k = np.int64(label) - 1
                gx = x + begin[2]
                if sizes[k] == 0:
                    first[k] = row + x
                    boxes[k, 0], boxes[k, 1], boxes[k, 2] = gz, gy, gx
                    boxes[k, 3], boxes[k, 4], boxes[k, 5] = gz, gy, gx
                else:
                    boxes[k, 1] = min(boxes[k, 1], gy)
                    boxes[k, 2] = min(boxes[k, 2], gx)
                    boxes[k, 3] = gz  # z only grows
                    boxes[k, 4] = max(boxes[k, 4], gy)
                    boxes[k, 5] = max(boxes[k, 5], gx)
                sizes[k] += 1
                sums[k, 0] += gz
                sums[k, 1] += gy
                sums[k, 2] += gx


@numba.njit(cache=True, nogil=True)
def _root(parent: NDArray[np.int64], node: Any) -> Any:
    while parent[node] != node:
        parent[node] = parent[parent[node]]
        node = parent[node]
    return node


@numba.njit(cache=True, nogil=True)
def _unite(parent: NDArray[np.int64], a: Any, b: Any) -> None:
    """The smaller of two roots becomes the parent, so every parent's number is at most its child's."""
    one, two = _root(parent, a), _root(parent, b)
    if one < two:
        parent[two] = one
    elif two < one:
        parent[one] = two


@numba.njit(cache=True, nogil=True)
def join(
    parent: NDArray[np.int64],
    low: NDArray[np.uint32],
    high: NDArray[np.uint32],
    low_offset: int,
    high_offset: int,
    reach: int,
) -> None:
    """Unite the pieces that touch across a border, in the union-find forest ``parent``.

    Args:
        low, high: (h, w) labels on both sides of the border (an edge: one row; a corner: one voxel), 0 background;
            label i of ``low`` is node ``low_offset + i - 1``.
        reach: largest sum of the steps along both axes between voxels that hold together.
    """
    rows, columns = low.shape
    side = min(reach, 1)
    for y in range(rows):
        for x in range(columns):
            a = low[y, x]
            if a == 0:
                continue
            previous = np.uint32(0)
            for dy in range(-side, side + 1):
                v = y + dy
                if v < 0 or v >= rows:
                    continue
                for dx in range(-side, side + 1):
                    u = x + dx
                    if u < 0 or u >= columns or abs(dy) + abs(dx) > reach:
                        continue
                    b = high[v, u]
                    if b == 0 or b == previous:
                        continue
                    previous = b
                    _unite(parent, low_offset + np.int64(a) - 1, high_offset + np.int64(b) - 1)


@numba.njit(cache=True, nogil=True)
def join_pairs(parent: NDArray[np.int64], pairs: NDArray[np.int64]) -> None:
    """Unite the nodes of each row of ``pairs`` (n, 2) in the forest ``parent``."""
    for i in range(len(pairs)):
        _unite(parent, pairs[i, 0], pairs[i, 1])


@numba.njit(cache=True, nogil=True)
def number_roots(parent: NDArray[np.int64]) -> int:
    """Turn the forest, in place, into the number 0..n-1 of every node's tree, in the order of the roots; returns n."""
    n = 0
    for node in range(len(parent)):
        above = parent[node]
        if above == node:
            parent[node] = n
            n += 1
        else:  # has its tree's number already, since its own is smaller
            parent[node] = parent[above]
    return n


@numba.njit(cache=True, nogil=True)
def gather(
    trees: NDArray[np.int64],
    piece_sizes: NDArray[np.int64],
    piece_first: NDArray[np.int64],
    piece_boxes: NDArray[np.int32],
    piece_sums: NDArray[np.int64],
    sizes: NDArray[np.int64],
    first: NDArray[np.int64],
    boxes: NDArray[np.int32],
    sums: NDArray[np.int64],
) -> None:
    """Add a block's pieces to the objects: ``trees[i]`` is the object of piece i; sizes must begin as zeros."""
    for i in range(len(trees)):
        k = trees[i]
        if sizes[k] == 0:
            first[k] = piece_first[i]
            boxes[k] = piece_boxes[i]
        else:
            first[k] = min(first[k], piece_first[i])
            for axis in range(3):
                boxes[k, axis] = min(boxes[k, axis], piece_boxes[i, axis])
                boxes[k, axis + 3] = max(boxes[k, axis + 3], piece_boxes[i, axis + 3])
        sizes[k] += piece_sizes[i]
        for axis in range(3):
            sums[k, axis] += piece_sums[i, axis]
