"""Average the weights of a run over its steps: validate, keep and package the averages."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class AveragedWeights(WeightAveraging):
    """Keeps an exponential moving average (EMA) of parameters and buffers, such as the statistics of batch
    normalization; buffers of whole numbers are copied.

    After optimizer step n + 1 (n from 1) the average moves by ``1 - d`` toward the weights, where ``d`` is the smaller
    of ``decay`` and (1 + n) / (10 + n): at first it follows the weights closely, as TensorFlow's
    ``ExponentialMovingAverage`` does with its number of updates.

    Lightning's base class validates with the averages, stores them as a checkpoint's ``state_dict``, which prediction
    and packages read, and stores the weights that training continues with as ``current_model_state``. Every process of
    a data-parallel run has the same weights, so it has the same averages.
    """

    def __init__(self, decay: float, device: str | None = None) -> None:
        """``decay``: from 0 to below 1. ``device``: where the averages are, None: where the module is at first."""
        super().__init__(device=device)
        self.decay = decay

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Copy the module."""
        super().setup(trainer, pl_module, stage)
        if self._average_model is not None:
            self._average_model.module.eval()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Copy the buffers that the module got in its setup, which comes later: weights of classes."""
        if self._average_model is not None:
            copy = self._average_model.module
            missing = set(dict(pl_module.named_buffers())) - set(dict(copy.named_buffers()))
            for owner, _, name in (buffer.rpartition(".") for buffer in missing):
                value = getattr(pl_module.get_submodule(owner), name)
                setattr(copy.get_submodule(owner), name, value.to(next(copy.parameters()).device, copy=True))

    @property
    def network(self) -> nn.Module:
        """The network with the averages, in evaluation mode; the teacher of ``training.mean_teacher``."""
        assert self._average_model is not None, "training has begun"
        return self._average_model.module.get_submodule("network")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the averages after an optimizer step; Lightning's method makes each step wait for a GPU."""
        done, average = self._latest_update_step, self._average_model
        if average is None or trainer.global_step <= done:
            return
        decay = min(self.decay, (1 + done) / (10 + done)) if done else 0.0
        moved, copied = ([list[Tensor](), list[Tensor]()] for _ in range(2))
        for both in zip(*(chain(of.parameters(), of.buffers()) for of in (average.module, pl_module)), strict=True):
            for kept, tensor in zip(moved if decay and both[0].is_floating_point() else copied, both, strict=True):
                kept.append(tensor.detach().to(both[0].device))
        if moved[0]:
            get_ema_multi_avg_fn(decay)(moved[0], moved[1], done)
        if copied[0]:
            torch._foreach_copy_(copied[0], copied[1])
        average.n_averaged += 1
        self._latest_update_step = trainer.global_step
