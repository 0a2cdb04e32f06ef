"""Several processes on one task, without one that leads them: each claims blocks, as the jobs of a job array do.

Block n is claimed by a lock on byte n of a file beside the done-map. The kernel (or the file server) holds the lock, so
it ends with its process, and nobody has to decide when a dead job's blocks are free. It works between machines if the
file system passes POSIX locks on (NFS, GPFS, Lustre mounted with ``flock``).
"""

from __future__ import annotations

import errno
import fcntl
import os
import random
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from connectomics.errors import EngineError, WriteError
from connectomics.progress import Progress
from connectomics.tasks.block_task import BlockTask
from connectomics.tasks.blocks import DoneMap, remove_traces
from connectomics.tasks.failures import Failures
from connectomics.tasks.lock import leading
from connectomics.tasks.pool import Engine, Pool
from connectomics.tasks.runner import Marker, Queue, Reporter, run_stage

_POLL_S = 1.0  # between two looks at what the others have done
_BUSY = (errno.EACCES, errno.EAGAIN)


class Claims:
    """The blocks of one stage that this process works on; a file of locks, one byte per block."""

    def __init__(self, path: Path, done: DoneMap) -> None:
        self._file, self._done, self._mine = path.open("a+b"), done, set[int]()

    def take(self, blocks: Iterable[int]) -> list[int]:
        """Claim blocks and return those that nobody else works on and that are not done.

        Raises `EngineError` if the file system has no locks.
        """
        got = [number for number in blocks if number in self._mine or self._lock(number)]
        if not got:
            return []
        self._mine.update(got)
        self._done.reload()  # another process may have finished one before it let it go
        left = set(self._done.missing[np.isin(self._done.missing, got)].tolist())
        self.release(set(got) - left)
        return [number for number in got if number in left]

    def release(self, blocks: Iterable[int]) -> None:
        """Let blocks go; those that are done must be marked before."""
        for number in self._mine & set(blocks):
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, number)
            self._mine.discard(number)

    def close(self) -> None:
        """Let all blocks go."""
        self._file.close()

    def _lock(self, number: int) -> bool:
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
            done = DoneMap(task.folder / f".done-{stage}", task.blocks(stage), task.key)
        claims = Claims(_claims_file(task.folder, stage), done)
        try:
            _run_stage_shared(task, stage, engine, done, claims, Reporter(stage, done, progress))
        finally:
            claims.close()
    with leading(task.folder, wait=True):
        if task.check():
            if not all((task.folder / f".done-{stage}").exists() for stage in task.stages):
                raise WriteError(f"{task.folder} was replaced by another process; rerun the same command")
            remove_traces(task.folder)
            task.finish()
    return True


def _run_stage_shared(
    task: BlockTask, stage: str, engine: Engine, done: DoneMap, claims: Claims, reporter: Reporter
) -> None:
    failures = Failures(task, stage, len(done), engine.attempts, ())
    reporter.report(now=True)
    while len(missing := np.setdiff1d(done.missing, failures.given_up)):
        if any(claims.take([int(number)]) for number in missing):  # else a network would be loaded for nothing
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
        path = _claims_file(task.folder, stage)
        if not path.exists():
            continue
        with path.open("a+b") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in _BUSY:
                    raise WriteError(
                        f"other processes share the work on {task.folder}: wait until they have ended, or join them "
                        "with engine.share=true"
                    ) from error


def _claims_file(folder: Path, stage: str) -> Path:
    return folder / f".done-{stage}.claims"
