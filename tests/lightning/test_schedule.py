"""Learning rate and end of a training by steps and by time."""

from __future__ import annotations

import math
import multiprocessing
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from connectomics.config import load_config
from connectomics.errors import ConfigError
from connectomics.lightning import schedule
from connectomics.lightning.checkpoints import read_checkpoint
from connectomics.lightning.schedule import Budget, cpu_seconds
from connectomics.pipeline.train import train
from tests.lightning.synthetic_run import MadeUpData, tiny_config
from tests.lightning.test_train import table

ALONE: Any = SimpleNamespace(world_size=1, local_rank=0, is_global_zero=True, strategy=None)


def test_warm_up_by_steps(tmp_path: Path) -> None:
    """Of eight steps, two batches each, the first two warm up."""
    config = tiny_config(
        scheduler__name="cosine", scheduler__warmup_steps=2, training__max_steps=8, training__accumulate_grad_batches=2,
        training__max_epochs=100,
    )  # fmt: skip
    run = train(config, tmp_path / "run", datamodule=MadeUpData())
    rates = [0.01 * step / 2 if step < 2 else 0.005 * (1 + math.cos(math.pi * (step - 2) / 6))
             for step in (batch / 2 + 0.25 for batch in range(16))]  # fmt: skip
    epochs = [sum(rates[n : n + 4]) / 4 for n in range(0, 16, 4)]
    assert table(run.folder, "train/lr") == pytest.approx(epochs, rel=1e-5)


def test_the_last_batches_of_an_epoch_are_a_step(tmp_path: Path) -> None:
    """Four batches are a step of three and one of one, and either can be the last of a training."""
    config = tiny_config(training__max_epochs=9, training__max_steps=2, training__accumulate_grad_batches=3)
    assert train(config, tmp_path / "run", datamodule=MadeUpData()).steps == 2


class Gradients(pl.Callback):
    """Keeps the norm of the gradient at each optimizer step."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: Any) -> None:
        gradients = [weight.grad for weight in module.parameters() if weight.grad is not None]
        self.norms.append(float(torch.nn.utils.get_total_norm(gradients)))


def test_the_gradient_of_fewer_batches_at_the_end_of_an_epoch_is_their_mean(tmp_path: Path) -> None:
    """Of the four batches of an epoch, whether four or seven are accumulated."""
    norms = []
    for accumulated in (4, 7):
        config = tiny_config(training__max_epochs=2, training__accumulate_grad_batches=accumulated)
        found = Gradients()
        train(config, tmp_path / f"run-{accumulated}", datamodule=MadeUpData(), callbacks=[found])
        norms.append(found.norms)
    assert len(norms[0]) == 2
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)


def test_a_training_of_some_seconds_ends_with_the_schedule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stops with a validation, at a rate near 0; resumed it does no further step, and with more time it goes on."""
    monkeypatch.setattr(schedule, "_EVERY_S", 0.0)
    limit = {"training__max_cpu_minutes": 2 / 60, "training__max_minutes": 60.0}
    config = tiny_config(training__max_epochs=10_000, scheduler__name="cosine", logging__use_tensorboard=False, **limit)
    began = cpu_seconds()
    run = train(config, tmp_path / "run", datamodule=MadeUpData())
    assert 1.0 < cpu_seconds() - began < 6.0
    assert 4 < run.steps < 40_000
    assert table(run.folder, "val/dice")
    rates = table(run.folder, "train/lr")
    assert rates[0] > 0.005
    assert rates[-1] < 0.001
    spent = read_checkpoint(run.folder / "checkpoints" / "last.ckpt")["callbacks"]["Schedule"]["spent_s"]
    assert 1.0 < spent["cpu"] < 2.5
    again = train(config, tmp_path / "run", resume=True, datamodule=MadeUpData())
    assert again.steps == run.steps
    config.training.max_cpu_minutes = 3 / 60
    assert train(config, tmp_path / "run", resume=True, datamodule=MadeUpData()).steps > run.steps


def test_the_time_of_a_validation_is_set_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    budget = Budget(max_minutes=1.0, max_cpu_minutes=None)
    budget.start(ALONE)
    for now, share in ((6.0, 0.1), (6.1, 0.1), (30.0, 0.5)):  # 6.1: too soon to read the clock again
        clock[0] = now
        budget.read(ALONE, 0)
        assert budget.share == pytest.approx(share)
    budget.begin_validation()
    clock[0] = 40.0
    budget.end_validation(ALONE)
    assert budget.share == pytest.approx(40 / 50)
    resumed = Budget(max_minutes=2.0, max_cpu_minutes=1.0)
    resumed.load_state_dict(budget.state_dict())
    clock[0] = 1000.0
    resumed.start(ALONE)
    assert resumed.share == pytest.approx(40 / 110)
    clock[0] = 1010.0
    resumed.read(ALONE, 0)
    assert resumed.share == pytest.approx(50 / 110)


def busy(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_processor_time_has_that_of_workers_running_and_ended() -> None:
    began = cpu_seconds()
    worker = multiprocessing.get_context("fork").Process(target=busy, args=(0.5,))
    worker.start()
    worker.join()
    assert 0.5 <= cpu_seconds() - began < 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["scheduler.warmup_steps=2", "scheduler.warmup_epochs=1"], "set one of them to 0"),
        (["training.max_minutes=0"], "training.max_minutes must be above 0"),
        (["training.ema=1"], "training.ema must be below 1"),
    ],
)
def test_wrong_settings(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, *overrides)


def test_time_is_an_end_of_a_schedule() -> None:
    ends = ["scheduler.name=cosine", "training.max_epochs=-1"]
    assert load_config(None, *ends, "training.max_cpu_minutes=30").training.max_cpu_minutes == 30
    with pytest.raises(ConfigError, match="needs an end"):
        load_config(None, *ends)
