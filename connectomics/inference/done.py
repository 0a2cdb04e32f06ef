"""The done-map: which blocks of a run are on disk."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from connectomics.errors import WriteError
from connectomics.io.write import write_file


class DoneMap:
    """One byte per block in a file beside the output: 1 once the block's data has been written, else 0.

    A block that was under way when a run was killed stays 0 and is computed again.
    """

    def __init__(self, path: Path, blocks: int) -> None:
        """Open the map of ``blocks`` blocks at ``path``; a file that is not there or of another size starts anew."""
        self.path = path
        self._done = np.zeros(blocks, dtype=bool)
        stored = path.read_bytes() if path.exists() else b""
        if len(stored) == blocks:
            self._done = np.frombuffer(stored, dtype=np.uint8) == 1
        else:
            self.clear()

    def __len__(self) -> int:
        return len(self._done)

    @property
    def count(self) -> int:
        """Number of finished blocks."""
        return int(self._done.sum())

    @property
    def missing(self) -> list[int]:
        """Numbers of the blocks that are still to be done, ascending."""
        return [int(n) for n in np.flatnonzero(~self._done)]

    def clear(self) -> None:
        """Nothing is done."""
        self._done = np.zeros(len(self._done), dtype=bool)
        write_file(self.path, bytes(len(self._done)))

    def mark(self, block: int) -> None:
        """Record that ``block`` is finished; on disk when this returns."""
        try:
            with self.path.open("r+b") as file:
                file.seek(block)
                file.write(b"\x01")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise WriteError(f"cannot write the done-map {self.path}: {error.strerror}; free space there") from error
        self._done = self._done.copy()
        self._done[block] = True
