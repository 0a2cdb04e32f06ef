"""Networks that see the same place at several voxel sizes (``data.inputs``).

A further input has the center of the patch, and its own voxel size and shape: usually coarser and wider.

- `EncodedInputs`: a small encoder for each input, whose features are interpolated onto the voxels of the patch and
  concatenated to the image, so that all channels of a voxel are of the same place.
- `StackedInputs`: inputs as further channels, voxel by voxel. Only their centers coincide, and the network must learn
  the rest. It costs nothing except a wider first layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from connectomics.errors import InputError, require_known

FUSIONS = ("encoder", "channels")
_FEATURES = 8  # channels that an encoded input adds to the image


class InputEncoder(nn.Module):
    """Features of one input, (B, 1, d, h, w) to (B, ``features``, d, h, w): two scales, joined."""

    def __init__(self, features: int = _FEATURES) -> None:
        super().__init__()
        self.fine = nn.Sequential(_block(1, features), _block(features, features))
        self.coarse = nn.Sequential(_block(features, 2 * features, stride=2), _block(2 * features, 2 * features))
        self.join = _block(3 * features, features)

    def forward(self, given: Tensor) -> Tensor:
        fine = self.fine(given)
        coarse = functional.interpolate(self.coarse(fine), size=given.shape[2:], mode="trilinear", align_corners=False)
        return self.join(torch.cat([fine, coarse], dim=1))


def _block(channels_in: int, channels_out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv3d(channels_in, channels_out, 3, stride=stride, padding=1),
        nn.InstanceNorm3d(channels_out, affine=True),
        nn.LeakyReLU(0.01, inplace=True),
    )


class EncodedInputs(nn.Module):
    """A network on the image and the features of further inputs, aligned in world coordinates."""

    def __init__(self, network: nn.Module, voxel_ratios: Sequence[Sequence[float]]) -> None:
        """``network`` takes the channels that `channels_for` says; ``voxel_ratios``: for each input its voxel size
        divided by that of the image, z y x."""
        super().__init__()
        self.network = network
        self.encoders = nn.ModuleList(InputEncoder() for _ in voxel_ratios)
        self.ratios = [tuple(map(float, ratio)) for ratio in voxel_ratios]

    def forward(self, image: Tensor, *inputs: Tensor) -> Tensor | list[Tensor]:
        """Return the logits of an image (B, 1, D, H, W) with its inputs (B, 1, d, h, w) of the same center."""
        _check_number(inputs, len(self.ratios))
        features = [
            onto(encoder(given), image.shape[2:], ratio).to(image.dtype)
            for given, encoder, ratio in zip(inputs, self.encoders, self.ratios, strict=True)
        ]
        return self.network(torch.cat([image, *features], dim=1))


class StackedInputs(nn.Module):
    """A network on the image and further inputs as channels."""

    def __init__(self, network: nn.Module, n_inputs: int) -> None:
        """``network`` takes 1 + n_inputs channels."""
        super().__init__()
        self.network = network
        self.n_inputs = n_inputs

    def forward(self, image: Tensor, *inputs: Tensor) -> Tensor | list[Tensor]:
        """Return the logits of an image and its inputs, all (B, 1, D, H, W)."""
        _check_number(inputs, self.n_inputs)
        for given in inputs:
            if given.shape != image.shape:
                raise InputError(
                    f"model.fusion=channels needs inputs as large as the patch; expected {tuple(image.shape[2:])} "
                    f"voxels, got {tuple(given.shape[2:])}; set data.inputs and inference.window to the same size, or "
                    "model.fusion=encoder"
                )
        return self.network(torch.cat([image, *inputs], dim=1))


def _check_number(inputs: Sequence[Tensor], expected: int) -> None:
    if len(inputs) != expected:
        raise InputError(f"the network expects {expected} further inputs (data.inputs), got {len(inputs)}")


def onto(features: Tensor, shape: Sequence[int], ratio: Sequence[float]) -> Tensor:
    """Interpolate features (B, C, d, h, w) at the voxels of a patch of ``shape`` with the same center, (B, C, *shape).

    Trilinear, edge values beyond. ``ratio``: voxel size of the features over that of the patch, z y x. In torch's
    normalized coordinates (faces at -1 and 1) the patch voxel at u is at u * shape / (ratio * features' shape).
    """
    pairs = zip(shape, ratio, features.shape[2:], strict=True)  # no matrices: they may be multiplied in half precision
    axes = [((2 * torch.arange(n, device=features.device) + 1) / n - 1) * (n / (r * m)) for n, r, m in pairs]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1], -1).expand(len(features), *shape, 3)  # x, y, z
    return functional.grid_sample(features.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)


def channels_for(fusion: str, in_channels: int, n_inputs: int) -> int:
    """Return the number of channels that the network itself takes; `UnknownNameError` if ``fusion`` is unknown."""
    require_known("fusion", [fusion], FUSIONS, "model.fusion")
    return in_channels + n_inputs * (_FEATURES if fusion == "encoder" else 1)


def with_inputs(network: nn.Module, fusion: str, voxel_ratios: Sequence[Sequence[float]]) -> nn.Module:
    """Return ``network`` (of `channels_for` channels) as one that takes image and inputs; itself if there are none."""
    if not voxel_ratios:
        return network
    return EncodedInputs(network, voxel_ratios) if fusion == "encoder" else StackedInputs(network, len(voxel_ratios))
