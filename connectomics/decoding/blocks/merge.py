"""From the pieces of blocks to the objects of the volume: union-find over what touches across borders."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from connectomics.decoding.blocks.pieces import Pieces, border, reach
from connectomics.decoding.blocks.stored import StoredBlocks

FACES_KEPT = 16  # blocks whose faces are held; neighbours along x and y come again soon


def unite_touching(blocks: StoredBlocks, connectivity: int) -> NDArray[np.int64]:
    """Unite all labels that touch across the borders of blocks.

    Returns:
        (nodes,) the union-find forest over the nodes of `StoredBlocks.offsets`: the parent of each, whose number is at
        most its own; a root is its own parent.
    """
    from connectomics.decoding.blocks.component_kernels import join

    offsets = blocks.offsets
    forest = np.arange(offsets[-1])
    faces = lru_cache(maxsize=FACES_KEPT)(blocks.faces)
    for block in range(len(blocks.lattice)):
        if not blocks.count(block):
            continue
        for step, other in blocks.lattice.neighbors(block, connectivity):
            if blocks.count(other):
                back = (-step[0], -step[1], -step[2])
                low, high = border(faces(block), step), border(faces(other), back)
                join(forest, low, high, int(offsets[block]), int(offsets[other]), reach(step, connectivity))
    return forest


def unite_pairs(forest: NDArray[np.int64], pairs: NDArray[np.int64]) -> None:
    """Unite the nodes ``pairs`` (n, 2) in a forest (as `unite_touching` gives it), in place."""
    from connectomics.decoding.blocks.component_kernels import join_pairs

    join_pairs(forest, np.ascontiguousarray(pairs, np.int64))


def number_trees(forest: NDArray[np.int64]) -> int:
    """Turn a forest, in place, into the number 0..n-1 of every node's tree; returns n."""
    from connectomics.decoding.blocks.component_kernels import number_roots

    return int(number_roots(forest))


def gathered(blocks: StoredBlocks, trees: NDArray[np.int64], n: int) -> Pieces:
    """The table of the objects 0..n-1 from those of the blocks' pieces; ``trees`` (nodes,): the object of each."""
    from connectomics.decoding.blocks.component_kernels import gather

    found = Pieces.empty(n)
    for block in range(len(blocks.lattice)):
        if blocks.count(block):
            part, at = blocks.pieces(block), blocks.offsets[block : block + 2]
            gather(trees[at[0] : at[1]], *part.columns.values(), *found.columns.values())
    return found


def numbered(objects: Pieces, min_voxels: int) -> tuple[Pieces, NDArray[np.int64]]:
    """The objects of at least ``min_voxels``, ordered by their first voxel in z-y-x order.

    Returns:
        They (row i: label i + 1), and (n,) the label of each of ``objects``, 0 for those that are too small.
    """
    chosen = np.flatnonzero(objects.sizes >= min_voxels)
    chosen = chosen[np.argsort(objects.first[chosen], kind="stable")]
    label = np.zeros(len(objects), np.int64)
    label[chosen] = np.arange(1, len(chosen) + 1)
    return objects.take(chosen), label


def renamed(values: NDArray[np.int64], table: NDArray[np.int64]) -> NDArray[np.int64]:
    """``table[values]``, in place: no second array of all pieces."""
    for begin in range(0, len(values), 1 << 20):
        values[begin : begin + (1 << 20)] = table[values[begin : begin + (1 << 20)]]
    return values
