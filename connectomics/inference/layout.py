"""How a target grid is divided into blocks, and which part of the network's lattice each of them needs.

Everything follows from the grids and sizes alone, so a resumed run, or another machine, finds the same blocks and the
same windows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any

import numpy as np

from connectomics.errors import InputError
from connectomics.geometry import Index, Triple, VoxelGrid, index, shape_between
from connectomics.inference.blending import Region
from connectomics.inference.sliding import Plan, plan_regions
from connectomics.inference.windows import BLOCK, Cores, WindowLattice, Windows
from connectomics.io.mirror import Extent
from connectomics.io.sharded import Storage

_RESULT_BYTES = 3 << 28  # of a block's values at most, if windows are cropped
_MOST_CORES = 512  # voxels along each axis of such a block
_SMALLEST_CHUNK = 8  # voxels: a chunk that would exceed a block is halved down to that
_SUMS_BYTES = 1 << 28  # blocks get thinner along x until their sums take no more


@dataclass(frozen=True)
class Layout:
    """One target grid of a prediction.

    A block is a whole number of ``chunks`` of the target along each axis, so no two blocks write one chunk. With many
    channels blocks are thinner along x, which costs nothing: neighbors along x share their windows.

    If windows are cropped, a block that is not smaller than `cropped` consists of whole cores, so no two blocks run one
    window. Cores do not depend on ``block_size``. If the target has other voxels, all blocks are `cropped`, whatever
    ``block_size``, since interpolation at their faces takes values of their own windows.

    Attributes:
        target: the grid to write. channels: of the network's output.
        voxel_size: of the network, nm, z y x. context: see `WindowLattice.over`.
        windows: each with a lattice of its own; several if windows are permuted (`windows_seen`).
        block_size: most voxels of the network's lattice at once, z y x (more only if ``chunks`` cannot be smaller);
            None: `BLOCK` along each axis, or more if whole cores need it.
        storage: how the arrays are stored: sharded blocks are whole shards.
        volume: the stored voxels of raw, which windows do not leave; None: raw is everywhere.
    """

    target: VoxelGrid
    channels: int
    voxel_size: Triple
    windows: tuple[Windows, ...]
    context: Index | None
    block_size: Index | None
    volume: VoxelGrid | None = None
    storage: Storage = Storage()  # noqa: RUF009 (frozen)

    @cached_property
    def same_voxels(self) -> bool:
        """Whether the target has the network's voxel size, so that nothing is resampled."""
        return bool(np.allclose(self.target.voxel_size, self.voxel_size, rtol=1e-6))

    @cached_property
    def _margin(self) -> Index:
        """Voxels of the network's lattice that interpolation needs beyond a block, z y x."""
        return index(int(t < m * (1 - 1e-6)) for t, m in zip(self.target.voxel_size, self.voxel_size, strict=True))

    @cached_property
    def model(self) -> VoxelGrid:
        """The network's lattice: it starts at the target's first face and covers its box, with one more voxel on every
        side along the axes where the target is finer, for linear interpolation at the outermost centers."""
        return self.target if self.same_voxels else self.target.at_voxel_size(self.voxel_size).grow(self._margin)

    @cached_property
    def lattices(self) -> list[WindowLattice]:
        """The windows over `model`, for each window shape."""
        extent = None if self.volume is None else Extent.of(self.volume, self.model)
        return [windows.over(self.model, self.context, extent, self._cores) for windows in self.windows]

    @property
    def _scale(self) -> list[float]:
        """Voxels of the network's lattice for each voxel of the target, z y x."""
        if self.same_voxels:
            return [1.0] * 3
        return [t / m for t, m in zip(self.target.voxel_size, self.voxel_size, strict=True)]

    @property
    def _cores(self) -> Cores | None:
        """Where blocks may end, in voxels of `model`."""
        if not self.windows[0].crop:
            return None
        marks, reach = [], []
        for axis, (unit, scale, margin) in enumerate(zip(self.cropped, self._scale, self._margin, strict=True)):
            n, between = self.model.shape[axis], range(unit, self.target.shape[axis], unit)
            marks.append((0, *(margin + int(end * scale + 1e-6) for end in between), n))
            reach.append(margin + (abs(unit * scale - round(unit * scale)) > 1e-6))
        return Cores((marks[0], marks[1], marks[2]), index(reach))

    @cached_property
    def cropped(self) -> Index:
        """Voxels of the target of which blocks are multiples if windows are cropped, z y x: as many chunks (or shards)
        as cost least, of those with which the values of a block take at most `_RESULT_BYTES`."""
        value_bytes = self.channels * self.value_type("uint8", "none").itemsize
        edge = min(_MOST_CORES, (_RESULT_BYTES / value_bytes) ** (1 / 3))
        found = []
        for axis, scale in enumerate(self._scale):
            unit = self.storage.chunk[axis]
            while self.storage.shard is None and unit * scale > edge and unit > _SMALLEST_CHUNK:
                unit = max(_SMALLEST_CHUNK, unit // 2)
            unit = self._unit(axis, unit)
            numbers = range(1, 1 + min(max(1, int(edge / scale / unit)), math.ceil(self.target.shape[axis] / unit)))
            cost = {number: self._cost(axis, number * unit * scale) for number in numbers}
            found.append(unit * min(cost, key=lambda number: (cost[number], number)))
        return index(found)

    def _cost(self, axis: int, length: float) -> float:
        """Return how many voxels of windows there are along an axis for each of `model`, if blocks are so long."""
        total, n = 0.0, self.model.shape[axis]
        for windows in self.windows:
            size, step = windows.size[axis], windows.step[axis]
            number, rest = math.ceil(length / step - 1e-6), math.ceil(n % length / step - 1e-6)
            side = size if windows.fit is None else min(size, length / number + size - step)
            total += side * (n // length * number + rest) / n
        return round(total, 3)

    @cached_property
    def chunks(self) -> Index:
        """Chunk shape of the written arrays, voxels, z y x."""
        return index(self._along(axis)[0] for axis in range(3))

    @cached_property
    def shards(self) -> Index | None:
        """Voxels of a file of the written arrays, z y x; None: a file is a chunk."""
        if not self.storage.is_sharded:
            return None
        if self.storage.shard is None:
            return self.block_shape
        return index(self._unit(axis, chunk) for axis, chunk in enumerate(self.storage.chunk))

    @cached_property
    def block_shape(self) -> Index:
        """Block shape in voxels of the target, z y x (the last blocks are smaller).

        Raises `InputError` if a block does not hold a shard.
        """
        z, y, x = (self._along(axis)[1] for axis in range(3))
        if self.windows[0].crop:
            return z, y, x
        scale = self._scale
        plane = 4 * (self.channels + 1) * z * scale[0] * y * scale[1]  # bytes of sums for one voxel along x
        unit, width = self._unit(2, self.chunks[2]), max(windows.size[2] for windows in self.windows)
        while x > unit and plane * (x * scale[2] + width) > _SUMS_BYTES:
            x = math.ceil(x / (2 * unit)) * unit
        return z, y, x

    def _along(self, axis: int) -> tuple[int, int]:
        """Chunk and block along one axis, in voxels of the target."""
        n, size = self.target.shape[axis], self.target.voxel_size[axis]
        most = int((self.block_size or (BLOCK,) * 3)[axis] * self.voxel_size[axis] / size + 1e-6)
        chunk = self.storage.chunk[axis]
        while self.storage.shard is None and chunk > most and chunk > _SMALLEST_CHUNK:
            chunk = max(_SMALLEST_CHUNK, chunk // 2)
        unit = self._unit(axis, chunk)
        if self.storage.shard is not None and unit > max(most, chunk):
            size_there = math.ceil(unit * size / self.voxel_size[axis] - 1e-6)
            raise InputError(
                f"output.shard of {unit} voxels is larger than a block of {most} along {'zyx'[axis]}, and one worker "
                f"must write a whole shard; set inference.block_size to at least {size_there} there, or a smaller "
                "output.shard"
            )
        whole = math.lcm(unit, self.cropped[axis]) if self.windows[0].crop else 0
        if whole and not self.same_voxels:
            return chunk, whole
        unit = whole if whole and (whole <= most or self.block_size is None) else unit
        count = math.ceil(n / max(unit, most // unit * unit))
        return chunk, math.ceil(n / (count * unit)) * unit  # blocks of about one size rather than a thin last one

    def _unit(self, axis: int, chunk: int) -> int:
        """Voxels along an axis of which a block is a multiple: a chunk, or a shard (no more than the target needs)."""
        shard = self.storage.shard
        return chunk if shard is None else min(shard[axis], math.ceil(self.target.shape[axis] / chunk) * chunk)

    @cached_property
    def blocks(self) -> list[tuple[Index, VoxelGrid]]:
        """(first voxel in the target, grid) of every block, x fastest."""
        return list(self.target.blocks(self.block_shape))

    @cached_property
    def regions(self) -> list[Region]:
        """For every block, the voxels of `model` that it is made from."""
        return [self.region(grid) for _, grid in self.blocks]

    def region(self, part: VoxelGrid) -> Region:
        """Return the voxels of `model` that a part of the target is made from."""
        begin, end = self.model.index_range(part.box)
        low = [max(0, b - m) for b, m in zip(begin, self._margin, strict=True)]
        high = [min(n, e + m) for n, e, m in zip(self.model.shape, end, self._margin, strict=True)]
        return index(low), index(shape_between(low, high))

    def value_type(self, dtype: str, uncertainty: str) -> np.dtype[Any]:
        """Return the dtype in which blocks wait to be written: uint8 if they are written as they are."""
        as_they_are = self.same_voxels and len(self.windows) == 1 and (dtype, uncertainty) == ("uint8", "none")
        return np.dtype(np.uint8 if as_they_are else np.float32)

    @property
    def seen(self) -> VoxelGrid:
        """A grid of as many voxels of `model` as the windows over a block see at most."""
        block, shape = self.regions[0][1], [0, 0, 0]
        for lattice in self.lattices:
            for axis, (s, w) in enumerate(zip(lattice.starts, lattice.window, strict=True)):
                shape[axis] = max(shape[axis], min(s[-1] + w - s[0], block[axis] + 2 * (w - 1)))
        return self.model.crop((0, 0, 0), shape)

    def plan(self, batch_size: int, passes: Sequence[int], dtype: str = "float16", uncertainty: str = "none") -> Plan:
        """Return what the blocks cost if each window of a lattice takes so many passes."""
        value_bytes = self.value_type(dtype, uncertainty).itemsize
        results = (2, 1, *[0] * len(passes))  # of the first lattice two in turn; all others share one
        first, *rest = (
            plan_regions(lattice, self.regions, self.channels, batch_size, number * value_bytes).times(times)
            for lattice, times, number in zip(self.lattices, passes, results, strict=False)
        )
        return reduce(Plan.with_windows_of, rest, first)
