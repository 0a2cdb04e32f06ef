"""Gaps between objects that touch: voxels near another object are not trained as present.

A network that learns only where a class is cannot separate objects that touch. U-Net (arXiv:1505.04597, section 3)
therefore trains on a background ridge between touching cells; here the ridge is as wide as ``data.gap_nm`` says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional

from connectomics.geometry import Index, Triple
from connectomics.models.batch_labels import Labels

_NO_ID = -(2.0**25)  # below minus any id, which are below 2^24


def box_steps(length_nm: float, voxel_size: Sequence[float]) -> Index:
    """Return how many voxels (z, y, x) away a voxel may be to begin within ``length_nm`` of a voxel's center."""
    # a voxel s steps away begins s - 1/2 voxels from the center
    z, y, x = (math.floor(length_nm / side + 0.5 + 1e-6) for side in voxel_size)
    return z, y, x


def box_maximum(values: Tensor, steps: Index) -> Tensor:
    """Return the largest value within some steps along each axis (a box), of the same shape (N, C, D, H, W) float."""
    for axis, reach in enumerate(steps):
        if reach:
            kernel, pad = [1, 1, 1], [0, 0, 0]
            kernel[axis], pad[axis] = 2 * reach + 1, reach
            values = functional.max_pool3d(values, kernel, 1, pad)
    return values


def near_another(ids: Tensor, length_nm: float, voxel_size: Triple) -> Tensor:
    """Return where an object's voxel is within ``length_nm`` of another object along each axis, bool (B, D, H, W).

    ``ids``: int32 (B, D, H, W), an object at positive numbers, as in `connectomics.data.patches.PackedPatch`.
    """
    here = ids > 0
    number = ids.float()[:, None]  # exact, since ids are below 2^24
    both = torch.cat([number, -number], 1).masked_fill_(~here[:, None], _NO_ID)
    high, low = box_maximum(both, box_steps(length_nm, voxel_size)).unbind(1)
    return here & ((high > number[:, 0]) | (-low < number[:, 0]))


@dataclass(frozen=True, eq=False)
class GapLabels(Labels):
    """Labels in which some voxels of some classes are absent, or unknown."""

    labels: Labels
    gaps: Mapping[int, Tensor]  # by channel, bool (B, D, H, W)
    unknown: bool  # what the voxels become: unknown, else absent

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """(B, C, D, H, W)."""
        return self.labels.shape

    @property
    def device(self) -> torch.device:
        """The device that holds the labels."""
        return self.labels.device

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Return the same labels on a device."""
        gaps = {channel: mask.to(device, non_blocking=non_blocking) for channel, mask in self.gaps.items()}
        return replace(self, labels=self.labels.to(device, non_blocking), gaps=gaps)

    def of(self, channel: int) -> tuple[Tensor, Tensor]:
        """Return label and known of a class, (B, D, H, W)."""
        label, known = self.labels.of(channel)
        if channel not in self.gaps:
            return label, known
        gap = self.gaps[channel]
        return (label, known & ~gap) if self.unknown else (label.masked_fill(gap, 0.0), known)
