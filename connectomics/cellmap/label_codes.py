"""Labels of many classes as one small number per voxel.

A `LabelVolume` spends two 64-bit words per voxel, one bit per class and state. Yet few combinations occur in a crop:
atomic classes exclude each other, and a group follows from its atoms. So `LabelStates` lists the combinations once, and
a voxel holds the number of its combination: one byte for up to 256 of them, whatever the number of classes. State 0
always means "nothing is known".

With instance ids, the ids are part of the combination: a crop has one more state per object (and per pair of
overlapping objects), a voxel still holds one number (usually two bytes), and whatever moves codes moves ids with them.
`LabelStates.split` separates the two again. Soft labels are a part of the combination in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from connectomics.cellmap.labels import FRACTION_STEPS, LabelVolume, words_for
from connectomics.errors import InputError, require_known
from connectomics.geometry import VoxelGrid

_WORD = 64
_EXACT = 2**24 - 1  # ids below it are exact in float32, in which they may be resampled


@dataclass(frozen=True)
class LabelStates:
    """The combinations that occur; row k is state k.

    Attributes:
        classes: the class of each bit, as in `LabelVolume`.
        present, known: uint64 (K, words): the present and the known classes of each state. Row 0 is zero.
        instances: the ``classes`` with per-object instance ids.
        ids: uint64 (K, I), the stored instance id of each of ``instances``; 0 for none or unknown. None if there are no
            ``instances``.
        fractions: uint8 (K, C), soft labels of each state, see `LabelVolume`; None without soft labels.
    """

    classes: tuple[str, ...]
    present: NDArray[np.uint64]
    known: NDArray[np.uint64]
    instances: tuple[str, ...] = ()
    ids: NDArray[np.uint64] | None = None
    fractions: NDArray[np.uint8] | None = None

    def __post_init__(self) -> None:
        words = words_for(len(self.classes))
        if self.present.shape != self.known.shape or self.present.ndim != 2 or self.present.shape[1] != words:
            raise InputError(
                f"states of {len(self.classes)} classes need two arrays (K, {words}), got {self.present.shape} and "
                f"{self.known.shape}"
            )
        if not len(self.present) or self.present[0].any() or self.known[0].any():
            raise InputError("state 0 must exist, with nothing known")
        found = (len(self.present), 0) if self.ids is None else self.ids.shape
        if found != (len(self.present), len(self.instances)):
            raise InputError(f"{len(self.present)} states of objects of {self.instances} need as many ids, got {found}")

    def __len__(self) -> int:
        return len(self.present)

    def tables(self, classes: Sequence[str] | None = None) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Return present and known by class and state, both bool (C, K), in the order of ``classes``."""
        names = self.classes if classes is None else tuple(classes)
        tables = np.empty((2, len(names), len(self)), bool)
        for channel, name in enumerate(names):
            require_known("class", [name], self.classes, "these labels")
            word, bit = divmod(self.classes.index(name), _WORD)
            for table, words in zip(tables, (self.present, self.known), strict=True):
                table[channel] = (words[:, word] >> np.uint64(bit)) & np.uint64(1)
        return tables[0], tables[1]

    def fraction_table(self, classes: Sequence[str] | None = None) -> NDArray[np.uint8] | None:
        """Return soft labels by class and state, uint8 (C, K), in sixteenths; None without soft labels."""
        if self.fractions is None:
            return None
        names = self.classes if classes is None else classes
        return np.ascontiguousarray(self.fractions.T[[self.classes.index(name) for name in names]])

    def dense(
        self, codes: NDArray[np.unsignedinteger], classes: Sequence[str] | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Return ``label`` float32 and ``known`` bool, (C, D, H, W), of codes (D, H, W); ordered as ``classes``.

        A label is 0 or 1, and with soft labels a fraction.
        """
        present, known = self.tables(classes)
        steps = self.fraction_table(classes)
        values = present.astype(np.float32) if steps is None else steps / np.float32(FRACTION_STEPS)
        # take() with out=: fancy indexing would allocate a temporary of eight bytes per index
        label = np.empty((len(present), *codes.shape), np.float32)
        is_known = np.empty(label.shape, bool)
        for channel in range(len(present)):
            np.take(values[channel], codes, out=label[channel], mode="clip")
            np.take(known[channel], codes, out=is_known[channel], mode="clip")
        return label, is_known

    @cached_property
    def numbers(self) -> NDArray[np.int32]:
        """Instance number per state for each of ``instances``, (I, K).

        It is the instance id (> 0), 0 if the class is known absent, -1 if it is unknown or present without a known id.
        Ids are the stored ones; if a class has ids of 2^24 - 1 and more, which float32 does not represent exactly, its
        ids are renumbered 1..n in their order.
        """
        present, known = self.tables(self.instances)
        numbers = np.where(known & ~present, 0, -1).astype(np.int32)
        if self.ids is not None:
            for row, ids in zip(numbers, self.ids.T, strict=True):
                there = ids > 0
                kept = ids[there]
                if kept.max(initial=0) >= _EXACT:
                    kept = np.unique(kept, return_inverse=True)[1] + 1
                row[there] = kept
        return numbers

    @cached_property
    def plain(self) -> LabelStates:
        """The states without instance ids, numbered in order of first occurrence."""
        return self._plain[0]

    @cached_property
    def _plain(self) -> tuple[LabelStates, NDArray[np.unsignedinteger]]:
        """`plain`, and the number there of each state, (K,)."""
        soft = [] if self.fractions is None else [self.fractions.astype(np.uint64)]
        rows = np.concatenate([self.present, self.known, *soft], axis=1)
        _, first, number = np.unique(rows, axis=0, return_index=True, return_inverse=True)
        order = np.argsort(first)
        place = np.empty(len(order), code_dtype(len(order)))
        place[order] = np.arange(len(order))
        kept = first[order]
        fractions = None if self.fractions is None else self.fractions[kept]
        states = LabelStates(self.classes, self.present[kept], self.known[kept], fractions=fractions)
        return states, place[number.reshape(-1)]

    def split(self, codes: NDArray[np.unsignedinteger]) -> tuple[NDArray[np.unsignedinteger], NDArray[np.int32]]:
        """Split codes (D, H, W) into codes of `plain` and instance numbers int32 (I, D, H, W), see `numbers`."""
        from connectomics.cellmap.label_kernels import look_up

        flat = np.ascontiguousarray(codes).reshape(-1)
        states = np.empty(codes.shape, self._plain[1].dtype)
        look_up(flat, self._plain[1], states.reshape(-1))
        ids = np.empty((len(self.instances), *codes.shape), np.int32)
        for numbers, row in zip(self.numbers, ids, strict=True):
            look_up(flat, numbers, row.reshape(-1))
        return states, ids

    def to_array(self) -> NDArray[np.uint64]:
        """Return the array stored in files: (K, 2, words), or with instance ids or soft labels (K, 2 words + I + F),
        where F words hold the fractions of eight classes each."""
        words = np.stack([self.present, self.known], axis=1)
        further = [] if self.ids is None else [self.ids]
        if self.fractions is not None:
            further.append(_packed(self.fractions.T).T)
        return np.concatenate([words.reshape(len(self), -1), *further], axis=1) if further else words

    @classmethod
    def from_array(
        cls, classes: Sequence[str], array: NDArray[np.uint64], instances: Sequence[str] = ()
    ) -> LabelStates:
        """Build the states from the array of `to_array`."""
        words = words_for(len(classes))
        rows = np.ascontiguousarray(array).reshape(len(array), -1)
        soft = 2 * words + len(instances)  # first column of the fractions
        ids = rows[:, 2 * words : soft].copy() if instances else None
        fractions = None
        if rows.shape[1] > soft:
            bytes_of = [rows[:, soft + c // 8] >> np.uint64(8 * (c % 8)) & np.uint64(255) for c in range(len(classes))]
            fractions = np.stack(bytes_of, axis=1).astype(np.uint8)
        present, known = rows[:, :words].copy(), rows[:, words : 2 * words].copy()
        return cls(tuple(classes), present, known, tuple(instances), ids, fractions)


@dataclass(frozen=True)
class LabelCodes:
    """Three-state labels on one grid: ``codes`` (uint8, uint16 or uint32, D H W) are numbers of ``states``."""

    grid: VoxelGrid
    codes: NDArray[np.unsignedinteger]
    states: LabelStates

    @classmethod
    def of(cls, volume: LabelVolume) -> LabelCodes:
        """Encode a label volume."""
        table = StateTable(volume.classes, volume.instances, volume.fractions is not None)
        codes = table.encode(volume)
        return cls(volume.grid, codes.astype(code_dtype(len(table))), table.states)

    def dense(self, classes: Sequence[str] | None = None) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Return ``label`` float32 and ``known`` bool, both (C, D, H, W), see `LabelStates.dense`."""
        return self.states.dense(self.codes, classes)

    def ids(self) -> NDArray[np.int32]:
        """Return instance numbers, int32 (I, D, H, W): 0 if known absent, -1 if unknown; see `LabelStates.numbers`."""
        return self.states.split(self.codes)[1]

    def restricted(self, where: NDArray[np.bool_]) -> LabelCodes:
        """Return the same labels, unknown outside the mask ``where`` (D, H, W)."""
        return LabelCodes(self.grid, np.where(where, self.codes, self.codes.dtype.type(0)), self.states)


class StateTable:
    """The states found so far while a volume is encoded block by block."""

    def __init__(self, classes: Sequence[str], instances: Sequence[str] = (), soft: bool = False) -> None:
        self.classes, self.instances, self.soft = tuple(classes), tuple(instances), soft
        columns = 2 * words_for(len(self.classes)) + len(self.instances) + soft * _soft_words(len(self.classes))
        self._rows = np.zeros((1, columns), np.uint64)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def states(self) -> LabelStates:
        """The states found so far."""
        return LabelStates.from_array(self.classes, self._rows, self.instances)

    def encode(self, volume: LabelVolume) -> NDArray[np.uint32]:
        """Return the codes of a block, uint32 (D, H, W); new states get the next numbers, in order of voxels."""
        soft = volume.fractions is not None
        if (volume.classes, volume.instances, soft) != (self.classes, self.instances, self.soft):
            raise InputError(
                f"the block has classes {volume.classes} with ids of {volume.instances} and soft labels {soft}, the "
                f"table {self.classes} with ids of {self.instances} and soft labels {self.soft}"
            )
        from connectomics.cellmap.label_kernels import encode_rows

        parts = [volume.present, volume.known] if volume.ids is None else [volume.present, volume.known, volume.ids]
        if volume.fractions is not None:
            parts.append(_packed(volume.fractions))
        words = np.concatenate(parts).reshape(self._rows.shape[1], -1)
        codes = np.empty(words.shape[1], np.uint32)
        done = 0
        while done < codes.size:
            # the kernel stops when its table is full, and continues there with a larger one
            rows = np.zeros((2 * len(self._rows) + 64, len(words)), np.uint64)
            rows[: len(self._rows)] = self._rows
            done, used = encode_rows(words, done, rows, len(self._rows), codes)
            self._rows = rows[:used].copy()
        return codes.reshape(volume.grid.shape)


def _soft_words(n_classes: int) -> int:
    """Words that hold a byte of each class (none without classes)."""
    return -(-n_classes // 8)


def _packed(fractions: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Pack bytes of classes (C, ...) into words (F, ...)."""
    words = np.zeros((_soft_words(len(fractions)), *fractions.shape[1:]), np.uint64)
    for channel, values in enumerate(fractions):
        words[channel // 8] |= values.astype(np.uint64) << np.uint64(8 * (channel % 8))
    return words


def code_dtype(n_states: int) -> np.dtype[np.unsignedinteger]:
    """Return the narrowest unsigned integer type that numbers ``n_states`` states."""
    return np.dtype(np.min_scalar_type(max(0, n_states - 1)))
