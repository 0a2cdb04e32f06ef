"""What the blocks of a stitched task leave for its later stages: one file a block, read part by part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.decoding.blocks.pieces import Pieces, load_arrays, save_arrays
from connectomics.tasks.blocks import Lattice

Faces = dict[str, NDArray[np.uint32]]
SIDES = tuple(f"{axis}{sign}" for axis in range(3) for sign in "-+")


@dataclass(frozen=True)
class StoredBlocks:
    """The files ``folder/0``, ``folder/1``, ... of the blocks of a lattice: arrays by name.

    Every block has ``count`` (how many labels it has: 1..count), the columns of its `Pieces` and its six `SIDES`; a
    task adds what else it needs.
    """

    lattice: Lattice
    folder: Path

    def save(self, number: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Store what a block leaves, in one step, compressed. `WriteError`."""
        save_arrays(self.folder / str(number), arrays)

    def load(self, number: int, *names: str) -> dict[str, NDArray[Any]]:
        """Some of the arrays of a block; `CorruptDataError` where they cannot be read."""
        return load_arrays(self.folder / str(number), names)

    def pieces(self, number: int) -> Pieces:
        """The table of a block's pieces."""
        return Pieces(**self.load(number, "sizes", "first", "boxes", "sums"))

    def faces(self, number: int) -> Faces:
        """The labels on a block's faces, see `faces_of`."""
        return self.load(number, *SIDES)

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """(blocks + 1,) number of the first label of every block, where the labels of all blocks are counted through.

        Label i of block n is node ``offsets[n] + i - 1``.
        """
        counts = (int(self.load(n, "count")["count"]) for n in range(len(self.lattice)))
        return np.concatenate(([0], np.cumsum(np.fromiter(counts, np.int64, len(self.lattice)))))

    def count(self, number: int) -> int:
        """How many labels a block has."""
        return int(self.offsets[number + 1] - self.offsets[number])
