"""The Dask engine: an existing scheduler, processes of this machine, or jobs of SLURM or LSF.

A Dask worker does no block itself: it keeps a long-lived process for that (`connectomics.tasks.supervise.Child`) and
keeps answering the scheduler. One Dask task is one batch of blocks.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import re
import shutil
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from connectomics.config.schema import EngineConfig
from connectomics.errors import EngineError
from connectomics.io import store
from connectomics.machine import usable_cores
from connectomics.tasks.block_task import BlockTask
from connectomics.tasks.blocks import sync
from connectomics.tasks.child import Job
from connectomics.tasks.engines import number_of_workers
from connectomics.tasks.pool import Batch, Engine, Pool, one_line
from connectomics.tasks.supervise import TICK_S, Child, make_job

if TYPE_CHECKING:
    from distributed import Client, Future, Worker

_CONNECT_S = 10.0  # a scheduler that does not answer within this time counts as unreachable
_LOST_S = 20.0  # how long a scheduler may be away, and how long an existing scheduler may have no worker
_IDLE_S = 120.0  # how long a worker keeps an idle process with its loaded network
_REPORT_SHARE = 0.05  # of a worker's time may be spent waiting for the disk before it reports
_CHECK_S = 2.0  # between two checks of the number of workers
_QUEUES = {"slurm": "sbatch", "lsf": "bsub"}  # the command that takes jobs
_GONE = (
    "the connection to the Dask scheduler is lost; finished blocks are kept: make sure that it runs, then rerun the "
    "same command"
)


class DaskEngine(Engine):
    """Workers of the Dask scheduler that the configuration names."""

    def __init__(self, config: EngineConfig, device: str) -> None:
        try:
            import distributed
        except ImportError as error:
            raise EngineError(
                "engine.name=dask needs Dask, which is not installed: pip install 'connectomics-cellmap[cluster]'"
            ) from error
        self._config, self._device, self.attempts = config, device, config.attempts
        with contextlib.ExitStack() as stack:
            if config.address is not None:
                self._client: Client = stack.enter_context(client_of(config.address))
            else:
                cluster = stack.enter_context(make_cluster(config, device))
                self._client = stack.enter_context(distributed.Client(cluster, set_as_default=False))
            self._host = f"connectomics-{uuid.uuid4().hex[:12]}"
            self._client.register_plugin(_host(self._host, threads_of(config)))
            stack.callback(self._forget)
            self._stack = stack.pop_all()  # an error before this closes what is open
        place = f"scheduler {config.address}" if config.address else f"cluster {self._client.cluster}"
        print(f"Dask {place}, dashboard {self._client.dashboard_link}", file=sys.stderr, flush=True)

    def pool(self, task: BlockTask, stage: str) -> Pool:
        return _DaskPool(self._client, self._host, make_job(task, stage, self._device, self._config), self._config)

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def _forget(self) -> None:
        """End the processes of this engine at workers that keep running."""
        if self._client.status == "running":  # a scheduler that is gone has none
            with contextlib.suppress(OSError, TimeoutError):  # it is going away right now
                self._client.unregister_worker_plugin(self._host)


def make_cluster(config: EngineConfig, device: str = "cpu") -> Any:
    """Return the Dask cluster of an engine without an address: a LocalCluster, a SLURMCluster or an LSFCluster with
    ``engine.workers`` workers (a job may hold several workers, ``engine.options.processes``)."""
    if config.cluster == "local":
        from distributed import LocalCluster

        with _without_ctrl_c():
            return LocalCluster(
                n_workers=number_of_workers(config, device), threads_per_worker=1, processes=True, memory_limit=0,
                host="127.0.0.1", dashboard_address="127.0.0.1:0", config={"logging": {"distributed": "error"}},
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
            f"engine.cluster={config.cluster}: there is no {command} here; run this where jobs can be submitted"
        )
    kind = {"slurm": dask_jobqueue.SLURMCluster, "lsf": dask_jobqueue.LSFCluster}[config.cluster]
    try:
        cluster = kind(n_workers=config.workers, **job_options(config))
        cluster.adapt(minimum=config.workers, maximum=config.workers)  # replaces jobs that end
    except Exception as error:  # wrong options, failed submission: anything that dask-jobqueue raises
        raise EngineError(f"engine.cluster={config.cluster}: no job could be submitted: {one_line(error)}") from error
    return cluster


@contextlib.contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """Start processes that ignore Ctrl-C: the leader handles it and ends them."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set signal handlers
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def job_options(config: EngineConfig) -> dict[str, Any]:
    """Return the arguments of dask-jobqueue's cluster: ``engine.options``, by default one core per worker and memory
    for the block limit, and one batch at a time per worker."""
    options = {"cores": 1, "processes": 1, **config.options}
    if "memory" not in options and config.memory_gb is not None:
        options["memory"] = f"{config.memory_gb * options['processes'] + 1:g} GB"
    if "memory" not in options:
        raise EngineError(
            f"engine.cluster={config.cluster} needs engine.options.memory, the memory of a job, such as '32 GB'"
        )
    return {**options, "worker_extra_args": [*options.get("worker_extra_args", []), "--nthreads", "1"]}


def threads_of(config: EngineConfig) -> int | None:
    """Return the threads of the numerical libraries in each working process; None: leave it to its environment."""
    if config.address is not None:
        return None
    if config.cluster == "local":
        return max(1, usable_cores() // max(1, config.workers))
    options = {"cores": 1, "processes": 1, **config.options}
    return max(1, int(options["cores"]) // int(options["processes"]))


def _host(name: str, threads: int | None) -> Any:
    """Return the plugin that keeps the working processes of a Dask worker: at most one per thread."""
    from distributed import WorkerPlugin

    class Host(WorkerPlugin):
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
            with self.lock:
                self.busy.remove(child)
                if child.alive and not self.over.is_set():
                    self.idle.append((time.monotonic(), child))
                else:
                    child.end()

        def _sweep(self) -> None:
            """End processes that are idle for long: a leader that was killed cannot end them."""
            while not self.over.wait(_IDLE_S / 10):
                with self.lock:
                    old = [child for since, child in self.idle if time.monotonic() - since > _IDLE_S]
                    self.idle = [(since, child) for since, child in self.idle if child not in old]
                for child in old:
                    child.end()

    return Host()


def _number(name: object) -> int:
    """Return the number at the end of a Dask worker's name, which selects its GPU; 0 if there is none."""
    found = re.search(r"\d+$", str(name))
    return int(found[0]) if found else 0


def _do(host: str, job: Job, blocks: list[int]) -> Batch:
    """The Dask task: make a working process of this worker do ``blocks``."""
    from distributed import get_worker

    worker = get_worker()
    keeper: Any = worker.plugins[host]
    key = worker.get_current_task()
    child: Child = keeper.take()
    reports: list[Batch] = []
    next_report = 0.0
    try:
        child.give(job, blocks)
        while not reports or not reports[-1].ended:
            wait([child.connection], TICK_S)
            if (batch := child.step()) is not None:
                reports.append(batch)
                if batch.done and not batch.ended and time.monotonic() >= next_report:
                    next_report = _report(worker, host, key, job, reports)
            state = worker.state.tasks.get(key)
            if state is None or state.state != "executing":  # the leader is gone, or has given up
                child.end()
                raise EngineError("the leader no longer waits for these blocks")
    finally:
        keeper.put(child)
    sync(job.folder)
    return _together(reports)


def _report(worker: Worker, host: str, key: Any, job: Job, reports: list[Batch]) -> float:
    """Report what is on disk by now, so that it is not repeated if the leader is killed; return the time of the next
    report: waiting for the disk is slow."""
    begin = time.monotonic()
    sync(job.folder)
    whole = _together(reports)
    worker.log_event(host, {"key": str(key), "done": list(whole.done), "seconds": whole.seconds})
    end = time.monotonic()
    return end + (end - begin) / _REPORT_SHARE


def _together(reports: list[Batch]) -> Batch:
    """Return all reports on some blocks as one, the last."""
    done = tuple(number for batch in reports for number in batch.done)
    failed = {number: why for batch in reports for number, why in batch.failed.items()}
    return replace(reports[-1], done=done, failed=failed, seconds=sum(batch.seconds for batch in reports), ended=True)


class _DaskPool(Pool):
    def __init__(self, client: Client, host: str, job: Job, config: EngineConfig) -> None:
        self._client, self._host, self._job, self._config = client, host, job, config
        self._messages: queue.SimpleQueue[Future | dict[str, Any]] = queue.SimpleQueue()
        self._blocks: dict[str, list[int]] = {}
        self._reported: dict[str, tuple[set[int], float]] = {}  # of running batches: done blocks, and seconds for them
        client.subscribe_topic(host, lambda event: self._messages.put(event[1]))
        self._futures: set[Future] = set()
        self._slots, self._checked, self._alone, self._away = 1, -_CHECK_S, 0.0, 0.0

    @property
    def slots(self) -> int:
        self._check()
        return self._slots

    def submit(self, blocks: Sequence[int]) -> None:
        numbers, key = list(blocks), f"blocks-{uuid.uuid4().hex}"
        future = self._client.submit(_do, self._host, self._job, numbers, key=key, pure=False, retries=0)
        self._blocks[key] = numbers
        self._futures.add(future)
        future.add_done_callback(self._messages.put)

    def next(self) -> Batch:
        while True:
            with contextlib.suppress(queue.Empty):
                message = self._messages.get(timeout=TICK_S)
                if not isinstance(message, dict):
                    return self._result(message)
                if message["key"] in self._blocks:  # else it came after the result
                    return self._report(message)
            self._check()

    def __exit__(self, *error: Any) -> None:
        if self._futures and self._client.status == "running":
            self._client.cancel(list(self._futures), force=True)
        if self._client.status == "running":
            self._client.unsubscribe_topic(self._host)

    def _report(self, message: dict[str, Any]) -> Batch:
        """Return what is new in a report, which lists all done blocks of a batch. If its worker died and another one
        started over, it may list fewer blocks than are known."""
        known, seconds = self._reported.get(message["key"], (set(), 0.0))
        new = tuple(number for number in message["done"] if number not in known)
        self._reported[message["key"]] = known | set(new), max(seconds, message["seconds"])
        return Batch(new, seconds=max(0.0, message["seconds"] - seconds), ended=False)

    def _result(self, future: Future) -> Batch:
        from distributed import KilledWorker

        blocks = self._blocks.pop(str(future.key))
        known, seconds = self._reported.pop(str(future.key), (set(), 0.0))
        self._futures.discard(future)
        if future.cancelled():
            raise EngineError(_GONE)
        try:
            error = future.exception()
            batch: Batch | None = future.result() if error is None else None
        except (OSError, CancelledError) as lost:  # not from the blocks: the scheduler went away during the transfer
            raise EngineError(_GONE) from lost
        if batch is not None:
            done, untouched = (tuple(n for n in some if n not in known) for some in (batch.done, batch.untouched))
            failed = {n: why for n, why in batch.failed.items() if n not in known}
            seconds = max(0.0, batch.seconds - seconds)
            return replace(batch, done=done, failed=failed, untouched=untouched, seconds=seconds)
        blocks = [number for number in blocks if number not in known]
        if isinstance(error, KilledWorker):  # with its process: it is unknown which block it was
            why = "the Dask worker died each time"
            return Batch(failed={blocks[0]: why}) if len(blocks) == 1 else Batch(untouched=tuple(blocks))
        raise EngineError(f"a Dask worker could not start its blocks: {one_line(error)}") from error

    def _check(self) -> None:
        """Check every few seconds whether the scheduler answers, and how many workers it has."""
        now = time.monotonic()
        if now - self._checked < _CHECK_S:
            return
        self._checked = now
        if self._client.status != "running":
            self._away = self._away or now
            if now - self._away > _LOST_S:
                raise EngineError(_GONE)
            return
        self._away = 0.0
        try:
            threads = sum(self._client.nthreads().values())
        except OSError as error:
            raise EngineError(_GONE) from error
        self._slots = max(1, threads)
        if threads:
            self._alone = 0.0
            return
        if not self._alone:
            print("Dask: no worker at the moment; waiting", file=sys.stderr, flush=True)
            self._alone = now
        if (address := self._config.address) is not None and now - self._alone > _LOST_S:
            raise EngineError(
                f"the Dask scheduler at {address} has had no worker for {_LOST_S:g} s; start some with "
                f"`dask worker {address}`, then rerun the same command"
            )


def client_of(given: str) -> Client:
    """Return a client of a scheduler, by its address or its file; `EngineError` if none answers there."""
    from distributed import Client

    remedy = "start one with `dask scheduler`, or leave engine.address out"
    file, address = Path(given), given
    if "://" not in given and (file.suffix == ".json" or os.sep in given):
        content = store.read_json(file)
        if content is None:
            raise EngineError(f"engine.address: there is no scheduler file {given}; {remedy}")
        address = str(content.get("address"))
    try:
        with ThreadPoolExecutor(1) as thread:  # its own event loop, also if one runs here (in a notebook)
            kind = thread.submit(asyncio.run, _kind(address)).result()
    except Exception as error:  # from whatever answers there
        raise EngineError(
            f"engine.address: no Dask scheduler answers at {given} (waited up to {_CONNECT_S:g} s); {remedy}"
        ) from error
    if kind != "Scheduler":
        raise EngineError(f"engine.address: {given} is a Dask {kind}, expected a scheduler; {remedy}")
    return Client(address, timeout=_CONNECT_S, set_as_default=False)


async def _kind(address: str) -> str:
    """Return what answers at an address, as Dask calls it; a client itself would wait forever for a silent server."""
    from distributed.core import rpc
    from distributed.security import Security

    async def ask() -> str:
        async with rpc(address, connection_args=Security().get_connection_args("client")) as server:
            return str((await server.identity())["type"])

    return await asyncio.wait_for(ask(), _CONNECT_S)
