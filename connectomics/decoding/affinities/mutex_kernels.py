"""Numba kernels of the mutex watershed on one array.

Every pair of voxels that an offset joins is an edge of signed weight. Edges are taken by falling magnitude: a positive
one unites the clusters of its ends unless something stronger keeps them apart, a negative one keeps them apart from
then on unless they are united already. Source: S. Wolf et al., The Mutex Watershed: Efficient, Parameter-Free Image
Partitioning, ECCV 2018.

Stored affinities have few values, so edges are ordered by counting, in time and memory proportional to their number:
four bytes an edge. Which clusters are apart is kept twice, as a hash set of pairs of clusters (is this pair apart?) and
as a list for each cluster (whom is it apart from, when it is united with another).
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from connectomics.decoding.blocks import pair_table
from connectomics.decoding.blocks.component_kernels import Array, Flags, Ints, Ints32, Keys, Labels, root_of


@numba.njit(cache=True, nogil=True)
def count_edges(values: Array, nodes: Ints32, offset: Ints, counts: Ints) -> None:
    """Add to ``counts[v]`` how many edges of one channel (D, H, W) have the value v; both ends in ``nodes`` (>= 0)."""
    depth, height, width = nodes.shape
    dz, dy, dx = offset
    for z in range(max(0, -dz), min(depth, depth - dz)):
        for y in range(max(0, -dy), min(height, height - dy)):
            for x in range(max(0, -dx), min(width, width - dx)):
                if nodes[z, y, x] >= 0 and nodes[z + dz, y + dy, x + dx] >= 0:
                    counts[values[z, y, x]] += 1


@numba.njit(cache=True, nogil=True)
def place_edges(values: Array, nodes: Ints32, offset: Ints, next_place: Ints, edges: Labels) -> None:
    """Put the flat index of every edge's voxel into ``edges`` at ``next_place[v]``, counting that up; -1 leaves out."""
    depth, height, width = nodes.shape
    dz, dy, dx = offset
    for z in range(max(0, -dz), min(depth, depth - dz)):
        for y in range(max(0, -dy), min(height, height - dy)):
            for x in range(max(0, -dx), min(width, width - dx)):
                if nodes[z, y, x] >= 0 and nodes[z + dz, y + dy, x + dx] >= 0:
                    v = values[z, y, x]
                    at = next_place[v]
                    if at >= 0:
                        edges[at] = (z * height + y) * width + x
                        next_place[v] = at + 1


@numba.njit(cache=True, nogil=True)
def _live(table: Keys, parent: Ints32) -> Any:
    """Which places of a table hold a pair of nodes that still are roots."""
    live = np.zeros(len(table), np.bool_)
    for at in range(len(table)):
        key = table[at]
        if key != pair_table.EMPTY:
            a, b = np.int64(key >> pair_table.SHIFT), np.int64(key & pair_table.LOW)
            live[at] = parent[a] == a and parent[b] == b
    return live


@numba.njit(cache=True, nogil=True)
def _grown(table: Keys, parent: Ints32) -> Any:
    """A table with room again, and how many it holds: pairs of what are no clusters any more are left out."""
    return pair_table.enlarged(table, _live(table, parent))


@numba.njit(cache=True, nogil=True)
def _longer(values: Ints32) -> Any:
    longer = np.empty(2 * len(values), np.int32)
    for i in range(len(values)):  # numba compiles ten times as long for the assignment of a slice
        longer[i] = values[i]
    return longer


@numba.njit(cache=True, nogil=True)
def append(head: Any, tail: Any, after: Any, region: Any, record: Any) -> None:
    """Append a record to the linked list of a region."""
    after[record] = -1
    if tail[region] >= 0:
        after[tail[region]] = record
    else:
        head[region] = record
    tail[region] = record


@numba.njit(cache=True, nogil=True)
def cluster(edges: Labels, bins: Ints, steps: Ints, attractive: Flags, nodes: Ints32, number: int) -> Any:
    """Cluster ``number`` nodes.

    Args:
        edges: flat index of the voxel at which an edge begins, in the order in which edges are taken.
        bins: (m + 1,) edges[bins[i]:bins[i + 1]] share a channel and a value.
        steps: (m,) how much further in the flat array such an edge ends.
        attractive: (m,) the sign of such edges.
        nodes: flat array of the number of every voxel's node, below 0 where there is none.

    Returns:
        (parent, table): the forest (a root is its own parent), and the hash set of pairs of roots that are apart (also
        stale pairs, of nodes that are no roots any more).
    """
    parent = np.arange(number, dtype=np.int32)
    head = np.full(number, -1, np.int32)  # a cluster's list of those it is apart from: first and last record, length
    tail = np.full(number, -1, np.int32)
    length = np.zeros(number, np.int32)
    partner = np.empty(1024, np.int32)  # records: a node of the other cluster, and the next record
    after = np.empty(1024, np.int32)
    records = 0
    free = np.int32(-1)  # records that can be used again
    table = np.full(4096, pair_table.EMPTY, np.uint64)
    used = 0
    for i in range(len(steps)):
        for e in range(bins[i], bins[i + 1]):
            at = np.int64(edges[e])
            a = root_of(parent, nodes[at])
            b = root_of(parent, nodes[at + steps[i]])
            if a == b:
                continue
            key = pair_table.pair_key(a, b)
            slot = pair_table.slot_of(table, key)
            if table[slot] == key:
                continue
            if attractive[i]:
                if length[a] < length[b]:
                    a, b = b, a
                parent[b] = a  # a keeps the longer list; each record of b's becomes one of a's, if it says anything new
                record = head[b]
                while record >= 0:
                    following = after[record]
                    other = root_of(parent, partner[record])
                    key = pair_table.pair_key(a, other)
                    slot = pair_table.slot_of(table, key)
                    if table[slot] != key:
                        table[slot] = key
                        used += 1
                        if 2 * used > len(table):
                            table, used = _grown(table, parent)
                        append(head, tail, after, a, record)
                        length[a] += 1
                    else:
                        after[record] = free
                        free = record
                    record = following
            else:
                table[slot] = key
                used += 1
                if 2 * used > len(table):
                    table, used = _grown(table, parent)
                for one, two in ((a, b), (b, a)):
                    if free >= 0:
                        record = free
                        free = after[free]
                    else:
                        if records == len(partner):
                            partner, after = _longer(partner), _longer(after)
                        record = np.int32(records)
                        records += 1
                    partner[record] = two
                    append(head, tail, after, one, record)
                    length[one] += 1
    return parent, table


@numba.njit(cache=True, nogil=True)
def number_trees(parent: Ints32, numbers: Ints32) -> int:
    """Number the trees of a forest 1..n by their first node: ``numbers[node]`` becomes that of its tree; returns n."""
    n = 0
    numbers[:] = 0
    for node in range(len(parent)):
        root = root_of(parent, node)
        if numbers[root] == 0:  # the root itself may come later than nodes of its tree
            n += 1
            numbers[root] = n
        numbers[node] = numbers[root]
    return n


def roots_apart(table: Keys, parent: Ints32) -> Ints:
    """(m, 2) the pairs of `cluster`'s table that are still pairs of roots, in the order of their numbers."""
    return np.stack(pair_table.filled(np.sort(table[_live(table, parent)])), axis=1)
