"""Where a class and its objects are in a crop: random positions, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from connectomics.cellmap.catalog import Crop
from connectomics.cellmap.classes import arrays_for
from connectomics.geometry import Triple, VoxelGrid, triple

_POINTS = 2048  # positions kept for each crop and class: enough that patches differ, small whatever the crop
_PIECE = 2**20  # voxels that get their random priorities at once
_OBJECT_POINTS = 2**18  # positions kept of all objects of a class in a crop: 6 MB; each object has at least one
_MOST_OF_ONE = 512  # positions of one object


class Reservoir:
    """A uniform random choice without replacement from a stream of items, in bounded memory.

    Every item gets a random priority, and the smallest stay (Efraimidis and Spirakis 2006): the choice depends on the
    order of items and the random stream, not on the pieces in which they arrive.
    """

    def __init__(self, count: int, rng: np.random.Generator) -> None:
        self._count, self._rng = count, rng
        self._priorities = np.zeros(0)
        self._items = np.zeros((0, 3))

    def __len__(self) -> int:
        return len(self._items)

    @property
    def items(self) -> NDArray[np.float64]:
        """The chosen items, (n, 3), in random order."""
        return self._items[np.argsort(self._priorities)]

    def add(self, n: int, items: Callable[[NDArray[np.intp]], NDArray[np.float64]], weight: float = 1.0) -> None:
        """Offer ``n`` items, each with a chance in proportion to ``weight``; ``items(numbers)`` gives some of them."""
        priorities = self._rng.standard_exponential(n) / weight
        if len(self._items) == self._count:
            chosen = np.flatnonzero(priorities < self._priorities.max())
        else:
            chosen = np.arange(n)
        if len(chosen) > self._count:
            chosen = chosen[np.argpartition(priorities[chosen], self._count)[: self._count]]
        merged = np.concatenate([self._priorities, priorities[chosen]])
        kept = np.concatenate([self._items, items(chosen)])
        order = np.argsort(merged, kind="stable")[: self._count]
        self._priorities, self._items = merged[order], kept[order]


def foreground_points(crop: Crop, class_name: str, seed: int) -> NDArray[np.float64]:
    """Return world positions (n, 3), nm, of voxels where a class is present: at most 2048, uniform over its volume.

    Reads the coarsest level of the class's array (of its atoms' arrays if it has none), or the finest level if the
    class is lost in the coarsest. Empty if the class is not present.
    """
    kept = Reservoir(_POINTS, np.random.default_rng([seed, *class_name.encode()]))
    for name in arrays_for(class_name, crop.labels):
        _offer_points(crop, name, kept)
    return kept.items


def _offer_points(crop: Crop, name: str, kept: Reservoir) -> None:
    """Offer every voxel of one array in which its class is present, weighted by the voxel's volume."""
    label = crop.labels[name]
    levels = label.source.levels
    for number in dict.fromkeys((len(levels) - 1, 0)):
        volume = float(np.prod(levels[number].grid.voxel_size))
        found = 0
        for _, block, _, there, _ in label.blocks(crop.within(levels[number].grid), number):
            present = there.reshape(-1)
            for start in range(0, present.size, _PIECE):
                index = np.flatnonzero(present[start : start + _PIECE]) + start
                found += len(index)
                kept.add(len(index), _positions(block, index), volume)
        if found:
            return


def _positions(block: VoxelGrid, index: NDArray[np.intp]) -> Callable[[NDArray[np.intp]], NDArray[np.float64]]:
    return lambda numbers: block.to_world(np.stack(np.unravel_index(index[numbers], block.shape), axis=-1))


# -- objects -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ObjectPoints:
    """Positions in the objects of one class in one crop: those of object k are ``points[starts[k] : starts[k + 1]]``.

    Attributes:
        points: float64 (n, 3), nm, z y x.
        starts: int64 (objects + 1,).
    """

    points: NDArray[np.float64]
    starts: NDArray[np.int64]

    def __len__(self) -> int:
        """Number of objects."""
        return len(self.starts) - 1

    def of(self, number: int, u: float) -> Triple:
        """Return a position of an object (by its place in the order of IDs), drawn by a number in [0, 1)."""
        first, last = int(self.starts[number]), int(self.starts[number + 1])
        return triple(self.points[first + int(u * (last - first))])


def object_points(crop: Crop, class_name: str, seed: int) -> ObjectPoints:
    """Return positions in each object of a class in a crop, uniform over the object's voxels, at most 512 of each.

    Reads the class's own array at the finest level, where small objects are not lost. Without an array, or if it has no
    IDs, there are no objects. With many objects fewer positions are kept of each, about 2^18 in all.
    """
    label = crop.labels.get(class_name)
    ids, places, priorities = np.zeros(0, np.uint64), np.zeros(0, np.int64), np.zeros(0)
    if label is None or label.annotation.kind != "instance":
        return ObjectPoints(np.zeros((0, 3)), np.zeros(1, np.int64))
    rng = np.random.default_rng([seed, *class_name.encode()])
    grid, most = crop.within(label.source.levels[0].grid), _MOST_OF_ONE
    for begin, _, values, there, _ in label.blocks(grid):
        stored, present = values.reshape(-1), there.reshape(-1)
        start = begin[0] * grid.shape[1] * grid.shape[2]  # blocks span whole planes
        for first in range(0, present.size, _PIECE):
            index = np.flatnonzero(present[first : first + _PIECE]) + first
            ids = np.concatenate([ids, stored[index].astype(np.uint64)])
            places = np.concatenate([places, index + start])
            priorities = np.concatenate([priorities, rng.random(len(index))])
            kept = _first_of_each(ids, priorities, most)
            while len(kept) > _OBJECT_POINTS and most > 1:
                most //= 2
                kept = _first_of_each(ids, priorities, most)
            ids, places, priorities = ids[kept], places[kept], priorities[kept]
    starts = np.flatnonzero(np.diff(ids, prepend=ids[:1] + np.uint64(1)))
    points = grid.to_world(np.stack(np.unravel_index(places, grid.shape), axis=-1))
    return ObjectPoints(points, np.append(starts, len(ids)).astype(np.int64))


def _first_of_each(ids: NDArray[np.uint64], priorities: NDArray[np.float64], most: int) -> NDArray[np.intp]:
    """Return the items with the ``most`` smallest priorities of every ID, sorted by ID."""
    order = np.lexsort((priorities, ids))
    begins = np.flatnonzero(np.diff(ids[order], prepend=ids[order][:1] + np.uint64(1)))
    rank = np.arange(len(order)) - np.repeat(begins, np.diff(np.append(begins, len(order))))
    return order[rank < most]
