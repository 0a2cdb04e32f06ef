"""A dry run: what is left, what it takes, one block timed elsewhere, and nothing left behind."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from connectomics.config.schema import EngineConfig
from connectomics.tasks import run_task
from connectomics.tasks.block_task import BlockTask, Cost
from connectomics.tasks.estimate import estimate
from tests.tasks.kit import CubeTask


def test_blocks_bytes_and_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "not there"))  # the block is tried where the output goes
    tasks = [CubeTask(str(tmp_path / "not made" / f"out{n}"), count=n, pause=0.1) for n in (30, 10)]
    found = estimate(tasks, EngineConfig(workers=4))
    assert (found.tasks, found.workers, found.untimed) == (2, 4, "")
    assert [(s.stage, s.blocks, s.left, s.cost) for s in found.stages] == [
        ("first", 40, 40, Cost(8, 8, 16)),
        ("second", 40, 40, Cost(8, 8, 16)),
    ]
    assert [(s.read, s.written) for s in found.stages] == [(320, 320)] * 2
    for stage in found.stages:
        assert stage.seconds is not None
        assert stage.seconds >= 0.1
        assert stage.held is not None
        assert stage.held > 1e6
    assert found.worker_seconds is not None
    assert found.worker_seconds >= 8
    assert list(tmp_path.iterdir()) == []


def test_what_is_done_does_not_count(tmp_path: Path) -> None:
    task = CubeTask(str(tmp_path / "out"), count=10, fail=(4,))
    with pytest.raises(Exception, match="1 of 10"):
        run_task(task)
    before = sorted(task.folder.rglob("*"))
    found = estimate([task], EngineConfig(), timed=False)
    assert [s.left for s in found.stages] == [1, 10]
    assert [s.left for s in estimate([task], EngineConfig(), timed=False, overwrite=True).stages] == [10, 10]
    assert sorted(task.folder.rglob("*")) == before
    (task.folder / "mended").touch()
    run_task(task)
    assert estimate([task], EngineConfig()).stages == ()


@dataclass(frozen=True)
class Fixed(CubeTask):
    """A task that cannot be done elsewhere, and that does not know its second stage before the first is done."""

    def relocated(self, folder: Path) -> None:  # type: ignore[override]
        return BlockTask.relocated(self, folder)

    def blocks(self, stage: str) -> int:
        return self.count if stage == "first" else int((self.folder / "number").read_text())


def test_what_cannot_be_known_is_said(tmp_path: Path) -> None:
    found = estimate([Fixed(str(tmp_path / "out"))], EngineConfig())
    assert "cannot be tried" in found.untimed
    assert [(s.blocks, s.seconds) for s in found.stages] == [(8, None), (None, None)]
    failing = estimate([CubeTask(str(tmp_path / "out"), fail=(4,))], EngineConfig())
    assert failing.untimed == "first could not be tried alone: block 4: no good data for 4"
