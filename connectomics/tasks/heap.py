"""The C library's heap in a process that works on blocks, kept from growing with the number of blocks."""

from __future__ import annotations

import ctypes
import functools
import platform

#: of mallopt(3): the number of heaps
_ARENAS = -8


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    """The C library, where it is glibc; others are left alone."""
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def use_one_heap() -> None:
    """Have glibc take the memory of all threads of this process from one heap.

    It gives every thread its own, and what one frees (the reader's raw, the writer's blocks) the others do not reuse:
    the longer a task goes on, the more of them have grown to the size of the largest array they held. Arrays are few
    and large here, so threads hardly ever wait for the one heap. (Never to keep such arrays on a heap, by another
    ``mallopt``, takes less memory still, but each must then be had anew from the system: 40 to 60 % more CPU for a
    small U-Net.)
    """
    if (library := _glibc()) is not None:
        library.mallopt(_ARENAS, 1)


def give_back_freed() -> None:
    """Have glibc give the system what is free in its heap: the arrays of a block leave holes that those of the next
    one do not always fit into."""
    if (library := _glibc()) is not None:
        library.malloc_trim(0)
