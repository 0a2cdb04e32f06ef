"""One leader an output: the second is refused, a dead one is not waited for."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import time
from pathlib import Path

import pytest

from connectomics.errors import WriteError
from connectomics.tasks import run_task
from connectomics.tasks.lock import leading
from tests.tasks import lead
from tests.tasks.kit import CubeTask, CubeWorker


def test_a_second_leader_is_refused_and_goes_on_when_the_first_was_killed(tmp_path: Path) -> None:
    task = CubeTask(str(tmp_path / "out"), count=100, pause=0.05)
    task.save(tmp_path / "task.json")
    leader = lead.start(tmp_path / "task.json")
    while not (task.folder / "first.log").exists() and leader.poll() is None:
        time.sleep(0.02)
    refused = rf"process {leader.pid} on .* is working on {re.escape(str(task.folder))}: wait until it has ended"
    for overwrite in (False, True):
        with pytest.raises(WriteError, match=refused) as error:
            run_task(task, overwrite=overwrite)
        assert "\n" not in str(error.value)
    second = lead.start(tmp_path / "task.json")
    assert "is working on" in second.communicate()[1]
    assert second.returncode == 1
    assert leader.poll() is None  # it has not minded
    lead.kill(leader)
    assert (tmp_path / ".out.lock").exists()
    run_task(CubeTask(str(tmp_path / "out"), count=100))
    assert (task.folder / "sum").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "task.json"]


def test_the_lock_is_given_back_after_an_error(tmp_path: Path) -> None:
    task = CubeTask(str(tmp_path / "out"), count=4, full=2)
    for _ in range(2):
        with pytest.raises(WriteError, match="no space left"):
            run_task(task)
    assert not (tmp_path / ".out.lock").exists()


def test_a_file_that_its_holder_has_removed_meanwhile_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening and locking the one before has ended, and a third has begun with a file of its own."""
    path, real = tmp_path / ".out.lock", fcntl.flock
    third: list[int] = []

    def late(handle: int, how: int) -> None:
        if not third:
            path.unlink()
            third.append(os.open(path, os.O_RDWR | os.O_CREAT))
            real(third[0], how)
        real(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(WriteError, match="another process is working on"), leading(tmp_path / "out"):
        pass
    os.close(third[0])
    with leading(tmp_path / "out"):
        assert path.read_text().startswith(f"process {os.getpid()} on ")
    assert not path.exists()


def test_where_nothing_can_be_locked_nothing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(handle: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    task = CubeTask(str(tmp_path / "out"), count=5)
    with leading(task.folder):
        run_task(task)
    assert CubeWorker.tried(task, "first") == list(range(5))
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match=r"cannot write .*/file/.out.lock: /.*/file is not a folder"):
        run_task(CubeTask(str(tmp_path / "file" / "out")))
