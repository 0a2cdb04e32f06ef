"""Leading a task: every block once, what failed again, what is done never again."""

from __future__ import annotations

from pathlib import Path

import pytest

from connectomics.errors import BlocksFailedError, WriteError
from connectomics.tasks import run_task
from connectomics.tasks.blocks import DoneMap
from tests.tasks.kit import CubeTask, CubeWorker


def total(task: CubeTask) -> int:
    return int((task.folder / "sum").read_text())


def test_every_block_is_done_once(tmp_path: Path) -> None:
    task, seen = CubeTask(str(tmp_path / "out"), count=700), []
    assert run_task(task, progress=lambda *told: seen.append(told))
    assert total(task) == sum(n**3 for n in range(700))
    assert CubeWorker.tried(task, "first") == list(range(700))
    assert seen[0] == (0, 700, "first")
    assert seen[-1] == (700, 700, "second")
    assert not run_task(task)  # nothing is left


def test_a_block_that_fails_is_tried_three_times_and_named_and_the_others_are_done(tmp_path: Path) -> None:
    task = CubeTask(str(tmp_path / "out"), count=20, fail=(3, 11))
    with pytest.raises(BlocksFailedError, match=r"2 of 20 blocks failed \(block 3: no good data for 3; block 11"):
        run_task(task)
    tried = CubeWorker.tried(task, "first")
    assert [tried.count(n) for n in range(20)] == [3 if n in (3, 11) else 1 for n in range(20)]
    (task.folder / "mended").touch()
    run_task(task)
    assert total(task) == sum(n**3 for n in range(20))
    assert len(CubeWorker.tried(task, "first")) == len(tried) + 2


def test_a_full_disk_ends_it_at_once_and_it_goes_on_after_that(tmp_path: Path) -> None:
    task = CubeTask(str(tmp_path / "out"), count=20, full=5)
    with pytest.raises(WriteError, match="no space left"):
        run_task(task)
    assert CubeWorker.tried(task, "first")[-1] == 5
    (task.folder / "mended").touch()
    run_task(task)
    assert total(task) == sum(n**3 for n in range(20))
    assert CubeWorker.tried(task, "first").count(4) == 1


def test_an_output_of_another_task_is_refused(tmp_path: Path) -> None:
    run_task(CubeTask(str(tmp_path / "out"), count=4))
    other = CubeTask(str(tmp_path / "out"), count=4, offset=1)
    with pytest.raises(WriteError, match=r"other settings \(offset\)"):
        run_task(other)
    run_task(other, overwrite=True)
    assert total(other) == sum((n + 1) ** 3 for n in range(4))


def test_a_done_map_of_another_task_is_refused(tmp_path: Path) -> None:
    DoneMap(tmp_path / "map", 5, "a").mark([1, 3])
    assert DoneMap(tmp_path / "map", 5, "a").missing.tolist() == [0, 2, 4]
    for blocks, key in ((5, "b"), (6, "a")):
        with pytest.raises(WriteError, match="of another task"):
            DoneMap(tmp_path / "map", blocks, key)


def test_a_task_comes_back_from_its_file(tmp_path: Path) -> None:
    task = CubeTask(str(tmp_path / "out"), fail=(1, 2))
    task.save(tmp_path / "task.json")
    assert CubeTask.load(tmp_path / "task.json") == task
    assert task.key == CubeTask(str(tmp_path / "out"), fail=(1, 2), pause=0.5).key != CubeTask(str(tmp_path)).key
