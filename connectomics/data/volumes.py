"""A crop at the run's voxel size: the one place where raw and labels meet on a common lattice.

A `CropVolume` lays a lattice of the run's voxel size over a crop, starting at the crop's first face; every patch and
every validation block is a whole number of voxels away from it, so a voxel is always the same piece of the world,
whether it is read from Zarr each time or from the crop cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from connectomics.cellmap.catalog import Crop
from connectomics.cellmap.labels import LabelVolume, read_instances, read_labels
from connectomics.data.crop_cache import CachedCrop, CropCache
from connectomics.errors import InputError
from connectomics.geometry import Triple, VoxelGrid
from connectomics.io.multiscale import Multiscale


@dataclass(frozen=True)
class Intensity:
    """How raw values become network input: ``low`` maps to 0 and ``high`` to 1, linearly, and beyond is cut off."""

    low: float
    high: float

    @classmethod
    def of(cls, source: Multiscale, value_range: Sequence[float] | None) -> Intensity:
        """The given range, else 0..255 for uint8; `InputError` for other types, which seldom fill their range."""
        if value_range is not None:
            if len(value_range) != 2 or not value_range[0] < value_range[1]:
                raise InputError(f"data.intensity_range must be [low, high] with low < high, found {list(value_range)}")
            return cls(float(value_range[0]), float(value_range[1]))
        dtype = source.levels[0].dtype
        if dtype != np.uint8:
            raise InputError(
                f"{source.location} holds {dtype} values, whose range says nothing; "
                "set data.intensity_range=[low,high] to the values that become 0 and 1"
            )
        return cls(0.0, 255.0)

    def quantize(self, values: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Raw values as uint8 0..255, rounded: what the cache keeps, and what streaming gives too."""
        scaled = (values - np.float32(self.low)) * np.float32(255.0 / (self.high - self.low))
        return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)


@dataclass(frozen=True)
class CropVolume:
    """Raw and labels of one crop on the run's lattice.

    Attributes:
        crop: what is read.
        classes: the classes, in channel order.
        voxel_size: the run's, nm, z y x.
        intensity_range: see `Intensity`.
        cache: where decoded crops are kept, or None to read from Zarr each time.
        context: voxels of raw that the cache keeps around the crop.
    """

    crop: Crop
    classes: tuple[str, ...]
    voxel_size: Triple
    intensity_range: tuple[float, float] | None = None
    cache: Path | None = None
    context: tuple[int, int, int] = field(default=(0, 0, 0))

    @property
    def name(self) -> str:
        """The crop's name, ``crop234``."""
        return self.crop.name

    @property
    def dataset(self) -> str:
        """The data set's name."""
        return self.crop.dataset

    @cached_property
    def grid(self) -> VoxelGrid:
        """The crop's lattice: the run's voxel size, from the crop's first face to past its last."""
        return VoxelGrid.covering(self.crop.box, self.voxel_size)

    @cached_property
    def intensity(self) -> Intensity:
        """The mapping of raw values."""
        return Intensity.of(self.crop.raw_source, self.intensity_range)

    @cached_property
    def _entry(self) -> Path | None:
        """The folder of the cache's entry, built where it is not there; None without a cache."""
        return None if self.cache is None else CropCache(self.cache).ensure(self)

    @cached_property
    def _cached(self) -> CachedCrop | None:
        return None if self._entry is None else CropCache.open(self._entry, self)

    def prepare(self) -> None:
        """Decode into the cache now (where there is one), rather than at the first read."""
        _ = self._entry

    def __getstate__(self) -> dict[str, object]:
        # Open arrays stay in their process; a loader worker opens its own. The entry's folder goes along: finding it
        # looks at every label file of the crop, which takes long on a network disk.
        keep = ("crop", "classes", "voxel_size", "intensity_range", "cache", "context", "_entry")
        return {name: self.__dict__[name] for name in keep if name in self.__dict__}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)

    # -- reading -----------------------------------------------------------------------------------------------------
    def read_raw(self, grid: VoxelGrid) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """Raw as uint8 0..255 on a grid of this lattice, and where there is raw at all (0 elsewhere)."""
        cached = self._cached
        if cached is not None and cached.holds(grid):
            return cached.read_raw(grid)
        return self.decode_raw(grid)

    def decode_raw(self, grid: VoxelGrid) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """As `read_raw`, always from Zarr: the plain way, and what the cache is filled from."""
        values, inside = self.crop.raw_source.read_raw(grid)
        quantized = self.intensity.quantize(values)
        quantized[~inside] = 0
        return quantized, inside

    def read_image(self, grid: VoxelGrid) -> NDArray[np.float32]:
        """Network input: float32 in [0, 1], (d, h, w), 0 where there is no raw."""
        return self.read_raw(grid)[0].astype(np.float32) / np.float32(255.0)

    def label_volume(self, grid: VoxelGrid) -> LabelVolume:
        """Three-state labels on a grid of this lattice; unknown beyond the crop."""
        cached = self._cached
        if cached is not None:
            return cached.read_labels(grid)
        return self.decode_labels(grid)

    def decode_labels(self, grid: VoxelGrid) -> LabelVolume:
        """As `label_volume`, always from Zarr."""
        return read_labels(self.crop, self.classes, grid)

    def read_labels(self, grid: VoxelGrid) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """``label`` float32 0/1 and ``known`` bool, (C, d, h, w); unknown also where there is no raw to see."""
        return self.label_volume(grid).restricted(self.read_raw(grid)[1]).dense()

    def read_instances(
        self, class_name: str, grid: VoxelGrid
    ) -> tuple[NDArray[np.unsignedinteger], NDArray[np.bool_]] | None:
        """Annotated ids and ``known`` bool, (d, h, w), from Zarr; None where the crop has no ids of the class.

        Unknown also where there is no raw to see, as in `read_labels`.
        """
        label = self.crop.labels.get(class_name)
        if label is None or label.annotation.kind != "instance":
            return None
        ids, known = read_instances(self.crop, class_name, grid)
        return ids, known & self.read_raw(grid)[1]

    def check(self) -> None:
        """Raise `InputError` where the crop is empty or its raw does not reach it."""
        if self.grid.size == 0:
            raise InputError(f"{self.crop.key} is empty: its labels have shape {self.crop.grid.shape}")
        _ = self.intensity  # refuses raw of a type whose range says nothing
        raw_box = self.crop.raw_source.levels[0].grid.box
        if raw_box.intersect(self.crop.box).is_empty:
            raise InputError(
                f"{self.crop.key} lies at {self.crop.box} but its raw {self.crop.raw} covers {raw_box}: "
                "no raw to see; fetch the raw of that region, or leave the crop out"
            )
