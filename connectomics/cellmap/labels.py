"""Three-state labels of a crop on any grid.

Every voxel of the target grid gets, for every class, an interval ``[lo, hi]`` for the share of its volume that the
class fills: ``lo`` is the share that is known to be present, ``1 - hi`` the share that is known to be absent, and what
is left is unknown. Averages of intervals are intervals, so resampling is exact, and the class algebra is a few bounds:

- a group's share is the sum of its atoms' shares (they exclude each other), so the bounds add up;
- an atom is at most as large as each group that holds it (a group that is absent makes its atoms absent);
- an atom is at most what the other atoms leave (present in one means absent in the others).

A class's own array always wins where it says something; bounds only narrow what it leaves unknown. In the end a voxel
is **known** where at least half of its volume is known (``lo + 1 - hi >= 1/2``), and then **present** where at least as
much of it is known to be present as to be absent (``lo >= 1 - hi``). Whether a voxel is known depends on the known
share alone: sections annotated with gaps between them, read at twice their voxel size, keep their positives and their
negatives alike.

Labels are always read from the finest level. How the coarser levels of a label pyramid were made is not in its metadata
(taking every second voxel, as many writers do, shifts them by up to half a voxel against the raw), and a mask that was
rounded once and then again at a voxel size that does not divide the first is off by a fifth of a voxel even if it was
made well. The crop cache makes this a cost that is paid once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from connectomics.cellmap.catalog import Crop, LabelArray
from connectomics.cellmap.classes import ATOMIC_CLASSES, CLASSES, atoms_of
from connectomics.cellmap.instance_ids import vote_ids
from connectomics.errors import InputError, unknown_name
from connectomics.geometry import VoxelGrid
from connectomics.io import resample, s3
from connectomics.io.store import is_s3

Fraction = NDArray[np.float32]
Interval = tuple[Fraction, Fraction]
Reading = tuple[Interval, NDArray[np.uint64]]  # bounds of the share, and ids of objects where they are told apart

_ROUNDING = np.float32(1e-4)  # of a voxel: sums of float32 shares are off by rounding
_SOURCE_VOXELS = 2**24  # label voxels of one array held at once: bounds memory whatever the crop's size
_WORD = 64


@dataclass(frozen=True)
class LabelVolume:
    """Three-state labels of several classes on one grid, two bits a voxel and class.

    Attributes:
        grid: where the voxels are.
        classes: the class of each bit, from the lowest bit of the first word on.
        present: uint64 (W, D, H, W'), one word for every 64 classes; a bit is set where the class is present.
        known: likewise; set where the class is present or absent. ``present`` is a subset of ``known``.
        instances: those of ``classes`` whose objects are told apart.
        ids: uint64 (I, D, H, W'), for each of ``instances`` which object is there, as stored; 0 where the class is not
            present, or present and nobody said which object it is. None where there are no ``instances``.
    """

    grid: VoxelGrid
    classes: tuple[str, ...]
    present: NDArray[np.uint64]
    known: NDArray[np.uint64]
    instances: tuple[str, ...] = ()
    ids: NDArray[np.uint64] | None = None

    def __post_init__(self) -> None:
        n_ids = 0 if self.ids is None else len(self.ids)
        if n_ids != len(self.instances) or (self.ids is not None and self.ids.shape[1:] != self.grid.shape):
            raise InputError(
                f"a label volume with objects of {self.instances} on {self.grid} needs ids "
                f"({len(self.instances)}, D, H, W), found {None if self.ids is None else self.ids.shape}"
            )
        expected = (words_for(len(self.classes)), *self.grid.shape)
        if self.present.shape != expected or self.known.shape != expected:
            raise InputError(
                f"a label volume of {len(self.classes)} classes on {self.grid} needs words of shape {expected}, "
                f"found {self.present.shape} and {self.known.shape}"
            )

    def _bit(self, words: NDArray[np.uint64], name: str) -> NDArray[np.bool_]:
        if name not in self.classes:
            raise unknown_name("class", name, self.classes, "this label volume")
        word, bit = divmod(self.classes.index(name), _WORD)
        return ((words[word] >> np.uint64(bit)) & np.uint64(1)).astype(bool)

    def present_of(self, name: str) -> NDArray[np.bool_]:
        """Where the class is present, (D, H, W)."""
        return self._bit(self.present, name)

    def known_of(self, name: str) -> NDArray[np.bool_]:
        """Where the class is known to be present or absent, (D, H, W)."""
        return self._bit(self.known, name)

    def dense(self, classes: Sequence[str] | None = None) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """``label`` float32 0/1 and ``known`` bool, both (C, D, H, W), in the order of ``classes``."""
        names = self.classes if classes is None else tuple(classes)
        label = np.empty((len(names), *self.grid.shape), np.float32)
        known = np.empty((len(names), *self.grid.shape), bool)
        for channel, name in enumerate(names):
            label[channel] = self.present_of(name)
            known[channel] = self.known_of(name)
        return label, known

    def counts(self, name: str) -> dict[str, int]:
        """Voxels that are ``present``, ``absent`` and ``unknown``."""
        present, known = int(self.present_of(name).sum()), int(self.known_of(name).sum())
        return {"present": present, "absent": known - present, "unknown": self.grid.size - known}

    def restricted(self, where: NDArray[np.bool_]) -> LabelVolume:
        """The same labels, unknown outside the mask ``where`` (D, H, W)."""
        keep = np.where(where, np.uint64(0xFFFF_FFFF_FFFF_FFFF), np.uint64(0))
        ids = None if self.ids is None else self.ids & keep
        return LabelVolume(self.grid, self.classes, self.present & keep, self.known & keep, self.instances, ids)


def words_for(n_classes: int) -> int:
    """How many 64-bit words a voxel of ``n_classes`` classes takes (at least one)."""
    return max(1, -(-n_classes // _WORD))


def read_labels(crop: Crop, classes: Sequence[str], grid: VoxelGrid, instances: Sequence[str] = ()) -> LabelVolume:
    """The three-state labels of ``classes`` in ``crop`` on any ``grid``, also beyond the crop (unknown there).

    Of ``instances``, some of ``classes``, also the objects' ids, as far as the class's own array is one of ids and says
    that it is present: a mask, or the parts of a group, do not say which object a voxel belongs to.

    Works in blocks, so memory is the result (16 bytes a voxel for up to 64 classes, 8 for each of ``instances``) and a
    constant. Raises `UnknownNameError` for an instance that is none of the classes.
    """
    names, told = tuple(classes), tuple(instances)
    for name in told:
        if name not in names:
            raise unknown_name("instance class", name, names, "the classes")
    present = np.zeros((words_for(len(names)), *grid.shape), np.uint64)
    known = np.zeros_like(present)
    ids = np.zeros((len(told), *grid.shape), np.uint64) if told else None
    inside = grid.slices(crop.box)
    begin = [s.start for s in inside]
    touched = grid.crop(begin, [s.stop - s.start for s in inside])
    wanted = arrays_needed(crop, names)
    for offset, block in touched.blocks(_block_shape(wanted, grid)):
        read = _read_block(wanted, block, told)
        shares = _narrow({name: interval for name, (interval, _) in read.items()}, names, block.shape)
        at = tuple(slice(b + o, b + o + n) for b, o, n in zip(begin, offset, block.shape, strict=True))
        for channel, name in enumerate(names):
            word, bit = divmod(channel, _WORD)
            is_present, is_known = _vote(shares[name])
            present[word][at] |= is_present.astype(np.uint64) << np.uint64(bit)
            known[word][at] |= is_known.astype(np.uint64) << np.uint64(bit)
        for number, name in enumerate(told):
            if ids is not None and name in read:
                ids[number][at] = np.where(_vote(shares[name])[0], read[name][1], 0)
    return LabelVolume(grid, names, present, known, told, ids)


def read_instances(
    crop: Crop, class_name: str, grid: VoxelGrid
) -> tuple[NDArray[np.unsignedinteger], NDArray[np.bool_]]:
    """Instance ids as stored (0 where absent, unknown or outside) and the known mask, both of ``grid``'s shape.

    Ids cannot be averaged, so each voxel takes the id at its centre (nearest). Raises `UnknownNameError` where the crop
    has no array of the class.
    """
    if class_name not in crop.labels:
        raise unknown_name("class", class_name, crop.labels, crop.key)
    label = crop.labels[class_name]
    values, inside = label.source.read_nearest(grid, level=0)
    present, known = label.annotation.decode(values)
    known &= inside
    unsigned = values.astype(np.uint64 if values.dtype.itemsize > 4 else np.uint32)
    return np.where(present & known, unsigned, 0).astype(unsigned.dtype), known


def arrays_needed(crop: Crop, classes: Sequence[str]) -> dict[str, LabelArray]:
    """The arrays that can say something of ``classes``: their own, and, where those leave something unknown, those of
    their atoms, of the groups that hold these, and of every other atomic class (which exclude them)."""
    needed: dict[str, LabelArray] = {n: crop.labels[n] for n in classes if n in crop.labels}
    open_ended = [n for n in classes if n not in crop.labels or not _says_everything(crop, n)]
    for name in open_ended:
        atoms = set(atoms_of(name))
        if name not in CLASSES:
            continue  # a class of the user's own: nothing else speaks of it
        for other, label in crop.labels.items():
            known = CLASSES.get(other)
            if known is not None and (other in ATOMIC_CLASSES or atoms & set(known.atoms)):
                needed[other] = label
    return needed


def _block_shape(arrays: Mapping[str, LabelArray], grid: VoxelGrid) -> tuple[int, int, int]:
    """Target voxels worked on at once, so that no array gives more than `_SOURCE_VOXELS` for them."""
    most = 1.0  # source voxels in one target voxel
    for label in arrays.values():
        most = max(most, float(np.prod(np.maximum(1.0, np.divide(grid.voxel_size, label.grid.voxel_size)))))
    edge = int(np.clip((_SOURCE_VOXELS / most) ** (1 / 3), 8, 64))
    return edge, edge, edge


def _says_everything(crop: Crop, name: str) -> bool:
    """Whether the class's own array covers the whole crop and leaves nothing unknown."""
    label = crop.labels[name]
    covers = label.grid.box.contains(crop.box, tolerance=1e-3 * min(label.grid.voxel_size))
    return covers and label.annotation.fully_known


def _read_block(arrays: Mapping[str, LabelArray], block: VoxelGrid, told: Sequence[str]) -> dict[str, Reading]:
    """`_read_array` of several arrays; of those on S3 several at a time, since most of it is waiting."""
    if not any(is_s3(label.location) for label in arrays.values()):
        return {name: _read_array(label, block, name in told) for name, label in arrays.items()}
    found = s3.in_parallel(lambda item: _read_array(item[1], block, item[0] in told), list(arrays.items()))
    return dict(zip(arrays, found, strict=True))


def _read_array(label: LabelArray, block: VoxelGrid, told: bool) -> Reading:
    """What one array says of every voxel of ``block``: bounds of its class's share, and where objects are ``told``
    apart the id where the class is present by the array's own word, else 0."""
    grid = label.grid
    part = grid.slices(block.box)
    shape = [s.stop - s.start for s in part]
    none = np.zeros(block.shape if told else (0, 0, 0), np.uint64)
    if min(shape) == 0:
        return (np.zeros(block.shape, np.float32), np.ones(block.shape, np.float32)), none
    begin = [s.start for s in part]
    values = label.read_stored(begin, shape)
    present, known = label.annotation.decode(values)
    part_grid = grid.crop(begin, shape)
    coverage = resample.area_coverage(part_grid, block)
    lo = resample.area_fraction(present, part_grid, block) * coverage
    absent = resample.area_fraction(known & ~present, part_grid, block) * coverage
    interval = lo, np.float32(1.0) - absent
    if not told or label.annotation.kind != "instance":
        return interval, none
    return interval, np.where(_vote(interval)[0], vote_ids(values, present, part_grid, block), 0)


def _vote(share: Interval) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Present and known of a share's bounds: known by the known share alone, present by vote among what is known."""
    lo, hi = share
    absent = np.float32(1.0) - hi
    known = lo + absent >= np.float32(0.5) - _ROUNDING
    return known & (lo >= absent - 2 * _ROUNDING), known


def _narrow(own: Mapping[str, Interval], classes: Sequence[str], shape: Sequence[int]) -> dict[str, Interval]:
    """The intervals of ``classes``, narrowed by what the arrays in ``own`` say together (the module's docstring)."""
    if all(name in own and _is_settled(own[name]) for name in classes):
        return {name: own[name] for name in classes}
    nothing: Interval = (np.zeros(tuple(shape), np.float32), np.ones(tuple(shape), np.float32))
    # every group that speaks of an atom in question, and every atom of those groups
    groups = [g for g in {*own, *classes} if g in CLASSES and CLASSES[g].is_group]
    # sorted: float sums must come out alike in every process, and sets of names are ordered anew in each
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


def _is_settled(share: Interval) -> bool:
    return bool(np.all(share[1] - share[0] < 1e-4))
