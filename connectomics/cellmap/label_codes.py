"""Labels of many classes as one small number a voxel.

A `LabelVolume` spends two 64-bit words on each voxel, one bit a class and state. Yet in a crop few combinations occur:
atomic classes exclude each other and a group follows from its atoms. So the combinations are listed once, in
`LabelStates`, and a voxel holds the number of its combination, one byte for up to 256 of them, whatever the number of
classes. What is known alike everywhere costs nothing. State 0 is always "nothing is known".

Where objects are told apart, their ids are part of the combination: a crop has as many states more as it has objects
(and pairs of objects that overlap), a voxel still holds one number, now of two bytes as a rule, and whatever moves
codes moves ids with them. `LabelStates.split` takes the two apart again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from connectomics.cellmap.labels import LabelVolume, words_for
from connectomics.errors import InputError, unknown_name
from connectomics.geometry import VoxelGrid

_WORD = 64
_EXACT = 2**24 - 1  # ids below it are exact in float32, in which they may be resampled, with two numbers to spare


@dataclass(frozen=True)
class LabelStates:
    """The combinations that occur: row k is state k.

    Attributes:
        classes: the class of each bit, as in `LabelVolume`.
        present, known: uint64 (K, W): what is present and what is known in a voxel of the state. Row 0 is all zero.
        instances: those of ``classes`` whose objects are told apart.
        ids: uint64 (K, I), the object of each of ``instances``, as stored; 0 for none, or none that is known. None
            where there are no ``instances``.
    """

    classes: tuple[str, ...]
    present: NDArray[np.uint64]
    known: NDArray[np.uint64]
    instances: tuple[str, ...] = ()
    ids: NDArray[np.uint64] | None = None

    def __post_init__(self) -> None:
        words = words_for(len(self.classes))
        if self.present.shape != self.known.shape or self.present.ndim != 2 or self.present.shape[1] != words:
            raise InputError(
                f"states of {len(self.classes)} classes need two arrays (K, {words}), found {self.present.shape} and "
                f"{self.known.shape}"
            )
        if not len(self.present) or self.present[0].any() or self.known[0].any():
            raise InputError("state 0 must be there, with nothing known")
        found = (len(self.present), 0) if self.ids is None else self.ids.shape
        if found != (len(self.present), len(self.instances)):
            raise InputError(
                f"{len(self.present)} states of objects of {self.instances} need as many ids, found {found}"
            )

    def __len__(self) -> int:
        return len(self.present)

    def tables(self, classes: Sequence[str] | None = None) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Present and known by class and state, both bool (C, K), in the order of ``classes``."""
        names = self.classes if classes is None else tuple(classes)
        for name in names:
            if name not in self.classes:
                raise unknown_name("class", name, self.classes, "these labels")
        bits = [divmod(self.classes.index(name), _WORD) for name in names]
        tables = []
        for words in (self.present, self.known):
            rows = [(words[:, word] >> np.uint64(bit)) & np.uint64(1) for word, bit in bits]
            tables.append(np.array(rows, dtype=bool).reshape(len(names), len(self)))
        return tables[0], tables[1]

    def dense(
        self, codes: NDArray[np.unsignedinteger], classes: Sequence[str] | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """``label`` float32 0/1 and ``known`` bool, (C, D, H, W), of codes (D, H, W); in the order of ``classes``."""
        present, known = self.tables(classes)
        # take() into place: fancy indexing with (C, D, H, W) results makes a temporary of eight bytes an index
        label = np.empty((len(present), *codes.shape), np.float32)
        is_known = np.empty(label.shape, bool)
        for channel in range(len(present)):
            np.take(present[channel].astype(np.float32), codes, out=label[channel], mode="clip")
            np.take(known[channel], codes, out=is_known[channel], mode="clip")
        return label, is_known

    # -- objects -----------------------------------------------------------------------------------------------------
    @cached_property
    def numbers(self) -> NDArray[np.int32]:
        """What a voxel of each state says of the objects of each of ``instances``, (I, K): the object's id (> 0), 0
        where the class is known absent, -1 where it is unknown, or present and nobody said which object it is.

        Ids are those stored, but for a class with ids of 2^24 - 1 and more, which float32 does not hold exactly: those
        of such a class are renumbered 1..n in their order.
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
        """The states without objects, numbered in the order in which they occur here."""
        return self._plain[0]

    @cached_property
    def _plain(self) -> tuple[LabelStates, NDArray[np.unsignedinteger]]:
        """`plain`, and for each state its number there, (K,)."""
        rows = np.concatenate([self.present, self.known], axis=1)
        _, first, number = np.unique(rows, axis=0, return_index=True, return_inverse=True)
        order = np.argsort(first)
        place = np.empty(len(order), code_dtype(len(order)))
        place[order] = np.arange(len(order))
        kept = first[order]
        return LabelStates(self.classes, self.present[kept], self.known[kept]), place[number.reshape(-1)]

    def split(self, codes: NDArray[np.unsignedinteger]) -> tuple[NDArray[np.unsignedinteger], NDArray[np.int32]]:
        """Codes (D, H, W) as codes of `plain` and ``ids`` int32 (I, D, H, W), see `numbers`."""
        from connectomics.cellmap.label_kernels import look_up

        flat = np.ascontiguousarray(codes).reshape(-1)
        states = np.empty(codes.shape, self._plain[1].dtype)
        look_up(flat, self._plain[1], states.reshape(-1))
        ids = np.empty((len(self.instances), *codes.shape), np.int32)
        for numbers, row in zip(self.numbers, ids, strict=True):
            look_up(flat, numbers, row.reshape(-1))
        return states, ids

    # -- as a file ---------------------------------------------------------------------------------------------------
    def to_array(self) -> NDArray[np.uint64]:
        """For a file: present and known words of every state, (K, 2, W), or with ids, (K, 2 W + I)."""
        words = np.stack([self.present, self.known], axis=1)
        return words if self.ids is None else np.concatenate([words.reshape(len(self), -1), self.ids], axis=1)

    @classmethod
    def from_array(
        cls, classes: Sequence[str], array: NDArray[np.uint64], instances: Sequence[str] = ()
    ) -> LabelStates:
        """The inverse of `to_array`."""
        words = words_for(len(classes))
        rows = np.ascontiguousarray(array).reshape(len(array), -1)
        ids = rows[:, 2 * words :].copy() if instances else None
        return cls(tuple(classes), rows[:, :words].copy(), rows[:, words : 2 * words].copy(), tuple(instances), ids)


@dataclass(frozen=True)
class LabelCodes:
    """Three-state labels on one grid, as numbers of states.

    Attributes:
        grid: where the voxels are.
        codes: uint8, uint16 or uint32 (D, H, W).
        states: what they mean.
    """

    grid: VoxelGrid
    codes: NDArray[np.unsignedinteger]
    states: LabelStates

    @classmethod
    def of(cls, volume: LabelVolume) -> LabelCodes:
        """The same labels as codes."""
        table = StateTable(volume.classes, volume.instances)
        codes = table.encode(volume)
        return cls(volume.grid, codes.astype(code_dtype(len(table))), table.states)

    def volume(self) -> LabelVolume:
        """The same labels as two words a voxel."""
        states = self.states
        present, known = (
            np.ascontiguousarray(np.moveaxis(w[self.codes], -1, 0)) for w in (states.present, states.known)
        )
        ids = None if states.ids is None else np.ascontiguousarray(np.moveaxis(states.ids[self.codes], -1, 0))
        return LabelVolume(self.grid, states.classes, present, known, states.instances, ids)

    def dense(self, classes: Sequence[str] | None = None) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """``label`` float32 0/1 and ``known`` bool, both (C, D, H, W), in the order of ``classes``."""
        return self.states.dense(self.codes, classes)

    def ids(self) -> NDArray[np.int32]:
        """Ids of objects, int32 (I, D, H, W): 0 where known absent, -1 where unknown; see `LabelStates.numbers`."""
        return self.states.split(self.codes)[1]

    def restricted(self, where: NDArray[np.bool_]) -> LabelCodes:
        """The same labels, unknown outside the mask ``where`` (D, H, W)."""
        return LabelCodes(self.grid, np.where(where, self.codes, self.codes.dtype.type(0)), self.states)


class StateTable:
    """The states met so far, while a volume is encoded block by block."""

    def __init__(self, classes: Sequence[str], instances: Sequence[str] = ()) -> None:
        self.classes, self.instances = tuple(classes), tuple(instances)
        self._rows = np.zeros((1, 2 * words_for(len(self.classes)) + len(self.instances)), np.uint64)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def states(self) -> LabelStates:
        """The states as numbered so far."""
        return LabelStates.from_array(self.classes, self._rows, self.instances)

    def encode(self, volume: LabelVolume) -> NDArray[np.uint32]:
        """The codes of a block, uint32 (D, H, W); states that are new get the next numbers, in order of voxels."""
        if (volume.classes, volume.instances) != (self.classes, self.instances):
            raise InputError(
                f"the block has classes {volume.classes} with objects of {volume.instances}, the table {self.classes} "
                f"with objects of {self.instances}"
            )
        from connectomics.cellmap.label_kernels import encode_rows

        parts = [volume.present, volume.known] if volume.ids is None else [volume.present, volume.known, volume.ids]
        words = np.concatenate(parts).reshape(self._rows.shape[1], -1)
        codes = np.empty(words.shape[1], np.uint32)
        done = 0
        while done < codes.size:
            # the kernel stops where its table is full; grown, it goes on from there
            rows = np.zeros((2 * len(self._rows) + 64, len(words)), np.uint64)
            rows[: len(self._rows)] = self._rows
            done, used = encode_rows(words, done, rows, len(self._rows), codes)
            self._rows = rows[:used].copy()
        return codes.reshape(volume.grid.shape)


def code_dtype(n_states: int) -> np.dtype[np.unsignedinteger]:
    """The narrowest unsigned integer that numbers ``n_states`` states."""
    return np.dtype(np.min_scalar_type(max(0, n_states - 1)))
