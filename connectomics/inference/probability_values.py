"""From weighted sums, or a network's output, to values: checked, and stored as float32 or as uint8 (255 p)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from connectomics.errors import InputError

if TYPE_CHECKING:
    import torch

Item = TypeVar("Item")
Result = TypeVar("Result")
Part = tuple[slice, slice, slice]

LOWEST, HIGHEST = np.float32(-1e-3), np.float32(1 + 1e-3)  # of what counts as a probability
_PLANES = 16  # that one thread does at a time
_MOST_THREADS = 4  # each of those that write holds a class of a block


def require_probabilities(low: float, high: float) -> None:
    """Raise `InputError` if a network's smallest and largest value are not probabilities."""
    if not np.isfinite([low, high]).all():
        raise InputError(
            "the network's output has values that are not finite (NaN or infinite); check the checkpoint, or use full "
            "precision"
        )
    if low < LOWEST or high > HIGHEST:
        raise InputError(
            f"the network must give probabilities, got values from {low:.4g} to {high:.4g}; apply a sigmoid to logits"
        )


def divide(sums: torch.Tensor, part: slice, out: NDArray[Any], into: slice) -> tuple[float, float]:
    """Divide sums by their weights; a voxel without weight becomes 0.

    Args:
        sums: (C + 1, d, h, w) float32, the weights last. part: its voxels along x.
        out: (C, d, h, w'), contiguous: float32 for the values, uint8 for round(255 p), p being the value from 0 to 1.
        into: voxels of ``out`` along x.

    Returns:
        The smallest and the largest value; for uint8 on the CPU 0 and 1 if all values are probabilities.
    """
    if out.dtype == np.uint8 and sums.device.type == "cpu":
        from connectomics.inference.blending_kernels import quantized

        array, depth = sums.numpy(), out.shape[1]

        def work(z: int) -> bool:
            return quantized(array, part.start, out, into.start, into.stop, z, min(z + _PLANES, depth))

        if all(in_threads(work, range(0, depth, _PLANES), "divide")):
            return 0.0, 1.0
    return divide_plain(sums, part, out, into)


def divide_plain(sums: torch.Tensor, part: slice, out: NDArray[Any], into: slice) -> tuple[float, float]:
    """Do what `divide` does, on any device, by one operation after the other."""
    import torch

    weights = sums[-1:, ..., part]
    weights = weights.masked_fill(weights == 0, 1)
    found = torch.from_numpy(out)[..., into]
    if sums.device.type == "cpu" and out.dtype == np.float32:
        low, high = torch.aminmax(torch.div(sums[:-1, ..., part], weights, out=found))
        return float(low), float(high)
    return _store_plain(sums[:-1, ..., part] / weights, found)


def store(values: torch.Tensor, part: Part, out: NDArray[Any], into: Part) -> tuple[float, float]:
    """Store values as they are (float32) or as round(255 p) (uint8); return the smallest and the largest, as `divide`.

    Args:
        values: (C, d, h, w) float32. part: their voxels to store, z y x.
        out: (C, d', h', w'), contiguous, float32 or uint8. into: its voxels, as many.
    """
    import torch

    if out.dtype == np.uint8 and values.device.type == "cpu":
        from connectomics.inference.blending_kernels import rounded

        array, depth = values.contiguous().numpy(), part[0].stop - part[0].start
        (z0, y0, x0), (z1, y1, x1) = (s.start for s in part), (s.start for s in into)
        height, width = (s.stop - s.start for s in part[1:])

        def work(z: int) -> bool:
            shape = min(_PLANES, depth - z), height, width
            return rounded(array, (z0 + z, y0, x0), out, (z1 + z, y1, x1), shape)

        if all(in_threads(work, range(0, depth, _PLANES), "divide")):
            return 0.0, 1.0
    return _store_plain(values[(slice(None), *part)], torch.from_numpy(out)[(slice(None), *into)])


def _store_plain(values: torch.Tensor, found: torch.Tensor) -> tuple[float, float]:
    import torch

    low, high = torch.aminmax(values)
    if found.dtype == torch.uint8:
        values = values.clamp(0, 1).mul_(255).round_().to(torch.uint8)
    found.copy_(values)
    return float(low), float(high)


def in_threads(work: Callable[[Item], Result], items: Iterable[Item], name: str) -> list[Result]:
    """Return ``work`` of each item, in as many threads as torch uses in this process, up to four; for code that
    releases the lock. Calls with another ``name`` have other threads.

    Raises the first error, once every call has ended.
    """
    import torch

    if (threads := min(torch.get_num_threads(), _MOST_THREADS)) == 1:
        return [work(item) for item in items]
    results = [_pool(threads, name).submit(work, item) for item in items]
    wait(results)
    return [result.result() for result in results]


@functools.cache
def _pool(threads: int, name: str) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix=name)
