"""The exact Hausdorff distance against scipy's distance transforms, to the last bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from connectomics.errors import InputError
from connectomics.metrics.challenge import distance
from connectomics.metrics.challenge.distance import directed, hausdorff, scratch_bytes
from tests.metrics import plain

Triple = tuple[int, int, int]


def random_mask(rng: np.random.Generator, shape: Triple, density: float) -> tuple[NDArray[np.bool_], Triple]:
    """A block with a random mask, and where it lies in a volume of ``shape``."""
    low = rng.integers(0, np.array(shape))
    size = [int(rng.integers(1, n - b + 1)) for b, n in zip(low, shape, strict=True)]
    return rng.random(size) < density, (int(low[0]), int(low[1]), int(low[2]))


def placed(mask: NDArray[np.bool_], at: Triple, shape: Triple) -> NDArray[np.bool_]:
    volume = np.zeros(shape, bool)
    volume[tuple(slice(b, b + n) for b, n in zip(at, mask.shape, strict=True))] = mask
    return volume


@settings(max_examples=400, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(1, 18), st.integers(1, 18), st.integers(1, 18)),
    densities=st.tuples(st.sampled_from([0.01, 0.1, 0.5, 0.95]), st.sampled_from([0.01, 0.1, 0.5, 0.95])),
    voxel_size=st.sampled_from([(8.0, 8.0, 8.0), (1.74, 2.0, 2.0), (5.24, 4.0, 4.0), (1.0, 7.3, 0.4)]),
    alike=st.booleans(),
    cap=st.sampled_from([np.inf, 20.0, 3.0]),
)
def test_equals_two_distance_transforms(
    seed: int,
    shape: Triple,
    densities: tuple[float, float],
    voxel_size: tuple[float, float, float],
    alike: bool,
    cap: float,
) -> None:
    rng = np.random.default_rng(seed)
    a, at_a = random_mask(rng, shape, densities[0])
    b, at_b = random_mask(rng, shape, densities[1])
    if alike:
        b, at_b = a ^ (rng.random(a.shape) < 0.03), at_a
    offset = (at_b[0] - at_a[0], at_b[1] - at_a[1], at_b[2] - at_a[2])
    expected = plain.hausdorff(placed(a, at_a, shape), placed(b, at_b, shape), voxel_size)
    assert hausdorff(a, b, voxel_size, cap, offset) == min(expected, cap)


@pytest.mark.parametrize("density", [0.002, 0.3])
def test_masks_far_apart_and_large_take_every_path(density: float) -> None:
    """Sparse masks are searched, dense gaps go through the envelopes; both are exact."""
    rng = np.random.default_rng(3)
    a, b = np.zeros((2, 40, 50, 60), bool)
    a[:, :25], b[:, 25:] = rng.random((40, 25, 60)) < density, rng.random((40, 25, 60)) < density / 10
    for voxel_size in ((8.0, 8.0, 8.0), (2.62, 2.0, 2.0)):
        assert hausdorff(a, b, voxel_size) == plain.hausdorff(a, b, voxel_size)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    shapes=st.tuples(*[st.integers(1, 15)] * 4),
    offset=st.tuples(st.integers(-20, 20), st.integers(-20, 20)),
    spacing=st.sampled_from([(8.0, 8.0, 8.0), (1.74, 2.0, 2.0), (3.0, 1.0, 0.5)]),
)
def test_searching_a_plane_and_its_envelopes_agree(
    seed: int, shapes: tuple[int, int, int, int], offset: tuple[int, int], spacing: tuple[float, float, float]
) -> None:
    rng = np.random.default_rng(seed)
    distance_z = rng.integers(0, 9, shapes[:2]).astype(np.int16)
    distance_z[rng.random(shapes[:2]) < 0.5] = 32767
    distance_z.flat[0] = 4
    bound = np.where(rng.random(shapes[2:]) < 0.3, np.inf, -1.0)
    arguments = (distance_z, *offset, bound, (bound > 0).any(axis=1), np.array(spacing), 0.0)
    assert distance._search_plane(*arguments) == distance._envelope_plane(*arguments)


def test_half_a_ball() -> None:
    z, y, x = np.ogrid[-20:21, -20:21, -20:21]
    ball = z**2 + y**2 + x**2 <= 400
    half = ball & (x <= 0)
    assert hausdorff(ball, half, (4.0, 4.0, 4.0)) == 80.0
    assert directed(half, ball, (4.0, 4.0, 4.0)) == 0.0
    assert directed(half, ball, (4.0, 4.0, 4.0), reached=7.0) == 7.0


def test_empty_masks() -> None:
    empty, full = np.zeros((3, 3, 3), bool), np.ones((3, 3, 3), bool)
    assert hausdorff(empty, empty, (1, 1, 1)) == 0.0
    assert hausdorff(empty, full, (1, 1, 1)) == np.inf
    assert hausdorff(full, empty, (1, 1, 1), cap=5.0) == 5.0


def test_what_cannot_be_compared() -> None:
    flat, long = np.ones((3, 3), bool), np.ones((1, 1, 20_000), bool)
    with pytest.raises(InputError, match="three-dimensional"):
        hausdorff(flat, flat, (1, 1, 1))
    with pytest.raises(InputError, match="voxels apart"):
        hausdorff(long, long, (1, 1, 1))


def test_scratch_grows_with_the_boxes_not_with_what_lies_between() -> None:
    small = np.array([0, 10, 0, 10, 0, 10])
    far = np.array([500, 510, 500, 510, 500, 510])
    assert scratch_bytes(small, far) < 20_000
