"""Whole runs: what they leave behind, that they learn, that a resumed one equals one that was never stopped."""

from __future__ import annotations

import csv
import errno
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from connectomics.config import load_config
from connectomics.errors import InputError, WriteError
from connectomics.lightning.checkpoints import read_checkpoint
from connectomics.pipeline.runs import Run
from connectomics.pipeline.train import choose_run_dir, train
from tests.lightning.split_batch_run import step
from tests.lightning.synthetic_run import MadeUpData, tiny_config
from tests.starter import Starter


def table(run_dir: Path, column: str) -> list[float]:
    with (run_dir / "metrics.csv").open() as file:
        return [float(row[column]) for row in csv.DictReader(file) if row.get(column)]


@pytest.fixture(scope="module")
def four_epochs(tmp_path_factory: pytest.TempPathFactory) -> Run:
    config = tiny_config(
        training__max_epochs=4,
        training__accumulate_grad_batches=3,
        scheduler__name="cosine",
        scheduler__warmup_epochs=1,
    )
    return train(config, tmp_path_factory.mktemp("run") / "straight", datamodule=MadeUpData())


class TestWhatIsLeftBehind:
    def test_files(self, four_epochs: Run) -> None:
        run = four_epochs.folder
        assert {p.name for p in run.iterdir()} == {
            "checkpoints",
            "config.yaml",
            "environment.json",
            "metrics.csv",
            "run.log",
            "state.json",
            "tensorboard",
            "timing.json",
        }
        names = sorted(p.name for p in (run / "checkpoints").iterdir())
        assert (names[0], names[-1], len(names)) == ("best.ckpt", "last.ckpt", 5)
        assert all(re.fullmatch(r"epoch000\d-dice0\.\d{4}\.ckpt", name) for name in names[1:-1])  # the best three
        assert load_config(run / "config.yaml").training.max_epochs == 4

    def test_the_result(self, four_epochs: Run) -> None:
        assert four_epochs.epochs == 4
        assert four_epochs.steps == 8  # 4 batches an epoch, 3 accumulated: the last step of an epoch takes 1
        assert four_epochs.checkpoint == four_epochs.folder / "checkpoints" / "best.ckpt"
        assert four_epochs.best == pytest.approx(max(table(four_epochs.folder, "val/dice")))
        best = read_checkpoint(four_epochs.checkpoint)
        assert best["epoch"] == table(four_epochs.folder, "val/dice").index(max(table(four_epochs.folder, "val/dice")))
        assert read_checkpoint(four_epochs.folder / "checkpoints" / "last.ckpt")["epoch"] == 3

    def test_it_learns(self, four_epochs: Run) -> None:
        loss = table(four_epochs.folder, "train/loss")
        assert len(loss) == 4
        assert loss[-1] < loss[0]
        assert table(four_epochs.folder, "val/mito/dice")[-1] > 0.3

    def test_the_learning_rate_is_that_of_the_progress(self, four_epochs: Run) -> None:
        rates = table(four_epochs.folder, "train/lr")
        assert rates[0] == pytest.approx(0.01 * 0.5)  # the mean over the warm-up
        cosine = [sum((1 + math.cos(math.pi * (e + (b + 0.5) / 4) / 3)) / 2 for b in range(4)) / 4 for e in range(3)]
        assert rates[1:] == pytest.approx([0.01 * c for c in cosine], rel=1e-5)

    def test_timing_adds_up(self, four_epochs: Run) -> None:
        times = json.loads((four_epochs.folder / "timing.json").read_text())
        parts = times["data_wait_s"] + times["step_s"] + times["validation_s"] + times["other_s"]
        assert parts == pytest.approx(times["total_s"], abs=0.01)
        assert (times["batches"], times["samples"], times["validations"], times["epochs"]) == (16, 32, 4, 4)

    def test_every_epoch_has_its_speed_and_memory(self, four_epochs: Run) -> None:
        times = json.loads((four_epochs.folder / "timing.json").read_text())
        rows = times["by_epoch"]
        assert [(row["epoch"], row["step"]) for row in rows] == [(0, 2), (1, 4), (2, 6), (3, 8)]
        assert all(row["samples_per_s"] > 0 and row["memory_bytes"] > 50e6 for row in rows)
        assert sum(row["seconds"] for row in rows) <= times["total_s"]
        assert (rows[0]["gpu_memory_bytes"] is None) == (not torch.cuda.is_available())

    def test_tensorboard_has_curves_and_pictures(self, four_epochs: Run) -> None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(four_epochs.folder / "tensorboard"))
        events.Reload()
        assert {"train/loss", "val/dice", "val/er/iou"} <= set(events.Tags()["scalars"])
        assert set(events.Tags()["images"]) == {"val/made_up_crop0", "val/made_up_crop1"}


class StopAfter(pl.Callback):
    """Stands for a killed process: nothing of what Lightning does at an orderly end is done."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == self.epochs and batch_idx == 2:
            raise ArithmeticError("killed")


def test_two_epochs_and_two_resumed_equal_four(
    four_epochs: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With shuffling, dropout, warm-up, cosine and accumulation, and killed in the middle of the third epoch."""
    from connectomics.lightning import trainer as trainer_module

    config = load_config(four_epochs.folder / "config.yaml")
    build = trainer_module.build_trainer
    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "build_trainer", lambda *a, **k: build(*a, **{**k, "callbacks": [StopAfter(2)]}))
        with pytest.raises(ArithmeticError):
            train(config, tmp_path / "run", datamodule=MadeUpData())
    torch.manual_seed(99)  # a new process starts anywhere
    assert choose_run_dir(config, tmp_path / "run" / "checkpoints" / "last.ckpt") == tmp_path / "run"
    result = train(config, tmp_path / "run", checkpoint=tmp_path / "run/checkpoints/last.ckpt", datamodule=MadeUpData())
    assert "other settings" not in caplog.text
    for column in ("train/loss_step", "train/loss", "train/lr", "val/dice", "val/er/iou"):
        assert table(result.folder, column) == table(four_epochs.folder, column), column
    weights = [read_checkpoint(r.folder / "checkpoints/last.ckpt")["state_dict"] for r in (result, four_epochs)]
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name
    timing = json.loads((result.folder / "timing.json").read_text())
    assert timing["epochs"] == 4
    assert [row["epoch"] for row in timing["by_epoch"]] == [0, 1, 2, 3]
    assert result.best == four_epochs.best


def test_max_steps_ends_with_a_validation(tmp_path: Path) -> None:
    config = tiny_config(training__max_steps=3, training__max_epochs=100)
    result = train(config, tmp_path / "run", datamodule=MadeUpData())
    assert result.steps == 3
    assert result.best is not None


def test_fast_dev_run_writes_nothing(tmp_path: Path) -> None:
    result = train(tiny_config(), tmp_path / "run", fast_dev_run=True, datamodule=MadeUpData())
    assert (result.steps, result.checkpoint) == (1, None)
    assert not (tmp_path / "run").exists()


def test_without_validation_crops_the_last_state_is_kept(tmp_path: Path) -> None:
    result = train(tiny_config(checkpoint__save_last=False), tmp_path / "run", datamodule=MadeUpData(crops=0))
    assert result.best is None
    assert result.checkpoint == tmp_path / "run" / "checkpoints" / "last.ckpt"


def test_it_stops_early_when_the_score_stands_still(tmp_path: Path) -> None:
    config = tiny_config(training__max_epochs=9, early_stopping__patience=2, optimizer__lr=0.0)
    result = train(config, tmp_path / "run", datamodule=MadeUpData(patches=2))
    assert result.epochs == 3


def test_steps_of_which_nothing_is_known_do_no_harm(tmp_path: Path) -> None:
    data = MadeUpData(patches=2, batch_size=1, unknown=(0,))
    result = train(tiny_config(), tmp_path / "run", datamodule=data)
    steps = table(result.folder, "train/loss_step")
    assert sorted(s == 0 for s in steps) == [False, False, True, True]
    assert all(math.isfinite(s) for s in steps)
    weights = read_checkpoint(result.folder / "checkpoints/last.ckpt")["state_dict"]
    assert all(torch.isfinite(w).all() for w in weights.values())


@pytest.mark.parametrize("precision", ["bf16-mixed", "32"])
def test_deep_supervision_and_precision(tmp_path: Path, precision: str) -> None:
    config = tiny_config(
        model__architecture="mednext",
        model__options={"init_filters": 4, "blocks_down": [1], "blocks_up": [1], "encoder_expansion_ratio": 2,
                        "decoder_expansion_ratio": 2, "gradient_checkpointing": True},
        model__deep_supervision=True,
        model__mednext_size="S",
        training__precision=precision,
        training__max_epochs=1,
    )  # fmt: skip
    result = train(config, tmp_path / "run", datamodule=MadeUpData(patches=2))
    assert math.isfinite(table(result.folder, "train/loss")[0])


@pytest.mark.parametrize(("number", "remedy"), [(errno.ENOSPC, "free space"), (errno.EFBIG, "raise the limit")])
def test_a_folder_that_cannot_be_written_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, remedy: str
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(WriteError, match=f"{os.strerror(number)}; {remedy} .*and resume"):
        train(tiny_config(), tmp_path / "run", datamodule=MadeUpData(patches=2))
    assert not list((tmp_path / "run").rglob("*.ckpt"))


def test_resuming_with_another_network_is_refused(
    four_epochs: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = load_config(four_epochs.folder / "config.yaml", ["dataset.voxel_size=[16,16,16]", "optimizer.lr=0.5"])
    with pytest.raises(InputError, match=r"has dataset.voxel_size=.*, the configuration .*16"):
        train(config, tmp_path, checkpoint=four_epochs.checkpoint, datamodule=MadeUpData())
    assert re.search(r"resuming with other settings: .*optimizer.lr=0.5 \(0.\d+ before\)", caplog.text)
    config = tiny_config(model__architecture="segresnet", model__options={})
    with pytest.raises(InputError, match=r"holds a unet network .* the configuration a segresnet network"):
        train(config, tmp_path, checkpoint=four_epochs.checkpoint, datamodule=MadeUpData())


class TestRunDir:
    def test_the_next_free_version(self, tmp_path: Path) -> None:
        config = tiny_config()
        config.output_dir, config.name = str(tmp_path), "cellmap_cos7"
        assert choose_run_dir(config) == tmp_path / "cellmap_cos7" / "version_0"
        (tmp_path / "cellmap_cos7" / "version_9").mkdir(parents=True)
        (tmp_path / "cellmap_cos7" / "version_x").mkdir()
        assert choose_run_dir(config) == tmp_path / "cellmap_cos7" / "version_10"

    def test_started_processes_share_the_first_ones(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        config = tiny_config()
        config.output_dir = str(tmp_path)
        first = choose_run_dir(config)
        first.mkdir(parents=True)
        monkeypatch.setenv("LOCAL_RANK", "1")
        assert choose_run_dir(config) == first

    def test_a_stray_checkpoint_gets_a_new_run(self, tmp_path: Path) -> None:
        config = tiny_config()
        config.output_dir = str(tmp_path)
        assert choose_run_dir(config, tmp_path / "some.ckpt") == tmp_path / "run" / "version_0"


def run_script(starter: Starter, name: str, *arguments: object) -> str:
    """What a script of this folder prints when it runs in processes of its own."""
    environment = dict.fromkeys(("LOCAL_RANK", "NODE_RANK", "CONNECTOMICS_RUN_DIR"))
    done = starter.run([Path(__file__).with_name(name), *arguments], environment)
    assert done.status == 0, done.stderr[-3000:]
    return done.stdout


def run_two_processes(starter: Starter, folder: Path, resume: str) -> dict[str, Any]:
    said = run_script(starter, "synthetic_run.py", folder, resume)
    line = next(line for line in said.splitlines() if line.startswith("{"))
    return json.JSONDecoder().raw_decode(line)[0]  # both processes may print on one line


def test_a_batch_in_two_steps_trains_as_the_whole_one(tmp_path: Path) -> None:
    whole = step(tmp_path / "whole", processes=1, accumulate=1)
    accumulated = step(tmp_path / "accumulated", processes=1, accumulate=2)
    torch.testing.assert_close(accumulated, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_batch_in_two_processes_trains_as_the_whole_one(tmp_path: Path, starter: Starter) -> None:
    """Also if a class is known to one of the processes only."""
    whole = step(tmp_path / "whole", processes=1, accumulate=1)
    run_script(starter, "split_batch_run.py", tmp_path / "shared")
    shared = read_checkpoint(tmp_path / "shared" / "checkpoints" / "last.ckpt")["state_dict"]
    torch.testing.assert_close({name: shared[name] for name in whole}, whole, rtol=1e-4, atol=1e-6)


def test_two_processes_on_the_cpu(tmp_path: Path, starter: Starter) -> None:
    """One has nothing known in any patch, the other has the only validation crop; they stay in step."""
    first = run_two_processes(starter, tmp_path, "no")
    run = Path(first["run_dir"])
    assert first["epochs"] == 2
    assert run == tmp_path / "run" / "version_0"  # and no version_1 by the second process
    assert [p.name for p in run.parent.iterdir()] == ["version_0"]
    assert json.loads((run / "timing.json").read_text())["samples"] == 8  # of both
    loss = table(run, "train/loss")
    assert len(loss) == 2
    assert all(math.isfinite(value) and value > 0 for value in loss)
    last = read_checkpoint(run / "checkpoints/last.ckpt")
    assert len(last["connectomics_random_state"]) == 2
    assert last["averaging_state"]["n_averaged"] == 4
    assert all(0 < seconds < 600 for seconds in last["callbacks"]["Schedule"]["spent_s"].values())


@pytest.mark.slow
def test_two_processes_resume(tmp_path: Path, starter: Starter) -> None:
    run = Path(run_two_processes(starter, tmp_path, "no")["run_dir"])
    again = run_two_processes(starter, tmp_path, str(run / "checkpoints" / "last.ckpt"))
    assert again["run_dir"] == str(run)
    assert again["epochs"] == 3
    assert len(table(run, "train/loss")) == 3


def test_what_a_step_logs_does_not_make_the_host_wait_for_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning copies numbers to the device, and reads what it shows in a progress bar after every step."""
    logged, log = [], pl.LightningModule.log

    def checked(self: pl.LightningModule, name: str, value: Any, prog_bar: bool = False, **more: Any) -> None:
        logged.append((name, isinstance(value, torch.Tensor), prog_bar))
        log(self, name, value, prog_bar=prog_bar, **more)

    monkeypatch.setattr(pl.LightningModule, "log", checked)
    train(tiny_config(training__max_epochs=1), tmp_path / "run", datamodule=MadeUpData(crops=0))
    assert {name for name, *_ in logged} >= {"train/loss", "train/loss_step", "train/lr", "train/known"}
    assert all(is_tensor and not prog_bar for _, is_tensor, prog_bar in logged)
