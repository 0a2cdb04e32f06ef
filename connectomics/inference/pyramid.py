"""The coarser levels of a prediction, for looking at it: averages, block by block.

A block is a cube of one level, of which the three levels after it are made in one go: it is read once, and the others
are made from what is in memory. All of them begin at chunk borders, so no two blocks write one chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from connectomics.inference.artifact import Group
from connectomics.io.levels import halve_raw
from connectomics.tasks.block_task import BlockWorker
from connectomics.tasks.lattice import Lattice

LEVELS_AT_ONCE = 3
_CHUNK = 64  # voxels; chunks of a prediction divide it
_CUBE = (_CHUNK << LEVELS_AT_ONCE,) * 3
_PIECE = (_CHUNK,) * 3  # voxels of the next level that are made at a time


def cubes(groups: Sequence[Group], stage: int) -> list[tuple[Group, int, Lattice]]:
    """The groups that have levels to be made in a stage (from 0), with the level that these are made from and its
    blocks."""
    level = LEVELS_AT_ONCE * stage
    return [
        (group, level, Lattice(group.grids[level].shape, _CUBE)) for group in groups if level + 1 < len(group.grids)
    ]


@dataclass(frozen=True)
class PyramidWorker(BlockWorker):
    """Makes the blocks of `cubes`, numbered one group after the other."""

    cubes: Sequence[tuple[Group, int, Lattice]]

    def do(self, number: int) -> None:
        for group, level, lattice in self.cubes:
            if number < len(lattice):
                _halve(group, level, *lattice.region(number))
                break
            number -= len(lattice)


def _halve(group: Group, level: int, begin: Sequence[int], shape: Sequence[int]) -> None:
    """Make the part of the levels after ``level`` that lies over a cube of it."""
    levels = [group.array(n) for n in range(level, min(level + LEVELS_AT_ONCE, len(group.grids) - 1) + 1)]
    source, target = levels[:2]
    origin = [b // 2 for b in begin]
    values = np.empty([-(-n // 2) for n in shape], dtype=source.dtype)
    pieces = Lattice((values.shape[0], values.shape[1], values.shape[2]), _PIECE)
    for number in range(len(pieces)):
        first, size = pieces.region(number)
        low = [b + 2 * f for b, f in zip(begin, first, strict=True)]
        high = [min(lo + 2 * n, m) for lo, n, m in zip(low, size, source.shape, strict=True)]
        piece = halve_raw(source.read(low, [h - lo for h, lo in zip(high, low, strict=True)]))
        values[tuple(slice(f, f + n) for f, n in zip(first, size, strict=True))] = piece
        target.write([o + f for o, f in zip(origin, first, strict=True)], piece)
    for target in levels[2:]:
        origin, values = [o // 2 for o in origin], halve_raw(values)
        target.write(origin, values)
