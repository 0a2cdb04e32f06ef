"""The device of a test: each runs on the CPU in the quick suite, and on a GPU as `benchmarks/gpu.py` runs it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
import torch


def require_cuda() -> None:
    """Skip the test if torch sees no GPU."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """``cpu``, and ``cuda`` in a test of its own that is marked ``gpu``."""
    if request.param == "cuda":
        require_cuda()
    return str(request.param)


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    """Float32 means float32 on a GPU too, not TF32."""
    places = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [place.allow_tf32 for place in places]
    for place in places:
        place.allow_tf32 = False
    yield
    for place, value in zip(places, before, strict=True):
        place.allow_tf32 = value


@pytest.fixture
def gpu() -> str:
    """For tests of what only a GPU does; they must be marked ``gpu``."""
    require_cuda()
    return "cuda"


@pytest.fixture
def little_memory(gpu: str) -> Iterator[int]:
    """Bytes of the GPU that the test may take: at most 24 GB, so that running out is quick."""
    with limited(24 * 10**9) as allowed:
        yield allowed


@pytest.fixture
def no_memory(gpu: str) -> Iterator[None]:
    """A GPU that has no memory to give."""
    with limited(10**6):
        rest = []  # what the allocator still has in parts that are in use
        for size in (2**20, 2**16, 2**12, 512):
            with suppress(torch.OutOfMemoryError):
                while True:
                    rest.append(torch.empty(size, dtype=torch.uint8, device=gpu))
        yield
        del rest


@contextmanager
def limited(most: int) -> Iterator[int]:
    """Let this process take only so many bytes of the GPU, and no more than four fifths of what it has."""
    total = torch.cuda.get_device_properties(0).total_memory
    allowed = min(most, 4 * total // 5)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(allowed / total)
    try:
        yield allowed
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
