"""Optimizers and learning-rate schedules by name."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from connectomics.config.schema import OptimizerConfig, SchedulerConfig


def build_optimizer(
    parameters: Iterable[nn.Parameter], config: OptimizerConfig, stages: Mapping[nn.Parameter, int] | None = None
) -> torch.optim.Optimizer:
    """Return the optimizer of a configuration; SGD uses Nesterov momentum.

    With ``decay_norm_and_bias=false``, parameters of one axis, which are biases and the scales of norms, have no weight
    decay. ``stages``: how many stages each parameter is away from the output, for ``layer_decay``. Groups of parameters
    are sorted by stage, those with weight decay first; `Schedule` multiplies the learning rate by their ``lr_scale``.
    """
    found: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for parameter in parameters:
        kind = ((stages or {}).get(parameter, 0), not config.decay_norm_and_bias and parameter.ndim < 2)
        found.setdefault(kind, []).append(parameter)
    groups: list[dict[str, Any]] = [
        {
            "params": found[stage, plain],
            "lr_scale": config.layer_decay**stage,
            **({"weight_decay": 0.0} if plain else {}),
        }
        for stage, plain in sorted(found)
    ]
    if config.name == "SGD":
        return torch.optim.SGD(
            groups,
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            nesterov=config.momentum > 0,
        )
    kinds = {"AdamW": torch.optim.AdamW, "Adam": torch.optim.Adam, "RAdam": torch.optim.RAdam}
    beta1, beta2 = config.betas
    return kinds[config.name](groups, lr=config.lr, betas=(beta1, beta2), weight_decay=config.weight_decay)


def learning_rate(config: SchedulerConfig, lr: float, warm: float, progress: float) -> float:
    """Return the learning rate at a point of training; it depends on progress alone, so a resumed run needs no state.

    During warm-up the rate rises linearly from 0 to ``lr``. After that, with t from 0 to 1 over the rest of the
    training: ``constant`` keeps ``lr``; ``cosine`` goes to ``min_lr`` as (1 + cos(pi t)) / 2; ``polynomial`` as
    (1 - t)^power (nnU-Net's, with power 0.9).

    Args:
        config: the schedule. lr: the highest rate, ``optimizer.lr``.
        warm: progress of the warm-up: 1 at its end, further beyond it, infinite without one.
        progress: share of the training that is done, from 0 to 1.
    """
    if warm < 1:
        return lr * warm
    if config.name == "constant":
        return lr
    before = progress / warm  # the share that the warm-up took, if both progress at an even speed
    t = min(1.0, (progress - before) / max(1 - before, 1e-9))
    shape = (1 + math.cos(math.pi * t)) / 2 if config.name == "cosine" else (1 - t) ** config.power
    return config.min_lr + (lr - config.min_lr) * shape
