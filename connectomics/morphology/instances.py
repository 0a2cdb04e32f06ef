"""Measures of every instance of a label volume, in one pass over its blocks.

Surface areas follow the Cauchy-Crofton formula over 13 directions, for voxels of any edge lengths. Along a direction to
a neighbor at distance d, one line stands for ``volume of a voxel / d`` of the plane across it, and every pass of a line
through the object is two steps out of it. A direction weighs as much as its Voronoi cell on the sphere. Sources:
J. Ohser and F. Muecklich, Statistical Analysis of Microstructures in Materials Science, Wiley 2000; D. Legland, K. Kieu
and M.-F. Devaux, Image Anal. Stereol. 26 (2007) 83-92. Measured errors: docs/measures.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.geometry import VoxelGrid
from connectomics.io.multiscale import Multiscale
from connectomics.morphology.block_sums import BLOCK, NO_PAIRS, BlockSums, compact, empty_tables, sum_in_memory
from connectomics.tasks.blocks import with_halo

#: Tables of `instances_of_block` and their widths.
TABLES = {"sizes": 1, "sums": 3, "boxes": 6, "steps": 7}
# One step of each kind, in the order of the kernels' counts: 4 z + 2 y + x - 1.
_STEPS = np.array([(0, 0, 1), (0, 1, 0), (0, 1, 1), (1, 0, 0), (1, 0, 1), (1, 1, 0), (1, 1, 1)])


@dataclass(frozen=True)
class Instances:
    """Measures of n instances, sorted by ID; 140 bytes a row.

    Attributes:
        grid: grid of the volume, nm.
        ids: (n,) uint64 values of the label array.
        sizes: (n,) voxels.
        sums: (n, 3) of z, y and x in voxels.
        boxes: (n, 6) smallest z y x, largest z y x (voxels, both inside).
        steps: (n, 7) pairs of a voxel and a neighbor with another label, by kind of step.
    """

    grid: VoxelGrid
    ids: NDArray[np.uint64]
    sizes: NDArray[np.int64]
    sums: NDArray[np.int64]
    boxes: NDArray[np.int64]
    steps: NDArray[np.int64]

    @classmethod
    def of(cls, grid: VoxelGrid, found: BlockSums) -> Instances:
        """Return the measures that the sums over all blocks give."""
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
        """(n,) nm2 inside the volume: where the volume's border cuts an object there is no surface."""
        return self.steps @ step_areas(self.grid.voxel_size)

    @property
    def sphericity(self) -> NDArray[np.float64]:
        """(n,) 1 for a ball; NaN for instances that touch the border, because only a part of them is seen."""
        return np.where(self.touches_border, np.nan, sphericity(self.volume, self.surface))

    @property
    def centroid(self) -> NDArray[np.float64]:
        """(n, 3) world position in nm: the mean of the voxel centers."""
        return self.grid.to_world(self.sums / self.sizes[:, None])

    @property
    def box(self) -> NDArray[np.float64]:
        """(n, 6) world positions in nm: faces of the bounding box, begin z y x and end z y x."""
        return np.hstack([self.grid.to_world(self.boxes[:, :3] - 0.5), self.grid.to_world(self.boxes[:, 3:] + 0.5)])

    @property
    def touches_border(self) -> NDArray[np.bool_]:
        """(n,) whether one of its voxels lies at the border of the volume."""
        last = np.asarray(self.grid.shape) - 1
        found: NDArray[np.bool_] = np.any((self.boxes[:, :3] == 0) | (self.boxes[:, 3:] == last), axis=1)
        return found


def instances_of_block(
    source: Multiscale, begin: Sequence[int], shape: Sequence[int], *, semantic: bool = False
) -> BlockSums:
    """Measure the block of ``shape`` voxels from ``begin`` (z y x, finest level); memory about 20 bytes per voxel."""
    from connectomics.morphology.measure_kernels import measure

    first, size, inner = with_halo(begin, shape, (1, 1, 1), source.levels[0].grid.shape)
    stored, _ = source.read_level(0, first, size, absent_is_missing=False)
    labels, ids = compact(stored, semantic=semantic)
    found = empty_tables(TABLES, len(ids))
    if len(ids):
        low, high = np.asarray(inner), np.asarray(inner) + np.asarray(shape)
        sizes, origin = found["sizes"][:, 0], np.asarray(first)
        measure(labels, low, high, origin, sizes, found["sums"], found["boxes"], found["steps"])
    return BlockSums(ids, found, NO_PAIRS).select(found["sizes"][:, 0] > 0)  # others lie in the margin only


def measure_instances(source: Multiscale, *, semantic: bool = False, block: Sequence[int] = BLOCK) -> Instances:
    """Measure every instance of the finest level of a label volume, in this process.

    Counts are whole numbers, so the result does not depend on the blocks. Memory: 20 bytes per voxel of a block, and
    200 bytes for every block that an instance lies in (`MeasureTask` keeps these on disk).

    Args:
        source: labels: any integers, 0 is background.
        semantic: treat all voxels above 0 as one instance with ID 1.
        block: voxels to read at once, z y x.
    """
    grid = source.levels[0].grid
    parts = [instances_of_block(source, begin, part.shape, semantic=semantic) for begin, part in grid.blocks(block)]
    return Instances.of(grid, sum_in_memory(parts, TABLES))


def direction_shares(voxel_size: Sequence[float]) -> NDArray[np.float64]:
    """Return the part of the sphere nearest to one of the 26 directions, (7,) by kind; ``voxel_size`` nm, z y x."""
    from scipy.spatial import SphericalVoronoi

    steps = np.argwhere(np.ones((3, 3, 3), np.bool_)) - 1
    steps = steps[np.any(steps != 0, axis=1)]
    lengths = steps * np.asarray(voxel_size, np.float64)
    cells = SphericalVoronoi(lengths / np.linalg.norm(lengths, axis=1)[:, None])
    areas = cells.calculate_areas() / (4 * np.pi)
    # directions of one kind are mirror images of each other: the mean only removes rounding
    return np.array([areas[np.all(np.abs(steps) == kind, axis=1)].mean() for kind in _STEPS])


def step_areas(voxel_size: Sequence[float]) -> NDArray[np.float64]:
    """Return the nm2 of surface that one step out of the object stands for, (7,) by kind; ``voxel_size`` nm, z y x."""
    size = np.asarray(voxel_size, np.float64)
    areas: NDArray[np.float64] = (
        4 * np.prod(size) * direction_shares(voxel_size) / np.linalg.norm(_STEPS * size, axis=1)
    )
    return areas


def sphericity(volume: NDArray[Any], surface: NDArray[Any]) -> NDArray[np.float64]:
    """Return pi^(1/3) (6 V)^(2/3) / A, a ball's area over that of an object of its volume (H. Wadell, J. Geol. 1935).

    1 for a ball, 0.81 for a true cube; NaN without surface. Objects of a few voxels may come out above 1.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.pi ** (1 / 3) * (6 * np.asarray(volume, np.float64)) ** (2 / 3) / surface
    return np.where(np.asarray(surface) > 0, found, np.nan)
