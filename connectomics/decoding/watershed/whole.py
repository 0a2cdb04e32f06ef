"""The watershed of an array that is in memory: the forest of one part that is all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.decoding.watershed.distance import OUTSIDE, DepthRule, heights
from connectomics.decoding.watershed.forest import NO_FLOOR, Part, fragments
from connectomics.geometry import Index


def split(
    mask: NDArray[np.bool_],
    connectivity: int,
    voxel_size: Sequence[float],
    min_distance: float,
    max_depth: float = math.inf,
) -> NDArray[np.unsignedinteger[Any]]:
    """Cut the objects of a mask where they are narrow: a watershed of the distance to the background.

    Args:
        mask: (D, H, W); what lies beyond the array is neither object nor background.
        connectivity: 6, 18 or 26.
        voxel_size: nm, z y x.
        min_distance: nm; a seed is a voxel that is deepest of what holds together with it within so many nm along each
            axis (of voxels equally deep the first in z-y-x order).
        max_depth: nm; what is deeper counts as so deep, and pieces that meet that deep are one.

    Returns:
        (D, H, W) pieces 1..n by their first voxel in z-y-x order, about 9 bytes a voxel while it runs.
    """
    rule = DepthRule.of(voxel_size, max_depth, mask.shape)
    height = heights(mask, rule, (0, 0, 0), mask.shape)
    return flood(height, connectivity, voxel_size, min_distance, -rule.cap)


def flood(
    height: NDArray[np.int32], connectivity: int, voxel_size: Sequence[float], min_distance: float, floor: int
) -> NDArray[np.unsignedinteger[Any]]:
    """`split` from heights on: (D + 2, H + 2, W + 2) int32 with a rim of `OUTSIDE`; pieces that meet at a height of at
    most ``floor`` are one."""
    shape = [n - 2 for n in height.shape]
    radius = seed_radius(min_distance, voxel_size)
    return fragments(height, _all(shape), connectivity, radius=radius, floor=floor).labels


def grow(
    mask: NDArray[np.bool_], height: NDArray[Any], cores: NDArray[Any], connectivity: int
) -> NDArray[np.unsignedinteger[Any]]:
    """Grow cores over a mask; they meet where the height is largest.

    Args:
        mask: (D, H, W). height: (D, H, W) uint8 or float16, not negative.
        cores: (D, H, W) ids, 0 none; those outside the mask count for nothing.

    Returns:
        (D, H, W) ids 1..n by the first voxel in z-y-x order; 0 where the mask holds together with no core.
    """
    part = _all(mask.shape)
    found = fragments(walls(mask, height), part, connectivity, cores=cores, floor=NO_FLOOR)
    number = np.zeros(found.count + 1, np.uint32)
    number[1:][found.seeded] = np.arange(1, int(found.seeded.sum()) + 1)
    return number[found.labels]


def walls(mask: NDArray[np.bool_], height: NDArray[Any]) -> NDArray[np.int32]:
    """(D + 2, H + 2, W + 2) heights where the mask is, `OUTSIDE` elsewhere, for `fragments`."""
    if height.dtype == np.float16:
        height = height.view(np.int16)  # numbers that are not negative rank as their bits do
    out = np.full([n + 2 for n in mask.shape], OUTSIDE, np.int32)
    out[1:-1, 1:-1, 1:-1][mask] = height[mask]
    return out


def seed_radius(min_distance: float, voxel_size: Sequence[float]) -> Index:
    """How many voxels a seed reaches along each axis, at least 1."""
    z, y, x = (max(1, math.floor(min_distance / s + 1e-9)) for s in voxel_size)
    return z, y, x


def _all(shape: Sequence[int]) -> Part:
    z, y, x = (int(n) for n in shape)
    return Part((0, 0, 0), (z, y, x), (z, y, x), (0, 0, 0))
