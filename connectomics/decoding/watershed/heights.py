"""Heights of voxels for the watershed: minus the depth in the object, a learned distance, or a boundary probability.

All heights are whole numbers (int32), so that they do not depend on how a volume is cut into blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from connectomics.decoding.probabilities import unit_of
from connectomics.errors import InputError
from connectomics.geometry import Index, index

#: Height of a voxel that is not flooded; every other height is lower.
OUTSIDE = np.iinfo(np.int32).max
_LARGEST = 1 << 30  # of a squared distance
_FINEST = 1 << 12


@dataclass(frozen=True)
class DepthRule:
    """Squared distances to the background as whole numbers, which are added without rounding.

    Attributes:
        weights: squares of the edges of a voxel (z y x) in the unit of the rule; (1, 1, 1) for cubes. For others the
            error is a few thousandths of the squared edge (it depends on the largest distance that must fit).
        cap: depths are cut off here; also in squared units.
    """

    weights: Index
    cap: int

    @classmethod
    def of(cls, voxel_size: Sequence[float], max_depth: float, shape: Sequence[int]) -> DepthRule:
        """Return the rule for a volume.

        Args:
            voxel_size: nm, z y x.
            max_depth: nm; depths are cut off here; ``math.inf`` for no limit.
            shape: voxels, z y x: no distance is longer than the volume.

        Raises:
            InputError: the voxels are too flat, or the distances too long, for 31 bits.
        """
        edge = min(voxel_size)
        squares = [(s / edge) ** 2 for s in voxel_size]
        largest = sum(w * n * n for w, n in zip(squares, shape, strict=True))
        if math.isfinite(max_depth):
            largest = min(largest, (max_depth / edge) ** 2 + sum(squares))
        scale = _FINEST
        while scale > 1 and scale * largest > _LARGEST:
            scale //= 2
        if scale * largest > _LARGEST:
            raise InputError(
                f"distances over {tuple(shape)} voxels of {tuple(voxel_size)} nm do not fit into 31 bits; give a "
                "smaller max_depth"
            )
        whole = [max(1, round(scale * w)) for w in squares]
        common = math.gcd(*whole)
        cap = _LARGEST
        if math.isfinite(max_depth):
            cap = max(1, round((max_depth / edge) ** 2 * scale / common))
        return cls(index(w // common for w in whole), cap)

    @property
    def halo(self) -> Index:
        """Voxels around a box that its depths depend on, z y x."""
        return index(math.isqrt((self.cap - 1) // w) for w in self.weights)


def depth_heights(
    mask: NDArray[np.bool_], rule: DepthRule, begin: Sequence[int], shape: Sequence[int]
) -> NDArray[np.int32]:
    """Return minus the squared depth of every voxel in a part of ``mask``, `OUTSIDE` elsewhere.

    Args:
        mask: (D, H, W); what lies beyond is neither mask nor background.
        begin, shape: the part, in voxels of ``mask``.

    Returns:
        (d + 2, h + 2, w + 2) int32: the part with a rim of `OUTSIDE` around it.
    """
    from connectomics.decoding.watershed.distance_kernels import along_rows, along_z

    depth, height, width = (int(n) for n in shape)
    (wz, wy, wx), cap = rule.weights, rule.cap
    out = np.full((depth + 2, height + 2, width + 2), OUTSIDE, np.int32)
    inner = out[1:-1, 1:-1, 1:-1]
    # a whole array is computed in place
    values = inner if tuple(shape) == mask.shape else np.empty((depth, *mask.shape[1:]), np.int32)
    rows = values[:, :height]
    along_z(mask, int(begin[0]), values, wz, cap)
    along_rows(values.transpose(0, 2, 1), int(begin[1]), rows.transpose(0, 2, 1), wy, cap, 0)
    along_rows(rows, int(begin[2]), inner, wx, cap, OUTSIDE)
    return out


@dataclass(frozen=True, eq=False)
class HeadValues:
    """A head of one class in memory: (D, H, W) uint8 or float16, and its scale."""

    values: NDArray[Any]
    scale_nm: float


@dataclass(frozen=True, eq=False)
class LearnedDistance:
    """How stored values of 1/2 + tanh(d / scale) / 2, with d the signed distance to the border, become heights.

    Attributes:
        floor: no height is lower; pieces that meet at it are one.
    """

    floor: int

    @classmethod
    def of(cls, scale_nm: float, max_depth_nm: float, dtype: np.dtype[Any]) -> Self:
        """Return the rule for values of ``dtype`` (uint8: value/255; or float16).

        Values are cut off at ``max_depth_nm``, or earlier if the type does not resolve so large a distance.
        """
        deepest = np.array([(0.5 + math.tanh(max_depth_nm / scale_nm) / 2) * unit_of(dtype)])
        stored = np.rint(deepest) if dtype == np.uint8 else deepest
        return cls(-int(_rank(stored.astype(dtype))[0]))

    def heights(self, mask: NDArray[np.bool_], values: NDArray[Any]) -> NDArray[np.int32]:
        """Return minus the rank of the values (D, H, W) in ``mask``, `OUTSIDE` elsewhere and in a rim around it."""
        return _in_mask(mask, np.maximum(-_rank(values[mask]).astype(np.int32), self.floor))


def boundary_heights(mask: NDArray[np.bool_], boundary: NDArray[Any]) -> NDArray[np.int32]:
    """Return the rank of the boundary probability in ``mask`` (D, H, W), `OUTSIDE` elsewhere and in a rim around it."""
    return _in_mask(mask, _rank(boundary[mask]))


def _in_mask(mask: NDArray[np.bool_], heights: NDArray[Any]) -> NDArray[np.int32]:
    out = np.full([n + 2 for n in mask.shape], OUTSIDE, np.int32)
    out[1:-1, 1:-1, 1:-1][mask] = heights
    return out


def _rank(values: NDArray[Any]) -> NDArray[Any]:
    """Return whole numbers in the order of stored values: floats that are not negative rank as their bits do."""
    return values.view(np.int16) if values.dtype == np.float16 else values
