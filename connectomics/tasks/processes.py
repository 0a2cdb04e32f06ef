"""The engine of processes of this machine."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from multiprocessing.connection import wait
from types import TracebackType

from connectomics.config.schema import EngineConfig
from connectomics.tasks.block_task import BlockTask
from connectomics.tasks.child import Job
from connectomics.tasks.pool import Batch, Engine, Pool
from connectomics.tasks.supervise import TICK_S, Child, make_job


class Processes(Engine):
    """Up to ``workers`` processes, started when there is something for them to do and kept from stage to stage."""

    def __init__(self, config: EngineConfig, workers: int, device: str) -> None:
        self._config, self._device, self.attempts = config, device, config.attempts
        self._children: list[Child | None] = [None] * workers

    def pool(self, task: BlockTask, stage: str) -> Pool:
        return _ProcessPool(self._children, make_job(task, stage, self._device, self._config))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, child in enumerate(self._children):
            if child is not None:
                child.end()
                self._children[number] = None


class _ProcessPool(Pool):
    def __init__(self, children: list[Child | None], job: Job) -> None:
        self._children, self._job = children, job
        self._busy: dict[int, Child] = {}
        self._waiting: deque[Sequence[int]] = deque()
        self._threads = max(1, (os.cpu_count() or 1) // len(children))

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
                    self._hand_out()  # before the leader looks at what came: it may take its time
                return batch
            wait([child.connection for child in self._busy.values()], TICK_S)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for busy in self._busy.values():
            busy.end()
        for child in self._children:
            if child is not None and child.alive:
                child.rest()

    def _hand_out(self) -> None:
        """Give what waits to processes that have nothing to do; those that died are replaced."""
        for number in range(len(self._children)):
            if not self._waiting:
                return
            if number in self._busy:
                continue
            child = self._children[number]
            if child is not None and not child.alive:
                child.end()
                child = None
            if child is None:
                child = self._children[number] = Child(number, self._threads)
            child.give(self._job, self._waiting.popleft())
            self._busy[number] = child
