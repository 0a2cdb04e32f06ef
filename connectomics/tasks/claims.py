"""Several processes on one task, without one that leads them: each claims blocks, as the jobs of a job array do.

Block n is claimed by a lock on byte n of a file beside the done-map. The kernel (or the file server) holds the lock, so
it ends with its process, and nobody has to decide when a dead job's blocks are free. It works between machines if the
file system passes POSIX locks on (NFS, GPFS, Lustre mounted with ``flock``). On S3 a claim is an object, which counts
as long as the lease of the process that made it (`connectomics.tasks.lease`).
"""

from __future__ import annotations

import errno
import fcntl
import os
import random
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from connectomics.errors import EngineError, WriteError
from connectomics.io import s3
from connectomics.io.location import DEFAULT_OPTIONS, split_s3
from connectomics.io.place import S3Path
from connectomics.progress import Progress
from connectomics.tasks.block_task import BlockTask
from connectomics.tasks.blocks import DoneMap, done_file, remove_traces
from connectomics.tasks.failures import Failures
from connectomics.tasks.lease import FREE, HELD, Lease, Watch, has_conditions
from connectomics.tasks.lock import leading
from connectomics.tasks.pool import Engine, Pool
from connectomics.tasks.runner import Marker, Queue, Reporter, run_stage

_POLL_S = 1.0  # between two looks at what the others have done
_LOOKS = 16  # claims of others that are looked at at a time: whether their processes are alive
_BUSY = (errno.EACCES, errno.EAGAIN)


class Claims(ABC):
    """The blocks of one stage that this process works on."""

    def __init__(self, done: DoneMap) -> None:
        self._done, self._mine = done, set[int]()

    def take(self, blocks: Iterable[int]) -> list[int]:
        """Claim blocks and return those that nobody else works on and that are not done.

        Raises `EngineError` if the file system has no locks.
        """
        wanted = list(blocks)
        locked = set(self._lock([number for number in wanted if number not in self._mine]))
        got = [number for number in wanted if number in self._mine or number in locked]
        if not got:
            return []
        self._mine.update(got)
        self._done.reload()  # another process may have finished one before it let it go
        left = set(self._done.missing[np.isin(self._done.missing, got)].tolist())
        self.release(set(got) - left)
        return [number for number in got if number in left]

    def release(self, blocks: Iterable[int]) -> None:
        """Let blocks go; those that are done must be marked before."""
        ours = self._mine & set(blocks)
        self._unlock(ours)
        self._mine -= ours

    def any_free(self, blocks: Sequence[int]) -> bool:
        """Return whether one of these blocks could be claimed; it is ours then."""
        return any(self.take([number]) for number in blocks)

    @abstractmethod
    def close(self) -> None:
        """Let all blocks go."""

    @abstractmethod
    def _lock(self, blocks: Sequence[int]) -> Iterable[int]:
        """Claim blocks; return those that nobody else has."""

    @abstractmethod
    def _unlock(self, blocks: Collection[int]) -> None: ...


class _FileClaims(Claims):
    """A file of locks, one byte per block."""

    def __init__(self, path: Path, done: DoneMap) -> None:
        super().__init__(done)
        self._file = path.open("a+b")

    def close(self) -> None:
        self._file.close()

    def _unlock(self, blocks: Collection[int]) -> None:
        for number in blocks:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, number)

    def _lock(self, blocks: Sequence[int]) -> list[int]:
        return [number for number in blocks if self._is_locked(number)]

    def _is_locked(self, number: int) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
        except OSError as error:
            if error.errno in _BUSY:
                return False
            raise EngineError(
                f"cannot lock {self._file.name} ({error.strerror}); engine.share needs a file system with locks: write "
                "to another one, or use one process with engine.workers"
            ) from error
        return True


class _ObjectClaims(Claims):
    """An object per claimed block, ``{path}-{block}``, that names the lease of its process, ``{path}-by-{token}``."""

    def __init__(self, path: S3Path, done: DoneMap) -> None:
        super().__init__(done)
        token = uuid.uuid4().hex
        self._path, self._owner, self._lease = path, token.encode(), Lease(_owned(path, token))
        self._others: dict[bytes, Watch] = {}
        self._lease.take()
        if not has_conditions(path):
            self._lease.close()
            raise EngineError(
                f"{path.parent}: engine.share needs a store with conditional writes (If-None-Match), which this one "
                "ignores; use one process with engine.workers"
            )

    def any_free(self, blocks: Sequence[int]) -> bool:
        names = {path.name for path in self._path.parent.glob(f"{self._path.name}-*")}
        free = [number for number in blocks if self._at(number).name not in names]
        taken = [number for number in blocks if self._at(number).name in names]
        return super().any_free([*free[:_LOOKS], *random.sample(taken, min(_LOOKS, len(taken)))])

    def close(self) -> None:
        try:
            self.release(self._mine)
        finally:
            self._lease.close()

    def _at(self, number: int) -> S3Path:
        return S3Path(f"{self._path}-{number}")

    def _unlock(self, blocks: Collection[int]) -> None:
        bucket, _ = split_s3(self._path)
        s3.delete(bucket, [split_s3(self._at(number))[1] for number in blocks], DEFAULT_OPTIONS)

    def _lock(self, blocks: Sequence[int]) -> list[int]:
        return [number for number, ours in zip(blocks, s3.in_parallel(self._claim, blocks), strict=True) if ours]

    def _claim(self, number: int) -> bool:
        path = self._at(number)
        if path.put(self._owner, match=""):
            return True
        found = path.read_tagged()
        if found is None:
            return False  # just let go; the next look gets it
        owner, tag = found
        if owner == self._owner:
            return True
        watch = self._others.setdefault(owner, Watch(_owned(self._path, owner.decode(errors="replace"))))
        return watch.look()[0] == FREE and path.put(self._owner, match=tag) is not None


def _owned(path: S3Path, token: str) -> S3Path:
    return S3Path(f"{path}-by-{token}")


def open_claims(path: Path, done: DoneMap) -> Claims:
    """Return the claims of this process on the blocks of a done-map, kept in (on S3: beside) ``path``."""
    return _ObjectClaims(path, done) if isinstance(path, S3Path) else _FileClaims(path, done)


class _SharedQueue(Queue):
    """Hands out missing blocks that nobody else works on, from a random one on: jobs begin at different ones."""

    def __init__(self, missing: NDArray[np.int64], run: int, pool: Pool, claims: Claims) -> None:
        start = random.randrange(len(missing))
        super().__init__(missing[start:], run, pool)
        self._later, self._claims = missing[:start], claims

    def take(self) -> list[int]:
        while True:
            blocks = super().take()
            if not blocks and len(self._later):
                self._missing, self._next, self._later = self._later, 0, self._later[:0]
            elif not blocks or (blocks := self._claims.take(blocks)):
                return blocks


def run_shared(task: BlockTask, engine: Engine, progress: Progress | None, *, overwrite: bool) -> bool:
    """Do blocks of a task beside other processes that run the same; return when the task is complete.

    Stages are prepared, and the task is finished, by one process at a time. Arguments and errors are those of
    `connectomics.tasks.run_task`; ``overwrite`` replaces output of another task only, since a process that starts later
    must keep what the others wrote.
    """
    while True:
        with leading(task.folder, wait=True):
            overwrite = task.starts_over(overwrite=overwrite, resume=True)
            if not task.check(overwrite=overwrite):
                return False
            task.claim(overwrite=overwrite)
        for stage in task.stages:
            with leading(task.folder, wait=True):
                if not task.check():
                    return True
                task.prepare(stage)
                done = DoneMap.of(task, stage)
                # while nobody can finish the task and move its folder
                claims = open_claims(done_file(task.folder, f"{stage}.claims"), done) if len(done.missing) else None
            reporter = Reporter(stage, done, progress)
            if claims is None:
                reporter.report(now=True)
                continue
            try:
                _run_stage_shared(task, stage, engine, done, claims, reporter)
            finally:
                claims.close()
        with leading(task.folder, wait=True) as require_lead:
            if not task.check():
                return True
            if all(done_file(task.folder, stage).exists() for stage in task.stages):
                require_lead()
                remove_traces(task.folder)
                task.finish()
                return True
        overwrite = False  # another process starts over, or was killed after it had removed the done-maps


def _run_stage_shared(
    task: BlockTask, stage: str, engine: Engine, done: DoneMap, claims: Claims, reporter: Reporter
) -> None:
    failures = Failures(task, stage, len(done), engine.attempts, ())
    reporter.report(now=True)
    while len(missing := np.setdiff1d(done.missing, failures.given_up)):
        if claims.any_free(missing.tolist()):  # else a network would be loaded for nothing
            with engine.pool(task, stage) as pool:
                queue = _SharedQueue(missing, task.run_length(stage), pool, claims)
                marker = Marker(done, os.fspath(task.folder), claims.release)
                run_stage(task, stage, pool, queue, marker, failures, reporter)
        else:  # others do the rest; if one of them dies, its blocks are free
            time.sleep(_POLL_S)
        done.reload()
        reporter.report(now=True)
    failures.close()


def refuse_if_shared(task: BlockTask) -> None:
    """Raise `WriteError` if processes with ``engine.share`` work on the task."""
    for stage in task.stages:
        path = done_file(task.folder, f"{stage}.claims")
        if _is_shared_on_s3(path) if isinstance(path, S3Path) else _is_shared(path):
            raise WriteError(
                f"other processes share the work on {task.folder}: wait until they have ended, or join them with "
                "engine.share=true"
            )


def _is_shared(path: Path) -> bool:
    if not path.exists():
        return False
    with path.open("a+b") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno in _BUSY
    return False


def _is_shared_on_s3(path: S3Path) -> bool:
    """Whether a process with a lease is alive; looks for as long as a lease may be silent."""
    watches = [Watch(found) for found in path.parent.glob(f"{path.name}-by-*")]
    while watches:
        states = [watch.look()[0] for watch in watches]
        if HELD in states:
            return True
        watches = [watch for watch, state in zip(watches, states, strict=True) if state != FREE]
        time.sleep(_POLL_S if watches else 0)
    return False
