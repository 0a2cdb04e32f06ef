"""``benchmarks/bench_data.py`` measures the patches of the loader."""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path

import pytest

from connectomics.data.sampling import PatchSampler

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
bench_data = pytest.importorskip("bench_data")


@pytest.mark.parametrize("augmented", [False, True])
def test_every_stage_is_measured(phantom: Path, tmp_path: Path, augmented: bool) -> None:
    dataset = bench_data.dataset_of(phantom, tmp_path / "cache", ("mito", "nuc", "er"), 16, augmented)
    sampler = PatchSampler(dataset.sampled_crops(), 4, classes=dataset.classes)
    requests = list(islice(sampler, 3))
    found = bench_data.measure(dataset, requests)
    assert set(found) == {*bench_data.STAGES, "whole"} - {"intensity"}
    assert all(value > 0 for value in found.values())
    assert found["whole"] == found["patch"] + found["pack"]


def test_a_limit_is_about_the_median() -> None:
    assert bench_data.Limit("a", (1.0, 9.0, 2.0), 3.0).holds
    assert bench_data.Limit("a", (1.0, 9.0, 4.0), 3.0).line().startswith("FAIL  a")
