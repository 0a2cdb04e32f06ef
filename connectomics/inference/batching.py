"""How many windows go through the network together, where that is not said: found by trial."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from connectomics.errors import InputError

MOST_ON_CPU, MOST_ON_GPU = 4, 128  # windows; a CPU is busy with few, and its memory is not the network's alone
_SINGLE = (
    "the network with a single window does not fit into the device's memory; make inference.window smaller, or "
    "training.precision=bf16-mixed"
)
_GAIN = 1.05  # a batch twice as large must be faster by this


@contextmanager
def clear_memory_error(windows: int) -> Iterator[None]:
    """Raise `InputError` with advice if the device has no memory for ``windows`` windows at a time."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        if windows == 1:
            raise InputError(_SINGLE) from error
        raise InputError(
            f"the device's memory does not hold this prediction with {windows} windows at a time; make "
            "inference.batch_size, inference.window or inference.block_size smaller, or training.precision=bf16-mixed"
        ) from error


def best_batch(seconds: Callable[[int], float], most: int) -> int:
    """A number of windows, a power of two up to ``most``, beyond which the network gets no faster or has no memory.

    Args:
        seconds: that a batch of so many windows takes, of several tries the shortest; may raise torch's
            `OutOfMemoryError`.

    Returns:
        The smallest of the numbers that were tried from which doubling gained less than 5 %; where memory ended it
        half of the largest that went through, since blocks need memory beside it.

    Raises:
        InputError: a single window is too large for the memory.
    """
    import torch

    best, rate = 0, 0.0
    size = 1
    while size <= most:
        try:
            now = size / max(seconds(size), 1e-9)
        except torch.OutOfMemoryError as error:
            if best == 0:
                raise InputError(_SINGLE) from error
            return max(1, best // 2)
        if best and now < _GAIN * rate:
            break
        best, rate = size, now
        size *= 2
    return best
