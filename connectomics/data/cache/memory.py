"""Where crops are decoded to: a folder on disk, or one on memory-backed storage that lives as long as its run."""

from __future__ import annotations

import atexit
import fcntl
import hashlib
import os
import shutil
import tempfile
import uuid
from functools import lru_cache
from pathlib import Path
from typing import Literal

from connectomics.data.cache.locks import is_file_of, lock
from connectomics.io.location import local_path

SHARED_MEMORY = Path("/dev/shm")
_OWNERS = ".owners"  # every process of the run holds this file's lock, shared
#: Variables that are alike in the processes of one data-parallel run and differ between runs.
_RUN = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "SLURM_STEP_ID")


def cache_folder(mode: Literal["none", "memory", "disk"], cache_dir: str | Path | None = None) -> Path | None:
    """Where the crops of a run are decoded to; None for ``none``. ``cache_dir`` counts for ``disk`` alone."""
    if mode == "none":
        return None
    if mode == "memory":
        return memory_folder()
    return local_path(cache_dir) if cache_dir else default_cache_dir()


def default_cache_dir() -> Path:
    """The user's cache folder for this program (``XDG_CACHE_HOME`` is honoured)."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "connectomics" / "crops"


def memory_folder() -> Path:
    """The folder of this run on memory-backed storage (``/dev/shm``, else the temporary folder).

    Processes of one data-parallel run on a machine have one together. It is removed when the last of them ends; what a
    killed run leaves is removed when the next one asks for its folder.
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
            continue  # removed since, by a process that took it for a dead one's
        lock(descriptor, folder / _OWNERS, shared=True)
        if is_file_of(descriptor, folder / _OWNERS):
            break
        os.close(descriptor)
    atexit.register(_leave, folder, descriptor, pid)
    return folder


def _leave(folder: Path, descriptor: int, pid: int) -> None:
    if os.getpid() != pid:
        return  # a forked child: the folder is its parent's
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)
    _remove_unused(folder)


def _remove_unused(folder: Path) -> None:
    """Remove a folder that no living process has."""
    try:
        descriptor = os.open(folder / _OWNERS, os.O_RDWR | os.O_CREAT, 0o600)
    except (FileNotFoundError, NotADirectoryError):
        return
    try:
        if lock(descriptor, folder / _OWNERS, wait=False) and is_file_of(descriptor, folder / _OWNERS):
            gone = folder.rename(folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}"))
            shutil.rmtree(gone, ignore_errors=True)
    finally:
        os.close(descriptor)
