"""Spatial transforms of the tissue, in nm, which MONAI does not have: the same on every axis whatever the voxels are.

If the voxels of one axis are much longer than the others (`SERIAL`), as in serial sections, tissue is rotated and
deformed within the sections only: between them there is nothing to interpolate from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Annotated

import numpy as np
from numpy.random import Generator
from pydantic import BeforeValidator

from connectomics.config.values import one_of
from connectomics.data.augmentation.argument_rules import Probability, Range, number_range, several
from connectomics.data.augmentation.coordinate_map import CoordinateMap, Displacement, Floats
from connectomics.data.augmentation.elastic_field import smooth_field
from connectomics.data.augmentation.spatial_transforms import PatchFrame, SpatialTransform

#: longest voxel side over the shortest, above which data is of serial sections
SERIAL = 1.5
_FARTHEST = 3.0  # standard deviations of a deformation

Positive = Annotated[Range, number_range(1e-3)]


def section_axis(voxel_size: Sequence[float]) -> int | None:
    """Return the axis across serial sections, the one with the longest voxels; None for nearly cubic voxels."""
    longest = int(np.argmax(voxel_size))
    return longest if voxel_size[longest] > SERIAL * min(voxel_size) else None


@dataclass(frozen=True, kw_only=True)
class TissueTransform(SpatialTransform):
    """A transform of image and labels together."""

    keys: Annotated[tuple[Annotated[str, one_of("image", "label", "known")], ...], BeforeValidator(several)] = (
        "image",
        "label",
    )


@dataclass(frozen=True, kw_only=True)
class Symmetry(TissueTransform):
    """``symmetry``: one of the flips and right angles that keep the voxel grid, all equally likely: 48 for cubic
    voxels, 16 if the sections are thicker. Voxels are copied, not interpolated."""

    prob: Probability = 1.0

    def _draw(self, rng: Generator, name: str, half: Floats, frame: PatchFrame) -> CoordinateMap:
        order = [list(p) for p in permutations(range(3)) if self._keeps(p, frame)]
        chosen = order[int(rng.integers(len(order)))]
        signs = rng.integers(0, 2, 3) * 2 - 1
        matrix = np.zeros((3, 3))
        matrix[range(3), chosen] = signs
        words = ["-" * (sign < 0) + "zyx"[axis] for axis, sign in zip(chosen, signs.tolist(), strict=True)]
        return CoordinateMap.affine(matrix, parameters=((name, {"axes": "".join(words)}),))

    def _reach(self, half: Floats, frame: PatchFrame) -> Floats:
        orders = [p for p in permutations(range(3)) if self._keeps(p, frame)]
        return np.max([half[list(order)] for order in orders], axis=0)

    @staticmethod
    def _keeps(order: Sequence[int], frame: PatchFrame) -> bool:
        return all(frame.voxel_size[a] == side for a, side in zip(order, frame.voxel_size, strict=True))


@dataclass(frozen=True, kw_only=True)
class Rotation(TissueTransform):
    """``rotation``: uniform over all rotations (Haar measure: a normalized quaternion of four normal numbers), or in
    serial sections over the angles within them."""

    def _draw(self, rng: Generator, name: str, half: Floats, frame: PatchFrame) -> CoordinateMap:
        quaternion = rng.standard_normal(4)
        axis = section_axis(frame.voxel_size)
        if axis is not None:
            angle = float(rng.uniform(0, 2 * math.pi))
            quaternion = np.zeros(4)
            quaternion[0], quaternion[1 + axis] = math.cos(angle / 2), math.sin(angle / 2)
        w, *vector = quaternion / np.linalg.norm(quaternion)
        v = np.array(vector)
        cross = np.array([[0, -v[2], v[1]], [v[2], 0, -v[0]], [-v[1], v[0], 0]])
        turned = np.eye(3) + 2 * w * cross + 2 * cross @ cross
        size = np.array(frame.voxel_size)
        degrees = math.degrees(2 * math.acos(min(1.0, abs(w))))
        drawn = {"degrees": degrees, "axis": [float(n) for n in v / max(float(np.linalg.norm(v)), 1e-9)]}
        return CoordinateMap.affine(turned * (size / size[:, None]), parameters=((name, drawn),))

    def _reach(self, half: Floats, frame: PatchFrame) -> Floats:
        size = np.array(frame.voxel_size)
        turned = np.ones(3, bool)
        axis = section_axis(frame.voxel_size)
        if axis is not None:
            turned[axis] = False
        farthest = float(np.linalg.norm((half * size)[turned]))
        return np.where(turned, farthest / size, half)


@dataclass(frozen=True, kw_only=True)
class Scale(TissueTransform):
    """``scale``: tissue ``factor`` times as large, the same along all axes; in serial sections within them."""

    factor: Positive = (0.75, 1.33)

    def _draw(self, rng: Generator, name: str, half: Floats, frame: PatchFrame) -> CoordinateMap:
        factor = math.exp(rng.uniform(math.log(self.factor[0]), math.log(self.factor[1])))
        return CoordinateMap.affine(
            np.diag(self._per_axis(1 / factor, frame)), parameters=((name, {"factor": factor}),)
        )

    def _reach(self, half: Floats, frame: PatchFrame) -> Floats:
        return half * self._per_axis(1 / self.factor[0], frame)

    def _per_axis(self, step: float, frame: PatchFrame) -> Floats:
        axis = section_axis(frame.voxel_size)
        return np.array([1.0 if a == axis else step for a in range(3)])


@dataclass(frozen=True, kw_only=True)
class Elastic(TissueTransform):
    """``elastic``: a smooth random displacement; in serial sections within them, the same in neighboring ones as far as
    ``length`` reaches.

    displacement: nm, standard deviation along each axis. length: nm over which the correlation of displacements falls
    to 1/e.
    """

    has_field = True

    displacement: Annotated[Range, number_range(0.0)] = (0.0, 24.0)
    length: Positive = (200.0, 200.0)

    def _draw(self, rng: Generator, name: str, half: Floats, frame: PatchFrame) -> CoordinateMap:
        deviation, length = float(rng.uniform(*self.displacement)), float(rng.uniform(*self.length))
        size = np.array(frame.voxel_size)
        vectors, spacing = smooth_field(rng, length / 2 / size, half)
        deviations = self._deviations(deviation, frame).astype(np.float32)[:, None, None, None]
        field = Displacement(np.clip(vectors, -_FARTHEST, _FARTHEST) * deviations, spacing)
        drawn = {"displacement_nm": deviation, "length_nm": length}
        return CoordinateMap(field=field, parameters=((name, drawn),))

    def _reach(self, half: Floats, frame: PatchFrame) -> Floats:
        return half + _FARTHEST * self._deviations(self.displacement[1], frame)

    @staticmethod
    def _deviations(deviation: float, frame: PatchFrame) -> Floats:
        """Return the standard deviation along each axis, voxels."""
        axis = section_axis(frame.voxel_size)
        return np.array([0.0 if a == axis else deviation / side for a, side in enumerate(frame.voxel_size)])


TISSUE_TRANSFORMS: dict[str, type[SpatialTransform]] = {
    "symmetry": Symmetry, "rotation": Rotation, "scale": Scale, "elastic": Elastic,
}  # fmt: skip
