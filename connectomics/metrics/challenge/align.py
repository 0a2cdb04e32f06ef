"""Put a submitted array onto the ground truth's grid exactly as the official scorer does, float rounding included.

The official rule compares translations of first voxels on a floored lattice, not centers, so it can shift by a voxel at
sizes such as 1.74 nm. Nothing else in this project uses it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from connectomics.errors import InputError, MetadataError
from connectomics.geometry import Triple, VoxelGrid, slices_of, triple
from connectomics.io.artifacts import marks
from connectomics.metrics.challenge.rules import Rules

#: Attributes in which the official scorer looks for a grid, in this order; the last three entries count.
VOXEL_SIZE_NAMES = ("voxel_size", "resolution", "scale")
TRANSLATION_NAMES = ("translation", "offset")
_SEMANTIC_THRESHOLD = 0.5


class Readable(Protocol):
    """An array that is read block by block; ``where`` names it in messages."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    where: str

    def read(self, begin: Any = None, shape: Any = None) -> NDArray[Any]:
        """Return a block (all of it by default)."""
        ...


@dataclass(frozen=True)
class Source:
    """A submitted label: its array, its position (nm, z y x) as its attributes state it, None if they do not, and
    `connectomics.io.artifacts.marks`."""

    array: Readable
    voxel_size: Triple | None
    translation: Triple | None
    marks: Mapping[str, str] = field(default_factory=dict, compare=False)


def source_of(array: Readable, attrs: Mapping[str, Any]) -> Source:
    """Return a label with the position that its attributes state.

    Raises `MetadataError` if an attribute is not three finite numbers, or a voxel size is not positive.
    """
    size = _last_three(attrs, VOXEL_SIZE_NAMES, array.where)
    if size is not None and min(size) <= 0:
        raise MetadataError(f"{array.where}: voxel_size must be positive, got {list(size)}")
    return Source(array, size, _last_three(attrs, TRANSLATION_NAMES, array.where), marks(attrs.get("connectomics")))


def _last_three(attrs: Mapping[str, Any], names: tuple[str, ...], where: str) -> Triple | None:
    name = next((n for n in names if n in attrs), None)
    if name is None or attrs[name] is None:
        return None
    try:
        values = tuple(map(float, attrs[name]))[-3:]
    except (TypeError, ValueError):
        values = ()
    if len(values) != 3 or not all(map(math.isfinite, values)):
        raise MetadataError(
            f"{where}: attribute {name!r} must be three numbers (nm, z y x, finite), got {attrs[name]!r}"
        )
    return triple(values)


class Aligned:
    """A submitted label on the ground truth's grid, a `Readable`; outside the submission it is 0.

    With the same voxel size, blocks come directly from the stored array; otherwise the first `read` resamples the whole
    array. ``resample_bytes`` is the memory that this takes.

    Raises `InputError` for another rank than three and for more than 16^3 times the target's voxels.
    """

    def __init__(self, source: Source, grid: VoxelGrid, is_instance: bool, rules: Rules) -> None:
        array = source.array
        if len(array.shape) != 3:
            raise InputError(f"{array.where}: expected three dimensions (z y x), got shape {array.shape}")
        if math.prod(array.shape) > rules.max_size_ratio * grid.size:
            raise InputError(
                f"{array.where}: {array.shape} voxels are more than {rules.max_size_ratio} times the {grid.shape} of "
                f"the crop; write it at a voxel size nearer to {list(grid.voxel_size)} nm"
            )
        self._array, self._is_instance, self.where = array, is_instance, array.where
        self._scale: NDArray[np.float64] | None = None
        own, target = np.asarray(source.voxel_size or (), dtype=float), np.asarray(grid.voxel_size)
        if own.size and not np.allclose(own, target):
            self._scale = own / target
        self.shape: tuple[int, ...] = grid.shape
        self.dtype = array.dtype if self._scale is None or is_instance else np.dtype(bool)
        # The finer of both volumes: in float64 if scikit-image interpolates (input, smoothing, result), else twice as
        # stored.
        self.resample_bytes = 0
        if self._scale is not None:
            each = 2 * array.dtype.itemsize if is_instance and array.dtype.kind != "f" else 24
            self.resample_bytes = each * max(math.prod(array.shape), grid.size)
        self._whole: NDArray[Any] | None = None
        shape = self._resampled_shape()
        # Place voxel 0 of the image on the target's grid: centered if there is no voxel size, then moved by the offset.
        centered = [0, 0, 0]
        visible = list(shape)
        if source.voxel_size is None:
            pairs = zip(shape, grid.shape, strict=True)  # cropped or padded around the middle
            centered = [(n - own_n) // 2 if own_n < n else -((own_n - n) // 2) for own_n, n in pairs]
            visible = list(grid.shape)
        offset = [0, 0, 0]
        if source.translation is not None:  # own translation floored to whole voxels, difference truncated
            moved = (np.asarray(source.translation) // target) * target - np.asarray(grid.translation)
            offset = [int(v) for v in (np.abs(moved) // target) * np.sign(moved)]
        self._first = [c + o for c, o in zip(centered, offset, strict=True)]
        # A centered image is cut to the target's shape before the offset moves it.
        self._window = [
            (max(o, o + c, 0), min(o + v, o + c + s, n))
            for o, c, v, s, n in zip(offset, centered, visible, shape, grid.shape, strict=True)
        ]

    def _resampled_shape(self) -> tuple[int, ...]:
        if self._scale is None:
            return self._array.shape
        return tuple(map(int, np.maximum(np.round(self._scale * np.asarray(self._array.shape)), 1)))

    def read(self, begin: Any = None, shape: Any = None) -> NDArray[Any]:
        """Return a block of the target's grid (all of it by default), of type ``dtype``."""
        begin, size = begin or (0, 0, 0), shape or self.shape
        lo = [max(b, w[0]) for b, w in zip(begin, self._window, strict=True)]
        hi = [min(b + n, w[1]) for b, n, w in zip(begin, size, self._window, strict=True)]
        if any(h <= low for low, h in zip(lo, hi, strict=True)):
            return np.zeros(size, self.dtype.newbyteorder("="))
        first = [low - f for low, f in zip(lo, self._first, strict=True)]
        length = [h - low for low, h in zip(lo, hi, strict=True)]
        if self._scale is None:
            block = self._array.read(first, length)
        else:
            if self._whole is None:
                self._whole = self._resample(self._array.read())
            block = self._whole[slices_of(first, length)]
        if tuple(length) == tuple(size):
            return block
        out = np.zeros(size, self.dtype.newbyteorder("="))
        out[slices_of(np.subtract(lo, begin), length)] = block
        return out

    def _resample(self, image: NDArray[Any]) -> NDArray[Any]:
        from skimage.transform import rescale, resize

        assert self._scale is not None
        if not self._is_instance:
            values = image.astype(np.float32) if image.dtype == bool else image
            scaled = rescale(values, self._scale, order=1, mode="constant", preserve_range=True)
            return np.asarray(scaled > _SEMANTIC_THRESHOLD)
        if image.dtype.kind == "f":  # skimage smooths floats when shrinking even at order 0
            return np.asarray(rescale(image, self._scale, order=0, mode="constant", preserve_range=True)).astype(
                image.dtype
            )
        # Nearest neighbors are separable: one index per axis from skimage itself instead of float64 volumes.
        for axis, n in enumerate(self._resampled_shape()):
            places = np.arange(1, image.shape[axis] + 1, dtype=np.float64)
            index = resize(places, (n,), order=0, mode="constant", preserve_range=True, anti_aliasing=False)
            picked = np.take(image, np.maximum(index.astype(np.int64) - 1, 0), axis=axis)
            picked[(slice(None),) * axis + (index == 0,)] = 0
            image = picked
        return image
