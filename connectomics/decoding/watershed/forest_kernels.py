"""Numba kernels that find the basins of a region, their seeds and the edges between them, and join them to a seeded
forest; `connectomics.decoding.watershed.forest` says what they compute.

A region's heights lie in one array with a rim of one voxel on every side, ``outside`` where a voxel belongs to nothing;
voxels are named by their index in it (flat). That order is the z-y-x order of the volume, so comparing two indices
compares the voxels' numbers there.
"""

from __future__ import annotations

import numba
import numpy as np

from connectomics.decoding.blocks import pair_table
from connectomics.decoding.blocks.component_kernels import Array, Flags, Ints, Ints32, Keys, Labels, root_of


@numba.njit(cache=True, nogil=True)
def descend(height: Ints32, shape: Ints, offsets: Ints, cut: Flags, root: Array, outside: int) -> None:
    """Where a drop of water ends that goes from voxel to lowest neighbor: ``root[v]`` for every voxel v.

    Args:
        height: (D * H * W,) of the region with its rim. shape: D, H, W.
        offsets: from a voxel to its neighbors.
        cut: low z, high z, low y, ...: whether the region goes on there; the outermost voxels then stay where they are,
            since not all of their neighbors are known.
        root: (D * H * W,) takes the result; 0 where ``outside``. A voxel of a core must come with the first voxel of
            its core; all others with 0.
    """
    depth, rows, columns = shape
    for z in range(1, depth - 1):
        for y in range(1, rows - 1):
            edge = (
                (z == 1 and cut[0]) or (z == depth - 2 and cut[1]) or (y == 1 and cut[2]) or (y == rows - 2 and cut[3])
            )
            for x in range(1, columns - 1):
                v = (z * rows + y) * columns + x
                lowest = height[v]
                if lowest == outside or root[v] != 0:
                    continue
                best = v
                if not (edge or (x == 1 and cut[4]) or (x == columns - 2 and cut[5])):
                    for offset in offsets:
                        n = v + offset
                        h = height[n]
                        if h < lowest or (h == lowest and n < best):
                            lowest, best = h, n
                root[v] = best
    for v in range(len(root)):
        end = root[v]
        if end == 0:
            continue
        while root[end] != end:
            end = root[end]
        at = v
        while root[at] != end:
            root[at], at = end, root[at]


@numba.njit(cache=True, nogil=True)
def number_basins(root: Array, shape: Ints, low: Ints, high: Ints) -> Ints:
    """Turn roots, in place, into basins 1..n by their first voxel in the box from ``low`` to ``high`` (without).

    0 for a basin that has no voxel there. Returns the lowest voxel of each basin (n,).
    """
    n = 0
    _, rows, columns = shape
    for z in range(low[0], high[0]):
        for y in range(low[1], high[1]):
            for x in range(low[2], high[2]):
                at = root[(z * rows + y) * columns + x]
                if at > 0 and root[at] > 0:
                    n += 1
                    root[at] = -n  # a root tells its number by its sign; all others still name their root
    lowest = np.empty(n, np.int64)
    for v in range(len(root)):
        at = root[v]
        if at < 0:
            lowest[-at - 1] = v
        elif at > 0:
            root[v] = min(root[at], 0)
    for v in range(len(root)):
        root[v] = -root[v]
    return lowest


@numba.njit(cache=True, nogil=True)
def peaks(height: Ints32, shape: Ints, steps: Ints, radius: Ints, candidates: Ints, outside: int, found: Flags) -> None:
    """Which of some voxels are the lowest of what holds together with them in the box of ``radius`` around them.

    Args:
        steps: (k, 3) from a voxel to its neighbors, z y x. radius: voxels, z y x.
        candidates: (n,) voxels; the volume ends where their boxes leave the region. found: (n,) takes the answer.
    """
    depth, rows, columns = shape
    rz, ry, rx = radius
    by, bx = 2 * ry + 1, 2 * rx + 1
    size = (2 * rz + 1) * by * bx
    seen = np.full(size, -1, np.int64)
    queue = np.empty(size, np.int64)
    for i in range(len(candidates)):
        v = candidates[i]
        z, y, x = v // (rows * columns), v // columns % rows, v % columns
        own = height[v]
        lower = False  # anywhere in the box? Most often that decides it
        for nz in range(max(1, z - rz), min(depth - 1, z + rz + 1)):
            for ny in range(max(1, y - ry), min(rows - 1, y + ry + 1)):
                row = (nz * rows + ny) * columns
                for n in range(row + max(1, x - rx), row + min(columns - 1, x + rx + 1)):
                    if height[n] < own or (height[n] == own and n < v):
                        lower = True
                        break
                if lower:
                    break
            if lower:
                break
        if not lower:
            found[i] = True
            continue
        middle = (rz * by + ry) * bx + rx
        seen[middle] = i
        queue[0] = middle
        first, last, reached = 0, 1, False
        while first < last and not reached:
            at = queue[first]
            first += 1
            dz, dy, dx = at // (by * bx), at // bx % by, at % bx
            for k in range(len(steps)):
                ez, ey, ex = dz + steps[k, 0], dy + steps[k, 1], dx + steps[k, 2]
                if ez < 0 or ez > 2 * rz or ey < 0 or ey >= by or ex < 0 or ex >= bx:
                    continue
                nz, ny, nx = z + ez - rz, y + ey - ry, x + ex - rx
                if nz < 1 or nz >= depth - 1 or ny < 1 or ny >= rows - 1 or nx < 1 or nx >= columns - 1:
                    continue
                n = (nz * rows + ny) * columns + nx
                to = (ez * by + ey) * bx + ex
                if height[n] == outside or seen[to] == i:
                    continue
                if height[n] < own or (height[n] == own and n < v):
                    reached = True
                    break
                seen[to] = i
                queue[last] = to
                last += 1
        found[i] = not reached


@numba.njit(cache=True, nogil=True)
def below(height: Ints32, a: int, b: int) -> bool:
    """Whether voxel a comes before voxel b: it is lower, or as high and first."""
    return height[a] < height[b] or (height[a] == height[b] and a < b)


@numba.njit(cache=True, nogil=True)
def before(height: Ints32, worse: int, better: int, worse2: int, better2: int) -> bool:
    """Whether the edge between ``worse`` and ``better`` comes before the other one."""
    if worse != worse2:
        return below(height, worse, worse2)
    return below(height, better, better2)


@numba.njit(cache=True, nogil=True)
def basin_edges(
    height: Ints32,
    label: Array,
    shape: Ints,
    offsets: Ints,
    low: Ints,
    high: Ints,
    outside: int,
    out_worse: Ints,
    out_better: Ints,
) -> tuple[Keys, Ints, Ints]:
    """The first edge between every two basins that touch in the box from ``low`` to ``high`` (without).

    Args:
        out_worse, out_better: (n + 1,) zeros; take the first edge of every basin to a voxel beyond the box.

    Returns:
        A table of the pairs of basins (`pair_table.filled`), the worse and the better voxel of each edge.
    """
    _, rows, columns = shape
    keys = np.full(1 << 12, pair_table.EMPTY, np.uint64)
    worse, better = np.empty(1 << 12, np.int64), np.empty(1 << 12, np.int64)
    count = 0
    near, lowest = np.empty(len(offsets), np.int64), np.empty(len(offsets), np.int64)
    for z in range(low[0], high[0]):
        for y in range(low[1], high[1]):
            rim = z == low[0] or z == high[0] - 1 or y == low[1] or y == high[1] - 1
            for x in range(low[2], high[2]):
                v = (z * rows + y) * columns + x
                own = label[v]
                if own == 0:
                    continue
                border = rim or x == low[2] or x == high[2] - 1
                number = 0
                for offset in offsets:
                    n = v + offset
                    if border:
                        nz, ny, nx = n // (rows * columns), n // columns % rows, n % columns
                        if nz < low[0] or nz >= high[0] or ny < low[1] or ny >= high[1] or nx < low[2] or nx >= high[2]:
                            if height[n] != outside:
                                w, b = (v, n) if below(height, n, v) else (n, v)
                                if out_worse[own] == 0 or before(height, w, b, out_worse[own], out_better[own]):
                                    out_worse[own], out_better[own] = w, b
                            continue
                    other = label[n]
                    if other == own or other == 0 or not below(height, n, v):
                        continue
                    for i in range(number):
                        if near[i] == other:
                            if below(height, n, lowest[i]):
                                lowest[i] = n
                            break
                    else:
                        near[number], lowest[number] = other, n
                        number += 1
                for i in range(number):
                    key = pair_table.pair_key(np.int64(own), near[i])
                    at = pair_table.slot_of(keys, key)
                    if keys[at] == pair_table.EMPTY:
                        keys[at], worse[at], better[at] = key, v, lowest[i]
                        count += 1
                    elif before(height, v, lowest[i], worse[at], better[at]):
                        worse[at], better[at] = v, lowest[i]
                if 2 * count > len(keys):
                    kept = keys != pair_table.EMPTY
                    larger, _ = pair_table.enlarged(keys, kept)
                    worse = pair_table.moved(worse, keys, kept, larger)
                    better = pair_table.moved(better, keys, kept, larger)
                    keys = larger
    return keys, worse, better


# -- joining them ------------------------------------------------------------------------------------------------------
@numba.njit(cache=True, nogil=True)
def _join(parent: Ints, seeded: Flags, one: int, two: int) -> None:
    """Make the smaller of two roots the parent of the other one; it holds a seed if one of them does."""
    to, gone = min(one, two), max(one, two)
    parent[gone] = to
    seeded[to] = seeded[to] or seeded[gone]


@numba.njit(cache=True, nogil=True)
def contract(
    ones: Ints,
    twos: Ints,
    ranks: Ints,
    order: Ints,
    flat: Flags,
    own: int,
    seeded: Flags,
    out: Ints,
    parent: Ints,
    kept: Flags,
) -> None:
    """Unite the nodes of a region that no other region can keep apart, and find the edges that may matter elsewhere.

    Args:
        ones, twos: (m,) the edges; ``ones`` are nodes of the region, which are those below ``own``.
        ranks: (m,) place of each edge in the order of all. order: (m,) the edges from first to last.
        flat: (m,) edges that unite whatever holds seeds.
        seeded: (n,) whether a node holds a seed; beyond the region false if unknown. Changed in place.
        out: (n,) rank of the first edge that leaves the region from each node, larger than all if none does. Changed.
        parent: (n,) a union-find forest of what is one from the start; takes the result.
        kept: (m,) takes which edges are left between what is not united.
    """
    near = parent.copy()  # what the edges so far join, whether or not it may be united already
    claimed = seeded.copy()
    for e in order:
        one, two = root_of(near, ones[e]), root_of(near, twos[e])
        # Joined already by edges that come first (two seeds are joined from the start): this one is in no forest.
        if one == two or (claimed[one] and claimed[two] and not flat[e]):
            continue
        _join(near, claimed, one, two)
        if twos[e] >= own:
            kept[e] = True
            continue
        one, two = root_of(parent, ones[e]), root_of(parent, twos[e])
        free = flat[e]
        for side in (one, two):
            # The first edge that leaves something without a seed is in the forest.
            if not seeded[side] and ranks[e] < out[side]:
                free = True
        if not free:
            kept[e] = True
            continue
        _join(parent, seeded, one, two)
        out[min(one, two)] = min(out[one], out[two])


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
        _join(parent, seeded, one, two)


@numba.njit(cache=True, nogil=True)
def rename(values: Array, table: Ints) -> None:
    """``table[values]`` in place."""
    for i in range(len(values)):
        if values[i] != 0:
            values[i] = table[values[i]]


@numba.njit(cache=True, nogil=True)
def border_edges(
    low: Labels, high: Labels, low_height: Ints32, high_height: Ints32, low_number: Ints, high_number: Ints, reach: int
) -> tuple[Keys, Ints, Ints, Ints32, Ints32]:
    """The first edge between every two labels that touch across a border between blocks.

    Args:
        low, high: (h, w) labels on its two sides, 0 nothing; with the voxels' heights and numbers in the volume.
        reach: largest sum of the steps along both axes between voxels that are neighbors.

    Returns:
        A table of the pairs of labels (`pair_table.filled`), and for each the number of the worse and of the better
        voxel, and their heights.
    """
    keys = np.full(1 << 10, pair_table.EMPTY, np.uint64)
    worst, best = np.empty(1 << 10, np.int64), np.empty(1 << 10, np.int64)
    worst_height, best_height = np.empty(1 << 10, np.int32), np.empty(1 << 10, np.int32)
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
                    stored = (worst_height[at], worst[at], best_height[at], best[at])
                    if keys[at] == pair_table.EMPTY:
                        keys[at] = key
                        count += 1
                    elif (worse_height, worse, better_height, better) >= stored:
                        continue
                    worst[at], best[at] = worse, better
                    worst_height[at], best_height[at] = worse_height, better_height
            if 4 * count > len(keys):
                kept = keys != pair_table.EMPTY
                larger, _ = pair_table.enlarged(keys, kept)
                worst, best = (pair_table.moved(worst, keys, kept, larger), pair_table.moved(best, keys, kept, larger))
                worst_height = pair_table.moved(worst_height, keys, kept, larger)
                best_height = pair_table.moved(best_height, keys, kept, larger)
                keys = larger
    return keys, worst, best, worst_height, best_height
