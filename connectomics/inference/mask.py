"""Where there is anything to predict: a label volume, beside which windows are not run."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from connectomics.geometry import VoxelGrid
from connectomics.io.multiscale import Multiscale

_REMEMBERED = 1 << 16  # windows; those of a row of blocks are asked for several times


class Mask:
    """A multiscale volume whose voxels above 0 are inside; what lies beyond it is outside.

    It is looked at on its coarsest level that is as fine as the network's voxels, on every voxel that a window touches.
    """

    def __init__(self, location: str, voxel_size: Sequence[float]) -> None:
        """``voxel_size`` of the network, nm. Raises `MissingError` and `MetadataError` as `Multiscale.open` does."""
        self._source = Multiscale.open(location)
        self._level = self._source.level_for(voxel_size)
        self.touches = lru_cache(_REMEMBERED)(self._touches)

    def _touches(self, window: VoxelGrid) -> bool:
        part = self._source.levels[self._level].grid.slices(window.box)
        begin, shape = [s.start for s in part], [s.stop - s.start for s in part]
        if min(shape) <= 0:
            return False
        values, _ = self._source.read_level(self._level, begin, shape, absent_is_missing=False)
        return bool((values > 0).any())
