"""The engine of Dask: a scheduler that is there, processes of this machine, or jobs of SLURM or LSF.

A Dask worker does no block itself: it keeps a process for that (`connectomics.tasks.supervise.Child`), long-lived as it
is, and goes on answering the scheduler. One Dask task is one batch of blocks.
"""

from __future__ import annotations

import contextlib
import os
import queue
import shutil
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from dataclasses import replace
from multiprocessing.connection import wait
from types import TracebackType
from typing import TYPE_CHECKING, Any

from connectomics.config.schema import EngineConfig
from connectomics.errors import EngineError
from connectomics.tasks.block_task import BlockTask
from connectomics.tasks.child import Job
from connectomics.tasks.done import sync
from connectomics.tasks.pool import Batch, Engine, Pool, gpu_count, one_line
from connectomics.tasks.scheduler import client_of
from connectomics.tasks.supervise import TICK_S, Child, make_job

if TYPE_CHECKING:
    from distributed import Client, Future, Worker

_LOST_S = 20.0  # so long a scheduler may be away while blocks are done, and a scheduler of others without a worker
_IDLE_S = 120.0  # so long a worker keeps a process, with what it has loaded, for which nobody asks
_REPORT_SHARE = 0.05  # of a worker's time may go into waiting for the disk before it reports
_LOOK_S = 2.0  # between two looks at how many workers there are
_QUEUES = {"slurm": "sbatch", "lsf": "bsub"}  # the command that takes jobs


class DaskEngine(Engine):
    """Workers of a Dask scheduler; which, the configuration says."""

    def __init__(self, config: EngineConfig, device: str) -> None:
        try:
            import distributed  # noqa: F401
        except ImportError as error:
            raise EngineError(
                "engine.name=dask needs Dask, which is not installed: pip install 'connectomics-cellmap[cluster]'"
            ) from error
        self._config, self._device, self.attempts = config, device, config.attempts
        self._stack = contextlib.ExitStack()
        try:
            self._client, about = self._connect()
            self._host = f"connectomics-{uuid.uuid4().hex[:12]}"
            self._client.register_plugin(_host(self._host, threads_of(config)))
            self._stack.callback(self._forget)
        except BaseException:
            self._stack.close()
            raise
        print(about, file=sys.stderr, flush=True)

    def pool(self, task: BlockTask, stage: str) -> Pool:
        return _DaskPool(self._client, self._host, make_job(task, stage, self._device, self._config), self._config)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def _connect(self) -> tuple[Client, str]:
        """A client of the scheduler that is asked for, and what to say about it."""
        from distributed import Client

        if self._config.address is not None:
            client = self._stack.enter_context(client_of(self._config.address))
            return client, f"Dask scheduler {client.scheduler.address}, dashboard {client.dashboard_link}"
        cluster = self._stack.enter_context(make_cluster(self._config, self._device))
        client = self._stack.enter_context(Client(cluster, set_as_default=False))
        return client, f"Dask cluster {cluster}, dashboard {cluster.dashboard_link}"

    def _forget(self) -> None:
        """End the processes that this engine has at workers that live on."""
        if self._client.status == "running":  # a scheduler that is gone has none
            with contextlib.suppress(OSError, TimeoutError):  # it goes now
                self._client.unregister_worker_plugin(self._host)


def make_cluster(config: EngineConfig, device: str = "cpu") -> Any:
    """The Dask cluster of an engine that has no address: a LocalCluster, a SLURMCluster or an LSFCluster, of
    ``engine.workers`` workers (not that many jobs: a job may hold several, ``engine.options.processes``)."""
    if config.cluster == "local":
        from distributed import LocalCluster

        workers = config.workers or (max(1, gpu_count()) if device == "cuda" else 1)
        with _without_ctrl_c():
            return LocalCluster(
                n_workers=workers, threads_per_worker=1, processes=True, host="127.0.0.1", memory_limit=0,
                dashboard_address="127.0.0.1:0", config={"logging": {"distributed": "error"}},
            )  # fmt: skip
    try:
        import dask_jobqueue
    except ImportError as error:
        raise EngineError(
            f"engine.cluster={config.cluster} needs dask-jobqueue: pip install 'connectomics-cellmap[cluster]'"
        ) from error
    command = _QUEUES[config.cluster]
    if shutil.which(command) is None:
        raise EngineError(
            f"engine.cluster={config.cluster}: there is no {command} here; run it where jobs can be submitted"
        )
    kind = {"slurm": dask_jobqueue.SLURMCluster, "lsf": dask_jobqueue.LSFCluster}[config.cluster]
    try:
        cluster = kind(n_workers=config.workers, **job_options(config))
        cluster.adapt(minimum=config.workers, maximum=config.workers)  # a job that ends is followed by another
    except Exception as error:  # of options, of submitting: whatever dask-jobqueue says
        raise EngineError(f"engine.cluster={config.cluster}: no job could be submitted: {one_line(error)}") from error
    return cluster


@contextlib.contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """Processes that are started meanwhile do not hear Ctrl-C: it is the leader's, who ends them, and not for each of
    them to complain of."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only there can it be said
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def job_options(config: EngineConfig) -> dict[str, Any]:
    """What dask-jobqueue's cluster is made with: ``engine.options``, a core for each worker where they say nothing,
    memory for the block limit, and one batch at a time a worker."""
    options = {"cores": 1, "processes": 1, **config.options}
    if "memory" not in options and config.memory_gb is not None:
        options["memory"] = f"{config.memory_gb * options['processes'] + 1:g} GB"
    if "memory" not in options:
        raise EngineError(f"engine.cluster={config.cluster} needs engine.options.memory, of a job, as in '32 GB'")
    more = list(options.get("worker_extra_args", []))
    return {**options, "worker_extra_args": [*more, "--nthreads", "1"]}


def threads_of(config: EngineConfig) -> int | None:
    """Threads of the numerical libraries in each working process; None: as its environment says."""
    if config.address is not None:
        return None
    if config.cluster == "local":
        return max(1, (os.cpu_count() or 1) // max(1, config.workers))
    options = {"cores": 1, "processes": 1, **config.options}
    return max(1, int(options["cores"]) // int(options["processes"]))


def _host(name: str, threads: int | None) -> Any:
    """The plugin that keeps the working processes of a Dask worker, from its start to its end."""
    from distributed import WorkerPlugin

    class Host(WorkerPlugin):
        """Working processes of one Dask worker: one, or where it has several threads, up to one for each."""

        def __init__(self) -> None:
            self.name = name

        def setup(self, worker: Worker) -> None:
            self.worker, self.lock, self.over = worker, threading.Lock(), threading.Event()
            self.idle: list[tuple[float, Child]] = []  # since when
            self.busy: list[Child] = []
            threading.Thread(target=self._sweep, daemon=True).start()

        def teardown(self, worker: Worker) -> None:
            self.over.set()
            with self.lock:
                for child in [*self.busy, *(child for _, child in self.idle)]:
                    child.end()

        def take(self) -> Child:
            """A process that has nothing to do."""
            with self.lock:
                while self.idle:
                    _, child = self.idle.pop()
                    if child.alive:
                        break
                else:
                    child = Child(_number(self.worker.name) + len(self.busy), threads)
                self.busy.append(child)
                return child

        def put(self, child: Child) -> None:
            """It has nothing to do any more."""
            with self.lock:
                self.busy.remove(child)
                if child.alive and not self.over.is_set():
                    self.idle.append((time.monotonic(), child))
                else:
                    child.end()

        def _sweep(self) -> None:
            """End processes that nobody has wanted for a while: a leader that was killed cannot say that it is gone."""
            while not self.over.wait(_IDLE_S / 10):
                with self.lock:
                    old = [child for since, child in self.idle if time.monotonic() - since > _IDLE_S]
                    self.idle = [(since, child) for since, child in self.idle if child not in old]
                for child in old:
                    child.end()

    return Host()


def _number(name: object) -> int:
    """The number at the end of a Dask worker's name, which decides on its GPU; 0 where there is none."""
    text = str(name)
    digits = text[len(text.rstrip("0123456789")) :]
    return int(digits or 0)


def _do(host: str, job: Job, blocks: list[int]) -> Batch:
    """The Dask task: have a working process of this worker do ``blocks``."""
    from distributed import get_worker

    worker = get_worker()
    keeper: Any = worker.plugins[host]
    key = worker.get_current_task()
    child: Child = keeper.take()
    told: list[Batch] = []
    next_report = 0.0
    try:
        child.give(job, blocks)
        while not told or not told[-1].ended:
            wait([child.connection], TICK_S)
            if (batch := child.step()) is not None:
                told.append(batch)
                if batch.done and not batch.ended and time.monotonic() >= next_report:
                    next_report = _report(worker, host, key, job, told)
            state = worker.state.tasks.get(key)
            if state is None or state.state != "executing":  # the leader has gone, or given up
                child.end()
                raise EngineError("nobody waits for these blocks any more")
    finally:
        keeper.put(child)
    sync(job.folder)
    return _together(told)


def _report(worker: Worker, host: str, key: Any, job: Job, told: list[Batch]) -> float:
    """Tell the leader what is on disk by now, so that it is not done again should the leader be killed; returns when
    it is worth doing again, since waiting for the disk is slow. What does not arrive comes with the result."""
    begin = time.monotonic()
    sync(job.folder)
    whole = _together(told)
    worker.log_event(host, {"key": str(key), "done": list(whole.done), "seconds": whole.seconds})
    end = time.monotonic()
    return end + (end - begin) / _REPORT_SHARE


def _together(told: list[Batch]) -> Batch:
    """All that was told of some blocks as one."""
    last = told[-1]
    done = tuple(number for batch in told for number in batch.done)
    failed = {number: why for batch in told for number, why in batch.failed.items()}
    seconds = sum(batch.seconds for batch in told)
    return Batch(done, failed, last.untouched, seconds, last.stop, last.unopened, stopped=last.stopped)


class _DaskPool(Pool):
    def __init__(self, client: Client, host: str, job: Job, config: EngineConfig) -> None:
        self._client, self._host, self._job, self._config = client, host, job, config
        self._heard: queue.SimpleQueue[Future | dict[str, Any]] = queue.SimpleQueue()
        self._blocks: dict[str, list[int]] = {}
        self._reported: dict[str, tuple[set[int], float]] = {}  # of batches under way: done, and the seconds for them
        client.subscribe_topic(host, lambda event: self._heard.put(event[1]))
        self._futures: set[Future] = set()
        self._slots, self._looked, self._alone, self._away = 1, -_LOOK_S, 0.0, 0.0

    @property
    def slots(self) -> int:
        self._look()
        return self._slots

    def submit(self, blocks: Sequence[int]) -> None:
        numbers = list(blocks)
        future = self._client.submit(
            _do, self._host, self._job, numbers, key=f"blocks-{uuid.uuid4().hex}", pure=False, retries=0
        )
        self._blocks[str(future.key)] = numbers
        self._futures.add(future)
        future.add_done_callback(self._heard.put)

    def next(self) -> Batch:
        while True:
            with contextlib.suppress(queue.Empty):
                heard = self._heard.get(timeout=TICK_S)
                if not isinstance(heard, dict):
                    return self._result(heard)
                if heard["key"] in self._blocks:  # or it came after the result
                    return self._report(heard)
            self._look()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._futures and self._client.status == "running":
            self._client.cancel(list(self._futures), force=True)
        if self._client.status == "running":
            self._client.unsubscribe_topic(self._host)

    def _report(self, heard: dict[str, Any]) -> Batch:
        """What is new in a report, which says all that is done of a batch. One that was begun anew on another worker,
        since the first has died, may say less than was known."""
        known, seconds = self._reported.get(heard["key"], (set(), 0.0))
        new = tuple(number for number in heard["done"] if number not in known)
        self._reported[heard["key"]] = known | set(new), max(seconds, heard["seconds"])
        return Batch(new, seconds=max(0.0, heard["seconds"] - seconds), ended=False)

    def _result(self, future: Future) -> Batch:
        from distributed import KilledWorker

        blocks = self._blocks.pop(str(future.key))
        known, seconds = self._reported.pop(str(future.key), (set(), 0.0))
        self._futures.discard(future)
        if future.cancelled():
            raise self._gone()
        try:
            error = future.exception()
            batch: Batch | None = future.result() if error is None else None
        except (OSError, CancelledError) as lost:  # not of the blocks: the scheduler went while they were brought
            raise self._gone() from lost
        if batch is not None:
            done, untouched = (tuple(n for n in some if n not in known) for some in (batch.done, batch.untouched))
            failed = {n: why for n, why in batch.failed.items() if n not in known}
            seconds = max(0.0, batch.seconds - seconds)
            return replace(batch, done=done, failed=failed, untouched=untouched, seconds=seconds)
        blocks = [number for number in blocks if number not in known]
        if isinstance(error, KilledWorker):  # with the working process: which block it was cannot be said
            why = "the Dask worker died each time"
            return Batch(failed={blocks[0]: why}) if len(blocks) == 1 else Batch(untouched=tuple(blocks))
        raise EngineError(f"a Dask worker could not begin with its blocks: {one_line(error)}") from error

    def _look(self) -> None:
        """Every now and then: is the scheduler there, and how many workers has it?"""
        now = time.monotonic()
        if now - self._looked < _LOOK_S:
            return
        self._looked = now
        if self._client.status != "running":
            self._away = self._away or now
            if now - self._away > _LOST_S:
                raise self._gone()
            return
        self._away = 0.0
        try:
            threads = sum(self._client.nthreads().values())
        except OSError as error:
            raise self._gone() from error
        self._slots = max(1, threads)
        if threads:
            self._alone = 0.0
        else:
            if not self._alone:
                print("Dask: no worker at the moment; waiting", file=sys.stderr, flush=True)
                self._alone = now
            if self._config.address is not None and now - self._alone > _LOST_S:
                raise EngineError(
                    f"the Dask scheduler at {self._config.address} has had no worker for {_LOST_S:g} s; "
                    f"start some with `dask worker {self._config.address}`, then run the same command again"
                )

    def _gone(self) -> EngineError:
        return EngineError(
            "the connection to the Dask scheduler is lost; what is done is kept: "
            "see that it runs, then run the same command again"
        )
