"""The state of a run: a failed or killed one is not taken for whole, and two do not train in one folder."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from connectomics.cli import main
from connectomics.errors import MetadataError, MissingError, WriteError
from connectomics.lightning.run_state import STATE_FILE, RunState, keep_state, latest_checkpoint, state_of
from connectomics.pipeline.runs import find_runs
from connectomics.pipeline.train import train
from tests.cellmap.roots import plain_root
from tests.cli.test_cli import fast
from tests.lightning.synthetic_run import MadeUpData, tiny_config


def test_how_a_run_ended(tmp_path: Path) -> None:
    with keep_state(tmp_path / "a"):
        assert state_of(tmp_path / "a") == RunState("running", f"process {os.getpid()}")
    assert state_of(tmp_path / "a") == RunState("finished")
    with pytest.raises(KeyboardInterrupt), keep_state(tmp_path / "b"):
        raise KeyboardInterrupt
    assert state_of(tmp_path / "b") == RunState("interrupted")
    with pytest.raises(MissingError), keep_state(tmp_path / "c"):
        raise MissingError("no data root\nat x")
    assert state_of(tmp_path / "c") == RunState("failed", "no data root at x")
    with pytest.raises(ZeroDivisionError), keep_state(tmp_path / "c"):
        raise ZeroDivisionError("by zero")
    assert state_of(tmp_path / "c") == RunState("failed", "ZeroDivisionError: by zero")


def test_a_killed_process_cannot_say_so_and_is_seen_to_be_gone(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from connectomics.lightning.run_state import keep_state\n"
        f"with keep_state(Path({str(tmp_path)!r})): print('begun', flush=True); sys.stdin.read(); os.abort()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == b"begun\n"
        assert state_of(tmp_path).name == "running"
        with pytest.raises(WriteError, match=f"process {running.pid} trains in"), keep_state(tmp_path):
            pass
        assert state_of(tmp_path).name == "running"
        running.kill()
        running.wait()
    assert state_of(tmp_path) == RunState("interrupted", "its process was killed")
    with keep_state(tmp_path):  # and another one may go on
        pass
    assert state_of(tmp_path).name == "finished"


def test_what_cannot_be_known_is_said_to_be_unknown(tmp_path: Path) -> None:
    assert state_of(tmp_path).name == "empty"
    (tmp_path / "metrics.csv").touch()
    assert state_of(tmp_path).name == "unknown"
    kept = {"state": "running", "note": "", "pid": os.getpid(), "process_started": 0.0, "host": platform.node()}
    (tmp_path / STATE_FILE).write_text(json.dumps(kept))
    assert state_of(tmp_path).name == "interrupted"  # another process got the number
    kept |= {"host": "node17", "process_started": psutil.Process().create_time()}
    (tmp_path / STATE_FILE).write_text(json.dumps(kept))
    assert state_of(tmp_path) == RunState("unknown", "started on node17; its end was not seen")
    (tmp_path / STATE_FILE).write_text("{")
    with pytest.raises(MetadataError, match="does not hold the state of a run"):
        state_of(tmp_path)


def test_a_run_that_fails_at_once_is_listed_as_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [word for word in fast(plain_root(tmp_path / "root")) if word != "--fast-dev-run"]
    failing = [*given, f"dataset.data_root={tmp_path / 'nowhere'}", "--run-dir", str(tmp_path / "runs/bad")]
    assert main(failing) == 1
    train(tiny_config(training__max_epochs=1), tmp_path / "runs/good", datamodule=MadeUpData())
    (tmp_path / "runs/empty").mkdir()
    (tmp_path / "runs/empty/config.yaml").write_text("name: x\n")
    states = {run.folder.name: run.state.name for run in find_runs(tmp_path / "runs")}
    assert states == {"bad": "failed", "good": "finished", "empty": "empty"}
    capsys.readouterr()
    assert main(["runs", str(tmp_path / "runs")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if "runs/bad " in line and " failed " in line]
    assert [line for line in said if line.startswith(f"{tmp_path / 'runs/bad'}: failed: ") and "no data root" in line]
    assert main(["runs", "--json", str(tmp_path / "runs")]) == 0
    assert {run["state"] for run in json.loads(capsys.readouterr().out)["runs"]} == set(states.values())


def test_the_checkpoint_to_go_on_from(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    assert latest_checkpoint(tmp_path) is None
    folder.mkdir()
    for age, name in enumerate(("epoch0001.ckpt", "epoch0000.ckpt")):
        (folder / name).touch()
        os.utime(folder / name, (1e9 - age, 1e9 - age))
    assert latest_checkpoint(tmp_path) == folder / "epoch0001.ckpt"
    (folder / "last.ckpt").touch()
    os.utime(folder / "last.ckpt", (1, 1))
    assert latest_checkpoint(tmp_path) == folder / "last.ckpt"
