"""Contacts: how much of the surface of every instance of one class lies near another class, and near which instances.

The distance between two voxels is the gap between their boxes: 0 if they share a face, an edge or a corner, and
``g * voxel size`` if g voxels lie between them along an axis. It equals the distance from the center of one to the
nearest center of the other and its 26 neighbors, so a distance transform of the other class, dilated by one voxel,
gives it. Surface counts by whole voxels: if a voxel lies near, all of its surface does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.errors import InputError
from connectomics.geometry import VoxelGrid, slices_of
from connectomics.io.multiscale import Multiscale
from connectomics.morphology.block_sums import BLOCK, NO_PAIRS, BlockSums, compact, empty_tables, sum_in_memory
from connectomics.morphology.instances import step_areas
from connectomics.tasks.blocks import with_halo

DEFAULT_NM = 30.0
#: Tables of `contacts_of_block` and their widths.
TABLES = {"steps": 7, "near": 7}
#: Largest halo in voxels along an axis: a block of 256 with it on both sides is eight times as large.
MOST_HALO = 128
# Distances are float32 and the limit is a decimal: equal sums must compare as equal.
_ROUNDING = 1e-5


@dataclass(frozen=True)
class ContactSpec:
    """Contacts of the instances of class ``of`` with class ``to`` within ``nm`` nanometers (0: voxels that touch)."""

    of: str
    to: str
    nm: float = DEFAULT_NM

    @classmethod
    def parse(cls, text: str) -> ContactSpec:
        """Read ``A:B`` or ``A:B:NM``; raises `InputError`."""
        parts = [part.strip() for part in text.split(":")]
        try:
            nm = float(parts[2]) if len(parts) == 3 else DEFAULT_NM
        except ValueError:
            nm = math.nan
        if len(parts) not in (2, 3) or not all(parts[:2]) or not (math.isfinite(nm) and nm >= 0):
            raise InputError(f"a contact must be CLASS:CLASS:NM with NM >= 0, such as mito:er:30; got {text!r}")
        return cls(parts[0], parts[1], nm)

    def __str__(self) -> str:
        return f"{self.of}:{self.to}:{self.nm:g}"


@dataclass(frozen=True)
class Contacts:
    """Contacts of n instances of one class, sorted by ID.

    Attributes:
        grid: grid of the first class, nm.
        ids: (n,) uint64.
        steps, near: (n, 7) pairs of a voxel and a neighbor with another label, by kind of step: all of them, and those
            whose voxel lies near the other class.
        pairs: (m, 2) uint64, sorted: ID, and ID of an instance of the other class that lies near its surface.
    """

    grid: VoxelGrid
    ids: NDArray[np.uint64]
    steps: NDArray[np.int64]
    near: NDArray[np.int64]
    pairs: NDArray[np.uint64]

    @classmethod
    def of(cls, grid: VoxelGrid, found: BlockSums) -> Contacts:
        """Return the contacts that the sums over all blocks give."""
        return cls(grid, found.ids, found.tables["steps"], found.tables["near"], found.pairs)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def surface(self) -> NDArray[np.float64]:
        """(n,) nm2, as in `Instances.surface`."""
        return self.steps @ step_areas(self.grid.voxel_size)

    @property
    def area(self) -> NDArray[np.float64]:
        """(n,) nm2 of surface whose voxels lie near the other class."""
        return self.near @ step_areas(self.grid.voxel_size)

    @property
    def offsets(self) -> NDArray[np.int64]:
        """(n + 1,) The pairs of row i are ``pairs[offsets[i]:offsets[i + 1]]``."""
        begin = np.searchsorted(self.pairs[:, 0], self.ids)
        return np.append(begin, len(self.pairs)).astype(np.int64)

    @property
    def partners(self) -> tuple[tuple[int, ...], ...]:
        """For each instance, the sorted IDs of the other class's instances that lie near its surface."""
        parts = np.split(self.pairs[:, 1], self.offsets[1:-1])
        return tuple(tuple(part.tolist()) for part in parts[: len(self)])


def contacts_of_block(
    of: Multiscale,
    to: Multiscale,
    nm: float,
    begin: Sequence[int],
    shape: Sequence[int],
    *,
    semantic: tuple[bool, bool] = (False, False),
) -> BlockSums:
    """Measure the contacts of the block of ``shape`` voxels from ``begin`` of ``of``; see `measure_contacts`.

    Memory: about 30 bytes per voxel of the block with its halo.
    """
    from connectomics.morphology.measure_kernels import add_near, surface_labels

    grid = of.levels[0].grid
    halo = halo_of(grid, nm)
    first, size, inner = with_halo(begin, shape, (1, 1, 1), grid.shape)
    stored, _ = of.read_level(0, first, size, absent_is_missing=False)
    low, high = np.asarray(inner), np.asarray(inner) + np.asarray(shape)
    labels, ids = compact(stored, semantic=semantic[0])
    found, pairs = empty_tables(TABLES, len(ids)), NO_PAIRS
    if len(ids):
        surface = surface_labels(labels, low, high, found["steps"])
        if surface.any():
            around = grid.crop(begin, shape).grow(halo.tolist())
            others, other_ids = compact(to.read_nearest(around, 0)[0], semantic=semantic[1])
            skip = ids if of.location == to.location else None
            near, touching = _near(surface, others, other_ids, halo, nm, grid.voxel_size, skip)
            add_near(labels, low, near, found["near"])
            if touching:
                where = np.asarray(touching, np.int64)
                pairs = np.column_stack([ids[where[:, 0]], other_ids[where[:, 1]]])
    own = np.zeros(len(ids) + 1, np.bool_)
    own[np.unique(labels[slices_of(low, shape)])] = True
    return BlockSums(ids, found, pairs).select(own[1:])


def measure_contacts(
    of: Multiscale,
    to: Multiscale,
    nm: float = DEFAULT_NM,
    *,
    semantic: tuple[bool, bool] = (False, False),
    block: Sequence[int] = BLOCK,
) -> Contacts:
    """Measure where the surfaces of one class's instances lie within a distance of another class, in this process.

    A voxel belongs to the surface if one of its 26 neighbors within the volume has another label. If both volumes are
    the same, an instance has contact with other instances only. The other class is resampled to the grid of the first,
    by nearest voxel; the result does not depend on the blocks. Memory: about 30 bytes per voxel of a block with halo,
    150 bytes for every block that an instance lies in, 16 bytes per contact (`ContactsTask` keeps both on disk).

    Args:
        of, to: label volumes, see `measure_instances`.
        nm: largest gap between the boxes of two voxels that counts as near.
        semantic: whether everything above 0 of ``of`` and of ``to`` is one instance.
        block: voxels of ``of`` to read at once, z y x, without the halo.

    Raises:
        InputError: the distance is more than `MOST_HALO` voxels.
    """
    grid = of.levels[0].grid
    halo_of(grid, nm)
    parts = [contacts_of_block(of, to, nm, begin, part.shape, semantic=semantic) for begin, part in grid.blocks(block)]
    return Contacts.of(grid, sum_in_memory(parts, TABLES))


def halo_of(grid: VoxelGrid, nm: float) -> NDArray[np.int64]:
    """Return the voxels (3,) around a block that can lie within ``nm`` of it: one more than fit into the gap.

    Raises:
        InputError: the halo is larger than `MOST_HALO`.
    """
    size = np.asarray(grid.voxel_size)
    halo = np.floor(nm * (1 + _ROUNDING) / size).astype(np.int64) + 1
    if halo.max() > MOST_HALO:
        most = (MOST_HALO - 1) * size.min()
        raise InputError(
            f"a contact distance of {nm:g} nm is too far for voxels of {size.tolist()} nm; use at most {most:g} nm"
        )
    return halo


def _near(
    surface: NDArray[np.uint32],
    others: NDArray[np.uint32],
    other_ids: NDArray[np.uint64],
    halo: NDArray[np.int64],
    nm: float,
    voxel_size: Sequence[float],
    skip: NDArray[np.uint64] | None,
) -> tuple[NDArray[np.bool_], list[tuple[int, int]]]:
    """Where the surface of a block lies near any other instance, and the pairs (row of the label, row of the other).

    Args:
        surface: (d, h, w) labels of surface voxels, else 0. others: the block with a halo on all sides.
        skip: IDs of the labels if both volumes are the same, because an instance is not near itself.
    """
    from scipy.ndimage import find_objects

    near = np.zeros(surface.shape, np.bool_)
    pairs: list[tuple[int, int]] = []
    for number, box in enumerate(find_objects(others.view(np.int32), len(other_ids)), start=1):
        if box is None:
            continue
        begin = np.maximum([s.start for s in box] - halo, 0)
        end = np.minimum([s.stop for s in box] + halo, others.shape)
        low, high = np.maximum(begin - halo, 0), np.minimum(end - halo, surface.shape)
        if np.any(high <= low):
            continue
        mine, theirs = slices_of(low, high - low), slices_of(low + halo - begin, high - low)
        candidates = surface[mine]
        if not candidates.any():
            continue
        mask = others[slices_of(begin, end - begin)] == number
        close = (_gaps(mask, voxel_size)[theirs] <= nm * (1 + _ROUNDING)) & (candidates > 0)
        if skip is not None:
            close &= ~np.isin(candidates, np.flatnonzero(skip == other_ids[number - 1]) + 1)
        near[mine] |= close
        pairs += [(label - 1, number - 1) for label in np.unique(candidates[close]).tolist()]
    return near, pairs


def _gaps(mask: NDArray[np.bool_], voxel_size: Sequence[float]) -> NDArray[Any]:
    """The gap (nm) between every voxel and the mask, as the module's docstring defines it."""
    import edt

    grown = mask.copy()
    for axis in range(3):
        ahead, behind = np.moveaxis(grown.copy(), axis, 0), np.moveaxis(grown, axis, 0)
        behind[1:] |= ahead[:-1]
        behind[:-1] |= ahead[1:]
    return np.asarray(edt.edt(~grown, anisotropy=tuple(voxel_size), black_border=False, parallel=1))
