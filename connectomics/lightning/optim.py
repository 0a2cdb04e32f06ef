"""Optimizers and learning-rate schedules by name."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from connectomics.config.schema import OptimizerConfig, RunConfig, SchedulerConfig
from connectomics.errors import ConfigError, unknown_name

OPTIMIZERS = ("AdamW", "Adam", "SGD")
SCHEDULERS = ("constant", "cosine", "polynomial")


def build_optimizer(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer of a configuration over ``parameters``; SGD is with Nesterov momentum.

    Raises `UnknownNameError` for its name, `ConfigError` for values that it cannot take.
    """
    if config.name not in OPTIMIZERS:
        raise unknown_name("optimizer", config.name, OPTIMIZERS, "optimizer.name")
    numbers = {"lr": config.lr, "weight_decay": config.weight_decay, "momentum": config.momentum}
    for key, value in numbers.items():
        if not math.isfinite(value):
            raise ConfigError(f"optimizer.{key} must be a finite number, found {value}")
    if len(config.betas) != 2:
        raise ConfigError(f"optimizer.betas must be two numbers, found {config.betas}")
    beta1, beta2 = config.betas
    try:
        if config.name == "SGD":
            return torch.optim.SGD(
                parameters,
                lr=config.lr,
                momentum=config.momentum,
                weight_decay=config.weight_decay,
                nesterov=config.momentum > 0,
            )
        kind = torch.optim.AdamW if config.name == "AdamW" else torch.optim.Adam
        return kind(parameters, lr=config.lr, betas=(beta1, beta2), weight_decay=config.weight_decay)
    except ValueError as error:
        raise ConfigError(f"optimizer {config.name}: {error}") from error


def check_schedule(config: RunConfig) -> None:
    """Raises `UnknownNameError` or `ConfigError` where the schedule of a run makes no sense."""
    schedule = config.scheduler
    if schedule.name not in SCHEDULERS:
        raise unknown_name("scheduler", schedule.name, SCHEDULERS, "scheduler.name")
    fine = schedule.warmup_epochs >= 0 and 0 < schedule.power < math.inf
    if not fine or not 0 <= schedule.min_lr <= config.optimizer.lr < math.inf:
        raise ConfigError(
            "scheduler needs warmup_epochs >= 0, power > 0 and min_lr from 0 to optimizer.lr, found "
            f"{schedule.warmup_epochs}, {schedule.power} and {schedule.min_lr} (lr {config.optimizer.lr})"
        )
    endless = config.training.max_epochs < 0 and config.training.max_steps < 0
    if endless and schedule.name != "constant":
        raise ConfigError(
            f"scheduler {schedule.name!r} needs an end: set training.max_epochs or training.max_steps, or take "
            "scheduler.name=constant"
        )


def learning_rate(config: SchedulerConfig, lr: float, epoch: float, epochs: float) -> float:
    """The learning rate at a point of training: a function of progress alone, so that a resumed run needs no state.

    Args:
        config: which schedule.
        lr: the highest rate, ``optimizer.lr``.
        epoch: progress in epochs, fractional, from 0.
        epochs: length of the whole training in epochs, may be infinite for ``constant``.

    Over ``warmup_epochs`` the rate rises linearly from 0 to ``lr``. After that, with t from 0 to 1 over the remaining
    epochs: ``constant`` keeps ``lr``; ``cosine`` goes to ``min_lr`` as (1 + cos(pi t)) / 2; ``polynomial`` as
    (1 - t)^power (nnU-Net's, with power 0.9).
    """
    if epoch < config.warmup_epochs:
        return lr * epoch / config.warmup_epochs
    if config.name == "constant":
        return lr
    t = min(1.0, (epoch - config.warmup_epochs) / max(epochs - config.warmup_epochs, 1e-9))
    shape = (1 + math.cos(math.pi * t)) / 2 if config.name == "cosine" else (1 - t) ** config.power
    return config.min_lr + (lr - config.min_lr) * shape
