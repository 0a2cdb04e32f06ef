"""The usual measures of one prediction against one ground truth: voxels (Dice, IoU) and instances (Rand error, VOI)."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from connectomics.errors import InputError
from connectomics.metrics.overlaps import known_mask, pair_counts


class Pooled:
    """Dataclasses of numbers that pool over blocks and crops: ``+`` adds field by field."""

    def __add__(self, other: Self) -> Self:
        return type(self)(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))  # type: ignore[call-overload]


@dataclass(frozen=True)
class Counts(Pooled):
    """Voxel counts of a class; they add up over blocks and crops."""

    tp: int = 0
    fp: int = 0
    fn: int = 0
    tn: int = 0

    @classmethod
    def of(cls, pred: ArrayLike, gt: ArrayLike, known: ArrayLike | None = None) -> Counts:
        """Count ``pred > 0`` against ``gt > 0`` where ``known`` is true (everywhere if None).

        All have one shape, of any rank and number type; NaN is background. Raises `InputError` if shapes differ.
        """
        a, b = np.asarray(pred) > 0, np.asarray(gt) > 0
        if a.shape != b.shape:
            raise InputError(f"prediction and ground truth must have one shape, got {a.shape} and {b.shape}")
        size = a.size
        if known is not None:
            mask = known_mask(known, a.shape)
            a, b, size = a & mask, b & mask, int(np.count_nonzero(mask))
        tp = int(np.count_nonzero(a & b))
        fp, fn = int(np.count_nonzero(a)) - tp, int(np.count_nonzero(b)) - tp
        return cls(tp, fp, fn, size - tp - fp - fn)

    @property
    def known(self) -> int:
        """Return the number of counted voxels."""
        return self.tp + self.fp + self.fn + self.tn

    @property
    def dice(self) -> float:
        """Return 2 tp / (2 tp + fp + fn); 1 if both volumes are empty."""
        return self._ratio(2 * self.tp, 2 * self.tp + self.fp + self.fn)

    @property
    def iou(self) -> float:
        """Return tp / (tp + fp + fn); 1 if both volumes are empty."""
        return self._ratio(self.tp, self.tp + self.fp + self.fn)

    @property
    def precision(self) -> float:
        """Return tp / (tp + fp); 1 if both volumes are empty, 0 if only the prediction is."""
        return self._ratio(self.tp, self.tp + self.fp)

    @property
    def recall(self) -> float:
        """Return tp / (tp + fn); 1 if both volumes are empty, 0 if only the ground truth is."""
        return self._ratio(self.tp, self.tp + self.fn)

    def _ratio(self, part: int, whole: int) -> float:
        if whole:
            return part / whole
        return 0.0 if self.fp or self.fn else 1.0

    def to_dict(self) -> dict[str, float | int]:
        """Return ratios and counts, for JSON and CSV."""
        names = ("dice", "iou", "precision", "recall", "tp", "fp", "fn", "known")
        return {name: getattr(self, name) for name in names}


def evaluate_semantic(pred: ArrayLike, gt: ArrayLike, known: ArrayLike | None = None) -> dict[str, float]:
    """Return Dice, IoU, precision and recall of ``pred > 0`` against ``gt > 0``.

    Args:
        pred, gt: volumes of one shape, any number type; NaN is background.
        known: bool mask of the same shape: the voxels that count (default: all).

    Returns:
        ``dice``, ``iou``, ``precision``, ``recall`` in [0, 1]. All are 1 if both volumes are empty or nothing is known;
        otherwise the precision of an empty prediction and the recall of an empty ground truth are 0.

    Raises:
        InputError: shapes differ.
    """
    counts = Counts.of(pred, gt, known)
    return {"dice": counts.dice, "iou": counts.iou, "precision": counts.precision, "recall": counts.recall}


def evaluate_instance(pred: ArrayLike, gt: ArrayLike, known: ArrayLike | None = None) -> dict[str, float]:
    """Return the adapted Rand error and the variation of information of predicted against true instances.

    Only voxels inside true objects count (``gt`` not 0), the default of scikit-image's Rand error; a prediction of 0
    there is one more segment. Labels are not split into components. Equal to scikit-image's
    ``adapted_rand_error(gt, pred, ignore_labels=(0,))[0]`` and
    ``variation_of_information(gt, pred, ignore_labels=(0,))`` (note the order of its arguments).

    Args:
        pred, gt: labels of one shape, bool, integer or whole floats, 0 background.
        known: bool mask of the same shape: the voxels that count (default: all).

    Returns:
        ``rand_error``: 1 - F of pairs of voxels (Arganda-Carreras et al., Front. Neuroanat. 9:142, 2015), in [0, 1];
        ``voi_split``: H(pred | gt) and ``voi_merge``: H(gt | pred), in bits (Meila, J. Multivar. Anal. 98, 2007).
        0 is best. Without a true voxel all three are 0, but ``rand_error`` is 1 if something is predicted.

    Raises:
        InputError: shapes differ, or labels are not whole numbers.
    """
    truth, found, voxels = pair_counts(gt, pred, known)
    inside = truth != 0
    if not inside.any():
        return {"rand_error": float(np.any(found != 0)), "voi_split": 0.0, "voi_merge": 0.0}
    of_truth = _voxels_per_label(truth[inside], voxels[inside])
    of_found = _voxels_per_label(found[inside], voxels[inside])
    pairs = voxels[inside].astype(np.float64)
    total = pairs.sum()
    in_both, in_truth, in_found = (float(n @ n - total) for n in (pairs, of_truth, of_found))
    rand_error = 1.0 - 2.0 * in_both / (in_truth + in_found) if in_truth + in_found > 0 else 0.0
    joint = _entropy(pairs, total)
    # max() removes a negative zero and rounding; conditional entropies are not negative.
    return {
        "rand_error": rand_error,
        "voi_split": max(0.0, joint - _entropy(of_truth, total)),
        "voi_merge": max(0.0, joint - _entropy(of_found, total)),
    }


def _voxels_per_label(labels: NDArray[np.uint64], voxels: NDArray[np.int64]) -> NDArray[np.float64]:
    _, inverse = np.unique(labels, return_inverse=True)
    return np.bincount(inverse, weights=voxels).astype(np.float64, copy=False)


def _entropy(counts: NDArray[np.float64], total: float) -> float:
    """Return the entropy in bits of the distribution ``counts / total``."""
    share = counts / total
    return float(-(share * np.log2(share)).sum())
