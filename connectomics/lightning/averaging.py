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
        if self._average_model is not None:  # each step reads the number of updates, and should not wait for a GPU
            self._average_model.n_averaged = self._average_model.n_averaged.cpu()
            self._average_model.module.eval()

    @property
    def network(self) -> nn.Module:
        """The network with the averages, in evaluation mode; the teacher of ``training.mean_teacher``."""
        assert self._average_model is not None, "training has begun"
        return self._average_model.module.get_submodule("network")

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any, **keywords: Any) -> None:
        """Move the averages after an optimizer step; Lightning's own method copies the number of updates to the device,
        which makes each step wait for a GPU."""
        done = self._latest_update_step
        if trainer.global_step <= done:
            return
        assert self._average_model is not None, "training has begun"
        decay = min(self.decay, (1 + done) / (10 + done)) if self._average_model.n_averaged else 0.0
        kinds: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        both = (chain(of.parameters(), of.buffers()) for of in (self._average_model.module, module))
        for average, weight in zip(*both, strict=True):
            for tensors, tensor in zip(kinds.setdefault(average.dtype, ([], [])), (average, weight), strict=True):
                tensors.append(tensor.detach().to(average.device))
        for dtype, (averages, weights) in kinds.items():
            if decay and dtype.is_floating_point:
                get_ema_multi_avg_fn(decay)(averages, weights, done)
            else:
                torch._foreach_copy_(averages, weights)
        self._average_model.n_averaged += 1
        self._latest_update_step = trainer.global_step
