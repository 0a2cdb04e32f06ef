"""The done-map: which blocks of a stage are on disk."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from connectomics.errors import WriteError
from connectomics.io.write import write_file


class DoneMap:
    """A file beside the output: a line that names the task, then one byte per block, 1 once its data is written.

    A block that was under way when a run was killed stays 0 and is done again. One process writes it: the one that
    leads the run.
    """

    def __init__(self, path: Path, blocks: int, key: str) -> None:
        """Open the map of the ``blocks`` blocks of the task ``key`` (`BlockTask.key`), or begin it.

        Raises `WriteError` for the map of another task, or of other blocks.
        """
        self.path = path
        self._head = f"connectomics done-map {key}\n".encode()
        self._done: NDArray[np.bool_] = np.zeros(blocks, dtype=bool)
        stored = path.read_bytes() if path.exists() else b""
        if not stored:
            self.clear()
            return
        if not stored.startswith(self._head) or len(stored) != len(self._head) + blocks:
            raise WriteError(
                f"the done-map {path} is of another task (expected {key} with {blocks} blocks); "
                f"overwrite the output, or choose another place"
            )
        self._done = np.frombuffer(stored, dtype=np.uint8, offset=len(self._head)) == 1

    def __len__(self) -> int:
        return len(self._done)

    @property
    def count(self) -> int:
        """Number of finished blocks."""
        return int(np.count_nonzero(self._done))

    @property
    def missing(self) -> NDArray[np.int64]:
        """Numbers of the blocks that are still to be done, ascending."""
        return np.flatnonzero(~self._done)

    def clear(self) -> None:
        """Nothing is done."""
        self._done = np.zeros(len(self._done), dtype=bool)
        write_file(self.path, self._head + bytes(len(self._done)))

    def mark(self, blocks: Iterable[int]) -> None:
        """Record that ``blocks`` are finished; on disk when this returns."""
        self._set(blocks, True)

    def forget(self, blocks: Iterable[int]) -> None:
        """Record that ``blocks`` are to be done again."""
        self._set(blocks, False)

    def _set(self, blocks: Iterable[int], done: bool) -> None:
        numbers = sorted(blocks)
        if not numbers:
            return
        if not self._done.flags.writeable:
            self._done = self._done.copy()
        try:
            with self.path.open("r+b") as file:
                for number in numbers:
                    file.seek(len(self._head) + number)
                    file.write(bytes([done]))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise WriteError(f"cannot write the done-map {self.path}: {error.strerror}; free space there") from error
        self._done[numbers] = done


def sync(folder: str) -> None:
    """Wait until everything that this machine has written to the file system of ``folder`` is on its disk."""
    import ctypes

    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return  # nothing was written there
    try:
        syncfs = getattr(ctypes.CDLL(None, use_errno=True), "syncfs", None)  # Linux; elsewhere all file systems
        if syncfs is None or syncfs(handle) != 0:
            os.sync()
    finally:
        os.close(handle)
