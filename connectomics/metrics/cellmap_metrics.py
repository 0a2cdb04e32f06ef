"""The usual measures of one prediction against one truth: voxels (Dice, IoU) and instances (adapted Rand, VOI)."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from connectomics.metrics.counts import Counts
from connectomics.metrics.overlaps import pair_counts


def evaluate_semantic(pred: ArrayLike, gt: ArrayLike, known: ArrayLike | None = None) -> dict[str, float]:
    """Dice, IoU, precision and recall of ``pred > 0`` against ``gt > 0``.

    Args:
        pred, gt: volumes of one shape, any number type; NaN is background.
        known: bool mask of the same shape of the voxels that count (all by default).

    Returns:
        ``dice``, ``iou``, ``precision``, ``recall`` in [0, 1]. Where nothing is in either (and where nothing is known)
        all four are 1; otherwise a ratio of nothing to nothing (the precision of an empty prediction, the recall of
        an empty truth) is 0.

    Raises `InputError` where shapes differ.
    """
    counts = Counts.of(pred, gt, known)
    return {"dice": counts.dice, "iou": counts.iou, "precision": counts.precision, "recall": counts.recall}


def evaluate_instance(pred: ArrayLike, gt: ArrayLike, known: ArrayLike | None = None) -> dict[str, float]:
    """Adapted Rand error and variation of information of predicted against true instances.

    Only voxels inside true objects count (``gt`` not 0), as is usual for connectomics and scikit-image's default for
    the Rand error; a prediction of 0 there counts as one more segment. Labels are taken as they are, not split into
    components. Equal to ``skimage.metrics.adapted_rand_error(gt, pred, ignore_labels=(0,))[0]`` and
    ``variation_of_information(gt, pred, ignore_labels=(0,))`` (mind the order of arguments there).

    Args:
        pred, gt: labels of one shape, bool, integer or whole floats, 0 background.
        known: bool mask of the same shape of the voxels that count (all by default).

    Returns:
        ``rand_error``: 1 - F of pairs of voxels (Arganda-Carreras et al., Front. Neuroanat. 9:142, 2015), in [0, 1];
        ``voi_split``: H(pred | gt) and ``voi_merge``: H(gt | pred), in bits (Meila, J. Multivar. Anal. 98, 2007).
        0 is best. Without a true voxel all three are 0, but ``rand_error`` is 1 if something is predicted.

    Raises `InputError` where shapes differ or labels are not whole numbers.
    """
    truth, found, voxels = pair_counts(gt, pred, known)
    inside = truth != 0
    if not inside.any():
        return {"rand_error": float(np.any(found != 0)), "voi_split": 0.0, "voi_merge": 0.0}
    rows = _sums(truth[inside], voxels[inside])
    columns = _sums(found[inside], voxels[inside])
    pairs = voxels[inside].astype(np.float64)
    total = pairs.sum()
    in_both, in_truth, in_found = (float(n @ n - total) for n in (pairs, rows, columns))
    rand_error = 1.0 - 2.0 * in_both / (in_truth + in_found) if in_truth + in_found > 0 else 0.0
    joint = _entropy(pairs, total)
    # max() takes away a negative zero or rounding; conditional entropies are not negative
    return {
        "rand_error": rand_error,
        "voi_split": max(0.0, joint - _entropy(rows, total)),
        "voi_merge": max(0.0, joint - _entropy(columns, total)),
    }


def _sums(labels: NDArray[np.uint64], voxels: NDArray[np.int64]) -> NDArray[np.float64]:
    """Voxels per label."""
    _, inverse = np.unique(labels, return_inverse=True)
    return np.bincount(inverse, weights=voxels).astype(np.float64, copy=False)


def _entropy(counts: NDArray[np.float64], total: float) -> float:
    """Entropy in bits of the distribution ``counts / total``."""
    share = counts / total
    return float(-(share * np.log2(share)).sum())
