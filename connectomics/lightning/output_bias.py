"""Start the output channels of a network at the share of voxels where they are present (``model.init_bias``)."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from connectomics.errors import ConfigError
from connectomics.lightning.fine_tuning import output_names
from connectomics.lightning.module import ConnectomicsModule
from connectomics.lightning.network import output_axes, probe_images
from connectomics.models.batch_labels import labels_of
from connectomics.models.heads import ids_of
from connectomics.models.targets import head_labels

log = logging.getLogger(__name__)

_LEAST = 0.01  # smallest share; also the prior of the focal loss's authors (Lin et al. 2017, section 4.1)
_TOLERANCE = 1e-3
_SHARES = ("affinities", "boundary")  # kinds of heads whose targets are present or absent


def begin_at_prevalence(
    module: ConnectomicsModule, batches: Iterable[Mapping[str, Tensor]], keep: Iterable[str] = ()
) -> dict[str, float]:
    """Set the biases of the output by ``model.init_bias`` and return them by `output_names`.

    A number is the bias of every class. ``prevalence`` is log(p / (1 - p)) with the share p of known voxels of
    ``batches`` (training patches as the sampler draws them) where the class is present, from 0.01 to 0.99; also of each
    channel of affinities and boundaries. Without it, a network whose classes are rare spends its first steps on
    learning that they are absent almost everywhere, or never leaves that answer.

    Channels named in ``keep``, those of classes that are nowhere known, and regressions keep their biases.

    Raises:
        ConfigError: the network has no bias at its output.
    """
    given, names = module.config.model.init_bias, output_names(module.config)
    if given is None:
        return {}
    kept = set(keep)
    if given == "prevalence":
        shares = channel_shares(module, batches)
        logits = torch.logit(torch.tensor(shares, dtype=torch.float64), eps=_LEAST).tolist()
        values = {name: bias for name, bias in zip(names, logits, strict=True) if not math.isnan(bias)}
    else:
        values = dict.fromkeys(names[: len(module.classes)], float(given))
    values = {name: value for name, value in values.items() if name not in kept}
    numbers = [names.index(name) for name in values]
    for bias in output_biases(module):
        with torch.no_grad():
            bias[numbers] = torch.tensor(list(values.values()), dtype=bias.dtype, device=bias.device)
    said = ", ".join(f"{name.split(' ')[0]} {value:.2f}" for name, value in values.items())
    log.info("output biases (model.init_bias=%s): %s", given, said or "all kept")
    return values


def channel_shares(module: ConnectomicsModule, batches: Iterable[Mapping[str, Tensor]]) -> list[float]:
    """Return the share of known voxels of batches where each output channel is present; NaN for a regression and if
    nothing is known."""
    counts = torch.zeros(2, len(output_names(module.config)), dtype=torch.int64)
    for batch in batches:
        tallies = [labels_of(batch).tally()[1:]]
        for head in module.heads:
            if head.kind in _SHARES:
                ids = ids_of(batch)[:, module.head_losses.classes.index(head.class_name)]
                tallies.append(head_labels(head, ids).tally()[1:])
            else:
                tallies.append(torch.zeros(2, head.channels, dtype=torch.int64))
        counts += torch.cat(tallies, dim=1)
    return [present / known if known else math.nan for present, known in counts.T.tolist()]


def output_biases(module: ConnectomicsModule) -> list[nn.Parameter]:
    """Return the biases that shift the logits of each channel by a constant, one for each size of the output.

    They are found by trying: among the vectors that have one number for each channel, those that shift an output of
    the network by just what is added to them.
    """
    axes = output_axes(module.config, module.network, sum(module.channel_groups))
    own = dict(module.network.named_parameters())
    candidates = [name for name in own if name.endswith(".bias") and own[name].ndim == 1 and axes.get(name) == (0,)]
    probe = copy.deepcopy(module.network).cpu().train()
    parameters = dict(probe.named_parameters())
    images = probe_images(module.config)
    before = _outputs(probe, images)
    found: list[nn.Parameter] = []
    open_sizes = set(range(len(before)))
    while open_sizes and candidates:
        parameter = parameters[name := candidates.pop()]
        shift = torch.linspace(0.5, 1.0, len(parameter))
        with torch.no_grad():
            parameter.add_(shift)
            after = _outputs(probe, images)
            parameter.sub_(shift)
        added = shift[None, :, None, None, None]
        shifted = {n for n in open_sizes if float((after[n] - before[n] - added).abs().max()) < _TOLERANCE}
        if shifted:
            open_sizes -= shifted
            found.append(own[name])
    if 0 in open_sizes:
        raise ConfigError(
            f"model.init_bias needs a bias at the output, which model.architecture={module.config.model.architecture} "
            "does not have; set model.init_bias=null"
        )
    return found


def _outputs(network: nn.Module, images: list[Tensor]) -> list[Tensor]:
    """Return the logits of all sizes, the same for the same weights: dropout draws the same numbers."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        logits = network(*images)
    return [logits] if isinstance(logits, Tensor) else list(logits)
