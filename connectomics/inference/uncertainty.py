"""How uncertain networks are about a box, and what they see there: one number and a short vector, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from connectomics.errors import InputError
from connectomics.geometry import VoxelGrid
from connectomics.inference.augmented import LARGEST, Network, entropy
from connectomics.inference.blending import Forward
from connectomics.inference.predict_task import PredictTask
from connectomics.inference.predict_worker import autocast
from connectomics.inference.raw import FurtherInput, RawSource
from connectomics.inference.sliding import predict_regions

if TYPE_CHECKING:
    import torch


class Bottleneck:
    """Mean and standard deviation of each channel of a network's coarsest layer, over all that goes through it.

    The layer is the last one among those whose output has the fewest positions, and more than one: a single position is
    global pooling. For a U-Net, it is the end of the deepest stage.
    """

    def __init__(self, network: torch.nn.Module, *window: torch.Tensor) -> None:
        """Find the layer by one pass of a ``window`` (and further inputs), and watch it until `close`.

        Raises `InputError` if no layer of the network gives an array (B, C, ...) with more than one position.
        """
        import torch

        found: list[tuple[int, torch.nn.Module]] = []

        def note(layer: torch.nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor) and output.ndim >= 4 and math.prod(output.shape[2:]) > 1:
                found.append((math.prod(output.shape[2:]), layer))

        hooks = [layer.register_forward_hook(note) for layer in network.modules() if layer is not network]
        try:
            with torch.inference_mode():
                network(*window)
        finally:
            for hook in hooks:
                hook.remove()
        if not found:
            raise InputError("no layer of this network has features of a window; use --method random or even")
        fewest = min(positions for positions, _ in found)
        layer = [layer for positions, layer in found if positions == fewest][-1]
        self.close = layer.register_forward_hook(self._take).remove
        self.clear()

    def clear(self) -> None:
        """Forget what went through the layer."""
        self._number, self._sums = 0, np.zeros((2, 0))

    def _take(self, layer: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        import torch

        flat = output.detach().double().movedim(1, 0).flatten(1)
        sums = torch.stack([flat.sum(1), flat.square().sum(1)]).cpu().numpy()
        self._sums = sums if self._number == 0 else self._sums + sums
        self._number += flat.shape[1]

    @property
    def features(self) -> NDArray[np.float64]:
        """Means, then standard deviations of the channels, (2 C,), since `clear`."""
        mean, square = self._sums / max(1, self._number)
        return np.concatenate([mean, np.sqrt(np.maximum(square - mean**2, 0))])


class Observer:
    """Looks at boxes of one data set with networks that are ready on a device."""

    def __init__(
        self,
        task: PredictTask,
        networks: Sequence[Network],
        bottlenecks: Sequence[Bottleneck],
        device: str,
        classes: int,
    ) -> None:
        """Take a task with ``uncertainty`` variance or dropout, its networks, and the number of their classes."""
        self._task, self._bottlenecks, self._device, self._classes = task, bottlenecks, device, classes
        self._averages = task.averages(networks)
        self._layout = task.layouts[0][0]
        self._source = RawSource(task.raw, task.normalization)
        self._inputs = tuple(FurtherInput(self._source.read, size, shape) for size, shape in task.inputs)
        self._batch = task.batch_size if isinstance(task.batch_size, int) else 1

    def look(self, grid: VoxelGrid) -> tuple[float, NDArray[np.float64]]:
        """Return the uncertainty of a box, 0 to 1, and the features of the windows over it.

        The uncertainty is the mean over voxels and classes of (H + V) / 2: H is the entropy of the mean probability in
        bits, V the variance over networks and views as a share of the largest possible one, 1/4.

        Args:
            grid: at the network's voxel size. It is gone through block by block (``block_size`` of the task).

        Returns:
            uncertainty, and the features of all networks (F,), see `Bottleneck`.
        """
        task, layout, total = self._task, replace(self._layout, target=grid), 0.0
        for bottleneck in self._bottlenecks:
            bottleneck.clear()
        with ExitStack() as stack:
            found = []
            for lattice, average in zip(layout.lattices, self._averages.by_window.values(), strict=True):
                forward = Forward(
                    average, task.channels, self._batch, self._device, autocast(task.precision), self._inputs
                )
                values = predict_regions(self._source.read, lattice, forward, layout.regions, task.blending)
                found.append(stack.enter_context(closing(values)))
            for _ in layout.regions:
                block = self._averages.merged(next(values) for values in found)
                spread = block[len(task.classes) :][: self._classes] / np.float32(LARGEST["variance"])
                total += float((entropy(block[: self._classes]) + spread).sum(dtype=np.float64)) / 2
        features = np.concatenate([bottleneck.features for bottleneck in self._bottlenecks])
        return total / (grid.size * self._classes), features
