"""Holding out test parts of labeled crops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from connectomics.cellmap.catalog import Catalog
from connectomics.cellmap.crop_table import CropTable
from connectomics.cellmap.labels import read_labels
from connectomics.errors import InputError
from connectomics.geometry import VoxelGrid
from connectomics.io.multiscale import PlainArray
from connectomics.io.write import create_array, ensure_group
from connectomics.pages.report.library import Library
from connectomics.pages.report.sources import ReportSources
from connectomics.pages.report.volumes import plain_labels
from connectomics.pipeline.hold_out import hold_out
from connectomics.pipeline.score import score
from tests.cellmap.plain_labels import counts
from tests.cellmap.roots import grid_of, write_label, write_raw


def root_with(folder: Path, values: np.ndarray, *, unknown: int | None = 255) -> Path:
    grid = grid_of(values.shape)  # type: ignore[arg-type]
    write_raw(folder, "set-a", np.zeros(values.shape, np.uint8), grid)
    write_label(folder, "set-a", "crop7", "mito", values, grid, unknown=unknown)
    return folder


def test_the_parts_are_the_crop_in_states_and_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("connectomics.cellmap.catalog._BLOCK_VOXELS", 512)  # several blocks a part
    rng = np.random.default_rng(0)
    values = rng.choice([0, 1, 255], (10, 10, 40)).astype(np.uint8)
    values[:, :, 30:] = rng.choice([0, 1], (10, 10, 10))  # the test part has nothing unknown
    out = tmp_path / "cut"
    sides = hold_out(root_with(tmp_path / "all", values) / "set-a", out, ["mito", "ld"])
    assert sides == (["set-a/crop71"], ["set-a/crop72"])
    catalog = Catalog.open(str(out))
    whole = read_labels(Catalog.open(str(tmp_path / "all")).crop("set-a", "crop7"), ["mito"], grid_of((10, 10, 40)))
    for name, where in (("crop71", slice(0, 24)), ("crop72", slice(24, 30))):
        crop = catalog.crop("set-a", name)
        part = read_labels(crop, ["mito"], crop.grid)
        np.testing.assert_array_equal(part.known, whole.known[..., where])
        np.testing.assert_array_equal(part.present, whole.present[..., where])
        stored = crop.labels["mito"].annotation.counts
        assert stored == {k: v for k, v in counts(part, "mito").items() if k != "present"}
    (entry,) = CropTable.load(out / "test_crops.csv")
    truth = PlainArray.open(out / "truth.zarr/crop73/mito")
    assert truth.grid == entry.grid
    np.testing.assert_array_equal(truth.read(), values[:, :, 30:])


def test_nothing_is_left_of_what_cannot_be_cut(tmp_path: Path) -> None:
    values = np.full((4, 4, 20), 255, np.uint8)
    with pytest.raises(InputError, match="nothing is known of mito in the test parts"):
        hold_out(root_with(tmp_path / "all", values) / "set-a", tmp_path / "cut", ["mito"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["all"]


@pytest.mark.parametrize("name", ["mito", "er"])
def test_the_score_leaves_out_what_is_unknown_in_the_test_part(tmp_path: Path, name: str) -> None:
    """Predicted objects in unknown voxels cost nothing; in known voxels, they do."""
    values = np.zeros((8, 8, 40), np.uint8)
    values[1:4, 1:4, 32:35] = 1
    values[:, :, 37:] = 255
    root = tmp_path / "all"
    write_raw(root, "set-a", np.zeros(values.shape, np.uint8), grid_of(values.shape))
    write_label(root, "set-a", "crop7", name, values, grid_of(values.shape), unknown=255)
    hold_out(root / "set-a", tmp_path / "cut", [name])
    known = values[:, :, 30:] != 255
    truth, grid = tmp_path / "cut/truth.zarr", CropTable.load(tmp_path / "cut/test_crops.csv").entries[0].grid
    np.testing.assert_array_equal(plain_labels(str(truth / "crop73" / name), name).read(grid)[1], known)
    assert [w.class_name for w in Library.open(ReportSources(truth=truth)).wanted()] == [name]
    found = {}
    for case, begin in (("unknown", 37), ("known", 36)):
        prediction = (values[:, :, 30:] == 1).astype(np.uint8)
        prediction[6:, 6:, begin - 30 :] = 1
        ensure_group(tmp_path / case / "crop73")
        array = create_array(tmp_path / case / "crop73" / name, prediction.shape, prediction.dtype)
        array.write((0, 0, 0), prediction)
        scores = score(tmp_path / case, tmp_path / "cut/truth.zarr", crops=tmp_path / "cut/test_crops.csv")
        found[case] = scores.classes[name]["score"]
    assert found["unknown"] == 1.0 > found["known"]


def test_a_class_that_is_unknown_in_the_whole_test_part_is_not_scored(tmp_path: Path) -> None:
    values = np.ones((4, 4, 40), np.uint8)
    root = root_with(tmp_path / "all", values)
    values[:, :, 30:] = 255
    write_label(root, "set-a", "crop7", "ld", values, grid_of((4, 4, 40)), unknown=255)
    hold_out(root / "set-a", tmp_path / "cut", ["mito", "ld"])
    assert [e.class_name for e in CropTable.load(tmp_path / "cut/test_crops.csv")] == ["mito"]
    assert sorted(p.name for p in (tmp_path / "cut/truth.zarr/crop73").iterdir() if p.is_dir()) == ["mito"]


def test_nothing_is_trained_on_in_a_test_part(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The second crop lies in the test part of the first, the fourth reaches into that of the third."""
    root = tmp_path / "all"
    write_raw(root, "set-a", np.zeros((4, 4, 240), np.uint8), grid_of((4, 4, 240)))
    for crop, length, begin in (("crop2", 8, 31), ("crop1", 40, 0), ("crop3", 80, 100), ("crop4", 20, 170)):
        grid = VoxelGrid((8.0,) * 3, (4.0, 4.0, 8.0 * begin + 4), (4, 4, length))
        write_label(root, "set-a", crop, "mito", np.ones(grid.shape, np.uint8), grid)
    out = tmp_path / "cut"
    train, val = hold_out(root / "set-a", out, ["mito"])
    catalog = Catalog.open(str(out))
    seen = [catalog.crop(*key.split("/")).box for key in (*train, *val)]
    tests = [entry.grid.box for entry in CropTable.load(out / "test_crops.csv")]
    assert (len(train), len(val), len(tests)) == (2, 2, 2)
    assert not any(min(a.intersect(b).extent) > 0 for a in seen for b in tests)
    for small, large in ((2, 1), (4, 3)):
        assert f"set-a/crop{small} overlaps set-a/crop{large} and is left out" in caplog.text


def test_a_class_that_covers_only_a_part_makes_no_empty_arrays(tmp_path: Path) -> None:
    root = root_with(tmp_path / "all", np.ones((4, 4, 40), np.uint8))
    write_label(root, "set-a", "crop7", "ld", np.ones((4, 4, 8), np.uint8), grid_of((4, 4, 8)))
    out = tmp_path / "cut"
    hold_out(root / "set-a", out, ["mito", "ld"])
    assert sorted(Catalog.open(str(out)).crop("set-a", "crop72").labels) == ["mito"]
    assert [e.class_name for e in CropTable.load(out / "test_crops.csv")] == ["mito"]
