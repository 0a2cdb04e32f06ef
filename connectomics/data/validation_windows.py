"""Which part of the validation crops is validated: a limited number of windows, the same at every validation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from connectomics.cellmap.catalog import Crop
from connectomics.config import RunConfig
from connectomics.data.foreground import foreground_points
from connectomics.errors import number_of
from connectomics.geometry import Index, Triple, VoxelGrid, index
from connectomics.inference.sliding import plan
from connectomics.inference.windows import BLOCK, WindowFit

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WindowShape:
    """How validation slides over a grid; see `connectomics.inference.sliding.predict_blocks`."""

    window: Index
    overlap: Sequence[float] | float
    context: Sequence[int] | int | None
    block_size: Sequence[int] | int
    fit: WindowFit | None = None
    blending: str = "gaussian"

    def count(self, grid: VoxelGrid) -> int:
        """Return the number of windows that a grid takes."""
        return plan(grid, channels=1, **vars(self)).windows if grid.size else 0

    def tile(self, voxel_size: Triple) -> Index:
        """Return the shape of the largest grid that takes one window, or the window itself if its context is larger."""
        found = []
        for axis, w in enumerate(self.window):
            context = self.context
            if context is not None:  # along this axis alone
                given = context if isinstance(context, int) else context[axis]
                context = [given if a == axis else 0 for a in range(3)]
            alone = replace(self, context=context, block_size=2**20)
            shapes = [tuple(n if a == axis else 1 for a in range(3)) for n in range(w, 0, -1)]
            grids = (VoxelGrid(voxel_size, (0.0, 0.0, 0.0), (z, y, x)) for z, y, x in shapes)
            found.append(next((grid.shape[axis] for grid in grids if alone.count(grid) == 1), w))
        return index(found)


def validation_shape(config: RunConfig) -> WindowShape:
    """Return how a run's validation slides over crops."""
    inference = config.inference
    return WindowShape(
        config.window, inference.overlap, inference.context, inference.block_size or BLOCK,
        WindowFit.of(config),
        inference.blending,
    )  # fmt: skip


def seen_parts(config: RunConfig, crops: Sequence[Crop]) -> list[Crop]:
    """Return the validation crops or, if they take more windows than ``data.validation_windows``, the parts of them
    that every validation of the run sees."""
    parts = validation_parts(
        [VoxelGrid.covering(crop.box, config.voxel_size) for crop in crops],
        validation_shape(config),
        config.data.validation_windows,
        lambda number, name: foreground_points(crops[number], name, config.system.seed),
        config.dataset.classes,
        config.system.seed,
    )
    found = []
    for crop, tiles in zip(crops, parts, strict=True):
        is_whole = len(tiles) == 1 and tiles[0].box.contains(crop.box, tolerance=1e-6)
        found += [crop] if is_whole else [replace(crop, region=tile.box.intersect(crop.box)) for tile in tiles]
    if len(found) > len(crops):
        log.info(
            "validation uses %d fixed parts of %s: at most data.validation_windows=%d windows",
            len(found), number_of(len(crops), "crop"), config.data.validation_windows,
        )  # fmt: skip
    return found


def validation_parts(
    grids: Sequence[VoxelGrid],
    shape: WindowShape,
    limit: int | None,
    points: Callable[[int, str], NDArray[np.float64]],
    classes: Sequence[str],
    seed: int,
) -> list[list[VoxelGrid]]:
    """Return the parts of each crop that validation predicts, at most ``limit`` windows together: whole crops as far as
    possible, otherwise tiles of one window each.

    Every crop gets the same number of windows, or all of its own if those are fewer. Half of a crop's tiles lie where
    its classes are, one class after the other; the others anywhere in the crop.

    Args:
        grids: the crops at the run's voxel size.
        limit: None for no limit.
        points: positions (n, 3), nm, of voxels where a class is present in a crop; called for crops that are not whole.
        seed: random seed; the same arguments give the same parts.
    """
    counts = np.array([shape.count(grid) for grid in grids])
    if limit is None or counts.sum() <= limit:
        return [[grid] if grid.size else [] for grid in grids]
    rng = np.random.default_rng([seed, 0x7A11])
    # the most windows per crop, at least 1, with which all crops together stay within the limit
    fits = [n for n in range(1, min(limit, int(counts.max())) + 1) if np.minimum(counts, n).sum() <= limit]
    budgets = np.minimum(counts, max(fits, default=1))
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


def _tiles(
    grid: VoxelGrid, tile: Index, budget: int, points: Sequence[NDArray[np.float64]], rng: np.random.Generator
) -> list[VoxelGrid]:
    """``budget`` tiles of a grid: half of them contain points, of each class in turn."""
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
