"""The watershed on distances block by block: one frozen value, saved beside its output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from connectomics.decoding.blocks.stitched import Labelled, StitchedTask
from connectomics.decoding.blocks.stored import StoredBlocks
from connectomics.decoding.probabilities import above, open_probabilities, read_block
from connectomics.decoding.watershed.distance import DepthRule, heights
from connectomics.decoding.watershed.forest import Part, fragments
from connectomics.decoding.watershed.stitch import join, to_store
from connectomics.decoding.watershed.whole import seed_radius
from connectomics.errors import ConfigError
from connectomics.geometry import Index
from connectomics.tasks.task import Cost

# Voxels of a block. A block is read with a halo (45 to 51 voxels at 8 nm), which the edge of the volume cuts off: of
# blocks of 256, 512^3 has none with a whole one, and a larger volume would take 1.5 times the memory.
BLOCK = (192, 192, 192)


@dataclass(frozen=True)
class WatershedTask(StitchedTask):
    """One class's objects, cut where they are narrow.

    The labels are those of `connectomics.decoding.decode.decode_class` on the whole array, number by number, whatever
    the blocks: depth is exact up to ``parameters.max_depth_nm``, and so far beyond a block (and the seeds' reach) its
    probabilities are read.

    Raises:
        ConfigError: another method, or a boundary class.
    """

    kind: ClassVar[str] = "watershed"

    block_shape: Index = BLOCK

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.parameters.method != "watershed" or self.parameters.boundary:
            what = f"boundary {self.parameters.boundary}" if self.parameters.boundary else self.parameters.method
            raise ConfigError(f"decoding {self.class_name} by blocks of a watershed: {what} is another task")

    def open_labeller(self) -> Callable[[int], Labelled]:
        source, lattice, rule, radius = open_probabilities(self.input), self.lattice, self._rule, self._radius
        threshold, connectivity = self.parameters.threshold, self.parameters.connectivity

        def label(number: int) -> Labelled:
            part = Part(*lattice.region(number), lattice.shape, radius)
            begin, shape = part.grown(rule.halo)
            mask = above(read_block(source, begin, shape), threshold)
            start, size = part.grown()
            height = heights(mask, rule, [a - b for a, b in zip(start, begin, strict=True)], size)
            del mask
            found = fragments(height, part, connectivity, radius=radius, floor=-rule.cap)
            own = tuple(slice(b - s + 1, b - s + 1 + n) for b, s, n in zip(part.begin, start, part.shape, strict=True))
            return Labelled(found.labels, found.count, to_store(found, height[own]))

        return label

    def unite(self, blocks: StoredBlocks) -> NDArray[np.int64]:
        seeded = np.zeros(int(blocks.offsets[-1]), np.bool_)
        return join(blocks, self.parameters.connectivity, -self._rule.cap, seeded)

    def cost(self, stage: str) -> Cost:
        if stage == "write":
            return super().cost(stage)
        halo = np.asarray(self._rule.halo)
        block, near = np.asarray(self.block_shape), np.asarray(self.block_shape) + 2 * np.asarray(self._radius)
        read, part = int(np.prod(near + 2 * halo)), int(np.prod(near))
        rows = int(near[0] * np.prod((near + 2 * halo)[1:]))  # distances along z, before those along y and x
        return Cost(read=read, written=4 * int(np.prod(block)), memory=2 * read + max(4 * rows, 12 * part))

    @property
    def _radius(self) -> Index:
        return seed_radius(self.parameters.min_distance_nm, self.grid.voxel_size)

    @property
    def _rule(self) -> DepthRule:
        return DepthRule.of(self.grid.voxel_size, self.parameters.max_depth_nm, self.grid.shape)
