"""Which part of the validation crops is looked at: at most so many windows, the same at every validation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from connectomics.geometry import Index, Triple, VoxelGrid
from connectomics.inference.sliding import plan


@dataclass(frozen=True)
class WindowShape:
    """How validation slides over a grid; see `connectomics.inference.sliding.predict_blocks`."""

    window: Index
    overlap: float
    context: Sequence[int] | int | None
    block_size: Sequence[int] | int

    def count(self, grid: VoxelGrid) -> int:
        """Windows that a grid takes."""
        if grid.size == 0:
            return 0
        return plan(
            grid,
            channels=1,
            window=self.window,
            overlap=self.overlap,
            block_size=self.block_size,
            context=self.context,
        ).windows

    def tile(self, voxel_size: Triple) -> Index:
        """The largest grid that takes one window; that of the window where its context leaves no such grid."""
        found = []
        for axis, w in enumerate(self.window):
            lone = WindowShape(self.window, self.overlap, self._along(axis), 2**20)
            shapes = [tuple(n if a == axis else 1 for a in range(3)) for n in range(w, 0, -1)]
            grids = (VoxelGrid(voxel_size, (0.0, 0.0, 0.0), (z, y, x)) for z, y, x in shapes)
            found.append(next((grid.shape[axis] for grid in grids if lone.count(grid) == 1), w))
        return found[0], found[1], found[2]

    def _along(self, axis: int) -> Index | int | None:
        """The context along one axis alone."""
        if self.context is None:
            return None
        given = [self.context] * 3 if isinstance(self.context, int) else list(self.context)
        alone = [n if a == axis else 0 for a, n in enumerate(given)]
        return alone[0], alone[1], alone[2]


def validation_parts(
    grids: Sequence[VoxelGrid],
    shape: WindowShape,
    limit: int | None,
    points: Callable[[int, str], NDArray[np.float64]],
    classes: Sequence[str],
    seed: int,
) -> list[list[VoxelGrid]]:
    """The parts of each crop that validation predicts, at most ``limit`` windows together: crops whole as far as that
    allows, else tiles of one window each.

    Every crop gets the same number of windows, or all of its own if those are fewer. Half of a crop's tiles lie where
    its classes are, one class after the other; the others anywhere in it.

    Args:
        grids: of the crops, at the run's voxel size.
        limit: None for no limit.
        points: positions (n, 3), nm, of voxels where a class is present in a crop; asked for crops that are not whole.
        seed: of the choice, which is the same for the same arguments.
    """
    counts = np.array([shape.count(grid) for grid in grids])
    if limit is None or counts.sum() <= limit:
        return [[grid] if grid.size else [] for grid in grids]
    rng = np.random.default_rng([seed, 0x7A11])
    budgets = np.minimum(counts, _level(counts, limit))
    if budgets.sum() > limit:  # more crops than windows
        budgets[rng.permutation(np.flatnonzero(budgets))[limit:]] = 0
    tile = shape.tile(grids[0].voxel_size)
    found = []
    for number, (grid, budget) in enumerate(zip(grids, budgets, strict=True)):
        if budget == counts[number]:
            found.append([grid] if grid.size else [])
            continue
        order = [str(name) for name in rng.permutation(list(classes))]
        wanted = [points(number, name) for name in order] if budget > 1 else []
        found.append(_tiles(grid, tile, int(budget), [at for at in wanted if len(at)], rng))
    return found


def _level(counts: NDArray[np.int64], limit: int) -> int:
    """The most windows that a crop may have so that all together have at most ``limit``; at least 1."""
    low, high = 1, max(1, int(counts.max()))
    while low < high:
        middle = (low + high + 1) // 2
        if np.minimum(counts, middle).sum() <= limit:
            low = middle
        else:
            high = middle - 1
    return low


def _tiles(
    grid: VoxelGrid, tile: Index, budget: int, points: Sequence[NDArray[np.float64]], rng: np.random.Generator
) -> list[VoxelGrid]:
    """``budget`` tiles of a grid: half of them hold points, taken from each class in turn."""
    lattice = [-(-n // t) for n, t in zip(grid.shape, tile, strict=True)]
    chosen: dict[int, None] = {}
    for _ in range(budget // 2 if points else 0):
        at = points[len(chosen) % len(points)]
        place = np.floor(grid.to_index(at[int(rng.integers(len(at)))]) + 0.5).astype(int)
        inside = np.clip(place // np.asarray(tile), 0, np.asarray(lattice) - 1)
        chosen[int(np.ravel_multi_index(inside.tolist(), lattice))] = None
    for number in rng.permutation(int(np.prod(lattice))).tolist():
        if len(chosen) >= budget:
            break
        chosen[number] = None
    parts = []
    for number in sorted(chosen):
        begin = [int(b) * t for b, t in zip(np.unravel_index(number, lattice), tile, strict=True)]
        parts.append(grid.crop(begin, [min(t, n - b) for t, n, b in zip(tile, grid.shape, begin, strict=True)]))
    return parts
