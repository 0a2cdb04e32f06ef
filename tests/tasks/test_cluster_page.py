"""docs/cluster.md: its configurations compose, and its numbers are those of the arithmetic."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from connectomics.config import load_config
from connectomics.tasks.cluster import job_options

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/cluster.md").read_text(encoding="utf-8")
FRAGMENTS = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)


@pytest.mark.parametrize("number", range(len(FRAGMENTS)))
def test_every_configuration_composes(number: int, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(FRAGMENTS[number])
    engine = load_config(tmp_path / "run.yaml").engine
    if engine.cluster != "local":
        assert job_options(engine)["worker_extra_args"] == ["--nthreads", "1"]


@pytest.mark.parametrize("queue", ["slurm", "lsf"])
def test_the_job_scripts_of_the_page(queue: str, tmp_path: Path) -> None:
    """What dask-jobqueue would submit for it, line by line."""
    import dask_jobqueue

    (text,) = (fragment for fragment in FRAGMENTS if f"cluster: {queue}" in fragment)
    (tmp_path / "run.yaml").write_text(text)
    options = {**job_options(load_config(tmp_path / "run.yaml").engine), "scheduler_options": {"host": "127.0.0.1"}}
    if queue == "lsf":
        options["lsf_units"] = "mb"  # it would ask LSF's own configuration
    kind = {"slurm": dask_jobqueue.SLURMCluster, "lsf": dask_jobqueue.LSFCluster}[queue]
    with kind(**options) as cluster:
        script = cluster.job_script().splitlines()
    expected = {
        "slurm": ["-p gpu", "-A my-lab", "--cpus-per-task=8", "--mem=60G", "-t 12:00:00", "--gres=gpu:1"],
        "lsf": ["-q gpu_h100", "-n 12", "-M 120000", "-W 12:00", '-gpu "num=1"'],
    }[queue]
    for directive in expected:
        assert f"#{'SBATCH' if queue == 'slurm' else 'BSUB'} {directive}" in script
    (worker,) = (line for line in script if "distributed.cli.dask_worker" in line)
    assert "--nthreads 1" in worker.split("--nthreads 8")[-1]


def test_the_numbers_are_those_of_the_arithmetic() -> None:
    program = [sys.executable, str(ROOT / "benchmarks/volume_arithmetic.py")]
    found = subprocess.run(program, capture_output=True, text=True, check=True).stdout
    assert found.strip() in PAGE
