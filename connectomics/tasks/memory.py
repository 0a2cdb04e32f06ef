"""Memory of a process: how glibc keeps it for blocks and for training steps, and errors that mean it has run out."""

from __future__ import annotations

import ctypes
import functools
import platform
import sys

# of mallopt(3): free bytes at the end of a heap that are returned, arrays that get pages of their own, number of heaps
_TRIM_THRESHOLD, _MMAP_MAX, _ARENAS = -1, -4, -8


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    """Return the C library if it is glibc; the heaps of others are left alone."""
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def use_one_heap() -> None:
    """Make glibc take the memory of all threads of this process from one heap.

    By default every thread has its own heap, which grows to the largest array it ever held, and threads do not reuse
    memory that another one freed. Arrays are few and large here, so threads hardly ever wait for the one heap.
    """
    if (library := _glibc()) is not None:
        library.mallopt(_ARENAS, 1)


def keep_freed_memory() -> None:
    """Make glibc take large arrays from its heap and keep what is freed: each training step needs the same arrays.

    By default every large array gets new pages, and the system clears them first.
    """
    if (library := _glibc()) is not None:
        library.mallopt(_MMAP_MAX, 0)
        library.mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def free_unused() -> None:
    """Make glibc return free heap memory to the system: a block's arrays leave holes that the next ones may not fit."""
    if (library := _glibc()) is not None:
        library.malloc_trim(0)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that this machine or the GPU ran out of memory, whoever raised it."""
    if isinstance(error, MemoryError):
        return True
    torch = sys.modules.get("torch")  # if it is not imported, nobody raised its errors
    if torch is None or not isinstance(error, RuntimeError):
        return False
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "DefaultCPUAllocator" in text
