"""How much of what is predicted has no raw: its chunk is absent, or it lies beyond the volume.

A voxel of the target has raw if the chunk of the raw voxel at its center is stored (at the faces of the volume: of the
nearest one, if it overlaps the volume). That is worked out from the presence of chunks, without reading them: per axis
it is known which voxels lie in which chunk, so counting takes one matrix product per axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from connectomics.inference.layout import Layout
from connectomics.io.multiscale import Multiscale

_ASKED = 2**16  # chunks whose presence is asked for at a time


@dataclass(frozen=True, eq=False)
class Presence:
    """Where one target grid has raw, as far as that is known from which chunks are stored now."""

    source: Multiscale
    layout: Layout

    @cached_property
    def _level(self) -> int:
        return self.source.level_for(self.layout.model.voxel_size)  # as `Multiscale.read_raw` chooses it

    @cached_property
    def _chunk_of(self) -> list[NDArray[np.int64]]:
        """Per axis, the raw's chunk that each target voxel lies in; -1 beyond the raw."""
        level, target = self.source.levels[self._level], self.layout.target
        found = []
        for axis, centers in enumerate(target.axes()):
            size, half = level.grid.voxel_size[axis], target.voxel_size[axis] / 2
            low, high = level.grid.box.begin[axis], level.grid.box.end[axis]
            index = np.floor((centers - low) / size + 1e-6).astype(np.int64)
            chunk = np.clip(index, 0, level.grid.shape[axis] - 1) // level.chunks[axis]
            overlaps = (centers + half > low + 1e-6 * size) & (centers - half < high - 1e-6 * size)
            found.append(np.where(overlaps, chunk, -1))
        return found

    def _stored(self, low: Sequence[int], high: Sequence[int]) -> NDArray[np.bool_]:
        """Whether the chunks with indices ``low`` to ``high`` (exclusive) are stored."""
        level = self.source.levels[self._level]
        begin = [a * c for a, c in zip(low, level.chunks, strict=True)]
        end = [min(b * c, n) for b, c, n in zip(high, level.chunks, level.grid.shape, strict=True)]
        return self.source.stored_chunks(level.grid.crop(begin, [e - b for b, e in zip(begin, end, strict=True)]))

    def missing(self) -> NDArray[np.int64]:
        """(blocks,) how many target voxels of each block of the layout have no raw. `StoreError`."""
        per_axis, counts, low, high = [], [], [], []
        for chunk, step in zip(self._chunk_of, self.layout.block_shape, strict=True):
            block, there = np.arange(len(chunk)) // step, chunk >= 0
            first, last = (int(chunk[there].min()), int(chunk.max()) + 1) if there.any() else (0, 0)
            table = np.zeros((int(block[-1]) + 1, last - first), np.int64)
            np.add.at(table, (block[there], chunk[there] - first), 1)
            per_axis.append(table)
            counts.append(np.bincount(block))
            low.append(first)
            high.append(last)
        missing = np.einsum("a,b,c->abc", *counts)
        depth = max(1, _ASKED // max(1, (high[1] - low[1]) * (high[2] - low[2])))
        if min(h - b for b, h in zip(low, high, strict=True)) > 0:
            for z in range(low[0], high[0], depth):
                end = min(z + depth, high[0])
                stored = self._stored((z, *low[1:]), (end, *high[1:])).astype(np.int64)
                along_z = np.tensordot(per_axis[0][:, z - low[0] : end - low[0]], stored, (1, 0))
                along_y = np.tensordot(along_z, per_axis[1], (1, 1))  # blocks z, chunks x, blocks y
                missing -= np.tensordot(along_y, per_axis[2], (1, 1))
        return missing.reshape(-1)

    def absent(self, number: int) -> NDArray[np.bool_]:
        """Which voxels of a block have no raw; bool of the block's shape."""
        begin, block = self.layout.blocks[number]
        chunks = [chunk[b : b + n] for chunk, b, n in zip(self._chunk_of, begin, block.shape, strict=True)]
        if not all((chunk >= 0).any() for chunk in chunks):
            return np.ones(block.shape, bool)
        low = [int(chunk[chunk >= 0].min()) for chunk in chunks]
        stored = self._stored(low, [int(chunk.max()) + 1 for chunk in chunks])
        there = [chunk >= 0 for chunk in chunks]
        inside = stored[np.ix_(*(np.maximum(chunk - b, 0) for chunk, b in zip(chunks, low, strict=True)))]
        return ~(inside & there[0][:, None, None] & there[1][:, None] & there[2])

    def first(self, number: int) -> str:
        """Where the first voxel without raw of a block is, in words."""
        voxel = np.add(self.layout.blocks[number][0], np.argwhere(self.absent(number))[0])
        chunks = [int(chunk[i]) for chunk, i in zip(self._chunk_of, voxel, strict=True)]
        place = " ".join(f"{p:.10g}" for p in self.layout.target.to_world(voxel))
        level = self.source.levels[self._level]
        if min(chunks) < 0:
            return f"at {place} nm, beyond {self.source.location}, which covers {level.grid.box}"
        corner = level.grid.crop([k * c for k, c in zip(chunks, level.chunks, strict=True)], (1, 1, 1))
        return f"at {place} nm, where {self.source.chunk_locations(corner)[1][0]} is not stored"
