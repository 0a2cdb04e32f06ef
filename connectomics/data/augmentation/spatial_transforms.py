"""MONAI's random spatial transforms as draws of a `CoordinateMap`, with the distributions of MONAI 1.6.

Each class takes the arguments of the MONAI transform that it is registered for in `TRANSFORMS`. To add a transform,
write a class here and its line in `TRANSFORMS`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.random import Generator
from pydantic import BeforeValidator, Field

from connectomics.config.values import STRICT_KEYS, checked, one_of
from connectomics.data.augmentation.argument_rules import Number, Probability, Range, is_sequence, number_range, several
from connectomics.data.augmentation.coordinate_map import CoordinateMap, Floats
from connectomics.data.augmentation.elastic_field import draw_field, largest_displacement
from connectomics.errors import ConfigError
from connectomics.geometry import Index, Triple

# axis pairs of MONAI's six shear factors and of its three rotations, with the sign that makes its matrices
_SHEARS = ((0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1))
_PLANES = ((1, 2), (2, 0), (0, 1))

_LINEAR = ("bilinear", "trilinear", "linear")
_GRID_MODES = ("bilinear", "nearest", "bicubic", "0", "1", "2", "3", "4", "5")
_ZOOM_MODES = ("trilinear", "linear", "bilinear", "nearest", "nearest-exact", "bicubic", "area")


@dataclass(frozen=True)
class PatchFrame:
    """What a draw needs to know about the patch: its ``size`` in voxels and its ``voxel_size`` in nm, z y x."""

    size: Index
    voxel_size: Triple


# -- arguments -------------------------------------------------------------------------------------------------------
def _axis(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not -3 <= value < 3:
        raise ValueError("must be axes from 0 (z) to 2 (x)")
    return value % 3


def _axes(value: Any) -> tuple[int, ...]:
    axes = (0, 1, 2) if value is None else tuple(_axis(v) for v in several(value))
    if len(set(axes)) != len(axes):
        raise ValueError("must be different axes")
    return axes


def _planes(value: Any) -> tuple[tuple[int, ...], ...]:
    given = value if is_sequence(value) and value and is_sequence(value[0]) else [value]
    planes = tuple(tuple(_axis(a) for a in plane) if is_sequence(plane) else () for plane in given)
    if any(len(plane) != 2 or plane[0] == plane[1] for plane in planes):
        raise ValueError("must be a pair of different axes (0 z, 1 y, 2 x) or a list of such pairs")
    return planes


def _monai_ranges(most: int) -> BeforeValidator:
    """Annotation for at most ``most`` ranges as MONAI's `RandAffineGrid` reads them.

    A number n is the range -n to n, a single number is the range of the first parameter only, and None is removed, so
    that the following ranges move up. Parameters without a range do not change.
    """

    def check(value: Any) -> tuple[Any, ...]:
        given = [entry for entry in several(value) if entry is not None]
        if len(given) > most:
            raise ValueError(f"must be at most {most} ranges")
        if any(isinstance(e, bool) or not (is_sequence(e) or isinstance(e, int | float)) for e in given):
            raise ValueError("must be numbers or pairs of numbers")
        return tuple(entry if is_sequence(entry) else (-abs(entry), abs(entry)) for entry in given)

    return BeforeValidator(check)


def _same(value: Any) -> bool:
    found = {False if v is None else v for v in several(value)}
    if found not in ({True}, {False}) or not isinstance(next(iter(found)), bool):
        raise ValueError("must be true or false, the same for image and label")
    return found == {True}


_Numbers = Annotated[tuple[Number, ...], BeforeValidator(several)]
_Pair = Annotated[Range, number_range(single=False)]
Ranges = tuple[_Pair, ...]


@dataclass(frozen=True, kw_only=True)
class SpatialTransform:
    """One spatial transform with the arguments that all MONAI transforms have."""

    __pydantic_config__ = STRICT_KEYS
    has_field: ClassVar[bool] = False  # whether its map has a displacement field; a patch can have one

    keys: Annotated[tuple[Annotated[str, one_of("image", "label", "known")], ...], BeforeValidator(several)]
    prob: Probability = 0.1
    allow_missing_keys: Any = False

    def __post_init__(self) -> None:
        if "image" not in self.keys or "label" not in self.keys:
            raise ValueError(f"keys must be [image, label], so that raw and labels stay aligned, got {list(self.keys)}")

    def fits_one_pass(self, frame: PatchFrame) -> bool:
        """Return whether one linear interpolation pass does what the arguments ask for."""
        return True

    def check(self, frame: PatchFrame) -> None:
        """Raise `ConfigError` if the transform is impossible for such patches."""

    def expanded(self) -> Sequence[SpatialTransform]:
        """Return the transforms to apply one after another, each with its own draw."""
        return [self]

    def draw(self, rng: Generator, name: str, half: Floats, frame: PatchFrame) -> CoordinateMap | None:
        """Return the map of one draw for offsets up to ``half`` (3,) voxels, or None with a probability of 1 - prob."""
        return None if rng.random() >= self.prob else self._draw(rng, name, half, frame)

    def _draw(self, rng: Generator, name: str, half: Floats, frame: PatchFrame) -> CoordinateMap:
        raise NotImplementedError

    def reach(self, half: Floats, frame: PatchFrame) -> Floats:
        """Return the largest source offset (3,) of any draw, for offsets up to ``half`` (3,), voxels."""
        found = self._reach(half, frame)
        return found if self.prob >= 1 else np.maximum(found, half)

    def _reach(self, half: Floats, frame: PatchFrame) -> Floats:
        return half


@dataclass(frozen=True, kw_only=True)
class Flip(SpatialTransform):
    """`RandFlipd`: flips all given axes together."""

    spatial_axis: Annotated[tuple[int, ...], BeforeValidator(_axes)] = (0, 1, 2)
    lazy: Any = False

    def _draw(self, rng: Generator, name: str, half: Floats, frame: PatchFrame) -> CoordinateMap:
        signs = np.ones(3)
        signs[list(self.spatial_axis)] = -1
        return CoordinateMap.affine(np.diag(signs), parameters=((name, {"axes": list(self.spatial_axis)}),))


@dataclass(frozen=True, kw_only=True)
class RightAngle(SpatialTransform):
    """`RandRotate90d`: 1 to ``max_k`` quarter turns from the first axis of a plane to the second; also several planes,
    one after another."""

    max_k: Annotated[int, Field(strict=True, ge=1)] = 3
    spatial_axes: Annotated[tuple[tuple[int, int], ...], BeforeValidator(_planes)] = ((0, 1),)
    lazy: Any = False

    def check(self, frame: PatchFrame) -> None:
        for a, b in self.spatial_axes:
            first, second = frame.voxel_size[a], frame.voxel_size[b]
            if first != second:
                raise ConfigError(
                    f"rotates axes ({a}, {b}), whose voxels are {first:g} and {second:g} nm long, which would stretch "
                    "the tissue; remove that plane from spatial_axes"
                )

    def expanded(self) -> Sequence[SpatialTransform]:
        return [replace(self, spatial_axes=(plane,)) for plane in self.spatial_axes]

    def _draw(self, rng: Generator, name: str, half: Floats, frame: PatchFrame) -> CoordinateMap:
        ((first, second),) = self.spatial_axes
        turns = int(rng.integers(1, self.max_k + 1))
        quarter = np.eye(3)
        quarter[[first, second], [first, second]] = 0
        quarter[first, second], quarter[second, first] = 1, -1  # numpy.rot90: out[i, j] = in[j, n - 1 - i]
        matrix = np.linalg.matrix_power(quarter, turns % 4)
        return CoordinateMap.affine(matrix, parameters=((name, {"quarter_turns": turns, "plane": [first, second]}),))

    def _reach(self, half: Floats, frame: PatchFrame) -> Floats:
        turned = half.copy()
        for plane in self.spatial_axes:
            turned[list(plane)] = turned[list(plane)].max()
        return turned


@dataclass(frozen=True, kw_only=True)
class Interpolated(SpatialTransform):
    """A transform with interpolation modes, of which only the image's has an effect: a label is that of the nearest
    voxel, and what lies beyond the patch is read from the crop instead of padded."""

    modes: ClassVar[tuple[str, ...]]

    mode: Annotated[tuple[Any, ...], BeforeValidator(several)] = (None,)
    padding_mode: Any = None
    lazy: Any = False

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [str(mode) for mode in self.mode]
        if self.mode != (None,) and (len(given) not in (1, len(self.keys)) or any(m not in self.modes for m in given)):
            raise ValueError(f"mode must be one for all keys or one per key, of {', '.join(self.modes)}, got {given}")

    def fits_one_pass(self, frame: PatchFrame) -> bool:
        mode = self.mode[self.keys.index("image") if len(self.mode) > 1 else 0]
        return mode is None or str(mode) in _LINEAR


@dataclass(frozen=True, kw_only=True)
class Affine(Interpolated):
    """`RandAffined`. Rotations (radians) and shears are applied in nm, so that angles and lengths of the tissue hold
    for anisotropic voxels. Translations are in voxels."""

    modes = _GRID_MODES

    rotate_range: Annotated[Ranges, _monai_ranges(3)] = ()
    shear_range: Annotated[Ranges, _monai_ranges(6)] = ()
    translate_range: Annotated[Ranges, _monai_ranges(3)] = ()
    scale_range: Annotated[Ranges, _monai_ranges(3)] = ()
    spatial_size: Annotated[tuple[int | None, ...], BeforeValidator(several)] = (None,)
    device: Any = None
    cache_grid: Any = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.spatial_size) not in (1, 3):
            raise ValueError(f"spatial_size must be one or three whole numbers, got {list(self.spatial_size)}")

    def fits_one_pass(self, frame: PatchFrame) -> bool:
        sizes = self.spatial_size * 3 if len(self.spatial_size) == 1 else self.spatial_size
        same = all(n is None or n < 1 or n == own for n, own in zip(sizes, frame.size, strict=True))
        return same and super().fits_one_pass(frame)

    def _draw(self, rng: Generator, name: str, half: Floats, frame: PatchFrame) -> CoordinateMap:
        matrix, shift, drawn = self._affine(rng, frame)
        return CoordinateMap.affine(matrix, shift, ((name, drawn),))

    def _affine(self, rng: Generator, frame: PatchFrame) -> tuple[Floats, Floats, dict[str, Any]]:
        """Draw matrix, shift and parameters in MONAI's order (`AffineGrid`): rotation, shear, translation, scale."""
        angles, shears, shifts, scales = (
            [float(rng.uniform(low, high)) for low, high in ranges]
            for ranges in (self.rotate_range, self.shear_range, self.translate_range, self.scale_range)
        )
        matrix = np.eye(3)
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
        size = np.array(frame.voxel_size)
        matrix = matrix @ sheared * (size / size[:, None])  # from nm to voxels on both sides
        shift = matrix @ np.array(shifts + [0.0] * (3 - len(shifts)))
        factors = [1 + s for s in scales] + [1.0] * (3 - len(scales))
        drawn = {
            "rotate_degrees": [math.degrees(a) for a in angles],
            "shear": shears,
            "translate_voxels": shifts,
            "scale": factors if scales else [],
        }
        return matrix * factors, shift, {name: values for name, values in drawn.items() if values}

    def _reach(self, half: Floats, frame: PatchFrame) -> Floats:
        found = half.copy()
        for axis, (low, high) in enumerate(self.scale_range):
            found[axis] *= max(abs(1 + low), abs(1 + high))
        for axis, (low, high) in enumerate(self.translate_range):
            found[axis] += max(abs(low), abs(high))
        size = np.array(frame.voxel_size) / max(frame.voxel_size)
        found *= size
        for (a, b), (low, high) in zip(_SHEARS, self.shear_range, strict=False):
            found[a] += max(abs(low), abs(high)) * found[b]
        norm = float(np.linalg.norm(found))  # a rotation keeps the length
        for (a, b), (low, high) in reversed(list(zip(_PLANES, self.rotate_range, strict=False))):
            angle = max(abs(low), abs(high))
            found[a], found[b] = _rotated(found[a], found[b], angle), _rotated(found[b], found[a], angle)
        return (np.minimum(found, norm) if self.rotate_range else found) / size


def _rotated(along: float, across: float, angle: float) -> float:
    """Return the largest ``along * cos(t) + across * sin(t)`` for 0 <= t <= angle."""
    best = math.atan2(across, along)
    return math.hypot(along, across) if angle >= best else along * math.cos(angle) + across * math.sin(angle)


@dataclass(frozen=True, kw_only=True)
class Elastic(Affine):
    """`Rand3DElasticd`: a smooth random displacement, then an affine map: ``affine(offset + field(offset))``."""

    has_field = True

    sigma_range: Annotated[_Pair, checked(lambda pair: pair[0] > 0, "must be positive (voxels)")]
    magnitude_range: _Pair

    def _draw(self, rng: Generator, name: str, half: Floats, frame: PatchFrame) -> CoordinateMap:
        magnitude, sigma = float(rng.uniform(*self.magnitude_range)), float(rng.uniform(*self.sigma_range))
        matrix, shift, drawn = self._affine(rng, frame)
        field = draw_field(rng, sigma, magnitude, half)
        moved = np.sqrt((field.vectors.astype(np.float64) ** 2).sum(0).mean())
        drawn = {"sigma_voxels": sigma, "magnitude": magnitude, "rms_voxels": float(moved), **drawn}
        return CoordinateMap(matrix, shift, field, parameters=((name, drawn),))

    def _reach(self, half: Floats, frame: PatchFrame) -> Floats:
        most = max(largest_displacement(self.sigma_range[0], m) for m in self.magnitude_range)
        return super()._reach(half + most, frame)


@dataclass(frozen=True, kw_only=True)
class Zoom(Interpolated):
    """`RandZoomd`: one factor for all axes, two (the first for z and y), or three."""

    modes = _ZOOM_MODES

    min_zoom: _Numbers = (0.9,)
    max_zoom: _Numbers = (1.1,)
    align_corners: Annotated[bool, BeforeValidator(_same)] = False
    dtype: Any = None
    keep_size: Annotated[bool, Field(strict=True)] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.min_zoom) != len(self.max_zoom) or not 1 <= len(self.min_zoom) <= 3:
            low, high = list(self.min_zoom), list(self.max_zoom)
            raise ValueError(f"min_zoom and max_zoom must have the same length, one to three, got {low} and {high}")

    def fits_one_pass(self, frame: PatchFrame) -> bool:
        return self.keep_size and super().fits_one_pass(frame)

    def check(self, frame: PatchFrame) -> None:
        for low, high, n in zip(_by_axis(self.min_zoom), _by_axis(self.max_zoom), frame.size, strict=True):
            if low > high or low * n < 1:
                raise ConfigError(
                    f"min_zoom must be at most max_zoom and leave at least one of {n} voxels, got {low} and {high} for "
                    f"data.patch_size {list(frame.size)}"
                )

    def _draw(self, rng: Generator, name: str, half: Floats, frame: PatchFrame) -> CoordinateMap:
        factors = zip(self.min_zoom, self.max_zoom, strict=True)
        drawn = _by_axis([float(rng.uniform(low, high)) for low, high in factors])
        parts = [self._along(n, factor) for n, factor in zip(frame.size, drawn, strict=True)]
        matrix, shift = np.diag([p[0] for p in parts]), [p[1] for p in parts]
        return CoordinateMap.affine(matrix, shift, ((name, {"zoom": drawn}),))

    def _along(self, n: int, factor: float) -> Range:
        """Return (scale, shift) of one axis: ``source = scale * offset + shift``.

        MONAI interpolates to a whole number of voxels m and crops or pads the result to n voxels, so the center moves
        by half a voxel unless n and m are both odd or both even.
        """
        zoomed = math.floor(n * factor)
        begin = zoomed // 2 - n // 2 if zoomed > n else -((n - zoomed) // 2)
        scale = (n - 1) / max(1, zoomed - 1) if self.align_corners else n / zoomed
        return scale, scale * ((n - zoomed) / 2 + begin)

    def _reach(self, half: Floats, frame: PatchFrame) -> Floats:
        scales = [self._along(n, low)[0] for n, low in zip(frame.size, _by_axis(self.min_zoom), strict=True)]
        return (half + 0.5) * np.array(scales)


def _by_axis(values: Sequence[float]) -> list[float]:
    """Return one value per axis: MONAI uses the first of two for all axes but the last."""
    return [values[0], values[0], values[-1]] if len(values) < 3 else list(values)


TRANSFORMS: dict[str, type[SpatialTransform]] = {
    "RandFlipd": Flip,
    "RandRotate90d": RightAngle,
    "RandAffined": Affine,
    "RandZoomd": Zoom,
    "Rand3DElasticd": Elastic,
}
