"""Boxes of raw that somebody could annotate next, and which of them to choose.

Candidates are boxes of one size on a lattice that begins at the raw's first face, so they never overlap each other.
Boxes that hold annotated voxels, lie near what is held out, or lack raw are left out.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from connectomics.cellmap.catalog import Crop
from connectomics.cellmap.labels import read_labels
from connectomics.geometry import Box, Index, Triple, VoxelGrid, index, triple
from connectomics.io.multiscale import Multiscale

log = logging.getLogger(__name__)

Marks = NDArray[np.bool_]
Floats = NDArray[np.float64]

METHODS = ("uncertainty", "random", "even")
_DRAWN = 100_000  # places of a data set that are looked at, at most, to find enough candidates
_FACE = 1e-6  # nm: boxes that share a face do not overlap


@dataclass(frozen=True)
class Area:
    """Where boxes of one data set may lie.

    Attributes:
        dataset: its name. raw: its raw. box: the part of the raw to choose from, nm; None: nothing is chosen there.
        crops: what is annotated. held: boxes (nm) that stay out of the training, with the distance to keep from them.
        inside: returns whether a box, by its grid, is wanted.
    """

    dataset: str
    raw: Multiscale
    box: Box | None
    crops: Sequence[Crop]
    held: Sequence[Box]
    inside: Callable[[VoxelGrid], bool] = field(default=lambda grid: True)

    def candidates(
        self, size: Index, voxel_size: Triple, classes: Sequence[str], most: int, rng: np.random.Generator
    ) -> tuple[list[VoxelGrid], Counter[str]]:
        """Return at most ``most`` free boxes, drawn at random, in z-y-x order, and why how many others are not free.

        Args:
            size: voxels, z y x. voxel_size: nm. classes: a box is annotated where one of these is known.
        """
        box = self.raw.grid.box if self.box is None else self.box.intersect(self.raw.grid.box)
        whole = [int(n / v + 1e-3) for n, v in zip(box.extent, voxel_size, strict=True)]
        first = triple(np.add(box.begin, np.divide(voxel_size, 2)))
        lattice = VoxelGrid(voxel_size, first, index(whole))
        shape = [n // s for n, s in zip(whole, size, strict=True)]
        places = int(np.prod(shape, dtype=np.int64))
        found, refused = [], Counter[str](["data set smaller than a box"] * (places == 0))
        drawn = rng.choice(places, size=min(places, max(_DRAWN, 2 * most)), replace=False)
        for number in drawn:
            grid = lattice.crop(np.multiply(np.unravel_index(int(number), shape), size).tolist(), size)
            why = self._refusal(grid, classes)
            if why is None:
                found.append((int(number), grid))
            else:
                refused[why] += 1
            if len(found) == most:
                break
        return [grid for _, grid in sorted(found, key=lambda item: item[0])], refused

    def _refusal(self, grid: VoxelGrid, classes: Sequence[str]) -> str | None:
        if any(_overlap(grid.box, box) for box in self.held):
            return "at or near held-out crops"
        for crop in self.crops:
            if _overlap(grid.box, crop.box) and read_labels(crop, classes, grid.part(crop.box)[1]).known.any():
                return "annotated"
        if not self.inside(grid):
            return "outside the mask"
        return None if has_content(self.raw, grid) else "without raw"


def _overlap(first: Box, second: Box) -> bool:
    return not first.intersect(second).grow(-_FACE / 2).is_empty


def has_content(raw: Multiscale, grid: VoxelGrid, block: Index = (64, 256, 256)) -> bool:
    """Return whether every voxel of ``grid`` has raw, and not all have one value; reads one ``block`` at a time."""
    low, high = np.inf, -np.inf
    for _, part in grid.blocks(block):
        values, inside = raw.read_raw(part)
        if not inside.all():
            return False
        low, high = min(low, float(values.min())), max(high, float(values.max()))
    return high > low


def annotated_boxes(
    crops: Sequence[Crop], size: Index, voxel_size: Triple, most: int, rng: np.random.Generator
) -> list[VoxelGrid]:
    """Return at most ``most`` boxes of ``size`` voxels in crops: side by side, or in the middle of a smaller crop."""
    found = []
    for crop in crops:
        extent = np.multiply(size, voxel_size)
        counts = np.maximum(1, np.floor(np.divide(crop.box.extent, extent) + 1e-3).astype(int))
        corner = np.asarray(crop.box.center) - counts * extent / 2
        numbers = rng.choice(int(counts.prod()), size=min(most, int(counts.prod())), replace=False)
        for at in np.stack(np.unravel_index(numbers, counts), axis=1):
            found.append(VoxelGrid.centered(corner + (at + 0.5) * extent, voxel_size, size))
    if not found:
        return []
    return [found[n] for n in sorted(rng.choice(len(found), size=min(most, len(found)), replace=False))]


# -- which to choose ---------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Pool:
    """Candidates and what is known of them, N of them of G data sets.

    Attributes:
        boxes: of each candidate, nm. groups: number of each one's data set, (N,).
        annotated: boxes that are annotated. annotated_groups: their data sets.
        uncertainty: (N,), see `Observer.look`. features: (N, F). annotated_features: of annotated boxes, (K, F).
        reach: nm; a box this far from all others counts half for its distance.
    """

    boxes: Sequence[Box]
    groups: NDArray[np.int64]
    annotated: Sequence[Box] = ()
    annotated_groups: Sequence[int] = ()
    uncertainty: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    features: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)))
    annotated_features: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)))
    reach: float = 1.0

    @property
    def centers(self) -> NDArray[np.float64]:
        return np.array([box.center for box in self.boxes])

    def distances(self, box: Box, group: int) -> NDArray[np.float64]:
        """Return the distance (nm) of each candidate's center to a box of a data set; infinity in other data sets."""
        outside = np.maximum(np.subtract(box.begin, self.centers), self.centers - box.end)
        return np.where(self.groups == group, np.linalg.norm(np.maximum(outside, 0), axis=1), np.inf)

    def nearest_annotated(self) -> NDArray[np.float64]:
        """Return the distance of each candidate to what is annotated in its data set, nm; infinity if nothing is."""
        found = np.full(len(self.boxes), np.inf)
        for box, group in zip(self.annotated, self.annotated_groups, strict=True):
            found = np.minimum(found, self.distances(box, group))
        return found


@dataclass(frozen=True)
class Choice:
    """A chosen candidate: its number, and at the time of the choice its score, novelty and distance (nm) to the nearest
    annotated or chosen box of its data set; NaN if the method does not use them, or there is no such box."""

    number: int
    score: float = float("nan")
    novelty: float = float("nan")
    distance: float = float("nan")


def choose_random(pool: Pool, budget: int, rng: np.random.Generator) -> list[Choice]:
    """Return candidates drawn at random."""
    return [Choice(int(number)) for number in rng.permutation(len(pool.boxes))[:budget]]


def choose_even(pool: Pool, budget: int) -> list[Choice]:
    """Return candidates spread evenly: the data sets take turns, and each gives the box that is farthest from all that
    is annotated or chosen in it (Gonzalez, Theor. Comput. Sci. 38, 1985); the first one is in the middle."""
    middle = np.array([pool.centers[pool.groups == group].mean(0) for group in pool.groups])
    to_middle = np.linalg.norm(pool.centers - middle, axis=1)

    def choose(free: Marks, taken: Floats, distance: Floats) -> Choice:
        turn = free & (taken == taken[free].min())
        value = np.where(np.isinf(distance), -to_middle, distance)
        best = int(np.argmax(np.where(turn, value, -np.inf)))
        return Choice(best, distance=float(distance[best]))

    return _one_by_one(pool, budget, choose)


def choose_uncertain(pool: Pool, budget: int) -> list[Choice]:
    """Return candidates by uncertainty times novelty, spread over space and data sets, the best first.

    Each step takes the largest u f d / (d + r) / (1 + n): uncertainty u; novelty f, the distance to the nearest
    annotated or chosen box in feature space (k-center greedy, Sener and Savarese, arXiv:1708.00489), root mean square
    over features that are scaled to a standard deviation of 1; distance d in space and ``reach`` r, both nm; and n
    boxes already chosen in the data set (divisors of D'Hondt). f is 1 if nothing is annotated or chosen, and so is
    d / (d + r) in a data set without any.
    """
    own, known = pool.features, pool.annotated_features.reshape(-1, pool.features.shape[1])
    together = np.concatenate([own, known])
    scale = together.std(0)
    own, known = (values[:, scale > 0] / scale[scale > 0] for values in (own, known))

    def apart(one: Floats) -> Floats:
        return np.sqrt(np.square(own - one).mean(1)) if own.shape[1] else np.zeros(len(own))

    novelty = np.full(len(own), np.inf)
    for one in known:
        novelty = np.minimum(novelty, apart(one))

    def choose(free: Marks, taken: Floats, distance: Floats) -> Choice:
        new = np.where(np.isinf(novelty), 1.0, novelty)
        spread = 1 - pool.reach / (distance + pool.reach)
        score = pool.uncertainty * new * spread / (1 + taken)
        best = int(np.argmax(np.where(free, score, -1.0)))
        nearest = float(novelty[best]) if np.isfinite(novelty[best]) else float("nan")
        np.minimum(novelty, apart(own[best]), out=novelty)
        return Choice(best, float(score[best]), nearest, float(distance[best]))

    return _one_by_one(pool, budget, choose)


def _one_by_one(pool: Pool, budget: int, choose: Callable[[Marks, Floats, Floats], Choice]) -> list[Choice]:
    """Return candidates in the order of ``choose``, which gets for each whether it is free, how many are chosen in its
    data set, and its distance (nm) to the nearest annotated or chosen box of it."""
    distance, taken, found = pool.nearest_annotated(), np.zeros(int(pool.groups.max()) + 1), list[Choice]()
    free = np.ones(len(pool.boxes), bool)
    while free.any() and len(found) < budget:
        found.append(choose(free, taken[pool.groups], distance))
        best = found[-1].number
        group = int(pool.groups[best])
        free[best], taken[group] = False, taken[group] + 1
        distance = np.minimum(distance, pool.distances(pool.boxes[best], group))
    return found
