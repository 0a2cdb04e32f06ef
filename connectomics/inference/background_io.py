"""Read ahead of the network and write behind it, each in one thread with a bounded queue.

Decoding and compressing chunks release Python's lock for most of their time, so both run while the network computes.
What is read and written, and in which order, is the same as without the threads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from connectomics.geometry import VoxelGrid

Item = TypeVar("Item")

MAX_VOXELS_AHEAD = 1 << 24  # voxels of raw that wait to be used (float32: 64 MiB)


class ReadAhead:
    """Replaces ``read`` if the grids of the calls and their order are known in advance.

    The call for a grid raises the error that ``read`` raised for this grid.
    """

    def __init__(
        self, read: Callable[[VoxelGrid], NDArray[np.float32]], grids: Iterable[VoxelGrid], most: int = MAX_VOXELS_AHEAD
    ) -> None:
        """Read ``grids`` in order, at most ``most`` voxels ahead (but always one grid)."""
        self._read = read
        self._grids = iter(grids)
        self._next = next(self._grids, None)
        self._most = most
        self._waiting: deque[tuple[VoxelGrid, Future[NDArray[np.float32]]]] = deque()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __call__(self, grid: VoxelGrid) -> NDArray[np.float32]:
        self._submit()
        expected, result = self._waiting.popleft() if self._waiting else (None, None)
        if result is None or expected != grid:
            raise RuntimeError(f"raw is read in another order than planned: expected {expected}, got {grid}")
        self._submit()
        return result.result()

    def _submit(self) -> None:
        ahead = sum(grid.size for grid, _ in self._waiting)
        while self._next is not None and (not self._waiting or ahead + self._next.size <= self._most):
            ahead += self._next.size
            self._waiting.append((self._next, self._pool.submit(self._read, self._next)))
            self._next = next(self._grids, None)


class WriteBehind(Generic[Item]):
    """Passes items to ``write`` in order, in its own thread; `put` first waits for the previous item, and raises what
    writing it raised. It exits once everything is written, or, after an error, once the running write has ended."""

    def __init__(self, write: Callable[[Item], None]) -> None:
        self._write = write
        self._latest: Future[None] | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="write-behind")

    def put(self, item: Item) -> None:
        self.wait()
        self._latest = self._pool.submit(self._write, item)

    def wait(self) -> None:
        latest, self._latest = self._latest, None
        if latest is not None:
            latest.result()

    def __enter__(self) -> WriteBehind[Item]:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._pool.shutdown(wait=True)
