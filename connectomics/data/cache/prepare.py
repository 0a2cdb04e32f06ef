"""Decoding the crops of a run into the cache: how much it will be, what fits, and then all at once in processes."""

from __future__ import annotations

import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from connectomics.cellmap.labels import words_for
from connectomics.data.cache.build import POINTS
from connectomics.data.cache.entry import open_entry
from connectomics.data.cache.folder import CropCache
from connectomics.data.cache.key import Decodable, cache_key
from connectomics.data.cache.memory import SHARED_MEMORY
from connectomics.data.cache.workers import BUSY, run_in_processes
from connectomics.errors import WriteError

log = logging.getLogger(__name__)

#: Told (done, all, name of what was done last).
Progress = Callable[[int, int, str], None]
_LITTLE = 64 << 20  # bytes to decode for which it does not pay to start processes
_EVERY = 10.0  # seconds between two lines in a log
_GB = 1e9


@dataclass
class _Wanted:
    """One entry that the run wants: its name, the volumes that share it, its bytes, whether it is there."""

    name: str
    volumes: list[Decodable]
    size: int
    there: bool


def prepare(
    volumes: Sequence[Decodable],
    budget: int | None = None,
    *,
    processes: int = 1,
    progress: Progress | None = None,
) -> None:
    """Decode every volume that has a cache (`CropVolume.cache`) into it, where that has not been done, and check what
    is there. Processes that prepare the same volumes at once divide the work.

    Args:
        volumes: those of the run, all together: what fits is decided in their order.
        budget: most bytes that a cache folder may hold, those of other runs included; the least recently used entries
            that no living run uses are removed, and volumes that do not fit are left to be read from Zarr each time.
        processes: how many decode; they are started only where there is much to do.
        progress: told how many entries are there; by default a line is logged now and then.

    Raises:
        WriteError: the disk has too little space (said before anything is written), or cannot be written.
        CorruptDataError: an entry is damaged, or a chunk cannot be decoded. Whatever else decoding raises.
    """
    by_folder: dict[Path, list[Decodable]] = {}
    for volume in volumes:
        if volume.cache is not None:
            by_folder.setdefault(volume.cache, []).append(volume)
    for folder, group in by_folder.items():
        _prepare_folder(CropCache(folder), group, processes, budget, progress or _Lines())


def _prepare_folder(
    cache: CropCache, volumes: Sequence[Decodable], processes: int, budget: int | None, progress: Progress
) -> None:
    cache.sweep()
    wanted: dict[str, _Wanted] = {}
    for volume in volumes:
        name = cache_key(volume)
        cache.hold(volume, name)
        if name not in wanted:
            there = cache.has(name)
            size = open_entry(cache.folder / name).size if there else forecast(volume)
            wanted[name] = _Wanted(name, [], size, there)
        wanted[name].volumes.append(volume)
    chosen = _within(cache, list(wanted.values()), budget)
    missing = [entry for entry in chosen if not entry.there]
    if missing:
        _make_sure_of_space(cache, missing, chosen, budget)
        log.info(
            "crop cache %s: %d of %d crops are there, decoding %d (%s)",
            cache.folder, len(chosen) - len(missing), len(chosen), len(missing), _gb(sum(e.size for e in missing)),
        )  # fmt: skip
    _build(cache, missing, processes, lambda done, name: progress(len(chosen) - len(missing) + done, len(chosen), name))
    for entry in chosen:
        path = cache.folder / entry.name
        cache.open(path)  # checks it, and says that it was used
        for volume in entry.volumes:
            volume.adopt(path)


def forecast(volume: Decodable) -> int:
    """Bytes that the entry of a volume will take: a byte a voxel of raw, one a voxel of labels (two with objects told
    apart), one more of raw where some of it is not stored, and positions."""
    raw, labels = volume.cached_raw_grid, volume.grid.size if volume.classes else 0
    missing, _, _ = volume.crop.raw_source.missing_chunks(raw)
    points = 12 * min(POINTS, labels) * len(volume.classes) + 4096 * words_for(len(volume.classes))
    return raw.size * (2 if missing else 1) + labels * (2 if volume.instances else 1) + points


def _within(cache: CropCache, wanted: list[_Wanted], budget: int | None) -> list[_Wanted]:
    """The entries that the budget allows, in order; the others' volumes are read without the cache."""
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
    """Remove what the budget wants removed; `WriteError` where the disk is too small even then."""
    needed = sum(entry.size for entry in missing) - cache.bytes_begun(entry.name for entry in missing)
    free = _free_bytes(cache.folder)
    own = {entry.name for entry in chosen}
    idle = [e for e in cache.entries() if e.name not in own and not e.processes] if budget is not None else []
    if needed > free + sum(entry.size for entry in idle):
        place = (
            "free some space, set data.cache_dir to another disk, or data.cache=none to read without a cache"
            if not _in_memory(cache.folder)
            else "set data.cache=disk, or data.cache=none to read without a cache"
        )
        raise WriteError(
            f"the crop cache needs {_gb(needed)} more for {len(missing)} crops, and {cache.folder} has {_gb(free)} "
            f"free; {place}"
        )
    if budget is not None:
        removed = cache.make_room(budget, sum(entry.size for entry in missing))
        if removed:
            log.info(
                "crop cache %s: removed %d entries (%s) that were not used lately, for data.cache_gb=%.6g",
                cache.folder, len(removed), _gb(sum(e.size for e in removed)), budget / _GB,
            )  # fmt: skip


def _build(cache: CropCache, missing: Sequence[_Wanted], processes: int, advance: Callable[[int, str], None]) -> None:
    """Build entries; those that another process has begun come last, when they are as good as done."""
    if not missing:
        return
    advance(0, "")
    if processes <= 1 or len(missing) == 1 or sum(entry.size for entry in missing) < _LITTLE:
        done = 0
        for wait in (False, True):
            busy = []
            for entry in missing:
                if cache.build(entry.volumes[0], entry.name, wait=wait):
                    done += 1
                    advance(done, entry.volumes[0].crop.key)
                else:
                    busy.append(entry)
            missing = busy
        return
    # the largest first, so that no process is left with one at the end
    tasks = [(cache.folder, e.volumes[0], e.name) for e in sorted(missing, key=lambda e: -e.size)]
    try:
        run_in_processes(
            build_task, tasks, processes, lambda done, task: advance(done, task[1].crop.key), what="decodes crops"
        )
    finally:
        cache.sweep()  # what processes that had to be stopped were at


def build_task(task: tuple[Path, Decodable, str], wait: bool) -> object:
    """What a process does: build one entry; `BUSY` where another builds it and ``wait`` is False."""
    folder, volume, name = task
    return None if CropCache(folder).build(volume, name, wait=wait) else BUSY


def _free_bytes(folder: Path) -> int:
    """Bytes that can be written below a folder; on memory-backed storage, not more than there is memory."""
    free = shutil.disk_usage(folder).free
    if _in_memory(folder):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                free = min(free, 1024 * int(line.split()[1]))
    return free


def _in_memory(folder: Path) -> bool:
    return SHARED_MEMORY.is_dir() and folder.resolve().is_relative_to(SHARED_MEMORY)


class _Lines:
    """Progress as a line in the log every ten seconds."""

    def __init__(self) -> None:
        self._begin = self._last = time.monotonic()

    def __call__(self, done: int, number: int, name: str) -> None:
        now = time.monotonic()
        if now - self._last >= _EVERY:
            self._last = now
            log.info("decoding crops: %d of %d, %s (%.0f s)", done, number, name, now - self._begin)


def _gb(size: int) -> str:
    return f"{size / _GB:.1f} GB" if size >= _GB else f"{size / 1e6:.1f} MB"
