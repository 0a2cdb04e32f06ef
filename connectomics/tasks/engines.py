"""From the configuration's ``engine`` group to workers: this process, processes of this machine, or Dask."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Any

from connectomics.errors import ConfigError
from connectomics.machine import usable_cores
from connectomics.tasks.block_task import BlockTask
from connectomics.tasks.child import Job
from connectomics.tasks.pool import Batch, Engine, Pool, batches, device_of, gpu_count
from connectomics.tasks.supervise import TICK_S, Child, make_job

if TYPE_CHECKING:
    from connectomics.config.schema import EngineConfig


def open_engine(config: EngineConfig | None = None, device: str = "cpu") -> Engine:
    """Return the workers of a configuration; a context manager, to be kept over all tasks of a command.

    Args:
        config: None: this process.
        device: of the workers: ``cpu``, ``cuda`` (each process one of the GPUs, in turn) or ``cuda:N``.

    Raises:
        EngineError: a scheduler does not answer, a library is not installed, or a queue takes no job.
    """
    from connectomics.config import RunConfig

    chosen = RunConfig().engine if config is None else config
    if chosen.name == "dask" and chosen.share:
        raise ConfigError("engine.share needs engine.name=local: the jobs of a job array have no scheduler")
    if chosen.name == "dask":
        from connectomics.tasks.cluster import DaskEngine

        return DaskEngine(chosen, device)
    workers = number_of_workers(chosen, device)
    limited = chosen.block_timeout_s is not None or chosen.memory_gb is not None
    here = workers == 1 and not limited  # limits can only be enforced on another process
    engine = Here(chosen, device) if here else Processes(chosen, workers, device)
    engine.share = chosen.share
    return engine


def number_of_workers(config: EngineConfig, device: str) -> int:
    """Return ``engine.workers``, or if it is 0, one worker per GPU."""
    return config.workers or (max(1, gpu_count()) if device == "cuda" else 1)


class Here(Engine):
    """The engine that is this process."""

    def __init__(self, config: EngineConfig, device: str) -> None:
        self._device, self.attempts = device, config.attempts

    def pool(self, task: BlockTask, stage: str) -> Pool:
        return _HerePool(task, stage, device_of(self._device, 0))


class _HerePool(Pool):
    slots = 1

    def __init__(self, task: BlockTask, stage: str, device: str) -> None:
        self._stack = ExitStack()
        self._worker = self._stack.enter_context(task.open_worker(stage, device))
        self._waiting: list[Sequence[int]] = []
        self._running: Iterator[Batch] | None = None

    def submit(self, blocks: Sequence[int]) -> None:
        self._waiting.append(blocks)

    def next(self) -> Batch:
        if self._running is None:
            self._running = batches(self._worker, self._waiting.pop(0))
        batch = next(self._running)
        if batch.ended:
            self._running = None
        return batch

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)


class Processes(Engine):
    """Up to ``workers`` processes, started when there is work for them and kept from stage to stage."""

    def __init__(self, config: EngineConfig, workers: int, device: str) -> None:
        self._config, self._device, self.attempts = config, device, config.attempts
        self._children: list[Child | None] = [None] * workers

    def pool(self, task: BlockTask, stage: str) -> Pool:
        return _ProcessPool(self._children, make_job(task, stage, self._device, self._config))

    def __exit__(self, *error: Any) -> None:
        for number, child in enumerate(self._children):
            if child is not None:
                child.end()
                self._children[number] = None


class _ProcessPool(Pool):
    def __init__(self, children: list[Child | None], job: Job) -> None:
        self._children, self._job = children, job
        self._busy: dict[int, Child] = {}
        self._waiting: deque[Sequence[int]] = deque()
        self._threads = max(1, usable_cores() // len(children))

    @property
    def slots(self) -> int:
        return len(self._children)

    def submit(self, blocks: Sequence[int]) -> None:
        self._waiting.append(blocks)
        self._hand_out()

    def next(self) -> Batch:
        while True:
            for number, child in self._busy.items():
                batch = child.step()
                if batch is None:
                    continue
                if batch.ended:
                    del self._busy[number]
                    self._hand_out()  # before the leader looks at the batch, which may take time
                return batch
            wait([child.connection for child in self._busy.values()], TICK_S)

    def __exit__(self, *error: Any) -> None:
        for busy in self._busy.values():
            busy.end()
        for child in self._children:
            if child is not None and child.alive:
                child.rest()

    def _hand_out(self) -> None:
        """Give waiting blocks to idle processes; replace those that died."""
        for number, child in enumerate(self._children):
            if not self._waiting:
                return
            if number in self._busy:
                continue
            if child is not None and not child.alive:
                child.end()
            if child is None or not child.alive:
                child = self._children[number] = Child(number, self._threads)
            child.give(self._job, self._waiting.popleft())
            self._busy[number] = child
