"""A U-Net in two dimensions that goes through a patch plane by plane.

The planes of all patches are one batch of images, so a training step sees as many samples as there are planes. With
``planes`` above 1 (2.5-D) an image also has the neighboring planes along z as channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from connectomics.errors import InputError, require_known

NORMS = ("batch", "instance", "group")
_GROUP = 8  # channels that share one group of group normalization
_VOXELS_AT_ONCE = 1 << 22  # of a window, without gradients: bounds memory, and each plane is independent


class PlaneUNet(nn.Module):
    """A U-Net on the planes of a patch, (B, in_channels, D, H, W) to (B, out_channels, D, H, W).

    A stage has two 3 x 3 convolutions, each with normalization and ReLU, and dropout; stages are joined by max pooling,
    transposed convolutions and concatenated skip connections (Ronneberger et al., arXiv:1505.04597).

    Beyond the first and the last plane of a patch, neighbors are copies of these planes.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        features: Sequence[int] = (32, 64, 128, 256, 256),
        planes: int = 1,
        stem: int = 1,
        norm: str = "batch",
        dropout: float = 0.0,
        residual: bool = False,
        deep_supervision: bool = False,
    ) -> None:
        """Build the network.

        Args:
            in_channels: channels of the patch. out_channels: channels of the logits.
            features: channels of the stages, finest first.
            planes: planes along z that an image shows, an odd number.
            stem: side of the squares of pixels that enter the first stage as channels (Shi et al., arXiv:1609.05158);
                the last stage returns such squares. With 2, the network costs as much as at twice the voxel size, and
                sees and returns every voxel.
            norm: ``batch``, ``instance`` or ``group`` (of 8 channels), over the voxels of a plane.
            dropout: share of channels that are set to zero at the end of each stage, in training.
            residual: add the input of a stage to its output (He et al., arXiv:1512.03385).
            deep_supervision: in training, return a list of logits: (D, H, W), (D, H/2, W/2) and so on, without the two
                coarsest stages.
        """
        super().__init__()
        if planes < 1 or planes % 2 == 0:
            raise InputError(f"planes must be an odd number (1, 3, 5), got {planes}")
        if stem < 1:
            raise InputError(f"stem must be at least 1, got {stem}")
        if len(features) < 2:
            raise InputError(f"features must have at least two stages, got {list(features)}")
        require_known("normalization", [norm], NORMS, "model.options.norm")
        self.planes = planes
        self.stem = stem
        self.deep_supervision = deep_supervision
        widths = [int(n) for n in features]
        pairs = list(zip(widths[1:], widths[:-1], strict=True))[::-1]  # (coarse, fine), coarsest first
        how = (norm, dropout, residual)
        self.down = nn.ModuleList(
            Stage(before, after, *how)
            for before, after in zip([in_channels * planes * stem**2, *widths[:-1]], widths, strict=True)
        )
        self.enlarge = nn.ModuleList(nn.ConvTranspose2d(coarse, fine, 2, stride=2) for coarse, fine in pairs)
        self.up = nn.ModuleList(Stage(2 * fine, fine, *how) for _, fine in pairs)
        supervised = max(1, len(pairs) - 1) if deep_supervision else 1
        self.heads = nn.ModuleList(nn.Conv2d(width, out_channels, 1) for width in widths[:supervised])
        if stem > 1:  # a square for each pixel
            self.heads[0] = nn.ConvTranspose2d(widths[0], out_channels, stem, stride=stem)

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """Return logits (B, out_channels, D, H, W), or in training with deep supervision a list of them."""
        depth = image.shape[2]
        images = self.images(image)
        if torch.is_grad_enabled():
            levels = self._levels(images)
        else:
            at_once = max(1, _VOXELS_AT_ONCE // (image.shape[3] * image.shape[4]))
            parts = [self._levels(part) for part in images.split(at_once)]
            levels = [torch.cat(level) if len(level) > 1 else level[0] for level in zip(*parts, strict=True)]
        logits = [level.unflatten(0, (-1, depth)).movedim(1, 2) for level in levels]
        return logits if self.training and self.deep_supervision else logits[0]

    def images(self, image: Tensor) -> Tensor:
        """Return the planes of patches (B, C, D, H, W), each with its neighbors, as (B D, C planes, H, W).

        Channels are the fastest axis in memory (``channels_last``), which convolutions on a CPU and half-precision ones
        on a GPU prefer: all layers keep it.
        """
        batch, channels, depth, height, width = image.shape
        reach = self.planes // 2
        if reach:
            padded = functional.pad(image, (0, 0, 0, 0, reach, reach), mode="replicate")
            image = padded.unfold(2, self.planes, 1).movedim(5, 2).reshape(batch, -1, depth, height, width)
        shown = channels * self.planes
        folded = image.permute(0, 2, 3, 4, 1).reshape(batch * depth, height, width, shown)
        if shown > 1:
            return folded.permute(0, 3, 1, 2)
        # of a single channel, permute leaves strides that torch does not read as channels_last
        shape, strides = (batch * depth, 1, height, width), (height * width, 1, width, 1)
        return folded.contiguous().as_strided(shape, strides)

    def _levels(self, x: Tensor) -> list[Tensor]:
        """Return the logits (N, out_channels, h, w) of images, finest first."""
        skips: list[Tensor] = []
        if self.stem > 1:
            x = functional.pixel_unshuffle(x, self.stem).contiguous(memory_format=torch.channels_last)
        for number, stage in enumerate(self.down):
            x = stage(functional.max_pool2d(x, 2) if number else x)
            skips.append(x)
        skips.pop()
        wanted = len(self.heads) if self.training else 1
        levels: list[Tensor] = []
        for number, (enlarge, stage) in enumerate(zip(self.enlarge, self.up, strict=True)):
            x = stage(torch.cat([skips.pop(), enlarge(x)], 1))
            level = len(self.up) - 1 - number
            if level < wanted:
                levels.append(self.heads[level](x))
        return levels[::-1]


class Stage(nn.Module):
    """Two convolutions with normalization and ReLU, and dropout."""

    def __init__(self, channels_in: int, channels_out: int, norm: str, dropout: float, residual: bool) -> None:
        super().__init__()
        self.first = nn.Sequential(*_convolution(channels_in, channels_out, norm), nn.ReLU(inplace=True))
        self.second = nn.Sequential(*_convolution(channels_out, channels_out, norm))
        self.dropout = nn.Dropout2d(dropout)
        self.residual = residual
        alike = not residual or channels_in == channels_out
        self.shortcut = nn.Identity() if alike else nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, channels_out, h, w)."""
        result = self.second(self.first(x))
        if self.residual:
            result = result + self.shortcut(x)
        return self.dropout(functional.relu(result, inplace=True))


def _convolution(channels_in: int, channels_out: int, norm: str) -> Iterator[nn.Module]:
    yield nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
    if norm == "batch":
        yield nn.BatchNorm2d(channels_out)
    elif norm == "instance":
        yield nn.InstanceNorm2d(channels_out, affine=True)
    else:
        yield nn.GroupNorm(max(1, channels_out // _GROUP), channels_out)
