"""The learning rate of each batch and the end of a training: by epochs, optimizer steps, or time."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from typing import Any

import psutil
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from connectomics.config import RunConfig
from connectomics.lightning.devices import of_all
from connectomics.lightning.optim import learning_rate

log = logging.getLogger(__name__)

_EVERY_S = 0.5  # between two readings of the clocks: one reads the table of all processes
_EVERY_BATCHES = 8  # the same for data-parallel runs, whose processes must read them at the same batch


class Schedule(Callback):
    """Sets the learning rate before each batch, and ends training at ``training.max_steps`` or when its time is spent,
    with a validation. Lightning's own limits would skip the validation, and a run resumed from the end of an epoch
    would repeat that end."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.budget = Budget(config.training.max_minutes, config.training.max_cpu_minutes)
        self._batch = 0  # of the epoch

    def state_dict(self) -> dict[str, Any]:
        """Return the time that is spent, for the checkpoint."""
        return self.budget.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.budget.load_state_dict(state_dict)

    def on_fit_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Start the clocks."""
        self.budget.start(trainer)

    def on_train_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Stop if a resumed run has done all its steps, or spent its time."""
        self._stop_at_the_end(trainer)

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        """Set the learning rate from the progress at the middle of this batch."""
        self._batch = batch_idx
        self.budget.read(trainer, batch_idx)
        batches = float(trainer.num_training_batches)
        epoch = trainer.current_epoch + (batch_idx + 0.5) / batches
        scheduler, accumulated = self.config.scheduler, trainer.accumulate_grad_batches
        warm = math.inf
        if scheduler.warmup_epochs:
            warm = epoch / scheduler.warmup_epochs
        elif scheduler.warmup_steps:
            step = trainer.global_step + (batch_idx % accumulated + 0.5) / accumulated
            warm = step / scheduler.warmup_steps
        progress = max(epoch / self._total_epochs(batches), self.budget.share)
        rate = learning_rate(scheduler, self.config.optimizer.lr, warm, progress)
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("lr_scale", 1.0)  # no scale in older checkpoints

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: Any, optimizer: torch.optim.Optimizer) -> None:
        """Make the gradient of an epoch's last batches their mean, if they are fewer than are accumulated: Lightning
        divides by the number to accumulate."""
        batches = (self._batch + 1) % trainer.accumulate_grad_batches
        for weight in module.parameters() if batches else ():
            if weight.grad is not None:
                weight.grad.mul_(trainer.accumulate_grad_batches / batches)

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop after the last optimizer step."""
        last = batch_idx + 1 >= trainer.num_training_batches  # then the batches that are left make a step
        if last or (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._stop_at_the_end(trainer)

    def on_validation_start(self, *args: Any) -> None:
        """Measure the validation."""
        self.budget.begin_validation()

    def on_validation_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Keep the time for one more validation."""
        self.budget.end_validation(trainer)

    def _stop_at_the_end(self, trainer: pl.Trainer) -> None:
        if 0 < self.config.training.max_steps <= trainer.global_step or self.budget.share >= 1:
            trainer.should_stop = True

    def _total_epochs(self, batches: float) -> float:
        """Return the length of the training in epochs: max_epochs or max_steps, whichever ends it first."""
        training = self.config.training
        by_epochs = math.inf if training.max_epochs < 0 else float(training.max_epochs)
        if training.max_steps < 0:
            return by_epochs
        # Lightning also steps on the last batch of an epoch, even if fewer batches were accumulated
        steps_per_epoch = -(-batches // training.accumulate_grad_batches)
        return min(by_epochs, training.max_steps / steps_per_epoch)


class Budget:
    """The time that a training may take, of one or two kinds: ``training.max_minutes`` on the clock, and
    ``training.max_cpu_minutes`` of processor time of all its processes, loader workers included.

    Start-up does not count. The time of the latest validation is set aside, since one follows the last step. A resumed
    run continues with the time that its checkpoint had spent.

    Attributes:
        share: how much of the time for training steps is spent, from 0 to 1; with two kinds the larger one; 0 without
            a limit. All processes of a run have the same number.
    """

    def __init__(self, max_minutes: float | None, max_cpu_minutes: float | None) -> None:
        self.limits = {"clock": 60 * (max_minutes or 0.0), "cpu": 60 * (max_cpu_minutes or 0.0)}
        self.limits = {kind: limit for kind, limit in self.limits.items() if limit}
        self.share = 0.0
        self._spent = dict.fromkeys(self.limits, 0.0)
        self._validation = dict.fromkeys(self.limits, 0.0)
        self._began = dict(self._spent)  # the clocks when this process had spent ``_before``
        self._before = dict(self._spent)
        self._validation_began = dict(self._spent)
        self._last = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return the seconds spent, and those of the latest validation, by kind."""
        return {"spent_s": dict(self._spent), "validation_s": dict(self._validation)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint; a kind that it did not have starts at 0."""
        for own, stored in ((self._before, state["spent_s"]), (self._validation, state["validation_s"])):
            own.update({kind: stored[kind] for kind in self.limits if kind in stored})
        self._spent = dict(self._before)

    def start(self, trainer: pl.Trainer) -> None:
        """Start the clocks."""
        environment = getattr(trainer.strategy, "cluster_environment", None)
        elsewhere = environment is not None and environment.creates_processes_externally  # not children of the first
        self._counts_cpu = trainer.local_rank == 0 or bool(elsewhere)
        self._began = self._clocks()
        self._share()

    def read(self, trainer: pl.Trainer, batch: int) -> None:
        """Read the clocks before a batch, now and then."""
        if not self.limits:
            return
        alone = trainer.world_size == 1
        if time.perf_counter() - self._last < _EVERY_S if alone else batch % _EVERY_BATCHES:
            return
        self._last = time.perf_counter()
        now = self._clocks()
        spent = {kind: self._before[kind] + now[kind] - self._began[kind] for kind in self.limits}
        self._spent = _of_all(trainer, spent)
        self._share()

    def begin_validation(self) -> None:
        """Remember when a validation begins."""
        self._validation_began = self._clocks()

    def end_validation(self, trainer: pl.Trainer) -> None:
        """Set aside the time of this validation for another one."""
        if not self.limits:
            return
        now = self._clocks()
        taken = {kind: now[kind] - self._validation_began[kind] for kind in self.limits}
        self._validation = _of_all(trainer, taken)
        for kind, limit in self.limits.items():
            if self._validation[kind] > limit / 4 and trainer.is_global_zero:
                log.warning(
                    "one validation takes %.0f s of the %.0f s of this training; decrease data.validation_windows",
                    self._validation[kind],
                    limit,
                )
        self._last = 0.0
        self.read(trainer, 0)

    def _share(self) -> None:
        shares = [self._spent[kind] / max(limit - self._validation[kind], 1e-9) for kind, limit in self.limits.items()]
        self.share = min(1.0, max(shares, default=0.0))

    def _clocks(self) -> dict[str, float]:
        """Return this process's clocks, in seconds."""
        found = {}
        if "clock" in self.limits:
            found["clock"] = time.perf_counter()
        if "cpu" in self.limits:
            found["cpu"] = cpu_seconds() if self._counts_cpu else 0.0
        return found


def cpu_seconds() -> float:
    """Return the processor time of this process and all its descendants, in seconds, those included that have ended and
    were waited for (not on macOS, which does not report them)."""
    this = psutil.Process()
    total = 0.0
    for process in (this, *this.children(recursive=True)):
        with contextlib.suppress(psutil.Error):  # it has ended
            total += sum(process.cpu_times()[:4])  # user, system, and both of the children that have ended
    return total


def _of_all(trainer: pl.Trainer, times: dict[str, float]) -> dict[str, float]:
    """Return the same times in all processes: the largest on the clock, the sum of processor times."""
    gathered = of_all(trainer, times)
    return {kind: (max if kind == "clock" else sum)(each[kind] for each in gathered) for kind in times}
