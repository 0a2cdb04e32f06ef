"""Processes that work on a stage: what the run asks of them, and the one that needs no other process."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from connectomics.errors import ConnectomicsError, WriteError
from connectomics.tasks.task import BlockTask, Worker


@dataclass(frozen=True)
class Batch:
    """What came of some blocks that went to one worker.

    Attributes:
        done: numbers of the blocks whose output is on disk.
        failed: number -> one line that says why.
        untouched: blocks that were not tried, since the worker ended before (its process died, or hung).
        seconds: that the worker took.
        stop: why no further block can be done (the disk is full), or "".
    """

    done: tuple[int, ...] = ()
    failed: dict[int, str] = field(default_factory=dict)
    untouched: tuple[int, ...] = ()
    seconds: float = 0.0
    stop: str = ""


class Pool(ABC):
    """Workers for one stage of one task; a context manager. Blocks go in by batches, in any number at a time."""

    #: how many batches should be on their way, so that no worker waits
    slots: int

    @abstractmethod
    def submit(self, blocks: Sequence[int]) -> None:
        """Have a worker do these blocks, in their order."""

    @abstractmethod
    def next(self) -> Batch:
        """Wait for the next batch that has come to an end."""

    def __enter__(self) -> Self:
        return self

    @abstractmethod
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None: ...


class Here(Pool):
    """The pool of this process itself, one batch after the other."""

    slots = 1

    def __init__(self, task: BlockTask, stage: str, device: str) -> None:
        self._stack = ExitStack()
        self._worker = self._stack.enter_context(task.open_worker(stage, device))
        self._waiting: list[Sequence[int]] = []
        self._folder = os.fspath(task.folder)

    def submit(self, blocks: Sequence[int]) -> None:
        self._waiting.append(blocks)

    def next(self) -> Batch:
        return work(self._worker, self._waiting.pop(0), self._folder)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, at)


def work(worker: Worker, blocks: Sequence[int], folder: str) -> Batch:
    """Do ``blocks``, going on after one that fails, and see that what is written below ``folder`` reached the disk.

    An error that no further block can escape (nothing can be written) ends it: the rest is `Batch.untouched`.
    """
    import time

    begin = time.perf_counter()
    todo, done, failed, stop = list(blocks), list[int](), dict[int, str](), ""
    while todo and not stop:
        for number, error in _until_error(worker, todo):
            if error is None:
                done.append(number)
            elif isinstance(error, WriteError):
                stop = str(error)
            else:
                failed[number] = one_line(error)
        left = set(done) | set(failed)
        todo = [number for number in todo if number not in left]
    if done:
        sync(folder)
    return Batch(tuple(done), failed, tuple(todo), time.perf_counter() - begin, stop)


def _until_error(worker: Worker, blocks: Sequence[int]) -> Iterator[tuple[int, Exception | None]]:
    """The blocks that are done, each with None; where one fails its error ends it."""
    finished = 0
    try:
        for number in worker.run(blocks):
            finished += 1
            yield number, None
    except Exception as error:  # whatever a block dies of, the others are done
        yield blocks[finished], error


def one_line(error: BaseException) -> str:
    """What an error says: its message where it is ours, else with its type."""
    text = " ".join(str(error).split())
    return text if isinstance(error, ConnectomicsError) else f"{type(error).__name__}: {text}"


def sync(folder: str) -> None:
    """Wait until everything that this machine has written to the file system of ``folder`` is on its disk."""
    import ctypes

    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return  # nothing was written there
    try:
        syncfs = getattr(ctypes.CDLL(None, use_errno=True), "syncfs", None)  # Linux; elsewhere all file systems
        if syncfs is None or syncfs(handle) != 0:
            os.sync()
    finally:
        os.close(handle)
