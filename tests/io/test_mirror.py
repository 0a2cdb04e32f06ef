"""A volume is continued by its mirror image: `Extent` and `read_mirrored` against ``numpy.pad``."""

from __future__ import annotations

import numpy as np
import pytest

from connectomics.geometry import VoxelGrid
from connectomics.io.mirror import Extent, hull, read_mirrored, take

GRID = VoxelGrid((8, 4, 4), (104, 52, 2), (7, 12, 1))


@pytest.mark.parametrize(
    ("begin", "shape"), [((0, 0, 0), (7, 12, 1)), ((-30, 5, -3), (60, 40, 7)), ((9, -7, 2), (2, 3, 4))]
)
def test_mirrored_is_numpys_symmetric_padding(begin: tuple[int, int, int], shape: tuple[int, int, int]) -> None:
    values = np.random.default_rng(0).random(GRID.shape)
    asked: list[VoxelGrid] = []

    def read(grid: VoxelGrid) -> tuple[np.ndarray, np.ndarray]:
        asked.append(grid)
        first = GRID.index_range(grid.box)[0]
        part = values[tuple(slice(f, f + n) for f, n in zip(first, grid.shape, strict=True))]
        return part, part > 0.2

    found, there = read_mirrored(read, GRID, GRID.crop(begin, shape))
    around = np.pad(values, 60, mode="symmetric")
    wanted = around[tuple(slice(60 + b, 60 + b + n) for b, n in zip(begin, shape, strict=True))]
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(there, wanted > 0.2)
    (grid,) = asked
    assert all(n <= m for n, m in zip(grid.shape, shape, strict=True)), "never more is read than asked for"
    assert GRID.box.contains(grid.box, 1e-6)


def test_an_extent_on_a_lattice_of_other_voxels() -> None:
    """Voxels whose centers lie in the volume, from 100 to 156 nm along z; none where the volume is too thin."""
    lattice = VoxelGrid((16, 4, 4), (100, 2, 2), (1, 1, 1))
    extent = Extent.of(GRID, lattice)
    assert (extent.low, extent.high) == ((0, 12, 0), (4, 24, 1))
    assert Extent.of(GRID, VoxelGrid((16, 4, 16), (100, 2, 12), (1, 1, 1))).is_empty


def test_a_box_is_shifted_inside_and_keeps_what_it_held() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        low = rng.integers(-20, 20, 3)
        size, shape = rng.integers(1, 40, 3), rng.integers(1, 40, 3)
        extent = Extent(tuple(low.tolist()), tuple((low + size).tolist()))
        begin = rng.integers(-60, 60, 3)
        moved = np.array(extent.inside(begin.tolist(), shape.tolist()))
        large = size >= shape
        assert ((moved >= low) & (moved + shape <= low + size))[large].all(), "inside where the volume is large enough"
        assert ((moved <= low) & (moved + shape >= low + size))[~large].all(), "else it holds the whole volume"
        held = np.maximum(begin, low), np.minimum(begin + shape, low + size)
        met = held[0] < held[1]
        assert ((moved <= held[0]) & (moved + shape >= held[1]))[met].all()


def test_what_stands_for_indices_lies_in_the_volume() -> None:
    extent = Extent((3, 0, -2), (5, 1, 4))
    index = extent.mirrored((-9, -4, -5), (20, 6, 9))
    low, high = hull(index)
    assert (low, high) == ([3, 0, -2], [5, 1, 4])
    assert index[0][:4].tolist() == [3, 4, 4, 3]  # -9 is three periods of four before 3
    assert index[0][12:14].tolist() == [3, 4]
    assert take(np.arange(12).reshape(2, 1, 6), low, index).shape == (29, 10, 14)
