"""The time of a run by activity, and progress lines for logs."""

from __future__ import annotations

import contextlib
import json
import math
import time
from pathlib import Path
from typing import Any

import psutil
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, RichProgressBar

from connectomics.io.write import write_file


class Timing(Callback):
    """Writes ``timing.json``: the time of a run in seconds, summed over resumed runs.

    ``data_wait_s``: waiting for the next batch; ``step_s``: forward, backward and optimizer (on a GPU, as long as the
    host waits for it, which mixed precision does at each step); ``validation_s``; ``other_s``: checkpoints, start-up.

    ``by_epoch`` has a row per epoch: ``epoch`` (from 0), ``step`` (optimizer steps so far), ``seconds`` including
    validation, ``samples_per_s`` while training, ``data_wait_share``, ``memory_bytes`` of the first process and its
    loader workers in the middle of the epoch (shared memory counted once on Linux, else the first process alone),
    ``gpu_memory_bytes``: peak of the tensors on its GPU (null without one).
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.totals = {"total_s": 0.0, "data_wait_s": 0.0, "step_s": 0.0, "validation_s": 0.0}
        self.counts = {"batches": 0, "samples": 0, "validations": 0, "epochs": 0}
        self.by_epoch: list[dict[str, Any]] = []
        self._started = self._mark = 0.0
        self._before = (0.0, dict(self.totals), dict(self.counts))  # at the epoch's start
        self._memory: int | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the time spent so far, for the checkpoint."""
        return {"totals": self._now(), "counts": dict(self.counts), "by_epoch": list(self.by_epoch)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint; older ones have no rows by epoch."""
        self.totals, self.counts = dict(state_dict["totals"]), dict(state_dict["counts"])
        self.by_epoch = list(state_dict.get("by_epoch", []))

    def _now(self) -> dict[str, float]:
        running = time.perf_counter() - self._started if self._started else 0.0
        return {**self.totals, "total_s": self.totals["total_s"] + running}

    def _add_time(self, name: str) -> None:
        now = time.perf_counter()
        self.totals[name] += now - self._mark
        self._mark = now

    def on_fit_start(self, *args: Any) -> None:
        """Start the clock."""
        self._started = self._mark = time.perf_counter()

    def on_train_start(self, *args: Any) -> None:
        """Start an epoch; one that is resumed in its middle has no `on_train_epoch_start`."""
        self.on_train_epoch_start()

    def on_train_epoch_start(self, *args: Any) -> None:
        """Start waiting for the first batch."""
        self._mark = time.perf_counter()
        self._before = (self._mark, dict(self.totals), dict(self.counts))
        self._memory = None
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_train_batch_start(self, *args: Any) -> None:
        """Add the wait for the batch."""
        self._add_time("data_wait_s")

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Add the step."""
        self._add_time("step_s")
        self.counts["batches"] += 1
        self.counts["samples"] += len(batch["image"]) * trainer.world_size
        # not at the epoch's end, when the loader's workers have ended
        if trainer.is_global_zero and batch_idx == trainer.num_training_batches // 2:
            self._memory = memory_in_use()
            self._mark = time.perf_counter()

    def on_validation_start(self, *args: Any) -> None:
        """Start the clock of a validation."""
        self._mark = time.perf_counter()

    def on_validation_end(self, *args: Any) -> None:
        """Add the validation."""
        self._add_time("validation_s")
        self.counts["validations"] += 1

    def on_train_epoch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Write the file, so that a killed run has it, too."""
        self.counts["epochs"] += 1
        began, totals, counts = self._before
        waited, worked = (self.totals[name] - totals[name] for name in ("data_wait_s", "step_s"))
        loop = waited + worked
        self.by_epoch.append({
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            "seconds": round(time.perf_counter() - began, 3),
            "samples_per_s": round((self.counts["samples"] - counts["samples"]) / loop, 3) if loop else None,
            "data_wait_share": round(waited / loop, 3) if loop else None,
            "memory_bytes": self._memory,
            "gpu_memory_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        })  # fmt: skip
        self.on_fit_end(trainer)

    def on_fit_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Write ``timing.json``."""
        if not trainer.is_global_zero:
            return
        times = self._now()
        times["other_s"] = max(0.0, times["total_s"] - sum(v for k, v in times.items() if k != "total_s"))
        loop = times["data_wait_s"] + times["step_s"]
        times["samples_per_s"] = self.counts["samples"] / loop if loop else 0.0
        times["data_wait_share"] = times["data_wait_s"] / loop if loop else 0.0
        content: dict[str, Any] = {name: round(value, 3) for name, value in times.items()}
        content |= {**self.counts, "by_epoch": self.by_epoch}
        write_file(self.path, (json.dumps(content, indent=2) + "\n").encode())


def memory_in_use() -> int:
    """Return the bytes of this process and its children, shared memory counted once; of this process alone if the
    system does not report shared memory."""
    this = psutil.Process()
    try:
        found = int(this.memory_full_info().pss)
    except (AttributeError, psutil.Error):
        return int(this.memory_info().rss)
    for child in this.children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has ended
            found += int(child.memory_full_info().pss)
    return found


class LossBar(RichProgressBar):
    """Lightning's bar with ``train/loss_step``, read once a second: reading it makes the host wait for a GPU."""

    _read, _loss = -math.inf, math.nan

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """Return what the bar shows."""
        if (now := time.perf_counter()) >= self._read + 1:
            self._read, self._loss = now, float(trainer.callback_metrics.get("train/loss_step", self._loss))
        return {**super().get_metrics(trainer, pl_module), "train/loss_step": self._loss}


class PlainProgress(Callback):
    """Prints one line per epoch, and one every half minute within it, for logs, which a progress bar would fill."""

    def __init__(self, every_s: float = 30.0) -> None:
        self.every_s = every_s
        self._epoch_start = self._last = 0.0

    def on_train_start(self, *args: Any) -> None:
        """Start the clock; an epoch that is resumed in its middle has no `on_train_epoch_start`."""
        self._epoch_start = self._last = time.perf_counter()

    def on_train_epoch_start(self, *args: Any) -> None:
        """Start the epoch's clock."""
        self.on_train_start()

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Print the progress every ``every_s`` seconds."""
        now = time.perf_counter()
        if now - self._last >= self.every_s and trainer.is_global_zero:
            self._last = now
            self._print(trainer, f"batch {batch_idx + 1}/{trainer.num_training_batches}", ["train/loss_step"], now)

    def on_train_epoch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Print the scores of the epoch."""
        if trainer.is_global_zero:
            shown = ["train/loss", "val/loss", "val/dice", "val/iou", "val/score"]
            self._print(trainer, f"step {trainer.global_step}", shown, time.perf_counter())

    def _print(self, trainer: pl.Trainer, where: str, names: list[str], now: float) -> None:
        total = f"/{trainer.max_epochs}" if trainer.max_epochs is not None and trainer.max_epochs > 0 else ""
        values = [f"{n} {float(trainer.callback_metrics[n]):.4f}" for n in names if n in trainer.callback_metrics]
        parts = [f"epoch {trainer.current_epoch + 1}{total}", where, *values, f"{now - self._epoch_start:.1f} s"]
        print("  ".join(parts), flush=True)
