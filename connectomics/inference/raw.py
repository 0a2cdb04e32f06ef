"""What a network reads at one place: normalized raw, further inputs at other voxel sizes, and a mask."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from connectomics.errors import InputError
from connectomics.geometry import Index, Triple, VoxelGrid
from connectomics.io.mirror import read_mirrored
from connectomics.io.multiscale import Multiscale
from connectomics.io.normalization import Normalization

_REMEMBERED_WINDOWS = 1 << 16  # a row of blocks asks for the same windows several times


class RawSource:
    """Raw of one multiscale group as the network wants it: normalized, and never black outside the volume."""

    def __init__(self, location: str, normalization: Normalization) -> None:
        self.normalization = normalization
        self._source = Multiscale.open(location)

    def volume(self, voxel_size: Triple) -> VoxelGrid:
        """Return the stored voxels from which grids of a voxel size (nm) are read."""
        return self._source.levels[self._source.level_for(voxel_size)].grid

    def read(self, grid: VoxelGrid) -> NDArray[np.float32]:
        """Return the network's input, float32 (d, h, w); tissue has mean 0, see `Normalization`.

        Raw is mirrored beyond the volume (`connectomics.io.mirror`) and 0 where chunks are missing. Raises
        `CorruptDataError` if a chunk cannot be decoded or holds values that are not finite.
        """
        values, inside = read_mirrored(self._source.read_raw, self.volume(grid.voxel_size), grid)
        return self.normalization.centered(self.normalization.unit(values), inside)

    def bytes_behind(self, grid: VoxelGrid) -> int:
        """Estimate how many bytes, decompressed, `read` of a grid reads."""
        level = self._source.levels[self._source.level_for(grid.voxel_size)]
        finer = math.prod(n / v for n, v in zip(grid.voxel_size, level.grid.voxel_size, strict=True))
        return int(grid.size * finer * level.dtype.itemsize)


@dataclass(frozen=True)
class FurtherInput:
    """How a further input of the network (``data.inputs``) is read.

    Attributes:
        read: returns the network's input, float32 (d, h, w), for a grid anywhere; zeros where there is no raw.
        voxel_size: nm, z y x. shape: voxels, z y x.
    """

    read: Callable[[VoxelGrid], NDArray[np.float32]]
    voxel_size: Triple
    shape: Index

    def around(self, window: VoxelGrid) -> NDArray[np.float32]:
        """Return the input with the same center as ``window``, float32 (d, h, w)."""
        grid = VoxelGrid.centered(window.box.center, self.voxel_size, self.shape)
        values = self.read(grid)
        if values.shape != grid.shape:
            raise InputError(f"read must give an array of shape {grid.shape} for {grid}, got {values.shape}")
        return values


class Mask:
    """A multiscale volume: voxels above 0 are inside; everything beyond the volume is outside.

    It is read from the coarsest level that is as fine as the network's voxels.
    """

    def __init__(self, location: str, voxel_size: Sequence[float]) -> None:
        """Open the mask for a network's ``voxel_size`` (nm). Raises `MissingError` and `MetadataError`."""
        self._source = Multiscale.open(location)
        self._level = self._source.level_for(voxel_size)
        self.touches = lru_cache(_REMEMBERED_WINDOWS)(self._touches)

    def _touches(self, window: VoxelGrid) -> bool:
        begin, part = self._source.levels[self._level].grid.part(window.box)
        if not part.size:
            return False
        values, _ = self._source.read_level(self._level, begin, part.shape, absent_is_missing=False)
        return bool((values > 0).any())
