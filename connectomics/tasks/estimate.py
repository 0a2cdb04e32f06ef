"""Estimate what tasks will take before they run: blocks, bytes, memory, and the measured time of one block."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import astuple, dataclass, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING

from connectomics.errors import ConnectomicsError
from connectomics.io.place import S3Path
from connectomics.tasks.block_task import BlockTask, Cost
from connectomics.tasks.blocks import DoneMap, done_file
from connectomics.tasks.engines import number_of_workers
from connectomics.tasks.supervise import Child, make_job

if TYPE_CHECKING:
    from connectomics.config.schema import EngineConfig

_TWICE_S = 10.0  # a faster block is timed again: the first run loads and compiles


@dataclass(frozen=True)
class StageEstimate:
    """A stage of one task, or of several together.

    Attributes:
        blocks: number of blocks; None: unknown until the earlier stages are done.
        left: blocks not done yet.
        cost: of the largest block, in bytes; None: unknown.
        seconds: of a worker per block; None: not timed.
        held: bytes that the worker held, including the model.
    """

    stage: str
    blocks: int | None
    left: int | None
    cost: Cost | None
    seconds: float | None = None
    held: int | None = None

    @property
    def read(self) -> int | None:
        """Bytes read for the blocks that are left, at most."""
        return None if self.cost is None or self.left is None else self.cost.read * self.left

    @property
    def written(self) -> int | None:
        """Bytes written for the blocks that are left, at most (uncompressed)."""
        return None if self.cost is None or self.left is None else self.cost.written * self.left

    @property
    def worker_seconds(self) -> float | None:
        """Seconds of one worker for the blocks that are left."""
        return None if self.seconds is None or self.left is None else self.seconds * self.left


@dataclass(frozen=True)
class Estimate:
    """What tasks will take with ``workers`` workers; None: as many as the scheduler has."""

    tasks: int
    stages: tuple[StageEstimate, ...]
    workers: int | None
    untimed: str = ""

    @property
    def worker_seconds(self) -> float | None:
        """Seconds of one worker for all timed stages; None if none was timed."""
        times = [stage.worker_seconds for stage in self.stages if stage.worker_seconds is not None]
        return sum(times) if times else None


def estimate(
    tasks: Sequence[BlockTask],
    engine: EngineConfig,
    device: str = "cpu",
    *,
    timed: bool = True,
    overwrite: bool = False,
    resume: bool = False,
) -> Estimate:
    """Estimate what is left to do of ``tasks`` and how long it will take.

    Blocks and bytes are summed over the tasks, stage by stage. To measure the time, the middle block of each stage of
    the largest task is done on this machine, in a hidden temporary folder near the output (`BlockTask.relocated`). A
    stage that cannot be prepared from one block of the stage before is not timed. Writes nothing else.

    Raises:
        what `BlockTask.check` raises; a block that fails is just not timed.
    """
    todo, stages = list[BlockTask](), dict[str, StageEstimate]()
    for task in tasks:
        again = task.starts_over(overwrite=overwrite, resume=resume)
        if not task.check(overwrite=again):
            continue
        todo.append(task)
        for stage in task.stages:
            mine = _stage(task, stage, again)
            stages[stage] = _added(stages[stage], mine) if stage in stages else mine
    untimed = ""
    if timed and todo:
        largest = max(todo, key=lambda task: _blocks(task, task.stages[0]) or 0)
        times, untimed = _time(largest, engine, device)
        for stage, (seconds, held) in times.items():
            stages[stage] = replace(stages[stage], seconds=seconds, held=held)
    workers = None if engine.address is not None else number_of_workers(engine, device)
    return Estimate(len(todo), tuple(stages.values()), workers, untimed)


def _stage(task: BlockTask, stage: str, overwrite: bool) -> StageEstimate:
    blocks = left = _blocks(task, stage)
    if blocks and not overwrite and done_file(task.folder, stage).exists():
        left = blocks - DoneMap.of(task, stage).count
    return StageEstimate(stage, blocks, left, task.cost(stage))


def _blocks(task: BlockTask, stage: str) -> int | None:
    """Return how many blocks a stage has, if known before it is prepared."""
    try:
        return task.blocks(stage)
    except (ConnectomicsError, OSError):
        return None


def _added(one: StageEstimate, other: StageEstimate) -> StageEstimate:
    most = None
    if one.cost is not None and other.cost is not None:
        most = Cost(*map(max, astuple(one.cost), astuple(other.cost)))
    return StageEstimate(one.stage, _sum(one.blocks, other.blocks), _sum(one.left, other.left), most)


def _sum(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else one + other


def _time(task: BlockTask, engine: EngineConfig, device: str) -> tuple[dict[str, tuple[float, int]], str]:
    """Return seconds and held bytes for a block of each stage that can be tried, and why the others cannot."""
    times, folder = dict[str, tuple[float, int]](), "?"
    beside: Path | None = None  # for S3 in the temporary folder of this machine, else on the disk of the output
    if not isinstance(task.folder, S3Path):
        beside = next(place for place in task.folder.absolute().parents if place.exists())
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix=".dry-run-", dir=beside))
            copy = task.relocated(Path(folder) / "output")
            if copy is None:
                return times, f"a task of kind {task.kind} cannot be tried"
            copy.claim()
            child = Child(0, None)
            try:
                for stage in copy.stages:
                    copy.prepare(stage)
                    times[stage] = _time_block(child, copy, stage, engine, device)
            finally:
                child.end()
        except (ConnectomicsError, OSError) as error:
            stage = next((s for s in task.stages if s not in times), task.stages[-1])
            why = "it needs all blocks of the stages before it" if f"cannot read {folder}" in str(error) else error
            return times, f"{stage} could not be tried alone: {why}"
    return times, ""


def _time_block(child: Child, task: BlockTask, stage: str, engine: EngineConfig, device: str) -> tuple[float, int]:
    job = make_job(task, stage, device, engine)
    middle = task.blocks(stage) // 2
    seconds, held = float("inf"), 0
    for _ in range(2):
        begin = time.perf_counter()
        child.give(job, [middle])
        batch, done, failed = None, False, dict[int, str]()
        while batch is None or not batch.ended:
            wait([child.connection], 0.02)
            held = max(held, child.held)
            if (batch := child.step()) is not None:  # it may report the block before the list ends
                done, failed = done or bool(batch.done), {**failed, **batch.failed}
        seconds = min(seconds, time.perf_counter() - begin)
        if batch.stop is not None:
            raise batch.stop
        if not done:
            raise ConnectomicsError(batch.unopened or f"block {middle}: {failed[middle]}")
        if seconds > _TWICE_S:
            break
    return seconds, held
