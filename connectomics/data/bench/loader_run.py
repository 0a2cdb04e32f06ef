"""The whole loader with its worker processes: patches a second, CPU seconds a patch, memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from connectomics.data.bench.meter import private_mb
from connectomics.data.loader import PatchLoader

_LOOK_EVERY = 8  # batches between two looks at the workers' memory


@dataclass(frozen=True)
class LoaderSpeed:
    """What a run of the loader was like, its first batches (start of the workers, first pages) left out.

    Attributes:
        workers, batch_size, patches: how it ran. patches_per_s: delivered to the main process, which does nothing else.
        cpu_s: CPU seconds a patch of the main process and all workers.
        worker_mb: largest private memory of a worker; None without workers or where the system does not tell.
        main_mb: private memory of the main process.
    """

    workers: int
    batch_size: int
    patches: int
    patches_per_s: float
    cpu_s: float
    worker_mb: float | None
    main_mb: float | None


def run_loader(loader: PatchLoader, patches: int) -> LoaderSpeed:
    """Take at least ``patches`` patches, after a warm-up of two batches a worker."""
    import psutil

    size = int(loader.batch_size or 1)
    batches = _endless(loader)
    for _ in range(2 * max(1, loader.num_workers) + 1):
        next(batches)
    workers = [p for p in psutil.Process().children(recursive=True) if _is_worker(p, loader)]
    number = max(1, -(-patches // size))
    worker_mb: float | None = None
    cpu = _cpu(workers)
    begin = time.perf_counter()
    for n in range(number):
        next(batches)
        if n % _LOOK_EVERY == 0 or n == number - 1:
            found = [m for m in (_private(p.pid) for p in workers) if m is not None]
            worker_mb = max([*found, worker_mb or 0.0]) if found else worker_mb
    seconds, cpu = time.perf_counter() - begin, _cpu(workers) - cpu
    batches.close()
    loader.stop()
    taken = number * size
    return LoaderSpeed(
        loader.num_workers, size, taken, taken / seconds, cpu / taken, worker_mb, _private(psutil.Process().pid)
    )


def _endless(loader: PatchLoader) -> Any:
    def batches() -> Iterator[Any]:
        while True:
            yield from loader

    return batches()


def _is_worker(process: Any, loader: PatchLoader) -> bool:
    return process.pid in worker_pids(loader)


def worker_pids(loader: PatchLoader) -> list[int]:
    """The loader's running workers."""
    return [] if loader._running is None else [worker.pid for worker in loader._running._workers]


def _cpu(workers: list[Any]) -> float:
    """CPU seconds of this process and the workers so far."""
    times = [p.cpu_times() for p in workers]
    return time.process_time() + sum(t.user + t.system for t in times)


def _private(pid: int) -> float | None:
    return private_mb(pid) if Path(f"/proc/{pid}/smaps_rollup").exists() else None
