"""Labels of many classes as one small number a voxel.

A `LabelVolume` spends two 64-bit words on each voxel, one bit a class and state. Yet in a crop few combinations occur:
atomic classes exclude each other and a group follows from its atoms. So the combinations are listed once, in
`LabelStates`, and a voxel holds the number of its combination, one byte for up to 256 of them, whatever the number of
classes. What is known alike everywhere costs nothing. State 0 is always "nothing is known".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from connectomics.cellmap.labels import LabelVolume, words_for
from connectomics.errors import InputError, unknown_name
from connectomics.geometry import VoxelGrid

_WORD = 64


@dataclass(frozen=True)
class LabelStates:
    """The combinations that occur: row k is state k.

    Attributes:
        classes: the class of each bit, as in `LabelVolume`.
        present, known: uint64 (K, W): what is present and what is known in a voxel of the state. Row 0 is all zero.
    """

    classes: tuple[str, ...]
    present: NDArray[np.uint64]
    known: NDArray[np.uint64]

    def __post_init__(self) -> None:
        words = words_for(len(self.classes))
        if self.present.shape != self.known.shape or self.present.ndim != 2 or self.present.shape[1] != words:
            raise InputError(
                f"states of {len(self.classes)} classes need two arrays (K, {words}), found {self.present.shape} and "
                f"{self.known.shape}"
            )
        if not len(self.present) or self.present[0].any() or self.known[0].any():
            raise InputError("state 0 must be there, with nothing known")

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

    def to_array(self) -> NDArray[np.uint64]:
        """(K, 2, W): present and known words of every state, for a file."""
        return np.stack([self.present, self.known], axis=1)

    @classmethod
    def from_array(cls, classes: Sequence[str], array: NDArray[np.uint64]) -> LabelStates:
        """The inverse of `to_array`."""
        return cls(tuple(classes), np.ascontiguousarray(array[:, 0]), np.ascontiguousarray(array[:, 1]))


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
        table = StateTable(volume.classes)
        codes = table.encode(volume)
        return cls(volume.grid, codes.astype(code_dtype(len(table))), table.states)

    def volume(self) -> LabelVolume:
        """The same labels as two words a voxel."""
        present = np.moveaxis(self.states.present[self.codes], -1, 0)
        known = np.moveaxis(self.states.known[self.codes], -1, 0)
        return LabelVolume(self.grid, self.states.classes, np.ascontiguousarray(present), np.ascontiguousarray(known))

    def dense(self, classes: Sequence[str] | None = None) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """``label`` float32 0/1 and ``known`` bool, both (C, D, H, W), in the order of ``classes``."""
        return self.states.dense(self.codes, classes)

    def restricted(self, where: NDArray[np.bool_]) -> LabelCodes:
        """The same labels, unknown outside the mask ``where`` (D, H, W)."""
        return LabelCodes(self.grid, np.where(where, self.codes, self.codes.dtype.type(0)), self.states)


class StateTable:
    """The states met so far, while a volume is encoded block by block."""

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = tuple(classes)
        words = words_for(len(self.classes))
        self._rows = np.zeros((1, 2 * words), np.uint64)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def states(self) -> LabelStates:
        """The states as numbered so far."""
        words = self._rows.shape[1] // 2
        return LabelStates(self.classes, self._rows[:, :words].copy(), self._rows[:, words:].copy())

    def encode(self, volume: LabelVolume) -> NDArray[np.uint32]:
        """The codes of a block, uint32 (D, H, W); states that are new get the next numbers, in order of voxels."""
        if volume.classes != self.classes:
            raise InputError(f"the block has classes {volume.classes}, the table {self.classes}")
        from connectomics.cellmap.label_kernels import encode_rows

        words = np.concatenate([volume.present, volume.known]).reshape(2 * len(volume.present), -1)
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
