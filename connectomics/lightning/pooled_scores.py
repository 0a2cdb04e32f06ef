"""Counts and sums over an epoch or a validation; those of several processes add up to scores of the whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from connectomics.config.heads import Head
from connectomics.data.volumes import CropVolume
from connectomics.errors import InputError
from connectomics.geometry import VoxelGrid, slices_of
from connectomics.models.targets import head_labels, reach

_THRESHOLD = 0.5
_COUNTED = ("patches", "present", "known")  # rows of `Labels.tally`


class Sums:
    """A tensor of sums (rows, columns) that starts at zero; ``values`` of all processes may be added."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype) -> None:
        self.values = torch.zeros((rows, columns), dtype=dtype)

    def reset(self) -> None:
        """Start at zero again."""
        self.values.zero_()


class ClassCounts(Sums):
    """Exact counts of the training patches of an epoch, by class, as the network got them (augmented).

    ``patches`` that contain the class, voxels where it is ``present`` (labeled, and known), voxels where it is
    ``known``. 64-bit integers on the device of the batches, so that counting does not make a step wait.
    """

    def __init__(self, classes: Sequence[str]) -> None:
        super().__init__(len(_COUNTED), len(classes), torch.int64)
        self.classes = tuple(classes)

    def add(self, tally: Tensor) -> None:
        """Count a batch: `Labels.tally`, int64 (3, C)."""
        self.values = self.values.to(tally.device) + tally

    def metrics(self, total: Tensor) -> dict[str, int]:
        """Return ``data/<class>/patches``, ``.../present``, ``.../known`` of counts (3, C)."""
        rows = total.tolist()
        return {
            f"data/{name}/{what}": rows[row][channel]
            for channel, name in enumerate(self.classes)
            for row, what in enumerate(_COUNTED)
        }

    def load(self, values: Tensor) -> None:
        """Continue from counts (3, C); raise `InputError` if they belong to another number of classes."""
        if values.shape != self.values.shape:
            raise InputError(
                f"counts of {len(self.classes)} classes must have shape {tuple(self.values.shape)}, got "
                f"{tuple(values.shape)}; the checkpoint has other classes"
            )
        self.values = values.to(torch.int64).clone()


@dataclass(frozen=True)
class Scores:
    """Dice, IoU (C,) float64, NaN for a class without ground truth, and known voxels (C,) int64."""

    dice: NDArray[np.float64]
    iou: NDArray[np.float64]
    known: NDArray[np.int64]

    def mean(self, values: NDArray[np.float64]) -> float | None:
        """Return the mean of ``dice`` or ``iou`` over the classes with ground truth; None if there is none."""
        defined = values[~np.isnan(values)]
        return float(defined.mean()) if defined.size else None


class PooledCounts(Sums):
    """True positives, false positives, false negatives and known voxels by class, over known voxels of all crops.

    A class counts if it is present at a known voxel of the ground truth, whatever the network predicts. So a mean is
    over the same classes at every validation, and one falsely predicted voxel of an absent class does not add a zero.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(4, channels, torch.int64)

    def add(self, predicted: NDArray[np.bool_], label: NDArray[np.bool_], known: NDArray[np.bool_]) -> None:
        """Count a block: bool arrays (C, d, h, w); ``label`` is ignored where it is not ``known``."""
        if not predicted.shape == label.shape == known.shape or predicted.shape[0] != self.values.shape[1]:
            raise InputError(
                f"prediction {predicted.shape}, label {label.shape} and known {known.shape} must have one shape with "
                f"{self.values.shape[1]} channels"
            )
        for channel, seen in enumerate(known):
            found, true = predicted[channel] & seen, label[channel] & seen
            tp, positive, present, voxels = (int(np.count_nonzero(a)) for a in (found & true, found, true, seen))
            self.values[:, channel] += torch.tensor([tp, positive - tp, present - tp, voxels])

    @staticmethod
    def scores(values: Tensor) -> Scores:
        """Return the scores of counts (4, C)."""
        tp, fp, fn, known = values.cpu().numpy().astype(np.int64)
        present = tp + fn > 0
        dice, iou = (
            np.divide(part, whole, out=np.full(len(tp), np.nan), where=present)
            for part, whole in ((2 * tp, 2 * tp + fp + fn), (tp, tp + fp + fn))
        )
        return Scores(dice, iou, known)


class HeadScores(Sums):
    """Dice of affinities and boundaries (``val/mito/affinities/dice``), mean absolute error of distances and
    descriptors (``val/mito/distance/mae``), over the known voxels of all channels and crops.

    The targets of a block are computed with a margin as wide as they reach, so they do not depend on the blocks.
    """

    def __init__(self, heads: Sequence[Head]) -> None:
        super().__init__(5, len(heads), torch.float64)  # true and false positives, false negatives, errors, voxels
        self.heads = tuple(heads)
        self.classes = tuple(dict.fromkeys(head.class_name for head in heads))
        self.margin = [max((reach(head)[axis] for head in heads), default=0) for axis in range(3)]

    def add(self, crop: CropVolume, block: VoxelGrid, probability: NDArray[np.float32], device: torch.device) -> None:
        """Count a block: ``probability`` (H, d, h, w) of all heads' channels; ``device`` computes the targets."""
        ids = torch.from_numpy(crop.read_ids(block.grow(self.margin))).to(device)
        inside = slices_of(self.margin, block.shape)
        first = 0
        for number, head in enumerate(self.heads):
            labels = head_labels(head, ids[self.classes.index(head.class_name)][None].contiguous())
            for channel in range(head.channels):
                target, known = (values[0][inside] for values in labels.of(channel))
                found = torch.from_numpy(probability[first + channel]).to(device)
                self.values[:, number] += _sums(found[known], target[known]).cpu()
            first += head.channels

    def scores(self, values: Tensor) -> dict[str, float]:
        """Return the logged scores of sums (5, heads), without heads that have no ground truth in the crops."""
        result: dict[str, float] = {}
        for head, (tp, fp, fn, errors, number) in zip(self.heads, values.T.tolist(), strict=True):
            if head.kind in ("affinities", "boundary") and tp + fn:
                result[f"val/{head.name}/dice"] = 2 * tp / (2 * tp + fp + fn)
            elif head.kind in ("distance", "lsd") and number:
                result[f"val/{head.name}/mae"] = errors / number
        return result


def _sums(found: Tensor, target: Tensor) -> Tensor:
    """Return the rows of `HeadScores` for known voxels (N,)."""
    a, b = found > _THRESHOLD, target > _THRESHOLD
    tp = (a & b).sum()
    errors = (found - target).abs().sum(dtype=torch.float64)
    return torch.stack([tp, a.sum() - tp, b.sum() - tp, errors, torch.tensor(len(found), device=found.device)])
