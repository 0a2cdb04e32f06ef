"""Reading probabilities: a block of what predict wrote, and where it is above a threshold."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.errors import CorruptDataError, InputError
from connectomics.geometry import VoxelGrid, shape_between
from connectomics.io import resample
from connectomics.io.location import StoreOptions
from connectomics.io.multiscale import Multiscale

#: how probabilities are stored: value/255, or as they are
DTYPES = (np.dtype(np.uint8), np.dtype(np.float16))

# Blocks are read one after the other and a chunk comes again only in the halo of another block: decoded chunks that are
# kept would fill up slowly, the more the larger the volume, and save next to nothing.
_NOT_KEPT = StoreOptions(cache_bytes=0)


def above(probabilities: NDArray[Any], threshold: float) -> NDArray[np.bool_]:
    """Where a probability is above the threshold.

    Args:
        probabilities: any shape; uint8 as value/255, bool, or floats in [0, 1]. NaN is background, and
            counted in a warning.

    Raises:
        InputError: another integer type, or floats outside [0, 1] (logits, say).
    """
    values = np.asarray(probabilities)
    if values.dtype == np.bool_:
        return values if threshold < 1.0 else np.zeros_like(values)
    if values.dtype == np.uint8:
        # The small term keeps a threshold that was itself a stored value (128/255) from falling below it.
        return values > math.floor(threshold * 255 + 1e-9)
    if values.dtype.kind != "f":
        raise InputError(f"probabilities must be uint8 (value/255) or floats in [0, 1], got {values.dtype}")
    low, high = float(np.nanmin(values, initial=0.0)), float(np.nanmax(values, initial=0.0))
    if low < -1e-6 or high > 1 + 1e-6:
        raise InputError(f"probabilities must lie in [0, 1], got {low:.4g} to {high:.4g}; apply the sigmoid first")
    missing = int(np.isnan(values).sum())
    if missing:
        warnings.warn(f"{missing} of {values.size} probabilities are NaN and count as background", stacklevel=2)
    found: NDArray[np.bool_] = values > largest_below(values.dtype, threshold)
    return found


def largest_below(dtype: np.dtype[Any], threshold: float) -> Any:
    """The largest number of a float type that is not above ``threshold``: a stored value is above the one where it is
    above the other, while numpy, told the threshold itself, would round it to the type."""
    limit = dtype.type(threshold)
    return limit if float(limit) <= threshold else np.nextafter(limit, dtype.type(-np.inf))


def as_bytes(probabilities: NDArray[Any]) -> NDArray[np.uint8]:
    """Stored probabilities as uint8, ``round(255 p)``."""
    if probabilities.dtype == np.uint8:
        return probabilities
    return np.rint(probabilities.astype(np.float32, copy=False) * np.float32(255)).astype(np.uint8)


def unit_of(dtype: np.dtype[Any]) -> float:
    """The stored value that stands for probability 1: 255 of uint8, 1 of floats."""
    return 255.0 if dtype == np.uint8 else 1.0


def open_probabilities(location: str) -> Multiscale:
    """The multiscale group at ``location``, checked to hold probabilities: uint8 (value/255) or float16, not empty.

    It is to be read in blocks: no decoded chunks are kept between them.

    Raises `InputError`, and what `Multiscale.open` raises.
    """
    source = Multiscale.open(location, _NOT_KEPT)
    level = source.levels[0]
    if level.dtype not in DTYPES or level.grid.size == 0:
        raise InputError(
            f"{location}: expected uint8 or float16 probabilities, got {level.dtype} of shape {level.grid.shape}"
        )
    return source


def read_block(
    source: Multiscale, begin: Sequence[int] | NDArray[Any], shape: Sequence[int], level: int = 0
) -> NDArray[Any]:
    """A block of probabilities, 0 beyond the array; every chunk must be stored, since predict writes all of them."""
    values, there = source.read_level(level, begin, shape)
    if not there.all():
        whole = source.levels[level].grid.shape
        inside = [max(0, min(b + n, w) - max(b, 0)) for b, n, w in zip(begin, shape, whole, strict=True)]
        if int(np.count_nonzero(there)) < math.prod(int(n) for n in inside):
            at = tuple(map(int, begin))
            raise CorruptDataError(f"{source.location} lacks chunks around voxel {at} (z y x); run predict again")
    return values


class OnGrid:
    """Probabilities at the voxels of another grid, read in blocks: what a voxel gets does not depend on the block.

    Plain copies where the voxels of both grids coincide, else interpolated as raw is (`connectomics.io.resample`) and
    rounded to the stored type; 0 beyond the array.

    Attributes:
        inside: for each axis, whether the centers of the grid's voxels lie in the array.
    """

    def __init__(self, source: Multiscale, grid: VoxelGrid) -> None:
        """``source``: checked as `open_probabilities` does. ``grid``: at whose voxels (nm)."""
        self.dtype = source.levels[0].dtype
        self._source, self._level = source, source.level_for(grid.voxel_size)
        own = source.levels[self._level].grid
        self.inside = resample.inside_axes(own, grid)
        self._first = None
        if own.same_lattice(grid):
            self._first = np.round(own.to_index(grid.translation)).astype(int)
            return
        # of the whole grid, so that positions are rounded alike in every block
        self._tables = resample.raw_tables(own, grid)

    def read(self, begin: Sequence[int], shape: Sequence[int]) -> NDArray[Any]:
        """``shape`` voxels from voxel ``begin`` of the grid, in the stored type; `CorruptDataError`: a chunk is not
        there, or cannot be read."""
        if self._first is not None:
            return read_block(self._source, self._first + begin, shape, self._level)
        out = np.zeros(tuple(shape), self.dtype)
        spans = []
        for inside, b, n in zip(self.inside, begin, shape, strict=True):
            there = np.flatnonzero(inside[b : b + n])  # one run
            if len(there) == 0:
                return out
            spans.append((int(there[0]), int(there[-1]) + 1))
        parts = [t.part(b + s, b + e) for t, b, (s, e) in zip(self._tables, begin, spans, strict=True)]
        low, high = zip(*(t.span for t in parts), strict=True)
        block = read_block(self._source, low, shape_between(low, high), self._level)
        values = resample.apply(block, [t.shifted(b) for t, b in zip(parts, low, strict=True)])
        at = tuple(slice(s, e) for s, e in spans)
        out[at] = np.rint(values) if self.dtype.kind == "u" else values
        return out
