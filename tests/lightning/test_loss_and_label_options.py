"""A run with the options of losses, labels and sampling together, on the phantom."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest
import torch

from connectomics.config import RunConfig, load_config, tutorial
from connectomics.data.datamodule import CellMapDataModule
from connectomics.data.patches import collate
from connectomics.errors import ConfigError, UnknownNameError
from connectomics.lightning.module import ConnectomicsModule
from connectomics.models.batch_labels import labels_of
from connectomics.models.gaps import with_gaps
from connectomics.models.losses import build_loss, weigh_classes
from connectomics.pipeline.train import train


def config_of(root: Path, out: Path, *more: str) -> RunConfig:
    return load_config(tutorial("phantom"), [
        f"dataset.data_root={root}", f"data.cache_dir={out / 'cache'}", "data.num_workers=0",
        "data.patches_per_epoch=4", "training.max_epochs=2", "data.patch_size=[16,16,16]", "data.batch_size=2",
        "inference.window=[16,16,16]", "inference.block_size=[64,64,64]", "system.accelerator=cpu",
        "dataset.datasets=[phantom-iso]", "dataset.classes=[mito,er,cell]", "model.architecture=unet",
        "model.options={channels:[4,8],strides:[2],num_res_units:1}", "model.deep_supervision=false",
        "data.validation_windows=4", "logging.images=false", *more,
    ])  # fmt: skip


ALL = (
    "model.loss_functions=[DiceLoss,BoundaryBCELoss]", "model.loss_weights=[1,1]",
    "model.loss_options={DiceLoss:{squared:true,pooled:true},BoundaryBCELoss:{width_nm:32}}",
    "model.class_weights=inverse_frequency", "data.label_ties=alternate", "data.soft_labels=true",
    "data.gap_nm={mito:32}", "data.gap_state=unknown", "data.sampling={instance:1,hard:1}",
)  # fmt: skip


def test_all_of_them_train(phantom: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "connectomics")
    run = train(config_of(phantom, tmp_path, *ALL), tmp_path / "run")
    assert run.steps == 4
    assert run.checkpoint is not None
    assert "weights of classes in the loss: mito" in caplog.text
    module = ConnectomicsModule.load_from_checkpoint(run.checkpoint)
    assert module.loss.class_weights is None  # measured in training only


def test_measured_weights_are_those_of_the_training_crops(phantom: Path, tmp_path: Path) -> None:
    config = config_of(phantom, tmp_path, *ALL)
    data = CellMapDataModule(config)
    data.setup("fit")
    counts = [volume.counts for volume in data.train_dataset.volumes]
    for name in config.dataset.classes:
        rows = [c[name] for c in counts if c is not None]
        share = sum(r["present"] for r in rows) / sum(r["present"] + r["absent"] for r in rows)
        assert math.isclose(data.present_shares[name], share, rel_tol=0.25, abs_tol=2e-3), name  # another voxel size
    loss = build_loss(["DiceLoss"])
    weigh_classes(loss, config, data.present_shares)
    assert loss.class_weights is not None
    assert math.isclose(float(loss.class_weights.mean()), 1, rel_tol=1e-5)
    assert torch.argmax(loss.class_weights) == min(range(3), key=lambda c: list(data.present_shares.values())[c])
    with pytest.raises(ConfigError, match="present_shares"):
        weigh_classes(loss, config, {})


def test_gaps_are_made_of_the_ids_of_the_batch(phantom: Path, tmp_path: Path) -> None:
    config = config_of(phantom, tmp_path, "data.gap_nm={cell:64}")
    data = CellMapDataModule(config)
    data.setup("fit")
    sampler = data.sampler()
    batch = collate([data.train_dataset.reader.read(sampler.request(0, n)) for n in range(3)])
    labels = labels_of(batch)
    gapped = with_gaps(labels, batch, config)
    assert batch["ids"].shape[1] == 1
    for channel in range(3):
        (before, known), (after, seen) = labels.of(channel), gapped.of(channel)
        assert torch.equal(known, seen)
        assert (after <= before).all()
        assert channel == 2 or torch.equal(before, after)
    assert all(not volume.instances for volume in data.val_volumes)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.class_weights={mitt:2}", r"class 'mitt' in model\.class_weights.*did you mean 'mito'"),
        ("data.gap_nm={mitt:8}", r"class 'mitt' in data\.gap_nm.*did you mean 'mito'"),
    ],
)
def test_an_unknown_class_is_named(phantom: Path, tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UnknownNameError, match=message):
        train(config_of(phantom, tmp_path, override), tmp_path / "run")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.class_weights=inverse", "model.class_weights must be inverse_frequency, or numbers by class"),
        ("model.class_weights={mito:-1}", "model.class_weights must be inverse_frequency, or numbers by class"),
        ("model.class_weight_cap=0.5", "model.class_weight_cap must be at least 1"),
        ("data.gap_nm={mito:0}", "data.gap_nm must be lengths above 0"),
        ("data.label_ties=even", "data.label_ties.*present, alternate"),
    ],
)
def test_bad_values_are_one_line(phantom: Path, tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(phantom, tmp_path, override)


def test_weights_by_class_are_set_with_one_override(phantom: Path, tmp_path: Path) -> None:
    module = ConnectomicsModule(config_of(phantom, tmp_path, "model.class_weights.er=2"))
    assert module.loss.class_weights is not None
    assert module.loss.class_weights.tolist() == [1.0, 2.0, 1.0]
