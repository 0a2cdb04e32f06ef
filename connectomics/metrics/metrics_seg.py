"""Dice and IoU of two masks, each by itself; `connectomics.metrics.cellmap_metrics` has all measures at once."""

from __future__ import annotations

from numpy.typing import ArrayLike

from connectomics.metrics.counts import Counts


def get_dice(pred: ArrayLike, gt: ArrayLike, known: ArrayLike | None = None) -> float:
    """2 tp / (2 tp + fp + fn) of ``pred > 0`` against ``gt > 0`` (one shape), where ``known`` (all by default); 1 where
    nothing is anywhere. Raises `InputError` where shapes differ."""
    return Counts.of(pred, gt, known).dice


def get_iou(pred: ArrayLike, gt: ArrayLike, known: ArrayLike | None = None) -> float:
    """tp / (tp + fp + fn), otherwise as `get_dice`."""
    return Counts.of(pred, gt, known).iou
