"""Values from sums, quantized at once: the same bits as by plain operations."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from connectomics.errors import InputError
from connectomics.geometry import VoxelGrid
from connectomics.inference.blending import Forward
from connectomics.inference.probability_values import divide, divide_plain, in_threads
from connectomics.inference.sliding import predict_regions
from connectomics.inference.windows import WindowLattice
from connectomics.io.resample import linear


def sums_of(channels: int, shape: tuple[int, int, int], seed: int = 0) -> torch.Tensor:
    """Sums of values just below 0 to just above 1, with voxels that no window covers."""
    rng = np.random.default_rng(seed)
    weights = rng.random(shape, dtype=np.float32) * (rng.random(shape) > 0.1)
    values = (rng.random((channels, *shape)) * 1.0018 - 0.0009) * weights
    return torch.from_numpy(np.concatenate([values, weights[None]]).astype(np.float32))


@pytest.mark.parametrize("threads", [1, 3])
def test_the_kernel_gives_the_bits_of_plain_operations(threads):
    sums, before = sums_of(3, (37, 5, 64)), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for part, begin in [(slice(0, 64), 0), (slice(3, 50), 9), (slice(63, 64), 2)]:
            into = slice(begin, begin + part.stop - part.start)
            found, plain = np.full((2, 3, 37, 5, 70), 7, np.uint8)
            assert divide(sums, part, found, into) == (0, 1)
            divide_plain(sums, part, plain, into)
            np.testing.assert_array_equal(found, plain)
            assert (found[..., into] == 0).any(), "voxels without weight"
    finally:
        torch.set_num_threads(before)


def test_every_multiple_of_half_a_step_is_rounded_as_by_numpy():
    p = np.arange(511, dtype=np.float32) / np.float32(510)
    sums = torch.from_numpy(np.stack([p, np.ones_like(p)])[:, None, None])
    found = np.zeros((1, 1, 1, 511), np.uint8)
    divide(sums, slice(0, 511), found, slice(0, 511))
    np.testing.assert_array_equal(found.ravel(), np.rint(p * np.float32(255)).astype(np.uint8))


@pytest.mark.parametrize(("value", "low", "high"), [(1.5, 0, 1.5), (-2.0, -2, 0), (np.nan, np.nan, np.nan)])
def test_a_single_value_that_is_no_probability_is_found(value, low, high):
    sums = torch.zeros(3, 20, 4, 64)
    sums[-1] = 1
    sums[1, 17, 2, 63] = value
    np.testing.assert_array_equal(
        divide(sums, slice(0, 64), np.zeros((2, 20, 4, 64), np.uint8), slice(0, 64)), (low, high)
    )


def test_blocks_as_uint8_are_the_rounded_values_whatever_memory_they_come_in():
    """Windows left out, raw that ends, blocks that are no multiple of a slab, blocks that overlap."""
    grid = VoxelGrid((8, 8, 8), (4, 4, 4), (20, 24, 150))
    lattice = WindowLattice.over(grid, (16, 16, 24), 0.3)
    noise = np.random.default_rng(3).random((80, 80, 250), dtype=np.float32)

    def read(part: VoxelGrid) -> np.ndarray:
        corner = np.round(grid.to_index(part.translation)).astype(int) + 30
        return noise[tuple(slice(b, b + n) for b, n in zip(corner, part.shape, strict=True))]

    def inside(window: VoxelGrid) -> bool:
        return window.translation[2] > 300

    regions = [((z, 0, x), (10, 24, min(37, 150 - x))) for z in (0, 10) for x in range(0, 150, 35)]
    forward = Forward(lambda x: torch.cat([x, 1 - x, x * x], 1), 3, 2, "cpu", inside=inside)
    floats = list(predict_regions(read, lattice, forward, regions))
    memory = np.empty((2, 3 * 10 * 24 * 37), np.uint8)
    turn = iter(range(1000))

    def into(shape: tuple[int, ...]) -> np.ndarray:
        return memory[next(turn) % 2][: int(np.prod(shape))].reshape(shape)

    for values, stored in zip(floats, predict_regions(read, lattice, forward, regions, into=into), strict=True):
        np.testing.assert_array_equal(stored, np.rint(values * np.float32(255)).astype(np.uint8))
    assert (floats[0][..., :20] == 0).all()
    with pytest.raises(InputError, match="must give probabilities, got values from"):
        next(predict_regions(read, lattice, Forward(lambda x: x - 3, 1, 2, "cpu"), regions, into=into))


@pytest.mark.parametrize("voxel_size", [(4, 8, 8), (16, 16, 16), (8, 5, 11), (3, 24, 8)])
def test_resampled_values_are_quantized_as_by_plain_operations(voxel_size):
    source = VoxelGrid((8, 8, 8), (4, 4, 4), (12, 18, 22))
    target = source.at_voxel_size(voxel_size)
    values = (np.random.default_rng(5).random(source.shape) * 1.2 - 0.1).astype(np.float32)
    stored = np.empty(target.shape, np.uint8)
    assert linear(values, source, target, stored) is stored
    plain = np.clip(linear(values, source, target), 0, 1) * np.float32(255)
    np.testing.assert_array_equal(stored, np.rint(plain).astype(np.uint8))


def test_threads_keep_the_order_and_raise_the_first_error_when_all_have_ended():
    before, done = torch.get_num_threads(), []

    def work(number: int) -> int:
        if number in (1, 2):
            raise ValueError(number)
        done.append(number)
        return number * 10

    torch.set_num_threads(3)
    try:
        assert in_threads(lambda n: n * 10, range(9), "test") == [n * 10 for n in range(9)]
        with pytest.raises(ValueError, match="1"):
            in_threads(work, range(9), "test")
        assert sorted(done) == [0, 3, 4, 5, 6, 7, 8]
    finally:
        torch.set_num_threads(before)
