"""How deep a voxel lies in its object: squared distance to the nearest voxel outside, in whole numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from connectomics.errors import InputError
from connectomics.geometry import Index

#: height of a voxel that belongs to nothing; every other height is lower
OUTSIDE = np.iinfo(np.int32).max
_LARGEST = 1 << 30  # of a squared distance
_FINEST = 1 << 12


@dataclass(frozen=True)
class DepthRule:
    """Squared distances as whole numbers, so that they are added without rounding and do not depend on how a volume
    is cut.

    Attributes:
        weights: squares of a voxel's edges (z y x) in the rule's unit; (1, 1, 1) for cubes. Other voxels are right to
            a few thousandths of the squared edge (how finely depends on the largest distance that must fit).
        cap: depths are cut off here; also in squared units.
    """

    weights: Index
    cap: int

    @classmethod
    def of(cls, voxel_size: Sequence[float], max_depth: float, shape: Sequence[int]) -> DepthRule:
        """The rule for a volume.

        Args:
            voxel_size: nm, z y x.
            max_depth: nm; deeper voxels count as so deep; ``math.inf`` for no limit.
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
                f"a watershed on distances over {tuple(shape)} voxels of {tuple(voxel_size)} nm needs longer whole "
                f"numbers than 31 bits; give a smaller max_depth"
            )
        whole = [max(1, round(scale * w)) for w in squares]
        common = math.gcd(*whole)
        z, y, x = (w // common for w in whole)
        cap = _LARGEST
        if math.isfinite(max_depth):
            cap = max(1, round((max_depth / edge) ** 2 * scale / common))
        return cls((z, y, x), cap)

    @property
    def halo(self) -> Index:
        """Voxels around a box that its depths depend on, z y x."""
        z, y, x = (math.isqrt((self.cap - 1) // w) for w in self.weights)
        return z, y, x


def heights(mask: NDArray[np.bool_], rule: DepthRule, begin: Sequence[int], shape: Sequence[int]) -> NDArray[np.int32]:
    """Minus the squared depth of every voxel of a part of ``mask``, `OUTSIDE` where it is not in it.

    Args:
        mask: (D, H, W); beyond it there is nothing, neither mask nor background.
        begin, shape: the part, in voxels of ``mask``.

    Returns:
        (d + 2, h + 2, w + 2) int32: the part with a rim of `OUTSIDE` around it.
    """
    from connectomics.decoding.watershed.distance_kernels import along_x, along_y, along_z

    depth, height, width = (int(n) for n in shape)
    (wz, wy, wx), cap = rule.weights, rule.cap
    out = np.full((depth + 2, height + 2, width + 2), OUTSIDE, np.int32)
    inner = out[1:-1, 1:-1, 1:-1]
    if tuple(shape) == mask.shape:  # all of it: in place
        along_z(mask, 0, inner, wz, cap)
        along_y(inner, 0, inner, wy, cap)
        along_x(inner, 0, inner, wx, cap, OUTSIDE)
        return out
    values = np.empty((depth, *mask.shape[1:]), np.int32)
    along_z(mask, int(begin[0]), values, wz, cap)
    along_y(values, int(begin[1]), values[:, :height], wy, cap)
    along_x(values[:, :height], int(begin[2]), inner, wx, cap, OUTSIDE)
    return out
