"""The baseline of the demo: the best interval of raw values, and labels on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from connectomics.cellmap.crop_table import TableEntry
from connectomics.decoding.parameters import DecodeParameters, default_parameters
from connectomics.errors import InputError
from connectomics.geometry import VoxelGrid
from connectomics.io.multiscale import Multiscale
from connectomics.io.write import write_multiscale
from connectomics.pipeline.demo import Interval, best_interval, intensity_histogram, write_labels

GRID = VoxelGrid((8, 8, 8), (804.0, 1604.0, 404.0), (70, 40, 33))


def fitted(raw: np.ndarray, label: np.ndarray, known: np.ndarray) -> Interval:
    return best_interval(intensity_histogram(raw, label, known))


def brute_force(raw: np.ndarray, label: np.ndarray, known: np.ndarray) -> Interval:
    best = (-1.0, 0, 0)
    for low in range(256):
        for high in range(low, 256):
            found = (raw >= low) & (raw <= high) & known
            dice = 2 * (found & label).sum() / max((found.sum() + (label & known).sum()), 1)
            if dice > best[0]:
                best = (dice, low, high)
    return best[1:]


def test_the_best_interval_is_the_best_of_all() -> None:
    rng = np.random.default_rng(3)
    label = rng.random(400) < 0.4
    raw = np.where(label, rng.normal(90, 12, 400), rng.normal(130, 25, 400)).clip(0, 255).astype(np.uint8)
    known = rng.random(400) < 0.8
    assert fitted(raw, label, known) == brute_force(raw, label, known)


def test_unknown_voxels_do_not_matter() -> None:
    rng = np.random.default_rng(4)
    raw = rng.integers(0, 256, (8, 8, 8)).astype(np.float32)
    label = raw < 60
    known = rng.random(raw.shape) < 0.5
    assert fitted(raw, np.where(known, label, ~label), known) == fitted(raw, label, known) == (0, 59)


def test_histograms_of_crops_add_up() -> None:
    rng = np.random.default_rng(5)
    raw, label = rng.integers(0, 256, (2, 50)), rng.random((2, 50)) < 0.5
    known = np.ones((2, 50), bool)
    both = sum(intensity_histogram(r, m, k) for r, m, k in zip(raw, label, known, strict=True))
    assert best_interval(np.asarray(both)) == fitted(raw, label, known)


def test_an_absent_class_gives_an_interval_that_holds_nothing() -> None:
    low, high = fitted(np.arange(10.0), np.zeros(10, bool), np.ones(10, bool))
    assert low > high


def test_raw_in_another_range_is_refused() -> None:
    with pytest.raises(InputError, match="0 to 255, got 0 to 4000"):
        fitted(np.array([0.0, 4000.0]), np.array([True, False]), np.ones(2, bool))


def test_labels_are_written_as_decode_writes_them_and_missing_raw_is_background(tmp_path: Path) -> None:
    raw = np.full(GRID.shape, 200, np.uint8)
    raw[10:30, 10:30, 10:30] = 50
    write_multiscale(tmp_path / "raw", raw, GRID)
    beyond = GRID.crop((-10, 0, 0), GRID.shape)
    entries = [TableEntry(7, "phantom", "mito", beyond), TableEntry(7, "phantom", "er", beyond)]
    parameters = {"mito": default_parameters("mito"), "er": DecodeParameters()}
    intervals = {"mito": (0, 90), "er": (150, 255)}
    write_labels(entries, {"phantom": str(tmp_path / "raw")}, intervals, tmp_path / "l", parameters)
    volumes = {name: Multiscale.open(str(tmp_path / "l/phantom.zarr/crop7" / name)) for name in ("mito", "er")}
    mito, er = (v.read_level(0, (0, 0, 0), GRID.shape, absent_is_missing=False)[0] for v in volumes.values())
    assert mito.sum() == 8000
    assert mito[20:40, 10:30, 10:30].all()
    about = volumes["mito"].attrs["connectomics"]
    assert about["source"] == {"baseline": {"low": 0, "high": 90}}
    assert about["objects"] == 1
    assert not er[:10].any()
    assert er.sum() == 60 * 40 * 33 - 8000
