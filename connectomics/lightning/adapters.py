"""Adapters of low rank (LoRA, arXiv:2106.09685): trained weights stay as they are, and small updates of them train."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from functools import reduce
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from connectomics.config.few_labels import AdaptersConfig
from connectomics.errors import ConfigError
from connectomics.lightning.network import matching, norms_with_statistics, output_axes

if TYPE_CHECKING:
    from connectomics.lightning.module import ConnectomicsModule

log = logging.getLogger(__name__)

_LAYERS = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
_PLACE = ".parametrizations.weight."  # in names of tensors, between a layer and the parts of its weight


class LowRank(nn.Module):
    """Computes a weight (n, ...) as ``weight + scale * up @ down``, with up (n, rank) and down (rank, the other axes).

    For a convolution with kernels of k voxels, the update is a convolution with such kernels to ``rank`` channels, and
    one with kernels of one voxel after it (of a transposed one, before it). ``up`` starts at zero, so the update does.
    """

    def __init__(self, weight: Tensor, rank: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.up = nn.Parameter(weight.new_zeros(len(weight), rank))
        self.down = nn.Parameter(weight.new_empty(rank, weight[0].numel()))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))  # as a layer of torch

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight with its update, in the precision of the weight."""
        with torch.autocast(weight.device.type, enabled=False):
            return weight + self.scale * (self.up @ self.down).view_as(weight)


def add_adapters(module: ConnectomicsModule) -> list[str]:
    """Freeze the network of a run, and give its layers trainable updates by ``model.adapters``; its output is the same.

    Layers are linear ones and convolutions whose weight matches ``layers``, unless ``model.freeze`` names it, or the
    update would have no fewer numbers than the weight. Parameters of the output channels, which may be new, and those
    that match ``train`` train in full. Norms that do not train keep their statistics.

    Returns:
        Names of the weights that have an update.

    Raises:
        ConfigError: a pattern matches nothing, or no layer can have an update of this rank.
    """
    options, network = module.config.model.adapters, module.network
    parameters = dict(network.named_parameters())
    axes = output_axes(module.config, network, sum(module.channel_groups))
    full = {name for name in parameters if axes[name]} | matching(options.train, parameters, "model.adapters.train")
    trains = {name for name, parameter in parameters.items() if parameter.requires_grad}
    layers = {
        f"{name}.weight": layer
        for name, layer in network.named_modules()
        if isinstance(layer, _LAYERS) and not parametrize.is_parametrized(layer)
    }
    if not layers:
        name = module.config.model.architecture
        raise ConfigError(f"model.adapters: {name} has no linear layer and no convolution; set model.adapters.rank=0")
    chosen = (matching(options.layers, layers, "model.adapters.layers") & trains) - full
    adapted = [name for name in layers if name in chosen and options.rank < _full_rank(layers[name].weight)]
    if not adapted:
        raise ConfigError(_nothing(options, {name: layers[name] for name in chosen}))
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in trains & full)
    module.frozen_norms = [n for n in norms_with_statistics(network) if f"{n}.weight" not in trains & full]
    for name in adapted:
        parametrize.register_parametrization(
            layers[name], "weight", LowRank(layers[name].weight, options.rank, options.scale)
        )
    module.train(module.training)
    number = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    log.info(
        "adapters of rank %d for %d of %d layers: %d numbers train, the network has %d",
        options.rank, len(adapted), len(layers), number, sum(p.numel() for p in parameters.values()),
    )  # fmt: skip
    return adapted


def merged(weights: Mapping[str, Tensor], options: AdaptersConfig) -> dict[str, Tensor]:
    """Return the weights of a plain network for those of one with adapters; others stay as they are.

    Bits are those of float32 operations in a fixed order: a product of matrices would depend on the processor, and
    tasks on several machines know a network by its bits.
    """
    found = dict(weights)
    for name in weights:
        layer, place, part = name.rpartition(_PLACE)
        if place and part == "0.up":
            base, up, down = (found.pop(f"{layer}{_PLACE}{which}") for which in ("original", "0.up", "0.down"))
            change = reduce(torch.add, (up[:, r, None] * down[r] for r in range(len(down))))
            found[f"{layer}.weight"] = base + options.scale * change.view_as(base)
    return found


def _full_rank(weight: Tensor) -> float:
    """The rank at which an update has as many numbers as a weight."""
    return weight.numel() / (len(weight) + weight[0].numel())


def _nothing(options: AdaptersConfig, layers: Mapping[str, nn.Module]) -> str:
    """Why no layer has an update."""
    if not layers:
        return (
            f"model.adapters.layers={options.layers} names only layers that are frozen, train in full, or are of the "
            "output; name others"
        )
    largest = max(layers, key=lambda name: _full_rank(layers[name].weight))  # type: ignore[arg-type]
    most = math.ceil(_full_rank(layers[largest].weight)) - 1  # type: ignore[arg-type]
    return (
        f"model.adapters.rank={options.rank} is too large for the layers of model.adapters.layers={options.layers}: "
        f"updates would have no fewer numbers than the weights; {largest} can have rank {most}"
    )
