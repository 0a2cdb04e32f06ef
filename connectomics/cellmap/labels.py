"""Three-state labels of a crop on any grid, and the instance ids on it.

Each voxel of the target grid gets an interval ``[lo, hi]`` for the share of its volume that a class fills: ``lo`` is
known to be present, ``1 - hi`` is known to be absent. Averages of intervals are intervals, so resampling is exact, and
relations between classes are bounds, which only narrow what a class's own array leaves unknown (see docs/labels.md).

Labels are always read from the finest level. The metadata does not say how the coarser levels were made, and many
writers take every second voxel, which shifts labels by up to half a voxel against the raw.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.cellmap.catalog import Crop, LabelArray
from connectomics.cellmap.classes import ATOMIC_CLASSES, CLASSES, atoms_of
from connectomics.errors import InputError, require_known
from connectomics.geometry import VoxelGrid
from connectomics.io import resample, s3
from connectomics.io.store import is_s3

Fraction = NDArray[np.float32]
Interval = tuple[Fraction, Fraction]
Reading = tuple[Interval, NDArray[np.uint64]]  # bounds of the share, and instance ids if they are needed

_ROUNDING = np.float32(1e-4)  # of a voxel: rounding of float32 sums of shares
_SOURCE_VOXELS = 2**24  # label voxels of one array held at a time, whatever the crop's size
_WORD = 64
FRACTION_STEPS = 16  # soft labels are shares of a voxel in so many steps: exact if the labels are twice as fine


@dataclass(frozen=True)
class LabelVolume:
    """Three-state labels of several classes on one grid, two bits per voxel and class.

    Attributes:
        grid: where the voxels are.
        classes: the class of each bit, from the lowest bit of the first word on.
        present: uint64 (words, D, H, W), one word per 64 classes; a bit is set where the class is present.
        known: likewise; set where the class is present or absent. ``present`` is a subset of ``known``.
        instances: the ``classes`` with per-object instance ids.
        ids: uint64 (I, D, H, W), the stored instance id of each of ``instances``; 0 where the class is not present, or
            present without a known id. None if there are no ``instances``.
        fractions: uint8 (C, D, H, W), soft labels: the present share of the known part of a voxel, in sixteenths; 0
            where the class is unknown. None without soft labels.
    """

    grid: VoxelGrid
    classes: tuple[str, ...]
    present: NDArray[np.uint64]
    known: NDArray[np.uint64]
    instances: tuple[str, ...] = ()
    ids: NDArray[np.uint64] | None = None
    fractions: NDArray[np.uint8] | None = None

    def __post_init__(self) -> None:
        n_ids = 0 if self.ids is None else len(self.ids)
        if n_ids != len(self.instances) or (self.ids is not None and self.ids.shape[1:] != self.grid.shape):
            raise InputError(
                f"a label volume with objects of {self.instances} on {self.grid} needs ids "
                f"({len(self.instances)}, D, H, W), got {None if self.ids is None else self.ids.shape}"
            )
        if self.fractions is not None and self.fractions.shape != (len(self.classes), *self.grid.shape):
            raise InputError(
                f"fractions of {len(self.classes)} classes on {self.grid} need one array per class, got shape "
                f"{self.fractions.shape}"
            )
        expected = (words_for(len(self.classes)), *self.grid.shape)
        if self.present.shape != expected or self.known.shape != expected:
            raise InputError(
                f"a label volume of {len(self.classes)} classes on {self.grid} needs words of shape {expected}, "
                f"got {self.present.shape} and {self.known.shape}"
            )

    def _bit(self, words: NDArray[np.uint64], name: str) -> NDArray[np.bool_]:
        require_known("class", [name], self.classes, "this label volume")
        word, bit = divmod(self.classes.index(name), _WORD)
        return ((words[word] >> np.uint64(bit)) & np.uint64(1)).astype(bool)

    def present_of(self, name: str) -> NDArray[np.bool_]:
        """Return where the class is present, bool (D, H, W)."""
        return self._bit(self.present, name)

    def known_of(self, name: str) -> NDArray[np.bool_]:
        """Return where the class is known to be present or absent, bool (D, H, W)."""
        return self._bit(self.known, name)


def words_for(n_classes: int) -> int:
    """Return the number of 64-bit words per voxel for ``n_classes`` classes (at least one)."""
    return max(1, -(-n_classes // _WORD))


def read_labels(
    crop: Crop,
    classes: Sequence[str],
    grid: VoxelGrid,
    instances: Sequence[str] = (),
    *,
    alternate_ties: bool = False,
    soft: bool = False,
) -> LabelVolume:
    """Read the three-state labels of ``classes`` in ``crop`` on any ``grid``; beyond the crop they are unknown.

    A voxel of which as much is present as absent is present. With ``alternate_ties`` it is only where the sum of its
    lattice indices is even, so that ties do not make objects larger. ``soft`` also returns the fractions.

    For ``instances``, some of ``classes``, also read the instance ids where the class's own array holds ids and says
    that the class is present: a mask, or the parts of a group, do not say which object a voxel belongs to.

    Works in blocks: memory is the result (16 bytes per voxel for up to 64 classes, 8 for each of ``instances``, with
    ``soft`` one per class) plus a constant. Raises `UnknownNameError` for an instance class that is not one of
    ``classes``.
    """
    names, with_ids = tuple(classes), tuple(instances)
    require_known("instance class", with_ids, names, "the classes")
    present = np.zeros((words_for(len(names)), *grid.shape), np.uint64)
    known = np.zeros_like(present)
    ids = np.zeros((len(with_ids), *grid.shape), np.uint64)
    fractions = np.zeros((len(names), *grid.shape), np.uint8) if soft else None
    begin, touched = grid.part(crop.box)
    arrays = arrays_needed(crop, names)
    for offset, block in touched.blocks(_block_shape(arrays, grid)):
        read = _read_block(arrays, block, with_ids)
        shares = _narrow({name: interval for name, (interval, _) in read.items()}, names, block.shape)
        at = tuple(slice(b + o, b + o + n) for b, o, n in zip(begin, offset, block.shape, strict=True))
        odd = _odd_voxels(block) if alternate_ties else None
        for channel, name in enumerate(names):
            word, bit = divmod(channel, _WORD)
            is_present, is_known = _vote(shares[name], odd)
            if fractions is not None:
                fractions[channel][at] = _steps(shares[name], is_known)
            present[word][at] |= is_present.astype(np.uint64) << np.uint64(bit)
            known[word][at] |= is_known.astype(np.uint64) << np.uint64(bit)
            if name in with_ids and name in read:
                ids[with_ids.index(name)][at] = np.where(is_present, read[name][1], 0)
    return LabelVolume(grid, names, present, known, with_ids, ids if with_ids else None, fractions)


def read_instances(
    crop: Crop, class_name: str, grid: VoxelGrid
) -> tuple[NDArray[np.unsignedinteger], NDArray[np.bool_]]:
    """Return stored instance ids (0 where absent, unknown or outside) and the known mask, both of ``grid``'s shape.

    Ids cannot be averaged, so each voxel takes the id at its center (nearest). Raises `UnknownNameError` if the crop
    has no array of the class.
    """
    require_known("class", [class_name], crop.labels, crop.key)
    label = crop.labels[class_name]
    values, inside = label.source.read_nearest(grid, level=0)
    present, known = label.annotation.decode(values)
    known &= inside
    unsigned = values.astype(np.uint64 if values.dtype.itemsize > 4 else np.uint32)
    return np.where(present & known, unsigned, 0).astype(unsigned.dtype), known


def arrays_needed(crop: Crop, classes: Sequence[str]) -> dict[str, LabelArray]:
    """Return the arrays that can tell about ``classes``.

    These are their own arrays and, if those leave something unknown, the arrays of their atoms, of the groups that
    contain these, and of every other atomic class (which excludes them).
    """
    needed: dict[str, LabelArray] = {n: crop.labels[n] for n in classes if n in crop.labels}
    for name in classes:
        if name not in CLASSES:
            continue  # a class of the user: no other array tells about it
        own = crop.labels.get(name)
        if own and own.annotation.fully_known and own.grid.box.contains(crop.box, 1e-3 * min(own.grid.voxel_size)):
            continue  # it covers the whole crop and leaves nothing unknown
        atoms = set(atoms_of(name))
        for other, label in crop.labels.items():
            known = CLASSES.get(other)
            if known is not None and (other in ATOMIC_CLASSES or atoms & set(known.atoms)):
                needed[other] = label
    return needed


def _block_shape(arrays: Mapping[str, LabelArray], grid: VoxelGrid) -> tuple[int, int, int]:
    """Target voxels per block, so that no array has more than `_SOURCE_VOXELS` voxels in it."""
    most = 1.0  # source voxels in one target voxel
    for label in arrays.values():
        most = max(most, float(np.prod(np.maximum(1.0, np.divide(grid.voxel_size, label.grid.voxel_size)))))
    edge = int(np.clip((_SOURCE_VOXELS / most) ** (1 / 3), 8, 64))
    return edge, edge, edge


def _read_block(arrays: Mapping[str, LabelArray], block: VoxelGrid, with_ids: Sequence[str]) -> dict[str, Reading]:
    """`_read_array` of several arrays; on S3 several at a time, since most of it is waiting."""
    if not any(is_s3(label.location) for label in arrays.values()):
        return {name: _read_array(label, block, name in with_ids) for name, label in arrays.items()}
    found = s3.in_parallel(lambda item: _read_array(item[1], block, item[0] in with_ids), list(arrays.items()))
    return dict(zip(arrays, found, strict=True))


def _read_array(label: LabelArray, block: VoxelGrid, with_ids: bool) -> Reading:
    """Bounds of the class's share in every voxel of ``block`` from one array, and if needed the ids where this array
    says that the class is present, else 0."""
    begin, part = label.grid.part(block.box)
    no_ids = np.zeros(block.shape if with_ids else (0, 0, 0), np.uint64)
    if part.size == 0:
        return (np.zeros(block.shape, np.float32), np.ones(block.shape, np.float32)), no_ids
    values = label.read_stored(begin, part.shape)
    present, known = label.annotation.decode(values)
    coverage = resample.area_coverage(part, block)
    lo = resample.area_fraction(present, part, block) * coverage
    absent = resample.area_fraction(known & ~present, part, block) * coverage
    interval = lo, np.float32(1.0) - absent
    if not with_ids or label.annotation.kind != "instance":
        return interval, no_ids
    return interval, np.where(_vote(interval)[0], vote_ids(values, present, part, block), 0)


def vote_ids(
    values: NDArray[Any], present: NDArray[np.bool_], source: VoxelGrid, target: VoxelGrid
) -> NDArray[np.uint64]:
    """Return the id that fills most of every voxel of ``target``, uint64 (D, H, W); 0 if no object reaches it.

    The source voxels that decide whether the class is present also vote on its id. The id at the voxel's center would
    be cheaper, but at coarser voxels every other voxel of an object's rim would have none. On a tie, to rounding, the
    first in the order z, y, x wins. The caller decides whether the class is present.

    Args:
        values: IDs (d, h, w) on the grid ``source``, any unsigned dtype.
        present: True where an ID is an object.
    """
    out = np.zeros(target.shape, np.uint64)
    if out.size == 0 or not present.any():
        return out
    from connectomics.cellmap.label_kernels import vote

    (z, y, x), _ = resample.overlap_tables(source, target)
    vote(
        np.ascontiguousarray(values), present,
        *(z.first, z.count, z.weights), *(y.first, y.count, y.weights), *(x.first, x.count, x.weights), out,
    )  # fmt: skip
    return out


def _vote(share: Interval, odd: NDArray[np.bool_] | None = None) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Present and known from a share's bounds: known by the known share alone, present by majority of the known, and on
    a tie, except at ``odd`` voxels."""
    lo, hi = share
    absent = np.float32(1.0) - hi
    known = lo + absent >= np.float32(0.5) - _ROUNDING
    if odd is None:
        return known & (lo >= absent - 2 * _ROUNDING), known
    return known & (lo - absent >= np.where(odd, 2 * _ROUNDING, -2 * _ROUNDING)), known


def _odd_voxels(grid: VoxelGrid) -> NDArray[np.bool_]:
    """Where the sum of a voxel's lattice indices is odd, (D, H, W): the same for every block of a lattice.

    Index 0 holds the origin of the world. The small offset keeps rounding from splitting a lattice that begins there.
    """
    first = [math.floor(t / v + 0.0137) for t, v in zip(grid.translation, grid.voxel_size, strict=True)]
    z, y, x = (np.arange(b, b + n) for b, n in zip(first, grid.shape, strict=True))
    return (z[:, None, None] + y[:, None] + x) % 2 == 1


def _steps(share: Interval, known: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """The present share of the known part, in `FRACTION_STEPS`; 0 where the class is unknown."""
    lo, hi = share
    fraction = np.divide(lo, lo + (np.float32(1.0) - hi), out=np.zeros_like(lo), where=known)
    return np.rint(FRACTION_STEPS * fraction).astype(np.uint8)


def _narrow(own: Mapping[str, Interval], classes: Sequence[str], shape: Sequence[int]) -> dict[str, Interval]:
    """The intervals of ``classes``, narrowed by all arrays in ``own`` (see the module's docstring)."""
    if all(name in own and np.all(own[name][1] - own[name][0] < 1e-4) for name in classes):
        return {name: own[name] for name in classes}
    nothing: Interval = (np.zeros(tuple(shape), np.float32), np.ones(tuple(shape), np.float32))
    # every group that tells about one of the atoms, and every atom of those groups
    groups = [g for g in {*own, *classes} if g in CLASSES and CLASSES[g].is_group]
    # sorted: float sums must be equal in every process, and the order of sets differs between processes
    atoms = sorted({a for name in {*own, *classes} for a in atoms_of(name)})
    shares: dict[str, Interval] = {name: own.get(name, nothing) for name in {*atoms, *groups}}

    there = [a for a in atoms if a in own and a in ATOMIC_CLASSES]
    taken = sum((own[a][0] for a in there), np.zeros(tuple(shape), np.float32))
    for atom in ATOMIC_CLASSES.intersection(atoms):
        others = taken - own[atom][0] if atom in own else taken
        shares[atom] = _tighten(shares[atom], None, np.clip(1.0 - others, 0.0, 1.0))

    def settle_groups() -> None:
        for group in groups:
            parts = [shares[a] for a in CLASSES[group].atoms]
            lo = np.minimum(sum(p[0] for p in parts), 1.0)
            hi = np.minimum(sum(p[1] for p in parts), 1.0)
            shares[group] = _tighten(shares[group], lo, hi)

    settle_groups()
    for group in groups:
        for atom in CLASSES[group].atoms:
            shares[atom] = _tighten(shares[atom], None, shares[group][1])
    settle_groups()  # groups that share atoms with an absent one
    return {name: shares[name] for name in classes}


def _tighten(share: Interval, lo: Fraction | None, hi: Fraction) -> Interval:
    """``share`` cut to ``[lo, hi]``, but never beyond what the class's own array says (it wins in a conflict)."""
    own_lo, own_hi = share
    new_lo = own_lo if lo is None else np.clip(lo, own_lo, own_hi)
    new_hi = np.clip(hi, own_lo, own_hi)
    return new_lo.astype(np.float32), np.maximum(new_hi, new_lo).astype(np.float32)
