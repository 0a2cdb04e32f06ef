"""The blocks that a volume is cut into, by number."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from connectomics.geometry import Index


@dataclass(frozen=True)
class Lattice:
    """Blocks of ``block`` voxels that cover ``shape`` voxels (both z y x), numbered in z-y-x order; those at the end
    are smaller."""

    shape: Index
    block: Index

    @property
    def counts(self) -> Index:
        """Blocks along each axis."""
        z, y, x = (-(-n // b) for n, b in zip(self.shape, self.block, strict=True))
        return z, y, x

    def __len__(self) -> int:
        z, y, x = self.counts
        return z * y * x

    def region(self, number: int) -> tuple[Index, Index]:
        """First voxel and shape of a block."""
        z, y, x = (i * b for i, b in zip(self._place(number), self.block, strict=True))
        d, h, w = (min(b, n - s) for b, n, s in zip(self.block, self.shape, (z, y, x), strict=True))
        return (z, y, x), (d, h, w)

    def neighbours(self, number: int, connectivity: int) -> Iterator[tuple[Index, int]]:
        """Blocks that come after this one and touch it by a face (connectivity 6), an edge too (18) or a corner (26).

        Yields the step (z, y, x; each -1, 0 or 1) and the number of the block there.
        """
        place, counts = self._place(number), self.counts
        for step in _steps(connectivity):
            z, y, x = (p + s for p, s in zip(place, step, strict=True))
            if all(0 <= i < n for i, n in zip((z, y, x), counts, strict=True)):
                yield step, (z * counts[1] + y) * counts[2] + x

    def _place(self, number: int) -> Index:
        _, y, x = self.counts
        return number // (y * x), number // x % y, number % x


RANK = {6: 1, 18: 2, 26: 3}  # along how many axes at once a voxel's neighbour may lie


def _steps(connectivity: int) -> list[Index]:
    every = [(z, y, x) for z in (-1, 0, 1) for y in (-1, 0, 1) for x in (-1, 0, 1)]
    return [s for s in every if s > (0, 0, 0) and sum(map(abs, s)) <= RANK[connectivity]]
