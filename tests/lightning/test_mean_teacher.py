"""The mean teacher: its formulas, its two views, which raw it takes, and runs with it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from connectomics.config import RunConfig, load_config
from connectomics.data.datamodule import CellMapDataModule
from connectomics.data.patches import centered
from connectomics.errors import ConfigError, InputError, UnknownNameError
from connectomics.lightning.checkpoints import load_module, read_checkpoint
from connectomics.lightning.mean_teacher import MeanTeacher, consistency, ramp
from connectomics.lightning.module import ConnectomicsModule
from connectomics.models.batch_labels import labels_of
from connectomics.pipeline.runs import Run
from connectomics.pipeline.train import train
from tests.lightning.synthetic_run import MadeUpData, tiny_config
from tests.lightning.test_pretraining import config_of, losses

ON = ("training.mean_teacher.weight=20", "training.mean_teacher.ramp_steps=0", "training.mean_teacher.confidence=0.5")


# -- formulas ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("step", "steps", "value"),
    [(0, 100, math.exp(-5)), (50, 100, math.exp(-1.25)), (100, 100, 1), (700, 100, 1), (0, 0, 1)],
)
def test_the_ramp(step: int, steps: int, value: float) -> None:
    assert ramp(step, steps) == pytest.approx(value)


def test_only_sure_voxels_with_raw_count() -> None:
    chances = torch.tensor([[0.95, 0.05, 0.85, 0.15, 0.99, 0.5]]).view(1, 1, 1, 1, 6)
    teacher = torch.cat([torch.logit(chances), torch.zeros_like(chances)], 1).requires_grad_()  # the second is unsure
    student = torch.zeros_like(teacher).requires_grad_()
    raw = torch.tensor([True, True, True, True, False, True]).view(1, 1, 1, 6)
    found = consistency(student, teacher, raw, 0.9)
    assert found.loss.item() == pytest.approx(2 * 0.45**2 / 10)  # 5 voxels with raw, 2 classes
    assert found.confident.item() == pytest.approx(2 / 10)
    found.loss.backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert student.grad[0, 0].flatten().tolist() == pytest.approx([-0.0225, 0.0225, 0, 0, 0, 0])
    assert not student.grad[0, 1].any()
    assert consistency(student, teacher, torch.zeros_like(raw), 0.9).loss.item() == 0  # no raw


class Probe(nn.Module):
    """Keeps what it sees."""

    def forward(self, image: Tensor) -> Tensor:
        self.seen = image
        return image.new_zeros((len(image), 2, *image.shape[2:]))


def test_the_student_sees_other_intensities_at_the_same_places() -> None:
    config = tiny_config(training__ema=0.5)
    config.training.mean_teacher.weight, config.training.mean_teacher.strength = 1.0, 0.0
    config.data.intensity = {"shifted_sections": {"prob": 1.0}, "invert": {"prob": 1.0}, "noise": None}
    codes = torch.ones((3, 16, 16, 16), dtype=torch.uint8)
    image = torch.rand((3, 1, 16, 16, 16), generator=torch.Generator().manual_seed(1))
    image[:, :, 12:] = 0.4  # nothing there
    codes[:, 12:] = 0
    table = torch.tensor([[[False, True]]]).expand(3, 1, 2)
    batch = {
        "image": image, "codes": codes, "present": table, "known_states": table, "seed": torch.tensor([3, 4, 5]),
        "mean": torch.full((3,), 0.4), "std": torch.full((3,), 0.2),
    }  # fmt: skip
    student, teacher = Probe(), Probe()
    found = MeanTeacher(config)(batch, student, teacher)
    assert torch.equal(teacher.seen, centered(batch)["image"])
    assert not student.seen[:, :, 12:].any()
    inverted = centered({**batch, "image": 1 - image})["image"]
    assert torch.allclose(student.seen[:, :, :12], inverted[:, :, :12], atol=1e-5)  # and not shifted
    assert float(found.confident) == 0  # both say 0.5
    assert float(found.loss) == 0
    config.data.intensity = {}
    MeanTeacher(config)(batch, student, teacher)
    assert torch.equal(student.seen, teacher.seen)
    config.training.mean_teacher.strength = 2.0
    MeanTeacher(config)(batch, student, teacher)
    assert not torch.equal(student.seen, teacher.seen)


# -- which raw ---------------------------------------------------------------------------------------------------------
def data_of(config: RunConfig) -> CellMapDataModule:
    data = CellMapDataModule(config)
    data.setup("fit")
    return data


def test_raw_around_crops_counts_and_that_of_validation_crops_does_not(phantom: Path) -> None:
    data = data_of(config_of(phantom, *ON))
    assert data._unlabeled is not None
    volumes = data._unlabeled.volumes
    assert {volume.dataset for volume in volumes} == {"phantom-iso"}
    part = next(v for v in volumes if all(v.crop.box.contains(other.crop.box) for other in data.val_volumes))
    label = part.label_codes(part.grid).dense()[1][0]
    excluded = torch.zeros(label.shape, dtype=torch.bool)
    for volume in data.val_volumes:
        excluded[part.grid.slices(volume.crop.box)] = True
    assert excluded.any()
    assert torch.equal(torch.from_numpy(~label), excluded)
    crops = sum(v.grid.size for v in data.train_dataset.volumes)
    assert label.sum() > 2 * crops  # most of it is raw without labels
    other = data_of(config_of(phantom, *ON, "training.mean_teacher.datasets=[phantom-aniso]"))
    assert other._unlabeled is not None
    assert {volume.dataset for volume in other._unlabeled.volumes} == {"phantom-aniso"}
    assert set(other.normalization) == {"phantom-iso", "phantom-aniso"}
    assert other.normalization["phantom-iso"] == data.normalization["phantom-iso"]
    with pytest.raises(UnknownNameError, match=r"phantom-is'.*training.mean_teacher.datasets"):
        data_of(config_of(phantom, *ON, "training.mean_teacher.datasets=[phantom-is]"))


def test_the_labeled_patches_are_those_of_a_run_without_and_workers_change_nothing(phantom: Path) -> None:
    base = ("data.augmentation={preset: em, strength: 1.0}", "data.patches_per_epoch=6")
    off, on = (list(data_of(config_of(phantom, *base, *more)).train_dataloader()) for more in ((), ON))
    apart = list(data_of(config_of(phantom, *base, *ON, "data.num_workers=1")).train_dataloader())
    assert len(off) == len(on) == len(apart) == 3
    for plain, paired, from_worker in zip(off, on, apart, strict=True):
        assert plain.keys() == paired.keys() - {"unlabeled"}
        assert all(torch.equal(value, paired[name]) for name, value in plain.items())
        unlabeled = paired["unlabeled"]
        assert unlabeled["image"].shape == plain["image"].shape
        assert not torch.equal(unlabeled["image"], plain["image"])
        assert all(torch.equal(value, from_worker["unlabeled"][name]) for name, value in unlabeled.items())
    places = torch.cat([batch["unlabeled"]["seed"] for batch in on])
    assert len(places.unique()) == 6


# -- runs --------------------------------------------------------------------------------------------------------------
def run_of(phantom: Path, folder: Path, *changes: str, **arguments: Any) -> Run:
    short = ("training.max_epochs=2", "data.patches_per_epoch=14", "model.dropout=0.0")
    return train(config_of(phantom, *short, *changes), folder, **arguments)


@pytest.fixture(scope="module")
def on(phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_of(phantom, tmp_path_factory.mktemp("on") / "run", *ON, "checkpoint.every_n_steps=3")


@pytest.fixture(scope="module")
def off(phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_of(phantom, tmp_path_factory.mktemp("off") / "run")


def weights(run: Run) -> dict[str, Tensor]:
    states = read_checkpoint(run.last_checkpoint)
    return {f"{key}/{n}": v for key in ("state_dict", "current_model_state") for n, v in states[key].items()}


def test_without_weight_nothing_changes(phantom: Path, off: Run, on: Run, tmp_path: Path) -> None:
    others = [
        run_of(phantom, tmp_path / "a", "training.mean_teacher.strength=0.3", "training.mean_teacher.ramp_steps=5"),
        run_of(phantom, tmp_path / "b", *ON, "training.mean_teacher.weight=1e-30"),  # too small for float32
    ]
    for run in others:
        assert all(torch.equal(value, weights(run)[name]) for name, value in weights(off).items())
    assert not all(torch.equal(value, weights(on)[name]) for name, value in weights(off).items())
    assert losses(off, "val/dice") == losses(others[1], "val/dice")
    assert "train/consistency" not in (off.folder / "metrics.csv").read_text().splitlines()[0]


def test_it_makes_the_network_agree_with_itself_under_changes_of_intensity(phantom: Path, off: Run, on: Run) -> None:
    """On new patches; both runs saw the same labeled patches."""
    config = config_of(phantom, *ON, "system.seed=7")
    batches = [batch["unlabeled"] for batch in data_of(config).train_dataloader()]
    teacher = MeanTeacher(config)
    found = {}
    for name, run in (("off", off), ("on", on)):
        network = load_module(run.last_checkpoint).network
        found[name] = sum(teacher(batch, network, network).loss.item() for batch in batches) / len(batches)
    assert found["on"] < 0.7 * found["off"]


def test_what_is_logged(on: Run) -> None:
    weight, loss, total = (losses(on, f"train/{name}") for name in ("consistency_weight", "consistency", "loss"))
    assert weight == [20, 20]
    assert losses(on, "train/confident") == [1, 1]  # at a confidence of 0.5
    assert all(value > 0 for value in loss)
    parts = [
        sum(values) for values in zip(losses(on, "train/DiceLoss"), losses(on, "train/BCEWithLogitsLoss"), strict=True)
    ]
    for whole, labeled, share in zip(total, parts, loss, strict=True):
        assert whole == pytest.approx(labeled + 20 * share, rel=1e-4)


class Killed(pl.Callback):
    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) == (1, 5):
            raise ArithmeticError("killed")


def test_killed_within_an_epoch_and_resumed_it_is_the_same_bit_for_bit(phantom: Path, on: Run, tmp_path: Path) -> None:
    settings = (*ON, "checkpoint.every_n_steps=3")
    with pytest.raises(ArithmeticError):
        run_of(phantom, tmp_path / "run", *settings, callbacks=[Killed()])
    run = run_of(phantom, tmp_path / "run", *settings, resume=True)
    assert all(torch.equal(value, weights(run)[name]) for name, value in weights(on).items())
    for column in ("train/consistency", "train/loss", "val/dice"):
        assert losses(run, column) == losses(on, column), column


def test_what_it_needs(phantom: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"needs averaged weights.*set training.ema"):
        load_config(None, "training.mean_teacher.weight=1")
    config = tiny_config(training__ema=0.5)
    config.training.mean_teacher = replace(config.training.mean_teacher, weight=1.0)
    with pytest.raises(InputError, match="patches without labels"):
        train(config, tmp_path / "run", datamodule=MadeUpData())
    config = config_of(phantom, *ON)
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, limit_val_batches=0)
    with pytest.raises(InputError, match="needs the callback AveragedWeights"):
        trainer.fit(ConnectomicsModule(config), data_of(config))


def test_the_batches_of_a_run_have_raw(phantom: Path) -> None:
    """Parts of raw are boxes around what is stored: nearly all of a patch counts, but not the validation crops."""
    batches = [batch["unlabeled"] for batch in data_of(config_of(phantom, *ON)).train_dataloader()]
    shares = [float(labels_of(batch).of(0)[1].float().mean()) for batch in batches]
    assert min(shares) >= 0
    assert 0.5 < sum(shares) / len(shares) <= 1
