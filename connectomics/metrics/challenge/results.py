"""Score values: per crop and class, per class, and in total, and how they pool."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.config.values import plain
from connectomics.geometry import Triple
from connectomics.metrics.cellmap_metrics import Counts, Pooled
from connectomics.metrics.challenge.rules import RULES, Rules

SCORED = "scored"
MISSING = "missing"
TOO_MANY = "skipped_too_many_instances"
FAILED = "matching_failed"


@dataclass(frozen=True)
class Panoptic(Pooled):
    """Counts of Panoptic Quality (Kirillov et al., CVPR 2019): matches are pairs with IoU above 1/2."""

    tp: int = 0
    fp: int = 0
    fn: int = 0
    iou_sum: float = 0.0

    @classmethod
    def of_segment(cls, tp: int, fp: int, fn: int) -> Panoptic:
        """Return the counts of one segment (a semantic class in a crop) from its voxel counts."""
        iou = tp / (tp + fp + fn) if tp else 0.0
        return cls(1, iou_sum=iou) if iou > 0.5 else cls(fp=int(tp + fp > 0), fn=int(tp + fn > 0))

    @property
    def quality(self) -> float:
        """Sum of IoU / (tp + fp/2 + fn/2); 1 if both are empty."""
        weight = self.tp + (self.fp + self.fn) / 2
        return self.iou_sum / weight if weight else 1.0

    def to_dict(self) -> dict[str, float | int]:
        """Return ``pq``, ``tp``, ``fp``, ``fn``, ``iou_sum``."""
        return {"pq": self.quality, **plain(self)}


@dataclass(frozen=True)
class InstanceTable:
    """Every ground-truth instance and its match, in order of its id; arrays of one length (T,).

    ``prediction`` is the predicted value of the matched component ``component`` (both 0 if unmatched), ``iou`` their
    intersection over union (0 if unmatched), ``distance`` the rules' Hausdorff distance (nm, float32, capped),
    ``voxels`` the size of the ground-truth instance.
    """

    truth: NDArray[np.int64]
    prediction: NDArray[Any]
    component: NDArray[np.int64]
    iou: NDArray[np.float64]
    distance: NDArray[np.float32]
    voxels: NDArray[np.int64]

    def rows(self) -> list[dict[str, Any]]:
        """Return one dictionary per instance: truth, prediction, component, iou, distance_nm, voxels."""
        columns = (self.truth, self.prediction, self.component, self.iou, self.distance, self.voxels)
        names = ("truth", "prediction", "component", "iou", "distance_nm", "voxels")
        return [dict(zip(names, row, strict=True)) for row in zip(*(c.tolist() for c in columns), strict=True)]


@dataclass(frozen=True)
class InstanceScore:
    """The score of one class scored as instances in one crop, before pooling.

    ``hausdorff_norm_sum`` is the sum of ``n_hausdorff`` mapped distances in [0, 1]: one per ground-truth instance and
    one per unmatched prediction. ``nan_voxels`` counts NaN in the prediction, which count as background. ``sums`` has
    ``hausdorff_norm_sum`` by the version of the rules, if other rules were compared; nothing else differs.
    """

    tp: int
    fp: int
    fn: int
    hausdorff_norm_sum: float
    n_hausdorff: int
    status: str
    rules: str
    verified: bool
    nan_voxels: int = 0
    panoptic: Panoptic | None = None
    instances: InstanceTable | None = field(default=None, compare=False, repr=False)
    sums: Mapping[str, float] = field(default_factory=dict, compare=False, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the official scorer's entries, ``panoptic``, and ``nan_voxels`` if not 0."""
        return _entries(self, "tp", "fp", "fn", "hausdorff_norm_sum", "n_hausdorff", "status")


@dataclass(frozen=True)
class SemanticScore:
    """Voxel counts of one class in one crop.

    ``nan_voxels`` counts NaN in the prediction, which count as background. ``annotated`` says whether the ground truth
    has a voxel of the class; for a missing label the counts do not tell.
    """

    tp: int
    fp: int
    fn: int
    status: str = SCORED
    nan_voxels: int = 0
    annotated: bool = True

    @property
    def panoptic(self) -> Panoptic:
        """Return the counts of the crop as one segment."""
        if self.status == MISSING:
            return Panoptic(fn=int(self.annotated))
        return Panoptic.of_segment(self.tp, self.fp, self.fn)

    def to_dict(self) -> dict[str, Any]:
        """Return the official scorer's entries, ``panoptic``, and ``nan_voxels`` if not 0."""
        return _entries(self, "tp", "fp", "fn", "status")


def _entries(score: InstanceScore | SemanticScore, *names: str) -> dict[str, Any]:
    entries = {name: getattr(score, name) for name in names}
    if score.panoptic is not None:
        entries["panoptic"] = score.panoptic.to_dict()
    if score.nan_voxels:
        entries["nan_voxels"] = score.nan_voxels
    return entries


@dataclass(frozen=True)
class LabelResult:
    """The score of one class in one crop, with its place; ``by_quality`` as in `Rules`, ``made_from``: marks of the
    array (`connectomics.io.artifacts.marks`)."""

    crop: str
    class_name: str
    score: InstanceScore | SemanticScore
    num_voxels: int
    voxel_size: Triple
    is_missing: bool = False
    dataset: str = ""
    by_quality: bool = False
    made_from: Mapping[str, str] = field(default_factory=dict, compare=False)

    def by_rules(self, rules: Rules) -> LabelResult:
        """Return the same result by other rules; ``sums`` holds what differs."""
        score = self.score
        if isinstance(score, InstanceScore):
            total = score.sums.get(rules.version, score.hausdorff_norm_sum)
            score = replace(score, hausdorff_norm_sum=total, rules=rules.version, verified=rules.verified)
        return replace(self, score=score, by_quality=rules.by_quality)

    def to_dict(self) -> dict[str, Any]:
        """Return the entries of the official results file."""
        return {
            **self.score.to_dict(),
            "num_voxels": self.num_voxels,
            "voxel_size": list(self.voxel_size),
            "is_missing": self.is_missing,
            **({"made_from": dict(self.made_from)} if self.made_from else {}),
        }


@dataclass(frozen=True)
class ClassScore:
    """One class pooled over crops.

    Classes scored as instances have ``f1``, ``hausdorff`` (mean mapped distance) and ``combined`` (their geometric
    mean), others ``iou``; the rest is None. All have ``panoptic``, which is the score if ``by_quality``. Of the
    ``n_crops``, ``n_missing`` were not submitted and ``n_skipped`` were dropped for too many instances.
    """

    class_name: str
    tp: int
    fp: int
    fn: int
    n_crops: int
    n_missing: int
    n_skipped: int
    f1: float | None = None
    hausdorff: float | None = None
    combined: float | None = None
    iou: float | None = None
    panoptic: Panoptic | None = None
    by_quality: bool = False

    @property
    def is_instance(self) -> bool:
        """Return whether the class is scored as instances."""
        return self.combined is not None

    @property
    def score(self) -> float:
        """Return what enters the overall score: ``combined`` or ``iou``, or the quality of ``panoptic``."""
        if self.by_quality and self.panoptic is not None:
            return self.panoptic.quality
        value = self.combined if self.combined is not None else self.iou
        assert value is not None
        return value

    def to_dict(self) -> dict[str, Any]:
        """Return the official entries of ``label_scores``, ``score`` and ``panoptic_quality``."""
        entries: dict[str, Any] = {"iou": self.iou}
        if self.is_instance:
            ratios = (self.f1, self.hausdorff, self.combined)
            entries = dict(zip(("f1", "normalized_hausdorff_distance", "combined_score"), ratios, strict=True))
        entries |= {"tp": self.tp, "fp": self.fp, "fn": self.fn, "score": self.score}
        if self.panoptic is not None:
            entries["panoptic_quality"] = self.panoptic.quality
        return entries


@dataclass(frozen=True)
class Totals:
    """Scores pooled per class, and the overall numbers.

    ``instance`` and ``semantic`` are plain means over the classes of their kind, ``overall`` their geometric mean (by
    Panoptic Quality the plain mean over all classes). A kind without a requested class is None, and ``overall`` too
    unless it is by Panoptic Quality; a kind of which nothing was submitted is 0.
    """

    classes: dict[str, ClassScore]
    instance: float | None
    semantic: float | None
    overall: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return ``label_scores``, ``overall_instance_score``, ``overall_semantic_score``, ``overall_score``."""
        return {
            "label_scores": {name: score.to_dict() for name, score in self.classes.items()},
            "overall_instance_score": self.instance,
            "overall_semantic_score": self.semantic,
            "overall_score": self.overall,
        }


@dataclass(frozen=True)
class SubmissionScore:
    """The score of a submission: every crop and class, and both totals (with missing labels, and without).

    ``by_rules`` has the totals by all rules, missing labels counted, if they were compared.
    """

    results: tuple[LabelResult, ...]
    totals: Totals
    submitted_only: Totals
    total_evals: int
    rules: str
    verified: bool
    warnings: tuple[str, ...] = ()
    by_rules: Mapping[str, Totals] = field(default_factory=dict)
    submission: str = field(default="", compare=False)

    @property
    def overall_score(self) -> float | None:
        """Return the overall score with missing labels counted."""
        return self.totals.overall

    def to_dict(self) -> dict[str, Any]:
        """Return the official results file, and what this project adds: both totals, rules and warnings."""
        crops: dict[str, Any] = {}
        for result in self.results:
            crops.setdefault(result.crop, {})[result.class_name] = result.to_dict()
        return {
            **crops,
            **self.totals.to_dict(),
            "total_evals": self.total_evals,
            "num_evals_done": len(self.results),
            "submitted_only": self.submitted_only.to_dict(),
            "submission": self.submission,
            "rules": self.rules,
            "verified": self.verified,
            "by_rules": moves({name: totals.overall for name, totals in self.by_rules.items()}, self.totals.overall),
            "warnings": list(self.warnings),
        }

    @property
    def label_scores(self) -> dict[str, ClassScore]:
        """Return the scores per class with missing labels counted."""
        return self.totals.classes


def moves(overall: Mapping[str, float | None], asked: float | None) -> list[dict[str, Any]]:
    """Return a row for each version of the rules: its overall score, and how far it moves from ``asked``."""
    return [
        {
            "rules": name,
            "verified": RULES[name].verified,
            "summary": RULES[name].summary,
            "overall": value,
            "moves": None if value is None or asked is None else value - asked,
        }
        for name, value in overall.items()
    ]


# -- pooling -----------------------------------------------------------------------------------------------------------
def pool(results: Iterable[LabelResult], rules: Rules, kinds: Iterable[str] | None = None) -> Totals:
    """Pool results per class over crops, and average the classes as the rules say.

    ``kinds``: the requested class names, if there are more than in ``results``. A kind of which nothing was submitted
    scores 0, a kind that was not requested None.
    """
    groups: dict[str, list[LabelResult]] = {}
    for result in results:
        groups.setdefault(result.class_name, []).append(result)
    classes = {name: pool_class(name, groups[name]) for name in sorted(groups)}
    asked = set(groups) | set(kinds or ())
    instance = _mean([s.score for s in classes.values() if s.is_instance], any(map(rules.is_instance, asked)))
    semantic = _mean([s.score for s in classes.values() if not s.is_instance], not all(map(rules.is_instance, asked)))
    if rules.by_quality:
        overall: float | None = _mean([s.score for s in classes.values()], bool(asked))
    else:
        overall = None if instance is None or semantic is None else (instance * semantic) ** 0.5
    return Totals(classes, instance, semantic, overall)


def pool_class(class_name: str, results: Sequence[LabelResult]) -> ClassScore:
    """Pool one class over its crops: add the counts, then take the ratios; 1 if both volumes are empty everywhere."""
    tp, fp, fn = (sum(getattr(r.score, key) for r in results) for key in ("tp", "fp", "fn"))
    missing = sum(r.is_missing for r in results)
    skipped = sum(r.score.status in (TOO_MANY, FAILED) for r in results)
    counts = (class_name, tp, fp, fn, len(results), missing, skipped)
    instances = [r.score for r in results if isinstance(r.score, InstanceScore)]
    panoptic = sum((r.score.panoptic for r in results if r.score.panoptic is not None), Panoptic())
    by_quality = any(r.by_quality for r in results)
    if not instances:
        return ClassScore(*counts, iou=Counts(tp, fp, fn).iou, panoptic=panoptic, by_quality=by_quality)
    number, total = sum(s.n_hausdorff for s in instances), sum(s.hausdorff_norm_sum for s in instances)
    ratios = instance_ratios(tp, fp, fn, total, number)
    return ClassScore(*counts, *ratios, panoptic=panoptic, by_quality=by_quality)


def instance_ratios(tp: int, fp: int, fn: int, distance_sum: float, number: int) -> tuple[float, float, float]:
    """Return F1, the mean of ``number`` mapped distances, and the score of the class, their geometric mean.

    F1 is 2 tp / (2 tp + fp + fn). All are 1 if both volumes are empty.
    """
    f1 = Counts(tp, fp, fn).dice
    distance = distance_sum / number if number else 1.0
    return f1, distance, (f1 * distance) ** 0.5


def _mean(values: Sequence[float], asked: bool) -> float | None:
    if not asked:
        return None
    return float(np.sum(values)) / len(values) if values else 0.0
