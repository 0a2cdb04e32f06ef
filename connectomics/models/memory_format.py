"""Weights with the channels as fastest axis in memory, which some convolutions prefer."""

from __future__ import annotations

import torch
from torch import nn

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def set_channels_last(network: nn.Module, last: bool = True) -> None:
    """Store the weights of 2-D and 3-D convolutions with channels last, or contiguously. Values do not change."""
    for parameter in network.parameters():
        wanted = _CHANNELS_LAST.get(parameter.ndim) if last else torch.contiguous_format
        if wanted is not None:
            parameter.data = parameter.data.contiguous(memory_format=wanted)


def prefers_channels_last(network: nn.Module, trained: bool) -> bool:
    """Return whether a network in half precision on a GPU should have channels last: as it was ``trained`` if it has
    depthwise 3-D convolutions, whose kernels depend on the format (docs/networks.md), else always."""
    convolutions = (part for part in network.modules() if isinstance(part, nn.Conv3d))
    return trained or not any(part.groups == part.in_channels > 1 for part in convolutions)
