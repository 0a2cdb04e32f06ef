"""A submission onto the truth's grid: the official way, voxel by voxel."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from connectomics.errors import InputError, MetadataError
from connectomics.geometry import VoxelGrid
from connectomics.metrics.challenge import get_rules
from connectomics.metrics.challenge.align import Aligned, Source, source_of
from tests.metrics import plain

RULES = get_rules("2026-06")


class Array:
    """An array that is read by blocks."""

    def __init__(self, values: NDArray[Any]) -> None:
        self.values, self.shape, self.dtype, self.where = values, values.shape, values.dtype, "memory"

    def read(self, begin: Any = None, shape: Any = None) -> NDArray[Any]:
        if begin is None:
            return self.values
        return self.values[tuple(slice(b, b + n) for b, n in zip(begin, shape, strict=True))]


SIZES = [(8.0, 8.0, 8.0), (1.74, 2.0, 2.0), (2.62, 2.0, 2.0)]
SHAPE = st.tuples(st.integers(2, 12), st.integers(2, 12), st.integers(2, 12))


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=SHAPE,
    own_shape=SHAPE,
    voxel_size=st.sampled_from(SIZES),
    factor=st.sampled_from([None, 1.0, 0.5, 2.0, 1.37, (0.5, 1.0, 2.0)]),
    shift=st.one_of(st.none(), st.tuples(*[st.floats(-6, 6)] * 3)),
    kind=st.sampled_from(["uint8 instance", "float32 instance", "bool instance", "uint8", "bool", "float32"]),
    far=st.sampled_from([0.0, 23837.13]),
)
def test_equals_the_official_way(
    seed: int,
    shape: tuple[int, int, int],
    own_shape: tuple[int, int, int],
    voxel_size: tuple[float, float, float],
    factor: Any,
    shift: tuple[float, ...] | None,
    kind: str,
    far: float,
) -> None:
    rng = np.random.default_rng(seed)
    dtype, is_instance = kind.split()[0], "instance" in kind
    values = (
        rng.random(own_shape).astype("float32") if dtype == "float32" else rng.integers(0, 3, own_shape).astype(dtype)
    )
    own = None if factor is None else tuple(float(v) for v in np.array(voxel_size) * factor)
    translation = (far, far / 3, 7.0)
    own_translation = (
        None if shift is None else tuple(t + s * v for t, s, v in zip(translation, shift, voxel_size, strict=True))
    )
    expected = plain.align(values, own, own_translation, voxel_size, translation, shape, is_instance)
    grid = VoxelGrid(voxel_size, translation, shape)
    aligned = Aligned(Source(Array(values), own, own_translation), grid, is_instance, RULES)  # type: ignore[arg-type]
    found = aligned.read()
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)
    begin = tuple(int(rng.integers(0, n)) for n in shape)
    size = tuple(int(rng.integers(1, n - b + 1)) for n, b in zip(shape, begin, strict=True))
    block = tuple(slice(b, b + n) for b, n in zip(begin, size, strict=True))
    np.testing.assert_array_equal(aligned.read(begin, size), expected[block])  # type: ignore[arg-type]


def test_float_floor_division_loses_a_voxel_officially_and_here() -> None:
    """Floored once to the lattice and once more in the difference, an offset of k voxels arrives up to 2 short."""
    values = np.zeros((1, 1, 1), np.uint8)
    values[:] = 1
    grid = VoxelGrid((1.74, 1.74, 1.74), (0.0, 0.0, 0.0), (20, 1, 1))
    lost = []
    for k in range(20):
        source = Source(Array(values), grid.voxel_size, (k * 1.74, 0.0, 0.0))
        lost.append(k - int(np.argmax(Aligned(source, grid, True, RULES).read())))
    assert set(lost) == {0, 1, 2}


def test_attributes_by_any_of_their_names() -> None:
    array = Array(np.zeros((2, 2, 2)))
    assert source_of(array, {}) == Source(array, None, None)
    assert source_of(array, {"resolution": [1, 8, 4, 2], "offset": [0, 3, 2, 1]}) == Source(array, (8, 4, 2), (3, 2, 1))
    assert source_of(array, {"scale": [4, 4, 4], "translation": None}).voxel_size == (4, 4, 4)


@pytest.mark.parametrize("value", [[8, 8], "eight", [8, 8, float("nan")], [8, 0, 8], 8])
def test_broken_attributes_are_named(value: Any) -> None:
    with pytest.raises(MetadataError, match=r"memory: .*voxel_size"):
        source_of(Array(np.zeros((2, 2, 2))), {"voxel_size": value})


def test_what_is_refused() -> None:
    grid = VoxelGrid((8, 8, 8), (0, 0, 0), (2, 2, 2))
    with pytest.raises(InputError, match="three dimensions"):
        Aligned(Source(Array(np.zeros((1, 2, 2, 2))), None, None), grid, True, RULES)
    with pytest.raises(InputError, match="more than 4096 times"):
        Aligned(Source(Array(np.zeros((33, 32, 32), bool)), None, None), grid, True, RULES)
