"""A run that is killed in the middle of an epoch and resumed is, bit for bit, the run that nothing disturbed."""

from __future__ import annotations

import csv
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from connectomics.lightning.checkpoints import read_checkpoint
from connectomics.lightning.run_state import state_of
from tests.lightning.resume_run import BATCHES, run
from tests.starter import Starter

ROOT = Path(__file__).resolve().parents[2]
#: what depends on the steps alone; timing does not
COLUMNS = ("train/loss_step", "train/loss", "train/known", "train/lr", "val/dice", "data/mito/patches", "step", "epoch")


def trained_on(folder: Path) -> list[list[Any]]:
    """The patches of every batch in order: of what was done twice, the last time."""
    rows: dict[tuple[int, int], list[Any]] = {}
    for line in (folder / "diary.txt").read_text().splitlines():
        row = json.loads(line)
        rows[row[1], row[2]] = row
    return [rows[key] for key in sorted(rows)]


def table(folder: Path, column: str) -> list[str]:
    with (folder / "metrics.csv").open() as file:
        return [row[column] for row in csv.DictReader(file) if row.get(column)]


def assert_same(found: Path, expected: Path) -> None:
    assert trained_on(found) == trained_on(expected)
    for column in COLUMNS:
        assert table(found, column) == table(expected, column), column
    states = [read_checkpoint(folder / "checkpoints" / "last.ckpt") for folder in (found, expected)]
    for name, value in states[1]["state_dict"].items():
        assert torch.equal(states[0]["state_dict"][name], value), name
    assert states[0]["global_step"] == states[1]["global_step"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    run(folder, workers=0)
    return folder


def test_the_undisturbed_run(undisturbed: Path) -> None:
    """What the others are compared with: three epochs of seven batches, each patch as the sampler has it."""
    places = [place for row in trained_on(undisturbed) for place in row[3]]
    assert places == [[epoch, position] for epoch in range(3) for position in range(2 * BATCHES)]
    assert table(undisturbed, "train/loss_step") != []
    assert len(table(undisturbed, "train/loss")) == 3
    assert read_checkpoint(undisturbed / "checkpoints" / "last.ckpt")["global_step"] == 12


#: killed at (epoch, batch), resumed from step 3 (batch 5 of epoch 0), 6 (batch 3 of epoch 1, twice), 8 (end of epoch 1)
KILLS = (((0, 6), 3), ((1, 4), 6), ((1, 6), 6), ((2, 1), 8))


# starting workers takes seconds each time
@pytest.mark.parametrize(("workers", "kills"), [(0, KILLS), (2, KILLS[1:2])], ids=["alone", "two workers"])
def test_killed_and_resumed_again_and_again(undisturbed: Path, tmp_path: Path, workers: int, kills: Any) -> None:
    folder = tmp_path / "run"
    for die_at, step in kills:
        with pytest.raises(ArithmeticError, match="killed"):
            run(folder, workers, die_at)
        assert read_checkpoint(folder / "checkpoints" / "last.ckpt")["global_step"] == step
    run(folder, workers)
    assert_same(folder, undisturbed)


@pytest.mark.slow
def test_a_process_that_is_killed_goes_on_with_other_workers(
    undisturbed: Path, tmp_path: Path, starter: Starter
) -> None:
    folder = tmp_path / "run"
    done = starter.run(["-m", "tests.lightning.resume_script", folder, "1", "1", "5", "SIGKILL"], cwd=ROOT)
    assert done.status == -signal.SIGKILL, done.stderr[-3000:]
    assert len(list((folder / "checkpoints").glob("last*"))) == 1  # no half-written one beside it
    torch.manual_seed(99)
    run(folder, workers=0)
    assert_same(folder, undisturbed)


def test_with_a_limit_of_steps(tmp_path: Path) -> None:
    """Killed within an epoch, and at the begin of the third; the last epoch ends early, and resuming does no step."""
    changes = {"training__max_steps": 10, "training__max_epochs": 5}
    run(tmp_path / "whole", 0, **changes)
    for die_at in ((1, 4), (2, 1)):
        with pytest.raises(ArithmeticError, match="killed"):
            run(tmp_path / "again", 0, die_at, **changes)
    for _ in range(2):
        run(tmp_path / "again", 0, **changes)
        assert_same(tmp_path / "again", tmp_path / "whole")
    further = changes | {"training__max_steps": 13}
    run(tmp_path / "again", 0, **further)
    assert trained_on(tmp_path / "again")[-1][:3] == [12, 3, 5]
    assert trained_on(tmp_path / "again")[-6][3] == [[3, 0], [3, 1]]  # epoch 2 stays as short as it was


# -- told to end -------------------------------------------------------------------------------------------------------
def told_to_end(starter: Starter, folder: Path, at: tuple[int, int], how: str, environment: dict[str, str]) -> str:
    """The run as a process that gets a signal at a batch of an epoch; what it logged."""
    done = starter.run(["-m", "tests.lightning.resume_script", folder, "0", *at, how], environment, ROOT)
    assert done.status == -signal.SIGINT, done.stderr[-3000:]  # as by Ctrl-C
    assert done.stderr.rstrip().endswith("KeyboardInterrupt")
    assert state_of(folder).name == "interrupted"
    return (folder / "run.log").read_text()


def test_a_run_that_is_told_to_end_keeps_its_state_first(undisturbed: Path, tmp_path: Path, starter: Starter) -> None:
    """Within an epoch after the next step, which ``every_n_steps`` would not have kept; in its end after validation.
    After SIGUSR1 a SLURM job is queued again: ``scontrol`` is a stand-in, the variables are those of a job's step, so
    Lightning believes it is in one."""
    folder, tools = tmp_path / "run", tmp_path / "bin"
    tools.mkdir()
    (tools / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    (tools / "scontrol").chmod(0o755)
    job = {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    job |= {"SLURM_JOB_NAME": "mito", "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    for at, how, step in (((1, 4), "SIGUSR1", 7), ((1, 6), "SIGTERM", 8)):
        said = told_to_end(starter, folder, at, how, job)
        assert f"stopping after {how}: the state after step {step} is saved" in said
        assert read_checkpoint(folder / "checkpoints" / "last.ckpt")["global_step"] == step
        assert "requeued job 4711" in said
    assert (tmp_path / "asked").read_text() == "requeue 4711\n"  # a job that is cancelled is not asked for
    assert list(folder.glob("hpc_ckpt*")) == []  # Lightning's, written in the middle of a step
    run(folder, workers=0)
    assert_same(folder, undisturbed)
