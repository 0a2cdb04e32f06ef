"""Instances from affinities block by block: blocks with a halo, stitched by a mutex watershed over their faces.

Two pieces of neighboring blocks are scored by how far the blocks agree on the two planes at their face (`agreement`).
Pairs whose score is at least ``stitch_threshold`` are united, the best first, unless a block separates them. The result
is close to that of the whole array but not equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from connectomics.decoding.affinities.segment import segment
from connectomics.decoding.blocks.groups import BLOCKS_KEPT, Group, StoredGroups, number_trees
from connectomics.decoding.blocks.pieces import SIDES
from connectomics.decoding.blocks.stitched_task import Labeled, StitchedTask
from connectomics.decoding.parameters import AFFINITY_METHODS
from connectomics.decoding.prediction import StoredAffinities
from connectomics.decoding.probabilities import open_probabilities
from connectomics.errors import InputError
from connectomics.geometry import Index, index, slices_of
from connectomics.tasks.block_task import Cost
from connectomics.tasks.blocks import with_halo

BLOCK = (192, 192, 192)  # voxels of a block: a block and its halo take about 1 GB where everything is foreground
_CONTEXT = 16  # voxels of a halo beyond the longest offset


@dataclass(frozen=True)
class AffinitiesTask(StitchedTask):
    """Instances of one class from its affinities; methods mutex_watershed and agglomeration."""

    kind: ClassVar[str] = "affinities"
    methods: ClassVar[tuple[str, ...]] = AFFINITY_METHODS
    noise: ClassVar[tuple[int, int]] = (140, 5)

    block_shape: Index = BLOCK

    def check_input(self) -> None:
        affinities = StoredAffinities.open(open_probabilities(self.input))
        segment(np.zeros((len(affinities.offsets), 1, 1, 1), np.uint8), affinities.offsets)  # checks the offsets

    def open_labeler(self) -> Callable[[int], Labeled]:
        foreground, lattice = self.open_foreground(), self.lattice
        affinities = StoredAffinities.open(foreground.source)
        parameters, halo = self.parameters, self.halo

        def label(number: int) -> Labeled:
            begin, shape = lattice.region(number)
            low, size, inner = with_halo(begin, shape, halo, lattice.shape)
            core = slices_of(inner, shape)
            mask = foreground.mask(low, size)
            if not mask[core].any():
                return _cut_out(np.zeros(size, np.int32), 0, np.empty((0, 2), np.int64), core)
            found = segment(affinities.read(low, size), affinities.offsets, mask, parameters)
            return _cut_out(found.labels, found.count, found.apart, core)

        return label

    @property
    def halo(self) -> Index:
        """Voxels around a block that are segmented with it, z y x."""
        source = open_probabilities(self.input)
        if self.parameters.halo_nm > 0:
            size = source.levels[0].grid.voxel_size
            return index(max(1, math.ceil(self.parameters.halo_nm / s - 1e-9)) for s in size)
        return index(n + _CONTEXT for n in StoredAffinities.open(source).reach)

    def unite_group(self, group: Group, groups: StoredGroups) -> NDArray[np.int64]:
        """Unite the pieces of a group, unless pairs that agree connect them to pieces beyond; store the rest for
        `unite`.

        What no pair connects has no influence on each other. So what pairs connect within the group only is decided
        here.
        """
        from connectomics.decoding.blocks.component_kernels import join_pairs

        found = list(_agreeing(group, self.parameters.stitch_threshold))
        pairs = np.concatenate([np.empty((0, 2), np.int64), *(pairs for pairs, _ in found)])
        scores = np.concatenate([np.empty(0), *(scores for _, scores in found)])
        apart = np.concatenate([group.blocks.load(n, "apart")["apart"] + group.first(n) - 1 for n in group.parts])
        connected = np.arange(group.nodes)
        join_pairs(connected, pairs)
        is_open = np.zeros(number_trees(connected), np.bool_)
        is_open[connected[group.size :]] = True
        is_open = is_open[connected]
        here = ~is_open[pairs[:, 0]]
        trees = np.arange(group.size)
        beyond = is_open[apart].all(axis=1)
        join_pairs(trees, _of_firsts(stitched(group.size, pairs[here], scores[here], apart[~beyond])))
        n = number_trees(trees)
        names = group.named(pairs[~here].ravel()).reshape(-1, 4)
        ours = names[:, 0] < names[:, 2]  # of pairs between two groups, the one with the smaller block stores them
        left = {"pairs": names[ours], "scores": scores[~here][ours]}
        left["apart"] = group.named(apart[beyond].ravel()).reshape(-1, 4)
        groups.store(group, trees, n, np.empty((0, 2), np.int64), **left)
        return trees

    def unite(self, groups: StoredGroups) -> NDArray[np.int64]:
        """Find the trees of groups that belong together; `InputError` for too many pieces."""
        from connectomics.decoding.blocks.component_kernels import join_pairs

        stored = [groups.load(n, "pairs", "scores", "apart") for n in groups.parts]
        pairs, scores, apart = (np.concatenate([one[key] for one in stored]) for key in ("pairs", "scores", "apart"))
        # numbered by block and label, as ties are decided
        keys, ends = np.unique(np.concatenate([pairs, apart]).reshape(-1, 2) @ [1 << 32, 1], return_inverse=True)
        if len(keys) >= 1 << 31:
            raise InputError(
                f"{self.name}: {len(keys)} pieces are too many, expected fewer than 2^31; choose larger blocks"
            )
        ends = ends.reshape(-1, 2)
        found = _of_firsts(stitched(len(keys), ends[: len(pairs)], scores, ends[len(pairs) :]))
        forest, nodes = np.arange(groups.offsets[-1]), groups.nodes_of(np.stack(np.divmod(keys, 1 << 32), axis=1))
        join_pairs(forest, nodes[found])
        return forest

    def label_cost(self, stage: str) -> Cost:
        if stage != "label":
            return super().label_cost(stage)
        affinities = StoredAffinities.open(open_probabilities(self.input))
        shapes = zip(self.lattice.shape, self.block_shape, self.halo, strict=True)
        around = int(np.prod([min(n, b + 2 * h) for n, b, h in shapes]))
        channels = len(affinities.channels)
        read = (1 + channels) * affinities.channels[0].levels[0].dtype.itemsize * around
        return Cost(read=read, written=4 * self.largest_block, memory=read + (4 * channels + 60) * around)


def _cut_out(labels: NDArray[np.int32], count: int, apart: NDArray[np.int64], core: tuple[slice, ...]) -> Labeled:
    """Cut the block out of its halo and renumber its labels.

    With it are stored the labels in the six planes around it (``beyond0-``) that also occur in the block, and the pairs
    that are apart, if both reach a face.
    """
    inside = np.zeros(count + 1, np.bool_)
    inside[labels[core].ravel()] = True
    inside[0] = False
    table = np.zeros(count + 1, np.uint32)
    table[inside] = np.arange(1, int(inside.sum()) + 1)
    extra: dict[str, NDArray[Any]] = {}
    at_face = np.zeros(int(inside.sum()) + 1, np.bool_)
    for side in SIDES:
        axis, before = int(side[0]), side[1] == "-"
        at = core[axis].start - 1 if before else core[axis].stop
        part = tuple(s for i, s in enumerate(core) if i != axis)
        if 0 <= at < labels.shape[axis]:
            plane = table[np.take(labels, at, axis=axis)[part]]
        else:  # the volume ends here
            plane = np.zeros((0, 0), np.uint32)
        extra[f"beyond{side}"] = plane
        at_face[plane.ravel()] = True
        at_face[table[np.take(labels[core], 0 if before else -1, axis=axis)].ravel()] = True
    named = table[apart]
    extra["apart"] = named[(named > 0).all(axis=1) & at_face[named].all(axis=1)]
    return Labeled(table[labels[core]], len(at_face) - 1, extra)


def _of_firsts(firsts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return (n, 2) each node and the first node of its object."""
    return np.stack([np.arange(len(firsts)), firsts], axis=1)


def _agreeing(group: Group, threshold: float) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float64]]]:
    """Yield for each face between blocks the pairs of nodes (m, 2) that agree and their scores (m,)."""
    blocks = group.blocks
    load = lru_cache(maxsize=BLOCKS_KEPT)(lambda n: blocks.load(n, *SIDES, *(f"beyond{side}" for side in SIDES)))
    for block, other, step in group.borders(6, behind=True):
        axis = next(a for a in range(3) if step[a])
        here, there = ("+", "-") if step[axis] > 0 else ("-", "+")
        low, high = load(block), load(other)
        first = np.concatenate([low[f"{axis}{here}"].ravel(), low[f"beyond{axis}{here}"].ravel()])
        second = np.concatenate([high[f"beyond{axis}{there}"].ravel(), high[f"{axis}{there}"].ravel()])
        pairs, scores = agreement(first, second)
        good = scores >= threshold
        yield pairs[good] + group.bases(block, other), scores[good]


def agreement(first: NDArray[Any], second: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Score how far two segmentations of the same voxels agree.

    Args:
        first, second: (n,) labels, 0 background.

    Returns:
        Pairs (m, 2) of labels that share a voxel, and (m,) the shared voxels divided by those of the smaller one.
    """
    both = (first > 0) & (second > 0)
    width = int(second.max(initial=0)) + 1
    keys, counts = np.unique(first[both].astype(np.int64) * width + second[both], return_counts=True)
    pairs = np.stack([keys // width, keys % width], axis=1)
    sizes = np.minimum(np.bincount(first)[pairs[:, 0]], np.bincount(second)[pairs[:, 1]])
    return pairs, counts / sizes


def stitched(
    nodes: int, pairs: NDArray[np.int64], scores: NDArray[np.float64], apart: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Unite pairs of nodes, the best first, unless that would unite two that are apart.

    Args:
        nodes: their number.
        pairs, scores: (m, 2) and (m,); of equal scores the pair of the smaller nodes goes first.
        apart: (n, 2) pairs of nodes.

    Returns:
        (nodes,) the first node of the object of each.
    """
    from connectomics.decoding.affinities import mutex_kernels as mutex

    order = np.lexsort((pairs[:, 1], pairs[:, 0], -scores))
    ends = np.concatenate([apart, pairs[order]]).astype(np.int32)
    # the kernel's edges are pairs of places in an array of nodes: here all first ends, and then all second ones
    edges, places = np.arange(len(ends), dtype=np.uint32), ends.T.ravel()
    bins, steps = np.array([0, len(apart), len(ends)]), np.full(2, len(ends))
    forest, _ = mutex.cluster(edges, bins, steps, np.array([False, True]), places, nodes)
    numbers = np.empty(nodes, np.int32)
    mutex.number_trees(forest, numbers)
    first = np.unique(numbers, return_index=True)[1]
    return np.asarray(first[numbers - 1], np.int64)
