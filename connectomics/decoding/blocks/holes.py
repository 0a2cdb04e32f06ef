"""Hole filling of a volume that is known block by block: equal to `fill_holes` of the whole array.

A hole of an object is a piece of its complement (background and other objects) that reaches neither the box of the
object nor the border of the volume; only its background is filled, by the innermost object around it. A block cannot
show whether such a piece is closed. So every block is cut into parts: pieces of equal label, connected as background is
(`DUAL`). Parts that continue in neighboring blocks are united, first within groups of blocks, and the contacts of the
united parts form a small graph. Removing the parts of one object from this graph leaves the pieces of its complement.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.decoding.blocks.groups import Group, StoredGroups, gathered, number_trees
from connectomics.decoding.blocks.pieces import Pieces, StoredBlocks, faces_of
from connectomics.decoding.cellmap_postprocess import DUAL, components


def block_parts(labels: NDArray[np.uint32], connectivity: int) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Cut a labeled block (0 background) of objects with this ``connectivity`` into parts.

    Returns:
        (d, h, w) uint32 the parts 1..p, one of which holds every voxel; and (p,) the label of each, 0 for background.
    """
    shifted: Any = labels + np.uint32(1)  # background is a label like others
    parts = components(shifted, DUAL[connectivity]).astype(np.uint32, copy=False)
    label_of = np.zeros(int(parts.max()) + 1, np.uint32)
    label_of[parts] = labels
    return parts, label_of[1:]


def store_parts(blocks: StoredBlocks, number: int, labels: NDArray[np.uint32], connectivity: int) -> None:
    """Store what `fill` needs to know of the parts of a labeled block."""
    import cc3d

    lattice = blocks.lattice
    parts, label_of = block_parts(labels, connectivity)
    table = Pieces.measured(parts, len(label_of), lattice.region(number)[0], lattice.shape)
    neighbors: Any = DUAL[connectivity]  # cc3d's stubs ask for literal numbers
    pairs = sorted(cc3d.region_graph(parts, connectivity=neighbors))  # each once, the smaller part first
    touching = np.array(pairs, np.uint32).reshape(-1, 2)
    about = {"count": np.asarray(len(label_of)), "of": label_of, "touching": touching}
    blocks.save(number, {**about, **table.columns, **faces_of(parts)})


def unite_parts(
    parts: Group, tree_of: NDArray[np.int64], labels: Group, groups: StoredGroups, connectivity: int
) -> None:
    """Unite the parts of a group that belong to one object, or to none; store what `fill` needs.

    tree_of: (labels.size,) the tree of each label of the group.
    """
    from connectomics.decoding.blocks.component_kernels import join_pairs

    object_of, touch = np.empty(parts.size, np.int64), []
    for block, begin, end in zip(parts.parts, parts.offsets, parts.offsets[1:], strict=False):
        stored, first = parts.blocks.load(block, "of", "touching"), labels.first(block)
        object_of[begin:end] = np.concatenate(([-1], tree_of[first : first + labels.count(block)]))[stored["of"]]
        touch.append(stored["touching"].astype(np.int64) - 1 + begin)
    forest, beyond = np.arange(parts.size), [np.empty((0, 2), np.int64)]
    for pairs in parts.touching(DUAL[connectivity]):
        if len(pairs) and pairs[0, 1] >= parts.size:
            beyond.append(np.unique(pairs, axis=0))
            continue
        same = object_of[pairs[:, 0]] == object_of[pairs[:, 1]]
        join_pairs(forest, pairs[same])
        touch.append(np.unique(pairs[~same], axis=0))
    n = number_trees(forest)
    of = np.empty(n, np.int64)
    of[forest] = object_of
    edges = _distinct([forest[pairs] for pairs in touch], n)
    groups.store(parts, forest, n, np.concatenate(beyond), of=of, touching=edges)


def fill(
    groups: StoredGroups, trees: StoredGroups, objects: NDArray[np.int64], connectivity: int, n: int
) -> tuple[Pieces, NDArray[np.int64]]:
    """Give every cavity to the innermost object around it.

    Args:
        groups: what `unite_parts` stored.
        trees: of the labels; objects: (trees of all groups,) the object 0..n-1 of each.
        connectivity: of the objects. n: number of objects.

    Returns:
        The filled objects, and (parts of all groups,) int64 the object of each part now, -1 for background.

    Memory: 4 bytes for each part of a block, 16 for each part of a group, about 150 for each part of the volume and 16
    for each contact of two.
    """
    from connectomics.decoding.blocks.component_kernels import fill_cavities, gather, join_pairs

    offsets = groups.offsets
    object_of = np.empty(offsets[-1], np.int64)  # of the parts of groups
    for group in groups.parts:
        first, last = trees.offsets[group : group + 2]
        of_tree = np.concatenate((objects[first:last], [-1]))  # the background, -1, reads the last entry
        object_of[offsets[group] : offsets[group + 1]] = of_tree[groups.load(group, "of")["of"]]
    forest, contacts = np.arange(len(object_of)), []
    for group in groups.parts:
        pairs = groups.links(group)
        same = object_of[pairs[:, 0]] == object_of[pairs[:, 1]]
        join_pairs(forest, pairs[same])
        contacts += [pairs[~same], groups.load(group, "touching")["touching"] + offsets[group]]
    nodes = gathered(groups, forest, number_trees(forest))  # the parts of the volume
    edges = _distinct([forest[pairs] for pairs in contacts], len(nodes))
    owner = np.empty(len(nodes), np.int64)
    owner[forest] = object_of
    filled = Pieces.empty(n)
    known = owner >= 0
    gather(owner[known], *nodes.take(known).columns.values(), *filled.columns.values())
    size = np.prod(filled.boxes[:, 3:].astype(np.int64) - filled.boxes[:, :3] + 1, axis=1)
    order = np.lexsort((filled.first, size))  # inner objects have smaller boxes
    ones, twos = edges.T
    near = _grouped(np.concatenate((ones, twos)), np.concatenate((twos, ones)), len(nodes))
    members = _grouped(owner[known], np.flatnonzero(known), n)
    holder = fill_cavities(order, owner, nodes.boxes, filled.boxes, *members, *near)
    cavity = (owner < 0) & (holder >= 0)
    inner = nodes.take(cavity)
    # a cavity lies within the box of its object, after its first voxel
    np.add.at(filled.sizes, holder[cavity], inner.sizes)
    np.add.at(filled.sums, holder[cavity], inner.sums)
    owner[cavity] = holder[cavity]
    return filled, owner[forest]


def _grouped(keys: NDArray[np.int64], values: NDArray[np.int64], n: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The values of every key 0..n-1, as begins (n + 1,) and a list of all."""
    order = np.argsort(keys, kind="stable")
    return np.searchsorted(keys[order], np.arange(n + 1)), values[order]


def _distinct(pairs: list[NDArray[np.int64]], n: int) -> NDArray[np.int64]:
    """The pairs (m, 2) of different numbers below ``n``, each once, the smaller first."""
    found = np.sort(np.concatenate([np.empty((0, 2), np.int64), *pairs]), axis=1)
    keys = np.unique((found[:, 0] * n + found[:, 1])[found[:, 0] < found[:, 1]])
    return np.stack([keys // max(n, 1), keys % max(n, 1)], axis=1)
