"""From the fragments of blocks to the objects of the volume: the forest over what is left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import numpy as np
from numpy.typing import NDArray

from connectomics.decoding.blocks.merge import FACES_KEPT
from connectomics.decoding.blocks.pieces import border, faces_of, reach
from connectomics.decoding.blocks.stored import SIDES, StoredBlocks
from connectomics.decoding.watershed.forest import Edges, Fragments

#: labels and heights on the six faces of a block
Faces = tuple[dict[str, NDArray[np.uint32]], dict[str, NDArray[np.int32]]]
_EDGES = ("ones", "twos", "worse", "better", "worse_height", "better_height")


def to_store(found: Fragments, height: NDArray[np.int32]) -> dict[str, NDArray[np.generic]]:
    """What is stored of a block beside its labels; ``height`` (d, h, w) of the block itself."""
    edges = {name: getattr(found.edges, name) for name in _EDGES}
    heights = {f"height{side}": plane for side, plane in faces_of(height).items()}
    return {"seeded": found.seeded, **edges, **heights}


def join(
    blocks: StoredBlocks, connectivity: int, floor: int, seeded: NDArray[np.bool_], cores: int = 0
) -> NDArray[np.int64]:
    """The union-find forest over the fragments of all blocks, see `connectomics.decoding.blocks.merge.unite_touching`.

    Memory: 40 bytes and 16 more while they are sorted for each edge that is left.

    Args:
        floor: edges no higher join any two.
        seeded: (nodes,) takes whether the tree of a root holds a seed; zeros.
        cores: how many there are: fragments that hold a voxel of the same one (stored as ``core``) are one at once.
    """
    from connectomics.decoding.watershed.forest_kernels import join_seeded

    faces = lru_cache(maxsize=FACES_KEPT)(partial(_faces, blocks))
    parts = []
    forest = np.arange(blocks.offsets[-1])
    holder = np.full(cores + 1, -1, np.int64)  # the first fragment of each core
    for block in range(len(blocks.lattice)):
        if blocks.count(block):
            stored = blocks.load(block, "seeded", *_EDGES)
            first = int(blocks.offsets[block])
            seeded[first : first + blocks.count(block)] = stored.pop("seeded")
            if cores:
                core = blocks.load(block, "core")["core"]
                nodes = np.flatnonzero(core)
                core, nodes = core[nodes], nodes + first
                new = holder[core] < 0
                holder[core[new]] = nodes[new]  # a core comes once in a block
                forest[nodes] = holder[core]
            edges = Edges(**stored)
            parts.append(_shifted(edges, first - 1, first - 1))
            parts.extend(_across(blocks, block, connectivity, faces))
    edges = _together(parts)
    join_seeded(edges.ones, edges.twos, edges.worse_height <= floor, edges.order, seeded, forest)
    return forest


def _faces(blocks: StoredBlocks, block: int) -> Faces:
    """Labels and heights on the faces of a block."""
    labels = blocks.faces(block)
    heights = blocks.load(block, *(f"height{side}" for side in SIDES))
    return labels, {name.removeprefix("height"): plane for name, plane in heights.items()}


def _across(blocks: StoredBlocks, block: int, connectivity: int, faces: Callable[[int], Faces]) -> list[Edges]:
    """The edges to the blocks that come after this one."""
    from connectomics.decoding.watershed.border_kernels import border_edges

    found = []
    for step, other in blocks.lattice.neighbors(block, connectivity):
        if not blocks.count(other):
            continue
        back = (-step[0], -step[1], -step[2])
        sides = []
        for number, way in ((block, step), (other, back)):
            labels, heights = faces(number)
            sides.append((border(labels, way), border(heights, way), _numbers(blocks, number, way)))
        (low, low_height, low_number), (high, high_height, high_number) = sides
        columns = border_edges(
            low,
            high,
            low_height,
            high_height,
            low_number.reshape(low.shape),
            high_number.reshape(high.shape),
            reach(step, connectivity),
        )
        shifts = int(blocks.offsets[block]) - 1, int(blocks.offsets[other]) - 1
        found.append(_shifted(Edges(*columns), *shifts))
    return found


def _numbers(blocks: StoredBlocks, block: int, step: Sequence[int]) -> NDArray[np.int64]:
    """Numbers in the volume of the voxels of a block next to its neighbour in direction ``step``, flat."""
    begin, shape = blocks.lattice.region(block)
    whole = blocks.lattice.shape
    ranges = [
        np.arange(b, b + n) if s == 0 else np.asarray([b + n - 1 if s > 0 else b])
        for b, n, s in zip(begin, shape, step, strict=True)
    ]
    z, y, x = np.ix_(*ranges)
    return np.asarray(((z * whole[1] + y) * whole[2] + x).reshape(-1), np.int64)


def _shifted(edges: Edges, one: int, two: int) -> Edges:
    """The edges between nodes of all blocks, from those between labels."""
    rest = (edges.worse, edges.better, edges.worse_height, edges.better_height)
    return Edges(edges.ones + one, edges.twos + two, *rest)


def _together(parts: Sequence[Edges]) -> Edges:
    if not parts:
        none = np.zeros(0, np.int64)
        return Edges(none, none, none, none, none.astype(np.int32), none.astype(np.int32))
    return Edges(*(np.concatenate([getattr(part, name) for part in parts]) for name in _EDGES))
