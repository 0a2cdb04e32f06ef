"""The network that a configuration describes."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from connectomics.config import RunConfig
from connectomics.config.schema import TrainingConfig
from connectomics.data.dataset.build import inputs_of
from connectomics.errors import ConfigError, InputError
from connectomics.models.fusion import channels_for, with_inputs
from connectomics.models.memory_format import set_channels_last
from connectomics.models.registry import build_model, check_patch_size, dropout_options, fixed_patch_size
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
    window = list(config.inference.window or config.data.patch_size)
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
    if fixed_patch_size(architecture) and window != list(config.data.patch_size):
        raise InputError(
            f"model {architecture!r} takes windows of its patch size only: data.patch_size is "
            f"{config.data.patch_size}, inference.window {window}; set inference.window=null"
        )
    return window
