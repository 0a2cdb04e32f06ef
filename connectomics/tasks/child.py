"""A process that does blocks for the process that started it, and ends with it.

`connectomics.tasks.supervise.Child` starts it with one end of a socket. It receives a `Job` (close the open worker, if
any, and open this one), a list of block numbers, or None (close the worker). It sends `Opened` for a job; and for a
list the number of each block with None (it is written) or its error, and None once the list has ended.
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
        token: identifies the job. task: pickled `BlockTask`.
        device: torch device; for ``cuda`` the process takes one of the GPUs.
        folder: of the task. path: module search path of the leading process.
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
    """The worker is open, or ``error`` says why it cannot be opened."""

    error: Exception | None = None


def main(handle: int, number: int) -> None:
    """Work for the process at the other end of the socket ``handle``, as its worker ``number``, until that ends."""
    import queue
    import signal
    import threading
    from multiprocessing.connection import Connection

    from connectomics.tasks.memory import use_one_heap

    use_one_heap()  # before there are threads: each keeps the heap that it has
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the leader handles Ctrl-C: it ends this process
    connection = Connection(handle)
    inbox: SimpleQueue[Job | list[int] | None] = queue.SimpleQueue()

    def listen() -> None:
        """Receive orders, also while a block is being done; end this process at once when the leader is gone."""
        try:
            while True:
                inbox.put(connection.recv())
        except (EOFError, OSError):
            os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
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


def _open(job: Job, number: int, held: ExitStack, connection: Connection) -> Worker | None:
    from connectomics.errors import EngineError
    from connectomics.tasks.pool import device_of, one_line

    sys.path += [entry for entry in job.path if entry not in sys.path]
    try:
        task = pickle.loads(job.task)
        worker: Worker = held.enter_context(task.open_worker(job.stage, device_of(job.device, number)))
    except Exception as error:  # sent to the leader, which raises it
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # an error that cannot be pickled
            error = EngineError(one_line(error))
        connection.send(Opened(error))
        return None
    connection.send(Opened())
    return worker


def _work(worker: Worker, blocks: list[int], connection: Connection) -> None:
    from connectomics.errors import ConnectomicsError
    from connectomics.tasks.pool import SYSTEMATIC, one_line, outcomes

    for number, error in outcomes(worker, blocks):
        if error is not None and not isinstance(error, SYSTEMATIC):
            error = ConnectomicsError(one_line(error))  # others may not be picklable
        connection.send((number, error))
        if isinstance(error, SYSTEMATIC):
            return
    connection.send(None)
