"""Where a volume ends: it is continued by its mirror image, so that a network never sees emptiness beyond it.

This is the one rule for training patches, validation, prediction and `pytc inspect`. First, patches and windows are
shifted inside the volume wherever it is large enough (`Extent.inside`); what then still lies beyond it is the volume
mirrored at its faces (`Extent.mirrored`), as ``numpy.pad(volume, mode="symmetric")`` has it. Chunks that are missing
inside the volume are not mirrored: there the input is the mean of tissue (see `connectomics.io.normalization`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.geometry import Index, VoxelGrid
from connectomics.io import resample


@dataclass(frozen=True)
class Extent:
    """The voxels of a lattice whose centers lie in a volume: indices ``low`` to ``high`` (exclusive), z y x.

    Empty, and then 0 to 0 on every axis, if no center does.
    """

    low: Index
    high: Index

    @classmethod
    def of(cls, volume: VoxelGrid, lattice: VoxelGrid) -> Extent:
        """The extent of the volume with voxels ``volume`` on ``lattice``, whatever the lattice's own shape."""
        low, high = lattice.index_range(volume.box)
        around = lattice.crop([b - 1 for b in low], [h - b + 2 for b, h in zip(low, high, strict=True)])
        runs = [np.flatnonzero(axis) for axis in resample.inside_axes(volume, around)]
        if not all(len(run) for run in runs):
            return cls((0, 0, 0), (0, 0, 0))
        z, y, x = ((b - 1 + int(run[0]), b + int(run[-1])) for b, run in zip(low, runs, strict=True))
        return cls((z[0], y[0], x[0]), (z[1], y[1], x[1]))

    @property
    def shape(self) -> Index:
        """Voxels, z y x."""
        z, y, x = (h - b for b, h in zip(self.low, self.high, strict=True))
        return z, y, x

    @property
    def is_empty(self) -> bool:
        """Whether no voxel lies in the volume."""
        return min(self.shape) <= 0

    def seen_from(self, begin: Sequence[int]) -> Extent:
        """The same place in indices of a lattice whose first voxel has index ``begin`` here."""
        if self.is_empty:
            return self
        z, y, x = ((lo - b, hi - b) for lo, hi, b in zip(self.low, self.high, begin, strict=True))
        return Extent((z[0], y[0], x[0]), (z[1], y[1], x[1]))

    def holds(self, begin: Sequence[int], end: Sequence[int]) -> bool:
        """Whether all indices ``begin`` to ``end`` (exclusive) lie in the volume."""
        return all(b >= lo and e <= hi for b, e, lo, hi in zip(begin, end, self.low, self.high, strict=True))

    def meets(self, begin: Sequence[int], end: Sequence[int]) -> bool:
        """Whether any of the indices ``begin`` to ``end`` (exclusive) lies in the volume."""
        return not self.is_empty and all(
            b < hi and e > lo for b, e, lo, hi in zip(begin, end, self.low, self.high, strict=True)
        )

    def inside(self, begin: Sequence[int], shape: Sequence[int]) -> list[int]:
        """Where a box of ``shape`` voxels from ``begin`` begins once it is shifted inside the volume.

        On an axis where the volume is smaller than the box, the box is shifted so that it holds the whole volume. What
        lies both in the box and in the volume before the shift lies in the box afterwards.
        """
        if self.is_empty:
            return [int(b) for b in begin]
        limits = [sorted((lo, hi - n)) for lo, hi, n in zip(self.low, self.high, shape, strict=True)]
        return [min(max(int(b), first), last) for b, (first, last) in zip(begin, limits, strict=True)]

    def mirrored(self, begin: Sequence[int], end: Sequence[int]) -> list[NDArray[np.int64]]:
        """For each axis, the index in the volume that stands for each of the indices ``begin`` to ``end`` (exclusive).

        Mirrored at the volume's faces, as often as it takes: the first voxel beyond a face is the last one before it.
        The extent must not be empty.
        """
        found = []
        for b, e, lo, hi in zip(begin, end, self.low, self.high, strict=True):
            place = np.mod(np.arange(b, e, dtype=np.int64) - lo, 2 * (hi - lo))
            found.append(lo + np.where(place < hi - lo, place, 2 * (hi - lo) - 1 - place))
        return found


def hull(index: Sequence[NDArray[np.int64]]) -> tuple[list[int], list[int]]:
    """First and last (exclusive) of the indices along each axis."""
    return [int(i.min()) for i in index], [int(i.max()) + 1 for i in index]


def take(block: NDArray[Any], begin: Sequence[int], index: Sequence[NDArray[np.int64]]) -> NDArray[Any]:
    """The voxels ``index`` (one list for each of the last three axes) of a block whose first voxel has index
    ``begin``."""
    for axis, (first, wanted) in enumerate(zip(begin, index, strict=True), start=-3):
        block = np.take(block, wanted - first, axis=axis)
    return block


def read_mirrored(
    read: Callable[[VoxelGrid], tuple[NDArray[Any], NDArray[np.bool_]]], volume: VoxelGrid, grid: VoxelGrid
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """What ``read`` gives for ``grid`` (values, and where there are any), mirrored where the volume ends.

    Args:
        read: called once, with the part of ``grid``'s lattice inside the volume that is needed: at most as large as
            ``grid``.
        volume: the voxels that are stored. grid: what is wanted, anywhere, of any voxel size.
    """
    if all(axis.all() for axis in resample.inside_axes(volume, grid)):
        return read(grid)
    extent = Extent.of(volume, grid)
    if extent.is_empty or grid.size == 0:
        return read(grid)  # nothing that could be mirrored
    index = extent.mirrored((0, 0, 0), grid.shape)
    begin, end = hull(index)
    values, there = read(grid.crop(begin, [e - b for b, e in zip(begin, end, strict=True)]))
    return take(values, begin, index), take(there, begin, index)
