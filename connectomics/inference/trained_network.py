"""A trained network for prediction: its configuration, its weights and its probabilities, without the training loop."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from connectomics.config import RunConfig
from connectomics.config.heads import heads_of
from connectomics.errors import unknown_name
from connectomics.io.normalization import Normalization


class TrainedNetwork(nn.Module):
    """A network with its weights and the configuration that it was trained with.

    Attributes:
        config: the configuration. classes: class names of the first channels, in order.
        heads: further heads of the network (``model.heads``).
        network: the torch module; takes (B, 1, D, H, W) float32 and one more such tensor per further input, and returns
            logits (B, C, D, H, W).
    """

    def __init__(self, config: RunConfig, network: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.classes = tuple(config.dataset.classes)
        self.heads = heads_of(config)
        self.network = network

    def forward(self, image: Tensor, *inputs: Tensor) -> Tensor:
        """Return logits (B, C, D, H, W) of all channels: the classes, then those of all heads."""
        logits: Tensor = self.network(image, *inputs)
        return logits

    def probabilities(self, image: Tensor, *inputs: Tensor) -> Tensor:
        """Return probabilities (B, C, D, H, W), float32, each channel by itself.

        The channels are those of `connectomics.config.heads.channel_names`: heads that are not written are left out.
        """
        logits = self(image, *inputs)
        if not all(head.write for head in self.heads):
            sizes = [self.config.channels, *(head.channels for head in self.heads)]
            classes, *heads = logits.split(sizes, dim=1)
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
