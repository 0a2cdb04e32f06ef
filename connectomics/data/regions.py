"""Regions of crops, about as large as a patch, and how hard each is: which of them training should see more often."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import ArrayLike, NDArray

from connectomics.geometry import Index, Triple, VoxelGrid, index, triple

_LEAST = 0.05  # of the mean: the least weight of a region, so that none is forgotten


@dataclass(frozen=True)
class Regions:
    """Crops divided into equal boxes, numbered through all crops.

    Attributes:
        grids: the lattice of each crop.
        shapes: how many boxes each crop has, z y x.
        starts: the number of the first box of each crop, and last the number of all.
    """

    grids: tuple[VoxelGrid, ...]
    shapes: tuple[Index, ...]
    starts: tuple[int, ...]

    @classmethod
    def of(cls, grids: Sequence[VoxelGrid], patch: Sequence[int]) -> Regions:
        """Divide each crop so that a box has about the size of a patch (voxels, z y x), or is the crop if that is
        smaller."""
        shapes = [index(max(1, round(n / p)) for n, p in zip(grid.shape, patch, strict=True)) for grid in grids]
        return cls(tuple(grids), tuple(shapes), tuple(accumulate(map(math.prod, shapes), initial=0)))

    def __len__(self) -> int:
        """Number of all regions."""
        return self.starts[-1]

    def number(self, crop: int, position: ArrayLike) -> int:
        """Return the region of a crop at a position (nm, z y x), or the nearest one."""
        grid, shape = self.grids[crop], self.shapes[crop]
        share = (grid.to_index(position) + 0.5) / grid.shape  # 0 to 1 within the crop
        box = np.clip(np.floor(share * shape).astype(int), 0, np.subtract(shape, 1))
        return self.starts[crop] + int(np.ravel_multi_index(tuple(box), shape))

    def place(self, number: int, u: ArrayLike) -> tuple[int, Triple]:
        """Return the crop of a region, and the position in the region (nm) that three numbers in [0, 1) draw."""
        crop = int(np.searchsorted(self.starts, number, side="right")) - 1
        grid, shape = self.grids[crop], self.shapes[crop]
        box = np.array(np.unravel_index(number - self.starts[crop], shape))
        return crop, triple(grid.to_world((box + np.asarray(u)) / shape * grid.shape - 0.5))


def region_weights(losses: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the weight of each region (R,) from its recent loss, NaN for a region that was not seen.

    Weights are in proportion to the loss, with a floor, and those of regions that were not seen are the largest: the
    rule of prioritized experience replay (arXiv:1511.05952, section 3.3, with alpha = 1).
    """
    seen = losses[~np.isnan(losses)]
    if not len(seen) or not seen.max() > 0:
        return np.ones(len(losses))
    return np.maximum(np.where(np.isnan(losses), seen.max(), losses), _LEAST * seen.mean())
