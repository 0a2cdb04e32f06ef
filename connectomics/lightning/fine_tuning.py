"""Start a run with the weights of another run, whose classes may differ."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from connectomics.config import RunConfig
from connectomics.config.heads import heads_of
from connectomics.errors import InputError
from connectomics.lightning.checkpoints import checkpoint_config, describe, read_checkpoint
from connectomics.lightning.module import ConnectomicsModule
from connectomics.lightning.network import build_network

log = logging.getLogger(__name__)

_PREFIX = "network."


def begin_with(path: str | Path, module: ConnectomicsModule) -> int:
    """Copy the network's weights of a checkpoint or a package into ``module`` if they fit by name and shape.

    For fine-tuning on other data or classes: optimizer, epoch and random state are new. An output channel is copied
    from the channel with the same meaning, the class of the same name or the same head, at any position; the other
    output channels keep their initial weights. The log lists the matches.

    Returns:
        Number of the network's tensors that were copied, at least in part.

    Raises:
        MissingError, CorruptDataError, InputError, ConfigError: see `read_checkpoint`; also `InputError` if less than a
            quarter of the network's weights match: the checkpoint holds another network.
    """
    content = read_checkpoint(path)
    trained = checkpoint_config(content, path)
    found, wanted = output_names(trained), output_names(module.config)
    pairs = [(found.index(name), number) for number, name in enumerate(wanted) if name in found]
    own = {name: value for name, value in module.state_dict().items() if name.startswith(_PREFIX)}
    axes = output_axes(module, len(wanted))
    taken: dict[str, Tensor] = {}
    copied = 0
    for name in own.keys() & content["state_dict"].keys():
        if mapped := _mapped(own[name], content["state_dict"][name], axes[name], len(found), pairs):
            taken[name], count = mapped
            copied += count
    weights = sum(value.numel() for value in own.values())
    if 4 * copied < weights:
        raise InputError(
            f"model.weights={path} holds a {describe(trained)}, the configuration a {describe(module.config)}: only "
            f"{copied} of {weights} weights fit; use the same `model` settings"
        )
    module.load_state_dict(taken, strict=False)
    new = sorted(own.keys() - taken.keys())
    log.info("weights of %s: %d tensors copied, new: %s", path, len(taken), ", ".join(new[:6]) or "none")
    parts = []
    for what, names in (
        ("from the checkpoint", [name for name in wanted if name in found]),
        ("new", [name for name in wanted if name not in found]),
        ("unused channels of the checkpoint", [name for name in found if name not in wanted]),
    ):
        if names:
            parts.append(f"{what}: {', '.join(name.split(' ')[0] for name in names)}")
    log.info("output channels by name: %s", "; ".join(parts))
    return len(taken)


def output_names(config: RunConfig) -> list[str]:
    """Return what each output channel of a network predicts: the classes, then the channels of all heads."""
    heads = (f"{name} {head.predicts}" for head in heads_of(config) for name in head.channel_names)
    return [*config.dataset.classes, *heads]


def output_axes(module: ConnectomicsModule, channels: int) -> dict[str, tuple[int, ...]]:
    """Return for each tensor of the network the axes that grow with the number of output channels, found by comparison
    with the same network with one more channel."""
    with torch.random.fork_rng(devices=[]):
        larger = build_network(module.config, channels + 1).state_dict()
    return {
        f"{_PREFIX}{name}": tuple(
            axis for axis, (n, more) in enumerate(zip(value.shape, larger[name].shape, strict=True)) if n != more
        )
        for name, value in module.network.state_dict().items()
    }


def _mapped(
    own: Tensor, stored: Tensor, axes: Sequence[int], channels: int, pairs: Sequence[tuple[int, int]]
) -> tuple[Tensor, int] | None:
    """Return ``own`` with the values of ``stored`` that fit, and how many those are; None if nothing fits.

    ``axes`` run over output channels, of which ``stored`` has ``channels``; ``pairs`` are (number in ``stored``, number
    in ``own``).
    """
    fits = stored.ndim == own.ndim and all(
        m == (channels if axis in axes else n) for axis, (n, m) in enumerate(zip(own.shape, stored.shape, strict=True))
    )
    if not fits or (axes and not pairs):
        return None
    part, places = stored, [torch.arange(n) for n in own.shape]
    for axis in axes:
        part = part.index_select(axis, torch.tensor([there for there, _ in pairs]))
        places[axis] = torch.tensor([here for _, here in pairs])
    if not axes:
        return stored, stored.numel()
    result = own.clone()
    result[torch.meshgrid(*places, indexing="ij")] = part.to(own)
    return result, part.numel()
