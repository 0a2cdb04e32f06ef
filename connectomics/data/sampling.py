"""Where patches are drawn: a mixture of strategies, reproducible from the seed."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from connectomics.data.foreground import ObjectPoints
from connectomics.data.holdout import capped_shares
from connectomics.data.regions import Regions, region_weights
from connectomics.errors import ConfigError, InputError, require_known
from connectomics.geometry import Triple, VoxelGrid, triple

T = TypeVar("T")

STRATEGIES = ("class", "dataset", "volume", "uniform", "instance", "hard")
DEFAULT_SAMPLING = {"class": 0.7, "volume": 0.3}

_INSIDE = 0.25  # share of tilings that lie inside the crop
_BLOCK = 256  # positions whose random numbers are drawn together


@dataclass(frozen=True)
class PatchRequest:
    """One patch to read: its crop, a point it contains, and its random stream."""

    index: int  # of the crop's volume in the data set
    point: Triple | None  # world position (nm, z y x) that the patch must contain; None for a uniform place in the crop
    seed: tuple[int, ...]  # random seed of the patch: its exact place and its augmentation
    drawn_by: str = ""  # "class mito", "instance mito", "dataset", ...; empty if no sampler drew it


@dataclass(frozen=True)
class SampledCrop:
    """What a sampler needs of a crop."""

    dataset: str
    volume: float  # in any unit that all crops share; > 0
    #: class -> world positions (n, 3), nm, where the class is present; empty or no key if it is not
    points: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    #: class -> positions in its objects, for ``instance``
    objects: Mapping[str, ObjectPoints] = field(default_factory=dict)


# -- the place of a patch ----------------------------------------------------------------------------------------------
def tilings(n: int, patch: int) -> tuple[int, int, int]:
    """How patches of ``patch`` voxels tile an axis of ``n`` voxels: ``(tiles, least, most)``.

    The tiles are adjacent and cover the whole axis; the first begins ``least`` to ``most`` voxels before it. So every
    voxel lies in exactly one tile of each tiling, and random tiles see voxels at the faces as often as those in the
    center. Each tile shares at least a quarter of itself with the axis (the whole axis if it is shorter than a patch).
    If the tiles would fit the axis nearly exactly, one more is used, so that there are many places to choose from.
    """
    if n <= patch:
        return 1, 0, patch - n
    tiles = -(-n // patch)
    beyond = tiles * patch - n
    if beyond < patch // 8:
        tiles, beyond = tiles + 1, beyond + patch
    most_outside = patch - -(-patch // 4)
    return tiles, max(0, beyond - most_outside), min(beyond, most_outside)


def place_patch(lattice: VoxelGrid, shape: Sequence[int], point: Triple | None, rng: np.random.Generator) -> VoxelGrid:
    """Return the grid of a patch of ``shape`` voxels on a crop's lattice: a random tile of a random tiling.

    Patches reach beyond the crop, where raw is read and labels are unknown, and see every voxel of the crop equally
    often. On each axis, a quarter of the tilings is moved inside the crop: these patches hold more labels, and voxels
    where two of them overlap are seen 1.25 times as often as others (1.25^3 = 1.95 in a corner of three overlaps). If
    the crop is smaller than the patch, the patch holds the whole crop. With a ``point`` (nm), a tile that contains it.
    """
    begin = []
    index = None if point is None else np.floor(lattice.to_index(point) + 0.5).astype(int)
    for axis, (n, p) in enumerate(zip(lattice.shape, shape, strict=True)):
        tiles, least, most = tilings(n, p)
        before, is_inside = int(rng.integers(least, most + 1)), rng.random() < _INSIDE
        begins = [t * p - before for t in range(tiles)]
        if tiles > 1 and is_inside:
            begins = [t * (n - p) // (tiles - 1) for t in range(tiles)]
        if index is not None:
            at = int(np.clip(index[axis], 0, n - 1))
            begins = [b for b in begins if b <= at < b + p]
        begin.append(begins[int(rng.integers(len(begins)))])
    return lattice.crop(begin, shape)


def _inside(lattice: VoxelGrid, patch: VoxelGrid) -> VoxelGrid:
    """A patch shifted inside the crop, or so that it holds the crop if that is smaller."""
    begin = np.round(lattice.to_index(patch.translation)).astype(int)
    spare = np.subtract(lattice.shape, patch.shape)
    return lattice.crop(np.clip(begin, np.minimum(0, spare), np.maximum(0, spare)).tolist(), patch.shape)


def place_known(
    lattice: VoxelGrid,
    shape: Sequence[int],
    point: Triple | None,
    rng: np.random.Generator,
    known_share: Callable[[VoxelGrid], float],
    least: float,
    tries: int = 8,
) -> VoxelGrid:
    """Return a grid of `place_patch` with at least a share of known voxels, if the crop has such a place.

    Draws up to ``tries`` places, the later half shifted inside the crop, and returns the first with a known share
    of at least ``least`` (0 to 1; 0 accepts the first), or the best. For a crop smaller than the patch, ``least`` is
    relative to the largest possible share.
    """
    best = place_patch(lattice, shape, point, rng)
    if least <= 0:
        return best
    reachable = math.prod(min(n, p) / p for n, p in zip(lattice.shape, shape, strict=True))
    most = known_share(best)
    for number in range(1, tries):
        if most >= least * reachable:
            break
        grid = place_patch(lattice, shape, point, rng)
        if number >= tries // 2:
            grid = _inside(lattice, grid)
        share = known_share(grid)
        if share > most:
            best, most = grid, share
    return best


# -- the sampler -------------------------------------------------------------------------------------------------------
def check_sampling(
    sampling: Mapping[str, float], class_weights: Mapping[str, float], classes: Sequence[str]
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the weight of every strategy (default `DEFAULT_SAMPLING`) and of every class (default 1).

    Raises:
        UnknownNameError: an unknown strategy or class.
        ConfigError: a weight that is not a number >= 0.
    """
    require_known("strategy", sampling, STRATEGIES, "data.sampling")
    require_known("class", class_weights, classes, "data.class_weights (of dataset.classes)")
    for key, weights in (("data.sampling", sampling), ("data.class_weights", class_weights)):
        for name, weight in weights.items():
            number = isinstance(weight, int | float) and not isinstance(weight, bool)
            if not number or not math.isfinite(weight) or weight < 0:
                raise ConfigError(f"{key}: the weight of {name!r} is {weight!r}; give a number of at least 0")
    mixture = {name: float((sampling or DEFAULT_SAMPLING).get(name, 0.0)) for name in STRATEGIES}
    if not sum(mixture.values()) > 0:
        raise ConfigError(f"data.sampling: all weights are 0; give one of {', '.join(STRATEGIES)} a weight above 0")
    return mixture, {name: float(class_weights.get(name, 1.0)) for name in classes}


class _Wheel:
    """Draws one of some items in proportion to their weights, from a number in [0, 1)."""

    def __init__(self, weights: Mapping[int, float]) -> None:
        self._items = [item for item, weight in weights.items() if weight > 0]
        self._edges = list(accumulate(weights[item] for item in self._items))

    def __call__(self, u: float) -> int:
        return self._items[min(bisect_right(self._edges, u * self._edges[-1]), len(self._items) - 1)]


class PatchSampler:
    """Yields the `PatchRequest`s of an epoch, which depend only on (seed, epoch, position in the epoch).

    Each is drawn by one of six strategies, mixed by ``sampling``:

    - ``class``: a class by its weight among those that are present anywhere, then a crop evenly among those that have
      it, so that a large crop does not dominate, then one of its positions evenly;
    - ``dataset``: a data set evenly, then a crop of it by volume, then a uniform place;
    - ``volume``: a crop by capped volume (`connectomics.data.holdout.capped_shares`), then a uniform place;
    - ``uniform``: a crop evenly, then a uniform place;
    - ``instance``: a class by its weight among those with objects, then one of its objects in all crops evenly, then
      one of the object's positions evenly: a small object is seen as often as a large one;
    - ``hard``: a region of a crop by its recent loss (`prefer`, `connectomics.data.regions`), then a place in it.
      The weights change between epochs only, so that requests do not depend on how far ahead workers read.

    Strategies and classes are drawn stratified: of 256 successive requests from a multiple of 256 on, each has its
    share to within two. With several processes each takes every ``world``-th request, so all together see one epoch.
    """

    def __init__(
        self,
        crops: Sequence[SampledCrop],
        length: int,
        *,
        classes: Sequence[str],
        sampling: Mapping[str, float] | None = None,
        class_weights: Mapping[str, float] | None = None,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        regions: Regions | None = None,
    ) -> None:
        """``crops`` in the order of the data set's volumes; ``length``: requests an epoch, of all processes together,
        rounded up so that each process has as many (else training hangs). ``regions``: of the crops, for ``hard``.

        Raises as `check_sampling`, and `ConfigError` if nothing can be drawn by the strategies that have a weight.
        """
        if not crops or length < 1 or min(crop.volume for crop in crops) <= 0:
            raise InputError(f"a sampler needs crops with a volume and a length, found {len(crops)} crops, {length}")
        mixture, weights = check_sampling(sampling or {}, class_weights or {}, classes)
        if mixture["hard"] > 0 and regions is None:
            raise InputError("a sampler needs regions of the crops to draw hard ones; pass regions=Regions.of(...)")
        self._points = [crop.points for crop in crops]
        self.regions = regions
        self.prefer(None)
        self._length = -(-length // world) * world
        self._seed, self._rank, self._world = seed, rank, world
        self._epoch = 0
        self._start: tuple[int, int] | None = None
        self._block: tuple[int, int, list[list[float]]] | None = None
        having = {c: [i for i, crop in enumerate(crops) if len(crop.points.get(c, ()))] for c in classes}
        #: the classes that requests are drawn for
        self.drawn_classes = tuple(c for c in classes if having[c] and weights[c] > 0 and mixture["class"] > 0)
        self._having = {c: having[c] for c in self.drawn_classes}
        self._objects = {c: [crop.objects.get(c) for crop in crops] for c in classes if mixture["instance"] > 0}
        self._object_starts = {
            c: np.cumsum([0, *(0 if found is None else len(found) for found in of_crops)])
            for c, of_crops in self._objects.items()
        }
        with_objects = [c for c, starts in self._object_starts.items() if starts[-1] and weights[c] > 0]
        outcomes = {f"class {c}": weights[c] for c in self.drawn_classes}
        outcomes = _scaled(outcomes, mixture["class"]) | {s: mixture[s] for s in ("dataset", "volume", "uniform")}
        outcomes |= _scaled({f"instance {c}": weights[c] for c in with_objects}, mixture["instance"])
        outcomes["hard"] = mixture["hard"]
        if not sum(outcomes.values()) > 0:
            only = " and ".join(name for name, weight in mixture.items() if weight > 0)
            what = "present" if mixture["class"] > 0 else "annotated with IDs"
            raise ConfigError(
                f"data.sampling: only {only} has a weight, but none of {', '.join(classes)} is {what} in the training "
                "crops with a weight above 0; give volume or uniform a weight, or take other crops or classes"
            )
        self._labels = [(label, *label.partition(" ")[::2]) for label in outcomes]  # with strategy and class
        self._outcome = _Wheel(dict(enumerate(outcomes.values())))
        self._by_volume = _by_volume(crops, range(len(crops)))
        of_dataset: dict[str, list[int]] = {}
        for number, crop in enumerate(crops):
            of_dataset.setdefault(crop.dataset, []).append(number)
        self._of_dataset = [_by_volume(crops, of_dataset[name]) for name in sorted(of_dataset)]

    @property
    def epoch(self) -> int:
        """The epoch that the next iteration gives."""
        return self._epoch

    def prefer(self, losses: NDArray[np.float64] | None) -> None:
        """Set the recent loss of every region (R,), by which ``hard`` draws them; NaN: there is none.

        None draws evenly. Call it between epochs, in all processes with the same losses.
        """
        n = 0 if self.regions is None else len(self.regions)
        self._region_edges = np.cumsum(region_weights(np.full(n, np.nan) if losses is None else losses))

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; the trainer calls this before each epoch."""
        self._epoch = epoch

    def start_at(self, epoch: int, position: int) -> None:
        """Let the next iteration, if it is of ``epoch``, begin at this process's request number ``position``. Sets the
        epoch to ``epoch``."""
        self._epoch = epoch
        self._start = (epoch, position)

    def __len__(self) -> int:
        """Requests of this process in a whole epoch."""
        return self._length // self._world

    def __iter__(self) -> Iterator[PatchRequest]:
        epoch = self._epoch
        first = self._start[1] if self._start is not None and self._start[0] == epoch else 0
        self._start = None
        return (self.request(epoch, n * self._world + self._rank) for n in range(first, len(self)))

    def request(self, epoch: int, position: int) -> PatchRequest:
        """Return the request at one position of one epoch, of all processes together."""
        what, first, second = self._numbers(epoch, position)
        label, strategy, name = self._labels[self._outcome(what)]
        seed = (self._seed, epoch, position, 1)
        if strategy == "class":
            crop = _pick(self._having[name], first)
            found = self._points[crop][name]
            return PatchRequest(crop, triple(found[int(second * len(found))]), seed, label)
        if strategy == "instance":
            starts = self._object_starts[name]
            number = int(first * starts[-1])
            crop = int(np.searchsorted(starts, number, side="right")) - 1
            objects = self._objects[name][crop]
            assert objects is not None
            return PatchRequest(crop, objects.of(number - int(starts[crop]), second), seed, label)
        if label == "hard":
            assert self.regions is not None
            region = int(np.searchsorted(self._region_edges, first * self._region_edges[-1], side="right"))
            place = np.random.default_rng((self._seed, epoch, position, 2)).random(3)
            return PatchRequest(*self.regions.place(min(region, len(self.regions) - 1), place), seed, label)
        if label == "dataset":
            return PatchRequest(_pick(self._of_dataset, first)(second), None, seed, label)
        if label == "volume":
            return PatchRequest(self._by_volume(first), None, seed, label)
        return PatchRequest(int(first * len(self._points)), None, seed, label)

    def _numbers(self, epoch: int, position: int) -> list[float]:
        """Three numbers in [0, 1) of a position, drawn in blocks: a generator costs as much as many draws."""
        number, row = divmod(position, _BLOCK)
        if self._block is None or self._block[:2] != (epoch, number):
            rng = np.random.default_rng((self._seed, epoch, number))
            drawn = rng.random((_BLOCK, 3))
            drawn[:, 0] = (rng.permutation(_BLOCK) + drawn[:, 0]) / _BLOCK  # one in each of as many equal strata
            self._block = (epoch, number, drawn.tolist())
        return self._block[2][row]


def _scaled(weights: Mapping[str, float], total: float) -> dict[str, float]:
    """Return the weights so that their sum is ``total``."""
    factor = total / (sum(weights.values()) or 1.0)
    return {name: factor * weight for name, weight in weights.items()}


def _by_volume(crops: Sequence[SampledCrop], numbers: Sequence[int]) -> _Wheel:
    """Draws one of some crops by their capped volume."""
    shares = capped_shares(np.array([crops[n].volume for n in numbers]))
    return _Wheel(dict(zip(numbers, shares.tolist(), strict=True)))


def _pick(items: Sequence[T], u: float) -> T:
    return items[int(u * len(items))]
