"""pytc cache: lists, checks and removes decoded crops, and nothing else."""

from __future__ import annotations

import gc
import json
import os
import time
from pathlib import Path

import pytest

from connectomics.cli import main
from connectomics.data.cache import CropCache
from tests.cellmap.roots import grid_of, plain_root, write_label
from tests.data.crop_roots import volume_of


@pytest.fixture
def cache(tmp_path: Path) -> CropCache:
    """Two crops, decoded; the second was last used ten days ago. Beside them what is not ours."""
    import numpy as np

    root = plain_root(tmp_path)
    write_label(root, "set-a", "crop2", "mito", np.ones((8, 8, 8), np.uint8), grid_of((8, 8, 8)))
    folder = tmp_path / "cache"
    for number in range(2):
        volume_of(root, crop=number, cache=folder).prepare()
    gc.collect()  # nobody uses them any more
    cache = CropCache(folder)
    (second,) = [entry for entry in cache.entries() if entry.crop == "set-a/crop2"]
    then = time.time() - 10 * 86400
    os.utime(second.folder / "used", (then, then))
    (folder / "notes-0123456789abcdef0123").mkdir()
    (folder / "notes-0123456789abcdef0123" / "mine.txt").write_text("not an entry")
    (folder / "thesis.txt").write_text("not an entry")
    cache.set_budget(5 * 10**9)
    return cache


def names(cache: CropCache) -> list[str | None]:
    return [entry.crop for entry in cache.entries()]


def test_it_lists_entries_total_and_budget(cache: CropCache, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "--dir", str(cache.folder)]) == 0
    text = capsys.readouterr().out
    assert "set-a/crop1" in text
    assert "8x8x8" in text
    assert "10 days ago" in text
    assert "2 entries" in text
    assert "of 5 GB (data.cache_gb" in text
    assert main(["cache", "--dir", str(cache.folder), "--crop", "set-a/crop2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["budget"] == 5 * 10**9
    assert found["bytes"] == sum(entry.size for entry in cache.entries())
    (entry,) = found["entries"]
    assert (entry["crop"], entry["classes"], entry["voxel_size"]) == ("set-a/crop2", 2, [8.0, 8.0, 8.0])
    assert entry["processes"] == 0


def test_it_removes_what_is_named_and_old(cache: CropCache, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["cache", "--dir", str(cache.folder), "--clear"]
    assert main([*where, "--older-than", "30"]) == 0
    assert names(cache) == ["set-a/crop1", "set-a/crop2"]
    assert main([*where, "--older-than", "5"]) == 0
    assert "removed 1 entries" in capsys.readouterr().out
    assert names(cache) == ["set-a/crop1"]
    assert main([*where, "--crop", "set-a/crop2"]) == 1
    assert "did you mean 'set-a/crop1'" in capsys.readouterr().err
    assert main([*where, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["removed"][0]["crop"] == "set-a/crop1"
    assert names(cache) == []
    assert (cache.folder / "notes-0123456789abcdef0123" / "mine.txt").is_file()
    assert (cache.folder / "thesis.txt").is_file()


def test_it_leaves_what_is_in_use(cache: CropCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    volume = volume_of(tmp_path, cache=cache.folder)
    volume.prepare()
    assert main(["cache", "--dir", str(cache.folder), "--clear"]) == 0
    assert "kept 1 that are in use" in capsys.readouterr().out
    assert names(cache) == ["set-a/crop1"]
    volume.read_raw(volume.grid)


def test_it_finds_damage(cache: CropCache, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "--dir", str(cache.folder), "--verify"]) == 0
    assert "no damage in 2 entries" in capsys.readouterr().out
    folder = cache.entries()[0].folder
    (folder / "codes.npy").write_bytes(b"short")
    assert main(["cache", "--dir", str(cache.folder), "--verify"]) == 1
    assert f"{folder} is damaged (codes.npy" in capsys.readouterr().out
    (folder / "entry.json").write_text("{")
    assert main(["cache", "--dir", str(cache.folder), "--verify", "--json"]) == 1
    damage = [entry["damage"] for entry in json.loads(capsys.readouterr().out)["entries"] if entry["crop"] is None]
    assert "entry.json cannot be read" in damage[0]
    assert main(["cache", "--dir", str(cache.folder), "--clear"]) == 0  # damaged ones can be removed, too
    assert names(cache) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--clear", "--verify"], "give one of them"), (["--older-than", "-1"], "at least 0, got -1")],
)
def test_what_makes_no_sense_is_refused(
    cache: CropCache, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["cache", "--dir", str(cache.folder), *arguments]) == 1
    assert message in capsys.readouterr().err


def test_an_empty_place_is_no_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "--dir", str(tmp_path / "nothing")]) == 0
    assert "0 entries" in capsys.readouterr().out
    assert main(["cache", "--dir", str(tmp_path / "nothing"), "--clear"]) == 0
    assert not (tmp_path / "nothing").exists()
