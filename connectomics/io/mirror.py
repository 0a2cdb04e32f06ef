"""Mirror a volume at its faces, so that a network never sees emptiness beyond it.

Training, validation and prediction use the same rule. Patches and windows are shifted inside the volume if it is large
enough (`Extent.inside`). What still lies beyond it is the volume mirrored at its faces (`Extent.mirrored`), as in
``numpy.pad(volume, mode="symmetric")``. Missing chunks inside the volume are not mirrored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.geometry import Index, VoxelGrid, index, shape_between
from connectomics.io import resample


@dataclass(frozen=True)
class Extent:
    """The voxels of a lattice whose centers lie in a volume: indices ``low`` to ``high`` (exclusive), z y x.

    If no center does, the extent is empty: 0 to 0 on every axis.
    """

    low: Index
    high: Index

    @classmethod
    def of(cls, volume: VoxelGrid, lattice: VoxelGrid) -> Extent:
        """Return the extent of the volume with voxels ``volume`` on ``lattice``, whatever the lattice's shape."""
        low, high = lattice.index_range(volume.box)
        around = lattice.crop([b - 1 for b in low], [h - b + 2 for b, h in zip(low, high, strict=True)])
        runs = [np.flatnonzero(axis) for axis in resample.inside_axes(volume, around)]
        if not all(len(run) for run in runs):
            return cls((0, 0, 0), (0, 0, 0))
        first, last = zip(*((run[0], run[-1]) for run in runs), strict=True)
        return cls(index(np.subtract(low, 1) + first), index(np.add(low, last)))

    @property
    def shape(self) -> Index:
        return index(shape_between(self.low, self.high))

    @property
    def is_empty(self) -> bool:
        return min(self.shape) <= 0

    def seen_from(self, begin: Sequence[int]) -> Extent:
        """Return this extent in indices of a lattice whose first voxel has index ``begin`` here."""
        if self.is_empty:
            return self
        return Extent(index(np.subtract(self.low, begin)), index(np.subtract(self.high, begin)))

    def holds(self, begin: Sequence[int], end: Sequence[int]) -> bool:
        """Return whether all indices ``begin`` to ``end`` (exclusive) lie in the volume."""
        return all(b >= lo and e <= hi for b, e, lo, hi in zip(begin, end, self.low, self.high, strict=True))

    def meets(self, begin: Sequence[int], end: Sequence[int]) -> bool:
        """Return whether any of the indices ``begin`` to ``end`` (exclusive) lies in the volume."""
        return not self.is_empty and all(
            b < hi and e > lo for b, e, lo, hi in zip(begin, end, self.low, self.high, strict=True)
        )

    def inside(self, begin: Sequence[int], shape: Sequence[int]) -> list[int]:
        """Return the begin of a box of ``shape`` voxels from ``begin`` after shifting it inside the volume.

        On an axis where the volume is smaller than the box, the box is shifted so that it contains the whole volume.
        Voxels in both the box and the volume before the shift are in the box afterwards.
        """
        if self.is_empty:
            return [int(b) for b in begin]
        limits = [sorted((lo, hi - n)) for lo, hi, n in zip(self.low, self.high, shape, strict=True)]
        return [min(max(int(b), first), last) for b, (first, last) in zip(begin, limits, strict=True)]

    def mirrored(self, begin: Sequence[int], end: Sequence[int]) -> list[NDArray[np.int64]]:
        """Return, for each axis, the index in the volume for each of the indices ``begin`` to ``end`` (exclusive).

        Indices are mirrored at the volume's faces, repeatedly if necessary: the first voxel beyond a face is the last
        one before it. The extent must not be empty.
        """
        found = []
        for b, e, lo, hi in zip(begin, end, self.low, self.high, strict=True):
            place = np.mod(np.arange(b, e, dtype=np.int64) - lo, 2 * (hi - lo))
            found.append(lo + np.where(place < hi - lo, place, 2 * (hi - lo) - 1 - place))
        return found


def hull(index: Sequence[NDArray[np.int64]]) -> tuple[list[int], list[int]]:
    """Return begin and end (exclusive) of the indices along each axis."""
    return [int(i.min()) for i in index], [int(i.max()) + 1 for i in index]


def take(block: NDArray[Any], begin: Sequence[int], index: Sequence[NDArray[np.int64]]) -> NDArray[Any]:
    """Return the voxels ``index`` (a list for each of the last three axes) of a block that starts at ``begin``; a view
    if they are in order."""
    low, high = hull(index)
    z, y, x = (slice(lo - b, hi - b) for b, lo, hi in zip(begin, low, high, strict=True))
    block = block[..., z, y, x]  # first, so that an axis is mirrored in what is needed of the others
    for axis, (first, wanted) in enumerate(zip(low, index, strict=True), start=-3):
        if not np.array_equal(wanted, np.arange(first, first + len(wanted))):
            block = np.take(block, wanted - first, axis=axis)
    return block


def read_mirrored(
    read: Callable[[VoxelGrid], tuple[NDArray[Any], NDArray[np.bool_]]], volume: VoxelGrid, grid: VoxelGrid
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Return what ``read`` returns for ``grid`` (values and mask), mirrored beyond the volume.

    Args:
        read: called once, with the needed part of ``grid``'s lattice inside the volume, at most as large as ``grid``.
        volume: the stored voxels. grid: requested voxels, anywhere, of any voxel size.
    """
    if all(axis.all() for axis in resample.inside_axes(volume, grid)):
        return read(grid)
    extent = Extent.of(volume, grid)
    if extent.is_empty or grid.size == 0:
        return read(grid)  # nothing that could be mirrored
    index = extent.mirrored((0, 0, 0), grid.shape)
    begin, end = hull(index)
    values, there = read(grid.crop(begin, shape_between(begin, end)))
    return take(values, begin, index), take(there, begin, index)
