"""The losses of heads: the channels of a head against the targets computed from the instance ids of its class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from connectomics.config.heads import Head
from connectomics.errors import InputError
from connectomics.models.losses import LossResult, build_loss
from connectomics.models.targets import head_labels


class HeadLosses(nn.Module):
    """Losses of all heads of a run over known voxels, each the mean over the channels of its head.

    With deep supervision the coarser outputs are trained on the mean of the fine targets, where all of these are
    known, with the weights that they have for classes (`connectomics.models.losses.MaskedLoss`).
    """

    def __init__(self, heads: Sequence[Head]) -> None:
        """Raises `UnknownNameError` if a head names an unknown loss."""
        super().__init__()
        self.heads = tuple(heads)
        self.classes = tuple(dict.fromkeys(head.class_name for head in heads))
        self.losses = nn.ModuleList(build_loss(head.losses, voxel_size=head.voxel_size) for head in heads)

    def forward(self, outputs: Sequence[Sequence[Tensor]], ids: Tensor) -> LossResult:
        """Return the weighted sum, and the loss of each head by its name.

        Args:
            outputs: for each head its logits (B, channels, D, H, W), full size first, then coarser ones.
            ids: int32 (B, I, D, H, W), one channel per class of ``classes``.
        """
        if ids.ndim != 5 or ids.shape[1] != len(self.classes):
            raise InputError(
                f"the heads need ids (B, {len(self.classes)}, D, H, W) of {', '.join(self.classes)}, got "
                f"{tuple(ids.shape)}"
            )
        total = torch.zeros((), device=ids.device)
        parts: dict[str, Tensor] = {}
        for head, loss, logits in zip(self.heads, self.losses, outputs, strict=True):
            with torch.no_grad():
                labels = head_labels(head, ids[:, self.classes.index(head.class_name)])
            result: LossResult = loss(logits, labels)
            total = total + head.weight * result.total
            parts[head.name] = result.total.detach()
        return LossResult(total, parts)


def split_channels(outputs: Tensor | Sequence[Tensor], sizes: Sequence[int]) -> list[list[Tensor]]:
    """Split outputs (B, C, D, H, W) of one or more sizes into groups of channels, each a list of all sizes.

    One split per size lets the backward pass join the groups' gradients instead of summing full-size ones.
    """
    levels = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    return [list(group) for group in zip(*(level.split(list(sizes), dim=1) for level in levels), strict=True)]


def ids_of(batch: Mapping[str, Tensor]) -> Tensor:
    """Return the instance ids of a batch of a loader; `InputError` if it has none."""
    if "ids" not in batch:
        raise InputError(
            "a batch must have instance ids (ids: int32 (B, I, D, H, W)) to train model.heads or with data.gap_nm, "
            f"got {', '.join(map(str, batch)) or 'nothing'}"
        )
    return batch["ids"]
