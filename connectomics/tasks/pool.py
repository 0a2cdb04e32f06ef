"""Processes that work on a stage: what the run asks of them, and the engine that needs no other process."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from connectomics.config.schema import EngineConfig
from connectomics.errors import ConnectomicsError, EngineError, OutOfMemoryError, WriteError
from connectomics.io.store import StoreError
from connectomics.tasks.block_task import BlockTask, Worker
from connectomics.tasks.memory import is_out_of_memory

#: Errors of a block that the next block would meet as well: of the disk, of the store, of memory.
SYSTEMATIC = (WriteError, StoreError, OutOfMemoryError)

REPORT_S = 1.0  # a pool tells what is done at least so often, if blocks are that fast


@dataclass(frozen=True)
class Batch:
    """What came of blocks that went to a worker, since that was last told.

    Attributes:
        done: numbers of the blocks whose output is written (and survives the worker's death; whether it is on disk
            is the leading process's to see to, and on another machine that machine's).
        failed: number -> one line that says why.
        untouched: blocks that were not tried, since the worker ended before (its process died, or hung).
        seconds: that the worker took for them.
        stop: why no further block can be done (the disk is full, the raw or the model is not there), or None.
        stopped: the block at which that came up, or None.
        unopened: why the worker did not come to work at all, though another may ("its worker died"), or "".
        ended: whether this is the last that is told of these blocks: each of them is in one of the three above.
    """

    done: tuple[int, ...] = ()
    failed: dict[int, str] = field(default_factory=dict)
    untouched: tuple[int, ...] = ()
    seconds: float = 0.0
    stop: Exception | None = None
    unopened: str = ""
    ended: bool = True
    stopped: int | None = None


class Pool(ABC):
    """Workers for one stage of one task; a context manager. Blocks go in by batches, in any number at a time."""

    @property
    @abstractmethod
    def slots(self) -> int:
        """How many batches can be worked on at once."""

    @abstractmethod
    def submit(self, blocks: Sequence[int]) -> None:
        """Have a worker do these blocks, in their order."""

    @abstractmethod
    def next(self) -> Batch:
        """Wait for what is to be told next of any of the batches that were submitted."""

    def __enter__(self) -> Self:
        return self

    @abstractmethod
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None: ...


class Engine(ABC):
    """Processes that wait for work: a context manager that gives a `Pool` for one stage after the other."""

    #: times that a block is tried
    attempts: int

    @abstractmethod
    def pool(self, task: BlockTask, stage: str) -> Pool:
        """Workers for a stage; one pool at a time."""

    def __enter__(self) -> Self:
        return self

    @abstractmethod
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None: ...


class Here(Engine):
    """The engine that is this process itself."""

    def __init__(self, config: EngineConfig, device: str) -> None:
        self._device, self.attempts = device, config.attempts

    def pool(self, task: BlockTask, stage: str) -> Pool:
        return _HerePool(task, stage, device_of(self._device, 0))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        pass


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
            self._running = _batches(self._worker, self._waiting.pop(0))
        batch = next(self._running)
        if batch.ended:
            self._running = None
        return batch

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, at)


def _batches(worker: Worker, blocks: Sequence[int]) -> Iterator[Batch]:
    """What comes of ``blocks``, told every `REPORT_S` and at their end."""
    begin = time.perf_counter()
    left, done, failed = list(blocks), list[int](), dict[int, str]()
    for number, error in outcomes(worker, blocks):
        left.remove(number)  # the first, or nearly
        if isinstance(error, SYSTEMATIC):
            yield Batch(tuple(done), failed, tuple(left), time.perf_counter() - begin, error, stopped=number)
            return
        if error is None:
            done.append(number)
        else:
            failed[number] = one_line(error)
        if left and (now := time.perf_counter()) - begin >= REPORT_S:
            yield Batch(tuple(done), failed, seconds=now - begin, ended=False)
            begin, done, failed = now, [], {}
    yield Batch(tuple(done), failed, tuple(left), time.perf_counter() - begin)


def outcomes(worker: Worker, blocks: Sequence[int]) -> Iterator[tuple[int, Exception | None]]:
    """Do ``blocks``: each comes with None once it is written, or with the error that it failed with; the others go on.

    An error that is `SYSTEMATIC` is the last.
    """
    todo = list(blocks)
    while todo:
        finished = 0
        try:
            for number in worker.run(todo):
                finished += 1
                yield number, None
            return
        except Exception as error:  # whatever a block dies of, the others are done
            if finished == len(todo):
                raise
            told = error
            if is_out_of_memory(error) and not isinstance(error, OutOfMemoryError):
                told = OutOfMemoryError(
                    f"out of memory ({one_line(error)}); use fewer workers at a time, or a machine with more memory"
                )
            yield todo[finished], told
            if isinstance(told, SYSTEMATIC):
                return
        del todo[: finished + 1]


def one_line(error: BaseException) -> str:
    """What an error says: its message where it is ours, else with its type."""
    text = " ".join(str(error).split())
    return text if isinstance(error, ConnectomicsError) else f"{type(error).__name__}: {text}"


def device_of(device: str, number: int) -> str:
    """The torch device of the worker ``number`` (from 0): for ``cuda`` one of the GPUs that this process sees, in turn;
    any other stays what it is."""
    if device != "cuda":
        return device
    gpus = gpu_count()
    if gpus == 0:
        raise EngineError("device is cuda but no GPU is to be seen here; give --device cpu, or ask the queue for a GPU")
    return f"cuda:{number % gpus}"


def gpu_count() -> int:
    """How many GPUs this process sees."""
    import torch

    return torch.cuda.device_count()
