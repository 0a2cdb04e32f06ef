"""The networks of this package by name: how each is built, and which patches it takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from connectomics.geometry import index

if TYPE_CHECKING:
    from torch import nn

Multiple = tuple[int, int, int]


def per_axis(factor: Any) -> Multiple:
    """Return one number, or three (z, y, x), as three."""
    return index(factor if isinstance(factor, Sequence) else (factor,) * 3)


def _stride_product(strides: Sequence[Any]) -> Multiple:
    return index(math.prod(axis) for axis in zip(*(per_axis(s) for s in strides), strict=True))


@dataclass(frozen=True)
class Architecture:
    """One network of the registry."""

    description: str  # one line for `pytc train --list-models`
    #: name of a class in monai.networks.nets, "module:name" of one of this package, or a function (see
    #: `register_model`); its signature gives the options
    constructor: str | Callable[..., nn.Module]
    defaults: Mapping[str, Any]  # options whose default differs from MONAI's, or that MONAI requires
    #: from all options to what the sides of a patch must be divisible by, z, y, x
    multiple: Callable[[Mapping[str, Any]], Multiple]
    #: from all options to the smallest patch, z y x; None: any with more than one voxel at the coarsest level
    smallest: Callable[[Mapping[str, Any]], Multiple] | None = None
    #: options that take a share of channels to drop; empty: the network has none
    dropout: tuple[str, ...] = ("dropout",)
    own_options: tuple[str, ...] = ()  # options that our wrapper reads in addition to the constructor's
    hidden: tuple[str, ...] = ()  # options of the constructor that have no use here
    deep_supervision: bool = False  # whether it can also return coarser logits
    fixed_size: bool = False  # whether it is built for one patch size
    #: from all options to whether a voxel's value depends on the voxels around it alone, whatever the size of the
    #: window: no statistics over the window, no positions in it
    any_window: Callable[[Mapping[str, Any]], bool] = lambda options: False
    #: parts of the names of parameters that MONAI creates and never uses; they are frozen, because data-parallel
    #: training waits for the gradient of every trainable parameter
    idle: tuple[str, ...] = ()


_UNET_STAGES: dict[str, Any] = {"channels": (16, 32, 64, 128, 256), "strides": (2, 2, 2, 2)}

ARCHITECTURES: dict[str, Architecture] = {
    "mednext": Architecture(
        "MedNeXt S/B/M/L (mednext_size), kernel 3 or 5 (mednext_kernel_size): large-kernel convolutions, best results",
        "MedNeXt",
        {
            "mednext_size": "S",
            "mednext_kernel_size": 3,
            "gradient_checkpointing": False,
            "init_filters": 32,
            "use_residual_connection": True,
        },
        lambda o: per_axis(2 ** (len(o["blocks_down"]) if "blocks_down" in o else 4)),
        own_options=("mednext_size", "mednext_kernel_size", "gradient_checkpointing", "dropout"),
        hidden=("kernel_size",),
        deep_supervision=True,
    ),
    "unet": Architecture(
        "residual U-Net with strided convolutions; small and quick, good on a CPU",
        "UNet",
        {**_UNET_STAGES, "num_res_units": 2},
        lambda o: _stride_product(o["strides"]),
    ),
    "unet_2d": Architecture(
        "2-D U-Net on the planes of a patch such as [1,256,256], 2.5-D with planes=3 or 5; quickest on a CPU",
        "connectomics.models.unet_2d:PlaneUNet",
        {"features": (32, 64, 128, 256, 256), "planes": 1, "stem": 1},
        lambda o: (1, *2 * (int(o["stem"]) * 2 ** (len(o["features"]) - 1),)),
        smallest=lambda o: (int(o["planes"]), *2 * (int(o["stem"]) * 2 ** len(o["features"]),)),
        deep_supervision=True,
        # with neighbors, a plane at a face of the window sees copies: a window of one plane would see nothing else
        any_window=lambda o: o.get("norm", "batch") == "batch" and o["planes"] == 1,
    ),
    "basic_unet": Architecture(
        "plain U-Net with two convolutions a stage and max pooling",
        "BasicUNet",
        {"features": (32, 32, 64, 128, 256, 32)},
        lambda o: per_axis(2**4),
    ),
    "dynunet": Architecture(
        "nnU-Net's U-Net: strides and kernels per stage, deep supervision",
        "DynUNet",
        {"kernel_size": (3, 3, 3, 3, 3), "strides": (1, 2, 2, 2, 2), "upsample_kernel_size": (2, 2, 2, 2)},
        lambda o: _stride_product(o["strides"]),
        deep_supervision=True,
    ),
    "residual_unet": Architecture(
        "nnU-Net's U-Net with a deep residual encoder (size S, M or L), strides and kernels per stage",
        "connectomics.models.residual_unet:ResidualEncoderUNet",
        {"strides": (1, 2, 2, 2, 2), "kernel_size": (3, 3, 3, 3, 3)},
        lambda o: _stride_product(o["strides"]),
        deep_supervision=True,
    ),
    "segresnet": Architecture(
        "residual encoder with a light decoder (BraTS 2018 winner without its autoencoder branch)",
        "SegResNet",
        {"init_filters": 16, "blocks_down": (1, 2, 2, 4)},
        lambda o: per_axis(2 ** (len(o["blocks_down"]) - 1)),
        dropout=("dropout_prob",),
    ),
    "attention_unet": Architecture(
        "U-Net whose skip connections are gated by attention",
        "AttentionUnet",
        _UNET_STAGES,
        lambda o: _stride_product(o["strides"]),
    ),
    "unetr": Architecture(
        "vision transformer encoder with a convolutional decoder; built for one patch size",
        "UNETR",
        {},
        lambda o: per_axis(2**4),
        dropout=("dropout_rate",),
        fixed_size=True,
        idle=("norm_cross_attn",),
    ),
    "swin_unetr": Architecture(
        "shifted-window transformer encoder with a convolutional decoder; much memory",
        "SwinUNETR",
        {"patch_size": 2, "feature_size": 24},
        # patch embedding, then four times merged
        lambda o: per_axis(int(o["patch_size"]) * 16),
        dropout=("drop_rate",),
    ),
    "flexible_unet": Architecture(
        "U-Net decoder on an EfficientNet or ResNet encoder (option backbone)",
        "FlexibleUNet",
        {"backbone": "efficientnet-b0"},
        lambda o: per_axis(2**5),
        hidden=("pretrained",),  # MONAI has weights for two dimensions only
        idle=("encoder._conv_head", "encoder._bn1", "encoder._fc"),  # of EfficientNet, whose classifier is not there
    ),
    "vnet": Architecture(
        "V-Net: residual stages of 5x5x5 convolutions",
        "VNet",
        {},
        lambda o: per_axis(2**4),
        dropout=("dropout_prob_down", "dropout_prob_up"),
        hidden=("dropout_prob",),  # deprecated in MONAI
    ),
}
