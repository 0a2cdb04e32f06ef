"""Dice and IoU of two masks; `connectomics.metrics.cellmap_metrics` has more measures."""

from __future__ import annotations

from numpy.typing import ArrayLike

from connectomics.metrics.cellmap_metrics import Counts


def get_dice(pred: ArrayLike, gt: ArrayLike, known: ArrayLike | None = None) -> float:
    """Return the Dice coefficient; see `connectomics.metrics.cellmap_metrics.evaluate_semantic`."""
    return Counts.of(pred, gt, known).dice


def get_iou(pred: ArrayLike, gt: ArrayLike, known: ArrayLike | None = None) -> float:
    """Return the intersection over union; see `connectomics.metrics.cellmap_metrics.evaluate_semantic`."""
    return Counts.of(pred, gt, known).iou
