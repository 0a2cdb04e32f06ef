"""Numba kernels for union-find forests, objects and holes; a separate module, since importing numba is expensive."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Flags = NDArray[np.bool_]
Ints = NDArray[np.int64]
Ints32 = NDArray[np.int32]
Labels = NDArray[np.uint32]
Keys = NDArray[np.uint64]


@numba.njit(cache=True, nogil=True)
def add_voxel(row: Any, z: Any, y: Any, x: Any, sizes: Array, boxes: Array, sums: Array) -> None:
    """Add a voxel to the size, box and sums of object ``row``; the voxels of an object must come in the order of z.

    sizes (n,) and sums (n, 3) of z, y and x start as zeros; boxes (n, 6): smallest z y x, largest z y x, both inside.
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
def root_of(parent: Array, node: Any) -> Any:
    """Return the root of a node in a union-find forest (a root is its own parent); halve the path to it."""
    while parent[node] != node:
        parent[node] = parent[parent[node]]
        node = parent[node]
    return node


@numba.njit(cache=True, nogil=True)
def unite(parent: Array, a: Any, b: Any) -> None:
    """Join two trees; the smaller root becomes the parent, so no parent has a larger number than its child."""
    one, two = root_of(parent, a), root_of(parent, b)
    if one < two:
        parent[two] = one
    elif two < one:
        parent[one] = two


@numba.njit(cache=True, nogil=True)
def measure(labels: Array, begin: Ints, shape: Ints, sizes: Ints, first: Ints, boxes: Ints32, sums: Ints) -> None:
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
                if sizes[k] == 0:
                    first[k] = row + x
                add_voxel(k, gz, gy, x + begin[2], sizes, boxes, sums)


@numba.njit(cache=True, nogil=True)
def touching(low: Labels, high: Labels, reach: int) -> Ints:
    """The pairs of labels (n, 2) that touch across a border between blocks; a pair may come several times.

    Args:
        low, high: (h, w) labels on both sides of the border (an edge: one row; a corner: one voxel), 0 background.
        reach: largest sum of the steps along both axes between voxels that hold together.
    """
    rows, columns = low.shape
    side = min(reach, 1)
    pairs, n = np.empty((1024, 2), np.int64), 0
    for y in range(rows):
        for x in range(columns):
            a = low[y, x]
            if a == 0:
                continue
            for v in range(max(0, y - side), min(rows, y + side + 1)):
                for u in range(max(0, x - side), min(columns, x + side + 1)):
                    b = high[v, u]
                    if b == 0 or abs(v - y) + abs(u - x) > reach:
                        continue
                    if n > 0 and pairs[n - 1, 0] == a and pairs[n - 1, 1] == b:  # runs of one pair are long
                        continue
                    if n == len(pairs):
                        pairs = np.concatenate((pairs, np.empty_like(pairs)))
                    pairs[n, 0], pairs[n, 1] = a, b
                    n += 1
    return pairs[:n]


@numba.njit(cache=True, nogil=True)
def join_pairs(parent: Ints, pairs: Ints) -> None:
    """Unite the nodes of each row of ``pairs`` (n, 2) in the forest ``parent``."""
    for i in range(len(pairs)):
        unite(parent, pairs[i, 0], pairs[i, 1])


@numba.njit(cache=True, nogil=True)
def number_roots(parent: Ints) -> int:
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
    trees: Ints,
    piece_sizes: Ints,
    piece_first: Ints,
    piece_boxes: Ints32,
    piece_sums: Ints,
    sizes: Ints,
    first: Ints,
    boxes: Ints32,
    sums: Ints,
) -> None:
    """Add a block's pieces to the objects: ``trees[i]`` is the object of piece i; sizes must begin as zeros."""
    for i in range(len(trees)):
        k = trees[i]
        if sizes[k] == 0:
            first[k] = piece_first[i]
            for axis in range(6):
                boxes[k, axis] = piece_boxes[i, axis]
        else:
            first[k] = min(first[k], piece_first[i])
            for axis in range(3):
                boxes[k, axis] = min(boxes[k, axis], piece_boxes[i, axis])
                boxes[k, axis + 3] = max(boxes[k, axis + 3], piece_boxes[i, axis + 3])
        sizes[k] += piece_sizes[i]
        for axis in range(3):
            sums[k, axis] += piece_sums[i, axis]


@numba.njit(cache=True, nogil=True)
def fill_cavities(
    order: Ints,
    owner: Ints,
    boxes: Ints32,
    object_boxes: Ints32,
    member_begin: Ints,
    members: Ints,
    neighbor_begin: Ints,
    neighbors: Ints,
) -> Ints:
    """Which object fills each node of the graph of a volume's parts: (n,) -1 where none does.

    Args:
        order: the objects, the one that fills first in front.
        owner: (n,) object of every node, -1 for background. boxes: (n, 6), object_boxes: smallest and largest z y x.
        member_begin, members: the nodes of every object. neighbor_begin, neighbors: those that touch every node.

    From each neighbor of an object the graph without that object is searched. A piece of it is a hole where every
    node lies inside the object's box without touching its faces; the search ends at the first node that does not.
    """
    holder = np.full(len(owner), -1, np.int64)
    seen = np.full(len(owner), -1, np.int64)  # the search that has come upon a node
    stack = np.empty(len(owner), np.int64)
    search = np.int64(0)
    for k in order:
        first_search = search
        for i in range(member_begin[k], member_begin[k + 1]):
            for j in range(neighbor_begin[members[i]], neighbor_begin[members[i] + 1]):
                start = neighbors[j]
                if owner[start] == k or seen[start] >= first_search:
                    continue
                # nodes wait in stack[done:waiting]; those in front of them are the piece so far
                seen[start], stack[0] = search, start
                done, waiting, closed = 0, 1, True
                while done < waiting and closed:
                    node = stack[done]
                    done += 1
                    for axis in range(3):
                        if (
                            boxes[node, axis] <= object_boxes[k, axis]
                            or boxes[node, axis + 3] >= object_boxes[k, axis + 3]
                        ):
                            closed = False
                    if not closed:
                        break
                    for m in range(neighbor_begin[node], neighbor_begin[node + 1]):
                        other = neighbors[m]
                        if owner[other] == k or seen[other] == search:
                            continue
                        if seen[other] >= first_search:  # by an earlier search, which found its piece open
                            closed = False
                            break
                        seen[other], stack[waiting] = search, other
                        waiting += 1
                search += 1
                if closed:
                    for m in range(waiting):
                        if holder[stack[m]] < 0:
                            holder[stack[m]] = k
    return holder
