"""The plain reference of `connectomics.data.augmentation.warp.sample`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from connectomics.data.arrays import CropArrays
from connectomics.data.augmentation import CoordinateMap

Patch = tuple[NDArray[np.float32], NDArray[np.unsignedinteger]]


def sample_reference(arrays: CropArrays, center: ArrayLike, map: CoordinateMap, shape: Sequence[int]) -> Patch:
    """Return what `sample` must return, in plain float64: its specification and the reference of its tests."""
    axes = [np.arange(n) - (n - 1) / 2 for n in shape]
    place = map(np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)) + np.asarray(center, np.float64)
    in_raw = place - arrays.raw_begin
    inside = np.ones(arrays.raw.shape, bool) if arrays.inside is None else arrays.inside
    nearest = np.floor(in_raw + 0.5).astype(np.int64)
    there = _look_up(inside, nearest)
    below = np.floor(in_raw).astype(np.int64)
    share = in_raw - below
    total, weights = np.zeros(place.shape[:-1]), np.zeros(place.shape[:-1])
    for corner in product((0, 1), repeat=3):
        weight = np.prod(np.where(corner, share, 1 - share), axis=-1) * _look_up(inside, below + corner)
        total += weight * _look_up(arrays.raw, below + corner)
        weights += weight
    image = np.where(there, total / np.where(there, weights, 1) / 255, np.float32(arrays.fill))
    at = nearest + np.subtract(arrays.raw_begin, arrays.codes_begin)
    return image.astype(np.float32), np.where(there, _look_up(arrays.codes, at), 0).astype(arrays.codes.dtype)


def _look_up(values: NDArray[Any], index: NDArray[np.int64]) -> NDArray[Any]:
    """Return the values (...) at indices (..., 3), 0 beyond the array."""
    there = np.asarray(((index >= 0) & (index < values.shape)).all(-1))
    z, y, x = np.moveaxis(np.where(there[..., None], index, 0), -1, 0)
    if 0 in values.shape:
        return np.zeros(there.shape, values.dtype)
    return np.where(there, values[z, y, x], values.dtype.type(0))
