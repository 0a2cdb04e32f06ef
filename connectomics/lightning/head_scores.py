"""How well heads do on whole validation crops: sums over blocks and processes, and one number a head from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from connectomics.config.heads import Head
from connectomics.geometry import VoxelGrid
from connectomics.models.targets import head_labels, reach

_THRESHOLD = 0.5
_ROWS = 5  # true positives, false positives, false negatives, sum of absolute errors, number of voxels


class ObjectTruth(Protocol):
    """What is asked of a crop: its objects."""

    def read_ids(self, grid: VoxelGrid) -> NDArray[np.int32]:
        """int32 (I, d, h, w) on a grid of the crop's lattice, also beyond it: objects, 0 background, -1 unknown."""


class HeadScores:
    """Dice of affinities and boundaries (``val/mito/affinities/dice``), mean absolute error of distances and
    descriptors (``val/mito/distance/mae``), over the known voxels of all channels and crops together.

    The targets of a block are made with a margin as wide as they reach, so they do not depend on the blocks.
    """

    def __init__(self, heads: Sequence[Head]) -> None:
        self.heads = tuple(heads)
        self.classes = tuple(dict.fromkeys(head.class_name for head in heads))
        self.margin = [max((reach(head)[axis] for head in heads), default=0) for axis in range(3)]
        self.values = torch.zeros((_ROWS, len(self.heads)), dtype=torch.float64)

    def reset(self) -> None:
        """Forget everything."""
        self.values.zero_()

    def add(self, crop: ObjectTruth, block: VoxelGrid, probability: NDArray[np.float32], device: torch.device) -> None:
        """Count a block: ``probability`` (H, d, h, w) of all heads' channels. Targets are made on ``device``."""
        ids = torch.from_numpy(crop.read_ids(block.grow(self.margin))).to(device)
        inside = tuple(slice(m, m + n) for m, n in zip(self.margin, block.shape, strict=True))
        first = 0
        for number, head in enumerate(self.heads):
            labels = head_labels(head, ids[self.classes.index(head.class_name)][None].contiguous())
            for channel in range(head.channels):
                target, known = (values[0][inside] for values in labels.of(channel))
                found = torch.from_numpy(probability[first + channel]).to(device)
                self.values[:, number] += _sums(found[known], target[known]).cpu()
            first += head.channels

    def scores(self, values: Tensor) -> dict[str, float]:
        """What is logged of sums (5, heads), for instance of several processes; without heads that have no ground truth
        in the crops, whatever is predicted."""
        result: dict[str, float] = {}
        for head, (tp, fp, fn, errors, number) in zip(self.heads, values.T.tolist(), strict=True):
            if head.kind in ("affinities", "boundary") and tp + fn:
                result[f"val/{head.name}/dice"] = 2 * tp / (2 * tp + fp + fn)
            elif head.kind in ("distance", "lsd") and number:
                result[f"val/{head.name}/mae"] = errors / number
        return result


def _sums(found: Tensor, target: Tensor) -> Tensor:
    """Of known voxels (N,): true positives, false positives, false negatives, sum of absolute errors, N."""
    a, b = found > _THRESHOLD, target > _THRESHOLD
    tp = (a & b).sum()
    errors = (found - target).abs().sum(dtype=torch.float64)
    return torch.stack([tp, a.sum() - tp, b.sum() - tp, errors, torch.tensor(len(found), device=found.device)])
