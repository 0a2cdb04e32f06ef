"""Batches from worker processes: in a fixed order, resumable within an epoch, with clear errors.

This is torch's `DataLoader` with four additions: a killed worker and an error inside one arrive as one clear error;
only the main process sees Ctrl-C; the state says how far the epoch has come; and nothing is drawn from the main
process's random generator, so a resumed run gets the random numbers of an uninterrupted one.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from multiprocessing.util import get_temp_dir
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torch.utils.data._utils import signal_handling

from connectomics.data.sampling import PatchSampler
from connectomics.errors import ConnectomicsError, require_known
from connectomics.tasks.memory import keep_freed_memory

WORKER_STARTS = ("forkserver", "spawn")

_PREFETCH = 2  # batches that each worker prepares ahead; shared memory holds at most workers * this
_DESCRIPTORS = 2**16
_SETTLE_S = 3.0  # an error can arrive before its cause, the end of a worker


class WorkerError(ConnectomicsError, RuntimeError):
    """A loader worker was killed, ran out of memory, or crashed."""


class PatchLoader(DataLoader[Any]):
    """Batches of a data set in the order of a `PatchSampler`; the last, incomplete batch of an epoch is dropped.

    The sequence of batches depends only on the sampler, not on the number of workers, how they start, or interruptions.
    Lightning stores `state_dict` in checkpoints; after `load_state_dict` the next iteration begins at the next batch.

    Raises, while iterating:
        WorkerError: a worker was killed or crashed; noticed within about five seconds.
        ConnectomicsError: the data set raised it, also in a worker.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        sampler: PatchSampler,
        *,
        batch_size: int,
        collate: Callable[[list[Any]], Any],
        workers: int = 0,
        start: str = "forkserver",
        persistent: bool = False,
        pin_memory: bool = False,
    ) -> None:
        """``dataset[request]`` gives the sample of a `PatchRequest` and ``collate(samples)`` a batch: a mapping whose
        values are tensors or small. With workers both must pickle. ``start`` is one of `WORKER_STARTS`.
        """
        require_known("way to start workers", [start], WORKER_STARTS, "data.worker_start")
        context = None
        if workers:
            context = multiprocessing.get_context(start)
            _raise_descriptor_limit()
            if start == "forkserver":
                # the server imports what all workers need, once; without effect if it is running already
                modules = {type(dataset).__module__, collate.__module__, __name__} - {"__main__"}
                context.set_forkserver_preload(sorted(modules))
        super().__init__(
            _Batches(dataset, collate),
            batch_size=batch_size,
            sampler=sampler,
            num_workers=workers,
            collate_fn=_as_it_is,
            persistent_workers=persistent and workers > 0,
            pin_memory=pin_memory,
            drop_last=True,
            multiprocessing_context=context,
            prefetch_factor=_PREFETCH if workers else None,
            worker_init_fn=_begin_worker,
            generator=torch.Generator(),  # otherwise each epoch draws from the main process's generator
        )
        self._patches = sampler
        self._epoch, self._done = sampler.epoch, 0
        self._start: tuple[int, int] | None = None
        self._running: _TorchWorkers | None = None

    @property
    def worker_pids(self) -> list[int]:
        """Process IDs of the running workers."""
        return [] if self._running is None else [worker.pid or 0 for worker in self._running.processes]

    # -- state -------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Return ``epoch`` and ``batches``, how many of it were delivered."""
        return {"epoch": self._epoch, "batches": self._done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next iteration continue where ``state`` was taken, unless the sampler is set to another epoch before:
        an epoch that was ended early stays ended."""
        epoch, done = int(state["epoch"]), int(state["batches"])
        if done >= len(self):
            epoch, done = epoch + 1, 0
        self._patches.set_epoch(epoch)
        self._start = (epoch, done)

    # -- iteration ---------------------------------------------------------------------------------------------------
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield batches of the sampler's epoch, which is read when the first one is requested: the trainer sets it only
        after it has the iterator."""
        epoch = self._patches.epoch
        self._epoch, self._done = epoch, 0
        if self._start is not None and self._start[0] == epoch:
            self._done = self._start[1]
            self._patches.start_at(epoch, self._done * int(self.batch_size or 1))
        self._start = None
        running = None
        keep = False  # whether the workers are kept for the next epoch
        try:
            with nullcontext() if self._running or not self.num_workers else _blocked_interrupts():
                batches = self._guarded(super().__iter__)
            if self.num_workers:
                running = self._running = self._running or _TorchWorkers(batches)
            while self._done < len(self):
                batch = self._guarded(batches.__next__)
                if isinstance(batch, _Failure):
                    raise batch.error
                self._done += 1
                if self._done == len(self):
                    keep = self.persistent_workers
                    if not keep:
                        self.stop(at_once=False)  # now rather than after the validation that follows
                yield batch
        except GeneratorExit:
            keep = self.persistent_workers
            raise
        finally:
            if not keep and self._running is running:  # not those of an iteration that began since
                self.stop()

    def _guarded(self, work: Callable[[], Any]) -> Any:
        """``work()``, with torch's errors about a worker that ended replaced by ours."""
        try:
            return work()
        except (RuntimeError, OSError, EOFError) as error:
            if str(error).startswith("Caught "):  # raised by the data set
                raise
            ended = _ended([] if self._running is None else self._running.processes)
            if ended is None:
                raise
            raise WorkerError(_reason(*ended)) from error

    def stop(self, at_once: bool = True) -> None:
        """End the workers, ``at_once`` without waiting for what they read; a later iteration starts new ones."""
        running, self._running = self._running, None
        self._iterator = None  # torch keeps persistent workers here
        if running is not None:
            running.stop(at_once)


class _TorchWorkers:
    """The workers of one of torch's iterators: the only place that uses private names of torch.

    ``tests/data/test_loader.py`` fails if torch renames them.
    """

    def __init__(self, iterator: Any) -> None:
        self._iterator = iterator
        self.processes: list[BaseProcess] = list(iterator._workers)
        # torch raises the end of a worker from a signal handler, anywhere in this process (within a training step).
        # Without its list of workers it is found where batches are fetched, as on systems without that signal.
        signal_handling._remove_worker_pids(id(iterator))
        iterator._worker_pids_set = False

    def stop(self, at_once: bool) -> None:
        if at_once or any(worker.exitcode for worker in self.processes):
            for worker in self.processes:
                worker.terminate()
            for worker in self.processes:
                worker.join(_SETTLE_S)
            # one that ended while it asked whether the event is set holds its lock, for which torch would wait forever
            self._iterator._workers_done_event = threading.Event()
        self._iterator._shutdown_workers()


# -- in the workers ----------------------------------------------------------------------------------------------------
class _Failure:
    """An error about the user's data on its way from a worker; torch would use its traceback as its message."""

    def __init__(self, error: ConnectomicsError) -> None:
        self.error = error


class _Batches(Dataset[Any]):
    """Whole batches of a data set; errors that the user can fix are returned, not raised."""

    def __init__(self, dataset: Dataset[Any], collate: Callable[[list[Any]], Any]) -> None:
        self._dataset, self._collate = dataset, collate

    def __getitem__(self, index: Any) -> Any:
        return self._dataset[index]

    def __getitems__(self, indices: Sequence[Any]) -> Any:
        """Return the batch of some requests, or a `_Failure`."""
        in_worker = get_worker_info() is not None
        try:
            batch = self._collate([self._dataset[index] for index in indices])
            return _shared(batch) if in_worker else batch
        except ConnectomicsError as error:
            return _Failure(error)
        except MemoryError:
            if not in_worker:
                raise
            return _Failure(WorkerError(f"a loader worker found no memory for a batch; {_ADVICE}"))


def _as_it_is(batch: Any) -> Any:
    return batch


def _shared(batch: Any) -> Any:
    """Move a batch's tensors into shared memory. torch does that in the queue's thread, where an error (no space in
    /dev/shm) is only printed, the batch lost, and the main process waits forever."""
    for value in batch.values() if isinstance(batch, Mapping) else ():
        if isinstance(value, Mapping):
            _shared(value)
        elif isinstance(value, torch.Tensor):
            try:
                value.share_memory_()
            except RuntimeError as error:
                raise WorkerError(f"a loader worker found no shared memory for a batch ({error}); {_ADVICE}") from error
    return batch


def _begin_worker(number: int) -> None:
    """Set up a worker process."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all; the main process ends workers
    torch.set_num_threads(1)
    keep_freed_memory()
    # Tensors travel as descriptors of unnamed shared memory, so nothing stays in /dev/shm however a process ends
    # (the strategy file_system leaves names there when a worker and its torch_shm_manager are killed).
    torch.multiprocessing.set_sharing_strategy("file_descriptor")
    _raise_descriptor_limit()


def _end_with_parent() -> None:
    """End this worker when the main process is gone. torch watches the parent, which for forkserver is the server; the
    server waits for its workers, so after a SIGKILL of the main process all would stay forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _raise_descriptor_limit() -> None:
    """Raise the limit of open files: tensors in transit need some, and 1024 is far below what the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


# -- how workers end ---------------------------------------------------------------------------------------------------
_ADVICE = (
    "lower data.num_workers, data.batch_size or data.patch_size, or let workers share decoded crops with "
    "data.cache=disk, and resume"
)


@contextmanager
def _blocked_interrupts() -> Iterator[None]:
    """Start processes that never see SIGINT, not even before `_begin_worker`; this process gets it afterwards."""
    get_temp_dir()  # the workers' sockets go there too, so that this process removes what a killed worker leaves
    resource_tracker.ensure_running()  # it unblocks SIGINT when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _ended(workers: Sequence[BaseProcess]) -> tuple[int, int, int] | None:
    """Number and exit code of a worker that ended by itself, and the number of workers; None if all are running."""
    deadline = time.monotonic() + _SETTLE_S
    while workers:
        for number, worker in enumerate(workers):
            if worker.exitcode:
                return number, worker.exitcode, len(workers)
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return None


def _reason(number: int, code: int, count: int) -> str:
    """The message about a worker's end."""
    if code > 0:
        return (
            f"loader worker {number + 1} of {count} ended with status {code}; data.num_workers=0 shows what happens "
            "in it (a script of your own needs its work below `if __name__ == '__main__':`)"
        )
    name = signal.Signals(-code).name
    said = f"loader worker {number + 1} of {count} was ended by {name}"
    if -code == signal.SIGKILL:
        return f"{said}, as the system does when memory runs out (dmesg says so): {_ADVICE}"
    if -code == signal.SIGBUS:
        free = shutil.disk_usage("/dev/shm").free // 2**20 if os.path.isdir("/dev/shm") else 0
        return f"{said}: shared memory ran out ({free} MB free in /dev/shm; docker: --shm-size); {_ADVICE}"
    return f"{said}; data.num_workers=0 shows what happens in it"
