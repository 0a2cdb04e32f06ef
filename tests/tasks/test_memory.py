"""What glibc does with the memory of large arrays that are freed."""

from __future__ import annotations

import platform

import pytest

from tests.starter import Starter

_FAULTS = """
import resource
import numpy as np
from connectomics.tasks.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        np.ones(1 << 22)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

default = faults()
keep_freed_memory()
faults()
print(default, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other heaps are left alone")
def test_kept_memory_is_used_again(starter: Starter) -> None:
    started = starter.run(["-c", _FAULTS])
    assert started.status == 0, started.said
    default, kept = map(int, started.stdout.split())
    assert default >= 100
    assert kept < default / 10
