"""Raw as the network wants it."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from connectomics.geometry import VoxelGrid
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

    def bytes_behind(self, grid: VoxelGrid) -> int:
        """About how many bytes, decompressed, `read` of a grid reads."""
        level = self._source.levels[self._source.level_for(grid.voxel_size)]
        finer = math.prod(n / v for n, v in zip(grid.voxel_size, level.grid.voxel_size, strict=True))
        return int(grid.size * finer * level.dtype.itemsize)
