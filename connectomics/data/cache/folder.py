"""`CropCache`: the entries in one folder, shared by any number of processes.

Each entry is a folder named by `cache_key`; it appears under its name only when it is complete. Hidden beside them:
folders that are being built or deleted, the locks of those being built, the leases of living processes, and ``.lock``,
which is held shared to start using an entry and exclusively to remove entries.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from connectomics.data.cache.entry import ARRAYS, DESCRIPTION, USED, CachedCrop, cache_key, is_name, open_entry
from connectomics.data.cache.locks import Lease, lease_of_process, leased, locked
from connectomics.errors import ConnectomicsError, WriteError
from connectomics.io.location import local_path

if TYPE_CHECKING:
    from connectomics.data.volumes import CropVolume

_BUILDING, _DELETED, _BUDGET = ".building", ".deleted", ".budget"
_OURS = frozenset({DESCRIPTION, USED, *ARRAYS})


@dataclass(frozen=True)
class EntryInfo:
    """What a listing shows of an entry."""

    folder: Path
    crop: str | None  # dataset/crop; None if that cannot be read
    classes: int  # how many
    voxel_size: tuple[float, ...]  # nm, z y x
    size: int  # bytes on disk
    used: float  # when it was last opened, seconds since 1970
    processes: int  # how many living processes use it

    @property
    def name(self) -> str:
        """The entry's key."""
        return self.folder.name


class CropCache:
    """The entries in one folder, which need not exist yet."""

    def __init__(self, folder: Path) -> None:
        self.folder = local_path(folder)

    # -- use ---------------------------------------------------------------------------------------------------------
    def ensure(self, volume: CropVolume) -> Path:
        """Return the folder of the crop's entry, built if it does not exist; it stays in use while ``volume`` lives.

        Raises:
            WriteError: the disk is full or the folder cannot be written. Whatever decoding raises.
        """
        name = cache_key(volume)
        self.hold(volume, name)
        if not self.has(name):
            self.build(volume, name)
        return self.folder / name

    def open(self, entry: Path, *, checked: bool = False) -> CachedCrop:
        """Open an existing entry; `CorruptDataError` if it is damaged. ``checked``: it was checked a moment ago."""
        opened = open_entry(entry, "sizes" if checked else "pages")
        if not checked and self._writable:
            os.utime(entry / USED)
        return opened

    def has(self, name: str) -> bool:
        """Whether a complete entry of this name exists."""
        return (self.folder / name / DESCRIPTION).is_file()

    def hold(self, volume: CropVolume, name: str) -> None:
        """Keep an entry, existing or not yet, from being removed while ``volume`` lives."""
        with self._as_write_error():
            self.folder.mkdir(parents=True, exist_ok=True)
            if self._writable:  # otherwise no process of this user can remove anything
                lease = self._lease
                lease.hold([name])
                weakref.finalize(volume, lease.release, name).atexit = False

    def build(self, volume: CropVolume, name: str, *, wait: bool = True) -> bool:
        """Build an entry, or wait for the process that is building it. Return False if ``wait`` is False and another
        process is building it."""
        from connectomics.data.cache import build as building  # imports numba

        with self._as_write_error(), self._locked(name, wait) as held:
            if not held:
                return False
            self._remove_leftovers(name)
            if self.has(name):
                return True
            temporary = self.folder / f".{name}.{uuid.uuid4().hex[:8]}{_BUILDING}"
            temporary.mkdir()
            try:
                building.build(volume, temporary)
                target = self.folder / name
                if target.exists():  # damaged: it has no description
                    shutil.rmtree(self._hide(target), ignore_errors=True)
                temporary.rename(target)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        return True

    @contextmanager
    def _locked(self, name: str, wait: bool) -> Iterator[bool]:
        """Hold the lock of an entry that is built; gives whether it is held (always if ``wait``)."""
        path = self.folder / ".locks" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(path, blocking=wait):
                try:
                    yield True
                finally:
                    path.unlink(missing_ok=True)  # who waits for it then creates a new one
        except Timeout:
            yield False

    @contextmanager
    def _as_write_error(self) -> Iterator[None]:
        """Turn errors of the file system into a `WriteError` about the cache."""
        try:
            yield
        except OSError as error:
            if isinstance(error, ConnectomicsError):
                raise  # the data was at fault, not the cache
            raise WriteError(
                f"could not write the crop cache below {self.folder} ({error.strerror or error}); "
                "free some space or set data.cache_dir to another folder"
            ) from error

    @property
    def _writable(self) -> bool:
        return os.access(self.folder, os.W_OK)

    @property
    def _lease(self) -> Lease:
        return lease_of_process(self.folder.resolve(), os.getpid())

    # -- housekeeping ------------------------------------------------------------------------------------------------
    def entries(self) -> list[EntryInfo]:
        """Return all entries, the most recently used first."""
        if not self.folder.is_dir():
            return []
        in_use: Counter[str] = Counter()
        if self._writable:
            self._lease.refresh()
            with locked(self.folder / ".lock"):
                in_use = leased(self.folder)
        found = [_info(path, in_use[path.name]) for path in self.folder.iterdir() if _is_entry(path)]
        return sorted(found, key=lambda entry: (-entry.used, entry.name))

    def remove(self, chosen: Iterable[str] | Callable[[list[EntryInfo]], Iterable[str]]) -> list[EntryInfo]:
        """Remove entries that no living process uses; return what was removed.

        ``chosen``: names, or a function that chooses them from the unused entries.
        """
        removed, trash = [], []
        if not self.folder.is_dir():
            return []
        self._lease.refresh()
        with self._as_write_error(), locked(self.folder / ".lock"):
            in_use = leased(self.folder)
            free = [_info(p, 0) for p in self.folder.iterdir() if _is_entry(p) and not in_use[p.name]]
            names = set(chosen(free) if callable(chosen) else chosen)
            for entry in free:
                if entry.name in names:
                    trash.append(self._hide(entry.folder))
                    removed.append(entry)
        for path in trash:
            shutil.rmtree(path, ignore_errors=True)
        return removed

    def make_room(self, limit: int, coming: int = 0) -> list[EntryInfo]:
        """Remove the least recently used entries until all, with ``coming`` bytes more, take at most ``limit`` bytes
        (or all that are left are in use); return what was removed."""

        def oldest(free: list[EntryInfo]) -> list[str]:
            total = coming + sum(_size(path) for path in self.folder.iterdir() if _is_entry(path))
            chosen = []
            for entry in sorted(free, key=lambda e: (e.used, e.name)):
                if total <= limit:
                    break
                chosen.append(entry.name)
                total -= entry.size
            return chosen

        return self.remove(oldest)

    def sweep(self) -> None:
        """Remove what killed processes left behind while they built or removed entries."""
        if not self.folder.is_dir() or not self._writable:
            return
        for path in self.folder.glob(f".*{_DELETED}"):
            shutil.rmtree(path, ignore_errors=True)
        for name in {_name_of_leftover(path) for path in self.folder.glob(f".*{_BUILDING}")}:
            with self._locked(name, wait=False) as held:
                if held:
                    self._remove_leftovers(name)

    def bytes_begun(self, names: Iterable[str]) -> int:
        """Return the bytes on disk of unfinished entries of these names."""
        wanted = set(names)
        leftovers = self.folder.glob(f".*{_BUILDING}")
        return sum(_size(path) for path in leftovers if _name_of_leftover(path) in wanted)

    def _remove_leftovers(self, name: str) -> None:
        """Remove builds of this entry whose process was killed; needs the entry's lock."""
        for path in self.folder.glob(f".{name}.*{_BUILDING}"):
            shutil.rmtree(path, ignore_errors=True)

    def _hide(self, entry: Path) -> Path:
        """Rename an entry, in one step, to a name that is not an entry's."""
        return entry.rename(self.folder / f".{entry.name}.{uuid.uuid4().hex[:8]}{_DELETED}")

    # -- the limit that the last run set, for `pytc cache` -----------------------------------------------------------
    @property
    def budget(self) -> int | None:
        """``data.cache_gb`` of the last run that had one here, in bytes."""
        try:
            return int((self.folder / _BUDGET).read_text(encoding="ascii"))
        except (FileNotFoundError, ValueError):
            return None

    def set_budget(self, limit: int | None) -> None:
        """Store the limit of a run; None for no limit."""
        if limit is None:
            (self.folder / _BUDGET).unlink(missing_ok=True)
        else:
            (self.folder / _BUDGET).write_text(str(limit), encoding="ascii")


def _is_entry(path: Path) -> bool:
    """Whether a folder is an entry, complete or damaged, by its name and by holding only an entry's files."""
    if not is_name(path.name) or path.is_symlink() or not path.is_dir():
        return False
    inside = {child.name for child in path.iterdir()}
    return bool(inside) and inside <= _OURS


def _info(folder: Path, processes: int) -> EntryInfo:
    try:
        read = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        read = None  # damaged: listed, so that it can be removed
    data: dict[str, Any] = read if isinstance(read, dict) else {}
    marker = folder / USED
    used = (marker if marker.exists() else folder).stat().st_mtime
    return EntryInfo(
        folder=folder, crop=data.get("crop"), classes=len(data.get("classes", ())),
        voxel_size=tuple(data.get("label_grid", {}).get("voxel_size", ())), size=_size(folder), used=used,
        processes=processes,
    )  # fmt: skip


def _size(folder: Path) -> int:
    """Bytes on disk of a folder's files; files that vanish meanwhile count as 0."""
    total = 0
    for name in _OURS:
        with suppress(FileNotFoundError):
            total += (folder / name).stat().st_size
    return total


def _name_of_leftover(path: Path) -> str:
    return path.name.removeprefix(".").rsplit(".", 2)[0]
