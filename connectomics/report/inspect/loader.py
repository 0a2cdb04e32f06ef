"""How fast a loader gives batches, and how much memory its processes hold."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from torch import Tensor

Batch = Mapping[str, Tensor]

_LEAST = 8  # batches that are timed, where the epoch has as many
_A_WORKER = 4  # and as many for each worker: the first of them were made while nobody waited
_LONGEST = 20.0  # seconds after which timing ends


@dataclass(frozen=True)
class ProcessMemory:
    """Memory of one process, bytes.

    Attributes:
        name: main process, worker 1, worker 2...
        resident: what is in memory of it. private: the part that no other process has. proportional: shared parts
            divided by the number of processes that share them, so that the sum over processes is what they take.
    """

    name: str
    resident: int
    private: int
    proportional: int

    @property
    def shared(self) -> int:
        """What other processes have too: libraries, batches on their way, mapped files of the crop cache."""
        return self.resident - self.private


@dataclass(frozen=True)
class LoaderSpeed:
    """What taking batches from a loader took.

    Attributes:
        workers: loader processes; 0: the main process reads.
        first_s: until the first batch: workers start, libraries load.
        timed_batches: batches after it that were timed; timed_s: what they took in all.
        batch_size: patches a batch. batch_bytes: of its tensors.
        memory: the main process and every worker while they were at it; empty where the system does not say.
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
        """Patches a second, None where there were too few batches to tell."""
        return self.timed_batches * self.batch_size / self.timed_s if self.timed_batches and self.timed_s > 0 else None

    @property
    def bytes_per_s(self) -> float | None:
        """Bytes of tensors a second."""
        return self.timed_batches * self.batch_bytes / self.timed_s if self.timed_batches and self.timed_s > 0 else None


def take(loader: Iterable[Batch], number: int, workers: int) -> tuple[list[Batch], LoaderSpeed]:
    """The first ``number`` batches of a loader with ``workers`` workers (fewer where it ends), and its speed.

    Workers fetch ahead, so the batches that were ready when the first one came would flatter them: with workers the
    clock starts after as many more batches as there are workers. Nothing is done with a batch while the clock runs.
    """
    before = {process.pid for process in multiprocessing.active_children()}
    begin = time.perf_counter()
    batches: Iterator[Batch] = iter(loader)
    taken = list(islice(batches, 1))
    first = time.perf_counter() - begin
    taken += islice(batches, max(0, number - 1, workers))
    memory = _memory(before)  # an epoch that ends takes its workers with it
    goal = max(_LEAST, _A_WORKER * workers)
    begin, timed = time.perf_counter(), 0
    elapsed = 0.0
    while timed < goal and elapsed < _LONGEST and next(batches, None) is not None:
        timed += 1
        elapsed = time.perf_counter() - begin
    later = _memory(before)
    size = sum(tensor.nbytes for tensor in taken[0].values()) if taken else 0
    speed = LoaderSpeed(
        workers=workers,
        first_s=first,
        timed_batches=timed,
        timed_s=elapsed,
        batch_size=len(taken[0]["image"]) if taken else 0,
        batch_bytes=size,
        memory=later if len(later) >= len(memory) else memory,
    )
    return taken[:number], speed


def _memory(before: Container[int | None]) -> tuple[ProcessMemory, ...]:
    """Of this process and of its children that were not there ``before``."""
    children = sorted(p.pid for p in multiprocessing.active_children() if p.pid is not None and p.pid not in before)
    found = [memory_of(os.getpid(), "main process")]
    found += [memory_of(pid, f"worker {k}") for k, pid in enumerate(children, start=1)]
    return tuple(memory for memory in found if memory is not None)


def memory_of(pid: int, name: str) -> ProcessMemory | None:
    """The memory of a process, or None where the system does not say (it has no ``smaps_rollup``, or it has ended)."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
    except OSError:
        return None
    found: dict[str, int] = {}
    for line in text.splitlines()[1:]:
        key, _, value = line.partition(":")
        found[key] = int(value.split()[0]) * 1024  # in kB, which are 1024 bytes there
    private = found["Private_Clean"] + found["Private_Dirty"]
    return ProcessMemory(name, found["Rss"], private, found["Pss"])
