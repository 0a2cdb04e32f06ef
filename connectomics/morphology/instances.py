"""Measures of every instance of a volume, in one pass over its blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from connectomics.decoding.label_artifact import BLOCK
from connectomics.geometry import VoxelGrid
from connectomics.io.multiscale import Multiscale
from connectomics.morphology.partial import NO_PAIRS, Partial, compact, margins, rows, united_whole
from connectomics.morphology.surface_area import sphericity, step_areas


@dataclass(frozen=True)
class Instances:
    """What was measured of n instances, sorted by id; 140 bytes a row.

    Attributes:
        grid: the volume's, nm.
        ids: (n,) uint64 values of the label array. sizes: (n,) voxels. sums: (n, 3) of z, y and x in voxels.
        boxes: (n, 6) smallest z y x, largest z y x (voxels, both inside).
        steps: (n, 7) pairs of a voxel and a neighbour with another label, see `connectomics.morphology.surface_area`.
    """

    grid: VoxelGrid
    ids: NDArray[np.uint64]
    sizes: NDArray[np.int64]
    sums: NDArray[np.int64]
    boxes: NDArray[np.int64]
    steps: NDArray[np.int64]

    @classmethod
    def of(cls, grid: VoxelGrid, found: Partial) -> Instances:
        """From the sums over all blocks."""
        tables = found.tables
        return cls(grid, found.ids, tables["sizes"][:, 0], tables["sums"], tables["boxes"], tables["steps"])

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def volume(self) -> NDArray[np.float64]:
        """(n,) nm3."""
        return self.sizes.astype(np.float64) * float(np.prod(self.grid.voxel_size))

    @property
    def surface(self) -> NDArray[np.float64]:
        """(n,) nm2 of the surface inside the volume: the cut through an object at the volume's border is none."""
        return self.steps @ step_areas(self.grid.voxel_size)

    @property
    def sphericity(self) -> NDArray[np.float64]:
        """(n,) 1 for a ball; NaN for instances that touch the border, of which only a part is seen."""
        return np.where(self.touches_border, np.nan, sphericity(self.volume, self.surface))

    @property
    def centroid(self) -> NDArray[np.float64]:
        """(n, 3) nm in the world: the mean of the voxels' centres."""
        return self.grid.to_world(self.sums / self.sizes[:, None])

    @property
    def box(self) -> NDArray[np.float64]:
        """(n, 6) nm in the world: faces of the bounding box, begin z y x and end z y x."""
        return np.hstack([self.grid.to_world(self.boxes[:, :3] - 0.5), self.grid.to_world(self.boxes[:, 3:] + 0.5)])

    @property
    def touches_border(self) -> NDArray[np.bool_]:
        """(n,) whether a voxel of it lies at the border of the volume."""
        last = np.asarray(self.grid.shape) - 1
        found: NDArray[np.bool_] = np.any((self.boxes[:, :3] == 0) | (self.boxes[:, 3:] == last), axis=1)
        return found


#: Tables of a block's part, and their widths.
TABLES = {"sizes": 1, "sums": 3, "boxes": 6, "steps": 7}


def instances_of_block(
    source: Multiscale, begin: Sequence[int], shape: Sequence[int], *, semantic: bool = False
) -> Partial:
    """The part of one block, that of ``shape`` voxels from ``begin`` of the finest level (z y x), in the instances.

    Memory: about 20 bytes a voxel.
    """
    from connectomics.morphology.measure_kernels import measure

    first, size, low = margins(source.levels[0].grid, begin, shape)
    stored, _ = source.read_level(0, first, size.tolist(), absent_is_missing=False)
    labels, ids = compact(stored, semantic=semantic)
    found = rows(TABLES, len(ids))
    if len(ids):
        measure(labels, low, low + shape, first, found["sizes"][:, 0], found["sums"], found["boxes"], found["steps"])
    own = found["sizes"][:, 0] > 0  # others lie in the margin only
    return Partial(ids[own], {name: table[own] for name, table in found.items()}, NO_PAIRS)


def measure_instances(source: Multiscale, *, semantic: bool = False, block: Sequence[int] = BLOCK) -> Instances:
    """Measure every instance of the finest level of a label volume, in this process.

    Counts are whole numbers, so the result does not depend on the blocks. Memory: 20 bytes a voxel of a block, and 200
    bytes for every block that an instance lies in (`MeasureTask` keeps these on disk).

    Args:
        source: labels: any integers, 0 is background.
        semantic: every voxel above 0 belongs to one instance, 1.
        block: voxels, z y x, that are read at once.
    """
    grid = source.levels[0].grid
    parts = [instances_of_block(source, begin, part.shape, semantic=semantic) for begin, part in grid.blocks(block)]
    return Instances.of(grid, united_whole(parts, TABLES))
