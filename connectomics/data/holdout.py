"""What is held out for validation: whole groups of crops, or one end of a group that must be cut."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from connectomics.cellmap.catalog import Crop
from connectomics.cellmap.classes import arrays_for
from connectomics.errors import InputError
from connectomics.geometry import Box, Triple, other_axes

log = logging.getLogger(__name__)

_LEAST_SHARE = 0.05  # that a group or crop may have of a whole, however many there are
_STEPS = 1000


def capped_shares(volumes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return shares (n,) of a whole by volume (n,) >= 0, none above twice an even share or 5 %, whichever is larger.

    A few crops annotated at coarse voxel sizes hold nearly all of the annotated volume of a collection; without a cap
    only they would be drawn, or count. What the largest lose is spread over the others by volume. Volumes that are all
    0 give shares of 0.
    """
    values = np.asarray(volumes, np.float64)
    order = np.argsort(-values, kind="stable")
    there = int(np.count_nonzero(values))
    shares = np.zeros(len(values))
    most = max(_LEAST_SHARE, 2 / max(1, there))
    left = 1.0
    for number, at in enumerate(order[:there]):
        rest = order[number:there]
        parts = values[rest] / values[rest].sum() * left
        if parts[0] <= most:
            shares[rest] = parts
            break
        shares[at] = min(most, left)
        left -= shares[at]
    return shares


def held_out_groups(
    known: NDArray[np.float64], present: NDArray[np.float64], share: float, rng: np.random.Generator
) -> list[int]:
    """Return the numbers of the groups to hold out, ascending; empty if no group can be spared.

    The only group with a class is never held out. Among the others, the choice comes as close as possible to ``share``
    of the annotated volume and of the present volume of each class, both capped (`capped_shares`), with every class on
    both sides if two groups have it, and with at most that share of the uncapped volume.

    Args:
        known: annotated volume of each group, (n,).
        present: present volume of each class in each group, (n, C).
        share: wanted share, above 0 and below 1.
        rng: chooses where the search starts.
    """
    having = (present > 0).sum(axis=0)
    spare = np.flatnonzero(~(present[:, having == 1] > 0).any(axis=1))
    if len(known) < 2 or len(spare) == 0:
        return []
    several = having >= 2
    volumes = np.column_stack([known, present[:, several]])
    shares = np.stack([capped_shares(column) for column in volumes.T], axis=1)
    there = present[:, several] > 0
    plain = known / (known.sum() or 1.0)

    def losses(sides: NDArray[np.bool_]) -> NDArray[np.float64]:
        """The loss of each choice (m, n): small if all shares are as wanted and no class is missing on a side."""
        chosen = sides.astype(np.float64)
        off = (chosen @ shares - share) ** 2
        too_much = np.maximum(0.0, chosen @ plain - share) ** 2
        unseen = (chosen @ there == 0).sum(axis=1)
        lost = ((1 - chosen) @ there == 0).sum(axis=1)
        empty = ~sides.any(axis=1) | sides.all(axis=1)
        of_classes = off[:, 1:].sum(axis=1) / max(1, off.shape[1] - 1)
        return 4 * too_much + off[:, 0] + of_classes + unseen + 10 * lost + 1e6 * empty

    best = np.zeros(len(known), bool)
    for number in rng.permutation(spare):
        if best.any() and shares[best, 0].sum() >= share:
            break
        best[number] = True
    least = float(losses(best[None])[0])
    for _ in range(_STEPS):
        moves = _moves(best, spare)
        found = losses(moves)
        number = int(np.argmin(found))
        if found[number] >= least - 1e-12:
            break
        best, least = moves[number], float(found[number])
    return [] if best.all() or not best.any() else np.flatnonzero(best).tolist()


def _moves(side: NDArray[np.bool_], spare: NDArray[np.intp]) -> NDArray[np.bool_]:
    """All choices (m, n) that differ by one group, or by one exchange of two groups."""
    single = np.repeat(side[None], len(spare), axis=0)
    single[np.arange(len(spare)), spare] ^= True
    out, into = np.flatnonzero(side), spare[~side[spare]]
    pairs = np.repeat(side[None], len(out) * len(into), axis=0)
    rows = np.arange(len(pairs))
    pairs[rows, np.repeat(out, len(into))] = False
    pairs[rows, np.tile(into, len(out))] = True
    return np.concatenate([single, pairs])


# -- cutting a group -------------------------------------------------------------------------------------------------
_ENOUGH = 2**18  # voxels of a label level that suffice to see where annotation lies
_MOST_GAP = 0.25  # of the length that is cut


@dataclass(frozen=True)
class _Profile:
    """One class in one crop along one axis: begin of each plane (nm), plane thickness (nm), and the annotated and
    present volume of each plane (nm^3)."""

    begin: NDArray[np.float64]
    thickness: float
    known: NDArray[np.float64]
    present: NDArray[np.float64]


def cut(
    crops: Sequence[Crop], classes: Sequence[str], train_share: float, gap: Triple, rng: np.random.Generator
) -> tuple[list[Crop], list[Crop]]:
    """Cut crops that belong together across the longest axis of their annotation; return (training, validation).

    The validation end holds about ``1 - train_share`` of what is annotated on both sides. It is the end that leaves
    more classes with positives on both sides; ``rng`` decides a tie. Neither side uses the gap between them: the
    largest of ``gap`` (nm) on any axis, since neighboring sections look alike, but at most a quarter of the axis.
    Crops that reach across are on both sides, each with a region. If at most one plane is annotated, everything is for
    training.
    """
    axis, width, profiles = _along_the_longest_axis(crops, classes, gap)
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


def slabs(
    crops: Sequence[Crop], classes: Sequence[str], number: int, gap: Triple
) -> list[tuple[list[Crop], list[Crop]]]:
    """Cut crops that belong together into ``number`` slabs across the longest axis of their annotation; return
    (training, validation) for each slab: the slab validates, the rest trains.

    All slabs hold about the same annotated volume. As in `cut`, neither side uses a gap on both faces of the slab.

    Raises:
        InputError: too little is annotated for so many slabs.
    """
    axis, width, profiles = _along_the_longest_axis(crops, classes, gap)
    faces, below = _faces(profiles)
    whole = reduce(Box.hull, [crop.box for crop in crops])
    wanted = below[-1] * np.arange(1, number) / number if len(faces) else np.zeros(0)
    cuts = [float(faces[int(np.argmin(np.abs(below - volume)))]) for volume in wanted]
    bounds = [whole.begin[axis], *cuts, whole.end[axis]]
    found = []
    for begin, end in pairwise(bounds):
        rest = [(whole.begin[axis], begin - width), (end + width, whole.end[axis])]
        train = [part for low, high in rest if high > low for part in _parts(crops, whole, axis, low, high)]
        found.append((train, _parts(crops, whole, axis, begin, end) if end > begin else []))
    if len(found) < number or not all(train and held for train, held in found):
        names = ", ".join(crop.key for crop in crops)
        raise InputError(
            f"{names}: cannot be cut into {number} parts along {'zyx'[axis]} with gaps of {width:.0f} nm (half a "
            "patch); use fewer folds or smaller patches"
        )
    return found


def _along_the_longest_axis(
    crops: Sequence[Crop], classes: Sequence[str], gap: Triple
) -> tuple[int, float, list[tuple[str, _Profile]]]:
    """The longest axis of the annotation, the width of a gap on it (nm), and the classes' profiles along it."""
    found = [profile for crop in crops for profile in _profiles(crop, classes)]
    extents = [_extent([profiles[axis] for _, profiles in found]) for axis in range(3)]
    axis = int(np.argmax([high - low for low, high in extents]))
    low, high = extents[axis]
    profiles = [(name, per_axis[axis]) for name, per_axis in found]
    thickest = max((profile.thickness for _, profile in profiles), default=0.0)
    return axis, max(min(max(gap), _MOST_GAP * (high - low)), thickest), profiles


def _profiles(crop: Crop, classes: Sequence[str]) -> list[tuple[str, tuple[_Profile, _Profile, _Profile]]]:
    """The profiles along z, y and x of each class that has an array, or whose atoms have one, in this crop."""
    found = []
    for class_name in classes:
        for name in arrays_for(class_name, crop.labels):
            label = crop.labels[name]
            levels = label.source.levels
            number = max((n for n, level in enumerate(levels) if n == 0 or level.grid.size >= _ENOUGH), default=0)
            grid = crop.within(levels[number].grid)
            if not grid.size:
                continue
            sums = [np.zeros((2, n)) for n in grid.shape]
            for begin, block, _, present, known in label.blocks(grid, number):
                for axis in range(3):
                    at = slice(begin[axis], begin[axis] + block.shape[axis])
                    sums[axis][:, at] += known.sum(other_axes(axis)), present.sum(other_axes(axis))
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


def _faces(profiles: Sequence[tuple[str, _Profile]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The upper faces of all sections, ascending, and how much is annotated below each."""
    faces = np.unique(np.concatenate([p.begin + p.thickness for _, p in profiles])) if profiles else np.zeros(0)
    return faces, sum((_volume_below(p, p.known, faces) for _, p in profiles), np.zeros(len(faces)))


def _best_faces(
    profiles: Sequence[tuple[str, _Profile]], width: float, share: float, is_first: bool
) -> tuple[float, float] | None:
    """The faces of a gap of ``width`` nm for which the first (or last) side has nearest to ``share`` of what is
    annotated on both; None if no gap leaves something on both sides."""
    faces, below = _faces(profiles)
    above = sum((p.known.sum() - _volume_below(p, p.known, faces + width) for _, p in profiles), np.zeros(len(faces)))
    both = np.flatnonzero((below > 1e-9) & (above > 1e-9))
    if not len(both):
        return None
    held = (below if is_first else above)[both] / (below + above)[both]
    best = float(faces[both[int(np.argmin(np.abs(held - share)))]])
    return best, best + width


def _volume_below(profile: _Profile, volumes: NDArray[np.float64], faces: NDArray[np.float64]) -> NDArray[np.float64]:
    """The volume below each position; a plane that reaches across counts by its share."""
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
    regions = [(crop, crop.box.intersect(whole.between(axis, begin, end))) for crop in crops]
    return [crop if part == crop.box else replace(crop, region=part) for crop, part in regions if not part.is_empty]
