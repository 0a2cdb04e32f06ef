"""Numba kernels that the kernels of several packages share; import them where numba is imported anyway."""

from __future__ import annotations

from typing import Any

import numba
from numpy.typing import NDArray


@numba.njit(cache=True, nogil=True)
def add_voxel(
    row: Any,
    z: Any,
    y: Any,
    x: Any,
    sizes: NDArray[Any],
    boxes: NDArray[Any],
    sums: NDArray[Any],
) -> None:
    """Add a voxel to what is known of an object.

    sizes (n,): voxels, zeros at first. boxes (n, 6): smallest z y x, largest z y x, both inside; anything at first.
    sums (n, 3): of z, y and x, zeros at first. The voxels of an object must come in the order of z.
    """
    if sizes[row] == 0:
        boxes[row, 0], boxes[row, 1], boxes[row, 2] = z, y, x
        boxes[row, 3], boxes[row, 4], boxes[row, 5] = z, y, x
    else:
        boxes[row, 1] = min(boxes[row, 1], y)
        boxes[row, 2] = min(boxes[row, 2], x)
        boxes[row, 3] = z  # it only grows
        boxes[row, 4] = max(boxes[row, 4], y)
        boxes[row, 5] = max(boxes[row, 5], x)
    sizes[row] += 1
    sums[row, 0] += z
    sums[row, 1] += y
    sums[row, 2] += x


@numba.njit(cache=True, nogil=True)
def root_of(parent: NDArray[Any], node: Any) -> Any:
    """The root of a node's tree in a union-find forest (a root is its own parent); paths are halved on the way."""
    while parent[node] != node:
        parent[node] = parent[parent[node]]
        node = parent[node]
    return node


@numba.njit(cache=True, nogil=True)
def unite(parent: NDArray[Any], a: Any, b: Any) -> None:
    """Make one tree of two; the smaller of their roots becomes the parent, so every parent's number is at most its
    child's."""
    one, two = root_of(parent, a), root_of(parent, b)
    if one < two:
        parent[two] = one
    elif two < one:
        parent[one] = two
