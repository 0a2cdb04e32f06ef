"""The best checkpoint of a run that is resumed: elsewhere, or from an earlier state than its latest."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from connectomics.lightning.checkpoints import read_checkpoint
from connectomics.pipeline.train import train
from tests.lightning.synthetic_run import MadeUpData, tiny_config


def epochs(folder: Path, until: int, rate: float, checkpoint: str | None = None, keep: int = 1) -> None:
    """Train until an epoch at a learning rate, which is also the score: the smallest is the best."""
    config = tiny_config(
        training__max_epochs=until, optimizer__lr=rate, checkpoint__monitor="train/lr", checkpoint__mode="min",
        checkpoint__save_top_k=keep, early_stopping__patience=0, logging__use_tensorboard=False,
    )  # fmt: skip
    start = None if checkpoint is None else folder / "checkpoints" / checkpoint
    train(config, folder, checkpoint=start, datamodule=MadeUpData(crops=1))


def best_epoch(folder: Path) -> int:
    return int(read_checkpoint(folder / "checkpoints" / "best.ckpt")["epoch"])


def test_a_moved_run_keeps_its_best(tmp_path: Path) -> None:
    epochs(tmp_path / "a", 1, 0.001)
    (tmp_path / "a").rename(tmp_path / "b")
    epochs(tmp_path / "b", 2, 0.01, "last.ckpt")
    assert best_epoch(tmp_path / "b") == 0
    epochs(tmp_path / "b", 3, 0.0001, "last.ckpt")
    assert best_epoch(tmp_path / "b") == 2


@pytest.mark.parametrize("keep", [1, 2])
def test_the_best_of_repeated_epochs_is_not_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture, keep: int) -> None:
    """With two kept, the file of the first epoch is there and the best; with one, the repeated epoch is."""
    epochs(tmp_path, 1, 0.01)
    shutil.copy(tmp_path / "checkpoints/last.ckpt", tmp_path / "checkpoints/early.ckpt")
    epochs(tmp_path, 2, 0.001, "last.ckpt", keep)
    assert best_epoch(tmp_path) == 1
    epochs(tmp_path, 2, 0.02, "early.ckpt", keep)
    best = read_checkpoint(tmp_path / "checkpoints" / "best.ckpt")
    assert best["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(0.01 if keep == 2 else 0.02)
    assert "best.ckpt is of epochs after the resumed state" in caplog.text
    numbered = sorted(file.name for file in (tmp_path / "checkpoints").glob("epoch*"))
    kept = ["epoch0000-lr0.0100.ckpt"] if keep == 2 else []
    assert numbered == [*kept, "epoch0001-lr0.0010.ckpt.discarded", "epoch0001-lr0.0200.ckpt"]
    assert "epoch0001-lr0.0010.ckpt is of an epoch after the resumed state, and is renamed" in caplog.text
