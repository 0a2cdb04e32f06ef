"""A block that can never be predicted, on the command line: named, accepted, and known as unknown ever after."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from connectomics.cli import main
from connectomics.config import save_config
from connectomics.config.schema import DataConfig, DatasetConfig, InferenceConfig, ModelConfig, RunConfig
from connectomics.io.artifacts import require_complete
from connectomics.io.multiscale import Multiscale
from connectomics.io.write import write_multiscale
from connectomics.pages.report.library import unknown_lines
from tests.cellmap.roots import grid_of, write_label, zarr_of

SHAPE = (16, 16, 64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two crops of one volume, whose last chunk is broken; a configuration; a checkpoint."""
    from connectomics.lightning.module import ConnectomicsModule

    folder = tmp_path_factory.mktemp("failed")
    values = np.random.default_rng(0).integers(0, 255, SHAPE, dtype=np.uint8)
    raw = zarr_of(folder / "root", "set-a") / "recon-1" / "em" / "fibsem-uint8"
    write_multiscale(raw, values, grid_of(SHAPE), chunks=(16, 16, 16))
    (raw / "s0" / "0" / "0" / "3").write_bytes(b"no chunk")
    labels = np.ones(SHAPE, np.uint8)
    write_label(folder / "root", "set-a", "crop1", "er", labels, grid_of(SHAPE))
    write_label(folder / "root", "set-a", "crop2", "er", labels[..., :16], grid_of((16, 16, 16)))
    config = RunConfig(
        dataset=DatasetConfig(data_root=str(folder / "root"), classes=["er"]),
        model=ModelConfig(architecture="unet", options={"channels": [4, 8], "strides": [2], "num_res_units": 0}),
        data=DataConfig(patch_size=[16, 16, 16], num_workers=0),
        inference=InferenceConfig(block_size=[16, 16, 16], overlap=0.0, context=0),
    )
    save_config(config, folder / "both.yaml")
    save_config(replace(config, dataset=replace(config.dataset, crops=["crop1"])), folder / "one.yaml")
    module = ConnectomicsModule(config)
    content = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(content)
    torch.save(content, folder / "net.ckpt")
    return folder


def predict(folder: Path, out: Path, *more: str, config: str = "one.yaml") -> int:
    command = ["predict", str(folder / config), "--checkpoint", str(folder / "net.ckpt"), "--out", str(out)]
    return main([*command, "--device", "cpu", *more])


def test_the_error_names_the_option_that_goes_on_to_labels_and_their_evaluation(folder, tmp_path, capsys, caplog):
    assert predict(folder, tmp_path / "out") == 1
    said = capsys.readouterr().err
    assert "predict: block 3 at [0 0 384] to [128 128 512] nm failed, attempt 1 of 3: cannot decode" in caplog.text
    assert said.rstrip().endswith("to store this block as unknown, add --accept-failed set-a/crop1:3")

    assert predict(folder, tmp_path / "out", "--accept-failed", "set-a/crop1:3") == 0
    crop = tmp_path / "out" / "set-a.zarr" / "crop1"
    (unknown,) = require_complete(crop)["unknown"]
    assert unknown["box"] == [[0, 0, 384], [128, 128, 512]]
    assert main(["decode", str(tmp_path / "out"), str(tmp_path / "labels"), "decoding.classes.er.threshold=0.0"]) == 0
    assert "set-a/crop1/er: 25 % of the volume was not predicted" in caplog.text
    labels, _ = Multiscale.open(tmp_path / "labels/set-a.zarr/crop1/er").read_level(0, (0, 0, 0), SHAPE)
    assert labels[..., :48].all()
    assert not labels[..., 48:].any()

    result = tmp_path / "evaluation.json"
    assert main(["evaluate", str(tmp_path / "labels"), str(folder / "root"), "--out", str(result)]) == 0
    assert "set-a/crop1/er: 25 % was not predicted" in capsys.readouterr().out
    assert json.loads(result.read_text())["unknown"] == {"set-a/crop1/er": 0.25}
    (line,) = unknown_lines(tmp_path / "labels")
    assert line.startswith("set-a/crop1/er: 25 % was not predicted")


def test_blocks_of_several_crops_are_named_by_crop(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert predict(folder, out, "--accept-failed", "3", config="both.yaml") == 1
    assert "the regions are set-a/crop1, set-a/crop2" in capsys.readouterr().err
    assert not out.exists()
    assert predict(folder, out, "--accept-failed", "crop2:7", config="both.yaml") == 1
    assert "crop2 of set-a has blocks 0 to 0, got 7" in capsys.readouterr().err
    assert predict(folder, out, "--accept-failed", "crop1:x", config="both.yaml") == 1
    assert "--accept-failed takes CROP:12,40" in capsys.readouterr().err
    assert predict(folder, out, "--accept-failed", "crop1:3", config="both.yaml") == 0
    assert "unknown" not in require_complete(out / "set-a.zarr" / "crop2")


def test_a_stored_task_accepts_as_well(folder, tmp_path, capsys):
    assert predict(folder, tmp_path / "out") == 1
    task = str(tmp_path / "out" / "set-a.zarr" / "crop1" / "task.json")
    assert main(["run-task", task, "--device", "cpu", "--accept-failed", "3"]) == 0
    assert require_complete(tmp_path / "out" / "set-a.zarr" / "crop1")["unknown"][0]["block"] == 3


def test_a_log_gets_plain_lines_of_progress(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("connectomics.progress.EVERY", 0.0)
    assert predict(folder, tmp_path / "out", "--accept-failed", "3") == 0
    said = capsys.readouterr().err.splitlines()
    assert "crop1 of set-a, predict ..." in said
    assert any(line.startswith("crop1 of set-a, predict: 4/4 blocks (") for line in said)
    assert not any("\x1b" in line or "\r" in line for line in said), "no bar"
    assert predict(folder, tmp_path / "b", "--accept-failed", "3") == 0
    capsys.readouterr()
    assert main(["-q", "predict", *_words(folder, tmp_path / "c")]) == 0
    assert not any("4/4" in line for line in capsys.readouterr().err.splitlines())


def _words(folder: Path, out: Path) -> list[str]:
    given = [str(folder / "one.yaml"), "--checkpoint", str(folder / "net.ckpt"), "--out", str(out)]
    return [*given, "--device", "cpu", "--accept-failed", "3"]
