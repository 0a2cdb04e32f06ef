"""The Dask engine: the same output, whatever dies; and one line where workers cannot be had."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from connectomics.config.schema import EngineConfig
from connectomics.errors import BlocksFailedError, EngineError, MissingError, WriteError
from connectomics.tasks import cluster as cluster_module
from connectomics.tasks import open_engine, run_task
from connectomics.tasks.blocks import DoneMap
from connectomics.tasks.cluster import job_options
from connectomics.tasks.pool import Engine
from tests.tasks import lead
from tests.tasks.kit import CubeTask, CubeWorker, outputs

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """Two Dask workers of this machine, with limits."""
    config = EngineConfig(name="dask", workers=2, attempts=2, block_timeout_s=1.5, memory_gb=0.2)
    with open_engine(config) as opened:
        yield opened


@pytest.fixture
def undisturbed(tmp_path: Path) -> dict[str, bytes]:
    """The output of 60 blocks, all well."""
    task = CubeTask(str(tmp_path / "undisturbed"), count=60)
    run_task(task)
    return outputs(task)


def working(above: int) -> list[psutil.Process]:
    """The processes below ``above`` that do blocks."""
    return [p for p in psutil.Process(above).children(recursive=True) if "connectomics.tasks.child" in p.cmdline()[-1]]


def test_workers_write_what_one_process_writes_and_are_kept(
    engine: Engine, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    one, other = (CubeTask(str(tmp_path / name), count=60, pause=0.02) for name in ("one", "other"))
    run_task(one, engine)
    run_task(other, engine)
    assert outputs(one) == outputs(other) == undisturbed
    assert len({file.name.split(".")[1] for task in (one, other) for file in task.folder.glob("*.opened")}) == 2
    assert sorted(CubeWorker.tried(one, "first")) == list(range(60))


def test_blocks_are_marked_while_others_of_their_row_are_still_to_be_done(engine: Engine, tmp_path: Path) -> None:
    task, marked = CubeTask(str(tmp_path / "row"), count=16, run=16, pause=0.25), set[int]()

    def look(done: int, number: int, stage: str = "") -> None:
        if stage == "first":
            marked.add(DoneMap(task.folder / ".done-first", 16, task.key).count)
            assert done <= number  # none counts twice

    run_task(task, engine, look)
    assert marked - {0, 16}
    assert CubeWorker.tried(task, "first") == list(range(16))


@pytest.mark.slow  # `test_processes.py` does this without Dask
def test_blocks_that_kill_hang_or_eat_are_done_again_or_named(
    engine: Engine, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    task = CubeTask(str(tmp_path / "out"), count=60, kill=(5, 40), hang=(20,), hog=(30,), times=1)
    run_task(task, engine)
    assert outputs(task) == undisturbed
    task = CubeTask(str(tmp_path / "named"), count=20, kill=(3,), hang=(4,), hog=(5,), fail=(6,))
    with pytest.raises(BlocksFailedError) as error:
        run_task(task, engine)
    for part in (
        "4 of 20",
        "block 3: its worker died (signal 9",
        "4: took longer than 1.5 s",
        "5: held more than 0.2 GB",
    ):
        assert part in str(error.value)
    assert len(list((task.folder / "first").glob("*.npy"))) == 16


def test_errors_that_end_the_run(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="no checkpoint at x"):
        run_task(CubeTask(str(tmp_path / "a"), opening="no checkpoint at x"), engine)
    with pytest.raises(WriteError, match="no space left"):
        run_task(CubeTask(str(tmp_path / "b"), count=20, full=5), engine)


def test_a_dask_worker_that_is_killed_is_replaced(
    tmp_path: Path, undisturbed: dict[str, bytes], engine: Engine
) -> None:
    task = CubeTask(str(tmp_path / "out"), count=60, pause=0.05)

    def kill_one() -> None:
        while len(list(task.folder.glob("first/*.npy"))) < 10:
            time.sleep(0.01)
        parent = working(os.getpid())[0].parent()
        assert parent is not None
        parent.kill()

    killer = threading.Thread(target=kill_one)
    killer.start()
    run_task(task, engine)
    killer.join()
    assert outputs(task) == undisturbed


def dask(*words: str) -> subprocess.Popen[bytes]:
    """A program of Dask's, as one starts it by hand."""
    return subprocess.Popen(
        [sys.executable, "-m", "dask", *words], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


@pytest.mark.slow
def test_a_scheduler_that_runs_already_and_is_killed(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    file = tmp_path / "scheduler.json"
    scheduler = dask("scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(file))
    worker = dask(
        "worker", "--scheduler-file", str(file), "--no-dashboard", "--nthreads", "1", "--no-nanny",
        "--local-directory", str(tmp_path), "--death-timeout", "3",
    )  # fmt: skip
    try:
        while not file.exists():
            time.sleep(0.05)
        config = EngineConfig(name="dask", address=str(file))
        task = CubeTask(str(tmp_path / "out"), count=60)
        run_task(task, config)
        assert outputs(task) == undisturbed
        assert working(worker.pid) == []  # what it had there is gone with it

        task = CubeTask(str(tmp_path / "killed"), count=60, pause=0.1)

        def kill() -> None:
            while len(list(task.folder.glob("first/*.npy"))) < 10:
                time.sleep(0.01)
            scheduler.kill()

        killer = threading.Thread(target=kill)
        killer.start()
        with pytest.raises(EngineError, match=r"connection to the Dask scheduler is lost.*rerun the same command"):
            run_task(task, config)
        killer.join()
    finally:
        for process in (worker, scheduler):
            process.kill()
            process.wait()
    run_task(task)
    assert outputs(task) == undisturbed


@pytest.mark.slow
def test_a_leader_that_is_killed_leaves_nothing_to_a_worker_that_lives_on(tmp_path: Path) -> None:
    file = tmp_path / "scheduler.json"
    scheduler = dask("scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(file))
    worker = dask(
        "worker", "--scheduler-file", str(file), "--no-dashboard", "--nthreads", "1", "--no-nanny",
        "--local-directory", str(tmp_path), "--death-timeout", "3",
    )  # fmt: skip
    try:
        while not file.exists():
            time.sleep(0.05)
        task = CubeTask(str(tmp_path / "out"), hang=(3,), times=1)
        task.save(tmp_path / "task.json")
        leader = lead.start(tmp_path / "task.json", name="dask", address=str(file))
        while not (task.folder / "first.log").exists() or 3 not in CubeWorker.tried(task, "first"):
            time.sleep(0.02)
        hanging = working(worker.pid)
        assert len(hanging) == 1
        lead.kill(leader)
        assert lead.still_there(hanging) == []
        run_task(task, EngineConfig(name="dask", address=str(file)))
        assert (task.folder / "sum").read_text() == str(sum(n**3 for n in range(8)))
    finally:
        for process in (worker, scheduler):
            process.kill()
            process.wait()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("tcp://127.0.0.1:9", "no Dask scheduler answers at tcp://127.0.0.1:9.*dask scheduler"),
        ("nowhere/scheduler.json", "there is no scheduler file nowhere/scheduler.json"),
        ("what is this", "no Dask scheduler answers"),
    ],
)
def test_a_scheduler_that_is_not_there_is_one_line(address: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_module, "_CONNECT_S", 2.0)
    begin = time.monotonic()
    with pytest.raises(EngineError, match=message) as error:
        open_engine(EngineConfig(name="dask", address=address))
    assert "\n" not in str(error.value)
    assert time.monotonic() - begin < 30  # a few seconds on an idle machine


@pytest.mark.parametrize(
    "says", [b"", b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"], ids=["nothing", "http"]
)
def test_an_address_that_is_no_scheduler_is_one_line_in_time(says: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_module, "_CONNECT_S", 2.0)
    held: list[socket.socket] = []

    def serve() -> None:
        with contextlib.suppress(OSError):  # the listener is closed
            while True:
                held.append(listener.accept()[0])
                held[-1].sendall(says)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        address = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        begin = time.monotonic()
        with pytest.raises(EngineError, match=f"no Dask scheduler answers at {address}") as error:
            open_engine(EngineConfig(name="dask", address=address))
    assert "\n" not in str(error.value)
    assert time.monotonic() - begin < 15
    for connection in held:
        connection.close()


def test_libraries_and_queues_that_are_not_there_are_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    slurm = EngineConfig(name="dask", cluster="slurm", options={"memory": "4 GB"})
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EngineError, match="there is no sbatch here"):
        open_engine(slurm)
    monkeypatch.setitem(sys.modules, "dask_jobqueue", None)
    with pytest.raises(EngineError, match=r"pip install 'connectomics-cellmap\[cluster\]'"):
        open_engine(slurm)
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(EngineError, match=r"pip install 'connectomics-cellmap\[cluster\]'"):
        open_engine(EngineConfig(name="dask"))


def test_options_of_a_job() -> None:
    config = EngineConfig(name="dask", cluster="slurm", memory_gb=8, options={"processes": 2, "cores": 8})
    assert job_options(config)["memory"] == "17 GB"
    with pytest.raises(EngineError, match=r"needs engine\.options\.memory"):
        job_options(EngineConfig(name="dask", cluster="lsf"))


#: stand-ins for the queues' commands: they keep the script and run it here, as the queue does elsewhere
SUBMIT = {
    "slurm": ("sbatch", 'cp "$1" {kept}; bash {kept} >/dev/null 2>&1 & echo "Submitted batch job $!"'),
    "lsf": ("bsub", 'cat > {kept}; bash {kept} >/dev/null 2>&1 & echo "Job <$!> is submitted to queue <normal>."'),
}
CANCEL = {"slurm": "scancel", "lsf": "bkill"}
LINES = {
    "slurm": ["#SBATCH -J pytc", "#SBATCH -p gpu", "#SBATCH -t 02:00:00", "#SBATCH --mem=15G", "#SBATCH --gres=gpu:1"],
    "lsf": ["#BSUB -J pytc", "#BSUB -q gpu", "#BSUB -W 02:00:00", "#BSUB -M 16000", "#BSUB --gres=gpu:1"],
}


@pytest.mark.parametrize("queue", ["slurm", pytest.param("lsf", marks=pytest.mark.slow)])
def test_jobs_of_a_queue(
    queue: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, bytes]
) -> None:
    """The script that goes to the queue's command, and that what it starts does the work."""
    name, text = SUBMIT[queue]
    for command, body in ((name, text.format(kept=tmp_path / "script")), (CANCEL[queue], 'kill "$@"')):
        file = tmp_path / "bin" / command
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"#!/bin/bash\n{body}\n")
        file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    options = {
        "queue": "gpu", "walltime": "02:00:00", "cores": 8, "memory": "16 GB", "job_name": "pytc",
        "job_extra_directives": ["--gres=gpu:1"], "local_directory": str(tmp_path),
        "scheduler_options": {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"},
    }  # fmt: skip
    if queue == "lsf":
        options |= {"use_stdin": True, "lsf_units": "mb"}
    task = CubeTask(str(tmp_path / "out"), count=60)
    run_task(task, EngineConfig(name="dask", cluster=queue, options=options))
    assert outputs(task) == undisturbed
    script = (tmp_path / "script").read_text()
    for line in LINES[queue]:
        assert line in script.splitlines()
    assert script.rstrip().endswith("--nthreads 1")
