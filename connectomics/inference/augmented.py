"""Several looks at a window, averaged: symmetries of the cube, members of an ensemble, dropout samples; uncertainty.

`Averaged` stands in for a network. Each window goes through every member, in every symmetry, and with dropout as many
times as is asked, one pass after the other; each result is turned back and taken into a running mean and, where wanted,
a running variance (Welford, Technometrics 4, 1962). So memory is that of one pass and of two to four results, whatever
the number of passes.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from connectomics.errors import InputError
from connectomics.inference.symmetry import IDENTITY, Symmetry, require_unchanged
from connectomics.inference.turns import Turns

if TYPE_CHECKING:
    import torch

Network = Callable[..., "torch.Tensor"]

# the largest value of each kind of uncertainty: what 255 stands for on disk
LARGEST = {"variance": 0.25, "entropy": 1.0, "dropout": 0.25}
UNCERTAINTIES = ("none", *LARGEST)


class Averaged:
    """A network that gives the mean over members, symmetries and dropout samples, and the variance where wanted.

    Called with (B, 1, d, h, w) and further views, as the networks are, it gives (B, C, d, h, w) float32, or with
    ``variance`` (B, 2C, d, h, w): the means, then the variances over all passes (divided by their number).

    With ``samples`` each window goes through alone, and what is dropped follows from the window's content and the
    number of the pass only: not from the batch, nor from what was done before. The global random state stays as it is.

    Channels that mean a direction (``about``: affinities, descriptors) are put where they belong in each symmetry, see
    `connectomics.inference.turns`. Where a pass says nothing of a voxel, beside a face of the window, the others count.
    """

    def __init__(
        self,
        networks: Sequence[Network],
        chosen: Sequence[Symmetry] = (IDENTITY,),
        *,
        samples: int = 0,
        variance: bool = False,
        about: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Average ``networks``, each in all ``chosen`` symmetries and, with dropout layers on (`dropout_on`),
        ``samples`` times (0: they are off). ``about``: what each channel is (`Turns.of`); nothing where none means a
        direction. Raises `InputError` where there is nothing to average, or to compare, or where a channel's offset
        is not among the network's in one of the symmetries."""
        self.networks = tuple(networks)
        self.symmetries = tuple(chosen)
        self.samples = samples
        self.variance = variance
        if not self.networks or not self.symmetries or samples < 0:
            raise InputError("an average needs at least one network and one symmetry, and samples >= 0")
        if variance and self.passes < 2:
            raise InputError(
                "the variance over one pass is zero: give several checkpoints or inference.tta=flips, or take "
                "inference.uncertainty=entropy or dropout"
            )
        self._turns = turns_of(self.symmetries, about)

    @property
    def passes(self) -> int:
        """Forward passes for each window."""
        return len(self.networks) * len(self.symmetries) * max(1, self.samples)

    def __call__(self, image: torch.Tensor, *views: torch.Tensor) -> torch.Tensor:
        import torch

        for values, what in ((image, "a window of"), *((view, "a further input of") for view in views)):
            require_unchanged(self.symmetries, tuple(values.shape[2:]), f"{what} voxels")
        with torch.no_grad():
            if not self.samples:
                return self._average(image, views, None)
            parts = zip(image.split(1), *(view.split(1) for view in views), strict=True)
            return torch.cat([self._average(window, rest, _content(window)) for window, *rest in parts])

    def _average(self, image: torch.Tensor, views: Sequence[torch.Tensor], content: int | None) -> torch.Tensor:
        import torch

        if any(turns.partial for turns in self._turns.values()):
            return self._average_of_what_is_seen(image, views, content)
        mean = spread = None
        for number, (_, out) in enumerate(self._outputs(image, views, content)):
            if mean is None:
                # a network may give back its very input, which must stay as it is for the other passes
                mean = out.float() if self.passes == 1 else out.to(torch.float32, copy=True)
                spread = torch.zeros_like(mean) if self.variance else None
                continue
            difference = out.float() - mean
            mean.add_(difference, alpha=1 / (number + 1))
            if spread is not None:
                spread.addcmul_(difference, out.float() - mean)
        assert mean is not None  # there is at least one pass
        return mean if spread is None else torch.cat([mean, spread.div_(self.passes)], 1)

    def _average_of_what_is_seen(
        self, image: torch.Tensor, views: Sequence[torch.Tensor], content: int | None
    ) -> torch.Tensor:
        """As `_average`, each voxel of each channel over the passes that say something of it."""
        import torch

        mean = spread = count = None
        for symmetry, out in self._outputs(image, views, content):
            if mean is None or count is None:
                mean = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
                spread = torch.zeros_like(mean) if self.variance else None
                count = torch.zeros_like(mean[0])
            seen = self._turns[symmetry].seen(out)
            count += seen
            difference = (out.float() - mean) * seen
            mean.add_(difference / count.clamp(min=1))
            if spread is not None:
                spread.addcmul_(difference, out.float() - mean)  # zero where it is not seen
        assert mean is not None  # there is at least one pass
        assert count is not None
        return mean if spread is None else torch.cat([mean, spread.div_(count)], 1)

    def _outputs(
        self, image: torch.Tensor, views: Sequence[torch.Tensor], content: int | None
    ) -> Iterator[tuple[Symmetry, torch.Tensor]]:
        """What each pass gives, turned back, with its symmetry."""
        for symmetry in self.symmetries:
            turned = [symmetry.apply(values) for values in (image, *views)]
            for member, network in enumerate(self.networks):
                if content is None:
                    yield symmetry, self._back(symmetry, network(*turned))
                    continue
                for sample in range(self.samples):
                    with _seeded(image.device, f"{content} {member} {symmetry} {sample}"):
                        out = network(*turned)
                    yield symmetry, self._back(symmetry, out)

    def _back(self, symmetry: Symmetry, out: torch.Tensor) -> torch.Tensor:
        """The output of a turned window, turned back, with its channels in their places."""
        out = symmetry.inverse.apply(out)
        return self._turns[symmetry].apply(out) if self._turns else out


def turns_of(chosen: Sequence[Symmetry], about: Sequence[Mapping[str, Any]]) -> dict[Symmetry, Turns]:
    """For each symmetry where the channels are; nothing where no channel means a direction. Raises `InputError` as
    `Turns.of`, and where a channel would have voxels that no symmetry says anything of."""
    if not any(about):
        return {}
    turns = {symmetry: Turns.of(symmetry, about) for symmetry in chosen}
    for number, what in enumerate(about):
        if all(any(found.channels[number].shift) for found in turns.values()):
            raise InputError(
                f"inference.tta: none of {', '.join(map(str, chosen))} gives the affinity of {what['class_name']} at "
                f"offset {list(what['offset'])} up to the faces of a window; add zyx, the window as it is"
            )
    return turns


def _content(window: torch.Tensor) -> int:
    """A number that stands for the values of a window."""
    return zlib.crc32(window.detach().contiguous().cpu().numpy().data)


@contextmanager
def _seeded(device: torch.device, text: str) -> Iterator[None]:
    """Random numbers of the CPU and of ``device`` that follow from ``text``; what they were before comes back."""
    import torch

    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_gpu else []):
        torch.default_generator.manual_seed(seed)
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


@contextmanager
def dropout_on(module: torch.nn.Module) -> Iterator[None]:
    """The dropout layers of a network in evaluation mode drop, as in training; all else (batch norm) stays as it is.

    Raises `InputError` where the network has none, or only such that drop nothing.
    """
    from torch.nn.modules.dropout import _DropoutNd

    layers = [layer for layer in module.modules() if isinstance(layer, _DropoutNd) and layer.p > 0]
    if not layers:
        raise InputError(
            "inference.uncertainty=dropout needs a network that was trained with dropout, and this one has no such "
            "layers; train with dropout (unet: model.options.dropout=0.1), or take another kind of uncertainty"
        )
    before = [layer.training for layer in layers]
    for layer in layers:
        layer.train()
    try:
        yield
    finally:
        for layer, training in zip(layers, before, strict=True):
            layer.train(training)


def entropy(probability: NDArray[np.float32]) -> NDArray[np.float32]:
    """Entropy in bits, 0 to 1, of a class being there with a probability: -p log2 p - (1 - p) log2(1 - p)."""
    result = np.zeros_like(probability)
    for p in (probability, 1 - probability):
        p = np.clip(p, np.float32(1e-12), 1)
        result -= p * np.log2(p)
    return np.clip(result, 0, 1, out=result)
