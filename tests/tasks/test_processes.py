"""Processes of this machine: the same output, and each of their ways to die is survived, counted and named."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from connectomics.config.schema import EngineConfig
from connectomics.errors import BlocksFailedError, EngineError, MissingError, WriteError
from connectomics.tasks import open_engine, run_task
from connectomics.tasks.blocks import DoneMap
from connectomics.tasks.engines import number_of_workers
from connectomics.tasks.pool import device_of
from tests.tasks import lead
from tests.tasks.kit import CubeTask, CubeWorker, outputs


@pytest.fixture
def undisturbed(tmp_path: Path) -> dict[str, bytes]:
    """The output of 60 blocks, all well."""
    task = CubeTask(str(tmp_path / "undisturbed"), count=60)
    run_task(task)
    return outputs(task)


def opened(task: CubeTask, stage: str) -> int:
    """In how many processes a worker was opened."""
    return len(list(task.folder.glob(f"{stage}.*.opened")))


def children() -> list[int]:
    """The processes of open engines."""
    found = list[int]()
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.Error):  # it has just ended
            found += [process.pid] if "connectomics.tasks.child" in " ".join(process.cmdline()) else []
    return found


def heaps_of_threads(pid: int) -> int:
    """How many heaps glibc has for threads, each a part in use before the rest of 64 MB that may not be read yet."""
    if not Path("/proc").exists():
        return 0
    maps = [line.split() for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
    spans = [[int(end, 16) for end in words[0].split("-")] for words in maps]
    pairs = zip(spans, spans[1:], [words[1] for words in maps[1:]], strict=False)
    return sum(rest[1] - used[0] == 64 << 20 and kind == "---p" for used, rest, kind in pairs)


@pytest.mark.parametrize(("gpus", "wanted", "workers"), [(3, None, 3), (1, None, 1), (2, 5, 5), (4, 2, 2)])
def test_workers_have_the_visible_gpus_in_turn(monkeypatch, gpus: int, wanted: int | None, workers: int) -> None:
    """One worker for each GPU if no number is given; CUDA_VISIBLE_DEVICES decides which GPUs are visible."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    assert number_of_workers(EngineConfig(workers=wanted), "cuda") == workers
    assert number_of_workers(EngineConfig(workers=wanted), "cpu") == (wanted or 1)
    assert [device_of("cuda", n) for n in range(workers)] == [f"cuda:{n % gpus}" for n in range(workers)]
    assert device_of("cuda:0", workers) == "cuda:0"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(EngineError, match="no GPU is visible here"):
        device_of("cuda", 0)


def test_two_processes_write_what_one_writes_and_are_kept_from_stage_to_stage(
    tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    one, other = (CubeTask(str(tmp_path / name), count=60, pause=0.02) for name in ("one", "other"))
    with open_engine(EngineConfig(workers=2)) as engine:
        run_task(one, engine)
        run_task(other, engine)
        assert [heaps_of_threads(pid) for pid in children()] == [0, 0]
    assert outputs(one) == outputs(other) == undisturbed
    assert opened(one, "first") == opened(one, "second") == 2
    processes = {file.name.split(".")[1] for task in (one, other) for file in task.folder.glob("*.opened")}
    assert len(processes) == 2
    assert str(os.getpid()) not in processes
    assert sorted(CubeWorker.tried(one, "first")) == list(range(60))


def test_blocks_that_kill_their_process_are_done_by_another(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    task = CubeTask(str(tmp_path / "out"), count=60, kill=(5, 20, 21, 59), times=2)
    run_task(task, EngineConfig(workers=2))
    assert outputs(task) == undisturbed


def test_a_block_that_kills_its_process_each_time_is_named_and_no_other_suffers(tmp_path: Path) -> None:
    task = CubeTask(str(tmp_path / "out"), count=60, kill=(30,))
    with pytest.raises(BlocksFailedError, match=r"1 of 60 blocks failed \(block 30: its worker died \(signal 9"):
        run_task(task, EngineConfig(workers=2))
    assert CubeWorker.tried(task, "first").count(30) == 3
    assert len(list((task.folder / "first").glob("*.npy"))) == 59
    with pytest.raises(BlocksFailedError):
        run_task(task, EngineConfig(workers=2, attempts=1))
    assert CubeWorker.tried(task, "first").count(30) == 4


def test_a_block_that_hangs_is_given_up(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    task = CubeTask(str(tmp_path / "out"), count=60, hang=(7,), times=1)
    run_task(task, EngineConfig(workers=1, block_timeout_s=0.5))  # the limit needs a process beside this one
    assert outputs(task) == undisturbed
    task = CubeTask(str(tmp_path / "named"), count=4, hang=(2,))
    with pytest.raises(BlocksFailedError, match=r"block 2: took longer than 0\.5 s"):
        run_task(task, EngineConfig(workers=2, block_timeout_s=0.5, attempts=2))


def test_a_block_that_takes_too_much_memory_is_given_up(tmp_path: Path) -> None:
    task = CubeTask(str(tmp_path / "out"), count=4, hog=(2,))
    with pytest.raises(BlocksFailedError, match=r"block 2: held more than 0\.4 GB"):
        run_task(task, EngineConfig(workers=1, memory_gb=0.4, attempts=2))
    assert len(list((task.folder / "first").glob("*.npy"))) == 3


def test_a_full_disk_and_a_failing_block_are_what_they_are_in_one_process(tmp_path: Path) -> None:
    task = CubeTask(str(tmp_path / "full"), count=20, full=5)
    with pytest.raises(WriteError, match="no space left"):
        run_task(task, EngineConfig(workers=2))
    (task.folder / "mended").touch()
    run_task(task, EngineConfig(workers=2))
    assert (task.folder / "sum").read_text() == str(sum(n**3 for n in range(20)))
    with pytest.raises(BlocksFailedError, match=r"block 3: no good data for 3"):
        run_task(CubeTask(str(tmp_path / "fail"), count=20, fail=(3,)), EngineConfig(workers=2))


def test_workers_that_cannot_be_opened_end_the_run(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="no checkpoint at x"):
        run_task(CubeTask(str(tmp_path / "a"), opening="no checkpoint at x"), EngineConfig(workers=2))
    with pytest.raises(EngineError, match=r"no worker could start; the last one: its worker died \(signal 9"):
        run_task(CubeTask(str(tmp_path / "b"), opening="kill"), EngineConfig(workers=2))


def test_a_task_that_does_not_travel_is_refused(tmp_path: Path) -> None:
    class Local(CubeTask):
        """A class that no other process can import."""

    with pytest.raises(EngineError, match="cannot be sent to another process"):
        run_task(Local(str(tmp_path / "out")), EngineConfig(workers=2))


def test_ctrl_c_ends_all_processes_and_what_was_done_is_kept(tmp_path: Path) -> None:
    task = CubeTask(str(tmp_path / "out"), count=400, pause=0.05)
    task.save(tmp_path / "task.json")
    leader = lead.start(tmp_path / "task.json", workers=2)
    while len(list(task.folder.glob("first/*.npy"))) < 20:
        time.sleep(0.02)
    below = psutil.Process(leader.pid).children(recursive=True)
    assert len(below) == 2
    os.killpg(leader.pid, signal.SIGINT)  # as a terminal does it: to all of them
    assert leader.wait(5) != 0
    leader.communicate()
    assert lead.still_there(below, 3) == []
    done = DoneMap(task.folder / ".done-first", 400, task.key)
    assert 0 < done.count <= len(CubeWorker.tried(task, "first"))
    assert all((task.folder / "first" / f"{n}.npy").exists() for n in set(range(400)) - set(done.missing.tolist()))
