"""Processes that share a task: each block is done by one of them, whoever dies; the output is that of one process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from connectomics.config.schema import EngineConfig
from connectomics.errors import BlocksFailedError, ConfigError, InputError, WriteError
from connectomics.tasks import DoneMap, open_engine, run_task
from connectomics.tasks.claims import open_claims
from tests.tasks.kit import CubeTask

SHARE = EngineConfig(share=True)

JOB = """
import json, sys
from connectomics.config.schema import EngineConfig
from connectomics.tasks import run_task
from tests.tasks.kit import CubeTask
run_task(CubeTask.from_dict(json.loads(sys.argv[1])), EngineConfig(share=True))
"""


def start(task: CubeTask) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", JOB, json.dumps(task.to_dict())], stderr=subprocess.PIPE, text=True)


def total(count: int) -> int:
    return sum(n**3 for n in range(count))


def log_of(task: CubeTask, stage: str) -> list[int]:
    return [int(line) for line in (task.folder / f"{stage}.log").read_text().split()]


def test_jobs_divide_the_blocks(tmp_path: Path) -> None:
    task = CubeTask(str(tmp_path / "out"), count=40, pause=0.05)
    jobs = [start(task) for _ in range(3)]
    for job in jobs:
        _, said = job.communicate(timeout=120)
        assert job.returncode == 0, said
    assert json.loads((task.folder / "sum").read_text()) == total(40)
    assert sorted(log_of(task, "first")) == list(range(40)), "each block was done once"
    assert sorted(log_of(task, "second")) == list(range(40))
    assert len(list(task.folder.glob("first.*.opened"))) > 1, "by more than one process"
    assert not list(task.folder.glob(".done-*.*")), "nothing is left beside the done-maps"


def test_the_blocks_of_a_killed_job_are_free(tmp_path: Path) -> None:
    task = CubeTask(str(tmp_path / "out"), count=12, pause=0.3)
    job = start(task)
    deadline = time.monotonic() + 60
    while not (task.folder / "first.log").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    job.send_signal(signal.SIGKILL)
    job.wait()
    assert run_task(CubeTask(str(tmp_path / "out"), count=12), SHARE) is not False
    assert json.loads((task.folder / "sum").read_text()) == total(12)


def test_a_claimed_block_is_left_to_its_process(tmp_path: Path) -> None:
    done = DoneMap(tmp_path / "map", 5, "key")
    claims = open_claims(tmp_path / "claims", done)
    assert claims.take([1, 2]) == [1, 2]
    other = f"""
from pathlib import Path
from connectomics.tasks import DoneMap
from connectomics.tasks.claims import open_claims
done = DoneMap(Path({str(tmp_path / "map")!r}), 5, "key")
print(open_claims(Path({str(tmp_path / "claims")!r}), done).take(range(5)))
"""

    def free() -> str:
        return subprocess.run([sys.executable, "-c", other], capture_output=True, text=True, check=True).stdout.strip()

    assert free() == "[0, 3, 4]"
    done.mark([1])
    claims.release([1])
    assert free() == "[0, 3, 4]", "1 is done, 2 is claimed"
    claims.close()
    assert free() == "[0, 2, 3, 4]"


def test_a_leading_process_does_not_join_jobs(tmp_path: Path) -> None:
    task = CubeTask(str(tmp_path / "out"), count=30, pause=0.2)
    job = start(task)
    deadline = time.monotonic() + 60
    while not (task.folder / "first.log").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    with pytest.raises(WriteError, match=r"other processes share the work on .*engine\.share=true"):
        run_task(task)
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    assert run_task(CubeTask(str(tmp_path / "out"), count=30)), "once they have ended it does"


def test_blocks_that_fail_are_named_and_marked(tmp_path: Path) -> None:
    task = CubeTask(str(tmp_path / "out"), count=8, fail=(3,))
    with pytest.raises(BlocksFailedError, match="block 3"):
        run_task(task, SHARE)
    assert (task.folder / ".done-first").read_bytes()[-8:] == bytes([1, 1, 1, 2, 1, 1, 1, 1])
    (task.folder / "mended").touch()
    assert run_task(task, SHARE)
    assert json.loads((task.folder / "sum").read_text()) == total(8)


def test_what_does_not_fit_together_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"engine\.share needs engine\.name=local"):
        open_engine(EngineConfig(name="dask", share=True))
    with pytest.raises(InputError, match=r"--accept-failed"):
        run_task(CubeTask(str(tmp_path / "out"), accepting=True), SHARE, accept=[1])
