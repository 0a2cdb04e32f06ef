"""Job arrays: the scripts, and a real SLURM of this machine if there is one (``apt-get install slurm-wlm munge``)."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from connectomics.errors import ConnectomicsError, EngineError, InputError, UnknownNameError
from connectomics.io.multiscale import Multiscale
from connectomics.pipeline.decode import decode
from connectomics.pipeline.job_array import array_script, submit_array
from tests.decoding.test_blocks import noise, write_input

ROOT = Path(__file__).parents[2]


def test_the_scripts_have_what_was_asked_for(tmp_path: Path) -> None:
    words = ["decode", "p", "my labels"]
    slurm = array_script(words, "slurm", 20, time="12:30", options=["--gres=gpu:1"], logs=tmp_path).splitlines()
    for line in ("--array=1-20", "--time=12:30:00", "--requeue", f"--output={tmp_path}/%A_%a.log", "--gres=gpu:1"):
        assert f"#SBATCH {line}" in slurm
    assert any(line.endswith("-m connectomics decode p 'my labels' engine.share=true &") for line in slurm)
    lsf = array_script(words, "lsf", 20, time="12:30", options=['-gpu "num=1"'], logs=tmp_path).splitlines()
    for line in ('-J "pytc-decode[1-20]"', "-W 12:30", "-r", "-Q 99", f"-o {tmp_path}/%J_%I.log", '-gpu "num=1"'):
        assert f"#BSUB {line}" in lsf
    for script in (slurm, lsf):
        subprocess.run(["bash", "-n"], input="\n".join(script), text=True, check=True)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"words": ["train", "a.yaml"]}, InputError),
        ({"jobs": 0}, InputError),
        ({"time": "soon"}, InputError),
        ({"queue": "pbs"}, UnknownNameError),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, options: dict, error: type[ConnectomicsError]) -> None:
    given = {"words": ["decode", "p", "l"], "queue": "slurm", "jobs": 2, "logs": tmp_path, **options}
    with pytest.raises(error):
        array_script(**given)


def test_without_a_queue_the_script_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    script = array_script(["decode", "p", "l"], "lsf", 2, logs=tmp_path)
    with pytest.raises(EngineError, match="bsub is not installed on this machine"):
        submit_array(script, "lsf", tmp_path)
    assert (tmp_path / "array.lsf.sh").read_text() == script


def test_the_script_of_lsf_asks_to_be_requeued(tmp_path: Path) -> None:
    """Run by bash, with the signal that LSF sends before the time limit."""
    script = array_script(["decode", "p", "l"], "lsf", 2, logs=tmp_path)
    command = next(line for line in script.splitlines() if line.endswith("&"))
    job = subprocess.Popen(["bash", "-c", script.replace(command, "sleep 60 &\ntouch started")], cwd=tmp_path)
    started = Path.cwd() / "started"
    try:
        deadline = time.monotonic() + 30
        while not started.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        job.send_signal(10)  # SIGUSR1
        assert job.wait(timeout=20) == 99
    finally:
        started.unlink(missing_ok=True)


# -- a real queue ------------------------------------------------------------------------------------------------------
CONF = """ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmdPort={port1}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={here}/munge.sock
SlurmUser=root
SlurmdUser=root
StateSaveLocation={here}/state
SlurmdSpoolDir={here}/spool
SlurmctldPidFile={here}/slurmctld.pid
SlurmdPidFile={here}/slurmd.pid
SlurmctldLogFile={here}/slurmctld.log
SlurmdLogFile={here}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobRequeue=1
ReturnToService=2
MpiDefault=none
SchedulerParameters=sched_interval=1,bf_interval=1
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cluster of this machine, with two CPUs."""
    path = f"{os.environ['PATH']}:/usr/sbin"
    programs = {name: shutil.which(name, path=path) for name in ("munged", "slurmctld", "slurmd", "sbatch")}
    if None in programs.values() or os.geteuid() != 0:
        pytest.skip("needs root and apt-get install slurm-wlm munge")
    here = Path("/tmp") / f"slurm-{os.getpid()}"  # short: the path of a socket has a limit
    for folder in ("state", "spool"):
        (here / folder).mkdir(parents=True)
    here.chmod(0o755)
    (here / "munge.key").write_bytes(os.urandom(128))
    (here / "munge.key").chmod(0o600)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    host = socket.gethostname().partition(".")[0]
    (here / "slurm.conf").write_text(CONF.format(host=host, here=here, port=port, port1=port + 1))
    monkeypatch.setenv("SLURM_CONF", str(here / "slurm.conf"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    munge = {"key-file": "key", "socket": "sock", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    options = [f"--{option}={here}/munge.{end}" for option, end in munge.items()]
    try:
        subprocess.run([programs["munged"], "--force", *options], check=True)
        subprocess.run([programs["slurmctld"]], check=True)
        subprocess.run([programs["slurmd"]], check=True)
        yield here
    finally:
        for name in ("slurmd", "slurmctld", "munge"):
            file = here / f"{name}.pid"
            if file.exists():
                subprocess.run(["kill", file.read_text().strip()], check=False)
        time.sleep(1)
        shutil.rmtree(here, ignore_errors=True)


def jobs_left() -> int:
    found = subprocess.run(["squeue", "--noheader", "--array"], capture_output=True, text=True, check=True)
    return len(found.stdout.splitlines())


@pytest.mark.slow
def test_a_job_array_in_slurm(slurm: Path, tmp_path: Path) -> None:
    """Three jobs on two CPUs; one gets the signal that comes before the time limit, and is requeued."""
    values = noise(26, (90, 60, 60))
    write_input(tmp_path / "p", values)
    os.rename(tmp_path / "p/in.zarr", tmp_path / "p/a.zarr")
    config = tmp_path / "decode.yaml"
    config.write_text(
        "decoding: {blockwise_above: 1000, classes: {mito: {method: cc3d}}}\noutput: {chunk: [16, 16, 16]}\n"
    )
    words = ["decode", str(tmp_path / "p"), str(tmp_path / "l"), "--config", str(config)]
    logs = tmp_path / "logs"
    said = submit_array(array_script(words, "slurm", 3, time="0:10", logs=logs), "slurm", logs)
    number = said.split()[-1]
    deadline = time.monotonic() + 60
    while not (logs / f"{number}_1.log").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    subprocess.run(["scancel", "--batch", "--signal=USR1", f"{number}_1"], check=True)
    deadline = time.monotonic() + 400
    while jobs_left() and time.monotonic() < deadline:
        time.sleep(1)
    texts = {path.name: path.read_text() for path in logs.glob("*.log")}
    assert sorted(texts) == [f"{number}_{n}.log" for n in (1, 2, 3)], texts
    states = subprocess.run(["scontrol", "show", "job", number], capture_output=True, text=True, check=True).stdout
    assert states.count("JobState=COMPLETED") == 3, f"{states}\n{texts}"
    assert "Restarts=1" in states, "the job that got the signal ran twice"
    decode(tmp_path / "p", out=tmp_path / "whole", config=config)
    labels = [Multiscale.open(tmp_path / name / "a.zarr/crop1/mito") for name in ("l", "whole")]
    found, expected = (volume.read_level(0, (0, 0, 0), values.shape)[0] for volume in labels)
    np.testing.assert_array_equal(found, expected)
    assert sys.executable in (logs / "array.slurm.sh").read_text()
