"""The versions of the rules where values are worked out by hand; one pass over the arrays gives all of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from connectomics.config.schema import SCORE_RULES
from connectomics.metrics.challenge import RULES, get_rules, score_instance, score_submission
from connectomics.metrics.challenge.results import MISSING, Panoptic, SemanticScore
from connectomics.metrics.challenge.rules import ALIASES
from connectomics.metrics.evaluate import LabelEvaluation, evaluate_label, summarize, totals
from tests.metrics.test_submission_score import VOXEL, write_group

SHAPE = (16, 16, 16)
CAP = 64.0  # nm, half of 16 voxels of 8 nm
DIAGONAL = 8 * 3**0.5


def m06(distance: float) -> float:
    return float(1.01 ** (-distance / DIAGONAL))


def affine(distance: float) -> float:
    """A straight line through (1, 1) and (what the cap maps to, 0.1)."""
    return 0.1 + 0.9 * (m06(distance) - m06(CAP)) / (1 - m06(CAP))


def cube(z: int, y: int, x: int, label: int = 1, side: int = 4) -> NDArray[np.uint8]:
    out = np.zeros(SHAPE, np.uint8)
    out[z : z + side, y : y + side, x : x + side] = label
    return out


def row(n: int) -> NDArray[np.uint8]:
    """The first n of a row of voxels."""
    out = np.zeros(SHAPE, np.uint8)
    out[5, 5, :n] = 1
    return out


# crop1: one object of two found exactly; crop2: the one object found two voxels beside (IoU 1/3, 16 nm)
TRUTH = {
    "crop1/mito": cube(0, 0, 0, 1) + cube(8, 8, 8, 2),
    "crop1/er": row(8),
    "crop2/mito": cube(4, 4, 4),
    "crop2/er": row(8),
}
FOUND = {"crop1/mito": cube(0, 0, 0), "crop1/er": row(6), "crop2/mito": cube(6, 4, 4), "crop2/er": row(4)}
MITO = {
    # F1 = 2 * 2 / (2 * 2 + 1); distances: 0, nothing, 16 nm
    "2026-06": (0.8 * (1 + m06(CAP) + m06(16)) / 3) ** 0.5,
    "2026-07-exponential": (0.8 * (1 + 0 + 0.1 ** (16 / CAP)) / 3) ** 0.5,
    "2026-07-affine": (0.8 * (1 + 0 + affine(16)) / 3) ** 0.5,
    "pq": 1 / (1 + (1 + 2) / 2),  # one match of IoU 1; the one of 1/3 is a false alarm and a miss, another is missed
}
# IoU of all voxels: 10 of 16; as segments: a match of IoU 3/4, and 4 of 8 (1/2, not more) a false alarm and a miss
ER = {"2026-06": 10 / 16, "2026-07-exponential": 10 / 16, "2026-07-affine": 10 / 16, "pq": 0.75 / (1 + (1 + 1) / 2)}
OVERALL = {name: (MITO[name] * ER[name]) ** 0.5 for name in MITO} | {"pq": (MITO["pq"] + ER["pq"]) / 2}


def test_the_configuration_names_all_rules() -> None:
    assert set(SCORE_RULES) == {*RULES, *ALIASES}
    assert get_rules("2026-07").version == "2026-07-exponential"
    assert [name for name, rules in RULES.items() if rules.verified] == ["2026-06"]
    assert all(rules.summary for rules in RULES.values())


def test_both_readings_of_the_rescaling() -> None:
    distances = np.array([0, 16, CAP, np.inf], np.float32)
    for name, middle in (("2026-07-exponential", 0.1**0.25), ("2026-07-affine", affine(16))):
        found = get_rules(name).mapped(distances, VOXEL, CAP)
        np.testing.assert_allclose(found, [1.0, middle, 0.1, 0.0], rtol=1e-6)
    assert 0.5 < 0.1**0.25 < affine(16) < 1  # so that the two can be told apart at all


@pytest.mark.parametrize("asked", sorted(RULES))
def test_one_pass_gives_what_each_rule_gives_alone(asked: str) -> None:
    """Also where an unmatched component passes for a truth of its number, by 2026-06 alone."""
    rng = np.random.default_rng(0)
    for _ in range(12):
        truth, pred = np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.uint8)
        for label in range(1, 5):
            z, y, x = rng.integers(0, 13, 3)
            truth[z : z + 3, y : y + 3, x : x + 3] = label
            dz, dy, dx = rng.integers(-3, 4, 3)
            pred[max(0, z + dz) : z + dz + 3, max(0, y + dy) : y + dy + 3, max(0, x + dx) : x + dx + 3] = label
        together = score_instance(pred, truth, VOXEL, asked, compare=True, workers=1)
        assert together == score_instance(pred, truth, VOXEL, asked, workers=1)
        assert set(together.sums) == set(RULES)
        for name in RULES:
            assert together.sums[name] == score_instance(pred, truth, VOXEL, name, workers=1).hausdorff_norm_sum


def test_the_quirk_is_undone_for_other_rules() -> None:
    """Component 2 is nobody's; by 2026-06 it is joined to truth 2's match (32 nm instead of 16)."""
    truth = cube(6, 6, 6, 2)
    truth[0:2, 0:2, 0:2] = 1
    pred = np.zeros(SHAPE, np.uint8)
    pred[6:10, 6:10, 6:8] = 1
    pred[12:14, 6:8, 6:8] = 1
    sums = score_instance(pred, truth, VOXEL, compare=True).sums
    assert sums["2026-06"] == pytest.approx(2 * m06(CAP) + m06(32))
    assert sums["2026-07-exponential"] == pytest.approx(0.1**0.25)
    assert sums["2026-07-affine"] == pytest.approx(affine(16))


@pytest.mark.parametrize("asked", sorted(RULES))
def test_a_submission_by_hand(asked: str, tmp_path: Path) -> None:
    truth, found = write_group(tmp_path / "truth.zarr", TRUTH), write_group(tmp_path / "found.zarr", FOUND)
    score = score_submission(found, truth, rules=asked)
    assert score.label_scores["mito"].score == pytest.approx(MITO[asked])
    assert score.label_scores["er"].score == pytest.approx(ER[asked])
    assert score.overall_score == pytest.approx(OVERALL[asked])
    assert {name: t.overall for name, t in score.by_rules.items()} == pytest.approx(OVERALL)
    written = json.loads(json.dumps(score.to_dict()))
    assert (written["rules"], written["verified"]) == (asked, asked == "2026-06")
    for entry in written["by_rules"]:
        assert entry["overall"] == pytest.approx(OVERALL[entry["rules"]])
        assert entry["moves"] == pytest.approx(OVERALL[entry["rules"]] - OVERALL[asked])
        assert entry["verified"] is (entry["rules"] == "2026-06")
    assert written["label_scores"]["mito"]["score"] == pytest.approx(MITO[asked])
    assert score_submission(found, truth, rules=asked, compare=False).to_dict()["by_rules"] == []


@pytest.mark.parametrize("asked", sorted(RULES))
def test_an_evaluation_by_hand(asked: str) -> None:
    labels = [
        evaluate_label(
            FOUND[place], TRUTH[place], voxel_size=VOXEL if place.endswith("mito") else None,
            crop=place.split("/")[0], class_name=place.split("/")[1], rules=asked,
        )
        for place in TRUTH
    ]  # fmt: skip
    rows: list[LabelEvaluation] = [label for label in labels if label is not None]
    assert {r["class"]: r["score"] for r in summarize(rows, rules=asked)} == pytest.approx(
        {"mito": MITO[asked], "er": ER[asked]}
    )
    for name in RULES:  # one pass
        assert totals(rows, rules=name, samples=5)["overall"] == pytest.approx(OVERALL[name])


def test_what_is_missing_and_what_is_skipped_counts_by_quality(tmp_path: Path) -> None:
    """Skipped: every prediction is a false alarm, every truth a miss. Missing and empty: nothing was there to miss."""
    noise = np.zeros(SHAPE, np.uint8)
    noise[::2, ::2, ::2] = 1
    arrays = {"crop1/mito": cube(0, 0, 0, 7) + cube(8, 8, 8, 3), "crop1/er": row(8), "crop2/er": row(0)}
    truth = write_group(tmp_path / "truth.zarr", {**arrays, "crop2/mito": cube(4, 4, 4)})
    found = write_group(tmp_path / "found.zarr", {"crop1/mito": cube(0, 0, 0), "crop2/mito": noise})
    score = score_submission(found, truth, rules="pq")
    by_place = {(r.crop, r.class_name): r.score for r in score.results}
    assert by_place["crop2", "mito"].status == "skipped_too_many_instances"
    assert by_place["crop2", "mito"].panoptic == Panoptic(fp=512, fn=1)
    assert score.label_scores["mito"].score == pytest.approx(1 / (1 + (512 + 2) / 2))
    assert by_place["crop1", "er"].panoptic == Panoptic(fn=1)
    assert by_place["crop2", "er"].panoptic == Panoptic()
    slabs = score_submission(found, truth, rules="pq", memory_bytes=1 << 15, workers=1)
    assert slabs.to_dict() == score.to_dict()


def test_one_segment() -> None:
    assert Panoptic.of_segment(3, 1, 0) == Panoptic(1, iou_sum=0.75)
    assert Panoptic.of_segment(2, 1, 1) == Panoptic(fp=1, fn=1)  # exactly one half is no match
    assert Panoptic.of_segment(0, 5, 0) == Panoptic(fp=1)
    assert Panoptic.of_segment(0, 0, 5) == Panoptic(fn=1)
    assert Panoptic.of_segment(0, 0, 0) == Panoptic()
    assert SemanticScore(0, 0, 9, MISSING, annotated=False).panoptic == Panoptic()
