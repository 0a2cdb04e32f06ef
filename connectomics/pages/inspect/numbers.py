"""Batches in numbers: values of images, known and present voxels; and warnings if something looks wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from connectomics.pages.inspect.raw_presence import RawShare

# Shares that give a warning: of known voxels below, of raw at exactly 0 or 1 above, of voxels without raw above.
_FEW_KNOWN, _CLIPPED, _NO_RAW = 0.01, 0.05, 0.5


@dataclass(frozen=True)
class ValueRange:
    """The values of an image: extremes, percentiles, and the shares of voxels that are exactly 0 and exactly 1."""

    low: float
    high: float
    mean: float
    p1: float
    p50: float
    p99: float
    zero: float
    one: float

    @classmethod
    def of(cls, image: NDArray[np.float32]) -> ValueRange:
        """Measure an array of any shape."""
        values = (image.min(), image.max(), image.mean(dtype=np.float64), *np.percentile(image, [1, 50, 99]))
        return cls(*(float(v) for v in (*values, (image == 0).mean(), (image == 1).mean())))


@dataclass(frozen=True)
class LabelNumbers:
    """Labels of ``voxels`` voxels: by class, the number of ``known`` voxels and of known and ``present`` ones.

    ``anything``: voxels where some class is known. ``states``: number of combinations of classes that occur.
    """

    voxels: int
    anything: int
    states: int
    known: dict[str, int]
    present: dict[str, int]

    @classmethod
    def of(
        cls, codes: NDArray[np.integer], present: NDArray[np.bool_], known: NDArray[np.bool_], classes: Sequence[str]
    ) -> LabelNumbers:
        """Count codes of any shape, with the tables (C, K) of present and known by class and code."""
        often = np.bincount(codes.ravel(), minlength=known.shape[1])
        n_known, n_present = (
            dict(zip(classes, (table @ often).tolist(), strict=True)) for table in (known, present & known)
        )
        anything = int(often[known.any(axis=0)].sum())
        return cls(codes.size, anything, int((often > 0).sum()), n_known, n_present)

    @property
    def known_share(self) -> float:
        """Share of (class, voxel) pairs that are known, which the loss counts."""
        return sum(self.known.values()) / max(1, self.voxels * len(self.known))


@dataclass(frozen=True)
class ClassNumbers:
    """One class over all patches: share of voxels ``known``, share ``present`` among those (None if none is known),
    and the number of patches in which it is known and present."""

    name: str
    known: float
    present: float | None
    patches_known: int
    patches_present: int


def by_class(patches: Sequence[LabelNumbers]) -> list[ClassNumbers]:
    """Return every class, pooled over patches."""
    rows = []
    voxels = sum(p.voxels for p in patches)
    for name in patches[0].known if patches else ():
        known, present = ([p.known[name] for p in patches], [p.present[name] for p in patches])
        share = sum(present) / sum(known) if any(known) else None
        n_known, n_present = (sum(n > 0 for n in counts) for counts in (known, present))
        rows.append(ClassNumbers(name, sum(known) / voxels, share, n_known, n_present))
    return rows


def label_warnings(patches: Sequence[LabelNumbers]) -> list[str]:
    """Return what looks wrong about the labels."""
    rows = by_class(patches)
    warnings: list[str] = []
    never_known = [r.name for r in rows if r.patches_known == 0]
    never_present = [r.name for r in rows if r.patches_known and not r.patches_present]
    few = [r.name for r in rows if 0 < r.known < _FEW_KNOWN]
    n = len(patches)
    if never_known:
        warnings.append(
            f"Known in none of the {n} patches: {', '.join(never_known)}. No training crop annotates them, or none "
            "was drawn; the network learns nothing about them from such patches."
        )
    if never_present:
        warnings.append(
            f"Known but never present in {n} patches: {', '.join(never_present)}. Take more --batches to be sure; "
            "raise their weight in data.class_weights or data.sampling if they stay rare."
        )
    if few:
        warnings.append(f"Known in less than 1 % of the voxels: {', '.join(few)}.")
    share = sum(p.anything for p in patches) / max(1, sum(p.voxels for p in patches))
    if share < _FEW_KNOWN:
        warnings.append(
            f"Some class is known in only {100 * share:.2g} % of all voxels: patches are much larger than crops, or "
            "raw is missing there. Set a smaller data.patch_size, or data.min_known."
        )
    return warnings


def image_warnings(name: str, values: ValueRange, raw: RawShare | None) -> list[str]:
    """Return what looks wrong about one image of a patch; ``raw``: None if it is not measured."""
    if raw is not None and raw.none > _NO_RAW:
        return [f"{name}: {100 * raw.none:.0f} % of the voxels have no raw."]
    if values.low == values.high:
        return [f"{name}: the image is constant ({values.low:g})."]
    # voxels without raw are 0, so without a measure of raw the zeros say nothing
    ends = ((1, values.one),) if raw is None else ((0, raw.zero), (1, raw.one))
    return [
        f"{name}: {100 * share:.0f} % of the values are exactly {end}: data.intensity_range or an intensity "
        "augmentation clips them."
        for end, share in ends
        if share > _CLIPPED
    ]
