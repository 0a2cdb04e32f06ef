"""The intensity augmentations: one frozen dataclass per kind, registered in `KINDS` in the order of application.

To add a kind, write a class with its arguments, `draw` and `apply`, and its line in `KINDS`.

The order follows the signal: sample, optics, detector, stack, and last cut-out, which no microscope does. Intensities
are in units of the image's [0, 1]; numbers are drawn uniformly from a range, on the host, so that nothing waits for a
GPU. `apply` may overwrite the image that it gets, and values may leave [0, 1]: `IntensityAugmentor` clamps at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.random import Generator
from torch import Tensor

from connectomics.config.values import STRICT_KEYS
from connectomics.data.augmentation import intensity_operations as operations
from connectomics.data.augmentation.argument_rules import (
    AxisRanges,
    Number,
    Probability,
    Range,
    number_range,
    range_by_axis,
    words,
)
from connectomics.geometry import Index, Triple

#: numbers drawn for one patch: arguments of the kind's operation
Drawn = dict[str, Any]

AnyRange = Annotated[Range, number_range()]
Amount = Annotated[Range, number_range(0.0)]
Positive = Annotated[Range, number_range(1e-3)]
AtLeastOne = Annotated[Range, number_range(1.0)]
Count = Annotated[tuple[int, int], number_range(1, whole=True)]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of augmentation with its ranges."""

    __pydantic_config__ = STRICT_KEYS
    apply: ClassVar[Callable[..., Tensor]]  # image (C, D, H, W) float32 and the numbers drawn -> new image
    moves: ClassVar[bool] = False  # whether it moves the image, so that labels must move with it

    prob: Probability = 0.1  # share of patches that the kind is applied to

    def draw(self, rng: Generator, shape: Index, voxel_size: Triple) -> Drawn:
        """Draw the numbers for a patch of ``shape`` voxels (z, y, x) of ``voxel_size`` nm: one number per range."""
        ranges = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "prob"}
        return {
            name: tuple(_number(rng, axis) for axis in given) if isinstance(given[0], tuple) else _number(rng, given)
            for name, given in ranges.items()
        }


def _number(rng: Generator, limits: Range) -> float:
    return float(rng.uniform(*limits))


def _whole(rng: Generator, limits: Range) -> int:
    """Draw a whole number, both ends included."""
    return int(rng.integers(int(limits[0]), int(limits[1]) + 1))


def _word(rng: Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def _seed(rng: Generator) -> int:
    """Draw a seed for the generator of the device (63 bits)."""
    return int(rng.integers(1 << 63))


@dataclass(frozen=True, kw_only=True)
class Charging(Kind):
    """Charging of the sample: spots with a bright or dark core and a soft halo, in a few sections.

    spots: number per patch. radius: of the core in y and x (nm, standard deviation). depth: the same in z (nm).
    halo: its width relative to the core. amplitude: value added at the center. sign: bright, dark.
    """

    spots: Count = (1, 4)
    radius: Positive = (20.0, 100.0)
    depth: Positive = (8.0, 40.0)
    halo: AtLeastOne = (2.0, 4.0)
    amplitude: Amount = (0.2, 0.7)
    sign: Annotated[tuple[str, ...], words("bright", "dark")] = ("bright", "dark")

    def draw(self, rng: Generator, shape: Index, voxel_size: Triple) -> Drawn:
        spots = range(_whole(rng, self.spots))
        centers = [[float(rng.uniform(0, n - 1)) if n > 1 else 0.0 for n in shape] for _ in spots]
        radii = []
        for _ in spots:
            across, deep = _number(rng, self.radius), _number(rng, self.depth)
            radii.append([deep / voxel_size[0], across / voxel_size[1], across / voxel_size[2]])
        halo = [_number(rng, self.halo) for _ in spots]
        signs = [1.0 if _word(rng, self.sign) == "bright" else -1.0 for _ in spots]
        heights = [sign * _number(rng, self.amplitude) for sign in signs]
        return {"centers": centers, "radii": radii, "halo": halo, "heights": heights}

    @staticmethod
    def apply(
        image: Tensor,
        centers: Sequence[Sequence[float]],
        radii: Sequence[Sequence[float]],
        halo: Sequence[float],
        heights: Sequence[float],
    ) -> Tensor:
        """Add a core of ``radii`` (z, y, x voxels) and a halo that is wider in y and x and 0.4 as high, per spot."""
        shape = image.shape[1:]
        for center, radius, wide, height in zip(centers, radii, halo, heights, strict=True):
            for share, times in ((0.6, 1.0), (0.4, wide)):
                reach = [radius[0], radius[1] * times, radius[2] * times]
                slices, factors = [], []
                for axis in range(3):
                    low = max(0, math.floor(center[axis] - 4 * reach[axis]))
                    high = min(shape[axis], math.ceil(center[axis] + 4 * reach[axis]) + 1)
                    distance = (np.arange(low, high) - center[axis]) / reach[axis]
                    slices.append(slice(low, high))
                    factors.append(operations.on_device(np.exp(-0.5 * distance**2), image))
                z, y, x = factors
                image[:, slices[0], slices[1], slices[2]] += (z * (height * share))[:, None, None] * y[:, None] * x
        return image


@dataclass(frozen=True, kw_only=True)
class Stripes(Kind):
    """Curtaining: stripes along one in-plane axis, as an ion beam leaves them below material that mills slowly.

    amplitude: of the strongest stripe. width: across a stripe (nm, standard deviation). persistence: extent of a
    stripe in z (nm, standard deviation). axis: direction of the stripes, y, x.
    """

    amplitude: Amount = (0.05, 0.25)
    width: Amount = (4.0, 24.0)
    persistence: Amount = (20.0, 200.0)
    axis: Annotated[tuple[str, ...], words("y", "x")] = ("y", "x")

    def draw(self, rng: Generator, shape: Index, voxel_size: Triple) -> Drawn:
        axis = _word(rng, self.axis)
        across = 2 if axis == "y" else 1
        deep = operations.smooth_rows(shape[0], _number(rng, self.persistence) / voxel_size[0])
        wide = operations.smooth_rows(shape[across], _number(rng, self.width) / voxel_size[across])
        white = rng.standard_normal((shape[0], shape[across]))
        smooth = operations.product(operations.product(deep, white), wide.T)
        # a few strong stripes among many faint ones: the power keeps the sign and weakens what is weak
        profile = operations.to_peak(np.sign(smooth) * np.abs(smooth) ** 1.5, _number(rng, self.amplitude))
        return {"profile": profile, "axis": axis}

    @staticmethod
    def apply(image: Tensor, profile: operations.Floats, axis: str) -> Tensor:
        added = operations.on_device(profile, image)
        return image.add_(added[:, None, :] if axis == "y" else added[:, :, None])


@dataclass(frozen=True, kw_only=True)
class Blur(Kind):
    """Defocus: a Gaussian. sigma: voxels, drawn for each axis, so the blur may be anisotropic."""

    sigma: Annotated[AxisRanges, range_by_axis(0.0)] = ((0.3, 1.2),) * 3

    @staticmethod
    def apply(image: Tensor, sigma: Sequence[float]) -> Tensor:
        for axis, width in enumerate(sigma):
            image = operations.along(image, axis, operations.gaussian_matrix(image.shape[axis + 1], width))
        return image


@dataclass(frozen=True, kw_only=True)
class Resolution(Kind):
    """Larger voxels: averaged and interpolated back. factor: relative voxel size, drawn for each axis."""

    factor: Annotated[AxisRanges, range_by_axis(1.0)] = ((1.0, 2.5),) * 3

    @staticmethod
    def apply(image: Tensor, factor: Sequence[float]) -> Tensor:
        for axis, times in enumerate(factor):
            image = operations.along(image, axis, operations.resolution_matrix(image.shape[axis + 1], times))
        return image


@dataclass(frozen=True, kw_only=True)
class Poisson(Kind):
    """Shot noise: the variance is value / dose. dose: electrons per voxel at value 1."""

    dose: AtLeastOne = (30.0, 300.0)

    def draw(self, rng: Generator, shape: Index, voxel_size: Triple) -> Drawn:
        return {**super().draw(rng, shape, voxel_size), "seed": _seed(rng)}

    @staticmethod
    def apply(image: Tensor, dose: float, seed: int) -> Tensor:
        # the normal approximation is good from about ten electrons, and fifteen times as fast as exact counts
        deviation = image.clamp(min=0).mul_(1.0 / dose).sqrt_()
        return image.addcmul_(deviation, operations.normal(image, seed))


@dataclass(frozen=True, kw_only=True)
class Gain(Kind):
    """Another amplification: values times ``factor``."""

    factor: Amount = (0.85, 1.15)

    @staticmethod
    def apply(image: Tensor, factor: float) -> Tensor:
        return image.mul_(factor)


@dataclass(frozen=True, kw_only=True)
class Contrast(Kind):
    """Another contrast: the difference from the patch mean times ``factor``."""

    prob: Probability = 0.2
    factor: Amount = (0.6, 1.4)

    @staticmethod
    def apply(image: Tensor, factor: float) -> Tensor:
        return image.lerp_(image.mean(), 1.0 - factor)


@dataclass(frozen=True, kw_only=True)
class Brightness(Kind):
    """Another offset: values plus ``shift``."""

    prob: Probability = 0.2
    shift: AnyRange = (-0.15, 0.15)

    @staticmethod
    def apply(image: Tensor, shift: float) -> Tensor:
        return image.add_(shift)


@dataclass(frozen=True, kw_only=True)
class Gamma(Kind):
    """Another response curve that keeps the minimum and maximum of the patch. exponent: above 1 darkens."""

    prob: Probability = 0.2
    exponent: Positive = (0.6, 1.7)

    @staticmethod
    def apply(image: Tensor, exponent: float) -> Tensor:
        low, high = image.aminmax()  # the formula of `monai.transforms.AdjustContrast`
        extent = high - low
        return image.sub_(low).div_(extent + 1e-7).clamp_(min=0).pow_(exponent).mul_(extent).add_(low)


@dataclass(frozen=True, kw_only=True)
class Invert(Kind):
    """The opposite contrast, 1 - value: membranes are dark in some data and bright in others."""

    @staticmethod
    def apply(image: Tensor) -> Tensor:
        return image.neg_().add_(1.0)


@dataclass(frozen=True, kw_only=True)
class Drift(Kind):
    """Brightness that changes smoothly from section to section.

    amplitude: largest deviation from the patch mean. length: extent of a change in z (nm, standard deviation of the
    Gaussian that smooths the curve).
    """

    amplitude: Amount = (0.03, 0.2)
    length: Amount = (40.0, 400.0)

    def draw(self, rng: Generator, shape: Index, voxel_size: Triple) -> Drawn:
        rows = operations.smooth_rows(shape[0], _number(rng, self.length) / voxel_size[0])
        curve = (rows * rng.standard_normal(shape[0])).sum(axis=1)
        return {"curve": operations.to_peak(curve - curve.mean(), _number(rng, self.amplitude))}

    @staticmethod
    def apply(image: Tensor, curve: operations.Floats) -> Tensor:
        return image.add_(operations.on_device(curve, image)[:, None, None])


@dataclass(frozen=True, kw_only=True)
class Noise(Kind):
    """Read-out noise: Gaussian, the same everywhere. std: its range. mean: value added to each voxel."""

    prob: Probability = 0.2
    std: Amount = (0.01, 0.1)
    mean: Number = 0.0

    def draw(self, rng: Generator, shape: Index, voxel_size: Triple) -> Drawn:
        return {"mean": self.mean, "std": _number(rng, self.std), "seed": _seed(rng)}

    @staticmethod
    def apply(image: Tensor, mean: float, std: float, seed: int) -> Tensor:
        added = operations.normal(image, seed).mul_(std)
        return added.add_(image).add_(mean) if mean else added.add_(image)


@dataclass(frozen=True, kw_only=True)
class ShiftedSections(Kind):
    """Misaligned sections: image and labels move together, and voxels that come into view are unknown.

    sections: number of consecutive sections. displacement: shift in y and x (whole voxels, any direction).
    """

    moves = True

    sections: Count = (1, 8)
    displacement: AtLeastOne = (1.0, 8.0)

    def draw(self, rng: Generator, shape: Index, voxel_size: Triple) -> Drawn:
        sections = min(_whole(rng, self.sections), shape[0])
        first = int(rng.integers(shape[0] - sections + 1))
        angle, length = float(rng.uniform(0, 2 * math.pi)), _number(rng, self.displacement)
        # rounding a length of at least 1 leaves at least one of the two at 1 or more
        wanted = round(length * math.sin(angle)), round(length * math.cos(angle))
        displacement = tuple(max(1 - n, min(n - 1, d)) for d, n in zip(wanted, shape[1:], strict=True))
        return {"first": first, "sections": sections, "displacement": displacement}

    @staticmethod
    def apply(image: Tensor, first: int, sections: int, displacement: tuple[int, int]) -> Tensor:
        """What was at (y, x) is at (y + dy, x + dx) then; vacated voxels repeat the edge."""
        run = slice(first, first + sections)
        image[:, run] = operations.shifted(image[:, run], displacement)
        return image


@dataclass(frozen=True, kw_only=True)
class MissingSections(Kind):
    """Missing sections. Labels stay known. sections: number of sections lost; at least one always remains.

    fill: the replacement: black, white, mean (of the patch), copy (of the nearest remaining section).
    """

    sections: Count = (1, 3)
    fill: Annotated[tuple[str, ...], words("black", "white", "mean", "copy")] = ("black", "white", "mean", "copy")

    def draw(self, rng: Generator, shape: Index, voxel_size: Triple) -> Drawn:
        lost = min(_whole(rng, self.sections), shape[0] - 1)
        sections = sorted(int(z) for z in rng.choice(shape[0], lost, replace=False))
        return {"sections": sections, "fill": _word(rng, self.fill)}

    @staticmethod
    def apply(image: Tensor, sections: Sequence[int], fill: str) -> Tensor:
        if fill == "copy":
            kept = [z for z in range(image.shape[1]) if z not in set(sections)]
            for lost in sections:
                image[:, lost] = image[:, min(kept, key=lambda z, lost=lost: (abs(z - lost), z))]  # type: ignore[misc]
        else:
            value = image.mean() if fill == "mean" else {"black": 0.0, "white": 1.0}[fill]
            for lost in sections:
                image[:, lost] = value
        return image


@dataclass(frozen=True, kw_only=True)
class Cutout(Kind):
    """Boxes without image, so that the network learns to use the surroundings. Labels stay known.

    boxes: number of boxes. size: voxels, drawn for each axis, at most the patch size. fill: mean, noise.
    """

    boxes: Count = (1, 4)
    size: Annotated[AxisRanges, range_by_axis(1, whole=True)] = ((8, 32),) * 3
    fill: Annotated[tuple[str, ...], words("mean", "noise")] = ("mean", "noise")

    def draw(self, rng: Generator, shape: Index, voxel_size: Triple) -> Drawn:
        boxes = []
        for _ in range(_whole(rng, self.boxes)):
            sizes = [min(_whole(rng, limits), n) for limits, n in zip(self.size, shape, strict=True)]
            begins = [int(rng.integers(n - size + 1)) for size, n in zip(sizes, shape, strict=True)]
            boxes.append(tuple((begin, begin + size) for begin, size in zip(begins, sizes, strict=True)))
        return {"boxes": boxes, "fill": _word(rng, self.fill), "seed": _seed(rng)}

    @staticmethod
    def apply(image: Tensor, boxes: Sequence[Sequence[tuple[int, int]]], fill: str, seed: int) -> Tensor:
        mean = image.mean()
        deviation = image.std(correction=0) if fill == "noise" else None
        for number, box in enumerate(boxes):
            inside = image[(slice(None), *(slice(low, high) for low, high in box))]
            if deviation is None:
                inside.copy_(mean.expand_as(inside))
            else:
                inside.copy_(operations.normal(inside, seed + number).mul_(deviation).add_(mean))
        return image


#: every kind by its name in ``data.intensity``, in the order of application
KINDS: dict[str, type[Kind]] = {
    "charging": Charging, "stripes": Stripes, "blur": Blur, "resolution": Resolution, "poisson": Poisson, "gain": Gain,
    "contrast": Contrast, "brightness": Brightness, "gamma": Gamma, "invert": Invert, "drift": Drift, "noise": Noise,
    "shifted_sections": ShiftedSections, "missing_sections": MissingSections, "cutout": Cutout,
}  # fmt: skip
