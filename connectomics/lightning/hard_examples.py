"""Feeds the loss of patches back to the sampler, for ``data.sampling.hard``."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from connectomics.data.sampling import PatchSampler
from connectomics.errors import ConfigError

_KEPT = 0.8  # of a region's average when one more patch is seen in it


class HardExamples(Callback):
    """Keeps an exponential average of the loss in each region, and gives it to the sampler after each epoch.

    The loss of a patch is that of the classes (with ``model.class_weights``, without heads), counted for the region
    that holds its center. Within an epoch only sums are kept, on the device, so that no step waits; after it, those of
    all processes are added, n patches with the mean loss m change an average a to 0.8^n a + (1 - 0.8^n) m, and the next
    epoch draws by it. So the requests of an epoch are fixed when it begins: they depend on the seed and the losses
    alone, not on the number of workers, and a run that is resumed within an epoch draws the same ones.
    """

    def __init__(self) -> None:
        self._averages: torch.Tensor | None = None  # float64 (R,), NaN where no patch was seen
        self._sums: torch.Tensor | None = None  # float64 (2, R), of this epoch: losses and patches

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Give the averages of the checkpoint, if any, to the sampler."""
        regions = _sampler(trainer).regions
        n = 0 if regions is None else len(regions)
        if self._averages is None or len(self._averages) != n:  # none, or of other crops
            self._averages, self._sums = torch.full((n,), torch.nan, dtype=torch.float64), None
        if self._sums is None or not trainer.is_global_zero:  # the first process has the sums of all
            self._sums = torch.zeros((2, n), dtype=torch.float64)
        self._prefer(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Add the losses of a batch."""
        assert self._sums is not None
        losses = module.sample_losses.double()
        self._sums = self._sums.to(losses.device)
        self._sums.index_add_(1, batch["region"], torch.stack([losses, torch.ones_like(losses)]))

    def on_train_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
        """Update the averages for the next epoch."""
        assert self._sums is not None
        assert self._averages is not None
        total, count = module.of_all_processes(self._sums).cpu()
        mean = total / count.clamp(min=1)
        kept = torch.where(self._averages.isnan(), 0.0, _KEPT**count)
        new = kept * self._averages.nan_to_num() + (1 - kept) * mean
        self._averages = torch.where(count > 0, new, self._averages)
        self._sums.zero_()
        self._prefer(trainer)

    def on_save_checkpoint(self, trainer: pl.Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        """Store the averages, and the sums of an unfinished epoch."""
        if self._sums is not None:
            sums = module.of_all_processes(self._sums).cpu()
            checkpoint[type(self).__name__] = {"averages": self._averages, "sums": sums}

    def on_load_checkpoint(self, trainer: pl.Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        """Restore both."""
        state = checkpoint.get(type(self).__name__)
        if state is not None:
            self._averages, self._sums = state["averages"].clone(), state["sums"].clone()

    def _prefer(self, trainer: pl.Trainer) -> None:
        assert self._averages is not None
        _sampler(trainer).prefer(self._averages.numpy().astype(np.float64))


def _sampler(trainer: pl.Trainer) -> PatchSampler:
    sampler = getattr(trainer.train_dataloader, "sampler", None)
    if not isinstance(sampler, PatchSampler) or sampler.regions is None:
        raise ConfigError(
            "data.sampling.hard needs a loader with a PatchSampler that has regions, as CellMapDataModule makes, got "
            f"{type(sampler).__name__}; remove hard from data.sampling"
        )
    return sampler
