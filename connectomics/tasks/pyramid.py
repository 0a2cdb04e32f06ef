"""The coarser levels of arrays that a task writes, as further stages: blocks like any others, on any engine.

A stage makes `Pyramid.at_once` levels from the one before: of arrays with a file per chunk three, of sharded ones one,
since three would need blocks of eight shards along each axis. Blocks begin where files of the levels that they write
do. A level of probabilities is the mean of the finer one, a level of labels its mode (`connectomics.io.levels`). The
attributes of a group should name its levels only when they are complete.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

from connectomics.geometry import Index, VoxelGrid, index, slices_of
from connectomics.io import store
from connectomics.io.levels import halve_labels, halve_raw, level_grids
from connectomics.io.sharded import Codec
from connectomics.io.write import ArrayWriter, Kind, create_array
from connectomics.tasks.block_task import BlockTask, BlockWorker, Cost
from connectomics.tasks.blocks import Lattice, done_file

_STAGE = "pyramid-"  # with a number from 1
_COARSEST = 64  # voxels: longest axis of the coarsest level
_PIECE = 128  # voxels read at a time along each axis: float32 sums stay small beside a block
_HELD = 256 << 20  # bytes that a worker holds besides its block: pieces being written, caches of the reader


def pyramid_grids(grid: VoxelGrid, wanted: bool = True) -> list[VoxelGrid]:
    """Return the grids of all levels over an array on ``grid``, itself first; the last one fits into 64^3 voxels.

    wanted: False: only itself.
    """
    longest, levels = max(grid.shape), 1
    while wanted and longest > _COARSEST:
        longest, levels = -(-longest // 2), levels + 1
    return level_grids(grid, levels)


@dataclass(frozen=True)
class Pyramid:
    """The levels of one multiscale group whose finest array, ``s0``, a task writes in earlier stages.

    Attributes:
        place: folder of the group.
        grids: of its levels, finest first.
        kind: raw (mean) or label (mode).
        chunks, shards, codec: how its arrays are stored, see `connectomics.io.write.create_array`.
    """

    place: Path
    grids: tuple[VoxelGrid, ...]
    kind: Kind
    dtype: DTypeLike
    chunks: Index
    shards: Index | None = None
    codec: Codec = "blosc"

    @property
    def at_once(self) -> int:
        """How many levels are made from one block."""
        return 3 if self.shards is None else 1

    def last(self, level: int) -> int:
        """Return the coarsest level that is made from this one."""
        return min(level + self.at_once, len(self.grids) - 1)

    def lattice(self, level: int) -> Lattice:
        """Return the blocks of a level from which the next ones are made."""
        return Lattice(self.grids[level].shape, index(n << self.at_once for n in self.shards or self.chunks))

    def make(self, level: int) -> bool:
        """Create the array of a level if it is missing; returns whether it was."""
        place = self.place / f"s{level}"
        if store.is_array(place):
            return False
        grid = self.grids[level]
        create_array(
            place, grid.shape, self.dtype, chunks=self.chunks, shards=self.shards, codec=self.codec, grid=grid,
            overwrite=True,
        )  # fmt: skip
        return True

    def fill(self, level: int, begin: Sequence[int], shape: Sequence[int]) -> None:
        """Write the part of the next levels that lies over a block of this one."""
        source, *targets = (ArrayWriter.open(self.place / f"s{n}") for n in range(level, self.last(level) + 1))
        halve = halve_raw if self.kind == "raw" else halve_labels
        origin = [b // 2 for b in begin]
        values = np.empty([-(-n // 2) for n in shape], dtype=source.dtype)
        pieces = Lattice((values.shape[0], values.shape[1], values.shape[2]), (_PIECE // 2,) * 3)
        for first, size in map(pieces.region, range(len(pieces))):
            low = [b + 2 * f for b, f in zip(begin, first, strict=True)]
            high = [min(lo + 2 * n, m) for lo, n, m in zip(low, size, source.shape, strict=True)]
            piece = halve(source.read(low, [h - lo for h, lo in zip(high, low, strict=True)]))
            values[slices_of(first, size)] = piece
        for number, array in enumerate(targets):
            if number:
                origin, values = [o // 2 for o in origin], halve(values)
            array.write(origin, values)


def pyramid_stages(pyramids: Sequence[Pyramid]) -> tuple[str, ...]:
    """Return the names of the stages that make all levels, in order; none if there are none."""
    number = max((math.ceil((len(p.grids) - 1) / p.at_once) for p in pyramids), default=0)
    return tuple(f"{_STAGE}{n + 1}" for n in range(number))


@dataclass(frozen=True)
class PyramidStage(BlockWorker):
    """One stage of some pyramids, and its worker: its blocks are numbered pyramid by pyramid."""

    pyramids: tuple[Pyramid, ...]
    number: int

    @classmethod
    def of(cls, stage: str, pyramids: Sequence[Pyramid]) -> PyramidStage | None:
        """Return the stage with a name of `pyramid_stages`; None for any other stage of a task."""
        number = stage.removeprefix(_STAGE)
        return cls(tuple(pyramids), int(number) - 1) if number != stage else None

    @property
    def parts(self) -> Iterator[tuple[Pyramid, int, Lattice]]:
        """Each pyramid that has levels to make, the level that they are made from, and its blocks."""
        for pyramid in self.pyramids:
            level = pyramid.at_once * self.number
            if level + 1 < len(pyramid.grids):
                yield pyramid, level, pyramid.lattice(level)

    def prepare(self, task: BlockTask, stage: str) -> None:
        """Create the arrays; if one was missing, all blocks of the stage are to be done."""
        made = [p.make(n) for p, level, _ in self.parts for n in range(level + 1, p.last(level) + 1)]
        if any(made):
            done_file(task.folder, stage).unlink(missing_ok=True)

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return sum(len(lattice) for *_, lattice in self.parts)

    @property
    def cost(self) -> Cost:
        """What the largest block takes."""
        sizes = [math.prod(lattice.region(0)[1]) * np.dtype(p.dtype).itemsize for p, _, lattice in self.parts]
        size = max(sizes, default=0)
        return Cost(read=size, written=size // 7, memory=size + _HELD)

    def do(self, number: int) -> None:
        for pyramid, level, lattice in self.parts:
            if number < len(lattice):
                pyramid.fill(level, *lattice.region(number))
                break
            number -= len(lattice)
