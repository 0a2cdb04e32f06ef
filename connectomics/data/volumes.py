"""A crop at the run's voxel size: the one place where raw and labels meet on a common lattice.

The lattice of a `CropVolume` starts at the crop's first face. Every patch and every validation block is a whole number
of voxels away from it, so a voxel is always the same piece of the world, read from Zarr or from the crop cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.cellmap.catalog import Crop
from connectomics.cellmap.label_codes import LabelCodes, StateTable
from connectomics.cellmap.labels import LabelVolume, read_instances, read_labels
from connectomics.data.arrays import CropArrays
from connectomics.data.cache.entry import CachedCrop, Prints, source_prints
from connectomics.data.cache.folder import CropCache
from connectomics.errors import InputError
from connectomics.geometry import Index, Triple, VoxelGrid, index, shape_between
from connectomics.io.mirror import Extent, hull, read_mirrored
from connectomics.io.normalization import Normalization

RawBlock = tuple[NDArray[np.uint8], NDArray[np.bool_]]  # values, and where there is raw


@dataclass(frozen=True)
class CropVolume:
    """Raw and labels of one crop on the run's lattice."""

    crop: Crop
    classes: tuple[str, ...]  # in channel order
    voxel_size: Triple  # the run's voxel size, nm, z y x
    normalization: Normalization | None = None  # None for 0..255 to 0..1 without centering (uint8 raw only)
    cache: Path | None = None  # folder of the crop cache; None reads from Zarr each time
    context: Index = (0, 0, 0)  # voxels of raw that the cache keeps around the crop
    allow_missing_raw: bool = False  # whether `check` accepts crops with missing raw chunks
    instances: tuple[str, ...] = ()  # those of classes that have object IDs
    alternate_ties: bool = False  # see `read_labels`
    soft: bool = False  # whether labels are fractions, see `read_labels`

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
        """The crop's lattice: the run's voxel size, from the crop's first face to past its last.

        Without classes (a further input, see `CropPatches`): the raw's voxels, if it is stored at this voxel size. A
        patch of the input has any offset from them and is interpolated; other voxels would be interpolated twice.
        """
        grid = VoxelGrid.covering(self.crop.box, self.voxel_size)
        if self.classes or not np.allclose((raw := self._raw_grid(self.voxel_size)).voxel_size, self.voxel_size):
            return grid
        first = np.floor(raw.to_index(grid.translation) + 1e-3).astype(int)
        return raw.crop(first.tolist(), [n + 1 for n in grid.shape])

    @cached_property
    def normalized(self) -> Normalization:
        """The normalization in use. Raises `InputError` if there is none and raw is not uint8."""
        source = self.crop.raw_source
        if self.normalization is None and source.levels[0].dtype != np.uint8:
            raise InputError(
                f"{source.location} holds {source.levels[0].dtype} values, whose range says nothing; set "
                "data.intensity_range=auto, or [low,high] to the values that become 0 and 1"
            )
        return self.normalization or Normalization()

    @cached_property
    def cached_raw_grid(self) -> VoxelGrid:
        """The raw that the cache keeps: the crop with its context, as far as the raw volume reaches."""
        begin = [-k for k in self.context]
        end = [n + k for n, k in zip(self.grid.shape, self.context, strict=True)]
        low, high = self._where_raw_is(begin, end)
        return self.grid.crop(low, shape_between(low, high))

    @cached_property
    def raw_extent(self) -> Extent:
        """Where the raw volume has voxels, in voxels of ``grid``."""
        return Extent.of(self._raw_grid(self.voxel_size), self.grid)

    def _raw_grid(self, voxel_size: Triple) -> VoxelGrid:
        """The grid of the raw level that is read at a voxel size."""
        source = self.crop.raw_source
        return source.levels[source.level_for(voxel_size)].grid

    def _where_raw_is(self, lo: Sequence[int], hi: Sequence[int]) -> tuple[list[int], list[int]]:
        """The part of lattice indices ``lo`` to ``hi`` (exclusive) whose centers lie in the raw volume; if there is
        none, ``lo`` to ``lo``."""
        low = [max(int(b), r) for b, r in zip(lo, self.raw_extent.low, strict=True)]
        high = [min(int(h), r) for h, r in zip(hi, self.raw_extent.high, strict=True)]
        is_empty = any(h <= b for b, h in zip(low, high, strict=True))
        return ([int(b) for b in lo],) * 2 if is_empty else (low, high)

    @cached_property
    def source_prints(self) -> tuple[Prints, dict[str, Prints]]:
        """Fingerprints of raw and labels, as they were when first asked for (see `connectomics.data.cache.entry`)."""
        return source_prints(self)

    # -- the cache ---------------------------------------------------------------------------------------------------
    @cached_property
    def _entry(self) -> Path | None:
        """The folder of the cache entry, built if it does not exist; None without a cache."""
        return None if self.cache is None else CropCache(self.cache).ensure(self)

    @cached_property
    def _cached(self) -> CachedCrop | None:
        entry, checked = self._entry, bool(self.__dict__.get("_adopted", False))
        return None if entry is None else CropCache(entry.parent).open(entry, checked=checked)

    def adopt(self, entry: Path | None) -> None:
        """Read from this cache entry, which exists and was checked; None reads without the cache."""
        self.__dict__.pop("_cached", None)
        self.__dict__.update(_entry=entry, _adopted=True)

    @property
    def checksums(self) -> tuple[str, str] | None:
        """Hashes of the decoded raw and labels (`CachedCrop.checksums`); None without a cache."""
        return None if self._cached is None else self._cached.checksums

    def prepare(self) -> None:
        """Decode into the cache (if there is one) now rather than at the first read; see also
        `connectomics.data.cache.prepare`."""
        _ = self._cached

    def __getstate__(self) -> dict[str, object]:
        # Open arrays stay in their process; a loader worker opens its own. The entry's folder is sent: finding it looks
        # at every label file of the crop, which takes long on a network disk.
        keep = (*(f.name for f in fields(self)), "_entry")
        return {name: self.__dict__[name] for name in keep if name in self.__dict__}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        if "_entry" in state:
            self.__dict__["_adopted"] = True

    # -- reading -----------------------------------------------------------------------------------------------------
    def arrays(self, lo: Sequence[int], hi: Sequence[int]) -> CropArrays:
        """Return `plain_arrays` with raw mirrored where the volume ends (see `connectomics.io.mirror`)."""
        extent = self.raw_extent
        if extent.is_empty or extent.holds(lo, hi):
            return self.plain_arrays(lo, hi)
        low, high = hull(extent.mirrored(lo, hi))
        whole = [min(a, b) for a, b in zip(lo, low, strict=True)], [max(a, b) for a, b in zip(hi, high, strict=True)]
        return self.plain_arrays(*whole).mirrored(extent, lo, hi)

    def plain_arrays(self, lo: Sequence[int], hi: Sequence[int]) -> CropArrays:
        """Return raw and label codes that cover lattice indices ``lo`` to ``hi`` (exclusive; they may lie beyond the
        crop and beyond raw); index 0 is the first voxel of ``grid``.

        If the cache covers the raw that exists there, these are the whole cached arrays, mapped read-only. Otherwise
        that range is decoded from Zarr. ``raw`` and ``codes`` may be empty.
        """
        low, high = self._where_raw_is(lo, hi)
        fill = self.normalized.mean
        kept = None if self._cached is None else replace(self._cached.arrays(), fill=fill)
        if kept is not None and _covers(kept.raw_begin, kept.raw.shape, low, high):
            return kept
        raw, inside = self.decode_raw(self.grid.crop(low, shape_between(low, high)))
        begin = index(low)
        whole = None if inside.all() else inside
        if kept is not None:
            return replace(kept, raw=raw, raw_begin=begin, inside=whole)
        first, labels = self._decode_codes(lo, hi)
        return CropArrays(raw, begin, whole, labels.codes, first, labels.states, fill)

    def read_raw(self, grid: VoxelGrid) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """Return raw as uint8 0..255 on a grid of this lattice (0 where there is none), and where there is raw."""
        cached = self._cached
        if cached is not None:
            begin, end = self._indices(grid)
            low, high = self._where_raw_is(begin, end)
            if _covers(cached.raw_begin, cached.raw_grid.shape, low, high):
                kept = cached.arrays()
                raw = _cut(kept.raw, kept.raw_begin, begin, grid.shape)
                if kept.inside is not None:
                    return raw, _cut(kept.inside, kept.raw_begin, begin, grid.shape)
                inside = np.zeros(grid.shape, bool)
                inside[tuple(slice(a - b, e - b) for a, e, b in zip(low, high, begin, strict=True))] = True
                return raw, inside
        return self.decode_raw(grid)

    def _indices(self, grid: VoxelGrid) -> tuple[list[int], list[int]]:
        """Lattice indices of a grid's first voxel and (exclusive) its last."""
        begin = [int(b) for b in np.round(self.grid.to_index(grid.translation))]
        return begin, [b + n for b, n in zip(begin, grid.shape, strict=True)]

    def decode_raw(self, grid: VoxelGrid) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """Return `read_raw` from Zarr, never from the cache."""
        values, inside = self.crop.raw_source.read_raw(grid)
        quantized = self.normalized.quantized(values)
        quantized[~inside] = 0
        return quantized, inside

    def read_image(self, grid: VoxelGrid) -> NDArray[np.float32]:
        """Return the network's input on a grid of this lattice: float32 (d, h, w), mean of tissue 0, mirrored beyond
        the volume, 0 where chunks are missing (see `Normalization`)."""
        return self._input(self.read_raw, grid)

    def label_codes(self, grid: VoxelGrid) -> LabelCodes:
        """Return three-state labels on a grid of this lattice as codes; unknown beyond the crop."""
        begin, end = self._indices(grid)
        cached = self._cached
        if cached is not None:
            kept = cached.arrays()
            return LabelCodes(grid, _cut(kept.codes, kept.codes_begin, begin, grid.shape), kept.states)
        first, labels = self._decode_codes(begin, end)
        codes = labels.codes if labels.codes.shape == grid.shape else _cut(labels.codes, first, begin, grid.shape)
        return LabelCodes(grid, codes, labels.states)

    def known_share(self, places: NDArray[np.float64]) -> float:
        """Return the share of places (n, 3), lattice indices, where any label is known; without a cache, the share that
        lies in the crop."""
        voxels = np.floor(places + 0.5).astype(np.int64)
        inside = ((voxels >= 0) & (voxels < self.grid.shape)).all(axis=1)
        if self._cached is None:
            return float(inside.mean())
        kept = self._cached.arrays()
        z, y, x = (voxels[inside] - kept.codes_begin).T
        known: NDArray[np.bool_] = np.any(kept.states.known, axis=1)
        return float(known[kept.codes[z, y, x]].sum() / len(places))

    def _decode_codes(self, lo: Sequence[int], hi: Sequence[int]) -> tuple[Index, LabelCodes]:
        """Label codes from Zarr of the part of lattice indices ``lo`` to ``hi`` in the crop, and where it begins."""
        begin = index(min(max(0, int(b)), n) for b, n in zip(lo, self.grid.shape, strict=True))
        shape = [max(0, min(int(h), n) - b) for b, h, n in zip(begin, hi, self.grid.shape, strict=True)]
        grid = self.grid.crop(begin, shape)
        if not self.classes or grid.size == 0:
            empty = np.zeros(grid.shape, np.uint8)
            return begin, LabelCodes(grid, empty, StateTable(self.classes, self.instances, self.soft).states)
        return begin, LabelCodes.of(self.decode_labels(grid))

    def read_input(self, grid: VoxelGrid) -> NDArray[np.float32]:
        """Return `read_image` on a grid of any voxel size, from Zarr."""
        return self._input(self.decode_raw, grid)

    def _input(self, read: Callable[[VoxelGrid], RawBlock], grid: VoxelGrid) -> NDArray[np.float32]:
        values, inside = read_mirrored(read, self._raw_grid(grid.voxel_size), grid)
        return self.normalized.centered(values.astype(np.float32) / np.float32(255.0), inside)

    def points(self, class_name: str) -> NDArray[np.float64] | None:
        """Return positions (n, 3), nm, of voxels where the class is present (see `CachedCrop.points_of`); None without
        a cache."""
        return None if self._cached is None else self._cached.points_of(class_name)

    @property
    def counts(self) -> dict[str, dict[str, int]] | None:
        """By class, the ``present``, ``absent`` and ``unknown`` voxels of ``grid``; None without a cache."""
        return None if self._cached is None else self._cached.counts

    def decode_labels(self, grid: VoxelGrid) -> LabelVolume:
        """Return three-state labels on a grid of this lattice from Zarr, never from the cache.

        A crop without labels is a part of raw (`connectomics.data.raw_parts`): its only class is present everywhere but
        in ``excluded`` boxes, where it is unknown.
        """
        if not self.crop.labels:
            everywhere = np.ones((1, *grid.shape), np.uint64)
            for box in self.crop.excluded:
                everywhere[(0, *grid.slices(box))] = 0
            return LabelVolume(grid, self.classes, everywhere, everywhere)
        return read_labels(
            self.crop, self.classes, grid, self.instances, alternate_ties=self.alternate_ties, soft=self.soft
        )

    def read_label_codes(self, grid: VoxelGrid) -> LabelCodes:
        """Return `label_codes`, unknown also where there is no raw."""
        return self.label_codes(grid).restricted(self.read_raw(grid)[1])

    def read_labels(self, grid: VoxelGrid) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Return ``label`` float32 and ``known`` bool, (C, d, h, w); unknown also where there is no raw."""
        return self.read_label_codes(grid).dense()

    def read_ids(self, grid: VoxelGrid) -> NDArray[np.int32]:
        """Return the object IDs of ``instances`` on a grid of this lattice, int32 (I, d, h, w): 0 where the class is
        known to be absent, -1 where the class or the object is unknown or there is no raw.

        IDs are only valid within one class and one read.
        """
        return self.read_label_codes(grid).ids()

    def read_instances(
        self, class_name: str, grid: VoxelGrid
    ) -> tuple[NDArray[np.unsignedinteger], NDArray[np.bool_]] | None:
        """Return annotated IDs and ``known`` bool, (d, h, w), from Zarr; None if the crop has no IDs of the class.

        Unknown also where there is no raw.
        """
        label = self.crop.labels.get(class_name)
        if label is None or label.annotation.kind != "instance":
            return None
        ids, known = read_instances(self.crop, class_name, grid)
        return ids, known & self.read_raw(grid)[1]

    def check(self) -> None:
        """Raise `InputError` if the crop is empty, raw does not reach it, or (unless ``allow_missing_raw``) raw chunks
        under it are missing."""
        self.crop.check_voxels()
        _ = self.normalized  # raises for raw without a usable range
        raw_box = self.crop.raw_source.levels[0].grid.box
        if raw_box.intersect(self.crop.box).is_empty:
            raise InputError(
                f"{self.crop.key} lies at {self.crop.box} but its raw {self.crop.raw} covers {raw_box}: "
                "there is no raw to train on; fetch the raw of that region, or leave the crop out"
            )
        if self.allow_missing_raw:
            return
        source = self.crop.raw_source
        level = source.levels[source.level_for(self.voxel_size)].grid
        _, part = level.part(self.crop.box)  # on raw's own lattice: without the neighbors that interpolation looks at
        missing, number, first = source.missing_chunks(part)
        if missing:
            raise InputError(
                f"{self.crop.key}: {missing} of the {number} raw chunks under it are not stored, the first is {first}; "
                "fetch them from where the data came from, leave the crop out, or set data.allow_missing_raw=true to "
                "train with them masked"
            )


def _covers(begin: Sequence[int], shape: Sequence[int], low: Sequence[int], high: Sequence[int]) -> bool:
    """Whether a block of ``shape`` from index ``begin`` holds indices ``low`` to ``high`` (exclusive)."""
    if any(h <= b for b, h in zip(low, high, strict=True)):
        return True
    return all(b <= lo and h <= b + n for b, n, lo, h in zip(begin, shape, low, high, strict=True))


def _cut(block: NDArray[Any], block_begin: Sequence[int], begin: Sequence[int], shape: Sequence[int]) -> NDArray[Any]:
    """Copy ``shape`` voxels from lattice index ``begin`` of a block that starts at ``block_begin``; 0 beyond it."""
    offset = [int(b) - int(o) for b, o in zip(begin, block_begin, strict=True)]
    low = [max(0, o) for o in offset]
    high = [min(o + s, n) for o, s, n in zip(offset, shape, block.shape, strict=True)]
    source = tuple(slice(b, max(b, h)) for b, h in zip(low, high, strict=True))
    part = block[source]
    if part.shape == tuple(shape):
        return np.array(part)
    out = np.zeros(tuple(shape), block.dtype)
    if part.size:
        out[tuple(slice(b - o, h - o) for b, h, o in zip(low, high, offset, strict=True))] = part
    return out
