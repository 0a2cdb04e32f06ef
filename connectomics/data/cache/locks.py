"""Locks between processes (flock): they end with the process that holds them, however it ends."""

from __future__ import annotations

import atexit
import errno
import fcntl
import os
import socket
import threading
import uuid
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from connectomics.errors import WriteError

_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


@contextmanager
def locked(path: Path, *, shared: bool = False, wait: bool = True, remove: bool = False) -> Iterator[bool]:
    """Hold the lock of a file, made where it is not there; gives whether it is held (always, unless ``wait`` is False).

    ``remove``: take the file away at the end; whoever waits for it then makes a new one.
    """
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            held = lock(descriptor, path, shared=shared, wait=wait)
            if held and not is_file_of(descriptor, path):
                continue  # it was removed while this process waited
            try:
                yield held
            finally:
                if held and remove:
                    path.unlink(missing_ok=True)
            return
        finally:
            os.close(descriptor)


def lock(descriptor: int, path: Path, *, shared: bool = False, wait: bool = True) -> bool:
    """Take the lock of an open file; False where another process has it and ``wait`` is False."""
    how = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    try:
        fcntl.flock(descriptor, how)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            raise WriteError(
                f"the file system of {path.parent} has no file locks ({error.strerror}), which the crop cache needs; "
                "set data.cache_dir to a local disk"
            ) from error
        raise
    return True


def is_file_of(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


class Lease:
    """The entries of a cache folder that this process uses, in a file that it keeps locked: entries named in a file
    that somebody holds are not removed. Files that nobody holds are left over and mean nothing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._names: Counter[str] = Counter()
        self._released: deque[str] = deque()
        self._thread_lock = threading.Lock()
        self._path: Path | None = None
        self._descriptor = -1

    @staticmethod
    def of_process(folder: Path) -> Lease:
        """The one lease that this process has in a folder."""
        return _lease(folder, os.getpid())

    def hold(self, names: Iterable[str]) -> None:
        """Say that these entries are in use, before looking whether they are there."""
        with self._thread_lock, locked(self.folder / ".lock", shared=True):
            # a removal reads the leases with the lock held alone, so it sees these names or comes first
            self._names.update(names)
            while self._released:
                self._names[self._released.popleft()] -= 1
            self._write()

    def release(self, name: str) -> None:
        """Say that one who held the entry does so no longer. Takes no lock: it is called when an object is collected,
        which may be in the midst of anything; the file is brought up to date with the next `hold` or `refresh`."""
        self._released.append(name)

    def refresh(self) -> None:
        """Bring the file up to date with what was released."""
        if self._path is not None and self._released:
            self.hold(())

    def _write(self) -> None:
        if self._path is None:
            name = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
            self._path = self.folder / ".leases" / name
            self._path.parent.mkdir(exist_ok=True)
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            lock(self._descriptor, self._path)
            atexit.register(self._close, os.getpid())
        text = "".join(f"{name}\n" for name, count in sorted(self._names.items()) if count > 0).encode()
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, text, 0)

    def _close(self, pid: int) -> None:
        if os.getpid() == pid and self._path is not None:  # a forked child leaves its parent's alone
            self._path.unlink(missing_ok=True)


@lru_cache(maxsize=64)
def _lease(folder: Path, pid: int) -> Lease:
    return Lease(folder)


def leased(folder: Path) -> Counter[str]:
    """How many living processes use each entry; files of dead ones are removed. Call it with ``.lock`` held alone."""
    names: Counter[str] = Counter()
    for path in sorted((folder / ".leases").glob("*")):
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:  # its process ended just now
            continue
        try:
            if lock(descriptor, path, wait=False):
                path.unlink(missing_ok=True)
                continue
            names.update(set(path.read_text(encoding="utf-8").split("\n")) - {""})
        finally:
            os.close(descriptor)
    return names
