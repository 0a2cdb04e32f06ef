"""Raw as the network wants it."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from connectomics.geometry import Triple, VoxelGrid
from connectomics.io.mirror import read_mirrored
from connectomics.io.multiscale import Multiscale
from connectomics.io.normalization import Normalization


class RawSource:
    """Raw of one multiscale group as the network wants it: normalized, and never black where there is none."""

    def __init__(self, location: str, normalization: Normalization) -> None:
        self.location = location
        self.normalization = normalization
        self._source = Multiscale.open(location)

    def volume(self, voxel_size: Triple) -> VoxelGrid:
        """The stored voxels that grids of a voxel size (nm) are read from."""
        return self._source.levels[self._source.level_for(voxel_size)].grid

    def read(self, grid: VoxelGrid) -> NDArray[np.float32]:
        """The network's input, float32 (d, h, w), mean of tissue 0; see `Normalization`.

        Beyond the volume it is mirrored (`connectomics.io.mirror`); if chunks are missing, it is 0 there. Raises
        `CorruptDataError` if a chunk cannot be decoded or holds values that are not finite.
        """
        values, inside = read_mirrored(self._source.read_raw, self.volume(grid.voxel_size), grid)
        return self.normalization.centered(self.normalization.unit(values), inside)

    def bytes_behind(self, grid: VoxelGrid) -> int:
        """About how many bytes, decompressed, `read` of a grid reads."""
        level = self._source.levels[self._source.level_for(grid.voxel_size)]
        finer = math.prod(n / v for n, v in zip(grid.voxel_size, level.grid.voxel_size, strict=True))
        return int(grid.size * finer * level.dtype.itemsize)
