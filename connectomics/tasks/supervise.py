"""The parent's side of a working process: give it blocks, watch its time and memory, end it.

Both engines do blocks in such processes: the `local` engine in children of the leader, the `dask` engine in a child of
each Dask worker. So a network that keeps Python busy for minutes does not make a Dask worker look dead, a hung block
can be ended at all (a thread cannot), and the cause of a process's death is attributed to its block.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import psutil

from connectomics.errors import ConnectomicsError, EngineError
from connectomics.tasks.block_task import BlockTask
from connectomics.tasks.child import Job, Opened
from connectomics.tasks.pool import Batch, Tally

if TYPE_CHECKING:
    from connectomics.config.schema import EngineConfig

TICK_S = 0.25  # between two checks of a block's time and memory
_OPENING = 10  # loading a network may take this many times the limit of a block


def make_job(task: BlockTask, stage: str, device: str, engine: EngineConfig) -> Job:
    """Return the job for the workers of a stage."""
    try:
        pickled = pickle.dumps(task)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise EngineError(f"{task.name} cannot be sent to another process ({error}); use engine.workers=1") from error
    memory = None if engine.memory_gb is None else engine.memory_gb * 1e9
    path, folder = tuple(entry or os.getcwd() for entry in sys.path), str(task.folder.absolute())
    return Job(uuid.uuid4().hex, pickled, stage, device, folder, path, engine.block_timeout_s, memory)


class Child:
    """One working process. Give it blocks, then call `step` when `connection` has a message, and every `TICK_S`."""

    def __init__(self, number: int, threads: int | None) -> None:
        """Start the process as worker ``number`` (which selects its GPU).

        threads: of its numerical libraries, unless the environment sets them; None: their default.
        """
        ours, theirs = socket.socketpair()
        code = f"from connectomics.tasks.child import main; main({theirs.fileno()}, {number})"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)}
        if threads is not None:
            for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
                environment.setdefault(name, str(threads))
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL, stdout=2, env=environment,
            )  # fmt: skip
        self.connection = Connection(ours.detach())
        self._job: Job | None = None
        self._opening = False
        self._tally = Tally()
        self._last_message = 0.0

    def give(self, job: Job, blocks: Sequence[int]) -> None:
        """Make it do these blocks; only after the blocks before have ended."""
        self._tally, self._last_message = Tally(blocks), time.monotonic()
        with contextlib.suppress(OSError):  # it has died: `step` reports that
            if self._job is None or self._job.token != job.token:
                self._job, self._opening = job, True
                self.connection.send(job)
            self.connection.send(list(blocks))

    def rest(self) -> None:
        """Make it close its worker, until it is given blocks again."""
        self._job = None
        with contextlib.suppress(OSError):  # it has died; `step` reports that when it is given blocks
            self.connection.send(None)

    def step(self) -> Batch | None:
        """Return what is new, if it is time to report. After a batch with ``ended`` the process waits for blocks, if it
        is still `alive`."""
        try:
            while self.connection.poll():
                ended = self._receive(self.connection.recv())
                if ended is not None:
                    return ended
        except (EOFError, OSError):
            return self._dead(self._cause())
        over = self._over()
        if over:
            self.end()
            return self._dead(over)
        return self._tally.report(ended=False) if self._tally.is_due else None

    @property
    def alive(self) -> bool:
        """Whether it can take blocks."""
        return not self.connection.closed and self._process.poll() is None

    @property
    def held(self) -> int:
        """Bytes of memory that the process holds now, without pages of mapped files, which can be dropped."""
        try:
            info = psutil.Process(self._process.pid).memory_info()
        except psutil.NoSuchProcess:
            return 0
        return int(info.rss - (info.shared if hasattr(info, "shared") else 0))

    def end(self) -> None:
        """Kill the process."""
        self._process.kill()
        self._process.wait()
        self.connection.close()

    def _receive(self, message: Any) -> Batch | None:
        """Process a message (`connectomics.tasks.child`); return the batch if it is the last one."""
        self._last_message = time.monotonic()
        if message is None:
            return self._tally.report()
        if not isinstance(message, Opened):
            return self._tally.add(*message)
        self._opening = False
        if message.error is None:
            return None
        self._job = None
        return self._tally.report(stop=message.error)

    def _over(self) -> str:
        """Return which limit is exceeded, as a line, or ""."""
        job = self._job
        if job is None or not self._tally.left:
            return ""
        limit = job.timeout_s
        if limit is not None and time.monotonic() - self._last_message > limit * (_OPENING if self._opening else 1):
            return f"took longer than {limit * _OPENING if self._opening else limit:g} s"
        if job.memory_bytes is not None and self.held > job.memory_bytes:
            return f"held more than {job.memory_bytes / 1e9:g} GB"
        return ""

    def _cause(self) -> str:
        """Return why the process ended."""
        self.connection.close()
        try:
            code = self._process.wait(5)
        except subprocess.TimeoutExpired:  # it has only closed the socket
            self._process.kill()
            code = self._process.wait()
        if code >= 0:
            return f"its worker ended (exit code {code})"
        out_of_memory = ", perhaps because the machine ran out of memory" if -code == signal.SIGKILL else ""
        return f"its worker died (signal {-code}{out_of_memory})"

    def _dead(self, why: str) -> Batch:
        """Report a dead process: its current block has failed, unless it had not started yet."""
        if self._opening or not self._tally.left:
            return self._tally.report(unopened=why)
        self._tally.add(self._tally.left[0], ConnectomicsError(why))
        return self._tally.report()
