"""`SpatialAugmentor`: the spatial transforms of ``data.augmentations`` that are drawn as one coordinate map."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from connectomics.data.spatial.arguments import Arguments
from connectomics.data.spatial.mapping import CoordinateMap, Floats
from connectomics.data.spatial.transforms import Affine, AffineRanges, Elastic, Flip, RightAngle, SpatialTransform, Zoom
from connectomics.errors import ConfigError

_LABELS = {"label", "known"}
_LINEAR = ("bilinear", "trilinear", "linear")
_GRID_MODES = ("bilinear", "nearest", "bicubic", "0", "1", "2", "3", "4", "5")
_ZOOM_MODES = ("trilinear", "linear", "bilinear", "nearest", "nearest-exact", "bicubic", "area")
_COMMON = ("keys", "prob", "allow_missing_keys", "lazy")
_AFFINE = ("rotate_range", "shear_range", "translate_range", "scale_range")
_GRID = ("spatial_size", "mode", "padding_mode", "device")
_ACCEPTED = {
    "RandFlipd": (*_COMMON, "spatial_axis"),
    "RandRotate90d": (*_COMMON, "max_k", "spatial_axes"),
    "RandAffined": (*_COMMON, *_AFFINE, *_GRID, "cache_grid"),
    "RandZoomd": (
        *(*_COMMON, "min_zoom", "max_zoom", "mode", "padding_mode", "align_corners"), "dtype", "keep_size",
    ),
    "Rand3DElasticd": (*_COMMON[:3], *_AFFINE, *_GRID, "sigma_range", "magnitude_range"),
}  # fmt: skip


@dataclass(frozen=True)
class SpatialAugmentor:
    """Random flips, turns, affine, zoom and elastic transforms of a patch, drawn together.

    Attributes:
        transforms: in the order in which they are applied to the patch; at most one of them elastic.
        extent: voxels (z y x) of the largest patch that a drawn map is used for: an elastic field is drawn that far.
    """

    transforms: tuple[SpatialTransform, ...]
    extent: tuple[float, float, float]

    @classmethod
    def split(
        cls,
        augmentations: Mapping[str, Any],
        patch_size: Sequence[int],
        extent: Sequence[float] | None = None,
        voxel_size: Sequence[float] = (1.0, 1.0, 1.0),
    ) -> tuple[SpatialAugmentor | None, dict[str, Any]]:
        """The recognised spatial transforms of ``data.augmentations``, and the others in their order.

        Recognised are `RandFlipd`, `RandRotate90d`, `RandAffined`, `RandZoomd` and `Rand3DElasticd` with MONAI's
        arguments. One stays with the others where it asks for what one pass does not do (another size, an image mode
        that is not linear, a second elastic field) or where a transform that moves labels comes before it; transforms
        of the image alone may come before. Label modes and padding do not matter here: labels are the nearest voxel's,
        and what lies beyond the patch is read from the crop.

        Raises `UnknownNameError` for an unknown argument, `ConfigError` for a value that cannot be, and for a
        recognised transform that would move image or label alone. ``extent``: where a map is also used for larger
        patches around the same center (coarser inputs), their size in voxels of this patch. ``voxel_size``: nm, z y x:
        rotations and shears are in nm, and a right-angle turn between axes of different voxel size is refused.
        """
        size = (int(patch_size[0]), int(patch_size[1]), int(patch_size[2]))
        fused: list[SpatialTransform] = []
        remaining: dict[str, Any] = {}
        free = True
        for name, values in augmentations.items():
            if values is None:
                continue
            base, _, suffix = str(name).rpartition("_")
            kind = base if base and suffix.isdigit() else str(name)
            found = None
            if kind in _ACCEPTED:
                arguments = Arguments(str(name), kind, values, _ACCEPTED[kind], voxel_size)
                found = _READERS[kind](arguments, size)  # also where it will not be fused: for its errors
            if found is not None and any(isinstance(t, Elastic) for t in found):
                found = None if any(isinstance(t, Elastic) for t in fused) else found
            if found is not None and free:
                fused += found
                continue
            remaining[str(name)] = values
            free = free and not _moves_labels(values)
        if not fused:
            return None, remaining
        z, y, x = np.maximum(size, size if extent is None else np.asarray(extent, np.float64)).tolist()
        return cls(tuple(fused), (float(z), float(y), float(x))), remaining

    def draw(self, rng: np.random.Generator) -> CoordinateMap:
        """One map: MONAI's distributions, all randomness from ``rng``. Its ``parameters`` say what was drawn."""
        drawn = CoordinateMap.identity()
        # an offset goes through the last transform first, so an elastic one learns how far it will be asked for
        for transform in reversed(self.transforms):
            found = transform.draw(rng, np.abs(drawn.bounds(self.extent)).max(0))
            drawn = drawn if found is None else found.then(drawn)
        return drawn

    def reach(self, shape: Sequence[int], step: Sequence[float] = (1.0, 1.0, 1.0)) -> Floats:
        """The largest source offset (3,) that any draw asks for, voxels, for a patch of ``shape`` voxels."""
        half = (np.asarray(shape, np.float64) - 1) / 2 * np.asarray(step, np.float64)
        for transform in reversed(self.transforms):
            half = transform.reach(half)
        return half


def _moves_labels(values: Any) -> bool:
    """Whether a transform of any kind has labels among its keys; so it is taken where its keys cannot be read."""
    keys = values.get("keys") if isinstance(values, Mapping) else None
    named = [keys] if isinstance(keys, str) else keys
    return not isinstance(named, Sequence) or bool(_LABELS & {str(k) for k in named})


def _flip(arguments: Arguments, size: tuple[int, int, int]) -> list[SpatialTransform]:
    axes = arguments.axes("spatial_axis") or (0, 1, 2)
    return [Flip(arguments.name, arguments.prob(), axes)]


def _right_angle(arguments: Arguments, size: tuple[int, int, int]) -> list[SpatialTransform]:
    prob, most = arguments.prob(), arguments.whole("max_k", 3, least=1)
    planes = arguments.planes("spatial_axes", (0, 1))
    for a, b in planes:
        if arguments.voxel_size[a] != arguments.voxel_size[b]:
            raise ConfigError(
                f"{arguments.where} turns axes ({a}, {b}), whose voxels are {arguments.voxel_size[a]:g} and "
                f"{arguments.voxel_size[b]:g} nm long: tissue would be stretched; leave that plane out of spatial_axes"
            )
    return [RightAngle(arguments.name, prob, most, plane) for plane in planes]


def _ranges(arguments: Arguments) -> AffineRanges:
    most = {"rotate_range": 3, "shear_range": 6, "translate_range": 3, "scale_range": 3}
    rotate, shear, translate, scale = (arguments.ranges(name, most[name]) for name in _AFFINE)
    return AffineRanges(rotate, shear, translate, scale, arguments.voxel_size)


def _affine(arguments: Arguments, size: tuple[int, int, int]) -> list[SpatialTransform] | None:
    found = Affine(arguments.name, arguments.prob(), _ranges(arguments))
    linear = arguments.image_mode(_GRID_MODES) in (None, *_LINEAR)
    return [found] if arguments.same_size("spatial_size", size) and linear else None


def _elastic(arguments: Arguments, size: tuple[int, int, int]) -> list[SpatialTransform] | None:
    sigma, magnitude = arguments.pair("sigma_range"), arguments.pair("magnitude_range")
    if sigma[0] <= 0:
        raise ConfigError(f"{arguments.where}: sigma_range must be positive (voxels), found {list(sigma)}")
    found = Elastic(arguments.name, arguments.prob(), sigma, magnitude, _ranges(arguments))
    linear = arguments.image_mode(_GRID_MODES) in (None, *_LINEAR)
    return [found] if arguments.same_size("spatial_size", size) and linear else None


def _zoom(arguments: Arguments, size: tuple[int, int, int]) -> list[SpatialTransform] | None:
    low, high = arguments.numbers("min_zoom", 0.9), arguments.numbers("max_zoom", 1.1)
    if len(low) != len(high) or not 1 <= len(low) <= 3:
        raise ConfigError(
            f"{arguments.where}: min_zoom and max_zoom must be one number each, or as many (up to three), found "
            f"{list(low)} and {list(high)}"
        )
    factors = tuple(zip(low, high, strict=True))
    align = arguments.align_corners()
    found = Zoom(arguments.name, arguments.prob(), factors, size, align)
    by_axis = [factors[0], factors[0], factors[-1]] if len(factors) < 3 else factors
    for (least, most), n in zip(by_axis, size, strict=True):
        if least > most or least * n < 1:
            raise ConfigError(
                f"{arguments.where}: zoom from {least} to {most} is no range of factors that leave at least one of "
                f"{n} voxels; data.patch_size is {list(size)}"
            )
    linear = arguments.image_mode(_ZOOM_MODES) in (None, *_LINEAR)
    return [found] if arguments.flag("keep_size", True) and linear else None


_READERS: dict[str, Callable[[Arguments, tuple[int, int, int]], list[SpatialTransform] | None]] = {
    "RandFlipd": _flip,
    "RandRotate90d": _right_angle,
    "RandAffined": _affine,
    "RandZoomd": _zoom,
    "Rand3DElasticd": _elastic,
}
