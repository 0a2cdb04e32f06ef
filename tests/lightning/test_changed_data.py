"""A run resumes on the data that it began with, wherever they are now, and on no other."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from connectomics.cli import main
from connectomics.config import RunConfig, load_config, save_config
from connectomics.data.datamodule import CellMapDataModule
from connectomics.data.splits import Split
from connectomics.errors import ConfigError, InputError
from connectomics.pipeline.train import train
from tests.cellmap.roots import GROUND_TRUTH, grid_of, write_label, write_raw, zarr_of
from tests.cli.small_way import pytc
from tests.s3_server import FolderServer

SHAPE = (20, 24, 24)


def write_crop(root: Path, crop: str, start: int, depth: int = 8, seed: int = 0) -> Path:
    label = np.random.default_rng(seed).integers(0, 2, (depth, 16, 16)).astype(np.uint8)
    shutil.rmtree(zarr_of(root, "set-a") / GROUND_TRUTH / crop, ignore_errors=True)
    return write_label(root, "set-a", crop, "mito", label, grid_of(SHAPE).crop((start, 4, 4), label.shape))


def write_values(root: Path, seed: int = 0, dataset: str = "set-a") -> None:
    values = np.random.default_rng(seed).integers(10, 250, SHAPE).astype(np.uint8)
    shutil.rmtree(zarr_of(root, dataset) / "recon-1/em", ignore_errors=True)
    write_raw(root, dataset, values, grid_of(SHAPE))


def config_of(root: Path | str, cache: Path | None, *changes: str) -> RunConfig:
    config = RunConfig()
    config.system.accelerator, config.system.num_cpus = "cpu", 1
    config.dataset.data_root, config.dataset.classes, config.dataset.train_val_split = str(root), ["mito"], 0.5
    config.model.architecture = "unet"
    config.model.options = {"channels": [4, 8], "strides": [2], "num_res_units": 1}
    config.data.patch_size, config.data.patches_per_epoch, config.data.num_workers = [8, 8, 8], 4, 0
    config.data.cache, config.data.cache_dir = ("none", "") if cache is None else ("disk", str(cache))
    config.data.intensity_range = [0, 255]
    config.training.precision, config.training.max_epochs = "32", 1
    config.logging.use_tensorboard = config.logging.images = False
    return config


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_values(tmp_path / "root")
    for crop, start in (("crop1", 0), ("crop2", 12)):
        write_crop(tmp_path / "root", crop, start, seed=start)
    return tmp_path / "root"


def seen(config: RunConfig, folder: Path) -> CellMapDataModule:
    folder.mkdir(exist_ok=True)
    data = CellMapDataModule(config, folder)
    data.setup("fit")
    return data


# -- what is another data set ------------------------------------------------------------------------------------------
def other_voxels(root: Path) -> None:
    write_crop(root, "crop2", 12, seed=99)


def other_shape(root: Path) -> None:
    write_crop(root, "crop2", 12, depth=6, seed=12)


def other_meaning(root: Path) -> None:
    attrs = zarr_of(root, "set-a") / GROUND_TRUTH / "crop2/mito/.zattrs"
    attrs.write_text(attrs.read_text().replace('"absent": 0', '"absent": 1').replace('"present": 1', '"present": 0'))


def other_raw(root: Path) -> None:
    write_values(root, seed=5)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize(
    ("change", "what"),
    [
        (other_voxels, "labels of set-a/crop2"),
        (other_shape, "labels of set-a/crop2"),
        (other_meaning, "labels of set-a/crop2"),
        (other_raw, "raw of set-a/crop"),
    ],
)
def test_a_changed_crop_stops_it(
    root: Path, tmp_path: Path, change: Callable[[Path], None], what: str, cached: bool
) -> None:
    config = config_of(root, tmp_path / "cache" if cached else None)
    state = seen(config, tmp_path / "run").state_dict()
    change(root)
    with pytest.raises(InputError, match=what) as error:
        seen(config, tmp_path / "run").load_state_dict(state)
    assert f"model.weights={tmp_path / 'run'}" in str(error.value)
    others = {"crop1", "raw of"} if what.startswith("labels") else {"labels of"}
    assert not any(other in str(error.value) for other in others)


# -- another split -----------------------------------------------------------------------------------------------------
def test_an_edited_split_is_noticed(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_crop(root, "crop3", 12, seed=3)
    config, file = config_of(root, None), tmp_path / "run/split.yaml"
    file.parent.mkdir()
    Split(("set-a/crop1", "set-a/crop3"), ()).save(file)
    state = seen(config, file.parent).state_dict()
    seen(config, file.parent).load_state_dict(state)
    assert "split was edited" not in caplog.text
    Split(("set-a/crop1",), ()).save(file)
    seen(config, file.parent).load_state_dict(state)
    assert "the split was edited after the run began: set-a/crop3 is trained on only now, or no longer" in caplog.text
    Split(("set-a/crop1",), ("set-a/crop3",)).save(file)
    with pytest.raises(ConfigError, match="split was edited after the run began, and set-a/crop3 is validated on only"):
        seen(config, file.parent).load_state_dict(state)


# -- what is the same data set -----------------------------------------------------------------------------------------
def moved(root: Path, to: Path) -> None:
    root.rename(to)


def copied_with_times(root: Path, to: Path) -> None:
    shutil.copytree(root, to)
    shutil.rmtree(root)


def copied(root: Path, to: Path) -> None:
    shutil.copytree(root, to, copy_function=shutil.copyfile)
    shutil.rmtree(root)


def touched(root: Path, to: Path) -> None:
    root.rename(to)
    for file in to.rglob("*"):
        os.utime(file, (1e9, 1e9))


@pytest.mark.parametrize("change", [moved, copied_with_times, copied, touched])
@pytest.mark.parametrize("cached", [True, False])
def test_a_moved_or_copied_root_is_the_same(
    root: Path, tmp_path: Path, change: Callable[[Path, Path], None], cached: bool
) -> None:
    cache = tmp_path / "cache" if cached else None
    state = seen(config_of(root, cache), tmp_path / "run").state_dict()
    change(root, tmp_path / "there")
    now = seen(config_of(tmp_path / "there", cache), tmp_path / "run")
    now.load_state_dict(state)
    assert now.state_dict()["seen"].keys() == state["seen"].keys()


def test_settings_that_change_what_is_read_do_not_stop_it(root: Path, tmp_path: Path) -> None:
    """Larger patches read raw farther away; the raw that the run has seen is compared."""
    for cache in (tmp_path / "cache", None):
        config = config_of(root, cache)
        state = seen(config, tmp_path / "run").state_dict()
        config.data.patch_size = [8, 16, 16]
        seen(config, tmp_path / "run").load_state_dict(state)
        write_values(root, seed=7)
        with pytest.raises(InputError, match="the raw of set-a/crop1, the raw of set-a/crop2 changed"):
            seen(config, tmp_path / "run").load_state_dict(state)
        write_values(root)


def test_on_s3_the_objects_count(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with FolderServer(tmp_path) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
        state = seen(config_of("s3://public/root", None), tmp_path / "run").state_dict()
        root.rename(tmp_path / "there")
        config = config_of("s3://public/there", None)
        seen(config, tmp_path / "run").load_state_dict(state)
        other_voxels(tmp_path / "there")
        with pytest.raises(InputError, match="the labels of set-a/crop2 changed"):
            seen(config, tmp_path / "run").load_state_dict(state)


def test_raw_without_labels_counts_too(root: Path, tmp_path: Path) -> None:
    config = config_of(root, tmp_path / "cache")
    config.training.mean_teacher.weight, config.training.mean_teacher.datasets = 0.1, ["set-b"]
    config.training.ema = 0.9
    write_values(root, dataset="set-b")
    state = seen(config, tmp_path / "run").state_dict()
    copied(root, tmp_path / "there")
    config.dataset.data_root = str(tmp_path / "there")
    seen(config, tmp_path / "run").load_state_dict(state)
    write_values(tmp_path / "there", seed=5, dataset="set-b")
    with pytest.raises(InputError, match="cannot resume: the raw of set-b/raw1 changed after"):
        seen(config, tmp_path / "run").load_state_dict(state)


# -- a run -------------------------------------------------------------------------------------------------------------
def test_a_run_does_not_resume_on_other_labels(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of(root, tmp_path / "cache")
    save_config(config, tmp_path / "run.yaml")
    train(config, tmp_path / "run")
    words = ["train", tmp_path / "run.yaml", "--run-dir", tmp_path / "run"]
    pytc(*words, "--resume", "training.max_epochs=2")
    checkpoint = tmp_path / "run/checkpoints/last.ckpt"
    before = checkpoint.read_bytes()
    other_voxels(root)
    capsys.readouterr()
    for how in (["--resume"], ["--checkpoint", checkpoint]):
        assert main([str(word) for word in (*words, *how, "training.max_epochs=3")]) == 1
        (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error:"))
        assert line.startswith("error: cannot resume: the labels of set-a/crop2 changed after the run began")
        assert checkpoint.read_bytes() == before
    new = ["--run-dir", tmp_path / "new", f"model.weights={tmp_path / 'run'}"]
    pytc("train", tmp_path / "run.yaml", *new)
    assert load_config(tmp_path / "new/config.yaml").training.max_epochs == 1
