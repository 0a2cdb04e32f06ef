"""`score_instance` against the plain rules, and what it says of its input."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from connectomics.errors import InputError, UnknownNameError
from connectomics.metrics.challenge import RULES, Rules, get_rules, score_instance, score_semantic
from connectomics.metrics.challenge import instance_distances as distances_module
from tests.metrics import plain

VOXEL_SIZES = [(8.0, 8.0, 8.0), (1.74, 2.0, 2.0), (5.24, 4.0, 4.0), (16.0, 2.0, 3.5)]


def volumes(seed: int, shape: tuple[int, int, int], n: int, dtype: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """Boxes of labels, some of them split, merged, moved, missed or invented in the prediction; ids with gaps."""
    rng = np.random.default_rng(seed)
    truth, pred = np.zeros(shape, np.uint32), np.zeros(shape, np.int64)
    for i in range(n):
        low = rng.integers(0, np.array(shape))
        box = tuple(slice(a, a + int(rng.integers(1, 6))) for a in low)
        truth[box] = 1 + i + (i > n // 2) * int(rng.integers(0, 4))
        if rng.random() < 0.8:
            moved = tuple(
                slice(max(0, s.start + d), s.stop + d) for s, d in zip(box, rng.integers(-1, 2, 3), strict=True)
            )
            pred[moved] = int(rng.integers(1, n + 3))
    pred[rng.random(shape) < 0.02 * rng.integers(0, 3)] = 0
    return pred.astype(dtype), truth


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(1, 14), st.integers(1, 14), st.integers(1, 14)),
    n=st.integers(0, 8),
    dtype=st.sampled_from(["uint8", "int16", "uint64", "float32", "float64", "bool", ">u4"]),
    voxel_size=st.sampled_from(VOXEL_SIZES),
)
def test_equals_the_plain_rules(
    seed: int, shape: tuple[int, int, int], n: int, dtype: str, voxel_size: tuple[float, float, float]
) -> None:
    pred, truth = volumes(seed, shape, n, dtype)
    native = pred.astype(pred.dtype.newbyteorder("="))
    expected = plain.score_instance(native, truth, voxel_size)
    found = score_instance(pred, truth, voxel_size, workers=1)
    assert {k: v for k, v in found.to_dict().items() if k in expected} == expected


def test_the_largest_truth_id_counts_not_their_number() -> None:
    """7 fragments for one truth pass (limit 10 + 50 exp(-1/5) = 50.9); with id 1 and 400 fragments they do not."""
    truth = np.zeros((20, 20, 20), np.uint16)
    truth[:1] = 1
    pred = np.zeros_like(truth)
    pred[::2, ::2, ::2] = np.arange(1000).reshape(10, 10, 10) % 2 + 1
    assert score_instance(pred, truth, (8, 8, 8)).status == "skipped_too_many_instances"
    truth[truth == 1] = 200
    assert score_instance(pred, truth, (8, 8, 8)).status == "scored"


def test_too_many_overlaps_drop_the_crop() -> None:
    class Strict(type(get_rules("2026-06"))):  # type: ignore[misc]
        max_pairs = 1

    pred, truth = volumes(1, (12, 12, 12), 8, "uint8")
    assert score_instance(pred, truth, (8, 8, 8), Strict()).status == "skipped_too_many_instances"


def test_the_instance_table() -> None:
    truth = np.zeros((12, 12, 12), np.uint16)
    truth[0:4, 0:4, 0:4] = 7
    truth[8:, 8:, 8:] = 3
    pred = np.zeros((12, 12, 12), np.uint32)
    pred[0:4, 0:4, 0:2] = 70_000
    score = score_instance(pred, truth, (4.0, 4.0, 4.0))
    rows = score.instances.rows() if score.instances else []
    assert rows == [
        {"truth": 3, "prediction": 0, "component": 0, "iou": 0.0, "distance_nm": 24.0, "voxels": 64},
        {"truth": 7, "prediction": 70_000, "component": 1, "iou": 0.5, "distance_nm": 8.0, "voxels": 64},
    ]


def test_panoptic_quality_wants_more_than_half() -> None:
    truth = np.zeros((4, 4, 8), np.uint8)
    truth[..., :4] = 1
    pred = np.zeros_like(truth)
    pred[..., :3] = 1
    panoptic = score_instance(pred, truth, (8, 8, 8)).panoptic
    assert panoptic is not None
    assert (panoptic.tp, panoptic.fp, panoptic.fn, panoptic.quality) == (1, 0, 0, 0.75)
    pred[..., 2:3] = 0
    panoptic = score_instance(pred, truth, (8, 8, 8)).panoptic
    assert panoptic is not None
    assert (panoptic.tp, panoptic.fp, panoptic.fn, panoptic.quality) == (0, 1, 1, 0.0)


@pytest.mark.parametrize("ids", [(70_000, 5_000_000), (3, 2**40), (1, 2**62)])
def test_sparse_truth_ids(ids: tuple[int, int]) -> None:
    """Ids far beyond the number of voxels cost nothing and change nothing but their names."""
    small, truth = np.zeros((2, 10, 10, 10), np.uint64)
    small[:3], small[6:] = 1, 2
    truth[:3], truth[6:] = ids
    pred = np.zeros_like(small)
    pred[:4], pred[7:] = 5, 9
    expected = score_instance(pred, small, (8, 8, 8))
    found = score_instance(pred, truth, (8, 8, 8))
    assert found == expected
    assert found.instances is not None
    assert found.instances.truth.tolist() == list(ids)


def test_nan_is_background_counted_and_warned_of() -> None:
    truth = np.zeros((6, 6, 6), np.uint8)
    truth[:3] = 1
    pred = truth.astype(np.float32)
    pred[5, 5, :] = np.nan
    with pytest.warns(UserWarning, match="6 voxels of the prediction are NaN"):
        score = score_instance(pred, truth, (8, 8, 8))
    assert (score.tp, score.fp, score.nan_voxels) == (1, 0, 6)
    assert score.to_dict()["nan_voxels"] == 6
    with pytest.warns(UserWarning, match="NaN"):
        semantic = score_semantic(pred, truth)
    assert (semantic.tp, semantic.fp, semantic.fn, semantic.nan_voxels) == (108, 0, 0, 6)


@pytest.mark.parametrize(
    ("pred", "truth", "says"),
    [
        (np.zeros((4, 4)), np.zeros((4, 4), int), "three-dimensional"),
        (np.zeros((4, 4, 4)), np.zeros((4, 4, 5), int), r"\(4, 4, 4\) and \(4, 4, 5\)"),
        (np.zeros((0, 4, 4)), np.zeros((0, 4, 4), int), "empty"),
        (np.zeros((2, 2, 2), complex), np.zeros((2, 2, 2), int), "complex128"),
        (np.zeros((2, 2, 2)), np.full((2, 2, 2), -1), "positive, got -1"),
        (np.zeros((2, 2, 2)), np.full((2, 2, 2), 0.5), "fractions"),
        (np.zeros((2, 2, 2)), np.full((2, 2, 2), 1 << 63, np.uint64), "below 2"),
        (np.zeros((2, 2, 2)), np.array(["a"] * 8).reshape(2, 2, 2), "dtype"),
    ],
)
def test_bad_volumes_are_refused_in_one_line(pred: NDArray[Any], truth: NDArray[Any], says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        score_instance(pred, truth, (8, 8, 8))
    assert "\n" not in str(caught.value)


def test_bad_voxel_size_and_rules() -> None:
    ones = np.ones((3, 3, 3), np.uint8)
    with pytest.raises(InputError, match="voxel_size"):
        score_instance(ones, ones, (8, 8))
    with pytest.raises(UnknownNameError, match="did you mean '2026-06'"):
        score_instance(ones, ones, (8, 8, 8), "2026-6")


# -- versions of the rules ---------------------------------------------------------------------------------------------
def two_truths_one_found() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Truths 1 and 2; only 2 is predicted, beside a second, invented component 2 (numbers in reading order)."""
    truth = np.zeros((16, 16, 16), np.uint8)
    truth[0:2, 0:2, 0:2] = 1
    truth[6:10, 6:10, 6:10] = 2
    pred = np.zeros_like(truth)
    pred[6:10, 6:10, 6:8] = 1
    pred[12:14, 6:8, 6:8] = 1
    return pred, truth


def test_the_quirk_of_2026_06() -> None:
    """Component 2 is nobody's, yet it is joined to truth 2's match: the distance grows from 16 to 32 nm."""
    pred, truth = two_truths_one_found()
    score = score_instance(pred, truth, (8.0, 8.0, 8.0), "2026-06")
    assert score.instances is not None
    assert score.instances.component.tolist() == [0, 1]
    assert score.instances.distance.tolist() == [64.0, 32.0]
    assert (score.tp, score.fp, score.fn, score.n_hausdorff) == (1, 1, 1, 3)


def test_2026_07_as_described_and_not_verified() -> None:
    pred, truth = two_truths_one_found()
    score = score_instance(pred, truth, (8.0, 8.0, 8.0), "2026-07")
    assert not score.verified
    assert score.rules == "2026-07-exponential"  # the first of the two readings
    assert score.instances is not None
    assert score.instances.distance.tolist() == [math.inf, 16.0]
    assert score.n_hausdorff == 3
    assert score.hausdorff_norm_sum == pytest.approx(0.1 ** (16 / 64))
    rules = get_rules("2026-07")
    assert rules.mapped(np.array([0, 64, np.inf], np.float32), (8, 8, 8), 64.0).tolist() == [1.0, 0.1, 0.0]
    assert "unverified" in (type(rules).__doc__ or "")


def test_a_rule_is_one_small_class() -> None:
    class Generous(Rules):
        """Everything unmatched is at distance 0."""

        version = "test"
        verified = False

        def unmatched_distance(self, cap: float) -> float:
            return 0.0

        def mapped(self, distances: NDArray[Any], voxel_size: Any, cap: float) -> NDArray[Any]:
            return np.ones(distances.shape)

    pred, truth = two_truths_one_found()
    score = score_instance(pred, truth, (8, 8, 8), Generous())
    assert (score.rules, score.hausdorff_norm_sum, score.n_hausdorff) == ("test", 3.0, 3)
    assert "test" not in RULES


def test_instance_classes_are_those_of_the_class_table() -> None:
    from connectomics.cellmap.classes import INSTANCE_CLASSES

    assert get_rules("2026-06").instance_classes == INSTANCE_CLASSES


# -- memory ------------------------------------------------------------------------------------------------------------
def test_the_memory_budget_lets_a_large_task_run_alone() -> None:
    budget = distances_module.MemoryBudget(10)
    with budget.held(1000):
        pass
    with budget.held(4), budget.held(6):
        pass


def test_matching_without_a_node_for_every_absent_id(monkeypatch: pytest.MonkeyPatch) -> None:
    from connectomics.metrics.challenge import scoring

    pred, truth = volumes(5, (14, 14, 14), 8, "uint8")
    expected = score_instance(pred, truth, (8, 8, 8))
    monkeypatch.setattr(scoring, "_MAX_NODES", 0)
    assert score_instance(pred, truth, (8, 8, 8)).to_dict() == expected.to_dict()
