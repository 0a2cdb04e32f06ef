"""`pytc inspect` on the command line: the page, the summary, and one clear line for every mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from connectomics.cli import main
from tests.cellmap.roots import plain_root

ROOT = Path(__file__).resolve().parents[2]


def run(root: Path, out: Path, *more: str) -> int:
    return main(["inspect", "phantom", f"dataset.data_root={root}", "dataset.classes=[mito]", "data.cache=none",
                 "dataset.train_val_split=1.0", "data.patch_size=[16,16,16]", "data.patches_per_epoch=8",
                 "--batches", "1", "--out", str(out), *more])  # fmt: skip


def failure(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plain_root(tmp_path_factory.mktemp("inspect") / "root")


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--help"]) == 0
    assert "pytc inspect tutorials/" in capsys.readouterr().out.split("Examples:")[1]


def test_it_writes_a_page_and_prints_a_summary(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "page.html"
    assert run(root, out) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[-1] == str(out)
    assert "patches with it" in text
    assert "mito" in text
    assert "loader: " in text
    assert out.read_text().startswith("<!doctype html>")


def test_json_is_the_summary_alone(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "page.html"
    assert run(root, out, "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["page"] == str(out)
    assert summary["same_as_loader"] is True
    (mito,) = summary["classes"]
    assert mito["known"] == 1.0  # the patch is the crop
    assert mito["present"] == 6**3 / 16**3
    assert [p["crop"] for p in summary["patches"]] == ["set-a/crop1"] * 2
    assert summary["loader"]["patches_per_s"] > 0
    assert summary["configuration"]["data.patch_size"] == [16, 16, 16]


def test_a_page_that_is_there_is_replaced_on_demand_and_a_foreign_file_never(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, mine = tmp_path / "page.html", tmp_path / "mine.html"
    assert run(root, out) == 0
    capsys.readouterr()
    assert run(root, out) == 1
    assert "--overwrite" in failure(capsys)
    assert run(root, out, "--overwrite") == 0
    capsys.readouterr()
    mine.write_text("mine")
    assert run(root, mine, "--overwrite") == 1
    assert "was not written by inspect" in failure(capsys)
    assert mine.read_text() == "mine"


def test_mistakes_are_one_line(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "page.html"
    for wrong, words in (
        (["data.patch_sze=[8,8,8]"], "data.patch_size"),
        (["dataset.data_root=/nowhere"], "/nowhere"),
        (["dataset.classes=[mitto]"], "mito"),
        (["++data.intensity={nois: {}}"], "noise"),
        (["--batches", "0"], "at least 1"),
        (["--out", str(tmp_path / "page.pdf")], ".html"),
    ):
        assert run(root, out, *wrong) == 1, wrong
        assert words in failure(capsys), wrong
    assert main(["inspect", "phantm", "--out", str(out)]) == 1
    assert "'phantom'" in failure(capsys)
    assert main(["inspect", str(tmp_path / "no.yaml"), "--out", str(out)]) == 1
    assert "no.yaml" in failure(capsys)
    assert not out.exists()
