"""Start a run with the weights of another run, whose classes may differ."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn

from connectomics.config import RunConfig
from connectomics.config.heads import heads_of
from connectomics.data.patches import centered, input_names
from connectomics.errors import InputError
from connectomics.lightning.adapters import merged
from connectomics.lightning.checkpoints import checkpoint_config, describe, name_voxel_sizes, read_checkpoint
from connectomics.lightning.foreign_weights import foreign_weights
from connectomics.lightning.module import ConnectomicsModule
from connectomics.lightning.network import output_axes
from connectomics.lightning.run_state import weights_file

log = logging.getLogger(__name__)

_PREFIX = "network."


def begin_with(path: str | Path, module: ConnectomicsModule) -> int:
    """Copy the network's weights of a run folder, checkpoint or package into ``module`` if they fit by name and shape.

    With another ``model.weights_format``, of a file that another program wrote, see `foreign_weights`; its output
    channels are not copied.

    For fine-tuning on other data or classes: optimizer, epoch and random state are new. An output channel is copied
    from the channel with the same meaning, the class of the same name or the same head, at any position; the other
    output channels keep their initial weights. The log lists the matches.

    Returns:
        Number of the network's tensors that were copied, at least in part.

    Raises:
        MissingError, CorruptDataError, InputError, ConfigError: see `read_checkpoint`; also `InputError` if less than a
            quarter of the network's weights match: the checkpoint holds another network.
    """
    foreign, unused = module.config.model.weights_format, list[str]()
    wanted, found = output_names(module.config), list[str]()
    if foreign == "connectomics":
        file = weights_file(path)
        content = read_checkpoint(file)
        trained = checkpoint_config(content, file)
        name_voxel_sizes(file, trained, module.config)
        found, what = output_names(trained), describe(trained)
        weights_of = merged(content["state_dict"], trained.model.adapters)
        stored = {name.removeprefix(_PREFIX): value for name, value in weights_of.items()}
    else:
        file, what = Path(path), f"network of another program ({foreign})"
        stored, unused = foreign_weights(file, foreign)
        unused += sorted(stored.keys() - module.network.state_dict().keys())
    pairs = [(found.index(name), number) for number, name in enumerate(wanted) if name in found]
    own = module.network.state_dict()
    axes = output_axes(module.config, module.network, len(wanted))
    taken: dict[str, Tensor] = {}
    copied = 0
    for name in own.keys() & stored.keys():
        if mapped := _mapped(own[name], stored[name], axes[name], len(found), pairs):
            taken[name], count = mapped
            copied += count
    weights = sum(value.numel() for value in own.values())
    if 4 * copied < weights:
        raise InputError(
            f"model.weights={path} holds a {what}, the configuration a {describe(module.config)}: only "
            f"{copied} of {weights} weights fit; use the same `model` settings"
        )
    module.network.load_state_dict(taken, strict=False)
    module.begun_outputs = found
    new = sorted(own.keys() - taken.keys())
    adapters = module.config.model.adapters  # they freeze all but the output and what `train` names
    for name, parameter in module.network.named_parameters() if adapters.rank else ():
        trains = axes[name] or any(fnmatchcase(name, pattern) for pattern in adapters.train)
        if name in new and parameter.requires_grad and not trains:
            wrong = f"{file} has no {name} that fits, and model.adapters would keep its random values"
            raise InputError(f"{wrong}; add it to model.adapters.train")
    parts = [f"{len(taken)} of {len(own)} tensors copied, new tensors: {', '.join(new[:6]) or 'none'}"]
    for what, names in (
        ("from the checkpoint", [name for name in wanted if name in found]),
        ("new", [name for name in wanted if name not in found]),
        ("unused channels of the checkpoint", [name for name in found if name not in wanted]),
        ("unused tensors of the file", unused[:6]),
    ):
        if names:
            parts.append(f"{what}: {', '.join(name.split(' ')[0] for name in names)}")
    log.info("weights of %s: %s", file, "; ".join([parts[0], f"output channels {parts[1]}", *parts[2:]]))
    return len(taken)


def update_batch_norm(module: ConnectomicsModule, batches: Iterable[Mapping[str, Tensor]]) -> None:
    """Measure the statistics of batch normalization, frozen ones included, on training batches; the weights stay."""

    class OfBatch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = module.network

        def forward(self, batch: Mapping[str, Tensor]) -> None:
            self.network(batch["image"], *(batch[name] for name in input_names(len(module.config.data.inputs))))

    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    if not any(isinstance(part, kinds) for part in module.network.modules()):
        log.warning("model.update_batch_norm has no effect: %s has no batch norm", describe(module.config))
    torch.optim.swa_utils.update_bn((centered(batch) for batch in batches), OfBatch())
    module.train(module.training)  # frozen norms stay in evaluation mode


def output_names(config: RunConfig) -> list[str]:
    """Return what each output channel of a network predicts: the classes, then the channels of all heads."""
    heads = (f"{name} {head.predicts}" for head in heads_of(config) for name in head.channel_names)
    return [*config.dataset.classes, *heads]


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
