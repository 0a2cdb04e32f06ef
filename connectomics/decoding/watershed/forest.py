"""The seeded watershed as a minimum spanning forest, whole or from parts of a volume that are looked at one by one.

The definition. Voxels have heights; a voxel comes before another one if it is lower, or as high and first in z-y-x
order of the volume. Voxels are taken in that order, and each is joined to its neighbours that came before, the first
of them first, unless both sides hold a seed already. What is joined to a seed is its object (Cousty et al. 2009,
"Watershed cuts: minimum spanning forests and the drop of water principle"). As no two edges rank alike, the forest is
one and only, whatever the order of work.

Why parts suffice. (1) The first edge of a voxel, or of anything united that holds no seed, is in the forest; so every
voxel belongs with its lowest neighbour, and water runs down to the bottom of a basin. (2) The last edge of a circle is
in no forest, where all seeds count as joined from the start. (3) Taking two voxels of one tree for one from the start
leaves every tree as it is: an edge on the way between them becomes superfluous, and no other. So a part is reduced to
its basins, each edge between two of them that comes first, by (2) those of them that its own forest needs, and by (1)
the basins that only have to do with others of the part are united at once. What is left are basins that hold a seed
or drain into another part (`Fragments`), and joining these is the same algorithm over again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.decoding.watershed.distance import OUTSIDE
from connectomics.geometry import Index
from connectomics.tasks.blocks import RANK

#: lower than any height: no edge joins two seeds
NO_FLOOR = int(np.iinfo(np.int32).min)


@dataclass(frozen=True)
class Edges:
    """Edges between nodes, with what they rank by. 40 bytes each.

    Attributes:
        ones, twos: (m,) int64 nodes. worse, better: (m,) int64 number of the voxel in z-y-x order of the volume that
            comes later and earlier. worse_height, better_height: (m,) int32.
    """

    ones: NDArray[np.int64]
    twos: NDArray[np.int64]
    worse: NDArray[np.int64]
    better: NDArray[np.int64]
    worse_height: NDArray[np.int32]
    better_height: NDArray[np.int32]

    @property
    def order(self) -> NDArray[np.int64]:
        """(m,) the edges from first to last."""
        return np.lexsort((self.better, self.better_height, self.worse, self.worse_height))


@dataclass(frozen=True)
class Fragments:
    """What is left of a part of a volume once everything is united that nothing beyond it can keep apart.

    Attributes:
        labels: (d, h, w) uint32 fragments 1..n, 0 where nothing is.
        count: n.
        seeded: (n,) bool whether fragment i + 1 holds a seed.
        edges: between fragments (numbers from 1) of this part.
        cores: (n,) int64 the label of the core that fragment i + 1 holds a voxel of, 0 for none.
    """

    labels: NDArray[np.uint32]
    count: int
    seeded: NDArray[np.bool_]
    edges: Edges
    cores: NDArray[np.int64]


@dataclass(frozen=True)
class Part:
    """A part of a volume (``begin`` and ``shape`` in voxels of the volume ``whole``) and what is known around it.

    Attributes:
        begin, shape: z y x.
        whole: shape of the volume.
        around: voxels beyond the part whose heights are known, z y x, at least 1 (fewer only where the volume ends).
    """

    begin: Index
    shape: Index
    whole: Index
    around: Index

    def grown(self, more: Sequence[int] = (0, 0, 0)) -> tuple[Index, Index]:
        """First voxel and shape of the part with what is around it and ``more`` voxels on every side."""
        sides = [a + m for a, m in zip(self.around, more, strict=True)]
        z, y, x = (max(0, b - s) for b, s in zip(self.begin, sides, strict=True))
        ends = (min(w, b + n + s) for w, b, n, s in zip(self.whole, self.begin, self.shape, sides, strict=True))
        d, h, w = (e - b for e, b in zip(ends, (z, y, x), strict=True))
        return (z, y, x), (d, h, w)


def fragments(
    height: NDArray[np.int32],
    part: Part,
    connectivity: int,
    *,
    radius: Index | None = None,
    cores: NDArray[Any] | None = None,
    floor: int = NO_FLOOR,
) -> Fragments:
    """The fragments of a part.

    Args:
        height: int32 of ``part.grown()`` with a rim of one voxel of `OUTSIDE`, which also marks what is not flooded.
        radius: seeds are the voxels that come first of what holds together with them within so many voxels along each
            axis; at most ``part.around`` voxels.
        cores: labels (0 none) of ``part.grown()``, every one a seed; in the place of ``radius``, and without a floor.
        floor: edges between voxels that are no higher join whatever they join, seeds too.
    """
    from connectomics.decoding.watershed import forest_kernels as kernels

    shape = np.asarray(height.shape, np.int64)
    start, size = part.grown()
    low = np.asarray(part.begin, np.int64) - start + 1
    high = low + part.shape
    ends = zip(start, size, part.whole, strict=True)
    cut = np.asarray([side for b, n, w in ends for side in (b > 0, b + n < w)])
    steps = np.asarray(_steps(connectivity), np.int64)
    offsets = np.sort(steps @ (shape[1] * shape[2], shape[2], 1))
    flat = height.reshape(-1)
    root = np.zeros(flat.size, np.int32 if flat.size < 1 << 31 else np.int64)
    if cores is not None:
        _plant(cores, root.reshape(height.shape), flat)
    kernels.descend(flat, shape, offsets, cut, root, OUTSIDE)
    lowest = kernels.number_basins(root, shape, low, high)
    n = len(lowest)
    seeded, core = np.zeros(n + 1, np.bool_), np.zeros(n + 1, np.int64)
    if cores is not None:
        core[1:] = _at(cores, lowest, shape)
        seeded[:] = core > 0
    elif radius is not None:
        inside = np.flatnonzero(_within(lowest, shape, low, high))
        found = np.zeros(len(inside), np.bool_)
        kernels.peaks(flat, shape, steps, np.asarray(radius, np.int64), lowest[inside], OUTSIDE, found)
        seeded[1 + inside[found]] = True
    out_worse, out_better = np.zeros(n + 1, np.int64), np.zeros(n + 1, np.int64)
    ones, twos, worse, better = kernels.basin_edges(
        flat, root, shape, offsets, low, high, OUTSIDE, out_worse, out_better
    )
    order = np.lexsort((better, flat[better], worse, flat[worse]))
    parent, kept = np.empty(n + 1, np.int64), np.zeros(len(ones), np.bool_)
    kernels.contract(flat, ones, twos, worse, better, order, seeded, out_worse, out_better, floor, parent, kept)
    trees = np.flatnonzero(parent[1:] == np.arange(1, n + 1)) + 1
    number = kernels.tree_numbers(parent)  # 0 stays 0; trees 1..k in the order of their first voxels
    held, basins = np.zeros(len(trees) + 1, np.int64), np.flatnonzero(core)
    held[number[basins]] = core[basins]  # one at most: without a floor no edge joins two seeds
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    kernels.rename(root, number)
    labels = root.reshape(height.shape)[box]
    labels = labels.view(np.uint32) if root.dtype == np.int32 else labels.astype(np.uint32)
    worse, better = worse[kept], better[kept]
    edges = Edges(
        number[ones[kept]],
        number[twos[kept]],
        _numbers(worse, shape, start, part.whole),
        _numbers(better, shape, start, part.whole),
        flat[worse],
        flat[better],
    )
    return Fragments(np.asarray(labels, np.uint32), len(trees), seeded[trees], edges, held[1:])


def _plant(cores: NDArray[Any], root: NDArray[Any], flat: NDArray[np.int32]) -> None:
    """Give every voxel of a core the first voxel of it as its root."""
    where = np.flatnonzero(cores)
    places = np.ravel_multi_index([c + 1 for c in np.unravel_index(where, cores.shape)], root.shape)
    open_ = flat[places] != OUTSIDE
    places, ids = places[open_], cores.reshape(-1)[where[open_]]
    _, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
    root.reshape(-1)[places] = places[first][inverse]


def _at(cores: NDArray[Any], voxels: NDArray[np.int64], shape: NDArray[np.int64]) -> NDArray[Any]:
    z, y, x = np.unravel_index(voxels, tuple(shape))
    found: NDArray[Any] = cores[z - 1, y - 1, x - 1]
    return found


def _within(
    voxels: NDArray[np.int64], shape: NDArray[np.int64], low: NDArray[np.int64], high: NDArray[np.int64]
) -> NDArray[np.bool_]:
    places = np.stack(np.unravel_index(voxels, tuple(shape)), axis=1)
    return np.asarray(((places >= low) & (places < high)).all(axis=1))


def _numbers(voxels: NDArray[np.int64], shape: NDArray[np.int64], start: Index, whole: Index) -> NDArray[np.int64]:
    """Numbers in the volume of voxels of a region with its rim."""
    z, y, x = (c - 1 + s for c, s in zip(np.unravel_index(voxels, tuple(shape)), start, strict=True))
    return np.asarray((z * whole[1] + y) * whole[2] + x, np.int64)


def _steps(connectivity: int) -> list[Index]:
    every = [(z, y, x) for z in (-1, 0, 1) for y in (-1, 0, 1) for x in (-1, 0, 1)]
    return [s for s in every if 0 < sum(map(abs, s)) <= RANK[connectivity]]
