"""A process that works on blocks for the one that started it, and ends when that one does.

Started by `connectomics.tasks.supervise.Child` with one end of a socket. What comes in: `Job` (close the worker that
is open, if any, and open this one's), a list of block numbers, or None (close the worker). What goes out, in the order
in which it happens, are the messages below.
"""

from __future__ import annotations

import os
import pickle
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from queue import SimpleQueue

    from connectomics.tasks.block_task import Worker


@dataclass(frozen=True)
class Job:
    """What a worker is opened for.

    Attributes:
        token: tells jobs apart. task: pickled `BlockTask`.
        device: torch device; for ``cuda`` the process takes one of the GPUs.
        folder: of the task. path: where the leading process looks for modules.
        timeout_s, memory_bytes: limits of a process for a block; None: no limit.
    """

    token: str
    task: bytes
    stage: str
    device: str
    folder: str
    path: tuple[str, ...]
    timeout_s: float | None = None
    memory_bytes: float | None = None


@dataclass(frozen=True)
class Opened:
    """The worker is there; or ``error`` says why it cannot be."""

    error: Exception | None = None


@dataclass(frozen=True)
class Told:
    """A block is written, or failed with ``why``; ``stop``: none of the others can be done."""

    number: int
    why: str = ""
    stop: Exception | None = None


@dataclass(frozen=True)
class Ended:
    """All blocks of the list have been told."""


def main(handle: int, number: int) -> None:
    """Work for the process at the other end of the socket ``handle``, as its worker ``number``, until that ends."""
    import queue
    import signal
    import threading
    from multiprocessing.connection import Connection

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the leader's: it ends this process
    connection = Connection(handle)
    inbox: SimpleQueue[Job | list[int] | None] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, inbox), daemon=True).start()
    with ExitStack() as held:
        worker: Worker | None = None
        while True:
            order = inbox.get()
            if isinstance(order, list):
                assert worker is not None  # blocks follow a job
                _work(worker, order, connection)
                continue
            worker = None
            held.close()
            if order is not None:
                worker = _open(order, number, held, connection)


def _listen(connection: Connection, inbox: SimpleQueue[Job | list[int] | None]) -> None:
    """Take in what is ordered, also while a block is worked on; a leader that is gone ends this process at once."""
    try:
        while True:
            inbox.put(connection.recv())
    except (EOFError, OSError):
        os._exit(0)


def _open(job: Job, number: int, held: ExitStack, connection: Connection) -> Worker | None:
    from connectomics.errors import EngineError
    from connectomics.tasks.pool import device_of, one_line

    sys.path += [entry for entry in job.path if entry not in sys.path]
    try:
        task = pickle.loads(job.task)
        worker: Worker = held.enter_context(task.open_worker(job.stage, device_of(job.device, number)))
    except Exception as error:  # told to the leader, who raises it
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # an error that does not travel
            error = EngineError(one_line(error))
        connection.send(Opened(error))
        return None
    connection.send(Opened())
    return worker


def _work(worker: Worker, blocks: list[int], connection: Connection) -> None:
    from connectomics.tasks.pool import SYSTEMATIC, one_line, outcomes

    for number, error in outcomes(worker, blocks):
        if error is None:
            connection.send(Told(number))
        elif isinstance(error, SYSTEMATIC):
            connection.send(Told(number, stop=error))
            return
        else:
            connection.send(Told(number, one_line(error)))
    connection.send(Ended())
