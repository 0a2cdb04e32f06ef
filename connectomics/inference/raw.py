"""Raw as the network wants it."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from connectomics.errors import InputError
from connectomics.geometry import VoxelGrid
from connectomics.inference.layout import Layout
from connectomics.io.multiscale import Multiscale


class RawSource:
    """Raw of one multiscale group as the network wants it: 0 to 1, zeros where there is none."""

    def __init__(self, location: str, intensity_range: tuple[float, float]) -> None:
        self.location = location
        self._source = Multiscale.open(location)
        self._low, self._high = intensity_range

    def read(self, grid: VoxelGrid) -> NDArray[np.float32]:
        """(v - low) / (high - low), clipped to [0, 1], float32 (d, h, w); 0 where there is no raw.

        Raises `CorruptDataError` where a chunk cannot be decoded or holds values that are not finite.
        """
        values, inside = self._source.read_raw(grid)
        values -= np.float32(self._low)
        values /= np.float32(self._high - self._low)
        np.clip(values, 0, 1, out=values)
        values[~inside] = 0
        return values

    def require_any(self, layout: Layout, what: str) -> None:
        """Raise `InputError` if no voxel of the region has raw: outside the volume, or its chunks are absent."""
        grid = layout.model
        middle = grid.crop([n // 2 for n in grid.shape], (1, 1, 1))
        for part in (middle, *(grid.crop(*region) for region in layout.regions)):
            if self._source.read_raw(part)[1].any():
                return
        finest = self._source.levels[0].grid.box
        reason = "the chunks there are absent" if not finest.intersect(grid.box).is_empty else f"it covers {finest}"
        raise InputError(f"{self.location} has no raw for {what}, which lies at {layout.target.box}: {reason}")

    def bytes_behind(self, grid: VoxelGrid) -> int:
        """About how many bytes, decompressed, `read` of a grid reads."""
        level = self._source.levels[self._source.level_for(grid.voxel_size)]
        finer = math.prod(n / v for n, v in zip(grid.voxel_size, level.grid.voxel_size, strict=True))
        return int(grid.size * finer * level.dtype.itemsize)
