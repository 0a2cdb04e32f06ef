"""The residual-encoder U-Net of nnU-Net (Isensee et al., arXiv:2404.09556)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from connectomics.errors import InputError, unknown_name
from connectomics.geometry import Index, index
from connectomics.models.architectures import per_axis

_STEPS = (1, 2, 4, 8, 10, 10)  # channels of the stages, relative to the first
_NNUNET = (1, 3, 4, 6, 6, 6)  # residual blocks of the stages
#: channels of the first stage, and blocks of the stages; M is nnU-Net's network (its presets M, L and XL have the same
#: stages and differ in patch and batch), S has half its channels and fewer blocks, L half as many channels again
SIZES = {"S": (16, (1, 2, 2, 2, 2, 2)), "M": (32, _NNUNET), "L": (48, _NNUNET)}


class ResidualEncoderUNet(nn.Module):
    """A U-Net with a deep residual encoder and a light decoder, (B, in_channels, D, H, W) to logits.

    The encoder has blocks of two convolutions with a shortcut, the decoder one convolution a stage, all with instance
    normalization and leaky ReLU.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        size: str = "S",
        strides: Sequence[Sequence[int] | int] = (1, 2, 2, 2, 2),
        kernel_size: Sequence[Sequence[int] | int] = (3, 3, 3, 3, 3),
        dropout: float = 0.0,
        deep_supervision: bool = False,
    ) -> None:
        """Build the network.

        Args:
            in_channels: channels of the patch. out_channels: channels of the logits.
            size: ``S``, ``M`` or ``L``, see `SIZES`.
            strides, kernel_size: of each stage, at most six, finest first, one number or z y x; see
                `connectomics.models.stages.stages_for`.
            dropout: share of channels that are set to zero at the end of each stage, in training.
            deep_supervision: in training, return a list of logits, each as fine as its stage, without the coarsest two.
        """
        super().__init__()
        if size.upper() not in SIZES:
            raise unknown_name("size", size, SIZES, "model.options.size")
        stages = len(strides)
        if not 2 <= stages <= len(_STEPS) or len(kernel_size) != stages:
            raise InputError(
                f"strides and kernel_size must be of as many stages, 2 to {len(_STEPS)}, got {stages} strides and "
                f"{len(kernel_size)} kernels"
            )
        first, blocks = SIZES[size.upper()]
        widths = [first * step for step in _STEPS[:stages]]
        steps = [per_axis(stride) for stride in strides]
        kernels = [per_axis(kernel) for kernel in kernel_size]
        if max(steps[0]) > 1:
            raise InputError(f"the stride of the first stage must be 1, got {strides[0]}")
        self.deep_supervision = deep_supervision
        self.stem = nn.Sequential(*_convolution(in_channels, widths[0], kernels[0]), nn.LeakyReLU(0.01, inplace=True))
        before = [widths[0], *widths[:-1]]
        self.encoder = nn.ModuleList(
            nn.Sequential(
                ResidualBlock(before[n], widths[n], kernels[n], steps[n]),
                *(ResidualBlock(widths[n], widths[n], kernels[n]) for _ in range(blocks[n] - 1)),
                nn.Dropout3d(dropout),
            )
            for n in range(stages)
        )
        levels = range(stages - 2, -1, -1)
        self.enlarge = nn.ModuleList(
            nn.ConvTranspose3d(widths[n + 1], widths[n], steps[n + 1], stride=steps[n + 1]) for n in levels
        )
        self.decoder = nn.ModuleList(
            nn.Sequential(
                *_convolution(2 * widths[n], widths[n], kernels[n]),
                nn.LeakyReLU(0.01, inplace=True),
                nn.Dropout3d(dropout),
            )
            for n in levels
        )
        supervised = max(1, stages - 2) if deep_supervision else 1
        self.heads = nn.ModuleList(nn.Conv3d(width, out_channels, 1) for width in widths[:supervised])

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """Return logits (B, out_channels, D, H, W), or in training with deep supervision a list, full size first."""
        x = self.stem(image)
        skips: list[Tensor] = []
        for stage in self.encoder:
            x = stage(x)
            skips.append(x)
        skips.pop()
        supervise = self.training and self.deep_supervision
        logits: list[Tensor] = []
        for level, enlarge, stage in zip(range(len(skips) - 1, -1, -1), self.enlarge, self.decoder, strict=True):
            x = stage(torch.cat([enlarge(x), skips.pop()], 1))
            if level == 0 or (supervise and level < len(self.heads)):
                logits.append(self.heads[level](x))
        return logits[::-1] if supervise else logits[0]


class ResidualBlock(nn.Module):
    """Two convolutions, and a shortcut: average pooling for a stride, a 1 x 1 x 1 convolution for new channels."""

    def __init__(self, channels_in: int, channels_out: int, kernel: Index, stride: Index = (1, 1, 1)) -> None:
        super().__init__()
        self.first = nn.Sequential(*_convolution(channels_in, channels_out, kernel, stride), nn.LeakyReLU(0.01, True))
        self.second = nn.Sequential(*_convolution(channels_out, channels_out, kernel))
        shortcut: list[nn.Module] = [] if max(stride) == 1 else [nn.AvgPool3d(stride, stride)]
        if channels_in != channels_out:
            shortcut += [nn.Conv3d(channels_in, channels_out, 1, bias=False), _norm(channels_out)]
        self.shortcut = nn.Sequential(*shortcut)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, channels_out, D, H, W), each side divided by the stride."""
        return functional.leaky_relu(self.second(self.first(x)) + self.shortcut(x), 0.01, inplace=True)


def _convolution(
    channels_in: int, channels_out: int, kernel: Index, stride: Index = (1, 1, 1)
) -> tuple[nn.Module, nn.Module]:
    padding = index(k // 2 for k in kernel)
    return nn.Conv3d(channels_in, channels_out, kernel, stride=stride, padding=padding), _norm(channels_out)


def _norm(channels: int) -> nn.Module:
    return nn.InstanceNorm3d(channels, affine=True)
