"""The commands that look for a GPU: doctor, plan with its trial, train, predict."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from connectomics.cli import main
from connectomics.config.schema import EngineConfig, InferenceConfig
from connectomics.errors import OutOfMemoryError
from connectomics.io.multiscale import Multiscale
from connectomics.pipeline.predict import predict_cellmap_crops
from connectomics.pipeline.targets import Target, targets_of
from tests.pipeline.test_predict_crops import checkpoint, config_of, predict, root  # noqa: F401

TUTORIALS = Path(__file__).resolve().parents[2] / "tutorials"
BOX = "set-a:0,0,0:384,384,512"


@pytest.mark.gpu
def test_doctor_names_the_gpu(gpu: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", "--at", str(tmp_path)])
    assert torch.cuda.get_device_name(0) in capsys.readouterr().out


@pytest.mark.gpu
def test_plan_finds_the_largest_batch(
    phantom: Path, little_memory: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also the step that ran out of memory has given everything back."""
    assert main(["plan", str(phantom), "--class", "mito", "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("plan_*.yaml")
    found = yaml.safe_load(file.read_text())
    assert found["model"]["architecture"] == "mednext"
    assert found["data"]["batch_size"] >= 1
    assert "a step takes" in capsys.readouterr().out


def test_a_trial_run_of_training(device: str, phantom: Path, tmp_path: Path) -> None:
    accelerator = "gpu" if device == "cuda" else "cpu"
    small = [
        f"dataset.data_root={phantom}", "dataset.datasets=[phantom-iso]", "data.cache=none",
        "data.patch_size=[16,16,16]", "inference.window=[16,16,16]", "data.patches_per_epoch=2", "system.num_gpus=1",
        "model.options={channels: [4, 8], strides: [2], num_res_units: 1}", f"system.accelerator={accelerator}",
        "training.precision=16-mixed", "data.intensity={noise: {prob: 1}, blur: {prob: 1}}",
    ]  # fmt: skip
    command = ["train", str(TUTORIALS / "phantom.yaml"), "--fast-dev-run", "--run-dir", str(tmp_path / "run")]
    assert main([*command, *small]) == 0
    assert not (tmp_path / "run").exists()


def stored(folder: Path) -> np.ndarray:
    return Multiscale.open(folder / "mito").read_level(0, (0, 0, 0), (48, 48, 64))[0].astype(int)


@pytest.mark.parametrize(
    ("where", "workers"),
    [("cpu", 1), *(pytest.param("cuda", n, marks=pytest.mark.gpu) for n in (1, 0))],
)
def test_prediction_on_the_device_is_that_on_the_cpu(
    where: str,
    workers: int,
    root: Path,  # noqa: F811
    checkpoint: Path,  # noqa: F811
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """``workers=0``: a process for each GPU. With a batch that is found by trial, in float32."""
    if where == "cuda":
        request.getfixturevalue("gpu")
    config = config_of(root)
    targets = targets_of(config, box=BOX)
    (reference,) = predict(root, checkpoint, tmp_path / "a", config, targets=targets)
    config = replace(
        config,
        inference=InferenceConfig(block_size=[32, 32, 32], batch_size="auto"),
        engine=EngineConfig(workers=workers),
        training=replace(config.training, precision="32"),
    )
    (found,) = predict(root, checkpoint, tmp_path / "b", config, targets=targets, device=where)
    assert np.abs(stored(found) - stored(reference)).max() <= 3


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_prediction_in_half_precision_is_close(
    gpu: str,
    precision: str,
    root: Path,  # noqa: F811
    checkpoint: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    config = config_of(root)
    targets = targets_of(config, box=BOX)
    (reference,) = predict(root, checkpoint, tmp_path / "a", config, targets=targets)
    half = replace(config, training=replace(config.training, precision=precision))
    (found,) = predict(root, checkpoint, tmp_path / "b", half, targets=targets, device="cuda")
    assert np.abs(stored(found) - stored(reference)).max() <= 8


@pytest.mark.gpu
def test_prediction_that_finds_no_memory_says_so_in_one_line(
    no_memory: None,
    root: Path,  # noqa: F811
    checkpoint: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    config = config_of(root)
    targets: list[Target] = targets_of(config, box=BOX)
    with pytest.raises(OutOfMemoryError, match="memory") as error:
        predict_cellmap_crops(None, config, checkpoint, tmp_path, targets=targets, device="cuda")
    assert "\n" not in str(error.value)
