"""Dice and IoU of whole crops, pooled: counts are summed over all crops first, and divided once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from connectomics.errors import InputError


@dataclass(frozen=True)
class Scores:
    """Per class (C,), float64; NaN for a class without ground truth."""

    dice: NDArray[np.float64]
    iou: NDArray[np.float64]
    known: NDArray[np.int64]  # voxels

    @property
    def mean_dice(self) -> float | None:
        """Mean over the classes with ground truth; None if there is none."""
        return _mean(self.dice)

    @property
    def mean_iou(self) -> float | None:
        """Mean over the classes with ground truth; None if there is none."""
        return _mean(self.iou)


def _mean(values: NDArray[np.float64]) -> float | None:
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else None


class PooledCounts:
    """True and false positives and false negatives per class, over known voxels only.

    A class counts if it is present at a known voxel of the ground truth, whatever is predicted. So the classes that a
    mean is over are the same at every validation of the same crops, and one falsely predicted voxel of a class that is
    absent does not add a zero to it.
    """

    def __init__(self, channels: int) -> None:
        # int64 rows: true positives, false positives, false negatives, known voxels
        self.values = torch.zeros((4, channels), dtype=torch.int64)

    def reset(self) -> None:
        """Forget everything."""
        self.values.zero_()

    def add(self, predicted: NDArray[np.bool_], label: NDArray[np.bool_], known: NDArray[np.bool_]) -> None:
        """Count a block: three bool arrays (C, d, h, w); what ``label`` says where not ``known`` does not matter."""
        if not predicted.shape == label.shape == known.shape or predicted.shape[0] != self.values.shape[1]:
            raise InputError(
                f"prediction {predicted.shape}, label {label.shape} and known {known.shape} must have one shape with "
                f"{self.values.shape[1]} channels"
            )
        for channel in range(predicted.shape[0]):
            seen = known[channel]
            found, true = predicted[channel] & seen, label[channel] & seen
            both = int(np.count_nonzero(found & true))
            self.values[0, channel] += both
            self.values[1, channel] += int(np.count_nonzero(found)) - both
            self.values[2, channel] += int(np.count_nonzero(true)) - both
            self.values[3, channel] += int(np.count_nonzero(seen))

    @staticmethod
    def scores(values: Tensor) -> Scores:
        """Scores of counts (4, C), for instance of several processes added up."""
        tp, fp, fn, known = values.cpu().numpy().astype(np.int64)
        present = tp + fn > 0
        dice, iou = (
            np.divide(part, whole, out=np.full(len(tp), np.nan), where=present)
            for part, whole in ((2 * tp, 2 * tp + fp + fn), (tp, tp + fp + fn))
        )
        return Scores(dice, iou, known)
