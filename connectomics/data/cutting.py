"""Cut a group of crops into a training and a validation region, with a gap between them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from connectomics.cellmap.catalog import Crop
from connectomics.cellmap.classes import atoms_of
from connectomics.geometry import Box, Triple, triple

log = logging.getLogger(__name__)

_SLAB = 2**24  # label voxels read at once
_ENOUGH = 2**18  # voxels of a label level that suffice to see where annotation lies
_MOST_GAP = 0.25  # of the length that is cut


@dataclass(frozen=True)
class _Profile:
    """Of one class in one crop along one axis: begin of each plane (nm), its thickness (nm), and the annotated and the
    present volume of each plane (nm^3)."""

    begin: NDArray[np.float64]
    thickness: float
    known: NDArray[np.float64]
    present: NDArray[np.float64]


def cut(
    crops: Sequence[Crop], classes: Sequence[str], train_share: float, gap: Triple, rng: np.random.Generator
) -> tuple[list[Crop], list[Crop]]:
    """Crops that belong together, cut by one slab across the longest axis of what is annotated: (training, validation).

    The end that validates holds about ``1 - train_share`` of what is annotated on both sides; of the two ends, the one
    that leaves more classes with positives on both sides, ``rng`` decides if both do. Between the sides lies a gap that
    neither uses: the largest of ``gap`` (nm), whatever the axis, since neighboring sections look alike, but at most a
    quarter of the axis. Crops that reach across are on both sides, each with
    a region. If nothing is annotated, or in one plane only, everything is trained on.
    """
    found = [profile for crop in crops for profile in _profiles(crop, classes)]
    extents = [_extent([profiles[axis] for _, profiles in found]) for axis in range(3)]
    axis = int(np.argmax([high - low for low, high in extents]))
    low, high = extents[axis]
    profiles = [(name, per_axis[axis]) for name, per_axis in found]
    thickest = max((profile.thickness for _, profile in profiles), default=0.0)
    width = max(min(max(gap), _MOST_GAP * (high - low)), thickest)
    choices = []
    for is_first in rng.permutation([True, False]):
        faces = _best_faces(profiles, width, 1 - train_share, bool(is_first))
        if faces is not None:
            choices.append((_classes_on_both_sides(profiles, *faces), bool(is_first), faces))
    if not choices:
        return list(crops), []
    _, is_first, (below, above) = max(choices, key=lambda choice: choice[0])
    whole = reduce(Box.hull, [crop.box for crop in crops])
    lower = _parts(crops, whole, axis, whole.begin[axis], below)
    upper = _parts(crops, whole, axis, above, whole.end[axis])
    log.info(
        "%s: cut along %s, since whole crops cannot be held out: a gap of %.0f nm (half a patch is %.0f nm) lies "
        "between training and validation",
        ", ".join(crop.key for crop in crops), "zyx"[axis], above - below, max(gap),
    )  # fmt: skip
    return (upper, lower) if is_first else (lower, upper)


def _profiles(crop: Crop, classes: Sequence[str]) -> list[tuple[str, tuple[_Profile, _Profile, _Profile]]]:
    """Of each class that has an array, or whose atoms have one, in this crop: its profile along z, y and x."""
    found = []
    for class_name in classes:
        names = [class_name] if class_name in crop.labels else [a for a in atoms_of(class_name) if a in crop.labels]
        for name in names:
            label = crop.labels[name]
            levels = label.source.levels
            number = max((n for n, level in enumerate(levels) if n == 0 or level.grid.size >= _ENOUGH), default=0)
            full = levels[number].grid
            grid = crop.within(full)
            if not grid.size:
                continue
            first = full.index_range(grid.box)[0]
            sums = [np.zeros((2, n)) for n in grid.shape]
            depth = max(1, _SLAB // max(1, grid.shape[1] * grid.shape[2]))
            for begin, block in grid.blocks((depth, grid.shape[1], grid.shape[2])):
                stored = label.read_stored(np.add(first, begin), block.shape, number)
                present, known = label.annotation.decode(stored)
                for axis in range(3):
                    others = tuple(a for a in range(3) if a != axis)
                    at = slice(begin[axis], begin[axis] + block.shape[axis])
                    sums[axis][:, at] += known.sum(others), present.sum(others)
            volume = float(np.prod(grid.voxel_size))
            z, y, x = (
                _Profile(
                    grid.box.begin[axis] + grid.voxel_size[axis] * np.arange(grid.shape[axis], dtype=np.float64),
                    grid.voxel_size[axis],
                    sums[axis][0] * volume,
                    sums[axis][1] * volume,
                )
                for axis in range(3)
            )
            found.append((class_name, (z, y, x)))
    return found


def _extent(profiles: Sequence[_Profile]) -> tuple[float, float]:
    """From the first annotated plane's face to the last one's, nm; (0, 0) where nothing is annotated."""
    low = [p.begin[p.known > 0].min() for p in profiles if p.known.any()]
    high = [p.begin[p.known > 0].max() + p.thickness for p in profiles if p.known.any()]
    return (float(min(low)), float(max(high))) if low else (0.0, 0.0)


def _best_faces(
    profiles: Sequence[tuple[str, _Profile]], width: float, share: float, is_first: bool
) -> tuple[float, float] | None:
    """The faces of a gap of ``width`` nm for which the first (or last) side has nearest to ``share`` of what is
    annotated on both; None if no gap leaves something on both sides."""
    faces = np.unique(np.concatenate([p.begin + p.thickness for _, p in profiles])) if profiles else np.zeros(0)
    below = sum((_volume_below(p, p.known, faces) for _, p in profiles), np.zeros(len(faces)))
    above = sum((p.known.sum() - _volume_below(p, p.known, faces + width) for _, p in profiles), np.zeros(len(faces)))
    both = np.flatnonzero((below > 1e-9) & (above > 1e-9))
    if not len(both):
        return None
    held = (below if is_first else above)[both] / (below + above)[both]
    best = float(faces[both[int(np.argmin(np.abs(held - share)))]])
    return best, best + width


def _volume_below(profile: _Profile, volumes: NDArray[np.float64], faces: NDArray[np.float64]) -> NDArray[np.float64]:
    """What lies below each of some positions, planes that reach across counted by their share."""
    edges = np.append(profile.begin, profile.begin[-1] + profile.thickness)
    return np.interp(faces, edges, np.append(0.0, np.cumsum(volumes)))


def _classes_on_both_sides(profiles: Sequence[tuple[str, _Profile]], below: float, above: float) -> int:
    """How many classes are present on both sides of a gap."""
    sides: tuple[set[str], set[str]] = (set(), set())
    for name, p in profiles:
        lower, upper = _volume_below(p, p.present, np.array([below, above]))
        if lower > 1e-9:
            sides[0].add(name)
        if p.present.sum() - upper > 1e-9:
            sides[1].add(name)
    return len(sides[0] & sides[1])


def _parts(crops: Sequence[Crop], whole: Box, axis: int, begin: float, end: float) -> list[Crop]:
    """The crops between two positions on an axis, each with its region (none where it lies between them wholly)."""
    low, high = list(whole.begin), list(whole.end)
    low[axis], high[axis] = begin, end
    slab = Box(triple(low), triple(high))
    found = []
    for crop in crops:
        region = crop.box.intersect(slab)
        if not region.is_empty:
            found.append(crop if region == crop.box else replace(crop, region=region))
    return found
