"""Measures pooled over many crops, with bootstrap intervals.

Unknown voxels do not count at all; a class without a known voxel in a crop is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from typing import Any, Literal, Self, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from connectomics.errors import InputError
from connectomics.metrics.cellmap_metrics import Counts, Pooled, evaluate_instance
from connectomics.metrics.challenge.results import SCORED, InstanceScore, Panoptic, instance_ratios
from connectomics.metrics.challenge.rules import DEFAULT_RULES, Rules, get_rules
from connectomics.metrics.challenge.scoring import score_instance

T = TypeVar("T")

_LEVEL = 0.95  # share of the draws inside an interval


# -- intervals ---------------------------------------------------------------------------------------------------------
def bootstrap_interval(
    items: Sequence[T], statistic: Callable[[T], float], *, samples: int = 1000, level: float = _LEVEL, seed: int = 0
) -> tuple[float, float]:
    """Return a percentile bootstrap interval, over crops, of a pooled measure.

    Crops are drawn with replacement, their items (such as `Counts`) are added up, and ``statistic`` is applied to the
    sum. The interval shows how much the measure depends on which crops were annotated.

    Args:
        items: one per crop: dataclasses of numbers whose ``+`` adds field by field, or arrays.
        statistic: the measure of a sum, such as ``lambda counts: counts.dice``.
        samples: number of draws.
        level: share of the draws inside the interval.
        seed: random seed of the draws.

    Returns:
        Lower and upper end. Both equal the measure for a single crop.

    Raises:
        InputError: there are no items, or ``level`` or ``samples`` is out of range.
    """
    if not items:
        raise InputError("a bootstrap interval needs at least one crop, got none")
    if not 0 < level < 1 or samples < 1:
        raise InputError(f"level must be between 0 and 1 and samples positive, got {level} and {samples}")
    table = _table(items)
    first = items[0]
    sums = _draws(len(items), samples, seed).astype(table.dtype) @ table
    values = [statistic(row if isinstance(first, np.ndarray) else type(first)(*row.tolist())) for row in sums]
    return _quantiles(values, level)


def _draws(n: int, samples: int, seed: int) -> NDArray[np.int64]:
    """Return how often each of ``n`` crops is in each draw, (samples, n)."""
    draws = np.random.default_rng(seed).integers(0, n, size=(samples, n))
    flat = np.bincount((draws + n * np.arange(samples)[:, None]).ravel(), minlength=samples * n)
    return flat.reshape(samples, n)


def _table(items: Sequence[Any]) -> NDArray[Any]:
    """Return one row per item, (N, fields)."""
    return np.array([item if isinstance(item, np.ndarray) else astuple(item) for item in items])


def _quantiles(values: ArrayLike, level: float) -> tuple[float, float]:
    tail = (1 - level) / 2
    low, high = np.quantile(np.asarray(values), [tail, 1 - tail])
    return float(low), float(high)


def _total(items: Sequence[Any]) -> Any:
    return sum(items[1:], start=items[0])


# -- one label, and many -----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class InstanceSums(Pooled):
    """What pools over crops for a class scored as instances: the challenge's counts and sums, and the usual measures.

    ``rand_error``, ``voi_split`` and ``voi_merge`` are sums of crop values, weighted by the crop's number of true
    voxels; ``weight`` is the sum of the weights.
    """

    tp: int = 0
    fp: int = 0
    fn: int = 0
    distance_sum: float = 0.0
    distance_n: int = 0
    rand_error: float = 0.0
    voi_split: float = 0.0
    voi_merge: float = 0.0
    weight: int = 0

    @classmethod
    def of(cls, score: InstanceScore) -> Self:
        """Return what pools of one crop, without the usual measures.

        A crop that the challenge drops, for far too many predicted objects, counts as if every true object had been
        missed. Otherwise noise would score best.
        """
        if score.status != SCORED:
            missed = (score.panoptic or Panoptic()).fn
            return cls(fn=missed, distance_n=missed)
        return cls(score.tp, score.fp, score.fn, score.hausdorff_norm_sum, score.n_hausdorff)

    @property
    def ratios(self) -> tuple[float, float, float]:
        """Return F1, the mean mapped Hausdorff distance, and the challenge's score of the class."""
        return instance_ratios(self.tp, self.fp, self.fn, self.distance_sum, self.distance_n)

    @property
    def combined(self) -> float:
        """Return the challenge's score of the class, the geometric mean of F1 and distance."""
        return self.ratios[2]

    def to_dict(self) -> dict[str, float | int | None]:
        """Return the measures, for JSON and CSV; the weighted ones are None without a known true voxel."""
        w = self.weight
        return {
            **dict(zip(("f1", "normalized_hausdorff_distance", "combined_score"), self.ratios, strict=True)),
            "rand_error": self.rand_error / w if w else None,
            "voi_split": self.voi_split / w if w else None,
            "voi_merge": self.voi_merge / w if w else None,
            "instances_tp": self.tp,
            "instances_fp": self.fp,
            "instances_fn": self.fn,
        }


Scored = InstanceSums | Counts | Panoptic


def score_of(item: Scored) -> float:
    """Return the challenge's score of the pooled counts of a class."""
    if isinstance(item, Panoptic):
        return item.quality
    return item.combined if isinstance(item, InstanceSums) else item.iou


@dataclass(frozen=True)
class LabelEvaluation:
    """One class in one crop over its known voxels.

    ``instances`` and ``panoptic`` are None for semantic classes. ``by_rules`` has ``instances`` by the rules' version.
    ``by_instances`` means that the class is scored by instances, whatever the rules say.
    """

    dataset: str
    crop: str
    class_name: str
    counts: Counts
    instances: InstanceSums | None = None
    panoptic: Panoptic | None = None
    by_rules: Mapping[str, InstanceSums] = field(default_factory=dict, compare=False, repr=False)
    by_instances: bool = False

    def scored(self, rules: Rules) -> Scored | None:
        """Return what pools to the score of the class by these rules; None without the instance measures it needs."""
        if self.by_instances or rules.is_instance(self.class_name):
            if self.instances is None or rules.by_quality:
                return self.panoptic
            return self.by_rules.get(rules.version, self.instances)
        if rules.by_quality:
            return Panoptic.of_segment(self.counts.tp, self.counts.fp, self.counts.fn)
        return self.counts

    def to_dict(self) -> dict[str, Any]:
        """Return one row of a table."""
        names = {"dataset": self.dataset, "crop": self.crop, "class": self.class_name}
        return {**names, **self.counts.to_dict(), **(self.instances.to_dict() if self.instances else {})}


def evaluate_label(
    pred: ArrayLike,
    gt: ArrayLike,
    known: ArrayLike | None = None,
    *,
    voxel_size: ArrayLike | None = None,
    dataset: str = "",
    crop: str = "",
    class_name: str = "",
    rules: str = DEFAULT_RULES,
    workers: int | None = None,
) -> LabelEvaluation | None:
    """Return all measures of one class in one crop, over known voxels only; None if nothing is known.

    Args:
        pred, gt: (D, H, W) of one shape; instance labels if ``voxel_size`` is given, otherwise foreground is > 0.
        known: bool (D, H, W), the voxels that count. Unknown voxels become background in both volumes, like the
            official scorer's masks.
        voxel_size: nm, z y x; adds the instance measures (the challenge's, adapted Rand, VOI).
        rules: version of the challenge's rules.
        workers: threads for the distances.
    """
    counts = Counts.of(pred, gt, known)
    if counts.known == 0:
        return None
    if voxel_size is None:
        return LabelEvaluation(dataset, crop, class_name, counts)
    usual = evaluate_instance(pred, gt, known)
    a, b = np.asarray(pred), np.asarray(gt)
    if known is not None:
        a, b = (np.where(known, values, np.zeros((), values.dtype)) for values in (a, b))
    score = score_instance(a, b, voxel_size, rules, workers=workers, compare=True)
    weight = counts.tp + counts.fn
    sums = replace(
        InstanceSums.of(score), rand_error=usual["rand_error"] * weight, voi_split=usual["voi_split"] * weight,
        voi_merge=usual["voi_merge"] * weight, weight=weight,
    )  # fmt: skip
    by_rules = {version: replace(sums, distance_sum=total) for version, total in score.sums.items()}
    return LabelEvaluation(dataset, crop, class_name, counts, sums, score.panoptic, by_rules)


def summarize(
    labels: Iterable[LabelEvaluation],
    by: Sequence[Literal["class", "crop", "dataset"]] = ("class",),
    *,
    samples: int = 1000,
    rules: str | Rules = DEFAULT_RULES,
) -> list[dict[str, Any]]:
    """Return rows of pooled measures, grouped by class, crop, data set or several of them, sorted.

    Counts add up within a group, so large crops weigh more. A group of one class has ``score``, which enters the
    challenge's score: ``combined_score`` for classes scored as instances (over the ``instance_crops`` with annotated
    instances), ``iou`` for others, or the Panoptic Quality if the rules use it. A group of several crops has bootstrap
    intervals over crops: ``dice_low`` and ``dice_high``, ``score_low`` and ``score_high``, and for instances
    ``combined_low`` and ``combined_high``.
    """
    rules = get_rules(rules)
    rows = []
    for key, group in sorted(_grouped(labels, by).items()):
        row: dict[str, Any] = dict(zip(by, key, strict=True))
        counts = [_total([label.counts for label in crop]) for crop in _grouped(group, ("dataset", "crop")).values()]
        row |= {"crops": len(counts), **_total(counts).to_dict()}
        if len(counts) > 1:
            row["dice_low"], row["dice_high"] = bootstrap_interval(counts, lambda c: c.dice, samples=samples)
        classes = {label.class_name for label in group}
        if len(classes) == 1:
            row |= _class_score(group, rules, samples)
        rows.append(row)
    return rows


def _grouped(labels: Iterable[LabelEvaluation], by: Sequence[str]) -> dict[tuple[str, ...], list[LabelEvaluation]]:
    groups: dict[tuple[str, ...], list[LabelEvaluation]] = {}
    for label in labels:
        names = {"class": label.class_name, "crop": label.crop, "dataset": label.dataset}
        groups.setdefault(tuple(names[key] for key in by), []).append(label)
    return groups


def _class_score(group: Sequence[LabelEvaluation], rules: Rules, samples: int) -> dict[str, Any]:
    """Return the challenge's score of one class, with its interval, and its instance measures."""
    sums = [label.instances for label in group if label.instances is not None]
    row: dict[str, Any] = {}
    if sums:
        row |= {"instance_crops": len(sums), **_total(sums).to_dict()}
        if len(sums) > 1:
            row["combined_low"], row["combined_high"] = bootstrap_interval(sums, lambda s: s.combined, samples=samples)
    items: list[Any] = [item for item in (label.scored(rules) for label in group) if item is not None]
    if items:
        row["score"] = score_of(_total(items))
    if len(items) > 1:
        row["score_low"], row["score_high"] = bootstrap_interval(items, score_of, samples=samples)
    return row


def totals(
    labels: Sequence[LabelEvaluation], *, samples: int = 1000, rules: str | Rules = DEFAULT_RULES
) -> dict[str, float | None]:
    """Return the challenge's three totals over annotated crops.

    ``instance`` and ``semantic`` are plain means over classes, ``overall`` is their geometric mean (by Panoptic Quality
    the plain mean over all classes); None if no class of a kind could be scored. Each has a bootstrap interval over
    crops (``overall_low``, ``overall_high``); a draw without any crop of a class leaves the class out, and without any
    draw there is no interval.
    """
    rules = get_rules(rules)
    crops = sorted(_grouped(labels, ("dataset", "crop")))
    draws = np.vstack([np.ones((1, len(crops)), np.int64), _draws(len(crops), samples, seed=0)])
    kinds: dict[bool, list[NDArray[np.float64]]] = {True: [], False: []}
    for (name,), group in sorted(_grouped(labels, ("class",)).items()):
        there = [(label, item) for label in group if (item := label.scored(rules)) is not None]
        if there:
            items = [item for _, item in there]
            times = draws[:, [crops.index((label.dataset, label.crop)) for label, _ in there]]
            values = np.array([score_of(type(items[0])(*row.tolist())) for row in times @ _table(items)])
            kinds[group[0].by_instances or rules.is_instance(name)].append(np.where(times.any(axis=1), values, np.nan))
    found = {"instance": _means(kinds[True]), "semantic": _means(kinds[False])}
    both = [values for values in found.values() if values is not None]
    if rules.by_quality:
        found["overall"] = _means([*kinds[True], *kinds[False]])
    else:
        found["overall"] = np.sqrt(both[0] * both[1]) if len(both) == 2 else None
    row: dict[str, float | None] = {name: None if v is None else float(v[0]) for name, v in found.items()}
    for name, drawn in found.items():
        drawn = np.zeros(0) if drawn is None else drawn[1:][np.isfinite(drawn[1:])]
        if len(crops) > 1 and len(drawn):
            row[f"{name}_low"], row[f"{name}_high"] = _quantiles(drawn, _LEVEL)
    return row


def _means(classes: Sequence[NDArray[np.float64]]) -> NDArray[np.float64] | None:
    """Return means over classes without NaN; all NaN gives NaN."""
    if not classes:
        return None
    values = np.array(classes)
    number = np.isfinite(values).sum(axis=0)
    return np.where(number > 0, np.nansum(values, axis=0) / np.maximum(number, 1), np.nan)
