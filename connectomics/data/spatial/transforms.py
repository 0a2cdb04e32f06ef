"""MONAI's random spatial transforms as draws of a `CoordinateMap`, with the distributions of MONAI 1.6.

Each has ``draw(rng, half)``: the map of one draw, or None where the transform does not take place (probability
``prob``), and ``reach(half)``: how far from the centre the source of any offset within ``half`` (3,) can be.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from connectomics.data.spatial.elastic import draw_field, largest
from connectomics.data.spatial.mapping import CoordinateMap, Floats

Range = tuple[float, float]
Ranges = tuple[Range, ...]

# axis pairs of MONAI's six shear factors and of its three rotations, with the sign that makes its matrices
_SHEARS = ((0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1))
_PLANES = ((1, 2), (2, 0), (0, 1))


class SpatialTransform(Protocol):
    """One transform of the configuration."""

    @property
    def name(self) -> str: ...

    def draw(self, rng: np.random.Generator, half: Floats) -> CoordinateMap | None:
        """The map of one draw; None where nothing is done. ``half``: voxels off the centre that will be asked for."""

    def reach(self, half: Floats) -> Floats:
        """The largest source offset (3,) of any draw, for offsets up to ``half`` (3,)."""


@dataclass(frozen=True)
class Flip:
    """`RandFlipd`: all of ``axes`` at once."""

    name: str
    prob: float
    axes: tuple[int, ...]

    def draw(self, rng: np.random.Generator, half: Floats) -> CoordinateMap | None:
        if rng.random() >= self.prob:
            return None
        signs = np.ones(3)
        signs[list(self.axes)] = -1
        return CoordinateMap.affine(np.diag(signs), parameters=((self.name, {"axes": list(self.axes)}),))

    def reach(self, half: Floats) -> Floats:
        return half


@dataclass(frozen=True)
class RightAngle:
    """`RandRotate90d` in one plane: 1 to ``max_k`` quarter turns from the first axis of ``plane`` to the second."""

    name: str
    prob: float
    max_k: int
    plane: tuple[int, int]

    def draw(self, rng: np.random.Generator, half: Floats) -> CoordinateMap | None:
        if rng.random() >= self.prob:
            return None
        turns = int(rng.integers(1, self.max_k + 1))
        first, second = self.plane
        quarter = np.eye(3)
        quarter[self.plane, self.plane] = 0
        quarter[first, second], quarter[second, first] = 1, -1  # numpy.rot90: out[i, j] = in[j, n - 1 - i]
        matrix = np.linalg.matrix_power(quarter, turns % 4)
        drawn = {"quarter_turns": turns, "plane": list(self.plane)}
        return CoordinateMap.affine(matrix, parameters=((self.name, drawn),))

    def reach(self, half: Floats) -> Floats:
        turned = half.copy()
        turned[list(self.plane)] = half[list(self.plane)].max()
        return turned


@dataclass(frozen=True)
class AffineRanges:
    """The random part that MONAI's affine and elastic transforms share; ``rotate`` in radians.

    Rotations and shears are those of the tissue, in nm: on voxels of ``voxel_size`` (z, y, x) that are no cubes, angles
    and lengths stay what they are. Translations are in voxels.

    Ranges may be fewer than there are parameters: those that follow stay at no change.
    """

    rotate: Ranges = ()
    shear: Ranges = ()
    translate: Ranges = ()
    scale: Ranges = ()
    voxel_size: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def draw(self, rng: np.random.Generator) -> tuple[Floats, Floats, dict[str, Any]]:
        """Matrix, shift, the numbers drawn. MONAI's order (`AffineGrid`): rotation @ shear @ translation @ scale."""
        angles, shears, shifts, scales = (
            [float(rng.uniform(low, high)) for low, high in ranges]
            for ranges in (self.rotate, self.shear, self.translate, self.scale)
        )
        matrix, drawn = np.eye(3), dict[str, Any]()
        for (a, b), angle in zip(_PLANES, angles, strict=False):
            turn = np.eye(3)
            turn[a, a] = turn[b, b] = math.cos(angle)
            turn[a, b], turn[b, a] = -math.sin(angle), math.sin(angle)
            matrix = matrix @ turn
        sheared = np.eye(3)
        for (a, b), factor in zip(_SHEARS, shears, strict=False):
            elementary = np.eye(3)
            elementary[a, b] = factor
            sheared = elementary @ sheared
        size = np.array(self.voxel_size)
        matrix = matrix @ sheared * (size / size[:, None])  # from nm to voxels, on both sides
        shift = matrix @ np.array(shifts + [0.0] * (3 - len(shifts)))
        factors = [1 + s for s in scales] + [1.0] * (3 - len(scales))
        if angles:
            drawn["rotate_degrees"] = [math.degrees(a) for a in angles]
        if shears:
            drawn["shear"] = shears
        if shifts:
            drawn["translate_voxels"] = shifts
        if scales:
            drawn["scale"] = factors
        return matrix * factors, shift, drawn

    def reach(self, half: Floats) -> Floats:
        """Of ``matrix @ offset + shift``."""
        found = half.copy()
        for axis, (low, high) in enumerate(self.scale):
            found[axis] *= max(abs(1 + low), abs(1 + high))
        for axis, (low, high) in enumerate(self.translate):
            found[axis] += max(abs(low), abs(high))
        size = np.array(self.voxel_size) / max(self.voxel_size)
        found *= size
        for (a, b), (low, high) in zip(_SHEARS, self.shear, strict=False):
            found[a] += max(abs(low), abs(high)) * found[b]
        norm = float(np.linalg.norm(found))  # a rotation takes nothing farther than it is
        for (a, b), (low, high) in reversed(list(zip(_PLANES, self.rotate, strict=False))):
            angle = max(abs(low), abs(high))
            found[a], found[b] = _turned(found[a], found[b], angle), _turned(found[b], found[a], angle)
        return (np.minimum(found, norm) if self.rotate else found) / size


def _turned(along: float, across: float, angle: float) -> float:
    """The largest ``along * cos(t) + across * sin(t)`` for 0 <= t <= angle."""
    best = math.atan2(across, along)
    return math.hypot(along, across) if angle >= best else along * math.cos(angle) + across * math.sin(angle)


@dataclass(frozen=True)
class Affine:
    """`RandAffined`."""

    name: str
    prob: float
    ranges: AffineRanges

    def draw(self, rng: np.random.Generator, half: Floats) -> CoordinateMap | None:
        if rng.random() >= self.prob:
            return None
        matrix, shift, drawn = self.ranges.draw(rng)
        return CoordinateMap.affine(matrix, shift, ((self.name, drawn),))

    def reach(self, half: Floats) -> Floats:
        found = self.ranges.reach(half)
        return found if self.prob >= 1 else np.maximum(found, half)


@dataclass(frozen=True)
class Zoom:
    """`RandZoomd` of a patch of ``size``: one factor for all axes, two (the first for z and y), or three."""

    name: str
    prob: float
    factors: Ranges
    size: tuple[int, int, int]
    align_corners: bool

    def draw(self, rng: np.random.Generator, half: Floats) -> CoordinateMap | None:
        if rng.random() >= self.prob:
            return None
        drawn = _by_axis([float(rng.uniform(low, high)) for low, high in self.factors])
        parts = [self.along(n, factor) for n, factor in zip(self.size, drawn, strict=True)]
        matrix, shift = np.diag([p[0] for p in parts]), [p[1] for p in parts]
        return CoordinateMap.affine(matrix, shift, ((self.name, {"zoom": drawn}),))

    def along(self, n: int, factor: float) -> Range:
        """(scale, shift) of one axis: ``source = scale * offset + shift``.

        MONAI interpolates to a whole number of voxels, m, and cuts or pads that to n again: whole voxels too, so the
        centre moves by half a voxel where n and m are not both odd or both even.
        """
        zoomed = math.floor(n * factor)
        begin = zoomed // 2 - n // 2 if zoomed > n else -((n - zoomed) // 2)
        scale = (n - 1) / max(1, zoomed - 1) if self.align_corners else n / zoomed
        return scale, scale * ((n - zoomed) / 2 + begin)

    def reach(self, half: Floats) -> Floats:
        low = _by_axis([low for low, _ in self.factors])
        largest_scale = np.array([self.along(n, factor)[0] for n, factor in zip(self.size, low, strict=True)])
        found = (half + 0.5) * largest_scale
        return found if self.prob >= 1 else np.maximum(found, half)


def _by_axis(values: list[float]) -> list[float]:
    """One value an axis: MONAI takes the first of two for all axes but the last."""
    return [values[0], values[0], values[-1]] if len(values) < 3 else values


@dataclass(frozen=True)
class Elastic:
    """`Rand3DElasticd`: a smooth random displacement, then an affine map: ``affine(offset + field(offset))``."""

    name: str
    prob: float
    sigma: Range
    magnitude: Range
    ranges: AffineRanges

    def draw(self, rng: np.random.Generator, half: Floats) -> CoordinateMap | None:
        if rng.random() >= self.prob:
            return None
        magnitude, sigma = float(rng.uniform(*self.magnitude)), float(rng.uniform(*self.sigma))
        matrix, shift, drawn = self.ranges.draw(rng)
        field = draw_field(rng, sigma, magnitude, half)
        moved = np.sqrt((field.vectors.astype(np.float64) ** 2).sum(0).mean())
        drawn = {"sigma_voxels": sigma, "magnitude": magnitude, "rms_voxels": float(moved), **drawn}
        return CoordinateMap(matrix, shift, field, parameters=((self.name, drawn),))

    def reach(self, half: Floats) -> Floats:
        most = max(largest(self.sigma[0], m) for m in self.magnitude)
        found = self.ranges.reach(half + most)
        return found if self.prob >= 1 else np.maximum(found, half)
