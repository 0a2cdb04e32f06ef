"""Optimizers and learning-rate schedules by name."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from connectomics.config.schema import OptimizerConfig, SchedulerConfig


def build_optimizer(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Return the optimizer of a configuration; SGD uses Nesterov momentum."""
    if config.name == "SGD":
        return torch.optim.SGD(
            parameters,
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            nesterov=config.momentum > 0,
        )
    kind = torch.optim.AdamW if config.name == "AdamW" else torch.optim.Adam
    beta1, beta2 = config.betas
    return kind(parameters, lr=config.lr, betas=(beta1, beta2), weight_decay=config.weight_decay)


def learning_rate(config: SchedulerConfig, lr: float, epoch: float, epochs: float) -> float:
    """Return the learning rate at a point of training; it depends on progress alone, so a resumed run needs no state.

    Over ``warmup_epochs`` the rate rises linearly from 0 to ``lr``. After that, with t from 0 to 1 over the remaining
    epochs: ``constant`` keeps ``lr``; ``cosine`` goes to ``min_lr`` as (1 + cos(pi t)) / 2; ``polynomial`` as
    (1 - t)^power (nnU-Net's, with power 0.9).

    Args:
        config: the schedule. lr: the highest rate, ``optimizer.lr``. epoch: progress in epochs, fractional, from 0.
        epochs: length of the training in epochs; may be infinite for ``constant``.
    """
    if epoch < config.warmup_epochs:
        return lr * epoch / config.warmup_epochs
    if config.name == "constant":
        return lr
    t = min(1.0, (epoch - config.warmup_epochs) / max(epochs - config.warmup_epochs, 1e-9))
    shape = (1 + math.cos(math.pi * t)) / 2 if config.name == "cosine" else (1 - t) ** config.power
    return config.min_lr + (lr - config.min_lr) * shape
