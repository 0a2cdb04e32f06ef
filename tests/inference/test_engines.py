"""Prediction by other processes: the same bytes as here, whatever dies; checkpoints that are not those of the task."""

from __future__ import annotations

import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from connectomics.cli import main
from connectomics.config import save_config
from connectomics.config.schema import EngineConfig, RunConfig
from connectomics.errors import InputError, MissingError
from connectomics.inference.predict_task import PredictTask
from connectomics.io.artifacts import is_complete, require_complete
from connectomics.io.multiscale import Multiscale
from connectomics.pipeline.network_task import NetworkPredictTask
from connectomics.pipeline.predict import predict_tasks
from connectomics.tasks import run_task
from tests.pipeline.test_predict_crops import checkpoint, config_of, predict, root, save_checkpoint  # noqa: F401
from tests.starter import Starter
from tests.tasks.test_processes import children
from tests.trees import contents

TWO = EngineConfig(workers=2)
BOX = "set-a:0,0,0:384,384,512"


def box_config(root: Path) -> RunConfig:  # noqa: F811
    config = config_of(root)
    return replace(config, output=replace(config.output, pyramid=True))


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {
        n: c for n, c in contents(folder).items() if not n.startswith(("task.json", ".done-")) and ".part-" not in n
    }


def test_two_processes_write_what_one_does(root: Path, checkpoint: Path, tmp_path: Path) -> None:  # noqa: F811
    """Also to what MONAI's inferer gives on the whole array, across the borders of blocks."""
    from monai.inferers import SlidingWindowInferer

    from connectomics.lightning.checkpoints import load_module
    from connectomics.pipeline.targets import targets_of

    config = box_config(root)
    as_monai = replace(config.inference, dtype="float16", context=0, blending="gaussian", overlap=0.25)
    config = replace(config, inference=as_monai)
    targets = targets_of(config, box=BOX)
    (here,) = predict(root, checkpoint, tmp_path / "a", config, targets=targets)
    (there,) = predict(root, checkpoint, tmp_path / "b", replace(config, engine=TWO), targets=targets)
    assert bytes_of(here) == bytes_of(there)
    raw = Multiscale.open(root / "set-a" / "set-a.zarr" / "recon-1" / "em" / "fibsem-uint8")
    normalization = PredictTask.load(here / "task.json").normalization
    values, inside = raw.read_raw(targets[0].grids["mito"])
    values = torch.from_numpy(normalization.centered(normalization.unit(values), inside))[None, None]
    inferer = SlidingWindowInferer((16, 16, 16), 1, 0.25, mode="gaussian")
    with torch.inference_mode():
        expected = inferer(values, load_module(checkpoint).probabilities)[0].numpy()
    for channel, name in enumerate(("er", "mito")):
        stored = Multiscale.open(there / name).read_level(0, (0, 0, 0), values.shape[2:])[0]
        assert np.abs(stored.astype(np.float32) - expected[channel]).max() < 5e-4 + 1e-5, "half a step of float16"


@pytest.mark.slow  # `tests/tasks/test_processes.py` kills workers of a smaller task
@pytest.mark.parametrize("kills", [1, 10])
def test_a_worker_that_is_killed_costs_nothing_but_time(
    root: Path,  # noqa: F811
    checkpoint: Path,  # noqa: F811
    tmp_path: Path,
    kills: int,
) -> None:
    from connectomics.pipeline.targets import targets_of

    config = box_config(root)
    targets = targets_of(config, box=BOX)
    (whole,) = predict(root, checkpoint, tmp_path / "a", config, targets=targets)
    ((task,), *_) = predict_tasks(checkpoint, out=tmp_path / "b", config=config, box=BOX, device="cpu")
    killed: list[int] = []

    def kill(done: int, blocks: int, stage: str = "") -> None:
        workers = children()  # no other child of this process: what starts processes for the next tests is one, too
        if len(killed) < kills and done < blocks and workers:
            time.sleep(0.05)
            os.kill(workers[len(killed) % len(workers)], signal.SIGKILL)
            killed.append(done)

    run_task(task, replace(TWO, attempts=50), kill)
    while len(killed) < kills:  # it was too fast for all of them
        shutil.rmtree(task.folder)
        run_task(task, replace(TWO, attempts=50), kill)
    assert bytes_of(task.folder) == bytes_of(whole)


#: A job that is killed at a change of the files, counted from where the task is about to be finished.
KILLED_LATE = """
import os, signal, sys
from connectomics.config.schema import EngineConfig
from connectomics.pipeline.network_task import NetworkPredictTask
from connectomics.tasks import claims, run_task

left, remove_traces = int(sys.argv[2]), claims.remove_traces

def hook(event, arguments):
    global left
    left -= event in ("os.rename", "os.remove") or (event == "open" and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR)))
    if left == 0:
        left = -1
        os.kill(os.getpid(), signal.SIGKILL)

def late(folder):
    sys.addaudithook(hook)
    remove_traces(folder)

claims.remove_traces = late
run_task(NetworkPredictTask.load(sys.argv[1]), EngineConfig(share=True))
"""


def test_jobs_that_are_killed_while_they_finish_a_task_leave_it_to_the_next(
    root: Path,  # noqa: F811
    checkpoint: Path,  # noqa: F811
    tmp_path: Path,
    starter: Starter,
) -> None:
    config = config_of(root, crops=["crop1"])
    (whole,) = predict(root, checkpoint, tmp_path / "whole", config)
    tasks, *_ = predict_tasks(checkpoint, out=tmp_path / "shared", config=config, device="cpu")
    (task,) = tasks
    task.save(tmp_path / "task.json")
    step, ended, unfinished = 1, -signal.SIGKILL, []
    while ended == -signal.SIGKILL:
        job = starter.start(["-c", KILLED_LATE, tmp_path / "task.json", step])
        ended = job.wait()
        assert ended in (0, -signal.SIGKILL), job.said
        if is_complete(task.folder):
            assert bytes_of(task.folder) == bytes_of(whole)
        else:
            unfinished.append(step)
        step += 1
    assert unfinished == list(range(1, len(unfinished) + 1))
    assert len(unfinished) >= 3
    assert is_complete(task.folder)
    assert starter.run(["pytc", "run-task", tmp_path / "task.json", "engine.share=true"]).status == 0


def test_a_stored_task_runs_again_anywhere(root: Path, checkpoint: Path, tmp_path: Path) -> None:  # noqa: F811
    config = config_of(root, crops=["crop2"])
    (folder,) = predict(root, checkpoint, tmp_path / "a", config)
    task = NetworkPredictTask.load(folder / "task.json")
    assert task.checkpoints == (str(checkpoint),)
    before = bytes_of(folder)
    shutil.copy(folder / "task.json", tmp_path / "task.json")
    shutil.rmtree(folder)
    assert main(["run-task", str(tmp_path / "task.json"), "--device", "cpu"]) == 0
    assert bytes_of(folder) == before


@pytest.mark.parametrize("engine", [None, pytest.param(TWO, marks=pytest.mark.slow)], ids=["here", "two processes"])
def test_another_checkpoint_in_its_place_is_refused(
    root: Path,  # noqa: F811
    checkpoint: Path,  # noqa: F811
    tmp_path: Path,
    engine: EngineConfig | None,
) -> None:
    config = config_of(root, crops=["crop2"])
    path = tmp_path / "best.ckpt"
    shutil.copy(checkpoint, path)
    ((task,), *_) = predict_tasks(path, out=tmp_path / "out", config=config, device="cpu")
    save_checkpoint(path, config_of(root), 7)
    with pytest.raises(InputError, match=r"best\.ckpt: the weights are not those .* expected " + task.checkpoint):
        run_task(task, engine)
    save_checkpoint(path, config_of(root, classes=["er", "ld"]), 7)
    with pytest.raises(InputError, match=r"best\.ckpt: the network gives er, ld, but the prediction .* er, mito"):
        run_task(task)
    shutil.copy(checkpoint, path)
    run_task(task)
    before = bytes_of(task.folder)
    save_checkpoint(path, config_of(root), 7)
    with pytest.raises(InputError, match="the weights are not those"):
        run_task(task, overwrite=True)
    assert bytes_of(task.folder) == before  # looked at before it is removed
    assert require_complete(task.folder)


def test_a_model_in_memory_stays_in_its_process(root: Path, checkpoint: Path, tmp_path: Path) -> None:  # noqa: F811
    from connectomics.lightning.checkpoints import load_module
    from connectomics.pipeline.predict import predict_cellmap_crops

    config = config_of(root, crops=["crop2"])
    with pytest.raises(InputError, match="can only predict in this process"):
        predict_cellmap_crops(load_module(checkpoint), replace(config, engine=TWO), None, tmp_path, device="cpu")
    (folder,) = predict_cellmap_crops(load_module(checkpoint), config, None, tmp_path, device="cpu")
    shutil.rmtree(folder / "mito")
    with pytest.raises(InputError, match="was given in memory"):
        run_task(NetworkPredictTask.load(folder / "task.json"))


def test_compiled_or_in_another_memory_format_it_gives_the_same(
    root: Path,  # noqa: F811
    checkpoint: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    config = config_of(root, crops=["crop2"])
    stored = []
    for name, options in (("a", {}), ("b", {"channels_last": True})):
        changed = replace(config, inference=replace(config.inference, dtype="float16", **options))
        (folder,) = predict(root, checkpoint, tmp_path / name, changed)
        stored.append(Multiscale.open(folder / "mito").read_level(0, (0, 0, 0), (10, 10, 10))[0].astype(np.float32))
    assert np.abs(stored[0] - stored[1]).max() < 5e-4 + 1e-5


@pytest.mark.slow
def test_dry_run_and_resume_on_the_command_line(
    root: Path,  # noqa: F811
    checkpoint: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_config(config_of(root, crops=["crop2"]), tmp_path / "run.yaml")
    out = str(tmp_path / "out")
    command = ["predict", str(tmp_path / "run.yaml"), "--checkpoint", str(checkpoint), "--out", out, "--device", "cpu"]
    assert main([*command, "--dry-run"]) == 0
    assert "predict" in (shown := capsys.readouterr().out)
    assert "of one worker" in shown
    assert not Path(out).exists()
    assert main([*command, "--resume"]) != 0
    assert "nothing was begun below" in capsys.readouterr().err
    with pytest.raises(MissingError, match="nothing was begun below"):
        predict(root, checkpoint, Path(out), config_of(root, crops=["crop2"]), resume=True)
    assert main(command) == 0
    assert main([*command, "--resume"]) == 0
