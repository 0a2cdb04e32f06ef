"""A few processes that work off a list of tasks; one that dies, an error or an interrupt ends all of them."""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from connectomics.errors import ConnectomicsError

Task = TypeVar("Task")

BUSY = "busy"  # what a function returns for a task that it does not want to wait for now


class WorkerDiedError(ConnectomicsError, RuntimeError):
    """A process ended without a word."""


def run_in_processes(
    function: Callable[[Task, bool], object],
    tasks: Sequence[Task],
    processes: int,
    advance: Callable[[int, Task], None],
    *,
    what: str,
) -> None:
    """Call ``function(task, wait)`` for every task in processes of their own (forkserver), and wait for all.

    ``wait`` is False at first; a task for which the function returns `BUSY` is called again with True when the others
    are given out. ``advance`` is told how many are done and which was the last. An exception of a task is raised here.

    Raises:
        WorkerDiedError: a process was killed; ``what`` says in the message what it does.
    """
    context = multiprocessing.get_context("forkserver")
    todo: deque[tuple[int, bool]] = deque((number, False) for number in range(len(tasks)))
    workers: dict[Connection, Any] = {}
    at: dict[Connection, tuple[int, bool]] = {}
    done = 0
    try:
        for _ in range(min(processes, len(tasks))):
            ours, theirs = context.Pipe()
            worker = context.Process(target=_work, args=(function, theirs), daemon=True)
            worker.start()
            theirs.close()
            workers[ours] = worker
        idle = list(workers)
        while done < len(tasks):
            while todo and idle:
                connection = idle.pop()
                number, may_wait = at[connection] = todo.popleft()
                connection.send((tasks[number], may_wait))
            for ready in wait(list(at)):
                assert isinstance(ready, Connection)
                number, _ = at.pop(ready)
                try:
                    error, result = ready.recv()
                except EOFError as gone:
                    workers[ready].join()
                    raise WorkerDiedError(
                        f"a process that {what} was killed (exit status {workers[ready].exitcode}), often for want of "
                        "memory; run again with fewer processes (data.num_workers)"
                    ) from gone
                if error is not None:
                    raise error
                idle.append(ready)
                if result == BUSY:
                    todo.append((number, True))
                else:
                    done += 1
                    advance(done, tasks[number])
    finally:
        for connection, worker in workers.items():
            connection.close()
            if connection in at or done < len(tasks):
                worker.terminate()
        for worker in workers.values():
            worker.join()


def _work(function: Callable[[Any, bool], object], connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the parent's to handle: it ends its processes
    while True:
        try:
            task, may_wait = connection.recv()
        except EOFError:
            return
        try:
            answer: tuple[Exception | None, object] = (None, function(task, may_wait))
        except Exception as error:  # whatever it is, it is raised again where the task was given out
            answer = (error, None)
        connection.send(answer)
