"""One process leads a task at a time: a lock on a file beside the task's folder.

The kernel holds the lock (`flock`), so it ends with the process that holds it; a file that a killed process left is
taken over. It works between machines if the file system passes locks on (NFS; Lustre and GPFS if mounted with
``flock``); on others nothing is refused. On S3 the lock is a lease (`connectomics.tasks.lease`). Not covered: Dask
workers whose leader was killed, which end by themselves soon, and arrays that `decode` decodes whole.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from connectomics.errors import WriteError
from connectomics.io.place import S3Path
from connectomics.tasks.lease import HELD, MINE, Lease

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}  # no locks, or no lock daemon
_POLL_S = 1.0  # between two looks at a lease
_WAIT_S = 0.3  # the previous holder may be removing the file right now


@contextlib.contextmanager
def leading(folder: Path, *, wait: bool = False) -> Iterator[Callable[[], None]]:
    """Be the one process that works on the output in ``folder`` while the block runs. Yields a function that raises
    `WriteError` if it no longer is; call it before something is removed.

    With ``wait``, wait while another process does. Else raises `WriteError` if one does, named by process and machine,
    or if the folder cannot be written.
    """
    from filelock import FileLock, Timeout

    path = folder.with_name(f".{folder.name.lstrip('.')}.lock")
    if isinstance(path, S3Path):
        with _leased(path, folder, wait) as lease:
            yield lease.require
        return
    lock = FileLock(path, mode=0o666, fallback_to_soft=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=-1 if wait else _WAIT_S)
    except Timeout as error:
        who = path.read_text(errors="replace") if path.exists() else ""
        raise _busy(who or "another process", folder) from error
    except FileExistsError as error:
        raise WriteError(f"cannot write {path}: {path.parent} is not a folder; choose another output folder") from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise WriteError(f"cannot write {path}: {error.strerror or error}; choose another output folder") from error
    try:
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        yield lambda: None
    finally:
        path.unlink(missing_ok=True)
        lock.release()


@contextlib.contextmanager
def _leased(path: S3Path, folder: Path, wait: bool) -> Iterator[Lease]:
    lease = Lease(path)
    try:
        while (state := lease.take()) != MINE:
            if state == HELD and not wait:
                raise _busy(lease.holder, folder)
            time.sleep(_POLL_S)
        yield lease
    finally:
        lease.close()


def _busy(who: str, folder: Path) -> WriteError:
    return WriteError(f"{who} is working on {folder}: wait until it has ended, or end it; then rerun the same command")
