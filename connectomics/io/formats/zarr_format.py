"""Zarr: an OME-NGFF group (its finest level) or a plain array."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from connectomics.errors import MetadataError
from connectomics.geometry import VoxelGrid
from connectomics.io.formats.source import VolumeSource
from connectomics.io.multiscale import Multiscale, PlainArray


def open_source(path: Path, inner: str | None) -> VolumeSource:
    """A group with ``multiscales``, or an array."""
    place = str(path / inner) if inner else str(path)
    try:
        group = Multiscale.open(place)
    except MetadataError:
        array = PlainArray.open(place)
        return VolumeSource(place, array.shape, array.dtype, array.read, **_where(array.grid))
    level = group.levels[0]

    def read(begin: Sequence[int], shape: Sequence[int]) -> NDArray[Any]:
        return group.read_level(0, begin, shape, absent_is_missing=False)[0]

    return VolumeSource(place, level.grid.shape, level.dtype, read, **_where(level.grid))


def _where(grid: VoxelGrid | None) -> dict[str, Any]:
    return {} if grid is None else {"voxel_size": grid.voxel_size, "begin": grid.box.begin}
