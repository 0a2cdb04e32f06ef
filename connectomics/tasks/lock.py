"""One process leads a task at a time: a lock on a file beside the task's folder.

The lock is the kernel's (`flock`), so it goes with the process that holds it, however that ends; a file that a killed
process left is taken over. It holds between machines where the file system passes locks on: NFS does (version 4, and 3
with its lock daemon), Lustre and GPFS where they are mounted so (``flock``, not ``localflock``), parallel file systems
without locks and S3 mounts do not: there nothing is refused. NFS needs a while to notice that a machine has died
whole. Not covered: the workers of a Dask scheduler whose leader was killed, which end by themselves soon (two may then
write one block for a moment, both the same bytes, each file in one step), and arrays that `decode` decodes whole.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from connectomics.errors import WriteError

# what a file system answers that has no locks, or a lock daemon that is not there
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


@contextlib.contextmanager
def leading(folder: Path) -> Iterator[None]:
    """Be the one process that works on the output in ``folder`` while the block runs.

    Raises `WriteError` where another one is, named by process and machine, or where nothing can be written.
    """
    path = folder.with_name(f".{folder.name.lstrip('.')}.lock")
    handle = _open(path)
    try:
        while not _locked(handle, path, folder):
            os.close(handle)
            handle = _open(path)
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
    finally:
        os.close(handle)


def _open(path: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except FileExistsError as error:
        raise WriteError(f"cannot write {path}: {path.parent} is no folder; choose another place") from error
    except OSError as error:
        raise WriteError(f"cannot write {path}: {error.strerror or error}; choose another place") from error


def _locked(handle: int, path: Path, folder: Path) -> bool:
    """Take the lock; False where the file is no longer the one at ``path``, since the last holder has removed it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        who = os.pread(handle, 200, 0).decode(errors="replace") or "another process"
        raise WriteError(
            f"{who} is working on {folder}: wait until it has ended, or end it; the same command then goes on"
        ) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise WriteError(f"cannot lock {path}: {error.strerror or error}") from error
        return True
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False
