"""What a run asks of the processes that work on a stage, whatever the engine."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from connectomics.errors import ConnectomicsError, EngineError, OutOfMemoryError, WriteError
from connectomics.io.store import StoreError
from connectomics.tasks.block_task import BlockTask, Worker
from connectomics.tasks.memory import is_out_of_memory

#: Errors of a block that the next block would meet too: of the disk, of the store, of memory.
SYSTEMATIC = (WriteError, StoreError, OutOfMemoryError)

REPORT_S = 1.0  # seconds between two reports of what is done


@dataclass(frozen=True)
class Batch:
    """What became of blocks that went to a worker, since the last report.

    Attributes:
        done: numbers of the blocks whose output is written. It survives the worker's death; the leading process
            (on another machine: that machine) still has to wait until it is on disk.
        failed: number -> one line that says why.
        untouched: blocks that were not tried, because the worker ended before (its process died, or hung).
        seconds: that the worker took for them.
        stop: why no further block can be done (the disk is full, the raw or the model is missing), or None.
        stopped: the block at which that happened, or None.
        unopened: why the worker could not start, though another one may ("its worker died"), or "".
        ended: whether this is the last report: each block is now in one of the first three.
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
    """Workers for one stage of one task; a context manager. Blocks are submitted in batches."""

    @property
    @abstractmethod
    def slots(self) -> int:
        """How many batches can run at once."""

    @abstractmethod
    def submit(self, blocks: Sequence[int]) -> None:
        """Make a worker do these blocks, in order."""

    @abstractmethod
    def next(self) -> Batch:
        """Wait for the next report on any of the submitted batches."""

    def __enter__(self) -> Self:
        return self

    @abstractmethod
    def __exit__(self, *error: Any) -> None: ...


class Engine(ABC):
    """Processes that wait for work: a context manager that gives a `Pool` for each stage."""

    #: how often a block is tried
    attempts: int
    #: whether other processes do blocks of the same tasks (`connectomics.tasks.claims`)
    share: bool = False

    @abstractmethod
    def pool(self, task: BlockTask, stage: str) -> Pool:
        """Return the workers for a stage; one pool at a time."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:  # noqa: B027 (this process has nothing to end)
        """End the processes."""


class Tally:
    """What has become of the blocks that a worker was given, since the last report."""

    def __init__(self, blocks: Sequence[int] = ()) -> None:
        self.left = list(blocks)
        self._done: list[int] = []
        self._failed: dict[int, str] = {}
        self._since = time.monotonic()

    def add(self, number: int, error: Exception | None) -> Batch | None:
        """Add a block that is written or failed; return the last report if its error is `SYSTEMATIC`."""
        self.left.remove(number)  # the first, or nearly
        if isinstance(error, SYSTEMATIC):
            return self.report(stop=error, stopped=number)
        if error is None:
            self._done.append(number)
        else:
            self._failed[number] = one_line(error)
        return None

    @property
    def is_due(self) -> bool:
        """Whether it is time to report what is new, before the last block ends."""
        return bool(self._done or self._failed) and time.monotonic() - self._since >= REPORT_S

    def report(self, *, ended: bool = True, **more: Any) -> Batch:
        """Return what is new; ``more``: other fields of `Batch`."""
        now, left = time.monotonic(), tuple(self.left) if ended else ()
        batch = Batch(tuple(self._done), self._failed, left, now - self._since, ended=ended, **more)
        self._done, self._failed, self._since = [], {}, now
        return batch


def batches(worker: Worker, blocks: Sequence[int]) -> Iterator[Batch]:
    """Do ``blocks`` and report every `REPORT_S` and at the end."""
    tally = Tally(blocks)
    for number, error in outcomes(worker, blocks):
        if (last := tally.add(number, error)) is not None:
            yield last
            return
        if tally.left and tally.is_due:
            yield tally.report(ended=False)
    yield tally.report()


def outcomes(worker: Worker, blocks: Sequence[int]) -> Iterator[tuple[int, Exception | None]]:
    """Do ``blocks`` and yield each with None once written, or with its error; a `SYSTEMATIC` error is the last."""
    todo = list(blocks)
    while todo:
        finished = 0
        try:
            for number in worker.run(todo):
                finished += 1
                yield number, None
            return
        except Exception as error:  # whatever the error, the other blocks are done
            if finished == len(todo):
                raise
            told = error
            if is_out_of_memory(error) and not isinstance(error, OutOfMemoryError):
                told = OutOfMemoryError(
                    f"out of memory ({one_line(error)}); use fewer workers, or a machine with more memory"
                )
            yield todo[finished], told
            if isinstance(told, SYSTEMATIC):
                return
        del todo[: finished + 1]


def one_line(error: BaseException) -> str:
    """Return an error's message in one line, with its type if the error is not ours."""
    text = " ".join(str(error).split())
    return text if isinstance(error, ConnectomicsError) else f"{type(error).__name__}: {text}"


def device_of(device: str, number: int) -> str:
    """Return the torch device of the worker ``number`` (from 0): for ``cuda`` one of the visible GPUs, in turn."""
    if device != "cuda":
        return device
    gpus = gpu_count()
    if gpus == 0:
        raise EngineError(
            "device is cuda, but no GPU is visible here; set --device cpu, or request a GPU from the queue"
        )
    return f"cuda:{number % gpus}"


def gpu_count() -> int:
    """Return how many GPUs this process sees."""
    import torch

    return torch.cuda.device_count()
