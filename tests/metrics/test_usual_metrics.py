"""Dice and its kin, adapted Rand and VOI, counts over known voxels, bootstrap, summaries."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import adapted_rand_error, variation_of_information

from connectomics.errors import InputError
from connectomics.metrics.cellmap_metrics import evaluate_instance, evaluate_semantic
from connectomics.metrics.evaluate import (
    Counts,
    LabelEvaluation,
    bootstrap_interval,
    evaluate_label,
    summarize,
    totals,
)
from connectomics.metrics.overlaps import pair_counts


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(2, 12)),
    labels=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    dtypes=st.tuples(st.sampled_from(["uint8", "int32", "uint64"]), st.sampled_from(["uint16", "int64"])),
)
def test_instances_equal_scikit_image(
    seed: int, shape: tuple[int, int, int], labels: tuple[int, int], dtypes: tuple[str, str]
) -> None:
    rng = np.random.default_rng(seed)
    gt = rng.integers(0, labels[0] + 1, shape).repeat(2, axis=0).astype(dtypes[0])
    pred = rng.integers(0, labels[1] + 1, shape).repeat(2, axis=0).astype(dtypes[1])
    gt[:2, 0, 0] = 1  # without a pair of true voxels scikit-image divides nothing by nothing
    found = evaluate_instance(pred, gt)
    a, b = gt.astype(np.int64), pred.astype(np.int64)
    assert found["rand_error"] == pytest.approx(adapted_rand_error(a, b, ignore_labels=(0,))[0], abs=1e-12)
    split, merge = variation_of_information(a, b, ignore_labels=(0,))
    assert found["voi_split"] == pytest.approx(split, abs=1e-9)
    assert found["voi_merge"] == pytest.approx(merge, abs=1e-9)
    known = rng.random(gt.shape) < 0.7
    if np.any(a[known]):  # leaving voxels out is the same as cutting them away
        assert evaluate_instance(pred, gt, known) == pytest.approx(evaluate_instance(pred[known], gt[known]))


def test_split_and_merge_are_not_mixed_up() -> None:
    one, two = np.ones((2, 4, 4), np.uint8), np.ones((2, 4, 4), np.uint8)
    two[1] = 2
    assert evaluate_instance(two, one) == pytest.approx(
        {"rand_error": 1 - 2 * 480 / 1472, "voi_split": 1, "voi_merge": 0}
    )
    assert evaluate_instance(one, two)["voi_merge"] == pytest.approx(1.0)
    assert evaluate_instance(one, two)["voi_split"] == 0.0


@pytest.mark.parametrize(
    ("pred", "gt", "expected"),
    [(0, 0, (0, 0, 0)), (1, 0, (1, 0, 0)), (0, 1, (0, 0, 0)), (1, 1, (0, 0, 0))],
)
def test_instances_of_empty_and_full_volumes(pred: int, gt: int, expected: tuple[float, float, float]) -> None:
    """An empty prediction inside one object is one segment, as good as any; inside several it merges them."""
    shape = (3, 3, 3)
    found = evaluate_instance(np.full(shape, pred, np.uint8), np.full(shape, gt, np.uint8))
    assert tuple(found.values()) == expected
    several = np.arange(27, dtype=np.uint8).reshape(shape) // 9 + 1
    assert evaluate_instance(np.zeros(shape), several)["voi_merge"] == pytest.approx(math.log2(3))


def test_many_pairs_and_large_labels() -> None:
    """The table grows, and labels may be anything that fits 64 bits."""
    rng = np.random.default_rng(0)
    a = rng.integers(0, 2**63, 40_000, dtype=np.int64)
    b = -rng.integers(0, 2**62, 40_000, dtype=np.int64)
    first, second, n = pair_counts(np.concatenate([a, a]), np.concatenate([b, b]))
    assert len(n) == 40_000
    assert set(n.tolist()) == {2}
    order = np.argsort(a)
    np.testing.assert_array_equal(first, a[order].astype(np.uint64))
    np.testing.assert_array_equal(second.view(np.int64), b[order])


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), density=st.sampled_from([0.0, 0.2, 1.0]), part=st.sampled_from([0.0, 0.5, 1.0]))
def test_counts_add_up_over_blocks_and_leave_out_the_unknown(seed: int, density: float, part: float) -> None:
    rng = np.random.default_rng(seed)
    pred, gt = rng.random((2, 6, 7, 8)) < density
    known = rng.random((6, 7, 8)) < part
    whole = Counts.of(pred, gt, known)
    assert whole == sum((Counts.of(pred[z], gt[z], known[z]) for z in range(6)), Counts())
    assert whole == Counts.of(pred[known], gt[known])
    assert whole.known == np.count_nonzero(known)
    changed = np.where(known, gt, ~gt)
    assert whole == Counts.of(pred, changed, known)
    assert evaluate_semantic(pred, gt, known) == {k: whole.to_dict()[k] for k in ("dice", "iou", "precision", "recall")}


def test_semantic_by_hand() -> None:
    gt, pred = np.zeros((2, 1, 1, 10), np.float32)
    gt[..., :4], pred[..., 2:8] = 0.2, 7
    assert evaluate_semantic(pred, gt) == {"dice": 0.4, "iou": 0.25, "precision": 2 / 6, "recall": 0.5}


def test_semantic_of_empty_volumes() -> None:
    nothing, all_of_it = np.zeros((2, 2, 2)), np.ones((2, 2, 2))
    assert set(evaluate_semantic(nothing, nothing).values()) == {1.0}
    assert set(evaluate_semantic(nothing, all_of_it).values()) == {0.0}
    assert set(evaluate_semantic(all_of_it, nothing).values()) == {0.0}
    assert set(evaluate_semantic(all_of_it, nothing, nothing).values()) == {1.0}


@pytest.mark.parametrize("evaluate", [evaluate_semantic, evaluate_instance])
def test_shapes_must_agree(evaluate: Any) -> None:
    with pytest.raises(InputError, match=r"\(2, 2, 2\)"):
        evaluate(np.zeros((2, 2, 2)), np.zeros((2, 2, 3)))
    with pytest.raises(InputError, match="known"):
        evaluate(np.zeros((2, 2, 2)), np.zeros((2, 2, 2)), np.zeros((2, 2)))


def test_labels_must_be_whole() -> None:
    with pytest.raises(InputError, match="fractions"):
        evaluate_instance(np.full((2, 2, 2), 0.5), np.ones((2, 2, 2)))
    with pytest.raises(InputError, match="dtype"):
        evaluate_instance(np.full((2, 2, 2), 1j), np.ones((2, 2, 2)))


# -- intervals and summaries -------------------------------------------------------------------------------------------
def test_the_interval_is_seeded_and_holds_the_pooled_value() -> None:
    rng = np.random.default_rng(1)
    crops = [Counts(int(tp), int(fp), 10) for tp, fp in rng.integers(1, 100, (12, 2))]
    low, high = bootstrap_interval(crops, lambda c: c.dice, seed=3)
    assert (low, high) == bootstrap_interval(crops, lambda c: c.dice, seed=3)
    assert (low, high) != bootstrap_interval(crops, lambda c: c.dice, seed=4)
    assert low < sum(crops, Counts()).dice < high
    narrow = bootstrap_interval(crops, lambda c: c.dice, level=0.5)
    assert low < narrow[0] < narrow[1] < high
    assert bootstrap_interval(crops[:1], lambda c: c.dice) == (crops[0].dice, crops[0].dice)


def test_the_interval_covers_about_as_often_as_it_says() -> None:
    """Means of 30 normal numbers: a 90 % interval holds the true mean in most of 200 repetitions."""
    rng = np.random.default_rng(0)
    hits = 0
    for repetition in range(200):
        items = [np.array([v, 1.0]) for v in rng.normal(5.0, 1.0, 30)]
        low, high = bootstrap_interval(items, lambda s: s[0] / s[1], samples=200, level=0.9, seed=repetition)
        hits += low <= 5.0 <= high
    assert 165 <= hits <= 196


def test_bad_intervals() -> None:
    with pytest.raises(InputError, match="at least one crop"):
        bootstrap_interval([], lambda c: 0.0)
    with pytest.raises(InputError, match="level"):
        bootstrap_interval([Counts()], lambda c: 0.0, level=1.0)


def test_a_label_over_known_voxels_only() -> None:
    gt = np.zeros((8, 8, 8), np.uint8)
    gt[:4, :4, :4], gt[5:, 5:, 5:] = 1, 2
    pred = gt.copy()
    pred[5:, 5:, 5:] = 0
    known = np.ones(gt.shape, bool)
    known[5:] = False
    one = evaluate_label(pred, gt, known, voxel_size=(8, 8, 8), dataset="d", crop="crop1", class_name="mito")
    assert one is not None
    assert one.instances is not None
    assert (one.counts.fn, one.instances.fn, one.instances.combined) == (0, 0, 1.0)
    assert one.to_dict()["rand_error"] == 0.0
    assert evaluate_label(pred, gt, np.zeros(gt.shape, bool)) is None
    semantic = evaluate_label(pred, gt)
    assert semantic is not None
    assert semantic.instances is None
    assert semantic.counts.fn == 27


def test_summaries_by_class_crop_and_data_set() -> None:
    rng = np.random.default_rng(0)
    labels = []
    for dataset, crop in (("a", "crop1"), ("a", "crop2"), ("b", "crop3")):
        for name, voxel_size in (("mito", (8, 8, 8)), ("er", None)):
            gt = np.zeros((10, 10, 10), np.uint8)
            gt[:4, :4], gt[6:, 6:] = 1, 2
            pred = gt * (rng.random(gt.shape) < 0.9)
            label = evaluate_label(pred, gt, voxel_size=voxel_size, dataset=dataset, crop=crop, class_name=name)
            assert label is not None
            labels.append(label)
    er, mito = summarize(labels)
    assert (er["class"], mito["class"], mito["crops"]) == ("er", "mito", 3)
    assert mito["dice_low"] <= mito["dice"] <= mito["dice_high"]
    assert mito["combined_low"] <= mito["combined_score"] <= mito["combined_high"]
    assert "combined_score" not in er
    assert [(r["dataset"], r["class"]) for r in summarize(labels, ("dataset", "class"))] == [
        ("a", "er"), ("a", "mito"), ("b", "er"), ("b", "mito"),
    ]  # fmt: skip
    per_crop = summarize(labels, ("crop",))
    assert [r["crop"] for r in per_crop] == ["crop1", "crop2", "crop3"]
    assert "dice_low" not in per_crop[0]
    assert per_crop[0]["known"] == 2000


def evaluated(seed: int, classes: dict[str, Any], crops: int = 4) -> list[LabelEvaluation]:
    rng = np.random.default_rng(seed)
    labels = []
    for number in range(crops):
        for name, voxel_size in classes.items():
            gt = np.zeros((10, 10, 10), np.uint8)
            gt[:4, :4], gt[6:, 6:] = 1, 2
            pred = gt * (rng.random(gt.shape) < rng.uniform(0.5, 1))
            label = evaluate_label(pred, gt, voxel_size=voxel_size, dataset="a", crop=f"crop{number}", class_name=name)
            assert label is not None
            labels.append(label)
    return labels


def test_totals_are_those_of_the_pooled_classes_with_intervals_over_crops() -> None:
    labels = evaluated(1, {"mito": (8, 8, 8), "er": None, "mito_mem": None})
    rows = {row["class"]: row for row in summarize(labels)}
    assert rows["mito"]["score"] == rows["mito"]["combined_score"]
    assert rows["er"]["score"] == rows["er"]["iou"]
    assert rows["er"]["score_low"] <= rows["er"]["score"] <= rows["er"]["score_high"]
    found = totals(labels, samples=300)
    assert found["instance"] == pytest.approx(rows["mito"]["score"])
    assert found["semantic"] == pytest.approx((rows["er"]["score"] + rows["mito_mem"]["score"]) / 2)
    assert found["overall"] == pytest.approx((found["instance"] * found["semantic"]) ** 0.5)
    for name in ("instance", "semantic", "overall"):
        assert found[f"{name}_low"] < found[name] < found[f"{name}_high"]
    assert found == totals(labels, samples=300)
    assert (found["instance_low"], found["instance_high"]) == pytest.approx(
        bootstrap_interval([x.instances for x in labels if x.instances], lambda s: s.combined, samples=300)
    )


def test_a_crop_of_far_too_many_objects_counts_as_missed() -> None:
    """The challenge drops such a crop; a class without any other crop would have a perfect score."""
    gt = np.zeros((16, 32, 32), np.uint8)
    gt[4:12, 4:12, 4:12], gt[4:12, 20:28, 4:12] = 1, 2
    noise = np.zeros(gt.shape, np.uint16)
    noise[::2, ::2, ::2] = np.arange(1, 2049).reshape(8, 16, 16)
    good, bad = (
        evaluate_label(pred, gt, voxel_size=(8, 8, 8), dataset="a", crop=crop, class_name="mito")
        for crop, pred in (("crop1", gt), ("crop2", noise))
    )
    assert good is not None
    assert bad is not None
    (row,) = summarize([bad])
    assert (row["instances_fn"], row["f1"], row["score"]) == (2, 0.0, 0.0)
    assert totals([bad], rules="2026-07-affine")["instance"] == 0.0
    (row,) = summarize([good, bad])
    assert (row["f1"], row["normalized_hausdorff_distance"]) == (pytest.approx(2 / 3), 0.5)


def test_totals_where_a_kind_is_not_there() -> None:
    only = totals(evaluated(2, {"er": None}, crops=1))
    assert (only["instance"], only["overall"]) == (None, None)
    assert set(only) == {"instance", "semantic", "overall"}
    # A class of instances whose truth has none to tell apart has voxel measures, and no score.
    labels = evaluated(3, {"mito": None})
    assert "score" not in summarize(labels)[0]
    assert totals(labels) == {"instance": None, "semantic": None, "overall": None}


def test_a_single_draw_that_misses_the_only_crop_of_a_class_gives_no_interval() -> None:
    labels = [label for label in evaluated(4, {"mito": (8, 8, 8), "er": None}, crops=2)
              if (label.class_name, label.crop) != ("mito", "crop1")]  # fmt: skip
    found = totals(labels, samples=1)
    assert found["instance"] is not None
    assert {name for name in found if name.endswith("_low")} <= {"instance_low", "semantic_low", "overall_low"}
    assert all(found[name] is not None and np.isfinite(found[name]) for name in found)
