"""What a run does beside training: random state, the latest state, pictures, timing, progress, the step limit."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger

from connectomics.data.loader import PatchLoader
from connectomics.lightning.loggers import MetricsTable
from connectomics.lightning.module import ConnectomicsModule
from connectomics.lightning.notice import Notice
from connectomics.lightning.panels import panel

log = logging.getLogger(__name__)

_RANDOM_KEY = "connectomics_random_state"
_SUMS_KEY = "connectomics_epoch_sums"


def _of_all(trainer: pl.Trainer, state: Any) -> list[Any]:
    """The states of all processes, each of which hands in its own."""
    if trainer.world_size == 1:
        return [state]
    gathered: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(gathered, state)
    return gathered


class RandomState(Callback):
    """Keeps the state of all random generators, of every process, in the checkpoint, so that a resumed run goes on as
    if it had not stopped."""

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Every process hands in its state; Lightning calls this in all of them."""
        checkpoint[_RANDOM_KEY] = _of_all(trainer, random_state())

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take this process's state back; with another number of processes than before there is none to take."""
        states = checkpoint.get(_RANDOM_KEY, [])
        if len(states) == trainer.world_size:
            set_random_state(states[trainer.global_rank])
        elif trainer.is_global_zero:
            log.warning(
                "the checkpoint is of %d processes, this run has %d: it goes on with fresh random numbers",
                len(states),
                trainer.world_size,
            )


def random_state() -> dict[str, Any]:
    """State of python's, numpy's and torch's generators in plain values and tensors, which load without unpickling."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """The inverse of `random_state`; states of GPUs that are not here are left out."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available():
        for device, value in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(value.cpu(), device)


class LatestState(ModelCheckpoint):
    """Keeps ``last.ckpt``, the latest state: after each epoch, and every ``every_n_steps`` optimizer steps within one.

    Within an epoch it is written right after an optimizer step, so no gradients are pending, and never after an
    epoch's last step: the state after the validation that follows is the one to keep. The row of ``metrics.csv`` of
    that very step is written next; a process killed in between lacks it.

    A run that is told to end (`Notice`) goes on to the next such moment, keeps its state, and ends as by Ctrl-C.
    """

    def __init__(self, folder: str | Path, every_n_steps: int | None = None) -> None:
        # Lightning's own save_last writes only when a new best was found; to resume, the latest state is needed.
        super().__init__(
            dirpath=str(folder),
            filename="last",
            monitor=None,
            save_top_k=1,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )
        self._every = every_n_steps
        self._notice = Notice()
        self._ends = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen."""
        super().on_train_start(trainer, pl_module)
        self._notice.listen()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save after every so many optimizer steps, or where the run is to end."""
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        last = batch_idx + 1 >= trainer.num_training_batches
        if trainer.should_stop or last or not stepped:
            return
        self._ends = self._notice.reached(trainer)
        due = self._every is not None and trainer.global_step % self._every == 0
        if (due or self._ends) and not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save."""
        super().on_train_epoch_end(trainer, pl_module)
        self._ends = self._notice.reached(trainer)

    # the loggers have written the step's row by then
    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """End before the next batch."""
        self._end(trainer)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End before the next epoch."""
        self._end(trainer)

    def _end(self, trainer: pl.Trainer) -> None:
        if not self._ends:
            return
        if trainer.is_global_zero:
            name = self._notice.received.name if self._notice.received else "a signal to another process"
            log.warning("told to end by %s: the state after step %d is kept", name, trainer.global_step)
            self._notice.requeue()
        raise KeyboardInterrupt


class EpochSums(Callback):
    """Keeps what was logged of an epoch so far in a checkpoint within it, so that the means logged at the epoch's end
    are of the whole epoch also in a resumed run. Lightning keeps it in memory only."""

    def __init__(self) -> None:
        self._pending: dict[str, dict[str, torch.Tensor]] = {}

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Hand in the sums of every process; nothing after an epoch's end, when they have been logged."""
        progress = trainer.fit_loop.epoch_progress.current
        if progress.ready == progress.processed:  # type: ignore[attr-defined]  # Lightning annotates the base class
            return
        sums = {
            key: {name: metric.metric_state[name].detach().cpu() for name in metric.metric_state}
            for key, metric in trainer.fit_loop.epoch_loop._results.items()
            if metric.is_tensor and metric.meta.on_epoch and not metric.has_reset
        }
        checkpoint[_SUMS_KEY] = _of_all(trainer, sums)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take this process's sums back; those of another number of processes cannot be told apart."""
        states = checkpoint.get(_SUMS_KEY, [])
        self._pending = dict(states[trainer.global_rank]) if len(states) == trainer.world_size else {}

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Once the first batch was logged, which makes the metrics, put the sums before it."""
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
        """What was not logged again is of an epoch that is over."""
        self._pending = {}


class EndWorkers(Callback):
    """Ends the loader's workers at once when training is interrupted: Lightning would wait for what they read."""

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Ctrl-C, or an error anywhere."""
        loader = trainer.train_dataloader
        if isinstance(loader, PatchLoader):
            loader.stop()


class StepLimit(Callback):
    """Ends training at ``training.max_steps`` with a validation; Lightning's own limit would end it without one, and a
    run that is resumed from the end of an epoch would go through that epoch's end again."""

    def __init__(self, max_steps: int) -> None:
        self.max_steps = max_steps

    def on_train_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """A run that is resumed may have done all its steps."""
        self.on_train_batch_end(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Ask for the end once the last step is done."""
        if 0 < self.max_steps <= trainer.global_step:
            trainer.should_stop = True


class PicturePanel(Callback):
    """Writes a picture of some validation crops to TensorBoard at each validation, see `panels.panel`."""

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write what the module kept."""
        assert isinstance(pl_module, ConnectomicsModule)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                for plane in pl_module.planes:
                    logger.experiment.add_image(
                        f"val/{plane.name}", panel(plane), global_step=trainer.global_step, dataformats="HWC"
                    )
        pl_module.planes = []


class Timing(Callback):
    """Writes ``timing.json``: where the time of a run goes, in seconds, also over resumed runs.

    ``data_wait_s`` is the time during which the loop waited for the next batch; ``step_s`` forward, backward and
    optimizer (on a GPU as far as the host waits for it, which mixed precision does at each step); ``validation_s``
    whole validations; ``other_s`` the rest (checkpoints, start-up).

    ``by_epoch`` has a row for each epoch: ``epoch`` (from 0), ``step`` (optimizer steps so far), ``seconds`` with its
    validation, ``samples_per_s`` while training, ``data_wait_share``; ``memory_bytes`` of the first process with its
    loader's workers in the middle of the epoch, what they share counted once where the system says (PSS on Linux, else
    the first process alone); ``gpu_memory_bytes``, the most that tensors took on its GPU (null without one).
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
        """For the checkpoint: what was spent so far."""
        return {"totals": self._now(), "counts": dict(self.counts), "by_epoch": list(self.by_epoch)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting; a checkpoint of before rows were kept has none."""
        self.totals, self.counts = dict(state_dict["totals"]), dict(state_dict["counts"])
        self.by_epoch = list(state_dict.get("by_epoch", []))

    def _now(self) -> dict[str, float]:
        running = time.perf_counter() - self._started if self._started else 0.0
        return {**self.totals, "total_s": self.totals["total_s"] + running}

    def _lap(self, name: str) -> None:
        now = time.perf_counter()
        self.totals[name] += now - self._mark
        self._mark = now

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._started = self._mark = time.perf_counter()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """From here the loop waits for its first batch; an epoch that is resumed in its middle has no other start."""
        self._begin_epoch()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """From here the loop waits for its first batch."""
        self._begin_epoch()

    def _begin_epoch(self) -> None:
        self._mark = time.perf_counter()
        self._before = (self._mark, dict(self.totals), dict(self.counts))
        self._memory = None
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The batch is there."""
        self._lap("data_wait_s")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The step is done."""
        self._lap("step_s")
        self.counts["batches"] += 1
        self.counts["samples"] += len(batch["image"]) * trainer.world_size
        # not at the epoch's end, when the loader's workers have gone
        if trainer.is_global_zero and batch_idx == trainer.num_training_batches // 2:
            self._memory = memory_in_use()
            self._mark = time.perf_counter()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A validation begins."""
        self._mark = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A validation is done."""
        self._lap("validation_s")
        self.counts["validations"] += 1

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the file, so that a killed run has it too."""
        self.counts["epochs"] += 1
        self.by_epoch.append(self._row(trainer))
        self.write(trainer)

    def _row(self, trainer: pl.Trainer) -> dict[str, Any]:
        began, totals, counts = self._before
        waited, worked = (self.totals[name] - totals[name] for name in ("data_wait_s", "step_s"))
        loop = waited + worked
        return {
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            "seconds": round(time.perf_counter() - began, 3),
            "samples_per_s": round((self.counts["samples"] - counts["samples"]) / loop, 3) if loop else None,
            "data_wait_share": round(waited / loop, 3) if loop else None,
            "memory_bytes": self._memory,
            "gpu_memory_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        }

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the file with the final numbers."""
        self.write(trainer)

    def write(self, trainer: pl.Trainer) -> None:
        """Write ``timing.json``."""
        if not trainer.is_global_zero:
            return
        times = self._now()
        times["other_s"] = max(0.0, times["total_s"] - sum(v for k, v in times.items() if k != "total_s"))
        loop = times["data_wait_s"] + times["step_s"]
        rates = {"samples_per_s": self.counts["samples"] / loop if loop else 0.0}
        rates["data_wait_share"] = times["data_wait_s"] / loop if loop else 0.0
        content: dict[str, Any] = {name: round(value, 3) for name, value in {**times, **rates}.items()}
        content |= {**self.counts, "by_epoch": self.by_epoch}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(self.path.name + ".part")
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, self.path)


def memory_in_use() -> int:
    """Bytes of this process and its children, what they share counted once; of this process alone where the system
    does not tell shared memory apart."""
    import psutil

    this = psutil.Process()
    try:
        found = int(this.memory_full_info().pss)
    except (AttributeError, psutil.Error):
        return int(this.memory_info().rss)
    for child in this.children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            found += int(child.memory_full_info().pss)
    return found


class PlainProgress(Callback):
    """One line an epoch, and one every half minute within it: for logs, where a bar would only fill the file."""

    def __init__(self, every_s: float = 30.0) -> None:
        self.every_s = every_s
        self._epoch_start = self._last = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock of an epoch that is resumed in its middle: it has no other start."""
        self._epoch_start = self._last = time.perf_counter()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the epoch's clock."""
        self._epoch_start = self._last = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Say where training is, now and then."""
        now = time.perf_counter()
        if now - self._last >= self.every_s and trainer.is_global_zero:
            self._last = now
            self._say(trainer, f"batch {batch_idx + 1}/{trainer.num_training_batches}", ["train/loss_step"], now)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say how the epoch went."""
        if trainer.is_global_zero:
            shown = ["train/loss", "val/dice", "val/iou", "val/score"]
            self._say(trainer, f"step {trainer.global_step}", shown, time.perf_counter())

    def _say(self, trainer: pl.Trainer, where: str, names: list[str], now: float) -> None:
        total = f"/{trainer.max_epochs}" if trainer.max_epochs is not None and trainer.max_epochs > 0 else ""
        values = [f"{n} {float(trainer.callback_metrics[n]):.4f}" for n in names if n in trainer.callback_metrics]
        parts = [f"epoch {trainer.current_epoch + 1}{total}", where, *values, f"{now - self._epoch_start:.1f} s"]
        print("  ".join(parts), flush=True)


class ResumeTable(Callback):
    """Drops from ``metrics.csv`` what a killed run wrote after the checkpoint from which it is resumed."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The step to go on from is known by now."""
        for logger in trainer.loggers:
            if isinstance(logger, MetricsTable):
                logger.forget_from(trainer.global_step)


class BestCheckpoint(Callback):
    """Keeps ``best.ckpt`` beside the numbered checkpoints: the one with the best score so far."""

    def __init__(self, scored: ModelCheckpoint) -> None:
        self.scored = scored
        self._linked = ""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The checkpoints of the epoch before are written."""
        self.link(trainer)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """So are those of the last one."""
        self.link(trainer)

    def link(self, trainer: pl.Trainer) -> None:
        """Make ``best.ckpt`` the best checkpoint: another name for the file, or a copy where the disk has no such."""
        best = Path(self.scored.best_model_path)
        if not trainer.is_global_zero or str(best) in (self._linked, ".") or not best.is_file():
            return
        target, temporary = best.with_name("best.ckpt"), best.with_name("best.ckpt.part")
        temporary.unlink(missing_ok=True)
        try:
            os.link(best, temporary)
        except OSError:
            shutil.copyfile(best, temporary)
        os.replace(temporary, target)
        self._linked = str(best)
