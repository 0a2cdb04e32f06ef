"""Locks between processes, and the cache folder in memory that lives as long as its run.

These locks use flock directly: a file that many processes hold at once (shared) and one takes alone to remove things,
and a lock that says whether its process is still alive. filelock has no shared lock on one plain file that ends with
its process (its reader lock needs SQLite). Exclusive locks of entries are filelock's, see `folder`.
"""

from __future__ import annotations

import atexit
import errno
import fcntl
import hashlib
import os
import shutil
import socket
import tempfile
import threading
import uuid
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Literal

from connectomics.errors import WriteError
from connectomics.io.location import local_path

SHARED_MEMORY = Path("/dev/shm")
_OWNERS = ".owners"  # every process of a run holds this file's lock, shared
#: Variables that are equal in the processes of one data-parallel run and differ between runs.
_RUN = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "SLURM_STEP_ID")
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


def lock(descriptor: int, path: Path, *, shared: bool = False, wait: bool = True) -> bool:
    """Take the lock of an open file; return False if another process has it and ``wait`` is False."""
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


@contextmanager
def locked(path: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold the lock of a file, which is created if it does not exist."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        lock(descriptor, path, shared=shared)
        yield
    finally:
        os.close(descriptor)


# -- entries in use ----------------------------------------------------------------------------------------------------
class Lease:
    """The entries of a cache folder that this process uses, in a file that it keeps locked. Entries named in a locked
    file are not removed; unlocked files are left over from processes that ended."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._names: Counter[str] = Counter()
        self._released: deque[str] = deque()
        self._thread_lock = threading.Lock()
        self._path: Path | None = None
        self._descriptor = -1

    def hold(self, names: Iterable[str]) -> None:
        """Mark entries as in use, before looking whether they exist."""
        with self._thread_lock, locked(self.folder / ".lock", shared=True):
            # a removal reads the leases with the exclusive lock, so it sees these names or comes first
            self._names.update(names)
            while self._released:
                self._names[self._released.popleft()] -= 1
            self._write()

    def release(self, name: str) -> None:
        """Mark an entry as no longer used by one holder. Takes no lock, since garbage collection may call it anywhere;
        the next `hold` or `refresh` updates the file."""
        self._released.append(name)

    def refresh(self) -> None:
        """Update the file with what was released."""
        if self._path is not None and self._released:
            self.hold(())

    def _write(self) -> None:
        if self._path is None:
            name = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
            self._path = self.folder / ".leases" / name
            self._path.parent.mkdir(exist_ok=True)
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            lock(self._descriptor, self._path)
            atexit.register(self._path.unlink, missing_ok=True)
        text = "".join(f"{name}\n" for name, count in sorted(self._names.items()) if count > 0).encode()
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, text, 0)


@lru_cache(maxsize=64)
def lease_of_process(folder: Path, pid: int) -> Lease:
    """Return the one lease that a process has in a folder."""
    return Lease(folder)


def leased(folder: Path) -> Counter[str]:
    """Return how many living processes use each entry; removes files of dead ones. Needs ``.lock``, exclusive."""
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


# -- cache folders -----------------------------------------------------------------------------------------------------
def cache_folder(mode: Literal["none", "memory", "disk"], cache_dir: str | Path | None = None) -> Path | None:
    """Return the cache folder of a run; None for ``none``. Only ``disk`` uses ``cache_dir``."""
    if mode == "none":
        return None
    if mode == "memory":
        return memory_folder()
    return local_path(cache_dir) if cache_dir else default_cache_dir()


def default_cache_dir() -> Path:
    """Return the user's cache folder for crops (honors ``XDG_CACHE_HOME``)."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "connectomics" / "crops"


def memory_folder() -> Path:
    """Return the folder of this run in memory (``/dev/shm``, else the temporary folder).

    Processes of one data-parallel run on a machine share it. The last of them removes it; the next run removes what
    a killed run left behind.
    """
    return _memory_folder(os.getpid())


@lru_cache(maxsize=4)
def _memory_folder(pid: int) -> Path:
    parent = SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else Path(tempfile.gettempdir())
    prefix = f"connectomics-{os.getuid()}-"
    for other in parent.glob(f"{prefix}*"):
        if not other.is_symlink():
            _remove_unused(other)
    several = int(os.environ.get("WORLD_SIZE", "1") or 1) > 1
    token = "\n".join(f"{name}={os.environ.get(name, '')}" for name in _RUN) if several else f"{pid} {uuid.uuid4()}"
    folder = parent / (prefix + hashlib.sha256(token.encode()).hexdigest()[:16])
    while True:
        folder.mkdir(mode=0o700, exist_ok=True)
        try:
            descriptor = os.open(folder / _OWNERS, os.O_RDWR | os.O_CREAT, 0o600)
        except FileNotFoundError:
            continue  # another process has just removed it as a dead run's folder
        lock(descriptor, folder / _OWNERS, shared=True)
        if _is_file_of(descriptor, folder / _OWNERS):
            break
        os.close(descriptor)
    atexit.register(_leave, folder, descriptor, pid)
    return folder


def _leave(folder: Path, descriptor: int, pid: int) -> None:
    if os.getpid() != pid:
        return  # a process that the user's program forked: the folder is its parent's
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)
    _remove_unused(folder)


def _remove_unused(folder: Path) -> None:
    """Remove a folder that no living process uses."""
    try:
        descriptor = os.open(folder / _OWNERS, os.O_RDWR | os.O_CREAT, 0o600)
    except (FileNotFoundError, NotADirectoryError):
        return
    try:
        if lock(descriptor, folder / _OWNERS, wait=False) and _is_file_of(descriptor, folder / _OWNERS):
            gone = folder.rename(folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}"))
            shutil.rmtree(gone, ignore_errors=True)
    finally:
        os.close(descriptor)


def _is_file_of(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
