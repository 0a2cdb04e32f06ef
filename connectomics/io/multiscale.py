"""`Multiscale`: an OME-NGFF volume that can be read on any voxel grid; `PlainArray`: a single Zarr array.

Raw is read from the coarsest level that is still as fine as the requested grid, and resampled (never by nearest).
Labels are read by nearest, or level by level for the exact rules of `connectomics.cellmap.labels`. Every read returns
a mask: False outside the array, and for raw also where a contributing chunk is absent, because a missing raw chunk is
missing data and not black tissue.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from connectomics.errors import CorruptDataError, InputError, MetadataError, MissingError
from connectomics.geometry import Triple, VoxelGrid, shape_between, triple
from connectomics.io import resample
from connectomics.io.array import StoredArray
from connectomics.io.metadata import grid_of_attrs, leading_axes, names_levels, parse_multiscales
from connectomics.io.store import (
    DEFAULT_OPTIONS,
    Location,
    StoreError,
    StoreOptions,
    exists,
    join,
    normalize,
    object_exists,
    read_attrs,
)

# A level counts as "as fine as" the requested grid if it is coarser by at most this share (rounded metadata).
_AS_FINE = 1e-3
# Source voxels per axis held at a time while resampling: 24 MB of uint8, whatever the target's size.
_SOURCE_SPAN = 288
# Chunks looked up at a time.
_ASKED = 2**14
# Target voxels per axis resampled at a time: 67 MB of float32.
_TARGET_SPAN = 256


@dataclass(frozen=True)
class Level:
    """One stored resolution: its ``path`` in the group ("s0"), grid (nm), dtype, voxels per stored chunk (z y x)."""

    path: str
    grid: VoxelGrid
    dtype: np.dtype[Any]
    chunks: tuple[int, ...]


class Multiscale:
    """An OME-NGFF multiscale group, Zarr v2 or v3, local or s3://. Opened lazily, picklable.

    Attributes:
        location: path or URL. levels: the stored levels, finest first. attrs: the group's attributes.
        arrays: the arrays of the levels. absent: paths and voxel sizes of levels that the metadata lists but that are
            not stored (partial downloads leave them out).
    """

    def __init__(
        self,
        location: str,
        attrs: dict[str, Any],
        found: Sequence[tuple[Level, StoredArray]],
        absent: Mapping[str, Triple],
    ) -> None:
        self.location, self.attrs, self.absent = location, attrs, dict(absent)
        self.levels = tuple(level for level, _ in found)
        self.arrays = tuple(array for _, array in found)

    @classmethod
    def open(cls, location: Location, options: StoreOptions = DEFAULT_OPTIONS) -> Multiscale:
        """Open the group at ``location``.

        Raises:
            MissingError: the group or all of its levels are missing.
            MetadataError: not a multiscale of z, y, x.
        """
        where = normalize(location)
        try:
            attrs = read_attrs(where, options)
        except StoreError:
            raise
        except MissingError as error:
            there = exists(where, options)
            hint = "it has no .zattrs; restore its metadata" if there else "the path does not exist"
            raise MissingError(f"no multiscale volume at {where}: {hint}") from error
        if not names_levels(attrs) and object_exists(join(where, ".zarray"), options):
            raise MetadataError(f"{where} is an array, expected a multiscale group; open it as PlainArray")
        found: list[tuple[Level, StoredArray]] = []
        absent = {}
        listed = parse_multiscales(attrs, where)
        leading = leading_axes(attrs, where)
        for path, size, first in listed:
            try:
                array = StoredArray(join(where, path), options, leading)
            except StoreError:
                raise
            except MissingError:
                absent[path] = triple(size)
                continue
            if len(array.shape) != 3:
                shape = (*[1] * leading, *array.shape)
                raise MetadataError(f"{array.location} has shape {shape}, expected {3 + leading} axes up to z, y, x")
            grid = VoxelGrid(triple(size), triple(first), array.shape)
            found.append((Level(path, grid, array.dtype, array.chunks), array))
        if not found:
            raise MissingError(f"{where}: none of its levels is stored ({', '.join(absent)}); fetch at least one")
        found.sort(key=lambda pair: float(np.prod(pair[0].grid.voxel_size)))
        return cls(where, attrs, found, absent)

    @property
    def grid(self) -> VoxelGrid:
        """The grid of the finest stored level."""
        return self.levels[0].grid

    def level_for(self, voxel_size: ArrayLike) -> int:
        """Return the coarsest level at least as fine as ``voxel_size`` (nm) on every axis, else the finest."""
        asked = np.array(triple(voxel_size, "voxel_size"))
        fine = [k for k, level in enumerate(self.levels) if np.all(level.grid.voxel_size <= asked * (1 + _AS_FINE))]
        return fine[-1] if fine else 0

    def finer_absent(self, voxel_size: ArrayLike) -> list[str]:
        """Return the paths of levels that are not stored, if what is read at ``voxel_size`` (nm) is coarser than that,
        and coarser than they are."""
        used, asked = np.array(self.levels[self.level_for(voxel_size)].grid.voxel_size), np.asarray(voxel_size)
        if np.all(used <= asked * (1 + _AS_FINE)):
            return []
        return [path for path, size in self.absent.items() if np.prod(size) < np.prod(used)]

    def read_raw(self, grid: VoxelGrid) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Read raw values at the voxels of any ``grid``, which may lie partly or wholly outside.

        Values are those of `connectomics.io.resample.linear` from the level of `level_for`; copies if the two coincide.

        Returns:
            values: float32 of ``grid.shape``, in the array's own range (uint8: 0..255), 0 where not inside.
            inside: bool, True where the voxel's center lies in the array's box and every chunk it needs is stored.

        Raises:
            CorruptDataError: a chunk cannot be decoded, or float raw that is NaN or infinite. StoreError.
        """
        index = self.level_for(grid.voxel_size)
        source = self.levels[index].grid
        if grid.size and source.same_lattice(grid):
            begin = np.round(source.to_index(grid.translation)).astype(int)
            values, inside = self.read_level(index, begin, grid.shape)
            self._check_finite(index, values, begin)
            return values.astype(np.float32), inside
        out, mask = np.zeros(grid.shape, np.float32), np.zeros(grid.shape, bool)
        tables = resample.raw_tables(source, grid)
        in_box = resample.inside_axes(source, grid)
        # the inside is one run per axis, so the windows contain nothing else
        ends = (t.first + t.count for t in tables)
        for window in product(*map(_pieces, (t.first for t in tables), ends, in_box)):
            part = [t.part(w.start, w.stop) for t, w in zip(tables, window, strict=True)]
            values, present = self._resampled(index, part)
            out[window] = values if present is None else np.where(present, values, 0)
            mask[window] = True if present is None else present
        return out, mask

    def read_nearest(self, grid: VoxelGrid, level: int | None = None) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Read label values, as stored, at the centers of any ``grid``; absent chunks give the fill value.

        Args:
            level: level to read; by default `level_for` the grid's voxel size.

        Returns:
            values: the array's dtype, the voxel whose cell contains the target center (begin face included).
            inside: bool, False (and value 0) where the center lies outside the array's box.
        """
        index = self.level_for(grid.voxel_size) if level is None else self._index(level)
        source = self.levels[index].grid
        out, mask = np.zeros(grid.shape, self.levels[index].dtype), np.zeros(grid.shape, bool)
        indices = resample.nearest_indices(source, grid)
        in_box = resample.inside_axes(source, grid)
        for window in product(*(_pieces(i, i + 1, axis) for i, axis in zip(indices, in_box, strict=True))):
            z, y, x = (i[w] for i, w in zip(indices, window, strict=True))
            begin = [int(i[0]) for i in (z, y, x)]
            shape = [int(i[-1]) + 1 - b for i, b in zip((z, y, x), begin, strict=True)]
            block, _ = self.read_level(index, begin, shape, absent_is_missing=False)
            out[window] = resample.take(block, z - begin[0], y - begin[1], x - begin[2])
            mask[window] = True
        return out, mask

    def read_level(
        self, level: int, begin: Sequence[int] | NDArray[Any], shape: Sequence[int], absent_is_missing: bool = True
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Read a block of one level: ``shape`` voxels from index ``begin`` (may lie outside), and its mask.

        Args:
            absent_is_missing: True for raw (absent chunk: 0, not inside); False for labels (fill value, inside).
        """
        array = self.arrays[self._index(level)]
        return array.read([int(b) for b in begin], [int(n) for n in shape], absent_is_missing=absent_is_missing)

    def stored_chunks(self, grid: VoxelGrid) -> NDArray[np.bool_]:
        """Return whether each chunk that `read_raw` of ``grid`` reads is stored: bool, one value per chunk."""
        array, begin, end = self.chunks_behind(grid)
        return array.present_chunks(begin, end)

    def missing_chunks(self, grid: VoxelGrid) -> tuple[int, int, str | None]:
        """Count the chunks that `read_raw` of ``grid`` reads and that are not stored, in bounded memory.

        Returns:
            missing, total: chunks of the level read. first: location of the first missing one, None if there is none.
        """
        array, begin, end = self.chunks_behind(grid)
        missing, first = 0, None
        depth = max(1, _ASKED // max(1, (end[1] - begin[1]) * (end[2] - begin[2])))
        for z in range(begin[0], end[0], depth):
            low = (z, begin[1], begin[2])
            absent = np.argwhere(~array.present_chunks(low, (min(z + depth, end[0]), end[1], end[2])))
            missing += len(absent)
            if first is None and len(absent):
                first = array.chunk_location([f + int(o) for f, o in zip(low, absent[0], strict=True)])
        return missing, int(np.prod(np.subtract(end, begin))), first

    def chunk_locations(self, grid: VoxelGrid) -> tuple[str, list[str]]:
        """Return the path of the level that `read_raw` of ``grid`` reads, and the locations of the chunks it needs,
        stored or not."""
        array, begin, end = self.chunks_behind(grid)
        chunks = [array.chunk_location(index) for index in product(*map(range, begin, end))]
        return self.levels[self.level_for(grid.voxel_size)].path, chunks

    def chunks_behind(self, grid: VoxelGrid) -> tuple[StoredArray, list[int], list[int]]:
        """Return the array that `read_raw` of ``grid`` reads, and begin and end (exclusive) of the chunks it needs."""
        index = self.level_for(grid.voxel_size)
        source, array = self.levels[index].grid, self.arrays[index]
        if source.same_lattice(grid):
            spans = [(s.start, s.stop) for s in source.slices(grid.box)]
        else:
            spans = []
            for table, axis in zip(resample.raw_tables(source, grid), resample.inside_axes(source, grid), strict=True):
                inside = np.flatnonzero(axis)  # one run
                spans.append(table.part(int(inside[0]), int(inside[-1]) + 1).span if len(inside) else (0, 0))
        if any(high <= low for low, high in spans):
            return array, [0, 0, 0], [0, 0, 0]
        return array, *array.chunk_range([low for low, _ in spans], [high for _, high in spans])

    def _index(self, level: int) -> int:
        if not 0 <= level < len(self.levels):
            raise InputError(f"{self.location} has levels 0 to {len(self.levels) - 1}, got level {level}")
        return level

    def _resampled(self, index: int, tables: resample.Tables) -> tuple[NDArray[np.float32], NDArray[np.bool_] | None]:
        """Target values of one window, and the mask of those whose chunks are all stored (None: all of them)."""
        begin, end = zip(*(t.span for t in tables), strict=True)
        block, inside = self.read_level(index, begin, shape_between(begin, end))
        self._check_finite(index, block, begin)
        own = [t.shifted(b) for t, b in zip(tables, begin, strict=True)]
        present = None if inside.all() else self._all_stored(index, inside, begin, own)
        return resample.apply(block, own), present

    def _all_stored(
        self, index: int, inside: NDArray[np.bool_], begin: Sequence[int], tables: resample.Tables
    ) -> NDArray[np.bool_]:
        """Whether all chunks behind each target voxel are stored; the tables refer to a block from ``begin`` on."""
        shown, of_chunks = [], []
        for axis, table in enumerate(tables):
            chunk_of = np.arange(begin[axis], begin[axis] + inside.shape[axis]) // self.levels[index].chunks[axis]
            chunk_of -= chunk_of[0]
            shown.append(np.searchsorted(chunk_of, np.arange(chunk_of[-1] + 1)))
            first = chunk_of[table.first]
            count = chunk_of[table.first + table.count - 1] - first + 1
            of_chunks.append(resample.AxisTable(first, count, table.weights))
        return resample.all_present(inside[np.ix_(*shown)], of_chunks)

    def _check_finite(self, index: int, block: NDArray[Any], begin: Sequence[int] | NDArray[Any]) -> None:
        if block.dtype.kind != "f":
            return
        finite = np.isfinite(block)
        if finite.all():
            return
        level, first = self.levels[index], np.argwhere(~finite)[0]
        value, voxel = block[tuple(first)], first + np.asarray(begin)
        world = ", ".join(f"{p:.6g}" for p in level.grid.to_world(voxel))
        raise CorruptDataError(
            f"{self.location}/{level.path} holds {'NaN' if np.isnan(value) else value} at voxel "
            f"{tuple(voxel.tolist())} (z y x, at {world} nm), {int((~finite).sum())} such voxels in the block read; "
            "expected finite raw: replace them or exclude that region"
        )

    def __repr__(self) -> str:
        return f"Multiscale({self.location!r}, {len(self.levels)} levels, finest {self.grid})"


class PlainArray:
    """A single Zarr array (ground truth, a submission), v2 or v3, local or s3://. Picklable.

    Attributes:
        location, shape, dtype, chunks: as stored. attrs: its attributes.
        grid: in nm, see `connectomics.io.metadata.grid_of_attrs`; None if the attributes do not say.
    """

    def __init__(self, array: StoredArray, attrs: dict[str, Any]) -> None:
        self._array, self.attrs = array, attrs
        self.location, self.shape, self.dtype, self.chunks = array.location, array.shape, array.dtype, array.chunks
        self.grid = grid_of_attrs(attrs, array.shape, array.location)

    @classmethod
    def open(cls, location: Location, options: StoreOptions = DEFAULT_OPTIONS) -> PlainArray:
        """Open the array at ``location``. Raises `MissingError`, or `MetadataError` (a group, broken attributes)."""
        array = StoredArray(location, options)
        return cls(array, array.attrs)

    def read(self, begin: Sequence[int] | None = None, shape: Sequence[int] | None = None) -> NDArray[Any]:
        """Read a block of ``shape`` voxels from index ``begin``, by default all; absent chunks give the fill value.

        Raises:
            InputError: the block is not inside the array.
            CorruptDataError: a chunk cannot be decoded.
        """
        first = [0] * len(self.shape) if begin is None else [int(b) for b in begin]
        size = [n - b for n, b in zip(self.shape, first, strict=True)] if shape is None else [int(n) for n in shape]
        if any(b < 0 or n < 0 or b + n > m for b, n, m in zip(first, size, self.shape, strict=True)):
            raise InputError(f"{self.location} holds {self.shape} voxels; cannot read {tuple(size)} at {tuple(first)}")
        return self._array.read(first, size, absent_is_missing=False)[0]

    def __repr__(self) -> str:
        return f"PlainArray({self.location!r}, shape={self.shape}, dtype={self.dtype})"


def _pieces(begins: NDArray[np.int64], ends: NDArray[np.int64], wanted: NDArray[np.bool_]) -> list[slice]:
    """Runs of target voxels along an axis, from the first wanted one to the last, short enough to hold at a time.

    ``begins``, ``ends``: of the source voxels behind each target voxel; for wanted voxels, both ascend.
    """
    kept = np.flatnonzero(wanted)
    if len(kept) == 0:
        return []
    pieces = []
    start, stop = int(kept[0]), int(kept[-1]) + 1
    while start < stop:
        fitting = np.searchsorted(ends[start:stop], begins[start] + _SOURCE_SPAN, side="right")
        fits = min(_TARGET_SPAN, max(1, int(fitting)))
        pieces.append(slice(start, start + fits))
        start += fits
    return pieces
