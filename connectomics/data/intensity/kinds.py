"""The kinds of augmentation: frozen dataclasses of ranges, registered by name in the order in which they are applied.

The order follows the way of the signal: the sample (charging, curtains), the optics (blur, coarser voxels), the
detector (shot noise, gain, contrast, brightness, gamma, drift, read-out noise), the stack (shifted and lost sections),
and last what no microscope does (cut-out). Intensities are in units of the image's [0, 1]; a range is drawn from
evenly. Lengths are voxels or nm, as each field says; axes are z, y, x.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from torch import Tensor

from connectomics.data.intensity import operations as do
from connectomics.data.intensity.rules import (
    Amount,
    AmountByAxis,
    AnyRange,
    AtLeastOne,
    Choices,
    Count,
    CountByAxis,
    Drawn,
    FactorByAxis,
    Kind,
    Nanometres,
    Number,
    Positive,
    Shape3,
    Share,
    pick,
    pick_seed,
    pick_whole,
    pick_word,
)

#: what a lost section can be replaced with
LOST = ("black", "white", "mean", "copy")


@dataclass(frozen=True, kw_only=True)
class Charging(Kind):
    """Spots where the beam's charge stays: a bright or dark core with a soft halo, in a few sections.

    spots: how many a patch. radius: of the core in y and x (nm, standard deviation). depth: the same in z (nm).
    halo: its width over the core's. amplitude: value added in the middle. sign: bright, dark.
    """

    name: ClassVar[str] = "charging"

    spots: Count = (1, 4)
    radius: Positive = (20.0, 100.0)
    depth: Positive = (8.0, 40.0)
    halo: AtLeastOne = (2.0, 4.0)
    amplitude: Amount = (0.2, 0.7)
    sign: Annotated[tuple[str, ...], Choices(("bright", "dark"))] = ("bright", "dark")

    def draw(self, rng: np.random.Generator, shape: Shape3, voxel_size: Nanometres) -> Drawn:
        spots = range(pick_whole(rng, self.spots))
        centers = [[float(rng.uniform(0, n - 1)) if n > 1 else 0.0 for n in shape] for _ in spots]
        radii = []
        for _ in spots:
            across, deep = pick(rng, self.radius), pick(rng, self.depth)
            radii.append([deep / voxel_size[0], across / voxel_size[1], across / voxel_size[2]])
        halo = [pick(rng, self.halo) for _ in spots]
        signs = [1.0 if pick_word(rng, self.sign) == "bright" else -1.0 for _ in spots]
        heights = [sign * pick(rng, self.amplitude) for sign in signs]
        return {"centers": centers, "radii": radii, "halo": halo, "heights": heights}


@dataclass(frozen=True, kw_only=True)
class Stripes(Kind):
    """Curtaining: stripes along one in-plane axis, as an ion beam leaves them below what it mills slower.

    amplitude: of the strongest stripe. width: across a stripe (nm, standard deviation). persistence: over how much z a
    stripe stays (nm, standard deviation). axis: the direction they run in, y, x.
    """

    name: ClassVar[str] = "stripes"

    amplitude: Amount = (0.05, 0.25)
    width: Amount = (4.0, 24.0)
    persistence: Amount = (20.0, 200.0)
    axis: Annotated[tuple[str, ...], Choices(("y", "x"))] = ("y", "x")

    def draw(self, rng: np.random.Generator, shape: Shape3, voxel_size: Nanometres) -> Drawn:
        axis = pick_word(rng, self.axis)
        across = 2 if axis == "y" else 1
        deep = do.smooth_rows(shape[0], pick(rng, self.persistence) / voxel_size[0])
        wide = do.smooth_rows(shape[across], pick(rng, self.width) / voxel_size[across])
        white = rng.standard_normal((shape[0], shape[across]))
        smooth = do.product(do.product(deep, white), wide.T)
        # few strong stripes among many faint ones: the power keeps the sign and thins out what is weak
        profile = do.to_peak(np.sign(smooth) * np.abs(smooth) ** 1.5, pick(rng, self.amplitude))
        return {"profile": profile, "axis": axis}


@dataclass(frozen=True, kw_only=True)
class Blur(Kind):
    """A beam out of focus: Gaussian. sigma: voxels, by axis (drawn for each), so it may be anisotropic."""

    name: ClassVar[str] = "blur"

    sigma: AmountByAxis = ((0.3, 1.2),) * 3

    def draw(self, rng: np.random.Generator, shape: Shape3, voxel_size: Nanometres) -> Drawn:
        return {"sigma": tuple(pick(rng, limits) for limits in self.sigma)}


@dataclass(frozen=True, kw_only=True)
class Resolution(Kind):
    """Taken with larger voxels: averaged and interpolated back. factor: how much larger, by axis (drawn for each)."""

    name: ClassVar[str] = "resolution"

    factor: FactorByAxis = ((1.0, 2.5),) * 3

    def draw(self, rng: np.random.Generator, shape: Shape3, voxel_size: Nanometres) -> Drawn:
        return {"factor": tuple(pick(rng, limits) for limits in self.factor)}


@dataclass(frozen=True, kw_only=True)
class Poisson(Kind):
    """Shot noise: variance is value / dose. dose: electrons a voxel at value 1."""

    name: ClassVar[str] = "poisson"

    dose: AtLeastOne = (30.0, 300.0)

    def draw(self, rng: np.random.Generator, shape: Shape3, voxel_size: Nanometres) -> Drawn:
        return {"dose": pick(rng, self.dose), "seed": pick_seed(rng)}


@dataclass(frozen=True, kw_only=True)
class Gain(Kind):
    """Another amplification: values times ``factor``."""

    name: ClassVar[str] = "gain"

    factor: Amount = (0.85, 1.15)

    def draw(self, rng: np.random.Generator, shape: Shape3, voxel_size: Nanometres) -> Drawn:
        return {"factor": pick(rng, self.factor)}


@dataclass(frozen=True, kw_only=True)
class Contrast(Kind):
    """Another contrast: distance from the patch's mean times ``factor``."""

    name: ClassVar[str] = "contrast"

    prob: Share = 0.2
    factor: Amount = (0.6, 1.4)

    def draw(self, rng: np.random.Generator, shape: Shape3, voxel_size: Nanometres) -> Drawn:
        return {"factor": pick(rng, self.factor)}


@dataclass(frozen=True, kw_only=True)
class Brightness(Kind):
    """Another offset: values plus ``shift``."""

    name: ClassVar[str] = "brightness"

    prob: Share = 0.2
    shift: AnyRange = (-0.15, 0.15)

    def draw(self, rng: np.random.Generator, shape: Shape3, voxel_size: Nanometres) -> Drawn:
        return {"shift": pick(rng, self.shift)}


@dataclass(frozen=True, kw_only=True)
class Gamma(Kind):
    """Another response curve, with the patch's minimum and maximum kept. exponent: above 1 darkens."""

    name: ClassVar[str] = "gamma"

    prob: Share = 0.2
    exponent: Positive = (0.6, 1.7)

    def draw(self, rng: np.random.Generator, shape: Shape3, voxel_size: Nanometres) -> Drawn:
        return {"exponent": pick(rng, self.exponent)}


@dataclass(frozen=True, kw_only=True)
class Drift(Kind):
    """Brightness that wanders from section to section, smoothly. amplitude: largest deviation from the patch's mean.

    length: over how much z it wanders (nm, standard deviation of the Gaussian that smooths the curve).
    """

    name: ClassVar[str] = "drift"

    amplitude: Amount = (0.03, 0.2)
    length: Amount = (40.0, 400.0)

    def draw(self, rng: np.random.Generator, shape: Shape3, voxel_size: Nanometres) -> Drawn:
        rows = do.smooth_rows(shape[0], pick(rng, self.length) / voxel_size[0])
        curve = (rows * rng.standard_normal(shape[0])).sum(axis=1)
        return {"curve": do.to_peak(curve - curve.mean(), pick(rng, self.amplitude))}


@dataclass(frozen=True, kw_only=True)
class Noise(Kind):
    """Noise of the read-out: Gaussian, the same everywhere. std: its range. mean: added to each voxel."""

    name: ClassVar[str] = "noise"

    prob: Share = 0.2
    std: Amount = (0.01, 0.1)
    mean: Number = 0.0

    def draw(self, rng: np.random.Generator, shape: Shape3, voxel_size: Nanometres) -> Drawn:
        return {"mean": self.mean, "std": pick(rng, self.std), "seed": pick_seed(rng)}


@dataclass(frozen=True, kw_only=True)
class ShiftedSections(Kind):
    """A run of sections out of place: image and labels move together; what comes into view is unknown.

    sections: how many (voxels in z). displacement: how far in y and x (voxels, whole ones, any direction).
    """

    name: ClassVar[str] = "shifted_sections"
    moves: ClassVar[bool] = True

    sections: Count = (1, 8)
    displacement: AtLeastOne = (1.0, 8.0)

    def draw(self, rng: np.random.Generator, shape: Shape3, voxel_size: Nanometres) -> Drawn:
        sections = min(pick_whole(rng, self.sections), shape[0])
        first = int(rng.integers(shape[0] - sections + 1))
        angle, length = float(rng.uniform(0, 2 * math.pi)), pick(rng, self.displacement)
        # a length of at least 1 leaves at least one of the two at 1 or more when rounded
        wanted = round(length * math.sin(angle)), round(length * math.cos(angle))
        displacement = tuple(max(1 - n, min(n - 1, d)) for d, n in zip(wanted, shape[1:], strict=True))
        return {"first": first, "sections": sections, "displacement": displacement}


@dataclass(frozen=True, kw_only=True)
class MissingSections(Kind):
    """Sections that were lost. sections: how many; at least one is left. Labels stay as they are known.

    fill: what is there instead: black, white, mean (of the patch), copy (of the nearest section that is left).
    """

    name: ClassVar[str] = "missing_sections"

    sections: Count = (1, 3)
    fill: Annotated[tuple[str, ...], Choices(LOST)] = LOST

    def draw(self, rng: np.random.Generator, shape: Shape3, voxel_size: Nanometres) -> Drawn:
        lost = min(pick_whole(rng, self.sections), shape[0] - 1)
        sections = sorted(int(z) for z in rng.choice(shape[0], lost, replace=False))
        return {"sections": sections, "fill": pick_word(rng, self.fill)}


@dataclass(frozen=True, kw_only=True)
class Cutout(Kind):
    """Boxes without image, so that the network learns to use what is around; labels stay known.

    boxes: how many. size: voxels by axis (drawn for each), at most the patch's. fill: mean, noise.
    """

    name: ClassVar[str] = "cutout"

    boxes: Count = (1, 4)
    size: CountByAxis = ((8, 32),) * 3
    fill: Annotated[tuple[str, ...], Choices(("mean", "noise"))] = ("mean", "noise")

    def draw(self, rng: np.random.Generator, shape: Shape3, voxel_size: Nanometres) -> Drawn:
        boxes = []
        for _ in range(pick_whole(rng, self.boxes)):
            sizes = [min(pick_whole(rng, limits), n) for limits, n in zip(self.size, shape, strict=True)]
            begins = [int(rng.integers(n - size + 1)) for size, n in zip(sizes, shape, strict=True)]
            boxes.append(tuple((begin, begin + size) for begin, size in zip(begins, sizes, strict=True)))
        return {"boxes": boxes, "fill": pick_word(rng, self.fill), "seed": pick_seed(rng)}


#: in the order in which they are applied, with what each does to the image (C, D, H, W) with the numbers drawn
OPERATIONS: dict[type[Kind], Callable[..., Tensor]] = {
    Charging: do.charging,
    Stripes: do.stripes,
    Blur: do.blur,
    Resolution: do.resolution,
    Poisson: do.poisson,
    Gain: do.gain,
    Contrast: do.contrast,
    Brightness: do.brightness,
    Gamma: do.gamma,
    Drift: do.drift,
    Noise: do.noise,
    ShiftedSections: do.shift_image,
    MissingSections: do.missing_sections,
    Cutout: do.cutout,
}

#: by name, in the same order
KINDS: dict[str, type[Kind]] = {kind.name: kind for kind in OPERATIONS}
