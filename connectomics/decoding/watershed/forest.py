"""The seeded watershed as a minimum spanning forest, of a whole array or of parts of a volume.

Definition. Voxels have heights; a voxel comes before another one if it is lower, or as high and earlier in z-y-x order
of the volume. Voxels are taken in that order. Each is joined to its neighbors that came before, the first of them
first, unless both sides already hold a seed. All that is joined to a seed is its object (Cousty et al. 2009, "Watershed
cuts: minimum spanning forests and the drop of water principle"). No two edges rank alike, so the forest is unique,
whatever the order of work.

A part of a volume is reduced to basins that hold a seed or drain into another part (`Fragments`), which the same
algorithm joins. Why parts suffice is in ``docs/design-notes.md``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.decoding.blocks.groups import number_trees
from connectomics.decoding.watershed.heights import OUTSIDE, DepthRule, boundary_heights, depth_heights
from connectomics.geometry import Index, index, slices_of
from connectomics.tasks.blocks import neighbor_steps, with_halo

#: Lower than any height: no edge joins two seeds.
NO_FLOOR = int(np.iinfo(np.int32).min)


@dataclass(frozen=True)
class Edges:
    """Edges between nodes, with what they are ordered by. 40 bytes each.

    Attributes:
        ones, twos: (m,) int64 nodes. worse, better: (m,) int64 number (in z-y-x order of the volume) of the voxel that
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
    """What is left of a part of a volume once all is united that nothing beyond the part can separate.

    Attributes:
        labels: (d, h, w) uint32 fragments 1..n, 0 background.
        count: n.
        seeded: (n,) bool whether fragment i + 1 holds a seed.
        edges: between fragments (numbers from 1) of this part.
        cores: (n,) int64 label of the core in fragment i + 1, 0 for none.
    """

    labels: NDArray[np.uint32]
    count: int
    seeded: NDArray[np.bool_]
    edges: Edges
    cores: NDArray[np.int64]


@dataclass(frozen=True)
class Part:
    """A part of a volume with a halo.

    Attributes:
        begin, shape: voxels of the volume, z y x.
        whole: shape of the volume.
        halo: voxels beyond the part whose heights are known, z y x, at least 1 (fewer only where the volume ends).
    """

    begin: Index
    shape: Index
    whole: Index
    halo: Index

    def grown(self, more: Sequence[int] = (0, 0, 0)) -> tuple[Index, Index]:
        """Return first voxel and shape of the part with its halo and ``more`` voxels on every side."""
        return with_halo(self.begin, self.shape, np.add(self.halo, more).tolist(), self.whole)[:2]


def fragments(
    height: NDArray[np.int32],
    part: Part,
    connectivity: int,
    *,
    radius: Index | None = None,
    cores: NDArray[Any] | None = None,
    floor: int = NO_FLOOR,
) -> Fragments:
    """Return the fragments of a part.

    Args:
        height: int32 of ``part.grown()`` with a rim of one voxel of `OUTSIDE`, which marks all that is not flooded.
        radius: a voxel is a seed if it comes first of all voxels connected to it within so many voxels along each
            axis; at most the halo.
        cores: labels (0 none) of ``part.grown()``, each a seed; instead of ``radius``, and without a floor.
        floor: edges between voxels that are no higher join anything, also seeds.
    """
    from connectomics.decoding.blocks import pair_table
    from connectomics.decoding.watershed import forest_kernels as kernels

    shape = np.asarray(height.shape, np.int64)
    start, size = part.grown()
    low = np.asarray(part.begin, np.int64) - start + 1
    high = low + part.shape
    ends = zip(start, size, part.whole, strict=True)
    cut = np.asarray([side for b, n, w in ends for side in (b > 0, b + n < w)])
    steps = np.asarray(neighbor_steps(connectivity), np.int64)
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
        z, y, x = np.unravel_index(lowest, tuple(shape))
        core[1:] = cores[z - 1, y - 1, x - 1]
        seeded[:] = core > 0
    elif radius is not None:
        at = np.stack(np.unravel_index(lowest, tuple(shape)), axis=1)
        inside = np.flatnonzero(((at >= low) & (at < high)).all(axis=1))
        found = np.zeros(len(inside), np.bool_)
        kernels.peaks(flat, shape, steps, np.asarray(radius, np.int64), lowest[inside], OUTSIDE, found)
        seeded[1 + inside[found]] = True
    out_worse, out_better = np.zeros(n + 1, np.int64), np.zeros(n + 1, np.int64)
    ones, twos, worse, better = pair_table.filled(
        *kernels.basin_edges(flat, root, shape, offsets, low, high, OUTSIDE, out_worse, out_better)
    )
    leaving = np.flatnonzero(out_worse)  # basins with an edge to beyond the part, which ranks among the others
    all_worse, all_better = np.concatenate((worse, out_worse[leaving])), np.concatenate((better, out_better[leaving]))
    order = np.lexsort((all_better, flat[all_better], all_worse, flat[all_worse]))
    ranks = np.empty(len(order), np.int64)
    ranks[order] = np.arange(len(order))
    out = np.full(n + 1, len(order))
    out[leaving] = ranks[len(ones) :]
    parent, kept = np.arange(n + 1), np.zeros(len(ones), np.bool_)
    order = order[order < len(ones)]
    kernels.contract(ones, twos, ranks, order, flat[worse] <= floor, n + 1, seeded, out, parent, kept)
    trees = np.flatnonzero(parent[1:] == np.arange(1, n + 1)) + 1
    number_trees(parent)  # 0 stays 0; trees 1..k in the order of their first voxels
    number = parent
    held, basins = np.zeros(len(trees) + 1, np.int64), np.flatnonzero(core)
    held[number[basins]] = core[basins]  # one at most: without a floor no edge joins two seeds
    kernels.rename(root, number)
    labels = root.reshape(height.shape)[slices_of(low, part.shape)]
    labels = labels.view(np.uint32) if root.dtype == np.int32 else labels.astype(np.uint32)
    worse, better = worse[kept], better[kept]
    edges = Edges(
        number[ones[kept]], number[twos[kept]], _numbers(worse, shape, start, part.whole),
        _numbers(better, shape, start, part.whole), flat[worse], flat[better],
    )  # fmt: skip
    return Fragments(np.asarray(labels, np.uint32), len(trees), seeded[trees], edges, held[1:])


def _plant(cores: NDArray[Any], root: NDArray[Any], flat: NDArray[np.int32]) -> None:
    """Make the first voxel of a core the root of all its voxels."""
    where = np.flatnonzero(cores)
    places = np.ravel_multi_index([c + 1 for c in np.unravel_index(where, cores.shape)], root.shape)
    open_ = flat[places] != OUTSIDE
    places, ids = places[open_], cores.reshape(-1)[where[open_]]
    _, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
    root.reshape(-1)[places] = places[first][inverse]


def _numbers(voxels: NDArray[np.int64], shape: NDArray[np.int64], start: Index, whole: Index) -> NDArray[np.int64]:
    """Numbers in the volume of voxels of a region with its rim."""
    z, y, x = (c - 1 + s for c, s in zip(np.unravel_index(voxels, tuple(shape)), start, strict=True))
    return np.asarray((z * whole[1] + y) * whole[2] + x, np.int64)


# -- whole arrays ------------------------------------------------------------------------------------------------------
def split(
    mask: NDArray[np.bool_],
    connectivity: int,
    voxel_size: Sequence[float],
    min_distance: float,
    max_depth: float = math.inf,
) -> NDArray[np.unsignedinteger[Any]]:
    """Split the objects of a mask where they are narrow: a watershed of the distance to the background.

    Args:
        mask: (D, H, W); what lies beyond the array is neither object nor background.
        connectivity: 6, 18 or 26.
        voxel_size: nm, z y x.
        min_distance: nm; a seed is deepest of all voxels connected to it within this distance along each axis (of
            equally deep voxels the first in z-y-x order).
        max_depth: nm; depths are cut off here, and pieces that meet at this depth are one.

    Returns:
        (D, H, W) pieces 1..n by their first voxel in z-y-x order. Takes about 9 bytes a voxel.
    """
    rule = DepthRule.of(voxel_size, max_depth, mask.shape)
    height = depth_heights(mask, rule, (0, 0, 0), mask.shape)
    return flood(height, connectivity, voxel_size, min_distance, -rule.cap)


def flood(
    height: NDArray[np.int32], connectivity: int, voxel_size: Sequence[float], min_distance: float, floor: int
) -> NDArray[np.unsignedinteger[Any]]:
    """Flood heights (D + 2, H + 2, W + 2) with a rim of `OUTSIDE`; pieces that meet at most at ``floor`` are one.

    Other arguments and result as for `split`.
    """
    shape = [n - 2 for n in height.shape]
    radius = seed_radius(min_distance, voxel_size)
    return fragments(height, _all(shape), connectivity, radius=radius, floor=floor).labels


def grow(
    mask: NDArray[np.bool_], boundary: NDArray[Any], cores: NDArray[Any], connectivity: int
) -> NDArray[np.unsignedinteger[Any]]:
    """Grow cores over a mask; they meet where the boundary probability is highest.

    Args:
        mask: (D, H, W). boundary: (D, H, W) uint8 or float16, not negative.
        cores: (D, H, W) ids, 0 none; ignored outside the mask.

    Returns:
        (D, H, W) ids 1..n by the first voxel in z-y-x order; 0 where the mask is not connected to a core.
    """
    part = _all(mask.shape)
    found = fragments(boundary_heights(mask, boundary), part, connectivity, cores=cores, floor=NO_FLOOR)
    number = np.zeros(found.count + 1, np.uint32)
    number[1:][found.seeded] = np.arange(1, int(found.seeded.sum()) + 1)
    return number[found.labels]


def seed_radius(min_distance: float, voxel_size: Sequence[float]) -> Index:
    """Return the reach of a seed along each axis in voxels, at least 1."""
    return index(max(1, math.floor(min_distance / s + 1e-9)) for s in voxel_size)


def _all(shape: Sequence[int]) -> Part:
    whole = index(shape)
    return Part((0, 0, 0), whole, whole, (0, 0, 0))
