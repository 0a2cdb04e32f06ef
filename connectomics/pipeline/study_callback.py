"""The callback of a study's rows: what a training costs, and a stop at a rung."""

from __future__ import annotations

import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from connectomics.lightning.schedule import cpu_seconds


class RowCallback(Callback):
    """Adds up the cost of a run over all its starts, and stops it at the end of the epoch that reaches ``until`` steps.

    Such a stop leaves the state of a whole epoch, so the run resumes as if it had not stopped. The learning rate does
    not know of it: the schedule is that of the whole training.

    Attributes:
        cpu_s: CPU seconds of training and validation, of this process and the processes that it started.
        device_s: seconds for which GPUs were held (wall time times GPUs); None on the CPU.
        stopped: whether the run was stopped at ``until``.
    """

    def __init__(self, until: int | None) -> None:
        self.until, self.stopped = until, False
        self.cpu_s = 0.0
        self.device_s: float | None = None
        self._mark, self._gpus = (cpu_seconds(), time.perf_counter()), 0

    def state_dict(self) -> dict[str, Any]:
        """Return the cost so far, for the checkpoint, which may be written within an epoch."""
        self._add()
        return {"cpu_s": self.cpu_s, "device_s": self.device_s}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.cpu_s, self.device_s = state_dict["cpu_s"], state_dict["device_s"]

    def on_fit_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Start the clocks."""
        self._gpus = trainer.num_devices if trainer.strategy.root_device.type == "cuda" else 0
        self._mark = (cpu_seconds(), time.perf_counter())

    def on_train_epoch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Stop if it is time."""
        if self.until is not None and trainer.global_step >= self.until:
            trainer.should_stop = self.stopped = True

    def on_fit_end(self, *args: Any) -> None:
        """Add the cost since the last checkpoint."""
        self._add()

    def _add(self) -> None:
        """Add the cost since the last call."""
        before, self._mark = self._mark, (cpu_seconds(), time.perf_counter())
        self.cpu_s += self._mark[0] - before[0]
        if self._gpus:
            self.device_s = (self.device_s or 0.0) + (self._mark[1] - before[1]) * self._gpus
