"""Numba kernels of mean-affinity agglomeration on one array.

Fragments: of the edges to its six neighbors every voxel takes the strongest, and what is so linked is a fragment (the
first step of O. Boruvka's minimum spanning tree; basins of an edge-weighted graph). Between fragments that touch, the
mean of all affinities across their common face is the score, and the pair with the highest is united again and again
until none is above the threshold; faces that come together by that are averaged as one. Source of the second step:
J. Funke et al., Large Scale Image Segmentation with Structured Loss Based Deep Learning for Connectome Reconstruction,
IEEE TPAMI 2019 (mean affinity).
"""

from __future__ import annotations

import heapq
from typing import Any

import numba
import numpy as np

from connectomics.decoding.affinities.mutex_kernels import append
from connectomics.decoding.blocks import pair_table
from connectomics.decoding.blocks.component_kernels import Array, Ints, Ints32, Keys, root_of, unite


@numba.njit(cache=True, nogil=True)
def strongest_links(values: Array, nodes: Ints32, offsets: Ints, low: int, number: int) -> Any:
    """The forest (a root is its own parent, and its smallest node) of what the strongest edge of each voxel links.

    Args:
        values: (K, D, H, W) whole numbers.
        nodes: (D, H, W) number of every voxel's node, -1 where there is none.
        offsets: (K, 3) voxels.
        low: an edge must be above it to link.

    Of equal edges a voxel takes the one of the first channel, and there the one that begins at it.
    """
    parent = np.arange(number, dtype=np.int32)
    shape = nodes.shape
    for z in range(shape[0]):
        for y in range(shape[1]):
            for x in range(shape[2]):
                node = nodes[z, y, x]
                if node < 0:
                    continue
                best, to = np.int64(low), np.int64(-1)
                for k in range(len(offsets)):
                    for sign in (1, -1):
                        v = z + sign * offsets[k, 0]
                        u = y + sign * offsets[k, 1]
                        t = x + sign * offsets[k, 2]
                        if v < 0 or u < 0 or t < 0 or v >= shape[0] or u >= shape[1] or t >= shape[2]:
                            continue
                        other = nodes[v, u, t]
                        if other < 0:
                            continue
                        value = np.int64(values[k, z, y, x] if sign > 0 else values[k, v, u, t])
                        if value > best:
                            best, to = value, np.int64(other)
                if to >= 0:
                    unite(parent, node, to)
    return parent


@numba.njit(cache=True, nogil=True)
def _grown(table: Keys, edge: Ints32) -> Any:
    """Table and edges with room again, and how many they hold: pairs whose edge is -1 are left out."""
    live = np.zeros(len(table), np.bool_)
    for at in range(len(table)):
        live[at] = table[at] != pair_table.EMPTY and edge[at] >= 0
    larger, used = pair_table.enlarged(table, live)
    return larger, pair_table.moved(edge, table, live, larger), used


@numba.njit(cache=True, nogil=True)
def _longer(ends: Ints32, sums: Ints, counts: Ints) -> Any:
    m = len(sums)
    more, more_sums, more_counts = np.empty((2 * m, 2), np.int32), np.empty(2 * m, np.int64), np.empty(2 * m, np.int64)
    for i in range(m):
        more[i, 0], more[i, 1], more_sums[i], more_counts[i] = ends[i, 0], ends[i, 1], sums[i], counts[i]
    return more, more_sums, more_counts


@numba.njit(cache=True, nogil=True)
def region_graph(values: Array, labels: Ints32, offsets: Ints) -> Any:
    """The pairs of labels that touch: (ends (m, 2) int32, sums (m,) int64 of their values, counts (m,) int64).

    Args:
        values: (K, D, H, W) whole numbers.
        labels: (D, H, W), 0 background.
        offsets: (K, 3) voxels.

    Ordered by where a pair first touches.
    """
    shape = labels.shape
    table, edge = np.full(4096, pair_table.EMPTY, np.uint64), np.empty(4096, np.int32)
    ends, sums, counts = np.empty((1024, 2), np.int32), np.empty(1024, np.int64), np.empty(1024, np.int64)
    m = 0
    for k in range(len(offsets)):
        dz, dy, dx = offsets[k]
        for z in range(max(0, -dz), min(shape[0], shape[0] - dz)):
            for y in range(max(0, -dy), min(shape[1], shape[1] - dy)):
                for x in range(max(0, -dx), min(shape[2], shape[2] - dx)):
                    a, b = labels[z, y, x], labels[z + dz, y + dy, x + dx]
                    if a == b or a == 0 or b == 0:
                        continue
                    key = pair_table.pair_key(a, b)
                    slot = pair_table.slot_of(table, key)
                    if table[slot] != key:
                        if m == len(sums):
                            ends, sums, counts = _longer(ends, sums, counts)
                        ends[m, 0], ends[m, 1] = a, b
                        sums[m] = 0
                        counts[m] = 0
                        table[slot] = key
                        edge[slot] = m
                        m += 1
                        if 2 * m > len(table):
                            table, edge, _ = _grown(table, edge)
                            slot = pair_table.slot_of(table, key)
                    sums[edge[slot]] += values[k, z, y, x]
                    counts[edge[slot]] += 1
    return ends[:m].copy(), sums[:m].copy(), counts[:m].copy()


@numba.njit(cache=True, nogil=True)
def merge_regions(ends: Ints32, sums: Ints, counts: Ints, number: int, limit: float) -> Any:
    """Unite the pair of regions with the highest mean, again and again, as long as that is above ``limit``.

    Args:
        ends: (m, 2) pairs of regions 1..number, each pair once.
        sums, counts: (m,) of the values across the pair's face; changed in place.
        limit: a mean of values.

    Returns:
        (parent, alive): the forest over 0..number (a root is its own parent), and (m,) whether a pair is still one:
        those are the pairs of regions that touch in the end, between the roots of ``ends``.

    Of equal means the pair of the earlier row goes first.
    """
    m = len(sums)
    parent = np.arange(number + 1).astype(np.int32)
    size = 4096
    while size < 4 * m:
        size *= 2
    table, edge = np.full(size, pair_table.EMPTY, np.uint64), np.full(size, -1, np.int32)
    alive, version = np.ones(m, np.bool_), np.zeros(m, np.int32)
    # lists of the edges at each region: an edge has two records, 2 e at its first end and 2 e + 1 at its second
    head, tail = np.full(number + 1, -1, np.int64), np.full(number + 1, -1, np.int64)
    degree, after = np.zeros(number + 1, np.int32), np.full(2 * m, -1, np.int64)
    used = m  # places of the table that are taken, also by pairs that are none any more
    heap = [(0.0, np.int64(-1), np.int64(0)) for _ in range(0)]
    for e in range(m):
        slot = pair_table.slot_of(table, pair_table.pair_key(ends[e, 0], ends[e, 1]))
        table[slot], edge[slot] = pair_table.pair_key(ends[e, 0], ends[e, 1]), e
        for side in range(2):
            append(head, tail, after, ends[e, side], 2 * e + side)
            degree[ends[e, side]] += 1
        if sums[e] > limit * counts[e]:
            heap.append((-sums[e] / counts[e], np.int64(e), np.int64(0)))
    heapq.heapify(heap)
    while len(heap) > 0:
        _, row, stamp = heapq.heappop(heap)
        if not alive[row] or stamp != version[row]:
            continue
        a, b = root_of(parent, ends[row, 0]), root_of(parent, ends[row, 1])
        alive[row] = False
        edge[pair_table.slot_of(table, pair_table.pair_key(a, b))] = -1
        if degree[a] < degree[b]:
            a, b = b, a
        parent[b] = a
        record = head[b]
        while record >= 0:
            following = after[record]
            f = record >> 1
            if alive[f]:
                other = root_of(parent, ends[f, 1 - (record & 1)])
                old = pair_table.slot_of(table, pair_table.pair_key(b, other))
                edge[old] = -1
                key = pair_table.pair_key(a, other)
                slot = pair_table.slot_of(table, key)
                if table[slot] == key and edge[slot] >= 0:
                    kept = np.int64(edge[slot])
                    if f < kept:  # the earlier row stands for both, so that ties do not depend on a, b
                        kept, f = f, kept
                        edge[slot] = kept
                        if record >> 1 == kept:
                            append(head, tail, after, a, record)
                            degree[a] += 1
                    sums[kept] += sums[f]
                    counts[kept] += counts[f]
                    alive[f] = False
                    version[kept] += 1
                    if sums[kept] > limit * counts[kept]:
                        heapq.heappush(heap, (-sums[kept] / counts[kept], kept, np.int64(version[kept])))
                else:
                    used += table[slot] != key
                    table[slot], edge[slot] = key, f
                    append(head, tail, after, a, record)
                    degree[a] += 1
                    if 2 * used > len(table):
                        table, edge, used = _grown(table, edge)
            record = following
    return parent, alive
