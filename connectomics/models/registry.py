"""The networks that a configuration can name: `ARCHITECTURES`, and what `register_model` adds.

`list_models` and `required_multiple` import neither torch nor MONAI; `build_model` imports torch, and MONAI only for a
MONAI network.

Every network maps a centered image (B, in_channels, D, H, W), float32, to logits (B, out_channels, D, H, W). In
training with deep supervision it returns a list of logits instead, full size first, each next one coarser.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from connectomics.errors import ConnectomicsError, InputError, require_known, unknown_name
from connectomics.models.architectures import ARCHITECTURES, Architecture, Multiple, per_axis

if TYPE_CHECKING:
    from torch import nn

# arguments that `build_model` passes itself; a configuration sets these elsewhere (model.in_channels, ...)
_RESERVED = frozenset({"self", "spatial_dims", "in_channels", "out_channels", "img_size", "deep_supervision"})

# MedNeXt, table 1 of arXiv:2303.09975: expansion ratios and number of blocks of the encoder stages and the bottleneck;
# the decoder mirrors the encoder
_MEDNEXT_SIZES = {
    "S": ((2, 2, 2, 2, 2), (2, 2, 2, 2, 2)),
    "B": ((2, 3, 4, 4, 4), (2, 2, 2, 2, 2)),
    "M": ((2, 3, 4, 4, 4), (3, 4, 4, 4, 4)),
    "L": ((3, 4, 8, 8, 8), (3, 4, 8, 8, 8)),
}
_MEDNEXT_KERNELS = (3, 5, 7)


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
    """Register a network under a name; call this in a module that the configuration names in ``plugins``.

    A network registered before under the same name is replaced.

    Args:
        name: for ``model.architecture``.
        constructor: a class or function that returns the network (see the module docstring). It is called with
            ``in_channels``, ``out_channels`` and its options (``defaults``, ``model.options``) as keywords.
        description: one line for `pytc train --list-models`.
        multiple: what the sides of a patch must be divisible by, voxels, z y x.
        deep_supervision: the constructor also takes ``deep_supervision``: whether to return a list of logits in
            training.
        fixed_size: the constructor also takes ``patch_size`` (z y x), and the network takes only this size.

    Raises:
        InputError: the name is that of a network of this package.
    """
    there = ARCHITECTURES.get(name)
    if there is not None and isinstance(there.constructor, str):
        raise InputError(f"model {name!r} is a network of this package; register yours under another name")
    sides = per_axis(list(multiple))
    known = Architecture(description, constructor, dict(defaults or {}), lambda options: sides)
    ARCHITECTURES[name] = replace(known, deep_supervision=deep_supervision, fixed_size=fixed_size)


def list_models() -> dict[str, str]:
    """Return the names of the networks with a one-line description each."""
    return {name: architecture.description for name, architecture in ARCHITECTURES.items()}


def _architecture(name: str) -> Architecture:
    require_known("model architecture", [name], ARCHITECTURES, "model.architecture")
    return ARCHITECTURES[name]


def has_deep_supervision(architecture: str) -> bool:
    """Return whether the network can be trained with ``deep_supervision=True``; raises `UnknownNameError`."""
    return _architecture(architecture).deep_supervision


def dropout_options(architecture: str, share: float) -> dict[str, Any]:
    """Return the options of `build_model` that drop a share of the channels (0 to 1) throughout the network.

    Raises:
        UnknownNameError: the architecture is unknown.
        InputError: it is a registered network without this option.
    """
    known = _architecture(architecture)
    constructor = _constructor(known)
    allowed = _options(known, constructor)
    if allowed is not None and not set(known.dropout) <= allowed:
        raise InputError(
            f"model {architecture!r} has no option {' or '.join(known.dropout)}, which model.dropout sets; set "
            "model.dropout=null, or add the option to its constructor"
        )
    return {name: (share, share) if name == "dropout_prob_up" else share for name in known.dropout}


def fixed_patch_size(architecture: str) -> bool:
    """Return whether the network takes only the patch size that it was built for; raises `UnknownNameError`."""
    return _architecture(architecture).fixed_size


def required_multiple(architecture: str, options: Mapping[str, Any] | None = None) -> Multiple:
    """Return what the sides of a patch must be divisible by, voxels, z y x. ``options`` are those of `build_model`.

    Raises:
        UnknownNameError: the architecture is unknown.
        InputError: the options do not describe its stages.
    """
    known = _architecture(architecture)
    return _of_stages(architecture, known.multiple, options)


def takes_any_window(architecture: str, options: Mapping[str, Any] | None = None) -> bool:
    """Return whether a voxel's value is the same in windows of any size (away from their faces); raises
    `UnknownNameError`. ``options`` are those of `build_model`."""
    known = _architecture(architecture)
    return known.any_window({**known.defaults, **(options or {})})


def _of_stages(
    architecture: str, rule: Callable[[Mapping[str, Any]], Multiple], options: Mapping[str, Any] | None
) -> Multiple:
    """Return what a rule of an architecture gives for its options; raises `InputError` if they do not fit it."""
    given = {**_architecture(architecture).defaults, **(options or {})}
    try:
        return rule(given)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"model options of {architecture!r} do not describe its stages, got {dict(given)} ({error})"
        ) from error


def check_patch_size(architecture: str, patch_size: Sequence[int], options: Mapping[str, Any] | None = None) -> None:
    """Raise `InputError` if a patch of ``patch_size`` voxels (z, y, x) does not fit the network.

    Every side must be a multiple of `required_multiple`, and the coarsest level must keep more than one voxel (of a
    network in two dimensions: more than one pixel per side), because normalization needs more than one.
    """
    size = [int(n) for n in patch_size]
    if len(size) != 3 or min(size) < 1:
        raise InputError(f"patch_size must be three positive numbers of voxels (z, y, x), got {list(patch_size)}")
    multiple = list(required_multiple(architecture, options))
    fitting = [max(m, round(n / m) * m) for n, m in zip(size, multiple, strict=True)]
    if fitting == multiple:
        fitting = [2 * m for m in multiple]
    if any(n % m for n, m in zip(size, multiple, strict=True)):
        raise InputError(
            f"patch_size {size} does not fit model {architecture!r}: every side must be a multiple of {multiple} "
            f"voxels (z, y, x); use {fitting}, for example"
        )
    if size == multiple:
        raise InputError(
            f"patch_size {size} is too small for model {architecture!r}: its coarsest level would hold a single voxel; "
            f"use {fitting}, for example"
        )
    rule = _architecture(architecture).smallest
    smallest = (1, 1, 1) if rule is None else _of_stages(architecture, rule, options)
    if any(n < least for n, least in zip(size, smallest, strict=True)):
        raise InputError(
            f"patch_size {size} is too small for model {architecture!r} with these options: expected at least "
            f"{list(smallest)} voxels (z, y, x); use {[max(pair) for pair in zip(size, smallest, strict=True)]}, for "
            "example"
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
    """Return a network with new weights (from torch's global random state).

    Args:
        architecture: a name of `list_models`.
        in_channels: channels of the image (1 for EM).
        out_channels: output channels, one sigmoid each.
        patch_size: training patch, voxels, z y x.
        deep_supervision: return a list of logits in training, if the network supports it.
        options: keywords of the network's constructor in MONAI, and for ``mednext`` also ``mednext_size``,
            ``mednext_kernel_size`` and ``gradient_checkpointing``.

    Raises:
        UnknownNameError: the architecture or an option is unknown.
        InputError: the patch does not fit, or the constructor refuses the options.
    """
    from torch import nn

    known = _architecture(architecture)
    given = dict(options or {})
    if in_channels < 1 or out_channels < 1:
        raise InputError(f"a model needs at least one channel in and out, got {in_channels} in, {out_channels} out")
    if deep_supervision and not known.deep_supervision:
        able = ", ".join(name for name, a in ARCHITECTURES.items() if a.deep_supervision)
        raise InputError(
            f"model {architecture!r} has no deep supervision (these have: {able}); set model.deep_supervision=false"
        )
    constructor = _constructor(known)
    allowed = _options(known, constructor)
    for name in given:
        if allowed is not None and name not in allowed:
            raise unknown_name("option", name, allowed, f"model {architecture!r} (model.options)")
    check_patch_size(architecture, patch_size, given)
    keywords = {**known.defaults, **given, "in_channels": in_channels, "out_channels": out_channels}
    try:
        network = _construct(architecture, constructor, keywords, tuple(map(int, patch_size)), deep_supervision)
        if not isinstance(network, nn.Module):
            raise InputError(
                f"the constructor of model {architecture!r} must return a torch.nn.Module, got {network!r}"
            )
    except ConnectomicsError:
        raise
    # MONAI reports bad options with whatever error its parts raise
    except (ValueError, TypeError, KeyError, IndexError, AssertionError, RuntimeError, AttributeError) as error:
        raise InputError(f"model {architecture!r} cannot be built with options {given}: {error}") from error
    for name, parameter in network.named_parameters():
        if any(part in name for part in known.idle):
            parameter.requires_grad_(False)
    return network


def _constructor(known: Architecture) -> Callable[..., nn.Module]:
    if not isinstance(known.constructor, str):
        return known.constructor
    module, _, name = known.constructor.rpartition(":")
    found: Callable[..., nn.Module] = getattr(importlib.import_module(module or "monai.networks.nets"), name)
    return found


def _options(known: Architecture, constructor: Callable[..., nn.Module]) -> set[str] | None:
    """Return the options that the configuration may set; None if the constructor takes any."""
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
    known = _architecture(architecture)
    if not isinstance(known.constructor, str) or ":" in known.constructor:
        more: dict[str, Any] = {"deep_supervision": deep_supervision} if known.deep_supervision else {}
        return constructor(**keywords, **more, **({"patch_size": patch_size} if known.fixed_size else {}))
    if architecture == "unetr":
        return constructor(img_size=patch_size, **keywords)
    if architecture not in ("mednext", "dynunet"):
        return constructor(spatial_dims=3, **keywords)
    from connectomics.models import monai_networks

    if architecture == "dynunet":
        return monai_networks.DynUNetNetwork(deep_supervision=deep_supervision, **keywords)
    return monai_networks.MedNeXtNetwork(deep_supervision=deep_supervision, **_mednext_keywords(keywords))


def _mednext_keywords(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Return MONAI's keywords for a MedNeXt size; the configuration may override each of them."""
    rest = dict(keywords)
    size = str(rest.pop("mednext_size"))
    kernel = rest.pop("mednext_kernel_size")
    if size.upper() not in _MEDNEXT_SIZES:
        raise unknown_name("MedNeXt size", size, _MEDNEXT_SIZES, "model.mednext_size")
    if kernel not in _MEDNEXT_KERNELS:
        raise InputError(f"model.mednext_kernel_size must be one of {list(_MEDNEXT_KERNELS)}, got {kernel!r}")
    ratios, blocks = _MEDNEXT_SIZES[size.upper()]
    named = {
        "encoder_expansion_ratio": ratios[:-1],
        "bottleneck_expansion_ratio": ratios[-1],
        "decoder_expansion_ratio": ratios[-2::-1],
        "blocks_down": blocks[:-1],
        "blocks_bottleneck": blocks[-1],
        "blocks_up": blocks[-2::-1],
    }
    return {**named, "kernel_size": int(kernel), **rest}
