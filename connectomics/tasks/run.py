"""Leading a task through its stages: which blocks go to whom, what is done, what failed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np

from connectomics.config.schema import EngineConfig
from connectomics.errors import BlocksFailedError, WriteError
from connectomics.tasks.done import DoneMap
from connectomics.tasks.pool import Batch, Here, Pool
from connectomics.tasks.task import BlockTask

#: Told the stage, and how many of its blocks are done and how many there are.
Progress = Callable[[str, int, int], None]

_SECONDS = 1.0  # a batch should take about so long: then handing it over costs nothing
_MOST = 256  # blocks in a batch
_NAMED = 5  # failed blocks that the error names


def run_task(
    task: BlockTask,
    engine: EngineConfig | None = None,
    progress: Progress | None = None,
    *,
    device: str = "cpu",
    overwrite: bool = False,
) -> bool:
    """Do what is still missing of a task. Returns whether anything was.

    Args:
        engine: who works; None: this process.
        progress: called at the start of every stage and after every batch of its blocks.
        device: of the workers: ``cpu``, ``cuda`` (each process one of the GPUs) or ``cuda:N``.
        overwrite: begin anew where an output of another task (or a finished one) is there.

    Raises:
        WriteError: an output of another task is there, or nothing can be written (the disk is full).
        BlocksFailedError: blocks failed ``engine.attempts`` times; all others of the stage are done.
        what `BlockTask.check`, `BlockTask.prepare` and `BlockTask.finish` raise.
    """
    chosen = EngineConfig() if engine is None else engine
    if not task.check(overwrite=overwrite):
        return False
    task.claim(overwrite=overwrite)
    for stage in task.stages:
        task.prepare(stage)
        done = DoneMap(task.folder / f".done-{stage}", task.blocks(stage), task.key)
        if progress is not None:
            progress(stage, done.count, len(done))
        if done.count < len(done):
            with open_pool(chosen, task, stage, device) as pool:
                _run_stage(task, stage, pool, done, chosen.attempts, progress)
    task.finish()
    return True


def open_pool(engine: EngineConfig, task: BlockTask, stage: str, device: str) -> Pool:
    """The workers that a configuration asks for."""
    return Here(task, stage, device)


def _run_stage(
    task: BlockTask, stage: str, pool: Pool, done: DoneMap, attempts: int, progress: Progress | None
) -> None:
    queue = _Queue(done.missing, task.run_length(stage), pool.slots)
    tries: dict[int, int] = {}
    errors: dict[int, str] = {}
    under_way = 0
    while True:
        while under_way < 2 * pool.slots and (blocks := queue.take()):
            pool.submit(blocks)
            under_way += 1
        if not under_way:
            break
        batch = pool.next()
        under_way -= 1
        done.mark(batch.done)
        if batch.stop:
            raise WriteError(batch.stop)
        for number, why in batch.failed.items():
            tries[number] = tries.get(number, 0) + 1
            if tries[number] < attempts:
                queue.again(number)
            else:
                errors[number] = why
        for number in batch.untouched:
            queue.again(number)
        queue.learn(batch)
        if progress is not None and batch.done:
            progress(stage, done.count, len(done))
    if errors:
        raise _failed(task, stage, errors, len(done))


class _Queue:
    """Blocks that are to be done, handed out by batches of a length that suits how long blocks take."""

    def __init__(self, missing: np.ndarray, run: int, slots: int) -> None:
        self._missing, self._next, self._run, self._slots = missing, 0, run, slots
        self._again: deque[int] = deque()
        self._seconds: float | None = None  # that a block takes, by the latest batches

    def take(self) -> list[int]:
        """The next blocks; none when all are handed out. Blocks that failed go one by one, after the others."""
        left = len(self._missing) - self._next
        if left == 0:
            return [self._again.popleft()] if self._again else []
        length = self._run
        if self._seconds is not None:
            length = max(length, min(_MOST, int(_SECONDS / max(self._seconds, 1e-6))))
        length = min(length, max(self._run, left // (4 * self._slots)), left)
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
            self._seconds = batch.seconds / number


def _failed(task: BlockTask, stage: str, errors: dict[int, str], blocks: int) -> BlocksFailedError:
    named = "; ".join(f"block {n}: {errors[n]}" for n in sorted(errors)[:_NAMED])
    more = f"; and {len(errors) - _NAMED} more" if len(errors) > _NAMED else ""
    return BlocksFailedError(
        f"{task.name}, {stage}: {len(errors)} of {blocks} blocks failed ({named}{more}); "
        f"the others are done: mend what is wrong and run the same command again"
    )
