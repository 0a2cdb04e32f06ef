"""Status of an output from its done-maps: against counts that are known, while another process writes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import connectomics as cx
from connectomics.cli.app import app
from connectomics.decoding.blocks.labels_task import MaskTask
from connectomics.decoding.parameters import DecodeParameters
from connectomics.errors import MissingError
from connectomics.geometry import VoxelGrid
from connectomics.io.write import write_multiscale
from connectomics.tasks import DoneMap, run_task
from connectomics.tasks.blocks import FAILED
from tests.tasks.kit import CubeTask

GRID = VoxelGrid((8, 8, 8), (4, 4, 4), (40, 40, 40))


def mask_task(folder: Path) -> MaskTask:
    about = {"artefact": "probability", "class_name": "mito", "complete": True, "model": {}}
    values = np.random.default_rng(0).integers(0, 255, GRID.shape).astype(np.uint8)
    place = folder / "p/a.zarr/crop1/mito"
    write_multiscale(place, values, GRID, attrs={"connectomics": about}, overwrite=True)
    output = str(folder / "l/a.zarr/crop1/mito")
    return MaskTask(str(place), output, "mito", DecodeParameters(method="threshold"), (20, 20, 20))


def test_the_stages_of_an_output_are_counted(tmp_path: Path) -> None:
    task = mask_task(tmp_path)
    task.claim()
    (waiting,) = cx.status(tmp_path / "l")
    assert (waiting.output, waiting.stage, waiting.state) == ("a.zarr/crop1/.mito.partial", "write", "waiting")
    task.prepare("write")
    done = DoneMap(task.folder / ".done-write", task.blocks("write"), task.key)
    done.mark([1, 2])
    done.mark([5], FAILED)
    (stage,) = cx.status(tmp_path / "l")
    assert (stage.blocks, stage.done, stage.failed, stage.state) == (8, 2, 1, "running")
    run_task(task)
    (complete,) = cx.status(tmp_path / "l")
    assert (complete.output, complete.state) == ("a.zarr/crop1/mito", "complete")


def test_the_rate_is_that_of_the_latest_changes(tmp_path: Path) -> None:
    """Marks at known times: two blocks each 10 s, of 40 blocks."""
    task = mask_task(tmp_path)
    task.claim()
    task.prepare("write")
    done = DoneMap(task.folder / ".done-write", 40, task.key)
    done.mark(range(12))
    now = time.time()
    rows = "".join(f"{now - 100 + 10 * n:.3f} {2 * n}\n" for n in range(7))
    (task.folder / ".done-write.rate").write_text(rows)
    (stage,) = cx.status(tmp_path)
    assert stage.rate == pytest.approx(0.2, rel=1e-3)
    assert stage.left_s == pytest.approx(28 / 0.2, rel=1e-3)
    assert stage.idle_s == pytest.approx(40, abs=5)
    assert stage.state == "running"


JOB = """
import json, sys
from tests.tasks.kit import CubeTask
from connectomics.tasks import run_task
run_task(CubeTask.from_dict(json.loads(sys.argv[1])))
"""


def test_while_another_process_writes(tmp_path: Path) -> None:
    """A task whose class is not known here; its done-map is."""
    task = CubeTask(str(tmp_path / "out"), count=400, pause=0.05)
    job = subprocess.Popen([sys.executable, "-c", JOB, json.dumps(task.to_dict())])
    try:
        seen, deadline = [], time.monotonic() + 60
        while (not seen or seen[-1]["rate"] is None) and time.monotonic() < deadline:
            time.sleep(0.3)
            if (task.folder / ".done-first").exists():
                said = CliRunner().invoke(app, ["status", str(tmp_path), "--json"])
                assert said.exit_code == 0, said.output
                seen += json.loads(said.stdout)[:1]
        assert seen[-1]["blocks"] == 400
        assert seen[-1]["state"] == "running"
        assert 2 < seen[-1]["rate"] < 21, "a block takes 0.05 s or more"
    finally:
        job.kill()
        job.wait()
    table = CliRunner().invoke(app, ["status", str(tmp_path)]).stdout
    assert "first" in table
    assert "400" in table


def test_a_folder_without_a_task_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"no task\.json below"):
        cx.status(tmp_path)
