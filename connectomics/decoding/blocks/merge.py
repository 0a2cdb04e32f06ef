"""From the pieces of blocks to the objects of the volume: union-find over what touches across borders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from connectomics.decoding.blocks.pieces import Pieces, border, reach
from connectomics.tasks.lattice import Lattice

Faces = dict[str, NDArray[np.uint32]]
_FACES_KEPT = 16  # blocks whose faces are held; neighbours along x and y come again soon


@dataclass(frozen=True)
class Objects:
    """The objects of a volume and which piece of which block belongs to which.

    8 bytes a piece, and about 100 bytes an object while they are made.

    Attributes:
        pieces: the objects 1..n, numbered by their first voxel in z-y-x order.
        label_of: (number of pieces of all blocks,) int64 the object's label, 0 where it is too small.
        offsets: (blocks + 1,) int64 the first piece of every block in ``label_of``.
    """

    pieces: Pieces
    label_of: NDArray[np.int64]
    offsets: NDArray[np.int64]

    def labels(self, block: int) -> NDArray[np.int64]:
        """(k + 1,) what each of the block's labels 0..k becomes."""
        return np.concatenate(([0], self.label_of[self.offsets[block] : self.offsets[block + 1]]))


def merge(
    lattice: Lattice,
    pieces_of: Callable[[int], Pieces],
    faces_of: Callable[[int], Faces],
    connectivity: int,
    min_voxels: int,
) -> Objects:
    """Unite the pieces that touch across the borders of blocks.

    Args:
        pieces_of, faces_of: what a block holds, by its number; asked for as needed and not kept.
        min_voxels: objects of fewer voxels are left out.

    The result does not depend on how the volume is cut.
    """
    from connectomics.decoding.blocks.kernels import gather, join, number_roots

    blocks = range(len(lattice))
    counts = np.fromiter((len(pieces_of(n)) for n in blocks), np.int64, len(lattice))
    offsets = np.concatenate(([0], np.cumsum(counts)))
    trees = np.arange(offsets[-1])
    kept = lru_cache(maxsize=_FACES_KEPT)(faces_of)
    for block in blocks:
        if not counts[block]:
            continue
        for step, other in lattice.neighbours(block, connectivity):
            if counts[other]:
                back = (-step[0], -step[1], -step[2])
                low, high = border(kept(block), step), border(kept(other), back)
                join(trees, low, high, int(offsets[block]), int(offsets[other]), reach(step, connectivity))
    kept.cache_clear()
    found = Pieces.empty(int(number_roots(trees)))
    for block in blocks:
        if counts[block]:
            part = pieces_of(block)
            gather(
                trees[offsets[block] : offsets[block + 1]],
                *(part.sizes, part.first, part.boxes, part.sums),
                *(found.sizes, found.first, found.boxes, found.sums),
            )
    chosen = np.flatnonzero(found.sizes >= min_voxels)
    chosen = chosen[np.argsort(found.first[chosen], kind="stable")]
    label = np.zeros(len(found), np.int64)
    label[chosen] = np.arange(1, len(chosen) + 1)
    found = found.take(chosen)
    for begin in range(0, len(trees), 1 << 20):  # in place: no second array of all pieces
        trees[begin : begin + (1 << 20)] = label[trees[begin : begin + (1 << 20)]]
    return Objects(found, trees, offsets)
