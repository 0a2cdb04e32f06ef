"""Holding out test parts of labeled crops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from connectomics.cellmap.catalog import Catalog
from connectomics.cellmap.crop_table import CropTable
from connectomics.cellmap.labels import read_labels
from connectomics.errors import InputError
from connectomics.io.multiscale import PlainArray
from connectomics.pipeline.hold_out import hold_out
from tests.cellmap.plain_labels import counts
from tests.cellmap.roots import grid_of, write_label, write_raw


def root_with(folder: Path, values: np.ndarray, *, unknown: int | None = 255) -> Path:
    grid = grid_of(values.shape)  # type: ignore[arg-type]
    write_raw(folder, "set-a", np.zeros(values.shape, np.uint8), grid)
    write_label(folder, "set-a", "crop7", "mito", values, grid, unknown=unknown)
    return folder


def test_the_parts_are_the_crop_in_states_and_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("connectomics.pipeline.hold_out._BLOCK", (8, 8, 8))  # several blocks a part
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
    with pytest.raises(InputError, match="unknown voxels"):
        hold_out(root_with(tmp_path / "all", values) / "set-a", tmp_path / "cut", ["mito"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["all"]


def test_a_class_that_covers_only_a_part_makes_no_empty_arrays(tmp_path: Path) -> None:
    root = root_with(tmp_path / "all", np.ones((4, 4, 40), np.uint8))
    write_label(root, "set-a", "crop7", "ld", np.ones((4, 4, 8), np.uint8), grid_of((4, 4, 8)))
    out = tmp_path / "cut"
    hold_out(root / "set-a", out, ["mito", "ld"])
    assert sorted(Catalog.open(str(out)).crop("set-a", "crop72").labels) == ["mito"]
    assert [e.class_name for e in CropTable.load(out / "test_crops.csv")] == ["mito"]
