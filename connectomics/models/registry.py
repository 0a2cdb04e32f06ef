"""The networks that can be named in a configuration.

`list_models` and `required_multiple` answer without importing torch or MONAI; `build_model` imports them.

Every network maps an image (B, in_channels, D, H, W), float32, centered, to logits (B, out_channels, D, H, W). While
training with deep supervision it returns a list of logits instead, the full size first, each next one coarser.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from connectomics.errors import ConnectomicsError, InputError, unknown_name

if TYPE_CHECKING:
    from torch import nn

Multiple = tuple[int, int, int]

# What `build_model` itself hands to a constructor; a configuration sets these elsewhere (model.in_channels, ...).
_RESERVED = frozenset({"self", "spatial_dims", "in_channels", "out_channels", "img_size", "deep_supervision"})

# MedNeXt, table 1 of arXiv:2303.09975; expansion ratios and blocks of every stage from the top down and up again.
MEDNEXT_SIZES: dict[str, dict[str, Any]] = {
    "S": {
        "encoder_expansion_ratio": (2, 2, 2, 2),
        "decoder_expansion_ratio": (2, 2, 2, 2),
        "bottleneck_expansion_ratio": 2,
        "blocks_down": (2, 2, 2, 2),
        "blocks_bottleneck": 2,
        "blocks_up": (2, 2, 2, 2),
    },
    "B": {
        "encoder_expansion_ratio": (2, 3, 4, 4),
        "decoder_expansion_ratio": (4, 4, 3, 2),
        "bottleneck_expansion_ratio": 4,
        "blocks_down": (2, 2, 2, 2),
        "blocks_bottleneck": 2,
        "blocks_up": (2, 2, 2, 2),
    },
    "M": {
        "encoder_expansion_ratio": (2, 3, 4, 4),
        "decoder_expansion_ratio": (4, 4, 3, 2),
        "bottleneck_expansion_ratio": 4,
        "blocks_down": (3, 4, 4, 4),
        "blocks_bottleneck": 4,
        "blocks_up": (4, 4, 4, 3),
    },
    "L": {
        "encoder_expansion_ratio": (3, 4, 8, 8),
        "decoder_expansion_ratio": (8, 8, 4, 3),
        "bottleneck_expansion_ratio": 8,
        "blocks_down": (3, 4, 8, 8),
        "blocks_bottleneck": 8,
        "blocks_up": (8, 8, 4, 3),
    },
}
MEDNEXT_KERNELS = (3, 5, 7)


def _per_axis(factor: Any) -> Multiple:
    """One number, or three (z, y, x), as three."""
    if isinstance(factor, Sequence):
        z, y, x = (int(f) for f in factor)
        return z, y, x
    return int(factor), int(factor), int(factor)


def _stride_product(strides: Sequence[Any]) -> Multiple:
    z, y, x = (math.prod(axis) for axis in zip(*(_per_axis(s) for s in strides), strict=True))
    return z, y, x


def _halvings(times: int) -> Multiple:
    return _per_axis(2**times)


@dataclass(frozen=True)
class Architecture:
    """One network of the registry.

    Attributes:
        description: one line for `pytc train --list-models`.
        constructor: name of the class in ``monai.networks.nets``, or what to call (see `register_model`); its signature
            says which options there are.
        defaults: options that we set otherwise than MONAI, or that MONAI leaves to the caller.
        multiple: from all options to what a patch must be divisible by on z, y and x.
        own_options: options that our wrapper reads, beside the constructor's.
        hidden: options of the constructor that make no sense here.
        deep_supervision: whether it can return coarser logits too.
        fixed_size: whether it takes patches of one size only, that it is built for.
        idle: parts of names of parameters that MONAI makes and never uses; frozen, since data-parallel training waits
            for the gradient of every parameter that could have one.
    """

    description: str
    constructor: str | Callable[..., nn.Module]
    defaults: Mapping[str, Any]
    multiple: Callable[[Mapping[str, Any]], Multiple]
    own_options: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()
    deep_supervision: bool = False
    fixed_size: bool = False
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
        lambda o: _halvings(len(o["blocks_down"]) if "blocks_down" in o else 4),
        own_options=("mednext_size", "mednext_kernel_size", "gradient_checkpointing"),
        hidden=("kernel_size",),
        deep_supervision=True,
    ),
    "unet": Architecture(
        "residual U-Net with strided convolutions; small and quick, good on a CPU",
        "UNet",
        {**_UNET_STAGES, "num_res_units": 2},
        lambda o: _stride_product(o["strides"]),
    ),
    "basic_unet": Architecture(
        "plain U-Net with two convolutions a stage and max pooling",
        "BasicUNet",
        {"features": (32, 32, 64, 128, 256, 32)},
        lambda o: _halvings(4),
    ),
    "dynunet": Architecture(
        "nnU-Net's U-Net: strides and kernels per stage, deep supervision",
        "DynUNet",
        {
            "kernel_size": (3, 3, 3, 3, 3),
            "strides": (1, 2, 2, 2, 2),
            "upsample_kernel_size": (2, 2, 2, 2),
        },
        lambda o: _stride_product(o["strides"]),
        deep_supervision=True,
    ),
    "segresnet": Architecture(
        "residual encoder with a light decoder (BraTS 2018 winner without its autoencoder branch)",
        "SegResNet",
        {"init_filters": 16, "blocks_down": (1, 2, 2, 4)},
        lambda o: _halvings(len(o["blocks_down"]) - 1),
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
        lambda o: _halvings(4),
        fixed_size=True,
        idle=("norm_cross_attn",),
    ),
    "swin_unetr": Architecture(
        "shifted-window transformer encoder with a convolutional decoder; much memory",
        "SwinUNETR",
        {"patch_size": 2, "feature_size": 24},
        # patch embedding, then four times merged
        lambda o: _per_axis(int(o["patch_size"]) * 16),
    ),
    "flexible_unet": Architecture(
        "U-Net decoder on an EfficientNet or ResNet encoder (option backbone)",
        "FlexibleUNet",
        {"backbone": "efficientnet-b0"},
        lambda o: _halvings(5),
        hidden=("pretrained",),  # MONAI has weights for two dimensions only
        idle=("encoder._conv_head", "encoder._bn1", "encoder._fc"),  # of EfficientNet, whose classifier is not there
    ),
    "vnet": Architecture(
        "V-Net: residual stages of 5x5x5 convolutions",
        "VNet",
        {},
        lambda o: _halvings(4),
        hidden=("dropout_prob",),  # deprecated in MONAI
    ),
}


def register_model(
    name: str,
    constructor: Callable[..., nn.Module],
    description: str,
    *,
    multiple: Sequence[int] = (1, 1, 1),
    defaults: Mapping[str, Any] | None = None,
    deep_supervision: bool = False,
    fixed_size: bool = False,
) -> None:
    """Make a network of one's own known by name; a module named in the configuration's ``plugins`` calls this.

    Args:
        name: for ``model.architecture``.
        constructor: a class or function that gives the network (module docstring: what a network maps to what). It is
            called with ``in_channels``, ``out_channels`` and its options by name (``defaults``, ``model.options``).
        description: one line for `pytc train --list-models`.
        multiple: what the sides of a patch must be divisible by, voxels, z y x.
        deep_supervision: it takes ``deep_supervision`` too: whether to return a list of logits in training.
        fixed_size: it takes ``patch_size`` (z y x) too, and then patches of that size only.

    Raises `InputError` where the name is another network's. What was registered before is replaced.
    """
    there = ARCHITECTURES.get(name)
    if there is not None and isinstance(there.constructor, str):
        raise InputError(f"model {name!r} is a network of this package; register yours under another name")
    sides = _per_axis(list(multiple))
    known = Architecture(description, constructor, dict(defaults or {}), lambda options: sides)
    ARCHITECTURES[name] = replace(known, deep_supervision=deep_supervision, fixed_size=fixed_size)


def list_models() -> dict[str, str]:
    """Names of the networks with a one-line description each; imports neither torch nor MONAI."""
    return {name: architecture.description for name, architecture in ARCHITECTURES.items()}


def _architecture(name: str) -> Architecture:
    if name not in ARCHITECTURES:
        raise unknown_name("model architecture", name, ARCHITECTURES, "model.architecture")
    return ARCHITECTURES[name]


def has_deep_supervision(architecture: str) -> bool:
    """Whether the network can be trained with ``deep_supervision=True``; raises `UnknownNameError`."""
    return _architecture(architecture).deep_supervision


def fixed_patch_size(architecture: str) -> bool:
    """Whether the network takes patches of the one size only that it was built for; raises `UnknownNameError`."""
    return _architecture(architecture).fixed_size


def required_multiple(architecture: str, options: Mapping[str, Any] | None = None) -> Multiple:
    """What the sides of a patch must be divisible by, voxels, z y x.

    ``options`` are those of `build_model`. Raises `UnknownNameError` for an unknown architecture.
    """
    known = _architecture(architecture)
    given = {**known.defaults, **(options or {})}
    try:
        return known.multiple(given)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"model options of {architecture!r} do not describe its stages: {dict(given)} ({error})"
        ) from error


def check_patch_size(architecture: str, patch_size: Sequence[int], options: Mapping[str, Any] | None = None) -> None:
    """Raises `InputError` where a patch of ``patch_size`` voxels (z, y, x) cannot go through the network.

    Every side must be a multiple of `required_multiple`, and the coarsest level must keep more than one voxel: there
    is nothing to normalise over in a single one.
    """
    size = [int(n) for n in patch_size]
    if len(size) != 3 or min(size) < 1:
        raise InputError(f"patch_size must be three positive numbers of voxels (z, y, x), found {list(patch_size)}")
    multiple = required_multiple(architecture, options)
    fitting = [max(m, round(n / m) * m) for n, m in zip(size, multiple, strict=True)]
    if fitting == list(multiple):
        fitting = [2 * m for m in multiple]
    if any(n % m for n, m in zip(size, multiple, strict=True)):
        raise InputError(
            f"patch_size {size} does not fit model {architecture!r}: every side must be a multiple of "
            f"{list(multiple)} voxels (z, y, x); {fitting} would do"
        )
    if size == list(multiple):
        raise InputError(
            f"patch_size {size} is too small for model {architecture!r}: its coarsest level would hold a single voxel; "
            f"{fitting} would do"
        )


def build_model(
    architecture: str,
    in_channels: int,
    out_channels: int,
    *,
    patch_size: Sequence[int] = (128, 128, 128),
    deep_supervision: bool = False,
    options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A network by name, with fresh weights (from torch's global random state).

    Args:
        architecture: a name of `list_models`.
        in_channels: channels of the image (1 for EM).
        out_channels: number of classes; each is its own sigmoid channel.
        patch_size: training patch, voxels, z y x; checked, and what a network of fixed size is built for.
        deep_supervision: return a list of logits in training; only some networks can.
        options: keywords of the network's constructor in MONAI, and for ``mednext`` also ``mednext_size``,
            ``mednext_kernel_size`` and ``gradient_checkpointing``.

    Raises:
        UnknownNameError: no such architecture or option.
        InputError: the patch does not fit, or the constructor refuses the options.
    """
    from torch import nn

    known = _architecture(architecture)
    given = dict(options or {})
    if in_channels < 1 or out_channels < 1:
        raise InputError(f"a model needs at least one channel in and out, found {in_channels} in, {out_channels} out")
    if deep_supervision and not known.deep_supervision:
        able = ", ".join(name for name, a in ARCHITECTURES.items() if a.deep_supervision)
        raise InputError(
            f"model {architecture!r} has no deep supervision (these have: {able}): set model.deep_supervision=false"
        )
    constructor = _constructor(known)
    allowed = _options(known, constructor)
    for name in given:
        if allowed is not None and name not in allowed:
            raise unknown_name("option", name, allowed, f"model {architecture!r} (model.options)")
    check_patch_size(architecture, patch_size, given)
    keywords = {**known.defaults, **given, "in_channels": in_channels, "out_channels": out_channels}
    try:
        network = _construct(architecture, constructor, keywords, tuple(int(n) for n in patch_size), deep_supervision)
        if not isinstance(network, nn.Module):
            raise InputError(f"model {architecture!r}: its constructor gave {network!r}, expected a torch.nn.Module")
    except ConnectomicsError:
        raise
    # MONAI refuses bad values with whatever its parts happen to raise; all of it is the options' fault.
    except (ValueError, TypeError, KeyError, IndexError, AssertionError, RuntimeError, AttributeError) as error:
        raise InputError(f"model {architecture!r} cannot be built with options {given}: {error}") from error
    for name, parameter in network.named_parameters():
        if any(part in name for part in known.idle):
            parameter.requires_grad_(False)
    return network


def _constructor(known: Architecture) -> Callable[..., nn.Module]:
    if not isinstance(known.constructor, str):
        return known.constructor
    from monai.networks import nets

    found: Callable[..., nn.Module] = getattr(nets, known.constructor)
    return found


def _options(known: Architecture, constructor: Callable[..., nn.Module]) -> set[str] | None:
    """Options that the configuration may set; None where the constructor takes any."""
    parameters = inspect.signature(constructor).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return None
    reserved = _RESERVED if isinstance(known.constructor, str) else _RESERVED | {"patch_size"}
    return (set(parameters) - reserved - set(known.hidden)) | set(known.own_options)


def _construct(
    architecture: str,
    constructor: Callable[..., nn.Module],
    keywords: dict[str, Any],
    patch_size: tuple[int, ...],
    deep_supervision: bool,
) -> nn.Module:
    from connectomics.models import networks

    known = _architecture(architecture)
    if not isinstance(known.constructor, str):
        more: dict[str, Any] = {"deep_supervision": deep_supervision} if known.deep_supervision else {}
        return constructor(**keywords, **more, **({"patch_size": patch_size} if known.fixed_size else {}))
    if architecture == "mednext":
        return networks.MedNeXtNetwork(deep_supervision=deep_supervision, **_mednext_keywords(keywords))
    if architecture == "dynunet":
        return networks.DynUNetNetwork(deep_supervision=deep_supervision, **keywords)
    if architecture == "unetr":
        return constructor(img_size=patch_size, **keywords)
    return constructor(spatial_dims=3, **keywords)


def _mednext_keywords(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """MedNeXt's own keywords: those of its size, with what the configuration sets instead."""
    rest = dict(keywords)
    size = str(rest.pop("mednext_size"))
    kernel = rest.pop("mednext_kernel_size")
    if size.upper() not in MEDNEXT_SIZES:
        raise unknown_name("MedNeXt size", size, MEDNEXT_SIZES, "model.mednext_size")
    if kernel not in MEDNEXT_KERNELS:
        raise InputError(f"model.mednext_kernel_size must be one of {list(MEDNEXT_KERNELS)}, found {kernel!r}")
    return {**MEDNEXT_SIZES[size.upper()], "kernel_size": int(kernel), **rest}
