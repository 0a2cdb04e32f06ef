"""From the fragments of blocks to the objects of the volume: the forest over what the blocks leave.

Cores are grown over a mask the same way, as `connectomics.decoding.watershed.forest.grow` does on the whole array: the
fragments of all blocks that hold a voxel of one core are one from the start.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache, partial

import numpy as np
from numpy.typing import NDArray

from connectomics.decoding.blocks.groups import BLOCKS_KEPT, Group, StoredGroups, gathered, number_trees
from connectomics.decoding.blocks.pieces import SIDES, Pieces, StoredBlocks, border, faces_of, numbered, opposite, reach
from connectomics.decoding.prediction import Foreground
from connectomics.decoding.watershed.forest import NO_FLOOR, Edges, Fragments, Part, fragments
from connectomics.decoding.watershed.heights import boundary_heights
from connectomics.geometry import Index, slices_of
from connectomics.io.write import ArrayWriter
from connectomics.tasks.blocks import Lattice

#: Labels and heights on the faces of a block.
Faces = tuple[dict[str, NDArray[np.uint32]], dict[str, NDArray[np.int32]]]
_EDGES = ("ones", "twos", "worse", "better", "worse_height", "better_height")


def to_store(found: Fragments, height: NDArray[np.int32], part: Part) -> dict[str, NDArray[np.generic]]:
    """Return what is stored of a block beside its labels; ``height``: of ``part.grown()`` with a rim of one voxel."""
    start, _ = part.grown()
    own = slices_of(np.subtract(part.begin, start) + 1, part.shape)
    edges = {name: getattr(found.edges, name) for name in _EDGES}
    heights = {f"height{side}": plane for side, plane in faces_of(height[own]).items()}
    return {"seeded": found.seeded, **edges, **heights}


def unite_group(
    group: Group, groups: StoredGroups, connectivity: int, floor: int, cored: bool = False
) -> NDArray[np.int64]:
    """Unite the fragments of a group that nothing beyond it can separate; store what `join` needs.

    Args:
        floor: edges no higher join any two.
        cored: fragments that hold a voxel of the same core (stored as ``core``) are one from the start.

    Returns:
        (group.size,) the tree of each fragment.
    """
    from connectomics.decoding.watershed.forest_kernels import contract

    parts, seeds, cores = [], [np.zeros(0, np.bool_)], [np.zeros(0, np.int64)]
    for block in group.parts:
        stored = group.blocks.load(block, "seeded", *_EDGES, *(["core"] if cored else []))
        seeds.append(stored.pop("seeded"))
        cores.append(stored.pop("core", np.zeros(len(seeds[-1]), np.int64)))
        parts.append(_shifted(Edges(**stored), group.first(block) - 1, group.first(block) - 1))
    edges = _together([*parts, *_across(group, connectivity)])
    order = edges.order
    ranks = np.empty(len(order), np.int64)
    ranks[order] = np.arange(len(order))
    forest = np.arange(group.nodes)
    seeded, core = np.zeros(group.nodes, np.bool_), np.concatenate(cores)
    seeded[: group.size] = np.concatenate(seeds)
    if cored:
        forest[: group.size] = _united_cores(core)
    out, leaving = np.full(group.nodes, len(order)), edges.twos >= group.size
    np.minimum.at(out, forest[edges.ones[leaving]], ranks[leaving])
    kept = np.zeros(len(order), np.bool_)
    contract(edges.ones, edges.twos, ranks, order, edges.worse_height <= floor, group.size, seeded, out, forest, kept)
    trees = forest[: group.size]
    seeded = seeded[: group.size][trees == np.arange(group.size)]
    n = number_trees(trees)
    core_of = np.zeros(n, np.int64)
    np.maximum.at(core_of, trees, core)  # a tree has one at most: without a floor no edge joins two seeds
    # of edges between two groups, the one with the smaller block stores them
    beyond = group.named(np.where(leaving, edges.twos, 0))
    kept &= ~leaving | (beyond[:, 0] > group.named(edges.ones)[:, 0])
    more = {name: getattr(edges, name)[kept] for name in _EDGES}
    more["ones"], outer = trees[more["ones"]], leaving[kept]
    more["twos"][~outer] = trees[more["twos"][~outer]]
    more["twos"][outer] = -1
    more["there"] = beyond[kept & leaving]
    groups.store(group, trees, n, np.empty((0, 2), np.int64), seeded=seeded, core=core_of, **more)
    return trees


def join(groups: StoredGroups, floor: int, seeded: NDArray[np.bool_], cores: int = 0) -> NDArray[np.int64]:
    """Return the union-find forest over the trees of all groups.

    Memory: 40 bytes for each edge that is left, and 16 more while they are sorted.

    Args:
        floor: edges no higher join any two.
        seeded: (nodes,) zeros; set to whether the tree of a root holds a seed.
        cores: number of cores; trees that hold a voxel of the same one are one from the start.
    """
    from connectomics.decoding.watershed.forest_kernels import join_seeded

    parts, core = [], [np.zeros(0, np.int64)]
    for group in groups.parts:
        stored = groups.load(group, "seeded", "core", "there", *_EDGES)
        first = int(groups.offsets[group])
        seeded[slice(*groups.offsets[group : group + 2])] = stored.pop("seeded")
        core.append(stored.pop("core"))
        stored["twos"][stored["twos"] < 0] = groups.nodes_of(stored.pop("there")) - first
        parts.append(_shifted(Edges(**stored), first, first))
    forest = _united_cores(np.concatenate(core)) if cores else np.arange(len(seeded))
    edges = _together(parts)
    join_seeded(edges.ones, edges.twos, edges.worse_height <= floor, edges.order, seeded, forest)
    return forest


def _united_cores(core: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the forest (n,) in which nodes of the same core (0: none) have the first of them as their parent."""
    forest, nodes = np.arange(len(core)), np.flatnonzero(core)
    _, first, inverse = np.unique(core[nodes], return_index=True, return_inverse=True)
    forest[nodes] = nodes[first][inverse]
    return forest


def grown_block(
    foreground: Foreground, cores: ArrayWriter, lattice: Lattice, number: int, connectivity: int
) -> tuple[Fragments, dict[str, NDArray[np.generic]]]:
    """Return the fragments of a block, grown from cores, and what is stored with them.

    Args:
        cores: the array of the labels of all cores.
    """
    part = Part(*lattice.region(number), lattice.shape, (1, 1, 1))
    start, size = part.grown()
    mask = foreground.mask(start, size)
    # without foreground, neither boundary nor cores matter
    boundary = foreground.boundaries(start, size) if mask.any() else np.zeros(size, np.uint8)
    height = boundary_heights(mask, boundary)
    found = fragments(height, part, connectivity, cores=cores.read(start, size), floor=NO_FLOOR)
    return found, {"core": found.cores, **to_store(found, height, part)}


def grown_objects(groups: StoredGroups, cores: int) -> tuple[Pieces, NDArray[np.int64]]:
    """Unite the trees of all groups; ``cores``: their number.

    Returns:
        The objects, by their first voxel, and (nodes,) the label of each tree, 0 if it is connected to no core.
    """
    seeded = np.zeros(int(groups.offsets[-1]), np.bool_)
    trees = join(groups, NO_FLOOR, seeded, cores)
    reached = seeded[trees == np.arange(len(trees))]
    objects = gathered(groups, trees, number_trees(trees))
    objects.sizes[~reached] = 0
    kept, label = numbered(objects, 1)
    return kept, label[trees]


def _faces(blocks: StoredBlocks, block: int) -> Faces:
    heights = blocks.load(block, *(f"height{side}" for side in SIDES))
    return blocks.faces(block), {name.removeprefix("height"): plane for name, plane in heights.items()}


def _across(group: Group, connectivity: int) -> Iterator[Edges]:
    """Yield the edges across each border between blocks of a group, and those to blocks around it."""
    from connectomics.decoding.blocks.pair_table import filled
    from connectomics.decoding.watershed.forest_kernels import border_edges

    blocks = group.blocks
    load = lru_cache(maxsize=BLOCKS_KEPT)(partial(_faces, blocks))
    for block, other, step in group.borders(connectivity, behind=True):
        sides = []
        for number, way in ((block, step), (other, opposite(step))):
            labels, heights = load(number)
            plane = border(labels, way)
            sides.append((plane, border(heights, way), _numbers(blocks, number, way).reshape(plane.shape)))
        (low, low_height, low_number), (high, high_height, high_number) = sides
        edges = border_edges(low, high, low_height, high_height, low_number, high_number, reach(step, connectivity))
        yield _shifted(Edges(*filled(*edges)), group.first(block) - 1, group.first(other) - 1)


def _numbers(blocks: StoredBlocks, block: int, step: Index) -> NDArray[np.int64]:
    """Return the numbers (in the volume) of the voxels of a block next to its neighbor in direction ``step``."""
    begin, shape = blocks.lattice.region(block)
    whole = blocks.lattice.shape
    ranges = [
        np.arange(b, b + n) if s == 0 else np.asarray([b + n - 1 if s > 0 else b])
        for b, n, s in zip(begin, shape, step, strict=True)
    ]
    z, y, x = np.ix_(*ranges)
    return np.asarray((z * whole[1] + y) * whole[2] + x, np.int64)


def _shifted(edges: Edges, one: int, two: int) -> Edges:
    """Return edges between nodes of all blocks from edges between labels."""
    return replace(edges, ones=edges.ones + one, twos=edges.twos + two)


def _together(parts: list[Edges]) -> Edges:
    """Return all edges as one."""
    return Edges(*(np.concatenate([getattr(part, name) for part in parts]) for name in _EDGES))
