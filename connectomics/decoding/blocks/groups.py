"""Pieces become objects in two steps: workers unite the blocks of a group, the leading process unites the groups.

A group is a box of neighboring blocks. Its worker reads what the blocks left (`StoredBlocks`), unites all that is one
within the group, and stores the resulting trees, with the links to pieces beyond the group. The leading process reads
the groups only: one file for each, with a row per tree instead of a face of labels per block.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, lru_cache
from itertools import chain, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.decoding.blocks.pieces import Pieces, StoredBlocks, StoredPieces, border, opposite, reach
from connectomics.geometry import Index
from connectomics.tasks.blocks import BlockFiles, Lattice

GROUP = (4, 4, 4)  # blocks of a group, z y x
BLOCKS_KEPT = 64  # blocks whose faces a worker keeps in memory; neighbors along z come again after a layer of a group


def groups_of(lattice: Lattice) -> Lattice:
    """Return the lattice of the groups, whose voxels are blocks."""
    return Lattice(lattice.counts, GROUP)


def blocks_of(lattice: Lattice, group: int) -> list[int]:
    """Return the numbers of the blocks of a group, ascending."""
    begin, shape = groups_of(lattice).region(group)
    return [int(np.ravel_multi_index(np.add(begin, at), lattice.counts)) for at in np.ndindex(shape)]


class Group:
    """The labels of a group of blocks as nodes 0..size-1, and those of the blocks around it as further nodes.

    Label i of a block is its node ``first(block) + i - 1``. Nodes of the group follow the numbers of its blocks.
    """

    def __init__(self, blocks: StoredBlocks, number: int) -> None:
        self.blocks, self.number = blocks, number
        self.parts = blocks_of(blocks.lattice, number)
        self._nodes: dict[int, tuple[int, int]] = {}  # of each block so far: the first one, and how many
        self._begins, self._numbers = [0], list[int]()
        for block in self.parts:
            self.first(block)
        self.offsets = np.asarray(self._begins)  # of the blocks of the group
        self.size = self._begins[-1]

    def first(self, block: int) -> int:
        """Return the first node of a block in the group or around it."""
        if block not in self._nodes:
            self._nodes[block] = self._begins[-1], self.blocks.count(block)
            self._numbers.append(block)
            self._begins.append(sum(self._nodes[block]))
        return self._nodes[block][0]

    def count(self, block: int) -> int:
        """Return how many labels a block in the group or around it has."""
        self.first(block)
        return self._nodes[block][1]

    def bases(self, *blocks: int) -> NDArray[np.int64]:
        """Return what to add to the labels of each block to get its nodes."""
        return np.asarray([self.first(block) - 1 for block in blocks])

    @property
    def nodes(self) -> int:
        """Number of nodes so far, with those of the blocks around the group."""
        return self._begins[-1]

    def named(self, nodes: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return block and label (n, 2) of nodes."""
        at = np.searchsorted(self._begins, nodes, side="right") - 1
        blocks = np.asarray(self._numbers, np.int64)[at]
        return np.stack([blocks, nodes - np.asarray(self._begins)[at] + 1], axis=1)

    def pieces(self, part: int) -> Pieces:
        """Read the pieces of a block, by its place in the group."""
        return self.blocks.pieces(self.parts[part])

    def borders(self, connectivity: int, behind: bool = False) -> Iterator[tuple[int, int, Index]]:
        """Yield two neighboring blocks that both have labels, the first one of the group, and the step between them.

        Blocks around the group come if their number is larger; with ``behind`` all.
        """
        lattice, own = self.blocks.lattice, set(self.parts)
        for block in self.parts:
            if not self.count(block):
                continue
            back = lattice.neighbors(block, connectivity, behind=True) if behind else ()
            outside = ((step, other) for step, other in back if other not in own)
            for step, other in chain(lattice.neighbors(block, connectivity), outside):
                if self.count(other):
                    yield block, other, step

    def touching(self, connectivity: int) -> Iterator[NDArray[np.int64]]:
        """Yield for each border the pairs of nodes (n, 2) that touch across it, the first one of the group."""
        from connectomics.decoding.blocks.component_kernels import touching

        faces = lru_cache(maxsize=BLOCKS_KEPT)(self.blocks.faces)
        for block, other, step in self.borders(connectivity):
            low, high = border(faces(block), step), border(faces(other), opposite(step))
            yield touching(low, high, reach(step, connectivity)) + self.bases(block, other)


def joined(group: Group, connectivity: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Unite all labels of a group that touch across the borders of blocks.

    Returns:
        (size,) the union-find forest: the parent of each node, whose number is at most its own; and (n, 2) the pairs of
        a node of the group and one beyond that touch.
    """
    from connectomics.decoding.blocks.component_kernels import join_pairs

    forest, beyond = np.arange(group.size), [np.empty((0, 2), np.int64)]
    for pairs in group.touching(connectivity):
        if len(pairs) and pairs[0, 1] >= group.size:
            beyond.append(np.unique(pairs, axis=0))
        else:
            join_pairs(forest, pairs)
    return forest, np.concatenate(beyond)


def number_trees(forest: NDArray[np.int64]) -> int:
    """Replace every node of a forest, in place, by the number 0..n-1 of its tree; return n."""
    from connectomics.decoding.blocks.component_kernels import number_roots

    return int(number_roots(forest))


def gathered(parts: Group | StoredGroups, trees: NDArray[np.int64], n: int) -> Pieces:
    """Return the objects 0..n-1 of the nodes of all parts (blocks of a group, or groups); ``trees``: of each node."""
    from connectomics.decoding.blocks.component_kernels import gather

    found = Pieces.empty(n)
    for part, (begin, end) in enumerate(pairwise(parts.offsets.tolist())):
        if end > begin:
            gather(trees[begin:end], *parts.pieces(part).columns.values(), *found.columns.values())
    return found


class StoredGroups(StoredPieces):
    """What the groups of a lattice of blocks leave: their trees are the nodes of the leading process.

    Every group has ``counts`` (labels of its blocks), ``tree_of`` (the tree of each of these labels), the columns of
    the trees' `Pieces`, and ``own`` and ``beyond``: trees, and block and label of what touches them in other groups.

    Memory: 4 bytes for each piece of the volume, once `links` or `nodes_of` is called.
    """

    def store(self, group: Group, trees: NDArray[np.int64], n: int, links: NDArray[np.int64], **more: Any) -> None:
        """Store a group of ``n`` trees. links: (m, 2) a node of the group and one beyond that touch; more: arrays."""
        found = np.unique(np.stack([trees[links[:, 0]], links[:, 1]], axis=1), axis=0)
        about = {"n": np.asarray(n), "counts": np.diff(group.offsets), "tree_of": trees.astype(np.uint32)}
        about |= {"own": found[:, 0], "beyond": group.named(found[:, 1])}
        self.save(group.number, {**about, **gathered(group, trees, n).columns, **more})

    @property
    def parts(self) -> range:
        """The numbers of the groups."""
        return range(len(groups_of(self.lattice)))

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """(groups + 1,): tree i of group g is node ``offsets[g] + i``."""
        return np.concatenate(([0], np.cumsum([self.integer(g, "n") for g in self.parts], dtype=np.int64)))

    @cached_property
    def _trees(self) -> tuple[NDArray[np.int64], NDArray[np.uint32], NDArray[np.int64]]:
        """First label of every block in a list of all labels, the tree of each in its group, and the group's node 0."""
        firsts, bases = (np.zeros(len(self.lattice), np.int64) for _ in range(2))
        found, size = [], 0
        for number in self.parts:
            stored = self.load(number, "counts", "tree_of")
            blocks = blocks_of(self.lattice, number)
            firsts[blocks] = size + np.cumsum(stored["counts"]) - stored["counts"]
            bases[blocks] = self.offsets[number]
            found.append(stored["tree_of"])
            size += len(stored["tree_of"])
        return firsts, np.concatenate(found), bases

    def nodes_of(self, named: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the nodes of labels, given by block and label (n, 2)."""
        firsts, trees, bases = self._trees
        block, label = named.T
        return bases[block] + trees[firsts[block] + label - 1]

    def links(self, number: int) -> NDArray[np.int64]:
        """Return (n, 2) the pairs of nodes of a group and of another one that touch."""
        stored = self.load(number, "own", "beyond")
        return np.stack([stored["own"] + self.offsets[number], self.nodes_of(stored["beyond"])], axis=1)


class GroupLabels:
    """Gives the labels of blocks, in a worker: those that the leading process stored for the trees of each group.

    kept: groups whose labels stay in memory, 8 bytes for each piece; blocks along x lie in groups along x.
    """

    def __init__(self, groups: StoredGroups, labels: BlockFiles, kept: int = 16) -> None:
        self._groups, self._labels, self._lattice = groups, labels, groups_of(groups.lattice)
        self._of_group = lru_cache(maxsize=kept)(self._read)

    def of(self, block: int) -> NDArray[np.int64]:
        """Return (n,) the final label of each label 1..n of a block, 0 for background."""
        place = np.unravel_index(block, self._groups.lattice.counts)
        group = np.ravel_multi_index(np.floor_divide(place, self._lattice.block), self._lattice.counts)
        return self._of_group(int(group))[block]

    def _read(self, group: int) -> dict[int, NDArray[np.int64]]:
        stored = self._groups.load(group, "counts", "tree_of")
        found = self._labels.load(group, "labels")["labels"][stored["tree_of"]]
        of_blocks = np.split(found, np.cumsum(stored["counts"])[:-1])
        return dict(zip(blocks_of(self._groups.lattice, group), of_blocks, strict=True))
