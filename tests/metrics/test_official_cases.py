"""Every case of the official scorer, with its own numbers."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from connectomics.metrics.challenge import score_instance, score_semantic, score_submission

ARRAYS = [
    "perfect", "empty_prediction", "empty_truth", "both_empty", "errors_isotropic", "errors_anisotropic",
    "boolean_prediction_touching", "one_instance_vs_fragments", "too_many_instances", "corner_touching",
    "large_sparse_prediction_ids", "truth_ids_with_gaps", "thin_slab", "one_hundred_fifty",
    "semantic_errors", "semantic_float_prediction", "semantic_both_empty",
]  # fmt: skip
SUBMISSIONS = [
    "exact_grid", "finer_with_margin", "coarser_multiscale", "missing_labels_and_crop", "smaller_offset",
    "no_attributes", "unprefixed_names",
]  # fmt: skip


def differences(expected: dict[str, Any], found: dict[str, Any], where: str = "") -> list[str]:
    """What of ``expected`` is not in ``found``: counts exactly, distance sums to 1e-6, scores to 1e-9."""
    wrong = []
    for key, value in expected.items():
        other = found.get(key)
        if isinstance(value, dict):
            wrong += differences(value, other or {}, f"{where}/{key}")
        elif isinstance(value, float):
            tolerance = 1e-6 if key == "hausdorff_norm_sum" else 1e-9
            if other is None or abs(value - other) > tolerance:
                wrong.append(f"{where}/{key}: {value} != {other}")
        elif value != other:
            wrong.append(f"{where}/{key}: {value} != {other}")
    return wrong


@pytest.fixture(scope="session")
def official(shared_reference: Path) -> Path:
    return shared_reference / "official_scorer"


def expected_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "expected.json").read_text()))


def test_no_case_is_left_out(official: Path) -> None:
    assert set(expected_of(official / "arrays")) == set(ARRAYS)
    assert set(expected_of(official / "submissions")) == set(SUBMISSIONS)


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("workers", [1, 3])
def test_arrays(official: Path, name: str, workers: int) -> None:
    case = expected_of(official / "arrays")[name]
    volumes = np.load(official / "arrays" / f"{name}.npz")
    if case["kind"] == "instance":
        score: Any = score_instance(volumes["pred"], volumes["truth"], case["voxel_size_nm_zyx"], workers=workers)
        assert score.verified
        assert score.rules == "2026-06"
    else:
        score = score_semantic(volumes["pred"], volumes["truth"])
    assert differences(case["expected"], score.to_dict()) == []


@pytest.mark.parametrize("name", SUBMISSIONS)
@pytest.mark.parametrize("table", ["manifest", "truth's own attributes"])
def test_submissions(official: Path, name: str, table: str) -> None:
    folder = official / "submissions"
    crops = folder / "test_crop_manifest.csv" if table == "manifest" else None
    score = score_submission(folder / f"{name}.zip", folder / "truth.zarr", crops)
    expected = expected_of(folder)[name]
    assert differences(expected, score.to_dict()) == []
    assert score.verified
    ours = {"submitted_only", "submission", "rules", "verified", "by_rules", "warnings"}
    assert set(score.to_dict()) - set(expected) == ours


@pytest.mark.parametrize("name", ["exact_grid", "smaller_offset", "no_attributes"])
def test_submissions_slab_by_slab(official: Path, name: str) -> None:
    """With next to no memory allowed, components are joined over slabs of a plane or two."""
    folder = official / "submissions"
    score = score_submission(folder / f"{name}.zip", folder / "truth.zarr", memory_bytes=1 << 17, workers=1)
    assert differences(expected_of(folder)[name], score.to_dict()) == []


def test_both_totals(official: Path) -> None:
    folder = official / "submissions"
    score = score_submission(folder / "missing_labels_and_crop.zip", folder / "truth.zarr")
    whole = score_submission(folder / "exact_grid.zip", folder / "truth.zarr")
    assert score.submitted_only.classes["ves"] == whole.totals.classes["ves"]
    assert "er" not in score.submitted_only.classes
    assert score.totals.overall is not None
    assert score.submitted_only.overall is not None
    assert score.submitted_only.overall > score.totals.overall
    nothing = score_submission(folder / "coarser_multiscale.zip", folder / "truth.zarr")
    assert nothing.submitted_only.classes == {}
    assert nothing.submitted_only.overall == 0.0
    assert any("crop101: er, mito, nuc are groups" in warning for warning in nothing.warnings)


def test_every_bit_of_the_distance_sums(official: Path) -> None:
    """Not asked for, but so: summed in the official order, the sums are the same to the last bit."""
    cases = expected_of(official / "arrays")
    for name, case in cases.items():
        if case["kind"] == "instance":
            volumes = np.load(official / "arrays" / f"{name}.npz")
            score = score_instance(volumes["pred"], volumes["truth"], case["voxel_size_nm_zyx"])
            assert score.hausdorff_norm_sum == case["expected"]["hausdorff_norm_sum"], name


@pytest.mark.parametrize("name", ["errors_anisotropic", "truth_ids_with_gaps", "too_many_instances", "empty_truth"])
def test_what_the_benchmark_measures_against_is_the_official_way(official: Path, name: str) -> None:
    path = Path(__file__).parents[2] / "benchmarks" / "score_reference.py"
    spec = importlib.util.spec_from_file_location("score_reference", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    case = expected_of(official / "arrays")[name]
    volumes = np.load(official / "arrays" / f"{name}.npz")
    way = module.OfficialWay(volumes["pred"], volumes["truth"], tuple(case["voxel_size_nm_zyx"]))
    assert differences(case["expected"], way.score()) == []
