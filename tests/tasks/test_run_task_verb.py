"""`pytc run-task`: a stored task of any kind, and one line for all that is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from connectomics.cli.app import app
from connectomics.errors import BlocksFailedError, ConnectomicsError
from connectomics.pipeline.run_task import TASK_KINDS, load_task
from tests.tasks.kit import CubeTask


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASK_KINDS, "cube", "tests.tasks.kit:CubeTask")


def pytc(*words: object) -> Result:
    return CliRunner().invoke(app, ["run-task", *map(str, words), "--device", "cpu"])


def test_every_kind_is_where_it_says() -> None:
    from importlib import import_module

    for kind, place in TASK_KINDS.items():
        module, _, name = place.partition(":")
        assert getattr(import_module(module), name).kind == kind


@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_from_the_file_to_the_output_and_then_nothing_is_left(tmp_path: Path, suffix: str) -> None:
    task = CubeTask(str(tmp_path / "out"), count=10)
    file = tmp_path / f"task{suffix}"
    task.save(file)  # JSON is YAML
    assert load_task(file) == task
    dry = pytc(file, "--dry-run", "engine.workers=2")
    assert dry.exit_code == 0
    assert "first" in dry.stdout
    assert "with 2 workers, for all stages" in dry.stdout
    assert not task.folder.exists()
    assert pytc(file, "engine.workers=2").stdout == "out: complete\n"
    assert (task.folder / "sum").read_text() == "2025"
    assert pytc(file).stdout == "nothing to do: out is complete\n"
    (task.folder / "sum").write_text("wrong")
    assert pytc(file, "--overwrite").exit_code == 0
    assert (task.folder / "sum").read_text() == "2025"


def test_resume_needs_something_to_go_on_with(tmp_path: Path) -> None:
    task = CubeTask(str(tmp_path / "out"), count=10, fail=(3,))
    task.save(tmp_path / "task.json")
    assert "nothing was begun below" in str(pytc(tmp_path / "task.json", "--resume").exception)
    failed = pytc(tmp_path / "task.json")
    assert failed.exit_code != 0
    assert isinstance(failed.exception, BlocksFailedError)
    assert "block 3" in str(failed.exception)
    (task.folder / "mended").touch()
    assert pytc(task.folder / "task.json", "--resume").exit_code == 0


def test_one_line_for_what_is_wrong(tmp_path: Path) -> None:
    good = {"kind": "cube", **CubeTask(str(tmp_path / "out")).to_dict()}
    files = {
        "none.json": (None, "no task at"),
        "list.json": ([1], "must hold a JSON object"),
        "kind.json": ({**good, "kind": "cubes"}, "unknown kind of task 'cubes'.*did you mean 'cube'"),
        "key.json": ({**good, "sides": 3}, "key.json"),
        "ok.json": (good, ""),
    }
    for name, (content, message) in files.items():
        if content is not None:
            (tmp_path / name).write_text(json.dumps(content))
        if message:
            with pytest.raises(ConnectomicsError, match=message):
                raise pytc(tmp_path / name).exception or AssertionError("it went well")
    (tmp_path / "bad.yaml").write_text("kind: [")
    for words, message in (
        ((tmp_path / "bad.yaml",), "not valid YAML"),
        ((tmp_path / "ok.json", "data.batch_size=2"), "expected engine.key=value"),
        ((tmp_path / "ok.json", "engine.worker=2"), "did you mean 'engine.workers'"),
    ):
        with pytest.raises(ConnectomicsError, match=message):
            raise pytc(*words).exception or AssertionError("it went well")


def test_overwrite_with_resume_replaces_what_is_of_another_task_and_keeps_what_is_of_this_one(tmp_path: Path) -> None:
    """So a queue may start the same command again and again."""
    mine = CubeTask(str(tmp_path / "out"), count=4)
    mine.save(tmp_path / "mine.json")
    CubeTask(str(tmp_path / "out"), count=4, offset=1).save(tmp_path / "other.json")
    both = ("--overwrite", "--resume")
    assert pytc(tmp_path / "mine.json", *both).exit_code == 0  # also where nothing was begun
    begun = (mine.folder / "task.json").stat().st_mtime_ns
    assert "nothing to do" in pytc(tmp_path / "mine.json", *both).output
    assert (mine.folder / "task.json").stat().st_mtime_ns == begun
    assert pytc(tmp_path / "mine.json", "--overwrite").exit_code == 0
    assert (mine.folder / "task.json").stat().st_mtime_ns != begun
    assert pytc(tmp_path / "other.json", *both).exit_code == 0
    assert "other settings (offset)" in str(pytc(tmp_path / "mine.json").exception)


def test_the_output_of_another_task_is_refused(tmp_path: Path) -> None:
    CubeTask(str(tmp_path / "out"), count=4).save(tmp_path / "one.json")
    CubeTask(str(tmp_path / "out"), count=4, offset=1).save(tmp_path / "other.json")
    assert pytc(tmp_path / "one.json").exit_code == 0
    assert "other settings (offset)" in str(pytc(tmp_path / "other.json").exception)
    assert pytc(tmp_path / "other.json", "--overwrite").exit_code == 0
