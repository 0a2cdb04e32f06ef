"""A mean teacher: the network agrees with its averaged weights on raw without labels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from connectomics.config import RunConfig
from connectomics.data.augmentation import BatchAugmentor
from connectomics.data.patches import centered, input_names
from connectomics.models.batch_labels import labels_of


class Consistency(NamedTuple):
    """What a student and its teacher say of a batch."""

    loss: Tensor  # mean squared difference of probabilities, zero for voxels that do not count
    confident: Tensor  # share of the voxels with raw, and classes, that count


def ramp(step: int, steps: int) -> float:
    """Return the share of the weight at an optimizer step: exp(-5 (1 - t)^2), t = step / steps up to 1.

    From "Temporal ensembling" (arXiv:1610.02242); 1 if ``steps`` is 0.
    """
    return math.exp(-5 * (1 - min(1.0, step / steps)) ** 2) if steps else 1.0


def consistency(student: Tensor, teacher: Tensor, raw: Tensor, confidence: float) -> Consistency:
    """Compare the logits of two networks at voxels with raw of which the teacher is sure.

    A class counts at a voxel if the teacher's probability p has max(p, 1 - p) >= ``confidence``, as in FixMatch
    (arXiv:2001.07685). The mean is over all voxels with raw, so few sure voxels have little weight.

    Args:
        student, teacher: (B, C, D, H, W); the gradient goes to the student only.
        raw: bool (B, D, H, W), whether a voxel has raw.
    """
    target = torch.sigmoid(teacher.detach().float())
    counted = (torch.maximum(target, 1 - target) >= confidence) & raw[:, None]
    total = (raw.sum() * student.shape[1]).clamp(min=1)
    difference = torch.sigmoid(student.float()) - target
    return Consistency((difference.square() * counted).sum() / total, counted.sum() / total)


class MeanTeacher:
    """The consistency loss of ``training.mean_teacher`` (arXiv:1703.01780).

    Both networks see the same patch with the same spatial augmentation. The teacher sees it as it is, the student with
    the intensity part of the preset ``em`` (as "weak" and "strong" in FixMatch).
    """

    def __init__(self, config: RunConfig) -> None:
        self.options = config.training.mean_teacher
        self._strong = BatchAugmentor.strong(config, self.options.strength)
        self._inputs = input_names(len(config.data.inputs))
        self._classes = len(config.dataset.classes)

    def weight(self, step: int) -> float:
        """Return the weight of the loss at an optimizer step."""
        return self.options.weight * ramp(step, self.options.ramp_steps)

    def __call__(self, batch: Mapping[str, Tensor], student: nn.Module, teacher: nn.Module) -> Consistency:
        """Return the consistency on a batch of `connectomics.data.patches.collate`, not augmented and not centered.

        ``teacher`` is in evaluation mode."""
        strong = batch if self._strong is None else self._strong(batch)
        views = [[view[name] for name in ("image", *self._inputs)] for view in map(centered, (strong, batch))]
        with torch.no_grad():
            target = teacher(*views[1])
        output = student(*views[0])
        logits = output if isinstance(output, Tensor) else output[0]  # deep supervision: full size first
        raw = labels_of(batch).of(0)[1]
        return consistency(logits[:, : self._classes], target[:, : self._classes], raw, self.options.confidence)
