"""Boxes and grids: fractional nanometres, translations at voxel centres."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from connectomics.errors import InputError
from connectomics.geometry import Box, VoxelGrid

sizes = st.sampled_from([1.62, 1.74, 2.0, 2.62, 4.0, 5.24, 8.0, 16.0])
offsets = st.floats(-50_000, 50_000)


@st.composite
def grids(draw: st.DrawFn) -> VoxelGrid:
    return VoxelGrid(
        (draw(sizes), draw(sizes), draw(sizes)),
        (draw(offsets), draw(offsets), draw(offsets)),
        (draw(st.integers(1, 50)), draw(st.integers(1, 50)), draw(st.integers(1, 50))),
    )


def test_translation_is_the_centre_of_the_first_voxel() -> None:
    grid = VoxelGrid((2.62, 2.0, 2.0), (3132.21, 899.0, 25863.0), (200, 1000, 1000))
    assert grid.box.begin == pytest.approx((3130.9, 898.0, 25862.0))
    assert grid.box.extent == pytest.approx((524.0, 2000.0, 2000.0))


@given(grids(), st.tuples(st.integers(-5, 60), st.integers(-5, 60), st.integers(-5, 60)))
def test_index_and_world_are_inverse(grid: VoxelGrid, index: tuple[int, int, int]) -> None:
    np.testing.assert_allclose(grid.to_index(grid.to_world(index)), index, atol=1e-6)


@given(grids(), sizes)
def test_another_voxel_size_starts_at_the_same_face_and_covers_the_same_box(grid: VoxelGrid, size: float) -> None:
    other = grid.at_voxel_size((size,) * 3)
    assert other.box.begin == pytest.approx(grid.box.begin, abs=1e-6)
    assert other.box.contains(grid.box, tolerance=2e-3 * size)
    shrunk = Box(other.box.begin, tuple(e - size for e in other.box.end))
    assert not shrunk.contains(grid.box, tolerance=-1e-3 * size)


@given(grids(), st.integers(5, 20))
@example(VoxelGrid((8, 8, 8), (0, 0, 0), (3, 4, 5)), 1)
def test_blocks_tile_the_grid(grid: VoxelGrid, edge: int) -> None:
    seen = np.zeros(grid.shape, int)
    found, expected = [], []
    for begin, block in grid.blocks((edge, edge, edge)):
        at = tuple(slice(b, b + n) for b, n in zip(begin, block.shape, strict=True))
        seen[at] += 1
        found.append(block.translation)
        expected.append(grid.to_world(begin))
    np.testing.assert_allclose(found, expected)
    assert np.all(seen == 1)


@given(grids())
def test_slices_of_the_own_box_are_everything(grid: VoxelGrid) -> None:
    assert grid.slices(grid.box) == tuple(slice(0, n) for n in grid.shape)
    assert grid.slices(Box(grid.box.end, grid.box.end)) == tuple(slice(n, n) for n in grid.shape)


def test_box_algebra() -> None:
    a, b = Box((0, 0, 0), (4, 4, 4)), Box((2, 2, 2), (6, 3, 9))
    assert a.intersect(b) == Box((2, 2, 2), (4, 3, 4))
    assert a.hull(b) == Box((0, 0, 0), (6, 4, 9))
    assert a.grow(1) == Box((-1, -1, -1), (5, 5, 5))
    assert a.intersect(Box((5, 5, 5), (6, 6, 6))).is_empty
    assert a.contains(a.intersect(b))


def test_same_lattice_ignores_rounding_but_not_half_voxels() -> None:
    grid = VoxelGrid((2.62,) * 3, (1.31,) * 3, (4, 4, 4))
    assert grid.same_lattice(grid.crop((100_000, 7, -3), (1, 1, 1)))
    assert not grid.same_lattice(VoxelGrid((2.62,) * 3, (0.0, 1.31, 1.31), (4, 4, 4)))
    assert not grid.same_lattice(VoxelGrid((2.6,) * 3, (1.31,) * 3, (4, 4, 4)))


def test_round_trip_as_dict() -> None:
    grid = VoxelGrid((1.74, 2, 2), (23837.13, 7599, 35999), (600, 600, 600))
    assert VoxelGrid.from_dict(grid.to_dict()) == grid
    with pytest.raises(InputError, match="needs voxel_size"):
        VoxelGrid.from_dict({"shape": [1, 1, 1]})


@pytest.mark.parametrize(
    ("voxel_size", "translation", "shape"),
    [((0, 1, 1), (0, 0, 0), (1, 1, 1)), ((1, 1, 1), (0, 0), (1, 1, 1)), ((1, 1, 1), (0, 0, float("nan")), (1, 1, 1)),
     ((1, 1, 1), (0, 0, 0), (1, 1, -1)), ((1, 1, 1), (0, 0, 0), (1, 1.5, 1))],
)  # fmt: skip
def test_bad_grids_are_refused(voxel_size: tuple, translation: tuple, shape: tuple) -> None:
    with pytest.raises(InputError, match="must be"):
        VoxelGrid(voxel_size, translation, shape)
