"""Leading a task through its stages: which blocks go to whom, what is done, what failed."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable
from contextlib import ExitStack

import numpy as np

from connectomics.config.schema import EngineConfig
from connectomics.errors import EngineError
from connectomics.tasks.block_task import BlockTask
from connectomics.tasks.done import DoneMap, sync
from connectomics.tasks.engine import open_engine
from connectomics.tasks.failures import Failures
from connectomics.tasks.lock import leading
from connectomics.tasks.pool import Batch, Engine, Pool

#: Told the stage, and how many of its blocks are done and how many there are.
Progress = Callable[[str, int, int], None]

_SECONDS = 1.0  # a batch should take about so long: then handing it over costs nothing
_MOST = 256  # blocks in a batch
_RECENT = 8  # batches whose slowest says how long a block takes
_MARK_S = 1.0  # finished blocks are marked so often,
_MARK_SHARE = 0.05  # unless waiting for the disk took more than this share of the time
_TELL_S = 0.2  # between two calls of the progress


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
    """Do what is still missing of a task. Returns whether anything was.

    Args:
        engine: who works: one that is open (`open_engine`; for several tasks), or its configuration; None: this
            process.
        progress: called at the start and the end of every stage and some times a second in between.
        device: of the workers of an engine that is opened here: ``cpu``, ``cuda`` (each process one of the GPUs) or
            ``cuda:N``.
        overwrite: begin anew where an output of another task (or a finished one) is there.
        resume: with ``overwrite``, keep what is there of this very task.
        accept: blocks that may fail, once: they are then stored as unknown (`BlockTask.accept`) rather than an error.

    Raises:
        WriteError: an output of another task is there, another process works on it, or nothing can be written (the disk
            is full).
        StoreError, OutOfMemoryError: of a block, which the next ones would meet as well.
        BlocksFailedError: blocks failed ``engine.attempts`` times; all others of the stage are done. Or the first
            blocks all failed, and the rest was not tried.
        InputError: ``accept`` names blocks that the task does not have.
        EngineError: no worker can be had.
        what `BlockTask.check`, `BlockTask.prepare`, `BlockTask.open_worker` and `BlockTask.finish` raise.
    """
    overwrite = task.begins_anew(overwrite=overwrite, resume=resume)
    if not task.check(overwrite=overwrite):
        return False
    with ExitStack() as stack:
        stack.enter_context(leading(task.folder))
        if not task.check(overwrite=overwrite):  # another process has finished it just now
            return False
        chosen = engine if isinstance(engine, Engine) else stack.enter_context(open_engine(engine, device))
        task.claim(overwrite=overwrite)
        for stage in task.stages:
            task.prepare(stage)
            done = DoneMap(task.folder / f".done-{stage}", task.blocks(stage), task.key)
            teller = _Teller(stage, done, progress)
            teller.tell(now=True)
            if done.count < len(done):
                failures = Failures(task, stage, len(done), chosen.attempts, accept)
                with chosen.pool(task, stage) as pool:
                    _run_stage(task, stage, pool, done, failures, teller)
        task.finish()
    return True


def _run_stage(task: BlockTask, stage: str, pool: Pool, done: DoneMap, failures: Failures, teller: _Teller) -> None:
    queue = _Queue(done.missing, task.run_length(stage), pool)
    marker = _Marker(done, os.fspath(task.folder))
    under_way = unopened = 0
    try:
        while True:
            while under_way < 2 * pool.slots and (blocks := queue.take()):
                pool.submit(blocks)
                under_way += 1
            if not under_way:
                break
            batch = pool.next()
            under_way -= batch.ended
            marker.add(batch.done)
            unopened = unopened + 1 if batch.unopened else 0
            if unopened == failures.attempts:
                raise EngineError(f"{task.name}, {stage}: no worker came to work, the last: {batch.unopened}")
            again, accepted = failures.take(batch)
            marker.add(accepted)
            for number in (*again, *batch.untouched):
                queue.again(number)
            queue.learn(batch)
            teller.tell(more=marker.waiting)
    finally:
        marker.mark()  # also what was done before an error or Ctrl-C
    teller.tell(now=True)
    failures.close()


class _Queue:
    """Blocks that are to be done, handed out by batches of a length that suits how long blocks take."""

    def __init__(self, missing: np.ndarray, run: int, pool: Pool) -> None:
        self._missing, self._next, self._run, self._pool = missing, 0, run, pool
        self._again: deque[int] = deque()
        self._seconds: deque[float] = deque(maxlen=_RECENT)  # that a block took, by batch
        self._length = 1  # of the longest batch that has come back

    def take(self) -> list[int]:
        """The next blocks; none when all are handed out. Blocks that failed go one by one, after the others."""
        left = len(self._missing) - self._next
        if left == 0:
            return [self._again.popleft()] if self._again else []
        # the slowest counts, and it grows step by step: blocks in empty space say little about those in tissue
        slowest = max(self._seconds, default=_SECONDS)
        length = min(_MOST, 2 * self._length, int(_SECONDS / max(slowest, 1e-6)))
        length = max(self._run, min(length, left // (4 * self._pool.slots)))  # shorter at the end: all finish together
        length = min(max(length, 1), left)
        if self._run > 1:  # not beyond the run that its first block is in
            first = int(self._missing[self._next])
            runs = max(1, length // self._run)
            end = (first // self._run + runs) * self._run
            length = int(np.searchsorted(self._missing[self._next : self._next + length], end))
        chosen = self._missing[self._next : self._next + length]
        self._next += length
        return [int(n) for n in chosen]

    def again(self, block: int) -> None:
        """Hand out this block once more."""
        self._again.append(block)

    def learn(self, batch: Batch) -> None:
        """From how long blocks took."""
        number = len(batch.done) + len(batch.failed)
        if number:
            self._seconds.append(batch.seconds / number)
            self._length = max(self._length, number)


class _Marker:
    """Marks finished blocks in the done-map once they are on disk: now and then, since waiting for the disk is slow."""

    def __init__(self, done: DoneMap, folder: str) -> None:
        self._done, self._folder = done, folder
        self._finished: list[int] = []
        self._next = time.monotonic() + _MARK_S

    @property
    def waiting(self) -> int:
        """Blocks that are finished but not marked."""
        return len(self._finished)

    def add(self, blocks: Iterable[int]) -> None:
        """These are finished."""
        self._finished += blocks
        if time.monotonic() >= self._next:
            self.mark()

    def mark(self) -> None:
        """Wait for the disk and mark all of them."""
        begin = time.monotonic()
        if self._finished:
            sync(self._folder)
            self._done.mark(self._finished)
            self._finished = []
        end = time.monotonic()
        self._next = end + max(_MARK_S, (end - begin) / _MARK_SHARE)


class _Teller:
    """Calls the progress, but not too often."""

    def __init__(self, stage: str, done: DoneMap, progress: Progress | None) -> None:
        self._stage, self._done, self._progress = stage, done, progress
        self._next = 0.0

    def tell(self, more: int = 0, now: bool = False) -> None:
        """How many blocks are done: those that are marked and ``more``."""
        if self._progress is not None and (now or time.monotonic() >= self._next):
            self._progress(self._stage, self._done.count + more, len(self._done))
            self._next = time.monotonic() + _TELL_S
