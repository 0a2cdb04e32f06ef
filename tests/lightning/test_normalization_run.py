"""Normalization belongs to the model: a run measures it once and keeps it; what is made with the model uses that."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from connectomics import load_model
from connectomics.config import RunConfig, load_config
from connectomics.errors import InputError, UnknownNameError
from connectomics.inference.predict_task import PredictTask
from connectomics.io.normalization import Normalization
from connectomics.lightning.checkpoints import checkpoint_config, load_module, read_checkpoint
from connectomics.lightning.module import CHECKPOINT_KEY
from connectomics.pipeline.package import write_package
from connectomics.pipeline.predict import predict_cellmap_crops
from connectomics.pipeline.runs import Run
from connectomics.pipeline.train import train
from tests.cellmap.roots import grid_of, write_label, write_raw

SHAPE = (24, 32, 40)


def add(root: Path, dataset: str, low: float, high: float) -> None:
    rng = np.random.default_rng(0)
    values = rng.uniform(low, high, SHAPE)
    write_raw(root, dataset, values.astype(np.uint8), grid_of(SHAPE))
    for crop, start in (("crop1", 0), ("crop2", 12)):
        label = (values[start : start + 12] < (low + high) / 2).astype(np.uint8)
        grid = grid_of(SHAPE).crop((start, 0, 0), (12, *SHAPE[1:]))
        write_label(root, dataset, crop, "mito", label, grid)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    root = tmp_path_factory.mktemp("root")
    add(root, "set-a", 60, 200)
    add(root, "set-b", 200, 230)
    config = RunConfig()
    config.system.accelerator, config.system.num_cpus = "cpu", 1
    config.dataset.data_root, config.dataset.classes = str(root), ["mito"]
    config.dataset.datasets = ["set-a", "set-b"]
    config.dataset.train_val_split = 0.5
    config.model.architecture = "unet"
    config.model.options = {"channels": [4, 8], "strides": [2], "num_res_units": 1}
    config.data.patch_size, config.data.patches_per_epoch, config.data.num_workers = [16, 16, 16], 4, 0
    config.training.precision, config.training.max_epochs = "32", 1
    config.logging.use_tensorboard = False
    return config


@pytest.fixture(scope="module")
def run(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(config, tmp_path_factory.mktemp("run"))


def normalization_of(folder: Path) -> Normalization:
    return PredictTask.load(folder / "task.json").normalization


def predict(config: RunConfig, checkpoint: Path | list[Path], out: Path, *datasets: str) -> list[Normalization]:
    chosen = replace(config, dataset=replace(config.dataset, datasets=list(datasets), crops=["crop1"]))
    found = predict_cellmap_crops(None, chosen, checkpoint, out, device="cpu")
    return [normalization_of(folder) for folder in found]


def test_training_keeps_it_in_the_run_and_the_checkpoint(config: RunConfig, run: Run) -> None:
    assert run.checkpoint is not None
    kept = load_config(run.folder / "config.yaml").data.normalization
    assert set(kept) == {"set-a", "set-b"}
    assert (kept["set-b"]["low"], kept["set-b"]["high"]) == pytest.approx((200, 229), abs=1)
    assert kept["set-a"]["origin"].startswith("its raw")
    assert checkpoint_config(read_checkpoint(run.checkpoint), run.checkpoint).data.normalization == kept
    assert load_module(run.checkpoint, config).config.data.normalization == kept
    assert config.data.normalization == {}, "what was given stays as it is"
    model = load_model(run.checkpoint)
    low, high = model.normalization("set-b").input([0, 255])
    assert low == pytest.approx(-kept["set-b"]["mean"] / kept["set-b"]["std"])
    assert high == pytest.approx((1 - kept["set-b"]["mean"]) / kept["set-b"]["std"])
    with pytest.raises(UnknownNameError, match="did you mean 'set-a'"):
        model.normalization("set-aa")


def test_prediction_uses_what_the_model_knows_and_says_so(
    config: RunConfig, run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert run.checkpoint is not None
    kept = load_config(run.folder / "config.yaml").data.normalization
    add(Path(config.dataset.data_root), "set-c", 20, 90)
    with caplog.at_level(logging.INFO, "connectomics"):
        of_b, of_c = predict(config, run.checkpoint, tmp_path, "set-b", "set-c")
    assert of_b == Normalization.from_dict(kept["set-b"])
    assert of_c.range == pytest.approx((20, 89), abs=1)
    said = [r.getMessage() for r in caplog.records if "raw" in r.getMessage()]
    assert any("set-b: raw 200 to 229" in line and "from the model (its raw: percentiles" in line for line in said)
    assert any(line.startswith("set-c: raw 20 to 89") and "from its raw" in line for line in said)
    other = replace(config, data=replace(config.data, intensity_range=[0, 255]))
    caplog.clear()
    assert predict(other, run.checkpoint, tmp_path / "pair", "set-b")[0].range == (0, 255)
    (warned,) = (r.getMessage() for r in caplog.records if r.levelno == logging.WARNING)
    assert "set-b: data.intensity_range asks for raw 0 to 255, but the network was trained with 200 to 229" in warned


def test_a_resumed_run_measures_nothing_again(
    config: RunConfig, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from connectomics.data import normalization

    assert run.checkpoint is not None
    monkeypatch.delattr(normalization, "choose")
    longer = replace(config, training=replace(config.training, max_epochs=2))
    assert run.last_checkpoint is not None
    again = train(longer, tmp_path / "again", checkpoint=run.last_checkpoint)
    assert load_config(again.folder / "config.yaml").data.normalization == load_config(
        run.folder / "config.yaml"
    ).data.normalization  # fmt: skip


def test_a_package_has_it(config: RunConfig, run: Run, tmp_path: Path) -> None:
    assert run.checkpoint is not None
    package = write_package(run.checkpoint, tmp_path / "model.pytc")
    kept = load_config(run.folder / "config.yaml").data.normalization
    assert package.about["normalization"] == kept
    (used,) = predict(config, package.path, tmp_path, "set-b")
    assert used == Normalization.from_dict(kept["set-b"])


def test_a_checkpoint_of_before_is_used_as_it_was_trained(config: RunConfig, run: Run, tmp_path: Path) -> None:
    assert run.checkpoint is not None
    content = torch.load(run.checkpoint, weights_only=True)
    content[CHECKPOINT_KEY]["format"] = 1
    del content[CHECKPOINT_KEY]["config"]["data"]["normalization"]
    torch.save(content, tmp_path / "old.ckpt")
    assert predict(config, tmp_path / "old.ckpt", tmp_path, "set-b") == [Normalization(0, 255)]


def test_networks_that_see_raw_differently_are_not_averaged(config: RunConfig, run: Run, tmp_path: Path) -> None:
    assert run.checkpoint is not None
    content = torch.load(run.checkpoint, weights_only=True)
    content[CHECKPOINT_KEY]["config"]["data"]["normalization"]["set-b"]["high"] = 250.0
    name = next(iter(content["state_dict"]))
    content["state_dict"][name] = content["state_dict"][name] + 1
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(InputError, match="different normalizations of set-b"):
        predict(config, [run.checkpoint, tmp_path / "other.ckpt"], tmp_path, "set-b")
    assert len(predict(config, [run.checkpoint, tmp_path / "other.ckpt"], tmp_path, "set-a")) == 1
