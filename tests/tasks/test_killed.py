"""SIGKILL at random moments to the leading process: what is left can be gone on with, and the end is the same."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from connectomics.tasks import run_task
from tests.tasks import lead
from tests.tasks.kit import CubeTask, CubeWorker, outputs

LOCAL, DASK = {"workers": 2}, {"name": "dask", "workers": 2}


@pytest.mark.parametrize(
    ("engine", "kills", "blocks"),
    [
        pytest.param(LOCAL, 2, 80, id="local"),
        pytest.param(DASK, 1, 100, id="dask", marks=pytest.mark.slow),
        pytest.param(LOCAL, 20, 1200, id="local-20", marks=pytest.mark.slow),
        pytest.param(DASK, 20, 2400, id="dask-20", marks=pytest.mark.slow),
    ],
)
def test_killed_and_run_again(engine: dict[str, object], kills: int, blocks: int, tmp_path: Path) -> None:
    whole, task = (CubeTask(str(tmp_path / name), count=blocks) for name in ("whole", "killed"))
    run_task(whole)
    file = tmp_path / "task.json"
    CubeTask(task.output, count=blocks, pause=0.02).save(file)
    chance, progress = random.Random(blocks), 0
    for _ in range(kills):
        leader = lead.start(file, **engine)
        tried = len(_log(task))
        while leader.poll() is None and len(_log(task)) == tried:  # it has begun to work
            time.sleep(0.01)
        time.sleep(chance.random())
        progress += leader.poll() is None
        assert lead.still_there(lead.kill(leader)) == []
    assert progress >= 0.9 * kills  # it was not done long before
    leader = lead.start(file, **engine)
    _, said = leader.communicate()
    assert leader.returncode == 0, said
    assert outputs(task) == outputs(whole)


def _log(task: CubeTask) -> list[int]:
    return [n for s in ("first", "second") if (task.folder / f"{s}.log").exists() for n in CubeWorker.tried(task, s)]
