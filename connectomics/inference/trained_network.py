"""A trained network for prediction: its configuration, its weights and its probabilities, without the training loop."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from connectomics.cellmap.classes import atoms_of
from connectomics.config import RunConfig
from connectomics.config.heads import channel_groups, heads_of
from connectomics.errors import unknown_name
from connectomics.io.normalization import Normalization


class TrainedNetwork(nn.Module):
    """A network with its weights and the configuration that it was trained with.

    Attributes:
        config: the configuration. classes: class names of the first channels, in order.
        heads: further heads of the network (``model.heads``).
        channel_groups: output channels of the classes, then of each head.
        network: the torch module; takes (B, 1, D, H, W) float32 and one more such tensor per further input, and returns
            logits (B, C, D, H, W).
    """

    def __init__(self, config: RunConfig, network: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.classes = tuple(config.dataset.classes)
        self.heads = heads_of(config)
        self.channel_groups = channel_groups(config)
        self.network = network

    def forward(self, image: Tensor, *inputs: Tensor) -> Tensor:
        """Return logits (B, C, D, H, W) of an image (B, 1, D, H, W); in training with deep supervision a list of them.

        The channels are the classes, then those of all heads. ``inputs``: one (B, 1, d, h, w) for each of
        ``data.inputs``."""
        logits: Tensor = self.network(image, *inputs)
        return logits

    def all_probabilities(self, image: Tensor, *inputs: Tensor) -> Tensor:
        """Return probabilities (B, C, D, H, W) float32, each channel by itself; for a network in evaluation mode."""
        return torch.sigmoid(self.network(image, *inputs).float())

    def probabilities(self, image: Tensor, *inputs: Tensor) -> Tensor:
        """Return `all_probabilities` without heads that are not written: the channels of
        `connectomics.config.heads.channel_names`."""
        logits = self(image, *inputs)
        if not all(head.write for head in self.heads):
            classes, *heads = logits.split(self.channel_groups, dim=1)
            written = [part for head, part in zip(self.heads, heads, strict=True) if head.write]
            logits = torch.cat([classes, *written], dim=1)
        return torch.sigmoid(logits.float())

    def normalization(self, dataset: str) -> Normalization:
        """Return how raw of a data set becomes the network's input, as in training; `UnknownNameError` for others."""
        known = self.config.data.normalization
        entry = known.get(dataset, known.get("*"))  # "*" stands for every data set
        if entry is None:
            raise unknown_name("data set", dataset, known, "the model's normalization")
        return Normalization.from_dict(entry, f"data.normalization of {dataset}")


def with_unions(run: Callable[..., Tensor], channels: Sequence[str], unions: Sequence[str]) -> Callable[..., Tensor]:
    """Return ``run`` with one more channel for each group class of ``unions``, after its own ``channels``.

    Atomic classes exclude each other, so the probability of their union is the sum of their probabilities (Kolmogorov's
    third axiom), here at most 1 because a network does not know that they exclude each other. The maximum, and
    1 - prod(1 - p) for independent classes, are too low where parts meet: at the border of membrane and lumen both are
    0.5, and the sum is 1.

    Args:
        run: returns probabilities (B, C, D, H, W) of ``channels``.
    """
    if not unions:
        return run
    parts = [[channels.index(atom) for atom in atoms_of(name)] for name in unions]

    def with_groups(*inputs: Tensor) -> Tensor:
        found = run(*inputs)
        return torch.cat([found, *(found[:, part].sum(1, keepdim=True).clamp(max=1) for part in parts)], dim=1)

    return with_groups


def weights_hash(network: nn.Module) -> str:
    """Return 16 hexadecimal digits of the SHA-256 over names, shapes and bytes of all weights and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        if isinstance(value, Tensor):
            flat = value.detach().cpu().contiguous().reshape(-1)
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()[:16]


def common_hash(hashes: Sequence[str]) -> str:
    """Return the hash of one network, or a hash of several that does not depend on their order."""
    if len(hashes) == 1:
        return hashes[0]
    return hashlib.sha256(" ".join(sorted(hashes)).encode()).hexdigest()[:16]
