"""Bare decompression of the stored chunks behind a patch: the least that a reader without a cache can do."""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any

import numcodecs
import numpy as np

from connectomics.data.bench.meter import Meter
from connectomics.data.volumes import CropVolume
from connectomics.geometry import VoxelGrid
from connectomics.io.array import StoredArray
from connectomics.io.multiscale import Multiscale
from connectomics.io.store import is_s3, join, read_json


def can_decompress(volume: CropVolume) -> bool:
    """Whether the chunks lie in local files of Zarr v2, whose codec is one compressor."""
    return all(
        not is_s3(source.location) and _array(source, level)[0].zarr_format == 2 for source, level in _levels(volume)
    )


def decompress(volume: CropVolume, grid: VoxelGrid, meter: Meter, name: str) -> None:
    """Decompress every chunk of raw and of the classes' labels that ``grid`` (nm) touches, at the levels that are
    read at the volume's voxel size; the files are read before, which is not counted."""
    for source, level in _levels(volume):
        array, codec = _array(source, level)
        inside = source.levels[level].grid.slices(grid.box)
        if any(s.stop <= s.start for s in inside):
            continue
        begin, end = array.chunk_range([s.start for s in inside], [s.stop for s in inside])
        for index in np.ndindex(*np.subtract(end, begin)):
            path = array.chunk_location(np.add(begin, index).tolist())
            if not os.path.isfile(path):
                continue
            with open(path, "rb") as file:
                stored = file.read()
            with meter.part(name):
                if codec is not None:
                    codec.decode(stored)


def _levels(volume: CropVolume) -> list[tuple[Multiscale, int]]:
    """What is read: raw at the level for the voxel size, labels at their finest."""
    raw = volume.crop.raw_source
    labels = [volume.crop.labels[name].source for name in volume.classes if name in volume.crop.labels]
    return [(raw, raw.level_for(volume.voxel_size)), *((source, 0) for source in labels)]


def _array(source: Multiscale, level: int) -> tuple[StoredArray, Any]:
    """The array of a level and its compressor (None: stored plainly)."""
    return _opened(join(source.location, source.levels[level].path))


@lru_cache(maxsize=256)
def _opened(location: str) -> tuple[StoredArray, Any]:
    array = StoredArray(location)
    compressor = None if array.zarr_format != 2 else (read_json(join(location, ".zarray")) or {}).get("compressor")
    return array, None if compressor is None else numcodecs.get_codec(compressor)
