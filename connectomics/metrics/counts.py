"""Voxel counts of a class that add up over blocks, crops and data sets."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from connectomics.errors import InputError


@dataclass(frozen=True)
class Counts:
    """Voxel counts of a class: hits, false alarms, misses, and rightly absent. They add up over blocks and crops."""

    tp: int = 0
    fp: int = 0
    fn: int = 0
    tn: int = 0

    @classmethod
    def of(cls, pred: ArrayLike, gt: ArrayLike, known: ArrayLike | None = None) -> Counts:
        """Counts of ``pred > 0`` against ``gt > 0`` where ``known`` is true (everywhere if None).

        All of one shape, any rank and number type; NaN is background. Raises `InputError` where shapes differ.
        """
        a, b = np.asarray(pred) > 0, np.asarray(gt) > 0
        if a.shape != b.shape:
            raise InputError(f"prediction and truth must have one shape, found {a.shape} and {b.shape}")
        size = a.size
        if known is not None:
            mask = np.asarray(known).astype(bool, copy=False)
            if mask.shape != a.shape:
                raise InputError(f"the mask of known voxels must have shape {a.shape}, found {mask.shape}")
            a, b, size = a & mask, b & mask, int(np.count_nonzero(mask))
        tp = int(np.count_nonzero(a & b))
        fp, fn = int(np.count_nonzero(a)) - tp, int(np.count_nonzero(b)) - tp
        return cls(tp, fp, fn, size - tp - fp - fn)

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.tp + other.tp, self.fp + other.fp, self.fn + other.fn, self.tn + other.tn)

    @property
    def known(self) -> int:
        """Voxels counted."""
        return self.tp + self.fp + self.fn + self.tn

    @property
    def dice(self) -> float:
        """2 tp / (2 tp + fp + fn); 1 where nothing is anywhere."""
        return self._ratio(2 * self.tp, 2 * self.tp + self.fp + self.fn)

    @property
    def iou(self) -> float:
        """tp / (tp + fp + fn); 1 where nothing is anywhere."""
        return self._ratio(self.tp, self.tp + self.fp + self.fn)

    @property
    def precision(self) -> float:
        """tp / (tp + fp); 1 where nothing is anywhere, 0 where nothing is predicted though something is there."""
        return self._ratio(self.tp, self.tp + self.fp)

    @property
    def recall(self) -> float:
        """tp / (tp + fn); 1 where nothing is anywhere, 0 where nothing is there though something is predicted."""
        return self._ratio(self.tp, self.tp + self.fn)

    def _ratio(self, part: int, whole: int) -> float:
        if whole:
            return part / whole
        return 0.0 if self.fp or self.fn else 1.0

    def to_dict(self) -> dict[str, float | int]:
        """Counts and ratios, for JSON and CSV."""
        return {
            "dice": self.dice,
            "iou": self.iou,
            "precision": self.precision,
            "recall": self.recall,
            "tp": self.tp,
            "fp": self.fp,
            "fn": self.fn,
            "known": self.known,
        }
