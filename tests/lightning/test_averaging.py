"""The moving average of weights: its formula, what is validated with it, kept and packaged, and resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor

from connectomics.config import load_config
from connectomics.errors import InputError
from connectomics.lightning import trainer as trainer_module
from connectomics.lightning.checkpoints import load_module, load_network, read_checkpoint
from connectomics.pipeline.runs import Run
from connectomics.pipeline.train import train
from tests.lightning.synthetic_run import MadeUpData, tiny_config
from tests.lightning.test_resume_epoch import assert_same, run
from tests.lightning.test_train import table

BATCH_NORM = {"channels": [4, 8], "strides": [2], "num_res_units": 1, "norm": "batch"}


class States(pl.Callback):
    """Keeps the weights after each optimizer step, and those of each validation."""

    def __init__(self) -> None:
        self.trained: list[dict[str, Tensor]] = []
        self.validated: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        self.trained.append({name: value.clone() for name, value in module.state_dict().items()})

    def on_validation_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        self.validated.append({name: value.clone() for name, value in module.state_dict().items()})


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, States]:
    states = States()
    build = trainer_module.build_trainer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "build_trainer", lambda *a, **k: build(*a, **{**k, "callbacks": [states]}))
        config = tiny_config(training__ema=0.5, model__options=BATCH_NORM)
        run = train(config, tmp_path_factory.mktemp("averaged") / "run", datamodule=MadeUpData(crops=1))
    return run, states


def expected(states: States, decay: float) -> dict[str, Tensor]:
    """The plain formula, step by step."""
    average = {name: value.double() for name, value in states.trained[0].items()}
    for done, weights in enumerate(states.trained[1:], start=1):
        d = min(decay, (1 + done) / (10 + done))
        for name, value in weights.items():
            average[name] = d * average[name] + (1 - d) * value if value.is_floating_point() else value
    return average


def test_classes_are_weighed_by_what_is_measured(tmp_path: Path) -> None:
    """The module gets their weights after the copy for the averages was made; resumed, it gives the same numbers."""
    config = tiny_config(training__ema=0.5, model__options=BATCH_NORM, model__class_weights="inverse_frequency")
    data = [MadeUpData(crops=1) for _ in range(3)]
    for one in data:
        one.present_shares = {"er": 0.5, "mito": 0.02}  # type: ignore[attr-defined]
    train(config, tmp_path / "whole", datamodule=data[0])
    config.training.max_epochs = 1
    train(config, tmp_path / "two", datamodule=data[1])
    config.training.max_epochs = 2
    train(config, tmp_path / "two", datamodule=data[2], resume=True)
    for column in ("train/loss", "val/mito/dice"):
        assert table(tmp_path / "two", column) == table(tmp_path / "whole", column), column


def test_it_is_the_formula_also_for_batch_statistics(averaged: tuple[Run, States]) -> None:
    run, states = averaged
    last = read_checkpoint(run.folder / "checkpoints" / "last.ckpt")
    assert len(states.trained) == 8
    assert any("running_mean" in name for name in last["state_dict"])
    for name, value in expected(states, 0.5).items():
        torch.testing.assert_close(last["state_dict"][name].double(), value.double(), rtol=1e-5, atol=1e-6)
        assert torch.equal(last["current_model_state"][name], states.trained[-1][name]), name


def test_the_averages_are_validated_kept_and_predict(averaged: tuple[Run, States]) -> None:
    run, states = averaged
    for number, file in enumerate(sorted((run.folder / "checkpoints").glob("epoch*.ckpt"))):
        stored = read_checkpoint(file)["state_dict"]
        assert all(torch.equal(stored[name], value) for name, value in states.validated[number].items())
    last = run.folder / "checkpoints" / "last.ckpt"
    stored = read_checkpoint(last)["state_dict"]
    assert not torch.equal(
        stored["network.model.0.conv.unit0.conv.weight"], states.trained[-1]["network.model.0.conv.unit0.conv.weight"]
    )
    for loaded in (load_network(last), load_module(last)):
        assert all(torch.equal(stored[name], value) for name, value in loaded.state_dict().items())


def test_killed_and_resumed_it_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"training__ema": 0.9, "training__max_epochs": 2}
    run(tmp_path / "whole", 0, **changes)
    for die_at in ((0, 6), (1, 4)):
        with pytest.raises(ArithmeticError, match="killed"):
            run(tmp_path / "again", 0, die_at, **changes)
    run(tmp_path / "again", 0, **changes)
    assert_same(tmp_path / "again", tmp_path / "whole")
    found, wanted = (read_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("again", "whole"))
    assert torch.equal(found["averaging_state"]["n_averaged"], wanted["averaging_state"]["n_averaged"])
    for name, value in wanted["current_model_state"].items():
        assert torch.equal(found["current_model_state"][name], value), name


def test_it_does_not_change_the_training(averaged: tuple[Run, States], tmp_path: Path) -> None:
    plain = train(tiny_config(model__options=BATCH_NORM), tmp_path / "plain", datamodule=MadeUpData(crops=1))
    assert table(plain.folder, "train/loss_step") == table(averaged[0].folder, "train/loss_step")
    assert "current_model_state" not in read_checkpoint(plain.folder / "checkpoints" / "last.ckpt")


def test_a_run_resumes_with_what_it_began_with(averaged: tuple[Run, States], tmp_path: Path) -> None:
    last = averaged[0].folder / "checkpoints" / "last.ckpt"
    for key, value in (("training.ema", "0.0"), ("optimizer.decay_norm_and_bias", "false")):
        config = load_config(averaged[0].folder / "config.yaml", f"{key}={value}")
        with pytest.raises(InputError, match=f"{key}=.*use the run's value"):
            train(config, tmp_path / "run", checkpoint=last, datamodule=MadeUpData())
