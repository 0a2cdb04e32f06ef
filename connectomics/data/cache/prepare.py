"""Decode the crops of a run into the cache: estimate the size, choose what fits, and decode in processes."""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
import shutil
import signal
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import psutil

from connectomics.cellmap.labels import words_for
from connectomics.data.cache.entry import POINTS, cache_key, open_entry
from connectomics.data.cache.folder import CropCache
from connectomics.data.cache.locks import SHARED_MEMORY
from connectomics.errors import ConnectomicsError, WriteError, number_of
from connectomics.progress import Progress, lines

if TYPE_CHECKING:
    from connectomics.data.volumes import CropVolume

log = logging.getLogger(__name__)

Task = TypeVar("Task")

BUSY = "busy"  # what a function returns for a task that it does not want to wait for now
_LITTLE = 64 << 20  # bytes to decode for which starting processes does not pay
_GB = 1e9


class WorkerDiedError(ConnectomicsError, RuntimeError):
    """A decoding process was killed."""


@dataclass
class _Wanted:
    """One entry that the run wants: its name, the volumes that share it, its bytes, and whether it exists."""

    name: str
    volumes: list[CropVolume]
    size: int
    exists: bool


def prepare(
    volumes: Sequence[CropVolume], budget: int | None = None, *, processes: int = 1, progress: Progress | None = None
) -> None:
    """Decode every volume that has a cache (`CropVolume.cache`) into it, unless that was done, and check all entries.
    Processes that prepare the same volumes at once divide the work.

    Args:
        volumes: all volumes of the run: what fits is decided in their order.
        budget: most bytes that a cache folder may hold, entries of other runs included. The least recently used entries
            that no living run uses are removed; volumes that do not fit are read from Zarr each time.
        processes: how many processes decode; they are started only if there is much to do.
        progress: reports how many entries are complete; None logs a line now and then.

    Raises:
        WriteError: the disk has too little space (before anything is written), or cannot be written.
        CorruptDataError: an entry is damaged, or a chunk cannot be decoded. Whatever else decoding raises.
    """
    by_folder: dict[Path, list[CropVolume]] = {}
    for volume in volumes:
        if volume.cache is not None:
            by_folder.setdefault(volume.cache, []).append(volume)
    for folder, group in by_folder.items():
        _prepare_folder(CropCache(folder), group, processes, budget, progress or lines("decoding crops", log.info))


def _prepare_folder(
    cache: CropCache, volumes: Sequence[CropVolume], processes: int, budget: int | None, progress: Progress
) -> None:
    cache.sweep()
    wanted: dict[str, _Wanted] = {}
    for volume in volumes:
        name = cache_key(volume)
        cache.hold(volume, name)
        if name not in wanted:
            exists = cache.has(name)
            size = open_entry(cache.folder / name).size if exists else forecast(volume)
            wanted[name] = _Wanted(name, [], size, exists)
        wanted[name].volumes.append(volume)
    chosen = _within(cache, list(wanted.values()), budget)
    missing = [entry for entry in chosen if not entry.exists]
    if missing:
        _make_sure_of_space(cache, missing, chosen, budget)
        log.info(
            "crop cache %s: %d of %d crops are there, decoding %d (%s)",
            cache.folder, len(chosen) - len(missing), len(chosen), len(missing), _gb(sum(e.size for e in missing)),
        )  # fmt: skip
    _build(cache, missing, processes, lambda done, name: progress(len(chosen) - len(missing) + done, len(chosen), name))
    for entry in chosen:
        path = cache.folder / entry.name
        cache.open(path)  # checks it and marks it as used
        for volume in entry.volumes:
            volume.adopt(path)


def forecast(volume: CropVolume) -> int:
    """Return the bytes that the entry of a volume will take: one per voxel of raw (two if raw chunks are missing), one
    per voxel of labels (two with object IDs or soft labels), and positions."""
    raw, labels = volume.cached_raw_grid, volume.grid.size if volume.classes else 0
    missing, _, _ = volume.crop.raw_source.missing_chunks(raw)
    points = 12 * min(POINTS, labels) * len(volume.classes) + 4096 * words_for(len(volume.classes))
    return raw.size * (2 if missing else 1) + labels * (2 if volume.instances or volume.soft else 1) + points


def _within(cache: CropCache, wanted: list[_Wanted], budget: int | None) -> list[_Wanted]:
    """The entries that the budget allows, in order; the volumes of all others are read without the cache."""
    if cache.folder.is_dir() and os.access(cache.folder, os.W_OK):
        cache.set_budget(budget)
    if budget is None:
        return wanted
    own = {entry.name for entry in wanted}
    left = budget - sum(e.size for e in cache.entries() if e.processes and e.name not in own)
    chosen, others = [], []
    for entry in wanted:
        if entry.size <= left:
            left -= entry.size
            chosen.append(entry)
        else:
            others.append(entry)
            for volume in entry.volumes:
                volume.adopt(None)
    if others:
        more = sum(entry.size for entry in others) - left
        log.info(
            "crop cache %s: %d of %d crops (%s) do not fit into data.cache_gb=%.6g and are read from Zarr each time; "
            "data.cache_gb=%d would hold all",
            cache.folder, len(others), len(wanted), _gb(sum(e.size for e in others)), budget / _GB,
            math.ceil((budget + max(0, more)) / _GB),
        )  # fmt: skip
    return chosen


def _make_sure_of_space(cache: CropCache, missing: list[_Wanted], chosen: list[_Wanted], budget: int | None) -> None:
    """Remove what exceeds the budget; `WriteError` if the disk is too small even then."""
    needed = sum(entry.size for entry in missing) - cache.bytes_begun(entry.name for entry in missing)
    in_memory = SHARED_MEMORY.is_dir() and cache.folder.resolve().is_relative_to(SHARED_MEMORY)
    free = shutil.disk_usage(cache.folder).free
    if in_memory:
        free = min(free, psutil.virtual_memory().available)
    own = {entry.name for entry in chosen}
    idle = [e for e in cache.entries() if e.name not in own and not e.processes] if budget is not None else []
    if needed > free + sum(entry.size for entry in idle):
        place = "set data.cache=disk" if in_memory else "free some space, set data.cache_dir to another disk"
        raise WriteError(
            f"the crop cache needs {_gb(needed)} more for {len(missing)} crops, and {cache.folder} has {_gb(free)} "
            f"free; {place}, or data.cache=none to read without a cache"
        )
    if budget is not None:
        removed = cache.make_room(budget, sum(entry.size for entry in missing))
        if removed:
            log.info(
                "crop cache %s: removed %s (%s) not used lately, for data.cache_gb=%.6g",
                cache.folder, number_of(len(removed), "entry"), _gb(sum(e.size for e in removed)), budget / _GB,
            )  # fmt: skip


def _build(cache: CropCache, missing: Sequence[_Wanted], processes: int, advance: Callable[[int, str], None]) -> None:
    """Build entries; those that another process is building come last, when they are nearly done."""
    if not missing:
        return
    advance(0, "")
    if processes <= 1 or len(missing) == 1 or sum(entry.size for entry in missing) < _LITTLE:
        done = 0
        for may_wait in (False, True):
            busy = []
            for entry in missing:
                if cache.build(entry.volumes[0], entry.name, wait=may_wait):
                    done += 1
                    advance(done, entry.volumes[0].crop.key)
                else:
                    busy.append(entry)
            missing = busy
        return
    # the largest first, so that no process is left alone with one at the end
    tasks = [(cache.folder, e.volumes[0], e.name) for e in sorted(missing, key=lambda e: -e.size)]
    try:
        run_in_processes(
            build_task, tasks, processes, lambda done, task: advance(done, task[1].crop.key), what="decodes crops"
        )
    finally:
        cache.sweep()  # unfinished entries of stopped processes


def build_task(task: tuple[Path, CropVolume, str], wait: bool) -> object:
    """Build one entry; return `BUSY` if another process builds it and ``wait`` is False."""
    folder, volume, name = task
    return None if CropCache(folder).build(volume, name, wait=wait) else BUSY


def _gb(size: int) -> str:
    return f"{size / _GB:.1f} GB" if size >= _GB else f"{size / 1e6:.1f} MB"


# -- processes ---------------------------------------------------------------------------------------------------------
def run_in_processes(
    function: Callable[[Task, bool], object],
    tasks: Sequence[Task],
    processes: int,
    advance: Callable[[int, Task], None],
    *,
    what: str,
) -> None:
    """Call ``function(task, wait)`` for every task in new processes (forkserver), and wait for all.

    ``wait`` is False at first; a task that returns `BUSY` is repeated with True after the others were started.
    ``advance`` gets the number of finished tasks and the last one. Any error, also one of a task or an interrupt, ends
    all processes at once (``concurrent.futures`` would wait for running tasks).

    Raises:
        WorkerDiedError: a process was killed; ``what`` says in the message what it does.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["connectomics.data.loader"])  # for the loader's workers: the server starts once
    todo: deque[tuple[int, bool]] = deque((number, False) for number in range(len(tasks)))
    workers: dict[Connection, Any] = {}
    at: dict[Connection, tuple[int, bool]] = {}
    done = 0
    try:
        for _ in range(min(processes, len(tasks))):
            ours, theirs = context.Pipe()
            worker = context.Process(target=_work, args=(function, theirs), daemon=True)
            worker.start()
            theirs.close()
            workers[ours] = worker
        idle = list(workers)
        while done < len(tasks):
            while todo and idle:
                connection = idle.pop()
                number, may_wait = at[connection] = todo.popleft()
                connection.send((tasks[number], may_wait))
            for ready in wait(list(at)):
                assert isinstance(ready, Connection)
                number, _ = at.pop(ready)
                try:
                    error, result = ready.recv()
                except EOFError as gone:
                    workers[ready].join()
                    raise WorkerDiedError(
                        f"a process that {what} was killed (exit status {workers[ready].exitcode}), often because "
                        "memory ran out; run again with fewer processes (data.num_workers)"
                    ) from gone
                if error is not None:
                    raise error
                idle.append(ready)
                if result == BUSY:
                    todo.append((number, True))
                else:
                    done += 1
                    advance(done, tasks[number])
    finally:
        for connection, worker in workers.items():
            connection.close()
            if connection in at or done < len(tasks):
                worker.terminate()
        for worker in workers.values():
            worker.join()


def _work(function: Callable[[Any, bool], object], connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles interrupts: it ends its processes
    while True:
        try:
            task, may_wait = connection.recv()
        except EOFError:
            return
        try:
            answer: tuple[Exception | None, object] = (None, function(task, may_wait))
        except Exception as error:  # raised again in the parent
            answer = (error, None)
        connection.send(answer)
