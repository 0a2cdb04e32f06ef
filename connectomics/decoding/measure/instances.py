"""Measures of every instance of a volume, in one pass over its blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.decoding.labels import BLOCK
from connectomics.decoding.measure.surface import sphericity, step_areas
from connectomics.geometry import VoxelGrid
from connectomics.io.multiscale import Multiscale

#: Told after each block: how many are done, and how many there are.
BlockProgress = Callable[[int, int], None]
_FAR = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Instances:
    """What was measured of n instances, sorted by id; 140 bytes a row.

    Attributes:
        grid: the volume's, nm.
        ids: (n,) uint64 values of the label array. sizes: (n,) voxels. sums: (n, 3) of z, y and x in voxels.
        boxes: (n, 6) smallest z y x, largest z y x (voxels, both inside).
        steps: (n, 7) pairs of a voxel and a neighbour with another label, see `connectomics.decoding.measure.surface`.
    """

    grid: VoxelGrid
    ids: NDArray[np.uint64]
    sizes: NDArray[np.int64]
    sums: NDArray[np.int64]
    boxes: NDArray[np.int64]
    steps: NDArray[np.int64]

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


class Rows:
    """Named tables with a row for each id, which grow as ids come. Adding is the only thing that happens to a row, but
    for the columns of boxes: smallest and largest."""

    def __init__(self, **columns: int) -> None:
        self._row: dict[int, int] = {}
        self._columns = {name: self._fresh(name, 64, width) for name, width in columns.items()}

    @staticmethod
    def _fresh(name: str, n: int, width: int) -> NDArray[np.int64]:
        made = np.zeros((n, width), np.int64)
        if name == "boxes":
            made[:, :3], made[:, 3:] = _FAR, -1
        return made

    def block(self, n: int) -> dict[str, NDArray[np.int64]]:
        """The same tables for the n ids of a block, to be filled and handed to `add`."""
        return {name: self._fresh(name, n, table.shape[1]) for name, table in self._columns.items()}

    def add(self, ids: NDArray[np.uint64], found: dict[str, NDArray[np.int64]]) -> None:
        """Add what was found of the ids of a block."""
        rows = np.array([self._row.setdefault(i, len(self._row)) for i in ids.tolist()], np.int64)
        for name, part in found.items():
            table = self._columns[name]
            if len(self._row) > len(table):
                table = np.concatenate([table, self._fresh(name, max(len(table), len(ids)), table.shape[1])])
                self._columns[name] = table
            if name == "boxes":
                table[rows, :3] = np.minimum(table[rows, :3], part[:, :3])
                table[rows, 3:] = np.maximum(table[rows, 3:], part[:, 3:])
            else:
                table[rows] += part

    def sorted(self) -> tuple[NDArray[np.uint64], dict[str, NDArray[np.int64]]]:
        """All ids in ascending order, and their tables."""
        ids = np.fromiter(self._row, np.uint64, len(self._row))
        order = np.argsort(ids)
        return ids[order], {name: table[order] for name, table in self._columns.items()}


def compact(labels: NDArray[Any], *, semantic: bool) -> tuple[NDArray[np.uint32], NDArray[np.uint64]]:
    """Labels of a block as 0 and 1..n, and the ids (n,) that these stand for; semantic: everything above 0 is id 1."""
    import fastremap

    if semantic or labels.dtype == np.bool_:
        mask = labels > 0
        return mask.astype(np.uint32), np.ones(int(mask.any()), np.uint64)
    numbered, names = fastremap.renumber(labels, preserve_zero=True)
    ids = np.zeros(len(names) - (0 in names), np.uint64)
    for old, new in names.items():
        if new:
            ids[int(new) - 1] = old
    return np.ascontiguousarray(numbered, np.uint32), ids


def margins(
    grid: VoxelGrid, begin: Sequence[int], shape: Sequence[int]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """A block with one voxel around it as far as the grid goes: its first voxel and its shape, and begin and end of the
    block in it (the end is ``low + shape``)."""
    first = np.maximum(np.asarray(begin, np.int64) - 1, 0)
    end = np.minimum(np.asarray(begin, np.int64) + shape + 1, grid.shape)
    return first, end - first, np.asarray(begin, np.int64) - first


def measure_instances(
    source: Multiscale,
    *,
    semantic: bool = False,
    block: Sequence[int] = BLOCK,
    progress: BlockProgress | None = None,
) -> Instances:
    """Measure every instance of the finest level of a label volume.

    Counts are whole numbers, so the result does not depend on the blocks. Memory: about 20 bytes a voxel of a block and
    250 bytes an instance.

    Args:
        source: labels: any integers, 0 is background.
        semantic: every voxel above 0 belongs to one instance, 1.
        block: voxels, z y x, that are read at once.
        progress: told after each block.
    """
    from connectomics.decoding.measure.kernels import KINDS, measure

    grid = source.levels[0].grid
    rows = Rows(sizes=1, sums=3, boxes=6, steps=KINDS)
    blocks = list(grid.blocks(block))
    for done, (begin, part) in enumerate(blocks, start=1):
        first, shape, low = margins(grid, begin, part.shape)
        stored, _ = source.read_level(0, first, shape.tolist(), absent_is_missing=False)
        labels, ids = compact(stored, semantic=semantic)
        if len(ids):
            found = rows.block(len(ids))
            sizes = found["sizes"][:, 0]
            measure(labels, low, low + part.shape, first, sizes, found["sums"], found["boxes"], found["steps"])
            own = sizes > 0  # others lie in the margin only
            rows.add(ids[own], {name: table[own] for name, table in found.items()})
        if progress is not None:
            progress(done, len(blocks))
    ids, found = rows.sorted()
    return Instances(grid, ids, found["sizes"][:, 0], found["sums"], found["boxes"], found["steps"])
