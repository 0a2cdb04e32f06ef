"""Hide voxels of raw from a network that learns to reconstruct them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_RADIUS = 2  # voxels along each axis, in which a blind spot takes another voxel's value


def hide_blocks(image: Tensor, ratio: float, block: Sequence[int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Set random blocks of an image to 0, the mean of centered raw (masked autoencoders, arXiv:2111.06377).

    The blocks lie on a lattice with a random offset, so that a share of blocks can be drawn exactly.

    Args:
        image: (D, H, W) float, centered. ratio: share of hidden blocks, 0 to 1. block: shape in voxels, z y x.
        generator: of the CPU.

    Returns:
        The image with hidden blocks, and a mask of them, bool (D, H, W).
    """
    cells = [-(-n // b) + 1 for n, b in zip(image.shape, block, strict=True)]
    count = cells[0] * cells[1] * cells[2]
    hidden = torch.zeros(count, dtype=torch.bool)
    hidden[torch.randperm(count, generator=generator)[: round(ratio * count)]] = True
    hidden = hidden.view(*cells)
    for axis, (n, b) in enumerate(zip(image.shape, block, strict=True)):
        offset = int(torch.randint(b, (), generator=generator))
        hidden = hidden.repeat_interleave(b, axis).narrow(axis, offset, n)
    hidden = hidden.to(image.device, non_blocking=True)
    return image.masked_fill(hidden, 0), hidden


def blind_spots(image: Tensor, ratio: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Replace random voxels of an image by another one at most two voxels away along each axis (Noise2Void,
    arXiv:1811.10980). What a network then predicts for them is the image without the noise of single voxels.

    Args:
        image: (D, H, W) float. ratio: expected share of replaced voxels. generator: of the CPU.

    Returns:
        The image with replaced voxels, and a mask of them, bool (D, H, W).
    """
    shape = torch.tensor(image.shape)
    hidden = torch.rand(image.shape, generator=generator) < ratio
    places = hidden.nonzero()
    steps = torch.randint(-_RADIUS, _RADIUS + 1, places.shape, generator=generator) * (shape > 1)
    steps[(steps == 0).all(1), -1] = 1
    others = places + steps
    outside = (others < 0) | (others >= shape)
    others = torch.where(outside, places - steps, others).clamp(min=torch.zeros(3, dtype=torch.long), max=shape - 1)
    places, others, hidden = (t.to(image.device, non_blocking=True) for t in (places, others, hidden))
    changed = image.clone()
    changed[places.unbind(1)] = image[others.unbind(1)]
    return changed, hidden
