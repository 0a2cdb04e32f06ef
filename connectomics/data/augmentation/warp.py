"""Sample one patch from the arrays of a crop in one pass: image and label codes through a `CoordinateMap`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from connectomics.data.arrays import CropArrays
from connectomics.data.augmentation.coordinate_map import CoordinateMap, Floats
from connectomics.geometry import Index, triple

Patch = tuple[NDArray[np.float32], NDArray[np.unsignedinteger]]

# voxels: positions this close to whole voxels are whole voxels (rounding of float64 sums)
_WHOLE = 1e-6
# voxels: tile of the axis along which the source is contiguous and of the image's x, so that both stay in the cache
_TILE = 64


def sample(arrays: CropArrays, center: ArrayLike, map: CoordinateMap, shape: Index) -> Patch:
    """Return image float32 (D, H, W) in [0, 1] and codes (D, H, W) in the dtype of ``arrays.codes``.

    Raw is interpolated trilinearly over those of the eight neighbors that hold raw; the code is that of the nearest
    voxel (a half is rounded up). If the nearest voxel holds no raw, the image is ``arrays.fill`` and the code 0. A map
    that only permutes, flips and shifts by whole voxels gives exact copies.

    Args:
        arrays: raw and label codes of the crop.
        center: lattice index (z y x, may be fractional) of the patch center.
        map: from offsets in the patch to offsets from ``center``, voxels.
        shape: of the patch, voxels.
    """
    half = (np.array(shape) - 1) / 2
    middle = np.array(triple(center, "center")) - arrays.raw_begin  # raw index of the patch center
    image = np.empty(shape, np.float32)
    codes = np.empty(shape, arrays.codes.dtype)
    if map.field is None:
        start = middle + map.outer_shift - map.outer @ half
        if map.right_angles and (np.abs(start - np.rint(start)) < _WHOLE).all():
            first, turned = np.rint(start).astype(np.int64).tolist(), map.outer.astype(np.int64).tolist()
            _copy(arrays, first, turned, image, codes)
            return image, codes
    _interpolate(arrays, middle, map, half, image, codes)
    return image, codes


def _flat(values: NDArray[Any]) -> NDArray[Any]:
    """Return a plain flat array over the same memory (a copy if it is not contiguous)."""
    return np.ascontiguousarray(np.asarray(values)).reshape(-1)


def _copy(
    arrays: CropArrays,
    start: list[int],
    rise: list[list[int]],
    image: NDArray[np.float32],
    codes: NDArray[np.unsignedinteger],
) -> None:
    """Copy whole voxels: image voxel i is raw voxel ``start + rise @ i``."""
    from connectomics.data.augmentation import warp_kernels as kernels

    tiles = _tiles(rise, image.shape)
    low, high = _part(start, rise, arrays.raw.shape, image.shape)
    if low != [0, 0, 0] or high != list(image.shape):
        image.fill(arrays.fill)
    base, strides = _strides(start, rise, arrays.raw.shape)
    ends = np.array(low), np.array(high)
    divisor: Any = np.float32(255.0)
    kernels.copy_strided(_flat(arrays.raw), base, strides, *ends, tiles, divisor, image)
    begin = [s + a - b for s, a, b in zip(start, arrays.raw_begin, arrays.codes_begin, strict=True)]
    code_low, code_high = _part(begin, rise, arrays.codes.shape, image.shape)
    code_low = [max(a, b) for a, b in zip(code_low, low, strict=True)]
    code_high = [max(a, min(b, c)) for a, b, c in zip(code_low, code_high, high, strict=True)]
    if code_low != [0, 0, 0] or code_high != list(image.shape):
        codes.fill(0)
    if all(rise[axis][axis] > 0 for axis in range(3)):  # numpy is fastest if no axis is flipped or permuted
        into = tuple(slice(a, b) for a, b in zip(code_low, code_high, strict=True))
        block = tuple(slice(b + low, b + high) for b, low, high in zip(begin, code_low, code_high, strict=True))
        codes[into] = arrays.codes[block] if codes[into].size else 0
    else:
        code_ends = np.array(code_low), np.array(code_high)
        base_and_strides = _strides(begin, rise, arrays.codes.shape)
        kernels.copy_strided(_flat(arrays.codes), *base_and_strides, *code_ends, tiles, None, codes)
    if arrays.inside is not None:
        fill: Any = np.float32(arrays.fill)
        kernels.clear_outside(_flat(arrays.inside), base, strides, *ends, fill, image, codes)


def _strides(start: list[int], rise: list[list[int]], block: Sequence[int]) -> tuple[int, NDArray[np.int64]]:
    """Return the flat index of patch voxel 0 in a block, and what each patch axis adds to it."""
    plane, width = block[1] * block[2], block[2]
    strides = [rise[0][k] * plane + rise[1][k] * width + rise[2][k] for k in range(3)]
    return start[0] * plane + start[1] * width + start[2], np.array(strides, np.int64)


def _along(row: list[int]) -> int:
    """Return the patch axis that a source axis follows."""
    return next(k for k in range(3) if row[k])


def _part(
    start: list[int], rise: list[list[int]], block: Sequence[int], shape: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Return the box [low, high) of patch voxels whose source lies in a block."""
    low, high = [0, 0, 0], list(shape)
    for axis, n in enumerate(block):
        along, first = _along(rise[axis]), start[axis]
        # 0 <= first + i < n, or 0 <= first - i < n
        begin, end = (-first, n - first) if rise[axis][along] > 0 else (first - n + 1, first + 1)
        low[along], high[along] = max(low[along], begin), min(high[along], end)
    return low, [max(a, b) for a, b in zip(low, high, strict=True)]


def _tiles(rise: list[list[int]], shape: Sequence[int]) -> NDArray[np.int64]:
    """Return tiles in which patch and source are both read along their contiguous axis."""
    along = _along(rise[2])
    if along == 2:
        return np.array(shape)
    tiles = np.ones(3, np.int64)
    tiles[[along, 2]] = _TILE
    return tiles


def _interpolate(
    arrays: CropArrays,
    middle: Floats,
    map: CoordinateMap,
    half: Floats,
    image: NDArray[np.float32],
    codes: NDArray[np.unsignedinteger],
) -> None:
    from connectomics.data.augmentation import warp_kernels as kernels

    rise = map.outer @ map.inner
    start = middle + map.outer_shift + map.outer @ map.inner_shift - rise @ half
    control = np.empty((3, 0, 0, 0), np.float32)
    limit, field_start, field_rise = np.zeros(3), np.zeros(3), np.zeros((3, 3))
    if map.field is not None:
        # apply the linear outer matrix to the control points instead of to every voxel
        vectors = np.einsum("ij,jzyx->izyx", map.outer.astype(np.float32), map.field.vectors)
        limit = np.array(vectors.shape[1:]) - 1.0
        spacing = np.array(map.field.spacing)
        field_rise = map.inner / spacing[:, None]
        field_start = (map.inner_shift - map.inner @ half) / spacing + limit / 2
        single = [(0, int(n == 1)) for n in vectors.shape[1:]]  # the kernel reads pairs of control points
        control = np.ascontiguousarray(np.pad(vectors, [(0, 0), *single], mode="edge"))
    inside = np.empty(0, bool) if arrays.inside is None else _flat(arrays.inside)
    fill: Any = np.float32(arrays.fill)
    kernels.interpolate(
        _flat(arrays.raw), np.array(arrays.raw.shape), inside, _flat(arrays.codes), np.array(arrays.codes.shape),
        np.subtract(arrays.raw_begin, arrays.codes_begin).astype(np.int64), start, rise,
        control, limit, field_start, field_rise, fill, image, codes,
    )  # fmt: skip
