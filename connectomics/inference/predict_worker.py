"""Predicts blocks in one worker process: raw is read ahead of the network, blocks are written behind it."""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from connectomics.errors import InputError, OutOfMemoryError, number_of
from connectomics.inference import gaps
from connectomics.inference.artifact import Group, write_probability
from connectomics.inference.augmented import LARGEST, Network, entropy
from connectomics.inference.background_io import ReadAhead, WriteBehind
from connectomics.inference.blending import Forward, NotFiniteError, planned_reads
from connectomics.inference.layout import Layout
from connectomics.inference.probability_values import in_threads, require_probabilities
from connectomics.inference.raw import FurtherInput, Mask, RawSource
from connectomics.inference.sliding import predict_regions
from connectomics.io.write import ArrayWriter
from connectomics.tasks.memory import free_unused, is_out_of_memory, use_one_heap
from connectomics.tasks.pool import one_line

if TYPE_CHECKING:
    import torch

    from connectomics.inference.predict_task import PredictTask

log = logging.getLogger(__name__)

MOST_ON_CPU, MOST_ON_GPU = 4, 128  # windows per batch; a CPU is busy with few, and shares its memory
_GAIN = 1.05  # a batch twice as large must be faster by this
_TIMED_RUNS = 2  # of a batch, after one that warms up


class PredictWorker:
    """Does the first stage of a `PredictTask`."""

    def __init__(self, task: PredictTask, networks: Sequence[Network], device: str) -> None:
        """Take networks that are ready on ``device`` and try them on a window of noise.

        Raises `InputError` if they do not give probabilities of the task's classes.
        """
        use_one_heap()
        self._task, self._device = task, device
        self._averages = task.averages(networks)
        self._source = RawSource(task.raw, task.normalization)
        self._mask = None if task.mask is None else Mask(task.mask, task.voxel_size)
        self._inputs = tuple(FurtherInput(self._source.read, size, shape) for size, shape in task.inputs)
        self._presences = gaps.presences(task)
        self._missing = gaps.kept_missing(task)
        self._full_precision: set[int] = set()  # blocks that mixed precision makes NaN
        self._batch = self._tried()
        self._writers: dict[int, list[tuple[Group, ArrayWriter]]] = {}

    def run(self, blocks: Sequence[int]) -> Iterator[int]:
        """Do ``blocks``; neighbors along x share their windows, see `connectomics.inference.blending`.

        A block's number is yielded once it is written, which happens while the network computes the next one. A block
        that runs out of memory is tried with smaller batches, one that mixed precision makes NaN in full precision.
        """
        todo = list(blocks)
        while todo:
            try:
                for number in self._run(tuple(todo)):
                    todo.remove(number)
                    yield number
            except Exception as error:
                if not self._can_retry(error, todo[0]):
                    raise

    def _can_retry(self, error: Exception, number: int) -> bool:
        """Change how blocks are done after block ``number`` failed; returns whether there was another way."""
        task = self._task
        if isinstance(error, NotFiniteError) and task.precision != "32" and number not in self._full_precision:
            self._full_precision.add(number)
            log.warning("%s: block %d is not finite in %s, trying it in float32", task.name, number, task.precision)
            return True
        if not is_out_of_memory(error):
            return False
        if self._batch == 1:
            raise self._too_large(error) from error
        self._batch //= 2
        log.warning("%s: out of memory on %s, continuing with batches of %d", task.name, self._device, self._batch)
        error.__traceback__ = None  # its frames hold the arrays that were too many
        free_unused()
        if self._device.startswith("cuda"):
            import torch

            torch.cuda.empty_cache()
        return True

    def _too_large(self, error: BaseException) -> OutOfMemoryError:
        return OutOfMemoryError(
            f"{self._task.name}: out of memory on {self._device} with a single window at a time ({one_line(error)}); "
            "make inference.block_size or inference.window smaller, or use fewer workers on one device"
        )

    def _run(self, blocks: Sequence[int]) -> Iterator[int]:
        located = [(number, *self._task.locate(number)) for number in blocks]
        for (index, full), part in itertools.groupby(located, key=lambda at: (at[1], at[0] in self._full_precision)):
            numbers = [(number, inside) for number, _, inside in part]
            written = None
            with WriteBehind(self._write) as behind:
                with closing(self._values(self._task.layouts[index][0], [n for _, n in numbers], full)) as values:
                    for number, inside in numbers:
                        try:
                            block = next(values)
                        except Exception:
                            if written is not None:  # the block before is not at fault
                                behind.wait()
                                yield written
                            raise
                        behind.put((index, number, inside, block))
                        del block  # the writer has it; here it would be held while the next one is computed
                        free_unused()
                        if written is not None:
                            yield written
                        written = number
                behind.wait()
            if written is not None:
                yield written

    def _values(self, layout: Layout, numbers: Sequence[int], full: bool) -> Generator[NDArray[Any], None, None]:
        """Yield the values of a layout's blocks, with raw read ahead of the network; ``full``: in full precision.

        Values are valid until the next but one block."""
        regions = [layout.regions[number] for number in numbers]
        touches = None if self._mask is None else self._mask.touches
        kind = layout.value_type(self._task.dtype, self._task.uncertainty)
        into, shared = _in_turn(kind, 2), _in_turn(kind, 1)  # all but the first are merged into it, one by one
        with ExitStack() as stack:
            found = list[Generator[NDArray[Any], None, None]]()
            for lattice, average in zip(layout.lattices, self._averages.by_window.values(), strict=True):
                forward = Forward(
                    average, self._task.channels, self._batch, self._device,
                    None if full else autocast(self._task.precision), self._inputs, self._task.skip_empty, touches,
                )  # fmt: skip
                read = stack.enter_context(ReadAhead(self._source.read, planned_reads(lattice, regions, touches)))
                memory = shared if found else into
                values = predict_regions(read, lattice, forward, regions, self._task.blending, memory)
                found.append(stack.enter_context(closing(values)))
            for _ in regions:
                yield self._averages.merged(next(values) for values in found)

    def _write(self, item: tuple[int, int, int, NDArray[Any]]) -> None:
        """Store a block's channels and their uncertainty: index of its layout, its number, its number there, values."""
        index, number, inside, block = item
        layout = self._task.layouts[index][0]
        if index not in self._writers:
            groups = [group for group in self._task.groups if group.layout is layout]
            self._writers[index] = [(group, group.array()) for group in groups]
        absent = self._presences[index].absent(inside) if self._missing[number] else None

        def write(channel: tuple[Group, ArrayWriter]) -> None:
            group, writer = channel
            values = block[group.channel]
            if group.uncertainty == "entropy":
                values = entropy(values)
            elif group.uncertainty:  # a share of the largest possible value
                values = block[len(self._task.classes) + group.channel] / np.float32(LARGEST[group.uncertainty])
            write_probability(layout, inside, values, writer, absent)

        in_threads(write, self._writers[index], "write")

    def _tried(self) -> int:
        """Run a window of noise through the networks; return the batch size."""
        task = self._task
        noise = np.random.default_rng(0)
        window, average = next(iter(self._averages.by_window.items()))
        inputs = [noise.random(shape, dtype=np.float32) for shape in (window, *(n for _, n in task.inputs))]

        def forward(windows: int, precision: str) -> torch.Tensor:
            run = Forward(average, task.channels, windows, self._device, autocast(precision))
            return run(*([values] * windows for values in inputs))

        try:
            out = forward(1, task.precision)
            if task.precision != "32" and not bool(out.isfinite().all()):  # blocks may be too, see `run`
                out = forward(1, "32")
            require_probabilities(float(out.min()), float(out.max()))
            del out
        except (MemoryError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise self._too_large(error) from error
            raise
        if isinstance(task.batch_size, int):
            return task.batch_size

        def seconds(windows: int) -> float:
            times = []
            for _ in range(1 + _TIMED_RUNS):
                begin = time.perf_counter()
                forward(windows, task.precision).sum().item()  # waits for a GPU
                times.append(time.perf_counter() - begin)
            return min(times[1:])

        batch = best_batch(seconds, MOST_ON_GPU if self._device.startswith("cuda") else MOST_ON_CPU)
        rate = batch * math.prod(task.window) / seconds(batch) / 1e6
        log.info("%s: batches of %s (%.2f Mvoxel/s on %s)", task.name, number_of(batch, "window"), rate, self._device)
        return batch


def _in_turn(dtype: np.dtype[Any], number: int) -> Callable[[tuple[int, ...]], NDArray[Any]]:
    """Return what gives memory for values of this type, one of so many arrays in turn: one is written, one computed."""
    import torch

    kind = {"uint8": torch.uint8, "float32": torch.float32}[dtype.name]
    arrays: list[NDArray[Any]] = [np.empty(0, dtype)] * number

    def into(shape: tuple[int, ...]) -> NDArray[Any]:
        arrays.append(arrays.pop(0))
        size = math.prod(shape)
        if arrays[0].size < size:
            # numpy asks for huge pages, which some machines give slowly
            arrays[0] = torch.empty(size, dtype=kind).numpy()
        return arrays[0][:size].reshape(shape)

    return into


def best_batch(seconds: Callable[[int], float], most: int) -> int:
    """Find how many windows should go through the network together: a power of two up to ``most``.

    Args:
        seconds: returns the time of a batch of so many windows; may raise torch's `OutOfMemoryError`.
        most: largest batch to try.

    Returns:
        The smallest batch from which doubling gained less than 5 %; if memory ran out, half of the largest batch that
        fitted, since blocks need memory too.

    Raises:
        InputError: a single window is too large for the memory.
    """
    import torch

    best, rate, size = 0, 0.0, 1
    while size <= most:
        try:
            now = size / max(seconds(size), 1e-9)
        except torch.OutOfMemoryError as error:
            if best == 0:
                raise InputError(
                    "the network with a single window does not fit into the device's memory; make inference.window "
                    "smaller, or set training.precision=bf16-mixed"
                ) from error
            return max(1, best // 2)
        if best and now < _GAIN * rate:
            break
        best, rate = size, now
        size *= 2
    return best


def autocast(precision: str) -> torch.dtype | None:
    """Return the dtype of automatic mixed precision, None for ``32``."""
    if precision == "32":
        return None
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
