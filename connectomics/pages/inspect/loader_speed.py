"""The throughput of a loader, and the memory of its processes."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

import psutil
from torch import Tensor

Batch = Mapping[str, Tensor]

_LEAST = 8  # batches to time, if the epoch has as many
_PER_WORKER = 4  # batches to time for each worker: the first ones were read before the clock started
_LONGEST = 20.0  # seconds after which timing ends


@dataclass(frozen=True)
class ProcessMemory:
    """Memory of one process, bytes: its pages in memory, and those of no other process.

    ``proportional`` divides shared pages by the number of processes that share them: the sum over processes is a total.
    """

    name: str
    resident: int
    private: int
    proportional: int

    @property
    def shared(self) -> int:
        """Pages that other processes have too: libraries, batches in transit, mapped files of the crop cache."""
        return self.resident - self.private


@dataclass(frozen=True)
class LoaderSpeed:
    """Time and memory that a loader takes.

    ``first_s``: seconds until the first batch, in which workers start. ``timed_s``: for all ``timed_batches``.
    ``memory``: of the main process and every worker while they read; empty if the system does not say.
    """

    workers: int
    first_s: float
    timed_batches: int
    timed_s: float
    batch_size: int
    batch_bytes: int
    memory: tuple[ProcessMemory, ...]

    @property
    def patches_per_s(self) -> float | None:
        """Patches per second, None if there were too few batches to measure."""
        return self.timed_batches * self.batch_size / self.timed_s if self.timed_batches and self.timed_s > 0 else None

    @property
    def bytes_per_s(self) -> float | None:
        """Bytes of tensors per second."""
        return self.timed_batches * self.batch_bytes / self.timed_s if self.timed_batches and self.timed_s > 0 else None


def take(loader: Iterable[Batch], number: int, workers: int) -> tuple[list[Batch], LoaderSpeed]:
    """Return the first ``number`` batches of a loader with ``workers`` workers (fewer if it ends), and its speed.

    Workers prefetch, so batches that were ready before the first one was taken do not count: with workers the clock
    starts after as many more batches as there are workers. Batches are not processed while the clock runs.
    """
    before = {process.pid for process in multiprocessing.active_children()}
    begin = time.perf_counter()
    batches: Iterator[Batch] = iter(loader)
    taken = list(islice(batches, 1))
    first = time.perf_counter() - begin
    taken += islice(batches, max(0, number - 1, workers))
    memory = _memory(before)  # at the end of an epoch the workers end too
    goal = max(_LEAST, _PER_WORKER * workers)
    begin, timed, elapsed = time.perf_counter(), 0, 0.0
    while timed < goal and elapsed < _LONGEST and next(batches, None) is not None:
        timed += 1
        elapsed = time.perf_counter() - begin
    later = _memory(before)
    memory = later if len(later) >= len(memory) else memory
    size = sum(tensor.nbytes for tensor in taken[0].values()) if taken else 0
    batch_size = len(taken[0]["image"]) if taken else 0
    return taken[:number], LoaderSpeed(workers, first, timed, elapsed, batch_size, size, memory)


def _memory(before: Container[int | None]) -> tuple[ProcessMemory, ...]:
    """Return the memory of this process and of its children that did not exist ``before``."""
    children = sorted(p.pid for p in multiprocessing.active_children() if p.pid is not None and p.pid not in before)
    names = {os.getpid(): "main process", **{pid: f"worker {k}" for k, pid in enumerate(children, start=1)}}
    found = [memory_of(pid, name) for pid, name in names.items()]
    return tuple(memory for memory in found if memory is not None)


def memory_of(pid: int, name: str) -> ProcessMemory | None:
    """Return the memory of a process; None if the system does not say or the process has ended."""
    try:
        found = psutil.Process(pid).memory_full_info()
        return ProcessMemory(name, found.rss, found.uss, found.pss)
    except (psutil.Error, AttributeError):  # only Linux has pss
        return None
