"""Data roots in odd places: spaces, other scripts, links, relative paths, other folders; and nothing is written there.

The whole way below ``mes données ü/日本`` is the fixture `way` of this folder: train, predict, decode, evaluate, export
and score have run there before the first test here.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from connectomics.cli import main
from connectomics.config import load_config
from tests.cli.small_way import Way, pytc


def state_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Everything below a folder, itself included: name -> (size, time of change in ns)."""
    return {str(p.relative_to(folder)): (p.stat().st_size, p.stat().st_mtime_ns) for p in [folder, *folder.rglob("*")]}


def short_way(root: str | Path, config: str | Path, checkpoint: Path, out: Path) -> None:
    """Look, try a training step, predict, evaluate."""
    here = f"dataset.data_root={root}"
    pytc("describe", root)
    pytc("train", config, "--fast-dev-run", here)
    pytc("predict", config, "--checkpoint", checkpoint, "--out", out / "predictions", "--device", "cpu", here)
    pytc("decode", out / "predictions", out / "labels", "decoding.default.threshold=0.25")
    pytc("evaluate", out / "labels", root, "--out", out / "evaluation.json")
    assert set(json.loads((out / "evaluation.json").read_text())["classes"]) == {"mito", "er"}


def test_the_whole_way_in_a_folder_with_spaces_and_other_letters(
    way: Way, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "où ça (1)"
    pytc("describe", way.root, "--json")
    assert json.loads(capfd.readouterr().out)["datasets"][0]["name"] == "set-a"
    pytc("inspect", way.config, "--batches", "1", "--out", out / "page ü.html", f"data.cache_dir={out / 'cache, 2'}")
    pytc("plan", way.root, "--class", "mito", "--no-trial", "--out", out / "plans")
    (planned,) = (out / "plans").glob("*.yaml")
    assert load_config(planned).dataset.data_root == str(way.root)
    pytc("cache", "--dir", way.base / "cache", "--verify")
    pytc("runs", way.base)
    pytc("package", way.run, "--out", out / "netz ä.pytc")
    pytc("predict", "--checkpoint", out / "netz ä.pytc", "--box", "set-a:100,100,100:180,180,180", "--out", out / "box",
         "--device", "cpu", f"dataset.data_root={way.root}")  # fmt: skip
    pytc("measure", way.labels, "--out", out / "measures", "--contact", "mito:er:30")
    assert (out / "measures/mito.csv").is_file()
    pytc("mesh", way.labels, out / "meshes", "--class", "mito")
    assert main(["validate", str(way.submission), "--crops", str(way.table), "--out", str(out / "findings.json")]) in (
        0,
        1,
    )
    rules = {finding["rule"] for finding in json.loads((out / "findings.json").read_text())["findings"]}
    assert not rules & {"missing-class", "missing-crop", "not-a-zip"}
    pytc("report", out / "seite.html", "--run", way.run, "--root", way.root, "--crops", way.table, "--truth", way.truth,
         "--labels", way.labels, "--predictions", way.predictions, "--submission", way.submission,
         "--scores", way.scores, "--evaluation", way.evaluation)  # fmt: skip
    assert "crop1" in (out / "seite.html").read_text(encoding="utf-8")
    pytc("run-task", way.predictions / "set-a.zarr/crop1/task.json")


def test_a_configuration_whose_name_has_spaces(way: Way, tmp_path: Path) -> None:
    config = tmp_path / "mon réseau (v2).yaml"
    shutil.copy(way.config, config)
    pytc("train", config, "--fast-dev-run")


def test_data_are_only_read(way: Way, tmp_path: Path) -> None:
    """As root, permissions say nothing: so whatever would have been written is looked for."""
    before = state_of(way.root)
    short_way(way.root, way.config, way.checkpoint, tmp_path)
    pytc("inspect", way.config, "--batches", "1", "--out", tmp_path / "page.html")
    pytc("plan", way.root, "--class", "mito", "--no-trial", "--out", tmp_path)
    assert state_of(way.root) == before


def test_a_link_to_the_root(way: Way, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(way.root)
    short_way(tmp_path / "link", way.config, way.checkpoint, tmp_path / "out")


def test_a_link_to_a_data_set(way: Way, tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root/set-a").symlink_to(way.root / "set-a")
    short_way(tmp_path / "root", way.config, way.checkpoint, tmp_path / "out")


def test_a_relative_root_from_the_folder_above(way: Way, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(way.base)
    short_way("root", "run.yaml", way.checkpoint, tmp_path)


def test_a_relative_root_from_another_folder(way: Way, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    root, config = (os.path.relpath(path, tmp_path) for path in (way.root, way.config))
    short_way(root, config, way.checkpoint, Path("out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    pytc("run-task", tmp_path / "out/predictions/set-a.zarr/crop1/task.json")
