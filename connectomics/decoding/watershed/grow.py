"""Growing cores over a mask, block by block: `connectomics.decoding.watershed.whole.grow` on the whole array.

The voxels of a core are one from the start, wherever they lie. So are the fragments of all blocks that hold a voxel of
one core; what remains is the forest over the fragments, as for any watershed.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from connectomics.decoding.blocks.foreground import Foreground
from connectomics.decoding.blocks.merge import gathered, number_trees, numbered, renamed
from connectomics.decoding.blocks.pieces import Pieces
from connectomics.decoding.blocks.stored import StoredBlocks
from connectomics.decoding.watershed.forest import NO_FLOOR, Fragments, Part, fragments
from connectomics.decoding.watershed.stitch import join, to_store
from connectomics.decoding.watershed.whole import walls
from connectomics.io.write import ArrayWriter
from connectomics.tasks.blocks import Lattice


def grown_block(
    foreground: Foreground, cores: ArrayWriter, lattice: Lattice, number: int, connectivity: int
) -> tuple[Fragments, dict[str, NDArray[np.generic]]]:
    """The fragments of a block, and what is stored with them; ``cores``: the array of all cores' labels."""
    part = Part(*lattice.region(number), lattice.shape, (1, 1, 1))
    start, size = part.grown()
    mask = foreground.mask(start, size)
    # what is nowhere in the mask needs neither walls nor cores
    height = walls(mask, foreground.heights(start, size) if mask.any() else np.zeros(size, np.uint8))
    found = fragments(height, part, connectivity, cores=cores.read(start, size), floor=NO_FLOOR)
    own = tuple(slice(b - s + 1, b - s + 1 + n) for b, s, n in zip(part.begin, start, part.shape, strict=True))
    return found, {"core": found.cores, **to_store(found, height[own])}


def grown_objects(blocks: StoredBlocks, connectivity: int, cores: int) -> tuple[Pieces, NDArray[np.int64]]:
    """Unite the fragments of all blocks; ``cores``: how many there are.

    Returns:
        The table of the objects, by their first voxel, and (nodes,) the label of each fragment, 0 for those that hold
        together with no core.
    """
    seeded = np.zeros(int(blocks.offsets[-1]), np.bool_)
    trees = join(blocks, connectivity, NO_FLOOR, seeded, cores)
    reached = seeded[trees == np.arange(len(trees))]
    n = number_trees(trees)
    objects = gathered(blocks, trees, n)
    objects.sizes[~reached] = 0
    kept, label = numbered(objects, 1)
    return kept, renamed(trees, label)
