"""Ctrl-C: the message is true for each verb, and the command it names for a training resumes it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl

from connectomics.cli import _after_interrupt, main
from connectomics.lightning import trainer as trainer_module
from connectomics.lightning.checkpoints import read_checkpoint
from connectomics.pipeline.runs import open_run
from tests.cellmap.roots import plain_root
from tests.cli.test_cli import fast


class CtrlC(pl.Callback):
    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.current_epoch == self.epoch:
            raise KeyboardInterrupt


@contextmanager
def ctrl_c_in(epoch: int) -> Iterator[None]:
    build = trainer_module.build_trainer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "build_trainer", lambda *a, **k: build(*a, **{**k, "callbacks": [CtrlC(epoch)]}))
        yield


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """Two epochs of one batch, in a folder whose name needs quotes."""
    given = [word for word in fast(plain_root(tmp_path / "root")) if word != "--fast-dev-run"]
    shorter = ["training.max_epochs=2", "data.patches_per_epoch=1", "data.batch_size=1", "data.num_workers=0"]
    return [*given, *shorter, "--run-dir", str(tmp_path / "my run")]


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_the_command_that_is_named_goes_on_with_the_run(
    tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run, last = tmp_path / "my run", tmp_path / "my run/checkpoints/last.ckpt"
    with ctrl_c_in(epoch=0):
        assert main(command) == 130
    assert last_line(capsys) == "interrupted before the first checkpoint: rerun the same command"
    with ctrl_c_in(epoch=1):
        assert main(command) == 130
    assert open_run(run).state.name == "interrupted"
    said = last_line(capsys)
    again = shlex.split(said.removeprefix("interrupted; to resume: pytc "))
    assert again[-4:] == ["--run-dir", str(run), "--checkpoint", str(last)]
    assert read_checkpoint(last)["epoch"] == 0
    assert main(again) == 0
    assert read_checkpoint(last)["epoch"] == 1
    assert open_run(run).state.name == "finished"


def test_one_command_begins_goes_on_and_has_nothing_left_to_do(
    tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """What a batch script needs that SLURM starts again."""
    last = tmp_path / "my run/checkpoints/last.ckpt"
    with ctrl_c_in(epoch=1):
        assert main([*command, "--resume"]) == 130
    assert "it has no checkpoint" in caplog.text
    assert last_line(capsys) == f"interrupted; rerun the same command to resume from {last}"
    for _ in range(2):
        assert main([*command, "--resume"]) == 0
        assert f"resuming {last}" in caplog.text
        assert read_checkpoint(last)["epoch"] == 1
    assert open_run(tmp_path / "my run").epochs == 2
    assert main(command) == 1  # without --resume another run would take its place
    assert "holds a run; resume it with --resume" in last_line(capsys)
    for wrong in (["--checkpoint", str(last)], []):
        where = command if wrong else command[:-2]
        assert main([*where, "--resume", *wrong]) == 1
        assert "--resume" in last_line(capsys)


def test_what_is_said_is_true_for_the_verb() -> None:
    """Which verbs go on is shown by the tests of each; ingest and demo refuse what they find."""
    for verb in ("fetch", "predict", "decode", "measure", "mesh", "run-task", "tune", "export"):
        assert _after_interrupt(["-v", verb, "x"]) == "interrupted; rerun the same command to resume"
    assert "add --resume to --overwrite" in _after_interrupt(["predict", "a.yaml", "--overwrite"])
    for verb in ("evaluate", "score", "report", "plan", "describe"):
        assert "nothing unfinished was kept" in _after_interrupt([verb])
    assert "leave those out" in _after_interrupt(["ingest"])
    assert "--overwrite" in _after_interrupt(["demo"])


def test_a_verb_ends_with_its_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from connectomics.pipeline import evaluate as evaluation

    def pressed(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "evaluate", pressed)
    assert main(["evaluate", "labels", "root"]) == 130
    assert last_line(capsys) == "interrupted; nothing unfinished was kept: rerun the same command"


def test_an_interrupted_ingest_keeps_what_was_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from connectomics.cellmap import ingest

    root = plain_root(tmp_path / "root")
    raw, label = next(root.rglob("fibsem-uint8")), next(root.rglob("mito"))
    raw_only = ["ingest", str(tmp_path / "mine"), "--dataset", "a", "--raw", str(raw)]
    both = [*raw_only, "--labels", f"mito={label}"]
    build = ingest.build_levels

    def pressed(place: Path, *args: Any, **kwargs: Any) -> None:
        if "mito" in Path(place).name:
            raise KeyboardInterrupt
        build(place, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ingest, "build_levels", pressed)
        assert main(both) == 130
    assert "finished ones are kept" in last_line(capsys)
    assert [p.name for p in (tmp_path / "mine").rglob("*mito*")] == []
    assert main(both) == 1
    assert "is there already" in last_line(capsys)
    without = [word for word in both if word not in ("--raw", str(raw))]
    assert main(without) == 0
