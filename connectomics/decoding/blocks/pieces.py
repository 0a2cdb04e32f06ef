"""What is kept of a labeled block: its pieces (a table) and the labels on its faces; and how pieces become objects.

Every block leaves one file. `connectomics.decoding.blocks.groups` unites the pieces that touch across the faces of
blocks in a union-find forest, numbers its trees, and adds up their pieces to objects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from connectomics.geometry import Index
from connectomics.tasks.blocks import RANK, BlockFiles, Lattice

Number = TypeVar("Number", bound=np.generic)
#: The faces of a block by axis and side: ``0-`` is z at its begin (h, w), ``2+`` x at its end (d, h).
SIDES = tuple(f"{axis}{sign}" for axis in range(3) for sign in "-+")


@dataclass(frozen=True)
class Pieces:
    """The connected pieces 1..n of a block, or the objects of a volume (row i: label i + 1). 64 bytes a row.

    Attributes:
        sizes: (n,) int64 voxels.
        first: (n,) int64 number of the first voxel in z-y-x order of the whole volume.
        boxes: (n, 6) int32 smallest z y x, largest z y x (voxels of the volume, both inside).
        sums: (n, 3) int64 sums of z, y and x over the voxels.
    """

    sizes: NDArray[np.int64]
    first: NDArray[np.int64]
    boxes: NDArray[np.int32]
    sums: NDArray[np.int64]

    @classmethod
    def empty(cls, n: int) -> Pieces:
        """Return rows of zeros."""
        return cls(np.zeros(n, np.int64), np.zeros(n, np.int64), np.zeros((n, 6), np.int32), np.zeros((n, 3), np.int64))

    @classmethod
    def measured(cls, labels: NDArray[Any], n: int, begin: Sequence[int], shape: Sequence[int]) -> Pieces:
        """Measure the labels 1..n of a block (d, h, w) that starts at voxel ``begin`` of a volume of ``shape``."""
        from connectomics.decoding.blocks.component_kernels import measure

        found = cls.empty(n)
        measure(labels, np.asarray(begin, np.int64), np.asarray(shape, np.int64), *found.columns.values())
        return found

    def __len__(self) -> int:
        return len(self.sizes)

    def take(self, rows: NDArray[Any]) -> Pieces:
        """Return some of the rows (indices or a mask)."""
        return Pieces(self.sizes[rows], self.first[rows], self.boxes[rows], self.sums[rows])

    def without(self, labels: NDArray[Any], lost: Pieces) -> Pieces:
        """Return the pieces without some of their voxels, ``lost`` of ``labels`` (0: of none); boxes stay."""
        sizes, sums, rows = self.sizes.copy(), self.sums.copy(), labels[labels > 0].astype(np.int64) - 1
        sizes[rows] -= lost.sizes[labels > 0]
        sums[rows] -= lost.sums[labels > 0]
        return Pieces(sizes, self.first, self.boxes, sums)

    def inside(self, begin: Sequence[int], block: Sequence[int], shape: Sequence[int]) -> NDArray[np.bool_]:
        """Return (n,) which pieces are whole: they reach no face that the block shares with another."""
        low, high = np.asarray(begin), np.asarray(begin) + block - 1
        reaches = (self.boxes[:, :3] == low) & (low > 0)
        reaches |= (self.boxes[:, 3:] == high) & (high < np.asarray(shape) - 1)
        return np.asarray(~reaches.any(axis=1))

    @property
    def columns(self) -> dict[str, NDArray[Any]]:
        """The arrays by name."""
        return {"sizes": self.sizes, "first": self.first, "boxes": self.boxes, "sums": self.sums}


# -- faces -------------------------------------------------------------------------------------------------------------
def faces_of(labels: NDArray[Number]) -> dict[str, NDArray[Number]]:
    """Return the labels on the faces of a block, by the names in `SIDES`."""
    return {side: np.take(labels, 0 if side[1] == "-" else -1, axis=int(side[0])) for side in SIDES}


def border(faces: Mapping[str, NDArray[Number]], step: Index) -> NDArray[Number]:
    """Return the labels next to the neighbor block in direction ``step``: face (h, w), edge (1, n), corner (1, 1)."""
    axis = next(a for a in range(3) if step[a])
    plane = faces[f"{axis}{'+' if step[axis] > 0 else '-'}"]
    for other, direction in zip((0, 1), (s for a, s in enumerate(step) if a != axis), strict=True):
        if direction:
            end = plane.shape[other] - 1
            plane = np.take(plane, [end if direction > 0 else 0], axis=other)
    return np.ascontiguousarray(plane if plane.shape[1] != 1 else plane.T)


def opposite(step: Index) -> Index:
    """Return the step back."""
    return -step[0], -step[1], -step[2]


def reach(step: Index, connectivity: int) -> int:
    """Return how far connected voxels on both sides of the border may be apart along it (sum over its axes)."""
    return RANK[connectivity] - sum(map(abs, step))


# -- files -------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class StoredPieces(BlockFiles):
    """Files with the columns of `Pieces`: one for each block of a lattice, or each group of its blocks."""

    lattice: Lattice

    def pieces(self, number: int) -> Pieces:
        """Read the pieces of a block, or the trees of a group."""
        return Pieces(**self.load(number, "sizes", "first", "boxes", "sums"))


class StoredBlocks(StoredPieces):
    """What the blocks of a lattice leave for later stages.

    Every block has ``count`` (its labels are 1..count), the columns of its `Pieces` and its six `SIDES`; a task may add
    more.
    """

    def faces(self, number: int) -> dict[str, NDArray[np.uint32]]:
        """Read the labels on the faces of a block."""
        return self.load(number, *SIDES)

    def count(self, number: int) -> int:
        """Read how many labels a block has."""
        return self.integer(number, "count")


# -- from pieces to objects --------------------------------------------------------------------------------------------
def numbered(objects: Pieces, min_voxels: int) -> tuple[Pieces, NDArray[np.int64]]:
    """Keep the objects of at least ``min_voxels``, ordered by their first voxel in z-y-x order.

    Returns:
        These (row i: label i + 1), and (n,) the label of each of ``objects``, 0 for those that are too small.
    """
    chosen = np.flatnonzero(objects.sizes >= min_voxels)
    chosen = chosen[np.argsort(objects.first[chosen], kind="stable")]
    label = np.zeros(len(objects), np.int64)
    label[chosen] = np.arange(1, len(chosen) + 1)
    return objects.take(chosen), label
