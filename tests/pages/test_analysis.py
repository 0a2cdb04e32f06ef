"""Confusion and calibration: against closed forms on small arrays, block by block as in the whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from connectomics.geometry import VoxelGrid
from connectomics.io.multiscale import Multiscale
from connectomics.io.write import create_multiscale
from connectomics.pages.report.volumes import Item
from connectomics.pages.report.voxel_counts import Confusion, Reliability, calibration_section, confusion_section

from .test_volumes import Fixed


def rows(*values: list[int]) -> NDArray[np.bool_]:
    return np.array(values, bool)


# -- confusion ---------------------------------------------------------------------------------------------------------
def test_a_class_called_another_that_is_absent_is_confused() -> None:
    table = Confusion.none(["a", "b"])
    truth = rows([1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 1, 0])
    found = rows([1, 1, 0, 0, 0, 0], [0, 0, 1, 0, 1, 1])
    table.add(truth, np.ones_like(truth), found)
    assert (table.right.tolist(), table.there.tolist()) == ([2, 1], [4, 1])
    assert table.wrong.tolist() == [[0, 1], [0, 0]]
    assert table.lost.tolist() == [1, 0]
    assert (table.empty.tolist(), table.empty_known) == ([0, 1], 1)


def test_a_part_within_its_whole_is_no_confusion() -> None:
    table = Confusion.none(["whole", "part"])
    truth = rows([1, 1, 1], [1, 1, 0])
    table.add(truth, np.ones_like(truth), truth)
    assert table.wrong.sum() == 0
    assert table.right.tolist() == [3, 2]


def test_where_the_other_class_is_not_known_nothing_is_confused() -> None:
    table = Confusion.none(["a", "b"])
    truth, known = rows([1, 1], [0, 0]), rows([1, 1], [1, 0])
    table.add(truth, known, rows([0, 0], [1, 1]))
    assert table.wrong[0, 1] == 1
    assert table.known[0, 1] == 1
    assert table.empty_known == 0


def test_blocks_of_a_crop_give_what_its_whole_gives() -> None:
    rng = np.random.default_rng(0)
    grid = VoxelGrid((8.0, 4.0, 4.0), (3.0, 1.0, 2.0), (70, 40, 30))
    arrays = {n: [rng.random(grid.shape) > 0.6 for _ in range(2)] for n in "ab"}
    known = rng.random(grid.shape) > 0.3
    items = [
        Item(
            "d",
            "c",
            name,
            grid,
            truth=Fixed(grid, False, true.astype(np.uint8), known),
            prediction=Fixed(grid, False, found.astype(np.uint8), np.ones(grid.shape, bool)),
        )
        for name, (true, found) in arrays.items()
    ]
    whole, parts = Confusion.none("ab"), Confusion.none("ab")
    truth, found = (np.stack([arrays[n][k].ravel() for n in "ab"]) for k in range(2))
    whole.add(truth, np.stack([known.ravel()] * 2), found)
    assert parts.add_crop(items, 1 << 27) == 1.0
    for name in ("right", "there", "wrong", "known", "lost", "empty"):
        assert np.array_equal(getattr(parts, name), getattr(whole, name)), name
    assert Confusion.none("ab").add_crop(items, grid.size) < 1  # half the voxels for each of two classes


def test_the_table_says_shares_and_hides_empty_classes() -> None:
    table = Confusion.none(["a<b", "b", "golgi"])
    truth = rows([1, 1, 1, 1, 0], [0, 0, 0, 0, 1], [0] * 5)
    table.add(truth, np.ones_like(truth), rows([1, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0] * 5))
    body = confusion_section(table, [], 1.0)
    assert "a&lt;b" in body
    assert "golgi" not in body
    assert '<data value="0.75">75 %</data>' in body
    assert '<data value="0.25">25 %</data>' in body
    assert "No confusion table" in confusion_section(Confusion.none([]), [], 1.0)


# -- calibration -------------------------------------------------------------------------------------------------------
def test_a_network_that_is_as_right_as_it_says_has_no_error() -> None:
    r = Reliability()
    for level, present in ((51, 20), (204, 80)):  # 0.2 and 0.8
        values = np.full(100, level, np.uint8)
        r.add(values, np.arange(100) < present, np.ones(100, bool))
    assert r.error() == pytest.approx(0.0)
    assert r.brier() == pytest.approx(0.16)


def test_the_error_is_the_mean_distance_of_share_and_probability() -> None:
    r = Reliability()
    r.add(np.full(30, 255, np.uint8), np.arange(30) < 15, np.ones(30, bool))  # sure, and wrong half the time
    r.add(np.zeros(70, np.uint8), np.zeros(70, bool), np.ones(70, bool))
    assert r.error() == pytest.approx(0.3 * 0.5)
    assert r.brier() == pytest.approx(0.15)
    assert not r.unsure().voxels.any()
    assert np.isnan(Reliability().error())


def test_every_voxel_is_in_one_bin_and_unknown_ones_in_none() -> None:
    rng = np.random.default_rng(1)
    values, present, known = rng.integers(0, 256, 5000, dtype=np.uint8), rng.random(5000) > 0.5, rng.random(5000) > 0.5
    r = Reliability()
    r.add(values, present, known)
    n, mean, share = r.bins()
    assert n.sum() == np.count_nonzero(known)
    assert np.nansum(share * n) == pytest.approx(np.count_nonzero(known & present))
    assert np.nansum(mean * n) == pytest.approx(values[known].sum() / 255)


@pytest.mark.parametrize("dtype", [np.uint8, np.float16])
def test_stored_probabilities_are_counted_on_their_own_grid(tmp_path: Path, dtype: type) -> None:
    grid = VoxelGrid((8.0, 8.0, 8.0), (4.0, 4.0, 4.0), (70, 9, 11))
    present = np.random.default_rng(0).random(grid.shape) > 0.5
    probability = np.where(present, 0.6, 0.2)
    stored = np.rint(probability * 255).astype(dtype) if dtype is np.uint8 else probability.astype(dtype)
    (writer,) = create_multiscale(tmp_path / "p", [grid], np.dtype(dtype))
    writer.write((0, 0, 0), stored)
    truth = Fixed(grid, False, present.astype(np.uint8), np.ones(grid.shape, bool))
    r = Reliability()
    item = Item("d", "c", "er", grid, truth=truth, probability=Multiscale.open(str(tmp_path / "p")))
    assert r.add_item(item, 1 << 27) == 1.0
    assert (r.voxels[153], r.present[153]) == (present.sum(), present.sum())
    assert (r.voxels[51], r.present[51]) == ((~present).sum(), 0)
    assert r.error() == pytest.approx(0.4 * present.mean() + 0.2 * (~present).mean())


def test_the_section_draws_a_line_a_class_and_the_ideal() -> None:
    r = Reliability()
    rng = np.random.default_rng(0)
    values = rng.integers(0, 256, 20000, dtype=np.uint8)
    r.add(values, rng.random(20000) < values / 255, np.ones(20000, bool))
    body = calibration_section({"er": r, "nothing": Reliability()}, 1.0)
    assert body.count('<polyline class="line') == 1
    assert '<line class="ideal"' in body
    assert r.error() < 0.03
    assert "No calibration" in calibration_section({}, 1.0)
