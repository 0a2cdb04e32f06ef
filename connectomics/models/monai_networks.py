"""Wrappers of MONAI networks, so that they return what every network returns (see `connectomics.models.registry`)."""

from __future__ import annotations

from typing import Any

import torch
from monai.networks.nets import DynUNet, MedNeXt
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class MedNeXtNetwork(nn.Module):
    """MONAI's MedNeXt with deep supervision as a list, gradient checkpointing, and channel dropout after each stage.

    With ``gradient_checkpointing`` the activations inside a stage are recomputed in the backward pass: about a third
    more time for a fraction of the memory. Parameter names do not depend on it, so checkpoints fit both.
    """

    def __init__(
        self,
        *,
        deep_supervision: bool = False,
        gradient_checkpointing: bool = False,
        dropout: float = 0.0,
        **keywords: Any,
    ) -> None:
        super().__init__()
        self.dropout = nn.Dropout3d(dropout)
        self.net = MedNeXt(spatial_dims=3, deep_supervision=deep_supervision, **keywords)
        self.deep_supervision = deep_supervision
        self.gradient_checkpointing = gradient_checkpointing

    def _run(self, stage: nn.Module, x: Tensor) -> Tensor:
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(stage, x, use_reentrant=False)
        return stage(x)

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """Return logits (B, C, D, H, W), or in training with deep supervision five, each half the size of the last."""
        net = self.net
        x = net.stem(image)
        skips: list[Tensor] = []
        for stage, down in zip(net.enc_stages, net.down_blocks, strict=True):
            x = self.dropout(self._run(stage, x))
            skips.append(x)
            x = self._run(down, x)
        x = self.dropout(self._run(net.bottleneck, x))
        supervise = self.deep_supervision and self.training
        coarse: list[Tensor] = []
        for level, (up, stage) in enumerate(zip(net.up_blocks, net.dec_stages, strict=True)):
            if supervise:
                coarse.append(net.out_blocks[level](x))
            x = self._run(up, x) + skips[-(level + 1)]
            x = self.dropout(self._run(stage, x))
        logits = net.out_0(x)
        return [logits, *reversed(coarse)] if supervise else logits


class DynUNetNetwork(nn.Module):
    """MONAI's DynUNet with coarser logits at their own size.

    MONAI enlarges them to full size and stacks them, which needs the memory of as many full-size outputs.
    """

    def __init__(self, *, deep_supervision: bool = False, **keywords: Any) -> None:
        super().__init__()
        if deep_supervision:
            # MONAI allows heads on all levels except the top and the two coarsest ones
            keywords.setdefault("deep_supr_num", max(1, min(3, len(keywords["strides"]) - 2)))
        self.net = DynUNet(spatial_dims=3, deep_supervision=deep_supervision, **keywords)
        self.deep_supervision = deep_supervision

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """Return logits (B, C, D, H, W), or in training with deep supervision a list, full size first."""
        logits = self.net.output_block(self.net.skip_layers(image))
        if not self.deep_supervision:
            return logits
        # the skip layers store their outputs in this list, which would keep the whole graph alive
        coarse = list(self.net.heads)
        self.net.heads[:] = [torch.empty(0) for _ in coarse]
        return [logits, *coarse] if self.training else logits
