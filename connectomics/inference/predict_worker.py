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

from connectomics.errors import OutOfMemoryError
from connectomics.inference import gaps
from connectomics.inference.artifact import Group
from connectomics.inference.augmented import LARGEST, Network, entropy
from connectomics.inference.batching import MOST_ON_CPU, MOST_ON_GPU, best_batch
from connectomics.inference.layout import Layout
from connectomics.inference.mask import Mask
from connectomics.inference.output import require_probabilities, write_probability
from connectomics.inference.raw import RawSource
from connectomics.inference.rows import Forward, NotFiniteError, planned_reads
from connectomics.inference.sliding import predict_regions
from connectomics.inference.threads import ReadAhead, WriteBehind
from connectomics.inference.views import View
from connectomics.io.write import ArrayWriter
from connectomics.tasks.heap import give_back_freed, use_one_heap
from connectomics.tasks.memory import is_out_of_memory
from connectomics.tasks.pool import one_line

if TYPE_CHECKING:
    import torch

    from connectomics.inference.predict_task import PredictTask

log = logging.getLogger(__name__)

_TRIES = 2  # of a batch, after one that warms up

# a block on its way to the disk: where it belongs, its number, its number there, its values
_Item = tuple[int, int, int, NDArray[np.float32]]


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
        self._presences = gaps.presences(task)
        self._missing = gaps.kept_missing(task)
        self._full: set[int] = set()  # blocks that mixed precision makes NaN
        self._batch = self._tried()
        self._writers: dict[int, list[tuple[Group, ArrayWriter]]] = {}

    def run(self, blocks: Sequence[int]) -> Iterator[int]:
        """Do ``blocks``; those that follow each other along x share their windows, see `connectomics.inference.rows`.

        A block's number comes when it is written, which is while the next one is at the network. A block for which
        memory runs out is tried with smaller batches, one that mixed precision makes NaN is tried in full precision.
        """
        todo = list(blocks)
        while todo:
            try:
                for number in self._run(tuple(todo)):
                    todo.remove(number)
                    yield number
            except Exception as error:
                if not self._helped(error, todo[0]):
                    raise

    def _helped(self, error: Exception, number: int) -> bool:
        """Whether there is another way to do the block ``number``, which failed; it is chosen from now on."""
        task = self._task
        if isinstance(error, NotFiniteError) and task.precision != "32" and number not in self._full:
            self._full.add(number)
            log.warning("%s: block %d is not finite in %s, trying it in float32", task.name, number, task.precision)
            return True
        if not is_out_of_memory(error):
            return False
        if self._batch == 1:
            raise self._too_large(error) from error
        self._batch //= 2
        log.warning("%s: out of memory on %s, going on with %d windows at a time", task.name, self._device, self._batch)
        error.__traceback__ = None  # its frames hold the arrays that were too many
        _give_back(self._device)
        return True

    def _too_large(self, error: BaseException) -> OutOfMemoryError:
        return OutOfMemoryError(
            f"{self._task.name}: out of memory on {self._device} with a single window at a time ({one_line(error)}); "
            "make inference.block_size or inference.window smaller, or use fewer workers on one device"
        )

    def _run(self, blocks: Sequence[int]) -> Iterator[int]:
        located = [(number, *self._task.locate(number)) for number in blocks]
        for (index, full), part in itertools.groupby(located, key=lambda at: (at[1], at[0] in self._full)):
            layout = self._task.layouts[index][0]
            numbers = [(number, inside) for number, _, inside in part]
            written = None
            with WriteBehind(self._write) as behind:
                with closing(self._values(layout, [inside for _, inside in numbers], full)) as values:
                    for number, inside in numbers:
                        try:
                            block = next(values)
                        except Exception:
                            if written is not None:  # not that one's fault
                                behind.wait()
                                yield written
                            raise
                        behind.put((index, number, inside, block))
                        del block  # the writer has it; here it would be held while the next one is computed
                        give_back_freed()
                        if written is not None:
                            yield written
                        written = number
                behind.wait()
            if written is not None:
                yield written

    def _values(self, layout: Layout, numbers: Sequence[int], full: bool) -> Generator[NDArray[np.float32], None, None]:
        """The values of the blocks of a layout, with raw read ahead of the network; ``full``: in full precision."""
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
                autocast=None if full else autocast(task.precision),
                views=self._views,
                skip_empty=task.skip_empty,
                inside=touches,
            )

    def _write(self, item: _Item) -> None:
        """Store a block's channels, each with its uncertainty where it is asked for."""
        index, number, inside, block = item
        layout = self._task.layouts[index][0]
        if index not in self._writers:
            groups = [group for group in self._task.groups if group.layout is layout]
            self._writers[index] = [(group, group.array()) for group in groups]
        absent = self._presences[index].absent(inside) if self._missing[number] else None
        for group, writer in self._writers[index]:
            values = block[group.channel] if not group.uncertainty else self._uncertainty(block, group.channel)
            write_probability(layout, inside, values, writer, absent)

    def _uncertainty(self, block: NDArray[np.float32], channel: int) -> NDArray[np.float32]:
        """Of one channel of a block, from 0 to 1: as a share of the largest that can be."""
        task = self._task
        if task.uncertainty == "entropy":
            return entropy(block[channel])
        return block[len(task.classes) + channel] / np.float32(LARGEST[task.uncertainty])

    def _forward(self, precision: str) -> Forward:
        """The networks for single windows that do not come from raw."""
        task = self._task
        return Forward(
            self._averaged, task.channels, 1, self._device, autocast(precision), (), skip_empty=False, inside=None
        )

    def _tried(self) -> int:
        """The number of windows that go through the networks together, after a window of noise went through."""
        task = self._task
        noise = np.random.default_rng(0)
        shapes = [task.window, *(shape for _, shape in task.views)]
        inputs = [noise.random(shape, dtype=np.float32) for shape in shapes]
        forward = self._forward(task.precision)
        try:
            out = forward(*([values] for values in inputs))
            if task.precision != "32" and not bool(out.isfinite().all()):  # then so may blocks be, see `run`
                out = self._forward("32")(*([values] for values in inputs))
            require_probabilities(float(out.min()), float(out.max()))
            del out
        except (MemoryError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise self._too_large(error) from error
            raise
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


def _give_back(device: str) -> None:
    """Give a GPU's driver the memory that torch keeps for later."""
    give_back_freed()
    if device.startswith("cuda"):
        import torch

        torch.cuda.empty_cache()


def _wait(device: str) -> None:
    """Until a GPU has done what it was given; what was left over of its memory is given back."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)
