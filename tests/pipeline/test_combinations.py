"""Options drawn at random: what trains also resumes with the same numbers, and predicts the same in other blocks and
from its package."""

from __future__ import annotations

import csv
import random
from pathlib import Path

import numpy as np
import pytest

from connectomics.config import RunConfig, load_config
from connectomics.io.multiscale import Multiscale
from connectomics.pipeline.package import write_package
from connectomics.pipeline.predict import predict
from connectomics.pipeline.results import Probabilities
from connectomics.pipeline.train import train

NETWORKS = (
    ("unet", "[16,16,16]", "{channels:[4,8],strides:[2],num_res_units:1,norm:batch}"),
    ("unet_2d", "[1,32,32]", "{features:[4,8],stem:2}"),
    ("unet_2d", "[5,32,32]", "{features:[4,8]}"),
    ("residual_unet", "[16,16,16]", "{strides:[1,2],kernel_size:[3,3]}"),
    ("segresnet", "[16,16,16]", "{init_filters:8}"),
    ("basic_unet", "[32,32,32]", "{features:[4,4,8,8,8,4]}"),
)
#: Each of these is set with a chance of one half; of several, one of them.
SOMETIMES = (
    ["training.ema=0.5", "training.ema=0.9 training.mean_teacher={weight:0.5}"],
    ["model.class_weights=inverse_frequency", "model.class_weights={mito:2}"],
    ["model.loss_options={DiceLoss:{pooled:true}}"],
    [f"model.heads=[{{kind:{kind},class_name:mito}}]" for kind in ("affinities", "boundary", "distance", "lsd")],
    ["model.dropout=0.1"],
    ["model.init_bias=prevalence"],
    ["data.soft_labels=true", "data.label_ties=alternate"],
    ["data.gap_nm={mito:32}"],
    ["data.sampling={instance:1,hard:1}", "data.sampling={class:1}", "data.sampling={uniform:1}"],
    ["data.augmentation={preset:em,strength:1}"],
    ["data.cache=memory", "data.cache=disk"],
    ["optimizer.name=SGD", "optimizer.name=RAdam"],
    ["optimizer.decay_norm_and_bias=false optimizer.layer_decay=0.8"],
    ["training.precision=bf16-mixed"],
    ["training.accumulate_grad_batches=2"],
    ["training.val_score=true"],
    ["checkpoint.every_n_steps=1"],
    ["inference.tta=flips", "inference.tta=section"],
    ["inference.dtype=float16"],
    ["inference.batch_size=3"],
)


def config_of(seed: int, root: Path, folder: Path, *more: str) -> RunConfig:
    chance = random.Random(seed)
    name, patch, options = NETWORKS[seed % len(NETWORKS)]
    chosen = [word for some in SOMETIMES if chance.random() < 0.5 for word in chance.choice(some).split()]
    (folder / "base.yaml").write_text("dataset: {datasets: [phantom-iso], classes: [mito, er, cell]}\n")
    return load_config(folder / "base.yaml", [
        f"dataset.data_root={root}", f"data.cache_dir={folder / 'cache'}", f"model.architecture={name}",
        f"model.options={options}", f"data.patch_size={patch}", f"inference.window={patch}", "training.precision='32'",
        f"inference.overlap={'[0,0.25,0.25]' if name == 'unet_2d' else '0.25'}", "inference.block_size=[64,64,64]",
        "training.max_epochs=2", "data.patches_per_epoch=4", "data.validation_windows=3", "data.num_workers=0",
        "system.accelerator=cpu", "logging.images=false", "logging.use_tensorboard=false", *chosen, *more,
    ])  # fmt: skip


def numbers(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        rows = [
            {k: v for k, v in row.items() if v and k.startswith(("train/loss", "val/"))} for row in csv.DictReader(file)
        ]
    return [row for row in rows if row]


def assert_same(one: Probabilities, other: Probabilities) -> None:
    assert one.arrays == other.arrays
    for dataset, crop, name in one.arrays:
        first, second = (Multiscale.open(p.folder / f"{dataset}.zarr" / crop / name) for p in (one, other))
        whole = ((0, 0, 0), first.grid.shape)
        np.testing.assert_array_equal(first.read_level(0, *whole)[0], second.read_level(0, *whole)[0], err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_options_together(seed: int, phantom: Path, tmp_path: Path) -> None:
    config = config_of(seed, phantom, tmp_path)
    run = train(config, tmp_path / "whole")
    assert all(np.isfinite(float(value)) for row in numbers(run.folder) for value in row.values())
    train(config_of(seed, phantom, tmp_path, "training.max_epochs=1"), tmp_path / "two")
    train(config, tmp_path / "two", resume=True)
    assert numbers(tmp_path / "two") == numbers(run.folder)
    found = predict(run, out=tmp_path / "found", config=config, crops="val")
    blocks = config_of(seed, phantom, tmp_path, "inference.block_size=[32,48,48]")
    assert_same(found, predict(run, out=tmp_path / "blocks", config=blocks, crops="val"))
    package = write_package(run, tmp_path / "run.pytc").path
    assert_same(found, predict(package, out=tmp_path / "package", config=config, crops="val"))
