"""Run a task: lead it through its stages, hand out blocks, and record what is done and what failed."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING

import numpy as np

from connectomics.errors import EngineError, InputError
from connectomics.progress import Progress
from connectomics.tasks.block_task import BlockTask
from connectomics.tasks.blocks import FAILED, DoneMap, remove_traces, sync
from connectomics.tasks.engines import open_engine
from connectomics.tasks.failures import Failures
from connectomics.tasks.lock import leading
from connectomics.tasks.pool import Batch, Engine, Pool

if TYPE_CHECKING:
    from connectomics.config.schema import EngineConfig

_SECONDS = 1.0  # a batch should take about this long: then handing it over costs nothing
_MOST = 256  # blocks in a batch
_RECENT = 8  # batches, the slowest of which estimates the time of a block
_MARK_S = 1.0  # finished blocks are marked this often,
_MARK_SHARE = 0.05  # unless waiting for the disk took more than this share of the time
_PROGRESS_S = 0.2  # between two calls of progress


def run_task(
    task: BlockTask,
    engine: Engine | EngineConfig | None = None,
    progress: Progress | None = None,
    *,
    device: str = "cpu",
    overwrite: bool = False,
    resume: bool = False,
    accept: Collection[int] = (),
) -> bool:
    """Do the missing blocks of a task. Returns whether any were missing.

    Args:
        task: what to do.
        engine: an open engine (`open_engine`; for several tasks), or its configuration; None: this process.
        progress: called with the blocks and the name of a stage: at its start, at its end, and in between.
        device: of the workers of an engine that is opened here: ``cpu``, ``cuda`` (each process one of the GPUs) or
            ``cuda:N``.
        overwrite: start over if there is an output of another task (or a finished one).
        resume: with ``overwrite``, keep existing output of this very task.
        accept: blocks that may fail: after one failure they are stored as unknown (`BlockTask.accept`).

    Raises:
        WriteError: there is an output of another task, another process works on it, or the disk is full.
        StoreError, OutOfMemoryError: from a block; the next blocks would fail in the same way.
        BlocksFailedError: blocks failed ``engine.attempts`` times; all others of the stage are done. Or the first
            blocks all failed, and the rest was not tried.
        InputError: ``accept`` names blocks that the task does not have.
        EngineError: no worker can start. what `BlockTask.check`, `BlockTask.prepare`, `BlockTask.open_worker` and
            `BlockTask.finish` raise.
    """
    from connectomics.tasks.claims import refuse_if_shared, run_shared  # which does stages as here

    if engine is not None and engine.share:
        if accept:
            raise InputError("--accept-failed: blocks are accepted by one process; leave engine.share out")
        with ExitStack() as stack:
            chosen = engine if isinstance(engine, Engine) else stack.enter_context(open_engine(engine, device))
            return run_shared(task, chosen, progress, overwrite=overwrite)
    overwrite = task.starts_over(overwrite=overwrite, resume=resume)
    if not task.check(overwrite=overwrite):
        return False
    with ExitStack() as stack:
        require_lead = stack.enter_context(leading(task.folder))
        refuse_if_shared(task)
        if not task.check(overwrite=overwrite):  # another process has just finished it
            return False
        chosen = engine if isinstance(engine, Engine) else stack.enter_context(open_engine(engine, device))
        task.claim(overwrite=overwrite)
        for stage in task.stages:
            task.prepare(stage)
            done = DoneMap.of(task, stage)
            reporter = Reporter(stage, done, progress)
            reporter.report(now=True)
            if done.count < len(done):
                failures = Failures(task, stage, len(done), chosen.attempts, accept)
                with chosen.pool(task, stage) as pool:
                    queue = Queue(done.missing, task.run_length(stage), pool)
                    run_stage(task, stage, pool, queue, Marker(done, os.fspath(task.folder)), failures, reporter)
                failures.close()
        require_lead()
        remove_traces(task.folder)
        task.finish()
    return True


def run_stage(
    task: BlockTask, stage: str, pool: Pool, queue: Queue, marker: Marker, failures: Failures, reporter: Reporter
) -> None:
    """Do the blocks of a queue; those that fail in every attempt are in ``failures``. Raises what stops the run."""
    running = unopened = 0
    try:
        while True:
            while running < 2 * pool.slots and (blocks := queue.take()):
                pool.submit(blocks)
                running += 1
            if not running:
                break
            batch = pool.next()
            running -= batch.ended
            marker.add(batch.done)
            unopened = unopened + 1 if batch.unopened else 0
            if unopened == failures.attempts:
                raise EngineError(f"{task.name}, {stage}: no worker could start; the last one: {batch.unopened}")
            again, accepted = failures.take(batch)
            marker.add(accepted)
            queue.again(*again, *batch.untouched)
            queue.learn(batch)
            reporter.report(more=len(marker.finished))
    finally:
        marker.mark(failures.given_up)  # also what was done before an error or Ctrl-C
    reporter.report(now=True)


class Queue:
    """Hands out missing blocks in batches whose length fits the time that blocks take."""

    def __init__(self, missing: np.ndarray, run: int, pool: Pool) -> None:
        self._missing, self._next, self._run, self._pool = missing, 0, run, pool
        self._again: deque[int] = deque()
        self._seconds: deque[float] = deque(maxlen=_RECENT)  # per block, by batch
        self._length = 1  # of the longest finished batch

    def take(self) -> list[int]:
        """Return the next blocks; none when all are handed out. Failed blocks go one by one, after the others."""
        left = len(self._missing) - self._next
        if left == 0:
            return [self._again.popleft()] if self._again else []
        # use the slowest, and grow step by step: blocks in empty space say little about blocks in tissue
        slowest = max(self._seconds, default=_SECONDS)
        length = min(_MOST, 2 * self._length, int(_SECONDS / max(slowest, 1e-6)))
        # shorter at the end, so that all workers finish together
        length = min(max(self._run, 1, min(length, left // (4 * self._pool.slots))), left)
        if self._run > 1:  # end with a run, counted from the run of the first block
            first = int(self._missing[self._next])
            runs = max(1, length // self._run)
            end = (first // self._run + runs) * self._run
            length = int(np.searchsorted(self._missing[self._next : self._next + length], end))
        chosen = self._missing[self._next : self._next + length]
        self._next += length
        return [int(n) for n in chosen]

    def again(self, *blocks: int) -> None:
        """Hand out these blocks again."""
        self._again += blocks

    def learn(self, batch: Batch) -> None:
        """Use the time that blocks took."""
        number = len(batch.done) + len(batch.failed)
        if number:
            self._seconds.append(batch.seconds / number)
            self._length = max(self._length, number)


class Marker:
    """Marks finished blocks in the done-map once they are on disk; not one by one, because waiting is slow."""

    def __init__(self, done: DoneMap, folder: str, release: Callable[[list[int]], None] | None = None) -> None:
        self._done, self._folder, self._release = done, folder, release
        self.finished: list[int] = []  # that are not marked yet
        self._next = time.monotonic() + _MARK_S

    def add(self, blocks: Iterable[int]) -> None:
        """Add finished blocks."""
        self.finished += blocks
        if time.monotonic() >= self._next:
            self.mark()

    def mark(self, failed: Collection[int] = ()) -> None:
        """Wait for the disk and mark all finished blocks, and those that have failed."""
        begin = time.monotonic()
        if self.finished:
            sync(self._folder)
            self._done.mark(self.finished)
            if self._release is not None:
                self._release(self.finished)
            self.finished = []
        self._done.mark(failed, FAILED)
        end = time.monotonic()
        self._next = end + max(_MARK_S, (end - begin) / _MARK_SHARE)


class Reporter:
    """Calls progress, but not too often."""

    def __init__(self, stage: str, done: DoneMap, progress: Progress | None) -> None:
        self._stage, self._done, self._progress = stage, done, progress
        self._next = 0.0

    def report(self, more: int = 0, now: bool = False) -> None:
        """Report how many blocks are done: the marked ones and ``more``."""
        if self._progress is not None and (now or time.monotonic() >= self._next):
            self._progress(self._done.count + more, len(self._done), self._stage)
            self._next = time.monotonic() + _PROGRESS_S
