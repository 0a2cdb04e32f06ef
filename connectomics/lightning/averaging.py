"""Average the weights of a run over its steps: validate, keep and package the averages."""

from __future__ import annotations

from collections.abc import Sequence
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
        super().__init__(device=device, multi_avg_fn=self._update)
        self.decay = decay

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Copy the module."""
        super().setup(trainer, pl_module, stage)
        if self._average_model is not None:  # each step reads the number of updates: on a GPU it would make it wait
            self._average_model.n_averaged = self._average_model.n_averaged.cpu()
            self._average_model.module.eval()

    @property
    def network(self) -> nn.Module:
        """The network with the averages, in evaluation mode; the teacher of ``training.mean_teacher``."""
        assert self._average_model is not None, "training has begun"
        return self._average_model.module.get_submodule("network")

    def _update(self, averages: Sequence[Tensor], weights: Sequence[Tensor], count: Any) -> None:
        if not averages[0].is_floating_point():
            for average, weight in zip(averages, weights, strict=True):
                average.copy_(weight)
            return
        done = self._latest_update_step  # without waiting for a GPU, as ``count`` would
        decay = min(self.decay, (1 + done) / (10 + done))
        get_ema_multi_avg_fn(decay)(list(averages), list(weights), torch.tensor(done))
