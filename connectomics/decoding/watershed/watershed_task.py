"""The watershed block by block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from connectomics.decoding.blocks.groups import Group, StoredGroups
from connectomics.decoding.blocks.stitched_task import Labeled, StitchedTask
from connectomics.decoding.prediction import Foreground, StoredHead
from connectomics.decoding.watershed.forest import Part, fragments, seed_radius
from connectomics.decoding.watershed.heights import DepthRule, depth_heights
from connectomics.decoding.watershed.stitch import join, to_store, unite_group
from connectomics.geometry import Index
from connectomics.tasks.block_task import Cost

# Voxels of a block. A block is read with a halo (45 to 51 voxels at 8 nm), which the edge of the volume cuts off: of
# blocks of 256, 512^3 has none with a whole one, and a larger volume would take 1.5 times the memory.
BLOCK = (192, 192, 192)


@dataclass(frozen=True)
class WatershedTask(StitchedTask):
    """The objects of a class, split where they are narrow, or where a head sees a border (``parameters.height``).

    The labels are those of `connectomics.decoding.decode.decode_class` on the whole
    array, number by number, whatever the blocks: depth is exact up to ``parameters.max_depth_nm``, and probabilities
    are read this far (and the reach of the seeds) beyond a block.
    """

    kind: ClassVar[str] = "watershed"
    methods: ClassVar[tuple[str, ...]] = ("watershed",)

    block_shape: Index = BLOCK

    def check_input(self) -> None:
        foreground = self.open_foreground()
        if self.parameters.height == "distance":
            StoredHead.open(foreground.source, "distance")

    def open_labeler(self) -> Callable[[int], Labeled]:
        lattice, radius = self.lattice, self._radius
        height_of, floor = self._open_heights(self.open_foreground())
        connectivity = self.parameters.connectivity

        def label(number: int) -> Labeled:
            part = Part(*lattice.region(number), lattice.shape, radius)
            height = height_of(part)
            found = fragments(height, part, connectivity, radius=radius, floor=floor)
            return Labeled(found.labels, found.count, to_store(found, height, part))

        return label

    def _open_heights(self, foreground: Foreground) -> tuple[Callable[[Part], NDArray[np.int32]], int]:
        """Return what gives the heights of a part with its halo, and the floor at which pieces are one."""
        if self.parameters.height == "distance":
            head = StoredHead.open(foreground.source, "distance")
            learned = head.rule(self.parameters.max_depth_nm)

            def of_head(part: Part) -> NDArray[np.int32]:
                return learned.heights(foreground.cores(*part.grown()), head.read(*part.grown()))

            return of_head, learned.floor
        rule = self._rule

        def of_mask(part: Part) -> NDArray[np.int32]:
            begin, shape = part.grown(rule.halo)
            mask = foreground.cores(begin, shape)
            start, size = part.grown()
            return depth_heights(mask, rule, [a - b for a, b in zip(start, begin, strict=True)], size)

        return of_mask, -rule.cap

    def unite_group(self, group: Group, groups: StoredGroups) -> NDArray[np.int64]:
        return unite_group(group, groups, self.parameters.connectivity, self._floor)

    def unite(self, groups: StoredGroups) -> NDArray[np.int64]:
        return join(groups, self._floor, np.zeros(int(groups.offsets[-1]), np.bool_))

    def label_cost(self, stage: str) -> Cost:
        if stage != "label":
            return super().label_cost(stage)
        halo = np.zeros(3, int) if self.parameters.height == "distance" else np.asarray(self._rule.halo)
        block, near = np.asarray(self.block_shape), np.asarray(self.block_shape) + 2 * np.asarray(self._radius)
        read, part = int(np.prod(near + 2 * halo)), int(np.prod(near))
        rows = int(near[0] * np.prod((near + 2 * halo)[1:]))  # distances along z, before those along y and x
        return Cost(read=read, written=4 * int(np.prod(block)), memory=2 * read + max(4 * rows, 12 * part))

    @property
    def _floor(self) -> int:
        return self._open_heights(self.open_foreground())[1]

    @property
    def _radius(self) -> Index:
        return seed_radius(self.parameters.min_distance_nm, self.grid.voxel_size)

    @property
    def _rule(self) -> DepthRule:
        return DepthRule.of(self.grid.voxel_size, self.parameters.max_depth_nm, self.grid.shape)
