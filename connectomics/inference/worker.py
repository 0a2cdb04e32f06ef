"""One process's hands on a prediction: raw read ahead of the network, blocks written behind it."""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from connectomics.inference.artefact import Group
from connectomics.inference.augmented import LARGEST, Network, entropy
from connectomics.inference.batching import MOST_ON_CPU, MOST_ON_GPU, best_batch
from connectomics.inference.layout import Layout
from connectomics.inference.mask import Mask
from connectomics.inference.output import require_probabilities, write_probability
from connectomics.inference.raw import RawSource
from connectomics.inference.rows import Forward, planned_reads
from connectomics.inference.sliding import predict_regions
from connectomics.inference.threads import ReadAhead, WriteBehind
from connectomics.inference.views import View
from connectomics.io.write import ArrayWriter
from connectomics.tasks.heap import give_back_freed, use_one_heap

if TYPE_CHECKING:
    import torch

    from connectomics.inference.task import PredictTask

log = logging.getLogger(__name__)

_TRIES = 2  # of a batch, after one that warms up

# a block on its way to the disk: where it belongs, its number there, its values
_Item = tuple[int, int, NDArray[np.float32]]


class PredictWorker:
    """Does the first stage of a `PredictTask`."""

    def __init__(self, task: PredictTask, networks: Sequence[Network], device: str) -> None:
        """With networks that are ready on ``device``. They are tried on a window of noise: raises `InputError` where
        they do not give probabilities of the task's classes."""
        use_one_heap()
        self._task, self._device = task, device
        self._averaged = task.averaged(networks)
        self._source = RawSource(task.raw, task.normalization)
        self._mask = None if task.mask is None else Mask(task.mask, task.voxel_size)
        self._views = [View(self._source.read, size, shape) for size, shape in task.views]
        self._batch = self._tried()
        self._writers: dict[int, list[tuple[Group, ArrayWriter]]] = {}

    def run(self, blocks: Sequence[int]) -> Iterator[int]:
        """Do ``blocks``; those that follow each other along x share their windows, see `connectomics.inference.rows`.

        A block's number comes when it is written, which is while the next one is at the network.
        """
        located = [(number, *self._task.locate(number)) for number in blocks]
        for index, part in itertools.groupby(located, key=lambda at: at[1]):
            layout = self._task.layouts[index][0]
            numbers = [(number, inside) for number, _, inside in part]
            written = None
            with WriteBehind(self._write) as behind:
                with closing(self._values(layout, [inside for _, inside in numbers])) as values:
                    for number, inside in numbers:
                        try:
                            block = next(values)
                        except Exception:
                            if written is not None:  # not that one's fault
                                behind.wait()
                                yield written
                            raise
                        behind.put((index, inside, block))
                        del block  # the writer has it; here it would be held while the next one is computed
                        give_back_freed()
                        if written is not None:
                            yield written
                        written = number
                behind.wait()
            if written is not None:
                yield written

    def _values(self, layout: Layout, numbers: Sequence[int]) -> Generator[NDArray[np.float32], None, None]:
        """The values of the blocks of a layout, with raw read ahead of the network."""
        task = self._task
        regions = [layout.regions[number] for number in numbers]
        touches = None if self._mask is None else self._mask.touches
        with ReadAhead(self._source.read, planned_reads(layout.lattice, regions, touches)) as read:
            yield from predict_regions(
                read,
                layout.lattice,
                self._averaged,
                regions,
                channels=task.channels,
                blending=task.blending,
                batch_size=self._batch,
                device=self._device,
                autocast=autocast(task.precision),
                views=self._views,
                skip_empty=task.skip_empty,
                inside=touches,
            )

    def _write(self, item: _Item) -> None:
        """Store a block's channels, each with its uncertainty where it is asked for."""
        index, number, block = item
        layout = self._task.layouts[index][0]
        if index not in self._writers:
            groups = [group for group in self._task.groups if group.layout is layout]
            self._writers[index] = [(group, group.array()) for group in groups]
        for group, writer in self._writers[index]:
            values = block[group.channel] if not group.uncertainty else self._uncertainty(block, group.channel)
            write_probability(layout, number, values, writer)

    def _uncertainty(self, block: NDArray[np.float32], channel: int) -> NDArray[np.float32]:
        """Of one channel of a block, from 0 to 1: as a share of the largest that can be."""
        task = self._task
        if task.uncertainty == "entropy":
            return entropy(block[channel])
        return block[len(task.classes) + channel] / np.float32(LARGEST[task.uncertainty])

    def _tried(self) -> int:
        """The number of windows that go through the networks together, after a window of noise went through."""
        task = self._task
        forward = Forward(
            self._averaged, task.channels, 1, self._device, autocast(task.precision), (), skip_empty=False, inside=None
        )
        noise = np.random.default_rng(0)
        shapes = [task.window, *(shape for _, shape in task.views)]
        inputs = [noise.random(shape, dtype=np.float32) for shape in shapes]
        out = forward(*([values] for values in inputs))
        require_probabilities(float(out.min()), float(out.max()))
        del out
        if isinstance(task.batch_size, int):
            return task.batch_size

        def seconds(windows: int) -> float:
            def once() -> float:
                begin = time.perf_counter()
                forward(*([values] * windows for values in inputs))
                _wait(self._device)
                return time.perf_counter() - begin

            once()
            return min(once() for _ in range(_TRIES))

        on_gpu = self._device.startswith("cuda")
        batch = best_batch(seconds, MOST_ON_GPU if on_gpu else MOST_ON_CPU)
        rate = batch * math.prod(task.window) / seconds(batch) / 1e6
        log.info("%s: %d windows at a time (%.2f Mvoxel/s on %s)", task.name, batch, rate, self._device)
        return batch


def autocast(precision: str) -> torch.dtype | None:
    """The dtype of automatic mixed precision, None for ``32``."""
    if precision == "32":
        return None
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def _wait(device: str) -> None:
    """Until a GPU has done what it was given; what was left over of its memory is given back."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)
