"""`Box` and `VoxelGrid`: the two value types for places in the world.

Conventions, without exception:

- axes are z, y, x; lengths and positions are nanometers in float64, never rounded;
- a grid's ``translation`` is the **center** of its first voxel (as in OME-NGFF and the challenge's crop table), so
  voxel i covers ``[translation + (i - 1/2) * voxel_size, translation + (i + 1/2) * voxel_size)``;
- a box's ``begin`` and ``end`` are faces, so a grid's box starts half a voxel before its translation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import product
from typing import Any, SupportsInt

import numpy as np
from numpy.typing import ArrayLike, NDArray

from connectomics.errors import InputError

Triple = tuple[float, float, float]
Index = tuple[int, int, int]

# voxels: faces that are nominally equal differ by the rounding of decimal voxel sizes (2.62, 1.74), which is far less
_TOLERANCE = 1e-3


def triple(values: ArrayLike, what: str = "value") -> Triple:
    """Return three finite floats, z y x; `InputError` naming ``what`` if the values are something else."""
    if type(values) is tuple and len(values) == 3:  # fast path: reading one patch creates a dozen grids and boxes
        z, y, x = values
        if type(z) is type(y) is type(x) is float and math.isfinite(z) and math.isfinite(y) and math.isfinite(x):
            return z, y, x
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{what} must be three numbers (z, y, x), got {values!r}") from error
    if array.shape != (3,) or not np.all(np.isfinite(array)):
        raise InputError(f"{what} must be three finite numbers (z, y, x), got {values!r}")
    return (float(array[0]), float(array[1]), float(array[2]))


def index(values: Iterable[SupportsInt]) -> Index:
    """Return three whole numbers, z y x."""
    z, y, x = (int(v) for v in values)
    return z, y, x


def other_axes(axis: int) -> tuple[int, int]:
    """Return the two axes of a slice across ``axis`` (0 to 2), in order."""
    return (1, 2) if axis == 0 else (0, 3 - axis)


def slices_of(begin: Iterable[SupportsInt], shape: Iterable[SupportsInt]) -> tuple[slice, ...]:
    """Return the slices of a block of ``shape`` voxels from voxel ``begin``, of any number of axes."""
    return tuple(slice(int(b), int(b) + int(n)) for b, n in zip(begin, shape, strict=True))


def overlapping(shape: Sequence[int], shift: Sequence[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Return the slices of the voxels p of a block whose p + ``shift`` is in the block too, and of those p + shift."""
    here = (slice(max(0, -s), max(0, n - max(0, s))) for n, s in zip(shape, shift, strict=True))
    there = (slice(max(0, s), max(0, n - max(0, -s))) for n, s in zip(shape, shift, strict=True))
    return tuple(here), tuple(there)


def shape_between(begin: Iterable[int], end: Iterable[int]) -> list[int]:
    """Return the voxels along each axis from voxel ``begin`` to voxel ``end``, which is not included."""
    return [e - b for b, e in zip(begin, end, strict=True)]


@dataclass(frozen=True)
class Box:
    """An axis-aligned box in the world, nm, z y x, from the face ``begin`` to the face ``end``.

    A box whose end does not exceed its begin on some axis is empty, not an error.
    """

    begin: Triple
    end: Triple

    def __post_init__(self) -> None:
        object.__setattr__(self, "begin", triple(self.begin, "Box.begin"))
        object.__setattr__(self, "end", triple(self.end, "Box.end"))

    @property
    def extent(self) -> Triple:
        """Edge lengths in nm, never negative."""
        return triple([max(0.0, e - b) for b, e in zip(self.begin, self.end, strict=True)])

    @property
    def center(self) -> Triple:
        """The center, nm."""
        return triple([(b + e) / 2 for b, e in zip(self.begin, self.end, strict=True)])

    @property
    def is_empty(self) -> bool:
        """Whether the box holds no volume."""
        return any(e <= b for b, e in zip(self.begin, self.end, strict=True))

    def intersect(self, other: Box) -> Box:
        """Return the intersection of both boxes (may be empty)."""
        return Box(
            triple([*map(max, self.begin, other.begin)]),
            triple([*map(min, self.end, other.end)]),
        )

    def hull(self, other: Box) -> Box:
        """Return the smallest box that contains both."""
        return Box(
            triple([*map(min, self.begin, other.begin)]),
            triple([*map(max, self.end, other.end)]),
        )

    def between(self, axis: int, low: float, high: float) -> Box:
        """Return the box with these ends (nm) on an axis."""
        begin, end = list(self.begin), list(self.end)
        begin[axis], end[axis] = low, high
        return Box(triple(begin), triple(end))

    def grow(self, margin: ArrayLike) -> Box:
        """Return the box with every face moved outwards by ``margin`` nm (one number or z y x; negative shrinks)."""
        return Box(triple(np.subtract(self.begin, margin)), triple(np.add(self.end, margin)))

    def contains(self, other: Box, tolerance: float = 0.0) -> bool:
        """Return whether ``other`` lies inside, within ``tolerance`` nm."""
        return all(b <= o + tolerance for b, o in zip(self.begin, other.begin, strict=True)) and all(
            e >= o - tolerance for e, o in zip(self.end, other.end, strict=True)
        )

    def __str__(self) -> str:
        return f"[{_numbers(self.begin)}] to [{_numbers(self.end)}] nm"


@dataclass(frozen=True)
class VoxelGrid:
    """A regular grid of voxels in the world.

    Attributes:
        voxel_size: edge lengths of a voxel, nm, z y x, positive.
        translation: **center** of voxel (0, 0, 0), nm, z y x.
        shape: number of voxels, z y x; zero is allowed (an empty grid).
    """

    voxel_size: Triple
    translation: Triple
    shape: Index

    def __post_init__(self) -> None:
        size = triple(self.voxel_size, "VoxelGrid.voxel_size")
        if min(size) <= 0:
            raise InputError(f"VoxelGrid.voxel_size must be positive, got {size}")
        shape = tuple(map(int, self.shape))
        if len(shape) != 3 or min(shape) < 0 or any(int(n) != float(n) for n in self.shape):
            raise InputError(f"VoxelGrid.shape must be three whole numbers >= 0, got {self.shape!r}")
        object.__setattr__(self, "voxel_size", size)
        object.__setattr__(self, "translation", triple(self.translation, "VoxelGrid.translation"))
        object.__setattr__(self, "shape", shape)

    @classmethod
    def covering(cls, box: Box, voxel_size: ArrayLike) -> VoxelGrid:
        """Return the smallest grid of ``voxel_size`` that starts at the box's first face and covers the whole box."""
        size = triple(voxel_size, "voxel_size")
        shape = [max(0, math.ceil((e - b) / s - _TOLERANCE)) for b, e, s in zip(box.begin, box.end, size, strict=True)]
        first = triple([b + s / 2 for b, s in zip(box.begin, size, strict=True)])
        return cls(size, first, index(shape))

    @classmethod
    def centered(cls, center: ArrayLike, voxel_size: ArrayLike, shape: Sequence[int]) -> VoxelGrid:
        """Return the grid of ``shape`` voxels whose box has its center at ``center`` (nm)."""
        size = triple(voxel_size, "voxel_size")
        mid = triple(center, "center")
        first = triple([c - (n - 1) / 2 * s for c, n, s in zip(mid, shape, size, strict=True)])
        return cls(size, first, index(shape))

    @cached_property
    def box(self) -> Box:
        """The world box that the voxels cover, from face to face."""
        begin = [t - s / 2 for t, s in zip(self.translation, self.voxel_size, strict=True)]
        end = [b + n * s for b, n, s in zip(begin, self.shape, self.voxel_size, strict=True)]
        return Box(triple(begin), triple(end))

    @property
    def size(self) -> int:
        """Number of voxels."""
        return self.shape[0] * self.shape[1] * self.shape[2]

    def to_index(self, points: ArrayLike) -> NDArray[np.float64]:
        """Return world points (..., 3) in nm as fractional voxel indices (..., 3); voxel centers give whole numbers."""
        return (np.asarray(points, dtype=np.float64) - self.translation) / self.voxel_size

    def to_world(self, index: ArrayLike) -> NDArray[np.float64]:
        """Return voxel indices (..., 3), whole or fractional, as world points (..., 3) in nm."""
        return np.asarray(index, dtype=np.float64) * self.voxel_size + self.translation

    def axes(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Return the world positions (nm) of the voxel centers along z, y and x."""
        z, y, x = (
            t + s * np.arange(n, dtype=np.float64)
            for t, s, n in zip(self.translation, self.voxel_size, self.shape, strict=True)
        )
        return z, y, x

    def crop(self, begin: Sequence[int], shape: Sequence[int]) -> VoxelGrid:
        """Return the grid of ``shape`` voxels that starts at voxel ``begin`` of this one (which may lie outside)."""
        first = triple(self.to_world(np.asarray(begin)))
        return VoxelGrid(self.voxel_size, first, index(shape))

    def grow(self, voxels: Sequence[int] | int) -> VoxelGrid:
        """Return this grid with ``voxels`` more voxels on both sides of every axis (one number or z y x)."""
        v = np.broadcast_to(np.asarray(voxels, dtype=np.int64), (3,))
        shape = [max(0, int(n + 2 * k)) for n, k in zip(self.shape, v, strict=True)]
        return self.crop([-int(k) for k in v], shape)

    def at_voxel_size(self, voxel_size: ArrayLike) -> VoxelGrid:
        """Return the grid of another voxel size that starts at the same **face** and covers the same box."""
        return VoxelGrid.covering(self.box, voxel_size)

    def index_range(self, box: Box) -> tuple[Index, Index]:
        """Return begin and end (exclusive) of the lattice voxels that touch ``box``, not clipped to the shape."""
        begin = np.floor((np.asarray(box.begin) - self.box.begin) / self.voxel_size + _TOLERANCE).astype(int)
        end = np.ceil((np.asarray(box.end) - self.box.begin) / self.voxel_size - _TOLERANCE).astype(int)
        return index(begin), index(end)

    def slices(self, box: Box) -> tuple[slice, slice, slice]:
        """Return the slices of the voxels that touch ``box``, clipped to the grid (may be empty)."""
        begin, end = self.index_range(box)
        lo = [min(max(0, b), n) for b, n in zip(begin, self.shape, strict=True)]
        hi = [max(low, min(e, n)) for low, e, n in zip(lo, end, self.shape, strict=True)]
        z, y, x = map(slice, lo, hi)
        return z, y, x

    def part(self, box: Box) -> tuple[Index, VoxelGrid]:
        """Return the begin index and the grid of the voxels that touch ``box``, clipped as `slices` are."""
        touched = self.slices(box)
        begin = index(s.start for s in touched)
        return begin, self.crop(begin, [s.stop - s.start for s in touched])

    def blocks(self, block_shape: Sequence[int]) -> Iterator[tuple[Index, VoxelGrid]]:
        """Yield (begin index, grid) of the blocks of this grid in z-y-x order; border blocks are smaller."""
        step = [max(1, int(b)) for b in block_shape]
        for z, y, x in product(*map(range, (0, 0, 0), self.shape, step)):
            shape = [min(s, n - b) for s, n, b in zip(step, self.shape, (z, y, x), strict=True)]
            yield (z, y, x), self.crop((z, y, x), shape)

    def same_lattice(self, other: VoxelGrid, tolerance: float = _TOLERANCE) -> bool:
        """Return whether the voxels of both grids coincide: the same voxel size, offset by whole voxels."""
        if not np.allclose(self.voxel_size, other.voxel_size, rtol=1e-6):
            return False
        offset = self.to_index(other.translation)
        return bool(np.all(np.abs(offset - np.round(offset)) <= tolerance))

    def to_dict(self) -> dict[str, list[float] | list[int]]:
        """Return ``voxel_size``, ``translation`` (nm, z y x) and ``shape`` for JSON and array attributes."""
        return {field.name: list(getattr(self, field.name)) for field in fields(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> VoxelGrid:
        """Return the grid of `to_dict`; `InputError` if a key is missing."""
        try:
            return cls(data["voxel_size"], data["translation"], data["shape"])
        except KeyError as error:
            raise InputError(f"a voxel grid needs voxel_size, translation and shape, got {sorted(data)}") from error

    def __str__(self) -> str:
        shape = "x".join(str(n) for n in self.shape)
        return f"{shape} voxels of {_numbers(self.voxel_size)} nm from {_numbers(self.translation)} nm"


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{v:.6g}" if abs(v) < 1e5 else f"{v:.2f}" for v in values)
