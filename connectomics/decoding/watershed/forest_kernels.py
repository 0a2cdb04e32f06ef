"""Numba kernels that join basins and fragments to a seeded forest; see `connectomics.decoding.watershed.forest`."""

from __future__ import annotations

import numba
import numpy as np

from connectomics.decoding.blocks import pair_table
from connectomics.decoding.blocks.component_kernels import Array, Flags, Ints, Ints32, Labels, root_of
from connectomics.decoding.watershed.basin_kernels import before


@numba.njit(cache=True, nogil=True)
def contract(
    height: Ints32,
    ones: Ints,
    twos: Ints,
    worse: Ints,
    better: Ints,
    order: Ints,
    seeded: Flags,
    out_worse: Ints,
    out_better: Ints,
    floor: int,
    parent: Ints,
    kept: Flags,
) -> None:
    """Unite the basins of a region that no other region can keep apart, and find the edges that may matter elsewhere.

    Args:
        ones, twos, worse, better: (m,) the edges between basins (1-based). order: (m,) first to last.
        seeded, out_worse, out_better: (n + 1,) by basin, changed in place: whether it holds a seed, and its first
            edge out of the region (0: none).
        floor: edges no higher than this unite whatever holds seeds.
        parent: (n + 1,) takes the union-find forest. kept: (m,) takes which edges are left between what is not united.
    """
    near = np.arange(len(parent))  # what the edges so far join, whether or not it may be united already
    claimed = seeded.copy()
    for i in range(len(parent)):
        parent[i] = i
    for e in order:
        one, two = root_of(near, ones[e]), root_of(near, twos[e])
        flat = height[worse[e]] <= floor
        # Joined already by edges that come first (two seeds are joined from the start): this one is in no forest.
        if one == two or (claimed[one] and claimed[two] and not flat):
            continue
        near[max(one, two)] = min(one, two)
        claimed[min(one, two)] = claimed[one] or claimed[two]
        one, two = root_of(parent, ones[e]), root_of(parent, twos[e])
        free = flat
        for side in (one, two):
            # The first edge that leaves something without a seed is in the forest.
            if not seeded[side] and (
                out_worse[side] == 0 or before(height, worse[e], better[e], out_worse[side], out_better[side])
            ):
                free = True
        if not free:
            kept[e] = True
            continue
        to, gone = min(one, two), max(one, two)
        parent[gone] = to
        seeded[to] = seeded[to] or seeded[gone]
        if out_worse[gone] != 0 and (
            out_worse[to] == 0 or before(height, out_worse[gone], out_better[gone], out_worse[to], out_better[to])
        ):
            out_worse[to], out_better[to] = out_worse[gone], out_better[gone]


@numba.njit(cache=True, nogil=True)
def join_seeded(ones: Ints, twos: Ints, flat: Flags, order: Ints, seeded: Flags, parent: Ints) -> None:
    """Kruskal's algorithm with seeds: an edge joins two trees unless both hold one (``flat`` edges join any two).

    ``parent`` is the union-find forest of nodes 0..n-1, changed in place like ``seeded`` (n,), which holds for roots.
    The smaller of two roots becomes the parent.
    """
    for e in order:
        one, two = root_of(parent, ones[e]), root_of(parent, twos[e])
        if one == two or (seeded[one] and seeded[two] and not flat[e]):
            continue
        to, gone = min(one, two), max(one, two)
        parent[gone] = to
        seeded[to] = seeded[to] or seeded[gone]


@numba.njit(cache=True, nogil=True)
def rename(values: Array, table: Ints) -> None:
    """``table[values]`` in place."""
    for i in range(len(values)):
        if values[i] != 0:
            values[i] = table[values[i]]


@numba.njit(cache=True, nogil=True)
def border_edges(
    low: Labels, high: Labels, low_height: Ints32, high_height: Ints32, low_number: Ints, high_number: Ints, reach: int
) -> tuple[Ints, Ints, Ints, Ints, Ints32, Ints32]:
    """The first edge between every two labels that touch across a border between blocks.

    Args:
        low, high: (h, w) labels on its two sides, 0 nothing; with the voxels' heights and numbers in the volume.
        reach: largest sum of the steps along both axes between voxels that are neighbors.

    Returns:
        The labels on both sides, the number of the worse and of the better voxel, their heights; each (m,).
    """
    keys = np.full(1 << 10, pair_table.EMPTY, np.uint64)
    numbers = np.empty((1 << 10, 2), np.int64)
    levels = np.empty((1 << 10, 2), np.int32)
    count = 0
    rows, columns = low.shape
    side = min(reach, 1)
    for y in range(rows):
        for x in range(columns):
            if low[y, x] == 0:
                continue
            here, h = low_number[y, x], low_height[y, x]
            for v in range(max(0, y - side), min(rows, y + side + 1)):
                for u in range(max(0, x - side), min(columns, x + side + 1)):
                    if high[v, u] == 0 or abs(v - y) + abs(u - x) > reach:
                        continue
                    there, g = high_number[v, u], high_height[v, u]
                    if h < g or (h == g and here < there):
                        worse, better, worse_height, better_height = there, here, g, h
                    else:
                        worse, better, worse_height, better_height = here, there, h, g
                    key = (np.uint64(low[y, x]) << pair_table.SHIFT) | np.uint64(high[v, u])
                    at = pair_table.slot_of(keys, key)
                    if keys[at] == pair_table.EMPTY:
                        keys[at] = key
                        count += 1
                    elif not (
                        worse_height < levels[at, 0]
                        or (worse_height == levels[at, 0] and worse < numbers[at, 0])
                        or (
                            worse == numbers[at, 0]
                            and (
                                better_height < levels[at, 1]
                                or (better_height == levels[at, 1] and better < numbers[at, 1])
                            )
                        )
                    ):
                        continue
                    numbers[at, 0], numbers[at, 1] = worse, better
                    levels[at, 0], levels[at, 1] = worse_height, better_height
            if 4 * count > len(keys):
                kept = keys != pair_table.EMPTY
                larger = pair_table.enlarged(keys, kept)
                numbers = pair_table.moved(numbers, keys, kept, larger)
                levels = pair_table.moved(levels, keys, kept, larger)
                keys = larger
    chosen = np.flatnonzero(keys != pair_table.EMPTY)
    ones, twos = pair_table.nodes_of(keys[chosen])
    numbers, levels = numbers[chosen], levels[chosen]
    return ones, twos, numbers[:, 0], numbers[:, 1], levels[:, 0], levels[:, 1]
