"""Measures over many crops: counts that add up over known voxels, instance measures, and bootstrap intervals.

What is not known does not count, neither as a hit nor as a miss; a class with nothing known in a crop is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from connectomics.errors import InputError
from connectomics.metrics.cellmap_metrics import evaluate_instance
from connectomics.metrics.challenge.rules import DEFAULT_RULES
from connectomics.metrics.challenge.scoring import score_instance
from connectomics.metrics.counts import Counts

__all__ = ["Counts", "InstanceSums", "LabelEvaluation", "bootstrap_interval", "evaluate_label", "summarize"]


# -- intervals ---------------------------------------------------------------------------------------------------------
class _Summable(Protocol):
    def __add__(self, other: Any, /) -> Any: ...


T = TypeVar("T", bound=_Summable)


def bootstrap_interval(
    items: Sequence[T],
    statistic: Callable[[T], float],
    *,
    samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """A percentile bootstrap interval over crops of a pooled measure.

    Crops are drawn with replacement, their items (such as `Counts`) are added up, and ``statistic`` is taken of the
    sum: the interval says how much the pooled measure hangs on which crops happened to be annotated.

    Args:
        items: one per crop; anything with ``+``.
        statistic: the measure of a sum, such as ``lambda counts: counts.dice``.
        samples: number of draws. level: share of the draws inside the interval. seed: the same seed gives the same
            interval.

    Returns:
        Lower and upper end. Both are the measure itself for a single crop. Raises `InputError` without items.
    """
    if not items:
        raise InputError("a bootstrap interval needs at least one crop, found none")
    if not 0 < level < 1 or samples < 1:
        raise InputError(f"level must lie between 0 and 1 and samples be positive, found {level} and {samples}")
    draws = np.random.default_rng(seed).integers(0, len(items), size=(samples, len(items)))
    values = [statistic(_total([items[i] for i in draw])) for draw in draws]
    tail = (1 - level) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def _total(items: Sequence[T]) -> T:
    total = items[0]
    for item in items[1:]:
        total = total + item
    return total


# -- one label, and many -----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class InstanceSums:
    """What pools over crops of a class scored as instances: the challenge's counts and sums, and weighted measures.

    ``rand_error``, ``voi_split`` and ``voi_merge`` are sums of crop values, each weighted by the crop's number of true
    voxels ``weight``.
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

    def __add__(self, other: InstanceSums) -> InstanceSums:
        return InstanceSums(
            *(a + b for a, b in zip(self._values(), other._values(), strict=True))  # type: ignore[arg-type]
        )

    def _values(self) -> tuple[float, ...]:
        return (
            self.tp,
            self.fp,
            self.fn,
            self.distance_sum,
            self.distance_n,
            self.rand_error,
            self.voi_split,
            self.voi_merge,
            self.weight,
        )

    @property
    def f1(self) -> float:
        """2 tp / (2 tp + fp + fn); 1 where nothing is anywhere."""
        whole = 2 * self.tp + self.fp + self.fn
        return 2 * self.tp / whole if whole else 1.0

    @property
    def distance(self) -> float:
        """Mean mapped Hausdorff distance; 1 where nothing is anywhere."""
        return self.distance_sum / self.distance_n if self.distance_n else 1.0

    @property
    def combined(self) -> float:
        """The challenge's score of the class, (f1 * distance) ** 0.5."""
        return float((self.f1 * self.distance) ** 0.5)

    def to_dict(self) -> dict[str, float | int | None]:
        """For JSON and CSV; the weighted measures are None where no true voxel is known."""
        w = self.weight
        return {
            "f1": self.f1,
            "normalized_hausdorff_distance": self.distance,
            "combined_score": self.combined,
            "rand_error": self.rand_error / w if w else None,
            "voi_split": self.voi_split / w if w else None,
            "voi_merge": self.voi_merge / w if w else None,
            "instances_tp": self.tp,
            "instances_fp": self.fp,
            "instances_fn": self.fn,
        }


@dataclass(frozen=True)
class LabelEvaluation:
    """One class in one crop over its known voxels; ``instances`` is None for semantic classes."""

    dataset: str
    crop: str
    class_name: str
    counts: Counts
    instances: InstanceSums | None = None

    def to_dict(self) -> dict[str, Any]:
        """One row of a table."""
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
    """All measures of one class in one crop, over known voxels only; None where nothing is known.

    Args:
        pred, gt: (D, H, W) of one shape; labels of instances where ``voxel_size`` is given, else anything with > 0.
        known: bool (D, H, W), the voxels that count. What is unknown is background in both volumes, as the official
            scorer's masks make it.
        voxel_size: nm, z y x: asks for the instance measures (the challenge's, adapted Rand, VOI) too.
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
        mask = np.asarray(known).astype(bool, copy=False)
        a, b = np.where(mask, a, np.zeros((), a.dtype)), np.where(mask, b, np.zeros((), b.dtype))
    score = score_instance(a, b, voxel_size, rules, workers=workers)
    weight = counts.tp + counts.fn
    sums = InstanceSums(
        score.tp,
        score.fp,
        score.fn,
        score.hausdorff_norm_sum,
        score.n_hausdorff,
        usual["rand_error"] * weight,
        usual["voi_split"] * weight,
        usual["voi_merge"] * weight,
        weight,
    )
    return LabelEvaluation(dataset, crop, class_name, counts, sums)


def summarize(
    labels: Iterable[LabelEvaluation],
    by: Sequence[Literal["class", "crop", "dataset"]] = ("class",),
    *,
    samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Rows of pooled measures, grouped by class, crop, data set or several of them, sorted.

    Counts are added over the labels of a group, so large crops weigh more. A group of more than one crop has bootstrap
    intervals over crops: ``dice_low`` and ``dice_high``, and for instances ``combined_low`` and ``combined_high``
    (only where one class is in the group: instances of different classes are not pooled).
    """
    groups: dict[tuple[str, ...], list[LabelEvaluation]] = {}
    for label in labels:
        names = {"class": label.class_name, "crop": label.crop, "dataset": label.dataset}
        groups.setdefault(tuple(names[key] for key in by), []).append(label)
    options = {"samples": samples, "level": level, "seed": seed}
    rows = []
    for key, group in sorted(groups.items()):
        row: dict[str, Any] = dict(zip(by, key, strict=True))
        crops: dict[tuple[str, str], list[LabelEvaluation]] = {}
        for label in group:
            crops.setdefault((label.dataset, label.crop), []).append(label)
        counts = [_total([item.counts for item in items]) for items in crops.values()]
        row |= {"crops": len(crops), **_total(counts).to_dict()}
        if len(crops) > 1:
            row["dice_low"], row["dice_high"] = bootstrap_interval(counts, lambda c: c.dice, **options)  # type: ignore[arg-type]
        sums = [item.instances for item in group if item.instances is not None]
        if sums and len(sums) == len(group) and len({item.class_name for item in group}) == 1:
            row |= _total(sums).to_dict()
            if len(crops) > 1:
                row["combined_low"], row["combined_high"] = bootstrap_interval(sums, lambda s: s.combined, **options)  # type: ignore[arg-type]
        rows.append(row)
    return rows
