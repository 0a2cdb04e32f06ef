"""Networks that see the same place at several voxel sizes (``data.inputs``).

A further view has the patch's middle and a voxel size and shape of its own, as a rule coarser and wider, so that a
voxel is judged with more of its surroundings than a patch at full resolution could hold. Two ways to bring it in:

- `EncodedViews`: a small encoder for each view; its features are cut to the patch's box in the world, interpolated onto
  the patch's voxels and stacked on the image, so that what stands at a voxel is of the same place at every scale;
- `StackedViews`: views as further channels, voxel by voxel, with the same number of voxels as the patch: only their
  middles coincide, and the network must find out the rest. It costs nothing beside a wider first layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from connectomics.errors import InputError, unknown_name

FUSIONS = ("encoder", "channels")
_FEATURES = 8  # channels that a view adds to the image


class ViewEncoder(nn.Module):
    """Features of one view, (B, 1, d, h, w) to (B, ``features``, d, h, w): two scales, joined."""

    def __init__(self, features: int = _FEATURES) -> None:
        super().__init__()
        self.fine = nn.Sequential(_block(1, features), _block(features, features))
        self.coarse = nn.Sequential(_block(features, 2 * features, stride=2), _block(2 * features, 2 * features))
        self.join = _block(3 * features, features)

    def forward(self, view: Tensor) -> Tensor:
        fine = self.fine(view)
        coarse = functional.interpolate(self.coarse(fine), size=view.shape[2:], mode="trilinear", align_corners=False)
        return self.join(torch.cat([fine, coarse], dim=1))


def _block(channels_in: int, channels_out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv3d(channels_in, channels_out, 3, stride=stride, padding=1),
        nn.InstanceNorm3d(channels_out, affine=True),
        nn.LeakyReLU(0.01, inplace=True),
    )


class EncodedViews(nn.Module):
    """A network on the image and the features of further views, registered in the world."""

    def __init__(self, network: nn.Module, voxel_ratios: Sequence[Sequence[float]], features: int = _FEATURES) -> None:
        """``network`` takes 1 + len(voxel_ratios) * features channels; ``voxel_ratios``: for each view its voxel size
        over the image's, z y x."""
        super().__init__()
        self.network = network
        self.encoders = nn.ModuleList(ViewEncoder(features) for _ in voxel_ratios)
        self.ratios = [tuple(float(r) for r in ratio) for ratio in voxel_ratios]

    def forward(self, image: Tensor, *views: Tensor) -> Tensor | list[Tensor]:
        """Logits of an image (B, 1, D, H, W) with its views (B, 1, d, h, w), centred on the same place."""
        _check_number(views, len(self.ratios))
        parts = [image]
        for view, encoder, ratio in zip(views, self.encoders, self.ratios, strict=True):
            parts.append(onto(encoder(view), image.shape[2:], ratio).to(image.dtype))
        return self.network(torch.cat(parts, dim=1))


class StackedViews(nn.Module):
    """A network on the image and further views as channels."""

    def __init__(self, network: nn.Module, n_views: int) -> None:
        """``network`` takes 1 + n_views channels."""
        super().__init__()
        self.network = network
        self.n_views = n_views

    def forward(self, image: Tensor, *views: Tensor) -> Tensor | list[Tensor]:
        """Logits of an image and its views, all (B, 1, D, H, W)."""
        _check_number(views, self.n_views)
        for view in views:
            if view.shape != image.shape:
                raise InputError(
                    f"model.fusion=channels needs views as large as the patch, {tuple(image.shape[2:])} voxels, found "
                    f"{tuple(view.shape[2:])}; set data.inputs and inference.window alike, or model.fusion=encoder"
                )
        return self.network(torch.cat([image, *views], dim=1))


def _check_number(views: Sequence[Tensor], expected: int) -> None:
    if len(views) != expected:
        raise InputError(f"the network was built for {expected} further views (data.inputs), found {len(views)}")


def onto(features: Tensor, shape: Sequence[int], ratio: Sequence[float]) -> Tensor:
    """Values of a view (B, C, d, h, w) at the voxels of a patch of ``shape`` with the same middle, (B, C, *shape).

    Trilinear, edge values beyond. ``ratio``: voxel size of the view over the patch's, z y x. In torch's normalised
    coordinates (faces at -1 and 1) the patch's voxel at u is the view's point u * shape / (ratio * view's shape).
    """
    scale = [n / (r * m) for n, r, m in zip(shape, ratio, features.shape[2:], strict=True)]
    # affine_grid speaks x, y, z
    theta = torch.diag(features.new_tensor(scale[::-1], dtype=torch.float32))
    theta = torch.cat([theta, theta.new_zeros(3, 1)], dim=1).expand(features.shape[0], 3, 4)
    grid = functional.affine_grid(theta, [features.shape[0], 1, *shape], align_corners=False)
    return functional.grid_sample(features.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)


def channels_for(fusion: str, in_channels: int, n_views: int) -> int:
    """Channels that the network itself takes; `UnknownNameError` for another ``fusion`` than `FUSIONS`."""
    if fusion not in FUSIONS:
        raise unknown_name("fusion", fusion, FUSIONS, "model.fusion")
    return in_channels + n_views * (_FEATURES if fusion == "encoder" else 1)


def with_views(network: nn.Module, fusion: str, voxel_ratios: Sequence[Sequence[float]]) -> nn.Module:
    """``network`` (of `channels_for` channels) as one that takes image and views; itself where there are none."""
    if not voxel_ratios:
        return network
    if fusion == "encoder":
        return EncodedViews(network, voxel_ratios)
    return StackedViews(network, len(voxel_ratios))
