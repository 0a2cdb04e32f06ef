"""Gaps between objects that touch: voxels near another object are not trained as present.

A network that learns only where a class is cannot separate objects that touch. U-Net (arXiv:1505.04597, section 3)
therefore trains on a background ridge between touching cells; here the ridge is as wide as ``data.gap_nm`` says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from connectomics.config import RunConfig
from connectomics.config.heads import instance_classes
from connectomics.geometry import Triple
from connectomics.models.batch_labels import Labels
from connectomics.models.boxes import box_maximum, box_steps
from connectomics.models.heads import ids_of

_NO_ID = -(2.0**25)  # below minus any id, which are below 2^24


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
    def shape(self) -> tuple[int, ...]:
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


def with_gaps(labels: Labels, batch: Mapping[str, Tensor], config: RunConfig) -> Labels:
    """Return the labels of a batch with the gaps that ``data.gap_nm`` asks for; raise `InputError` if it has no ids."""
    data = config.data
    if not data.gap_nm:
        return labels
    ids, order = ids_of(batch), instance_classes(config)
    gaps = {
        config.dataset.classes.index(name): near_another(ids[:, order.index(name)], length, config.voxel_size)
        for name, length in data.gap_nm.items()
    }
    return GapLabels(labels, gaps, data.gap_state == "unknown")
