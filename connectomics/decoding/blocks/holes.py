"""Hole filling of a volume that is known block by block: equal to `fill_holes` of the whole array.

A hole of an object is a piece of its complement (background and other objects) that reaches neither the box of the
object nor the border of the volume; only its background is filled, by the innermost object around it. A block cannot
show whether such a piece is closed. So every block is cut into parts: pieces of equal label, connected as background is
(`DUAL`). Parts that continue in neighboring blocks are united, and the contacts of the united parts form a small graph.
Removing the parts of one object from this graph leaves the pieces of its complement.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.decoding.blocks.pieces import Pieces, StoredBlocks, faces_of, number_trees
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
    lattice = blocks.lattice
    parts, label_of = block_parts(labels, connectivity)
    table = Pieces.measured(parts, len(label_of), lattice.region(number)[0], lattice.shape)
    about = {"count": np.asarray(len(label_of)), "of": label_of, "touching": _touching(parts, DUAL[connectivity])}
    blocks.save(number, {**about, **table.columns, **faces_of(parts)})


def fill(
    blocks: StoredBlocks, objects_in: Callable[[int], NDArray[np.int64]], connectivity: int, n: int
) -> tuple[Pieces, NDArray[np.int64]]:
    """Give every cavity to the innermost object around it.

    Args:
        blocks: what `store_parts` stored.
        objects_in: block number -> (labels of the block,) the object 0..n-1 of each of its labels 1...
        connectivity: of the objects. n: number of objects.

    Returns:
        The filled objects, and (parts of all blocks,) int64 the object of each part now, -1 for background.

    Memory: 16 bytes a part of all blocks, about 150 bytes a part of the volume and 16 bytes for each contact of two.
    """
    from connectomics.decoding.blocks.component_kernels import fill_cavities, gather, join_pairs

    offsets, lattice = blocks.offsets, blocks.lattice
    object_of = np.empty(offsets[-1], np.int64)  # of the parts of blocks
    for block in range(len(lattice)):
        table = np.concatenate(([-1], objects_in(block)))
        object_of[offsets[block] : offsets[block + 1]] = table[blocks.load(block, "of")["of"]]
    forest, contacts = np.arange(len(object_of)), []
    for pairs in blocks.touching(DUAL[connectivity]):
        same = object_of[pairs[:, 0]] == object_of[pairs[:, 1]]
        join_pairs(forest, pairs[same])
        contacts.append(np.unique(pairs[~same], axis=0))
    nodes = Pieces.empty(number_trees(forest))  # the parts of the volume
    edges = [np.sort(forest[pairs], axis=1) for pairs in contacts]
    for block in range(len(lattice)):
        of_volume, part = forest[offsets[block] : offsets[block + 1]], blocks.pieces(block)
        gather(of_volume, *part.columns.values(), *nodes.columns.values())
        edges.append(np.sort(of_volume[blocks.load(block, "touching")["touching"].astype(np.int64) - 1], axis=1))
    owner = np.empty(len(nodes), np.int64)
    owner[forest] = object_of
    objects = Pieces.empty(n)
    known = owner >= 0
    gather(owner[known], *nodes.take(known).columns.values(), *objects.columns.values())
    size = np.prod(objects.boxes[:, 3:].astype(np.int64) - objects.boxes[:, :3] + 1, axis=1)
    order = np.lexsort((objects.first, size))  # inner objects have smaller boxes
    ones, twos = np.unique(np.concatenate(edges), axis=0).T
    near = _grouped(np.concatenate((ones, twos)), np.concatenate((twos, ones)), len(nodes))
    members = _grouped(owner[known], np.flatnonzero(known), n)
    holder = fill_cavities(order, owner, nodes.boxes, objects.boxes, *members, *near)
    cavity = (owner < 0) & (holder >= 0)
    inner = nodes.take(cavity)
    # a cavity lies within the box of its object, after its first voxel
    np.add.at(objects.sizes, holder[cavity], inner.sizes)
    np.add.at(objects.sums, holder[cavity], inner.sums)
    owner[cavity] = holder[cavity]
    return objects, owner[forest]


def _grouped(keys: NDArray[np.int64], values: NDArray[np.int64], n: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The values of every key 0..n-1, as begins (n + 1,) and a list of all."""
    order = np.argsort(keys, kind="stable")
    return np.searchsorted(keys[order], np.arange(n + 1)), values[order]


def _touching(parts: NDArray[np.uint32], connectivity: int) -> NDArray[np.uint32]:
    """(n, 2) which parts of a block touch, each pair once, the smaller first."""
    import cc3d

    neighbors: Any = connectivity  # cc3d's stubs ask for literal numbers
    pairs = sorted(cc3d.region_graph(parts, connectivity=neighbors))
    return np.array(pairs, np.uint32).reshape(-1, 2)
