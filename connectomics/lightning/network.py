"""The network that a configuration describes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from connectomics.config import RunConfig
from connectomics.config.schema import TrainingConfig
from connectomics.data.dataset.build import inputs_of
from connectomics.errors import ConfigError, InputError, nearest
from connectomics.models.fusion import channels_for, with_inputs
from connectomics.models.memory_format import set_channels_last
from connectomics.models.registry import (
    build_model,
    check_patch_size,
    dropout_options,
    fixed_patch_size,
    required_multiple,
)
from connectomics.models.stages import stages_for


def build_network(config: RunConfig, channels: int) -> nn.Module:
    """Return the network with ``channels`` output channels; raise `InputError` or `UnknownNameError`."""
    inputs = inputs_of(config)
    network = build_model(
        config.model.architecture,
        channels_for(config.model.fusion, config.model.in_channels, len(inputs)),
        channels,
        patch_size=config.data.patch_size,
        deep_supervision=config.model.deep_supervision,
        options=model_options(config),
    )
    ratios = [np.divide(size, config.dataset.voxel_size).tolist() for size, _ in inputs]
    return with_inputs(network, config.model.fusion, ratios)


def prepare_training(network: nn.Module, training: TrainingConfig) -> None:
    """Set the memory format, and compile the forward pass, as a run asks for; names of weights do not change."""
    if training.channels_last:
        set_channels_last(network)
    if training.compile:
        network.compile()


def model_options(config: RunConfig) -> dict[str, Any]:
    """Return the options of `build_model` in a configuration; raise `ConfigError` or `InputError`."""
    options = dict(config.model.options)
    if config.model.architecture == "mednext":
        options = {
            "mednext_size": config.model.mednext_size,
            "mednext_kernel_size": config.model.mednext_kernel_size,
            **options,
        }
    if options.get("strides") == "auto":
        options = {**options, **_stages(config)}
    if config.model.dropout is not None:
        options = {**dropout_options(config.model.architecture, config.model.dropout), **options}
    return options


def _stages(config: RunConfig) -> dict[str, Any]:
    """Return strides and kernels for the voxel size and the patch, for ``model.options.strides=auto``."""
    architecture = config.model.architecture
    if architecture not in ("dynunet", "residual_unet"):
        raise ConfigError(
            f"model.options.strides=auto is for dynunet and residual_unet, got {architecture}; give a list"
        )
    strides, kernels = stages_for(config.dataset.voxel_size, config.data.patch_size)
    found: dict[str, Any] = {"strides": strides, "kernel_size": kernels}
    if architecture == "dynunet":
        found["upsample_kernel_size"] = strides[1:]
    return found


def inference_window(config: RunConfig) -> list[int]:
    """Return the window in voxels, z y x: `inference.window`, or the patch if that is null; raise `InputError`."""
    window = list(config.window)
    architecture = config.model.architecture
    try:
        check_patch_size(architecture, window, model_options(config))
    except InputError as error:
        raise InputError(f"inference.window: {error}") from error
    if config.data.inputs and config.model.fusion == "channels":
        for number, given in enumerate(config.data.inputs):
            if not window == list(config.data.patch_size) == list(given.patch_size):
                raise InputError(
                    f"model.fusion=channels stacks inputs voxel by voxel: data.patch_size {config.data.patch_size}, "
                    f"inference.window {window} and data.inputs[{number}].patch_size {given.patch_size} must be equal; "
                    "or set model.fusion=encoder"
                )
    wide, patch = (np.multiply(shape, config.dataset.voxel_size) for shape in (window, config.data.patch_size))
    for number, given in enumerate(config.data.inputs):
        seen = np.multiply(given.patch_size, given.voxel_size)
        if np.any(wide > np.maximum(seen, patch) * 1.001):
            raise InputError(
                f"inference.window {window} reaches beyond data.inputs[{number}], which covers {seen.tolist()} nm; set "
                "inference.window=null, or one that the input covers"
            )
    if fixed_patch_size(architecture) and window != list(config.data.patch_size):
        raise InputError(
            f"model {architecture!r} takes windows of its patch size only: data.patch_size is "
            f"{config.data.patch_size}, inference.window {window}; set inference.window=null"
        )
    return window


def freeze(network: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Exclude the parameters from training whose names match a pattern of ``model.freeze`` (``*``, ``?``, ``[...]``).

    Returns:
        Names of the norms with running statistics that must stay in evaluation mode: those whose scale (NAME.weight)
        matches, also if they have none.

    Raises:
        ConfigError: a pattern matches no parameter, or all match one.
    """
    frozen = matching(patterns, [name for name, _ in network.named_parameters()], "model.freeze")
    for name, parameter in network.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise ConfigError(f"model.freeze={list(patterns)} leaves no parameter to train; remove a pattern")
    return [
        name
        for name in norms_with_statistics(network)
        if any(fnmatchcase(f"{name}.weight", pattern) for pattern in patterns)
    ]


def matching(patterns: Sequence[str], names: Collection[str], key: str) -> set[str]:
    """Return the names of parameters that match a pattern; raise `ConfigError` if one of ``key`` matches none."""
    found = set[str]()
    for pattern in patterns:
        matches = {name for name in names if fnmatchcase(name, pattern)}
        if not matches:
            near = nearest(pattern, list(names)) or next(iter(names))
            raise ConfigError(
                f"{key}: {pattern!r} matches none of {len(names)} parameters of the network, which are called "
                f"{near}, for example; patterns compare whole names, so use {near.split('.')[0]}.* for all of a part"
            )
        found |= matches
    return found


def norms_with_statistics(network: nn.Module) -> list[str]:
    """Return the names of the norms that have running statistics."""
    return [name for name, module in network.named_modules() if hasattr(module, "running_mean")]


def output_axes(config: RunConfig, network: nn.Module, channels: int) -> dict[str, tuple[int, ...]]:
    """Return for each tensor of a run's network, which has ``channels`` output channels, the axes that grow with their
    number, found by comparison with the same network with one more channel; none for parts of adapters."""
    with torch.random.fork_rng(devices=[]):
        larger = build_network(config, channels + 1).state_dict()
    return {
        name: tuple(
            axis
            for axis, (n, more) in enumerate(zip(value.shape, larger.get(name, value).shape, strict=True))
            if n != more
        )
        for name, value in network.state_dict().items()
    }


def stages_from_output(config: RunConfig, network: nn.Module, channels: int) -> dict[nn.Parameter, int]:
    """Return how many stages each parameter of a run's network is away from its output.

    Parameters of the output channels are in stage 0. Going backward through the network, each change of the resolution
    of its convolutions starts a new stage, from 1 on. The blocks of a transformer have one resolution, so they are one
    stage.
    """
    at = 0  # stages so far
    shape: Sequence[int] = ()
    found: dict[nn.Parameter, int] = {}

    def note(module: nn.Module, given: Any, result: Any) -> None:
        nonlocal at, shape
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim > 2 and max(result.shape[2:]) > 1:  # not on a pooled image
            at += result.shape[2:] != shape
            shape = result.shape[2:]
        parts = getattr(module, "parametrizations", None)  # adapters, which were called before their layer is done
        found.update(dict.fromkeys([*module.parameters(recurse=False), *(parts.parameters() if parts else ())], at))

    hooks = [module.register_forward_hook(note) for module in network.modules()]
    device = next(network.parameters()).device
    modes = {module: module.training for module in network.modules()}
    try:
        with torch.no_grad():
            network.eval().forward(*(image.to(device) for image in probe_images(config)))  # not a compiled one
    finally:
        for module, mode in modes.items():  # norms that are frozen have their own
            module.training = mode
        for hook in hooks:
            hook.remove()
    axes = output_axes(config, network, channels)
    away = {p: 0 if axes[name] else at + 1 - found.get(p, 1) for name, p in network.named_parameters()}
    used = sorted(set(away.values()))  # without those of which all parameters belong to the output
    return {parameter: used.index(stage) for parameter, stage in away.items()}


def probe_images(config: RunConfig) -> list[Tensor]:
    """Return random inputs of a run's network (1, 1, D, H, W), as small as it takes."""
    size, inputs = list(config.data.patch_size), inputs_of(config)
    if not inputs and not fixed_patch_size(config.model.architecture):
        multiple = required_multiple(config.model.architecture, model_options(config))
        size = [min(n, 2 * m) for n, m in zip(size, multiple, strict=True)]
    generator = torch.Generator().manual_seed(0)
    shapes = [size, *(list(shape) for _, shape in inputs)]
    return [torch.rand((1, 1, *shape), generator=generator) for shape in shapes]
