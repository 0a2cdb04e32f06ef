"""The average over several passes of a window: symmetries of the cube, networks of an ensemble, dropout samples.

`Averaged` stands in for a network. Each result is transformed back and taken into a running mean and, if requested, a
running variance (Welford, Technometrics 4, 1962), so memory is that of one pass and two to four results, whatever the
number of passes.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from connectomics.errors import InputError
from connectomics.geometry import Index
from connectomics.inference.symmetry import IDENTITY, Symmetry, channel_maps, require_unchanged

if TYPE_CHECKING:
    import torch

Network = Callable[..., "torch.Tensor"]

# the largest value of each kind of uncertainty: what 255 stands for on disk
LARGEST = {"variance": 0.25, "entropy": 1.0, "dropout": 0.25}
UNCERTAINTIES = ("none", *LARGEST)


class Averaged:
    """A network that gives the mean over networks, symmetries and dropout samples, and optionally the variance.

    Called like a network with (B, 1, d, h, w) and further inputs, it gives (B, C, d, h, w) float32, or with
    ``variance`` (B, 2C, d, h, w): the means, then the variances over all passes (divided by their number).

    With ``samples`` each window goes through alone, and the dropped units follow from the window's content and the
    number of the pass only. Voxels that a pass does not cover, at a face of the window, average the others.
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
        """Average ``networks``, each in all ``chosen`` symmetries and, with active dropout layers (`dropout_on`),
        ``samples`` times (0: no dropout).

        ``about`` describes each channel, see `ChannelMap.of`; empty if none means a direction. Raises `InputError` if
        there is nothing to average or to compare, or if a symmetry needs an offset that the network does not have.
        """
        self.networks, self.symmetries = tuple(networks), tuple(chosen)
        self.samples, self.variance = samples, variance
        if not self.networks or not self.symmetries or samples < 0:
            raise InputError("an average needs at least one network and one symmetry, and samples >= 0")
        self._maps = channel_maps(self.symmetries, about)

    @property
    def passes(self) -> int:
        """Forward passes for each window."""
        return len(self.networks) * len(self.symmetries) * max(1, self.samples)

    def __call__(self, image: torch.Tensor, *further: torch.Tensor) -> torch.Tensor:
        import torch

        relative = [Symmetry(self.symmetries[0].before(symmetry.axes)) for symmetry in self.symmetries]
        for values, what in ((image, "a window of"), *((values, "a further input of") for values in further)):
            require_unchanged(relative, tuple(values.shape[2:]), f"{what} voxels")
        average = self._average_of_covered if any(found.partial for found in self._maps.values()) else self._average
        with torch.no_grad():
            if not self.samples:
                return average(self._outputs([image, *further], None))
            windows = zip(*(values.split(1) for values in (image, *further)), strict=True)
            return torch.cat([average(self._outputs(window, _content(window[0]))) for window in windows])

    def _average(self, outputs: Iterator[tuple[Symmetry, torch.Tensor]]) -> torch.Tensor:
        import torch

        _, out = next(outputs)
        # a network may return its very input, which must stay as it is for the other passes
        mean = out.float() if self.passes == 1 else out.to(torch.float32, copy=True)
        spread = torch.zeros_like(mean) if self.variance else None
        for number, (_, out) in enumerate(outputs, start=2):
            difference = out.float() - mean
            mean.add_(difference, alpha=1 / number)
            if spread is not None:
                spread.addcmul_(difference, out.float() - mean)
        return mean if spread is None else torch.cat([mean, spread.div_(self.passes)], 1)

    def _average_of_covered(self, outputs: Iterator[tuple[Symmetry, torch.Tensor]]) -> torch.Tensor:
        """As `_average`, each voxel of each channel over the passes that cover it."""
        import torch

        mean = spread = count = torch.zeros(0)
        for number, (symmetry, out) in enumerate(outputs):
            if number == 0:
                mean, count = torch.zeros_like(out, dtype=torch.float32), torch.zeros_like(out[0], dtype=torch.float32)
                spread = torch.zeros_like(mean) if self.variance else mean
            covered = self._maps[symmetry].seen(out)
            count += covered
            difference = (out.float() - mean) * covered
            mean.add_(difference / count.clamp(min=1))
            if self.variance:
                spread.addcmul_(difference, out.float() - mean)  # zero if not covered
        return torch.cat([mean, spread.div_(count)], 1) if self.variance else mean

    def _outputs(self, inputs: Sequence[torch.Tensor], content: int | None) -> Iterator[tuple[Symmetry, torch.Tensor]]:
        """Yield the result of each pass, transformed back with its channels in their places, and its symmetry."""
        for symmetry in self.symmetries:
            transformed = [symmetry.apply(values) for values in inputs]
            for member, network in enumerate(self.networks):
                for sample in range(max(1, self.samples)):
                    if content is None:
                        out = network(*transformed)
                    else:
                        with _seeded(inputs[0].device, f"{content} {member} {symmetry} {sample}"):
                            out = network(*transformed)
                    out = symmetry.inverse.apply(out)
                    yield symmetry, self._maps[symmetry].apply(out) if self._maps else out


class OrientedAverages:
    """The averages of a prediction, one for each shape of windows that the network sees as its own (`windows_seen`).

    Each goes over the volume with windows of its shape; `merged` gives the mean, and variance, over all passes.

    Attributes:
        by_window: the average for each window shape, voxels of the volume, z y x.
    """

    def __init__(
        self,
        networks: Sequence[Network],
        seen: Mapping[Index, Sequence[Symmetry]],
        *,
        samples: int = 0,
        variance: bool = False,
        about: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Average over the symmetries of ``seen``; all else as for `Averaged`, also the errors. Raises `InputError` if
        a variance is requested of one pass."""
        self.by_window = {
            window: Averaged(networks, together, samples=samples, variance=variance, about=about)
            for window, together in seen.items()
        }
        self._variance = variance
        if variance and sum(average.passes for average in self.by_window.values()) < 2:
            raise InputError(
                "the variance over one pass is zero: give several checkpoints or set inference.tta=flips, or set "
                "inference.uncertainty=entropy or dropout"
            )

    def merged(self, parts: Iterable[NDArray[np.float32]]) -> NDArray[np.float32]:
        """Return what all passes give for a block from the results (C, d, h, w) or (2C, d, h, w) of each window shape;
        of these only the first must stay valid when the next one is taken.

        Means and variances are merged as by Chan et al. (COMPSTAT 1982).
        """
        rest = iter(parts)
        result = next(rest)
        channels = len(result) // 2 if self._variance else len(result)
        first, *others = (average.passes for average in self.by_window.values())
        total = first
        for passes, part in zip(others, rest, strict=True):
            before, total = total, total + passes
            difference = part[:channels] - result[:channels]
            result[:channels] += difference * np.float32(passes / total)
            if self._variance:
                result[channels:] *= np.float32(before / total)
                result[channels:] += part[channels:] * np.float32(passes / total)
                result[channels:] += np.square(difference) * np.float32(before * passes / total**2)
        return result


def _content(window: torch.Tensor) -> int:
    return zlib.crc32(window.detach().contiguous().cpu().numpy().data)


@contextmanager
def _seeded(device: torch.device, text: str) -> Iterator[None]:
    """Seed the random numbers of the CPU and of ``device`` from ``text``, and restore them afterwards."""
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
    """Activate the dropout layers of a network in evaluation mode; all other layers (batch norm) stay as they are.

    Raises `InputError` if the network has no dropout layers with a probability above 0.
    """
    from torch import nn

    kinds = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
    layers = [layer for layer in module.modules() if isinstance(layer, kinds) and layer.p > 0]
    if not layers:
        raise InputError(
            "inference.uncertainty=dropout needs a network that was trained with dropout, but this one has no dropout "
            "layers; train with model.dropout=0.1, for example, or choose another kind of uncertainty"
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
    """Return the entropy in bits, 0 to 1, of a class with this probability: -p log2 p - (1 - p) log2(1 - p)."""
    result = np.zeros_like(probability)
    for p in (probability, 1 - probability):
        p = np.clip(p, np.float32(1e-12), 1)
        result -= p * np.log2(p)
    return np.clip(result, 0, 1, out=result)
