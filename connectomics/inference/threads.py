"""Reading ahead of the network and writing behind it: one thread each, with a bounded number of blocks on the way.

Reading decodes and scales chunks, writing compresses them; both leave Python's lock for most of that, so they go on
while the network computes. What is read and written, and in which order, is the same as without the threads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from connectomics.geometry import VoxelGrid

Item = TypeVar("Item")

AHEAD = 1 << 24  # voxels of raw that may lie read and not yet wanted (float32: 64 MiB)


class ReadAhead:
    """Stands for ``read`` where the grids that it will be called with, and their order, are known beforehand.

    A context manager; leaving it ends its thread, once the read that is under way is over. An error of ``read`` is
    raised as it is by the call for the grid that it belongs to.
    """

    def __init__(
        self, read: Callable[[VoxelGrid], NDArray[np.float32]], grids: Iterable[VoxelGrid], most: int = AHEAD
    ) -> None:
        """Read ``grids`` in turn, at most ``most`` voxels ahead (but always one grid)."""
        self._read = read
        self._grids = iter(grids)
        self._next = next(self._grids, None)
        self._most = most
        self._waiting: deque[tuple[VoxelGrid, Future[NDArray[np.float32]]]] = deque()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __call__(self, grid: VoxelGrid) -> NDArray[np.float32]:
        """What ``read`` gives for ``grid``, which must be the next one."""
        self._submit()
        expected, result = self._waiting.popleft() if self._waiting else (None, None)
        if result is None or expected != grid:
            raise RuntimeError(f"raw is read ahead for {expected}, and was asked for at {grid}")
        self._submit()
        return result.result()

    def _submit(self) -> None:
        ahead = sum(grid.size for grid, _ in self._waiting)
        while self._next is not None and (not self._waiting or ahead + self._next.size <= self._most):
            ahead += self._next.size
            self._waiting.append((self._next, self._pool.submit(self._read, self._next)))
            self._next = next(self._grids, None)


class WriteBehind(Generic[Item]):
    """Hands items to ``write``, one after the other and in their order, in a thread of its own.

    At most one is on the way: `put` first waits for the one before. A context manager; it is left once everything is
    written, or, where an error came up meanwhile, once the write that is under way is over.
    """

    def __init__(self, write: Callable[[Item], None]) -> None:
        self._write = write
        self._latest: Future[None] | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="write-behind")

    def put(self, item: Item) -> None:
        """Have ``item`` written. Raises as it is what writing the one before raised."""
        self.wait()
        self._latest = self._pool.submit(self._write, item)

    def wait(self) -> None:
        """Until everything is written; raises as `put` does."""
        latest, self._latest = self._latest, None
        if latest is not None:
            latest.result()

    def __enter__(self) -> WriteBehind[Item]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if error is None:
                self.wait()
        finally:
            self._pool.shutdown(wait=True)
