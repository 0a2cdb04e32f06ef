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

from connectomics.decoding.blocks.pieces import (
    FACES_KEPT,
    SIDES,
    Pieces,
    StoredBlocks,
    border,
    faces_of,
    gathered,
    number_trees,
    numbered,
    opposite,
    reach,
    relabel,
)
from connectomics.decoding.prediction import Foreground
from connectomics.decoding.watershed.forest import NO_FLOOR, Edges, Fragments, Part, fragments
from connectomics.decoding.watershed.heights import boundary_heights
from connectomics.geometry import Index
from connectomics.io.write import ArrayWriter
from connectomics.tasks.blocks import Lattice

#: Labels and heights on the faces of a block.
Faces = tuple[dict[str, NDArray[np.uint32]], dict[str, NDArray[np.int32]]]
_EDGES = ("ones", "twos", "worse", "better", "worse_height", "better_height")


def to_store(found: Fragments, height: NDArray[np.int32], part: Part) -> dict[str, NDArray[np.generic]]:
    """Return what is stored of a block beside its labels; ``height``: of ``part.grown()`` with a rim of one voxel."""
    start, _ = part.grown()
    own = tuple(slice(b - s + 1, b - s + 1 + n) for b, s, n in zip(part.begin, start, part.shape, strict=True))
    edges = {name: getattr(found.edges, name) for name in _EDGES}
    heights = {f"height{side}": plane for side, plane in faces_of(height[own]).items()}
    return {"seeded": found.seeded, **edges, **heights}


def join(
    blocks: StoredBlocks, connectivity: int, floor: int, seeded: NDArray[np.bool_], cores: int = 0
) -> NDArray[np.int64]:
    """Return the union-find forest over the fragments of all blocks.

    Memory: 40 bytes for each edge that is left, and 16 more while they are sorted.

    Args:
        floor: edges no higher join any two.
        seeded: (nodes,) zeros; set to whether the tree of a root holds a seed.
        cores: number of cores; fragments that hold a voxel of the same one (stored as ``core``) are one from the start.
    """
    from connectomics.decoding.watershed.forest_kernels import join_seeded

    parts = []
    forest = np.arange(blocks.offsets[-1])
    holder = np.full(cores + 1, -1, np.int64)  # the first fragment of each core
    for block in range(len(blocks.lattice)):
        if not blocks.count(block):
            continue
        stored = blocks.load(block, "seeded", *_EDGES)
        first = int(blocks.offsets[block])
        seeded[first : first + blocks.count(block)] = stored.pop("seeded")
        if cores:
            core = blocks.load(block, "core")["core"]
            nodes = np.flatnonzero(core)
            core, nodes = core[nodes], nodes + first
            new = holder[core] < 0
            holder[core[new]] = nodes[new]  # a core occurs once in a block
            forest[nodes] = holder[core]
        parts.append(_shifted(Edges(**stored), first - 1, first - 1))
    parts.extend(_across(blocks, connectivity))
    if parts:
        edges = Edges(*(np.concatenate([getattr(part, name) for part in parts]) for name in _EDGES))
        join_seeded(edges.ones, edges.twos, edges.worse_height <= floor, edges.order, seeded, forest)
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


def grown_objects(blocks: StoredBlocks, connectivity: int, cores: int) -> tuple[Pieces, NDArray[np.int64]]:
    """Unite the fragments of all blocks; ``cores``: their number.

    Returns:
        The objects, by their first voxel, and (nodes,) the label of each fragment, 0 if it is connected to no core.
    """
    seeded = np.zeros(int(blocks.offsets[-1]), np.bool_)
    trees = join(blocks, connectivity, NO_FLOOR, seeded, cores)
    reached = seeded[trees == np.arange(len(trees))]
    objects = gathered(blocks, trees, number_trees(trees))
    objects.sizes[~reached] = 0
    kept, label = numbered(objects, 1)
    return kept, relabel(trees, label)


def _faces(blocks: StoredBlocks, block: int) -> Faces:
    heights = blocks.load(block, *(f"height{side}" for side in SIDES))
    return blocks.faces(block), {name.removeprefix("height"): plane for name, plane in heights.items()}


def _across(blocks: StoredBlocks, connectivity: int) -> Iterator[Edges]:
    """Yield the edges across each border between blocks."""
    from connectomics.decoding.watershed.forest_kernels import border_edges

    load = lru_cache(maxsize=FACES_KEPT)(partial(_faces, blocks))
    for block, other, step in blocks.borders(connectivity):
        sides = []
        for number, way in ((block, step), (other, opposite(step))):
            labels, heights = load(number)
            plane = border(labels, way)
            sides.append((plane, border(heights, way), _numbers(blocks, number, way).reshape(plane.shape)))
        (low, low_height, low_number), (high, high_height, high_number) = sides
        edges = border_edges(low, high, low_height, high_height, low_number, high_number, reach(step, connectivity))
        yield _shifted(Edges(*edges), int(blocks.offsets[block]) - 1, int(blocks.offsets[other]) - 1)


def _numbers(blocks: StoredBlocks, block: int, step: Index) -> NDArray[np.int64]:
    """Return the numbers (in the volume) of the voxels of a block next to its neighbor in direction ``step``, flat."""
    begin, shape = blocks.lattice.region(block)
    whole = blocks.lattice.shape
    ranges = [
        np.arange(b, b + n) if s == 0 else np.asarray([b + n - 1 if s > 0 else b])
        for b, n, s in zip(begin, shape, step, strict=True)
    ]
    z, y, x = np.ix_(*ranges)
    return np.asarray(((z * whole[1] + y) * whole[2] + x).reshape(-1), np.int64)


def _shifted(edges: Edges, one: int, two: int) -> Edges:
    """Return edges between nodes of all blocks from edges between labels."""
    return replace(edges, ones=edges.ones + one, twos=edges.twos + two)
