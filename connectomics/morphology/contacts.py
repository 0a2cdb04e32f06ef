"""Contacts: how much of the surface of every instance of one class lies near another class, and near which instances.

The distance between two voxels is the gap between their boxes: 0 where they share a face, an edge or a corner, and
``g * voxel size`` where g voxels lie between them along an axis. It is the distance from the one's centre to the
nearest centre of the other and its 26 neighbours, so a distance transform of the other class grown by one voxel gives
it. Surface counts by whole voxels: all of a voxel's, where the voxel lies near.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.decoding.label_artifact import BLOCK
from connectomics.errors import InputError
from connectomics.geometry import VoxelGrid
from connectomics.io.multiscale import Multiscale
from connectomics.morphology.partial import NO_PAIRS, Partial, compact, margins, rows, united_whole
from connectomics.morphology.surface_area import step_areas

DEFAULT_NM = 30.0
#: The widest halo, voxels of an axis: a block of 256 with it on both sides is eight times as large.
MOST_HALO = 128
# A distance is float32 and its limit a decimal: sums that mean the same must compare as equal.
_ROUNDING = 1e-5


@dataclass(frozen=True)
class ContactSpec:
    """Contacts of the instances of class ``of`` with class ``to`` within ``nm`` nanometres (0: voxels that touch)."""

    of: str
    to: str
    nm: float = DEFAULT_NM

    @classmethod
    def parse(cls, text: str) -> ContactSpec:
        """``A:B`` or ``A:B:NM``; `InputError`."""
        parts = [part.strip() for part in text.split(":")]
        try:
            nm = float(parts[2]) if len(parts) == 3 else DEFAULT_NM
        except ValueError:
            nm = math.nan
        if len(parts) not in (2, 3) or not all(parts[:2]) or not (math.isfinite(nm) and nm >= 0):
            raise InputError(f"a contact is CLASS:CLASS:NM with NM >= 0, as in mito:er:30; found {text!r}")
        return cls(parts[0], parts[1], nm)

    def __str__(self) -> str:
        return f"{self.of}:{self.to}:{self.nm:g}"


@dataclass(frozen=True)
class Contacts:
    """Contacts of n instances of one class, sorted by id.

    Attributes:
        grid: of the first class, nm.
        ids: (n,) uint64. steps, near: (n, 7) pairs of a voxel and a neighbour with another label, by kind: all, and
            those whose voxel lies near the other class.
        pairs: (m, 2) uint64 id and id of an instance of the other class that lies near its surface, sorted.
    """

    grid: VoxelGrid
    ids: NDArray[np.uint64]
    steps: NDArray[np.int64]
    near: NDArray[np.int64]
    pairs: NDArray[np.uint64]

    @classmethod
    def of(cls, grid: VoxelGrid, found: Partial) -> Contacts:
        """From the sums over all blocks."""
        return cls(grid, found.ids, found.tables["steps"], found.tables["near"], found.pairs)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def surface(self) -> NDArray[np.float64]:
        """(n,) nm2, as `connectomics.morphology.instances.Instances.surface`."""
        return self.steps @ step_areas(self.grid.voxel_size)

    @property
    def area(self) -> NDArray[np.float64]:
        """(n,) nm2 of that surface whose voxels lie near the other class."""
        return self.near @ step_areas(self.grid.voxel_size)

    @property
    def offsets(self) -> NDArray[np.int64]:
        """(n + 1,) the pairs of row i are ``pairs[offsets[i]:offsets[i + 1]]``."""
        begin = np.searchsorted(self.pairs[:, 0], self.ids)
        return np.append(begin, len(self.pairs)).astype(np.int64)

    @property
    def partners(self) -> tuple[tuple[int, ...], ...]:
        """For each instance the sorted ids of the other class's instances that lie near its surface."""
        parts = np.split(self.pairs[:, 1], self.offsets[1:-1])
        return tuple(tuple(part.tolist()) for part in parts[: len(self)])


#: Tables of a block's part, and their widths.
TABLES = {"steps": 7, "near": 7}


def contacts_of_block(
    of: Multiscale,
    to: Multiscale,
    nm: float,
    begin: Sequence[int],
    shape: Sequence[int],
    *,
    semantic: tuple[bool, bool] = (False, False),
) -> Partial:
    """The part of one block, that of ``shape`` voxels from ``begin`` of ``of``, in the contacts; see
    `measure_contacts`. Memory: about 30 bytes a voxel of the block with its halo."""
    from connectomics.morphology.measure_kernels import add_near, rim

    grid = of.levels[0].grid
    halo = halo_of(grid, nm)
    first, size, low = margins(grid, begin, shape)
    stored, _ = of.read_level(0, first, size.tolist(), absent_is_missing=False)
    labels, ids = compact(stored, semantic=semantic[0])
    found, pairs = rows(TABLES, len(ids)), NO_PAIRS
    if len(ids):
        surface = rim(labels, low, low + shape, found["steps"])
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
    own[np.unique(labels[tuple(slice(a, a + n) for a, n in zip(low, shape, strict=True))])] = True
    return Partial(ids[own[1:]], {name: table[own[1:]] for name, table in found.items()}, pairs)


def measure_contacts(
    of: Multiscale,
    to: Multiscale,
    nm: float = DEFAULT_NM,
    *,
    semantic: tuple[bool, bool] = (False, False),
    block: Sequence[int] = BLOCK,
) -> Contacts:
    """Measure where the surfaces of one class's instances lie within a distance of another class, in this process.

    A voxel of an instance is of its surface where one of its 26 neighbours within the volume has another label. Where
    both are the same volume, an instance has contact with the others only. The other class is taken on the grid of the
    first, by nearest voxel; the result does not depend on the blocks. Memory: about 30 bytes a voxel of a block with
    halo, 150 bytes for every block that an instance lies in, 16 bytes a contact
    (`ContactsTask` keeps both on disk).

    Args:
        of, to: label volumes, see `connectomics.morphology.instances.measure_instances`.
        nm: largest gap between the boxes of two voxels that counts as near.
        semantic: whether everything above 0 of ``of`` and of ``to`` is one instance.
        block: voxels of ``of``, z y x, without the halo.

    Raises:
        InputError: a distance of more than `MOST_HALO` voxels.
    """
    grid = of.levels[0].grid
    halo_of(grid, nm)
    parts = [contacts_of_block(of, to, nm, begin, part.shape, semantic=semantic) for begin, part in grid.blocks(block)]
    return Contacts.of(grid, united_whole(parts, TABLES))


def halo_of(grid: VoxelGrid, nm: float) -> NDArray[np.int64]:
    """Voxels (3,) beyond a block that can lie within ``nm`` of it: one more than fit into the gap. `InputError`."""
    size = np.asarray(grid.voxel_size)
    halo = np.floor(nm * (1 + _ROUNDING) / size).astype(np.int64) + 1
    if halo.max() > MOST_HALO:
        most = (MOST_HALO - 1) * size.min()
        raise InputError(f"contacts within {nm:g} nm are too far for voxels of {size.tolist()} nm; at most {most:g} nm")
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
        surface: (d, h, w) labels of the surface's voxels, else 0. others: the block with halo on all sides.
        skip: ids of the labels where the other volume is the same: an instance is not near itself.
    """
    from scipy.ndimage import find_objects

    near = np.zeros(surface.shape, np.bool_)
    pairs: list[tuple[int, int]] = []
    for number, box in enumerate(find_objects(others.view(np.int32), len(other_ids)), start=1):
        if box is None:
            continue
        begin = np.maximum([s.start for s in box] - halo, 0)
        end = np.minimum([s.stop for s in box] + halo, others.shape)
        # that part of the block's own voxels, and the same part within the distances
        low, high = np.maximum(begin - halo, 0), np.minimum(end - halo, surface.shape)
        if np.any(high <= low):
            continue
        mine = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        theirs = tuple(slice(a, b) for a, b in zip(low + halo - begin, high + halo - begin, strict=True))
        candidates = surface[mine]
        if not candidates.any():
            continue
        mask = others[tuple(slice(a, b) for a, b in zip(begin, end, strict=True))] == number
        close = (_gaps(mask, voxel_size)[theirs] <= nm * (1 + _ROUNDING)) & (candidates > 0)
        if skip is not None:
            close &= ~np.isin(candidates, np.flatnonzero(skip == other_ids[number - 1]) + 1)
        near[mine] |= close
        pairs += [(label - 1, number - 1) for label in np.unique(candidates[close]).tolist()]
    return near, pairs


def _gaps(mask: NDArray[np.bool_], voxel_size: Sequence[float]) -> NDArray[Any]:
    """The gap (nm) between every voxel and the mask, see the top of this file."""
    import edt

    grown = mask.copy()
    for axis in range(3):
        ahead, behind = np.moveaxis(grown.copy(), axis, 0), np.moveaxis(grown, axis, 0)
        behind[1:] |= ahead[:-1]
        behind[:-1] |= ahead[1:]
    return np.asarray(edt.edt(~grown, anisotropy=tuple(voxel_size), black_border=False, parallel=1))
