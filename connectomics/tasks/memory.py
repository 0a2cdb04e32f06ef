"""Which errors mean that memory has run out."""

from __future__ import annotations

import sys


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of this machine or of the GPU does not suffice, whoever raised it."""
    if isinstance(error, MemoryError):
        return True
    torch = sys.modules.get("torch")  # without it nobody could have raised its errors
    if torch is None or not isinstance(error, RuntimeError):
        return False
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "DefaultCPUAllocator" in text
