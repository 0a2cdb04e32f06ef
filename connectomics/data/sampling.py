"""Where patches are taken: class-balanced positions from where a class is, reproducible from the seed alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from connectomics.cellmap.catalog import Crop
from connectomics.cellmap.classes import atoms_of
from connectomics.geometry import Triple, VoxelGrid, triple

_POINTS = 2048  # positions kept for each crop and class: enough that patches differ, small whatever the crop
_READ = 2**24  # label voxels read at once while looking for them


@dataclass(frozen=True)
class PatchRequest:
    """One patch to read: of which crop, through which point, with which random stream.

    Attributes:
        index: of the crop's volume in the data set.
        point: a world position (nm, z y x) that the patch must hold, or None for a uniform place in the crop.
        seed: of everything random about this patch: its exact place and its augmentation.
    """

    index: int
    point: Triple | None
    seed: tuple[int, ...]


def foreground_points(crop: Crop, class_name: str, seed: int) -> NDArray[np.float64]:
    """World positions (n, 3), nm, of voxels where a class is present: at most a few thousand, drawn evenly.

    Read from the coarsest level of the class's array (of its atoms' arrays where it has none), and from the finest one
    where the coarsest has lost everything. Empty where the class is not there.
    """
    names = [class_name] if class_name in crop.labels else [a for a in atoms_of(class_name) if a in crop.labels]
    rng = np.random.default_rng([seed, *class_name.encode()])
    found = [p for p in (_points_of(crop, name, rng) for name in names) if len(p)]
    if not found:
        return np.zeros((0, 3))
    points = np.concatenate(found)
    return points[rng.permutation(len(points))[:_POINTS]]


def _points_of(crop: Crop, name: str, rng: np.random.Generator) -> NDArray[np.float64]:
    label = crop.labels[name]
    levels = label.source.levels
    for number in dict.fromkeys((len(levels) - 1, 0)):
        grid = levels[number].grid
        edge = max(1, int(_READ / max(1, grid.shape[1] * grid.shape[2])))
        kept = np.zeros((0, 3))
        for begin, block in grid.blocks((edge, grid.shape[1], grid.shape[2])):
            index = np.flatnonzero(label.annotation.decode(label.read_stored(begin, block.shape, number))[0])
            if len(index) > _POINTS:
                index = rng.choice(index, _POINTS, replace=False)
            kept = np.concatenate([kept, block.to_world(np.stack(np.unravel_index(index, block.shape), axis=-1))])
        if len(kept):
            return kept
    return np.zeros((0, 3))


def place_patch(lattice: VoxelGrid, shape: Sequence[int], point: Triple | None, rng: np.random.Generator) -> VoxelGrid:
    """The grid of a patch of ``shape`` voxels on a crop's lattice.

    Uniform over the places where the patch lies in the crop; on an axis where the crop is smaller than the patch, over
    the places where it holds the whole crop. With a ``point`` (nm), over those of them that hold the point, so that it
    is not always in the middle.
    """
    begin = []
    index = None if point is None else np.floor(lattice.to_index(point) + 0.5).astype(int)
    for axis, (n, p) in enumerate(zip(lattice.shape, shape, strict=True)):
        lo, hi = min(0, n - p), max(0, n - p)
        if index is not None:
            at = int(np.clip(index[axis], 0, n - 1))
            lo, hi = max(lo, at - p + 1), min(hi, at)
        begin.append(int(rng.integers(lo, hi + 1)))
    return lattice.crop(begin, shape)


class PatchSampler:
    """Yields the `PatchRequest`s of an epoch: a function of (seed, epoch, position in the epoch) and of nothing else.

    A share ``balance`` of them goes through a voxel of a class: the class is drawn evenly among those that are present
    anywhere, then a crop evenly among those that have it, then a voxel evenly. The rest are uniform over the crops'
    volume. With several processes each takes every ``world``-th request, so all together see the same epoch.
    """

    def __init__(
        self,
        points: Sequence[dict[str, NDArray[np.float64]]],
        volumes_nm3: Sequence[float],
        length: int,
        *,
        balance: float,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """``points``: for each crop, the foreground positions by class; ``volumes_nm3``: for each crop, its volume."""
        self._points = points
        weights = np.asarray(volumes_nm3, dtype=np.float64)
        self._weights = weights / weights.sum()
        self._length = -(-length // world) * world  # every process must see as many patches, or training hangs
        self._balance = balance
        self._seed = seed
        self._rank, self._world = rank, world
        self._epoch = 0
        names = sorted({name for crop in points for name, found in crop.items() if len(found)})
        self._crops_with = {name: [i for i, crop in enumerate(points) if len(crop.get(name, ()))] for name in names}

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer before each epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._length // self._world

    def __iter__(self) -> Iterator[PatchRequest]:
        for position in range(self._rank, self._length, self._world):
            yield self.request(self._epoch, position)

    def request(self, epoch: int, position: int) -> PatchRequest:
        """The request at one position of one epoch."""
        seed = (self._seed, epoch, position)
        rng = np.random.default_rng(seed)
        names = list(self._crops_with)
        if names and rng.random() < self._balance:
            name = names[int(rng.integers(len(names)))]
            crops = self._crops_with[name]
            crop = crops[int(rng.integers(len(crops)))]
            found = self._points[crop][name]
            return PatchRequest(crop, triple(found[int(rng.integers(len(found)))]), (*seed, 1))
        return PatchRequest(int(rng.choice(len(self._weights), p=self._weights)), None, (*seed, 1))
