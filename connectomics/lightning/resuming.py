"""Callbacks that make a run resumable: latest checkpoint, random state, sums of an unfinished epoch, signals."""

from __future__ import annotations

import logging
import os
import random
import shutil
import signal
import subprocess
import threading
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, Checkpoint

from connectomics.errors import number_of
from connectomics.lightning.devices import of_all
from connectomics.lightning.metrics_table import MetricsTable

log = logging.getLogger(__name__)

_RANDOM_KEY = "connectomics_random_state"
_SUMS_KEY = "connectomics_epoch_sums"
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class RandomState(Callback):
    """Keeps the state of every process's random generators in the checkpoint, so that a resumed run continues as if it
    had not stopped."""

    def on_save_checkpoint(self, trainer: pl.Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        """Store the state of every process; Lightning calls this in all of them."""
        checkpoint[_RANDOM_KEY] = of_all(trainer, random_state())

    def on_load_checkpoint(self, trainer: pl.Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        """Restore this process's state, if the number of processes is the same."""
        states = checkpoint.get(_RANDOM_KEY, [])
        if len(states) == trainer.world_size:
            set_random_state(states[trainer.global_rank])
        elif trainer.is_global_zero:
            message = "the checkpoint has %s, this run has %d: it continues with new random numbers"
            log.warning(message, number_of(len(states), "process"), trainer.world_size)


def random_state() -> dict[str, Any]:
    """Return the state of the generators of Python, numpy and torch, in values that load without unpickling."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore `random_state`; ignore the states of GPUs that this machine does not have."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available():
        for device, value in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(value.cpu(), device)


class LatestState(Checkpoint):
    """Writes ``last.ckpt``, the latest state: after each epoch, and every ``every_n_steps`` optimizer steps within one.

    Within an epoch it is written right after an optimizer step, when no gradients are pending, but not after an epoch's
    last step, because the validation follows. The ``metrics.csv`` row of that step is written next; a process killed in
    between lacks it.

    A run that receives a signal to stop (SIGTERM, or a queue's signal before a job's limit: ``--signal=USR1@300`` of
    SLURM, SIGUSR2 of LSF) continues to the next such step, writes its state, and ends as after Ctrl-C.
    """

    def __init__(self, folder: str | Path, every_n_steps: int | None = None) -> None:
        self.path = Path(folder) / "last.ckpt"
        self._every = every_n_steps
        self._signals = StopSignals()
        self._stops = False

    def on_train_start(self, *args: Any) -> None:
        """Listen for signals."""
        self._signals.listen()

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Write the state every ``every_n_steps`` optimizer steps, and if the run must stop."""
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        last = batch_idx + 1 >= trainer.num_training_batches
        if trainer.should_stop or last or not stepped:
            return
        self._stops = self._signals.reached(trainer)
        if self._stops or (self._every is not None and trainer.global_step % self._every == 0):
            trainer.save_checkpoint(self.path)

    def on_train_epoch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Write the state."""
        trainer.save_checkpoint(self.path)
        self._stops = self._signals.reached(trainer)

    def on_train_epoch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Stop before the next epoch."""
        self.on_train_batch_start(trainer)

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Stop before the next batch, when the loggers have written the row of the step."""
        if not self._stops:
            return
        if trainer.is_global_zero:
            name = self._signals.received.name if self._signals.received else "a signal to another process"
            log.warning("stopping after %s: the state after step %d is saved", name, trainer.global_step)
            self._signals.requeue()
        raise KeyboardInterrupt


class StopSignals:
    """Records signals to stop a run; Lightning restores the previous handlers when training ends."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._listener = 0

    def listen(self) -> None:
        """Start listening. Call this after Lightning has set its own handlers, which this replaces: they end a run at
        the next batch without writing its state, or write the state in the middle of a batch."""
        if threading.current_thread() is threading.main_thread():
            self._listener = os.getpid()
            for number in _SIGNALS:
                signal.signal(number, self._remember)

    def reached(self, trainer: pl.Trainer) -> bool:
        """Return whether any process of the run received a signal; all processes must call this at the same batch."""
        if trainer.world_size == 1:
            return self.received is not None
        return trainer.strategy.reduce_boolean_decision(self.received is not None, all=False)

    def requeue(self, environment: Mapping[str, str] = os.environ) -> None:
        """Ask SLURM to start the job again, if SIGUSR1 came within one of its jobs."""
        job = environment.get("SLURM_JOB_ID")
        if self.received != signal.SIGUSR1 or job is None or shutil.which("scontrol") is None:
            return
        array = environment.get("SLURM_ARRAY_JOB_ID")
        name = job if array is None else f"{array}_{environment['SLURM_ARRAY_TASK_ID']}"
        done = subprocess.run(["scontrol", "requeue", name], capture_output=True, text=True, check=False)
        if done.returncode:
            log.warning("SLURM cannot requeue job %s: %s", name, " ".join(done.stderr.split()))
        else:
            log.warning("requeued job %s", name)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self._listener:
            self.received = signal.Signals(number)
        else:  # a forked child ends
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


class EpochSums(Callback):
    """Keeps the logged sums of an unfinished epoch in the checkpoint, so that the means at the epoch's end cover the
    whole epoch in a resumed run, too. Lightning keeps them in memory only: this class reads its private
    ``trainer.fit_loop.epoch_loop._results``, and tests/lightning/test_resume_epoch.py fails if that changes."""

    def __init__(self) -> None:
        self._pending: dict[str, dict[str, torch.Tensor]] = {}

    def on_save_checkpoint(self, trainer: pl.Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        """Store the sums of every process; none after an epoch's end, when they have been logged."""
        progress = trainer.fit_loop.epoch_progress.current
        if progress.ready == progress.processed:  # type: ignore[attr-defined]  # Lightning annotates the base class
            return
        sums = {
            key: {name: metric.metric_state[name].detach().cpu() for name in metric.metric_state}
            for key, metric in trainer.fit_loop.epoch_loop._results.items()
            if metric.is_tensor and metric.meta.on_epoch and not metric.has_reset
        }
        checkpoint[_SUMS_KEY] = of_all(trainer, sums)

    def on_load_checkpoint(self, trainer: pl.Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        """Keep this process's sums, if the number of processes is the same."""
        states = checkpoint.get(_SUMS_KEY, [])
        self._pending = dict(states[trainer.global_rank]) if len(states) == trainer.world_size else {}

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Add the sums after the first batch, whose logging creates the metrics."""
        results = trainer.fit_loop.epoch_loop._results
        for key in [key for key in self._pending if key in results]:
            metric, before = results[key], self._pending.pop(key)
            for name, value in before.items():
                now = getattr(metric, name)
                both = (value.to(now.device), now)
                if metric.meta.is_max_reduction or metric.meta.is_min_reduction:
                    setattr(metric, name, metric.meta.reduce_fx(*both))
                else:
                    setattr(metric, name, both[0] + both[1])

    def on_train_epoch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Drop sums that were not logged again: their epoch is over."""
        self._pending = {}


class ResumeTable(Callback):
    """Removes rows from ``metrics.csv`` that a killed run wrote after the checkpoint it resumes from."""

    def on_train_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Remove the rows; the step to resume from is known now."""
        for logger in trainer.loggers:
            if isinstance(logger, MetricsTable):
                logger.remove_from(trainer.global_step)
