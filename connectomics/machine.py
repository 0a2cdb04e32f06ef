"""What this process may use of the machine."""

from __future__ import annotations

import os


def usable_cores() -> int:
    """Return the number of CPU cores this process may run on, at least 1.

    Counts the CPU affinity where the system has one: in a SLURM or LSF slot, a container, or under ``taskset`` that is
    less than the machine has, and one thread per machine core would oversubscribe the slot.
    """
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1
