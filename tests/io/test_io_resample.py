"""Resampling between voxel grids: against plain references, and on functions known in closed form."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from connectomics.errors import InputError
from connectomics.geometry import VoxelGrid
from connectomics.io import resample

SOURCE = VoxelGrid((5.24, 4.0, 4.0), (100.1, 20.0, -3.7), (13, 11, 12))
TARGETS = {
    "coarser, not dividing": VoxelGrid((8.0, 8.0, 8.0), (103.0, 22.5, 0.0), (6, 4, 5)),
    "finer": VoxelGrid((2.62, 2.0, 2.0), (99.9, 21.0, -1.3), (20, 15, 13)),
    "finer on one axis, coarser on another": VoxelGrid((3.1, 9.7, 4.0), (104.4, 25.1, 3.3), (9, 3, 8)),
    "over the edges": VoxelGrid((9.3, 7.7, 3.3), (80.0, 5.0, -20.0), (14, 9, 20)),
    "twice": VoxelGrid((10.48, 8.0, 8.0), (102.72, 22.0, -1.7), (6, 5, 6)),
    "wholly outside": VoxelGrid((8.0, 8.0, 8.0), (900.0, 900.0, 900.0), (2, 3, 2)),
}


def ramp(grid: VoxelGrid) -> np.ndarray:
    z, y, x = grid.axes()
    return 0.31 * z[:, None, None] - 0.72 * y[:, None] + 0.23 * x + 40


def overlap(a0: float, a1: float, b0: float, b1: float) -> float:
    return max(0.0, min(a1, b1) - max(a0, b0))


def reference_weights(source: VoxelGrid, target: VoxelGrid, axis: int) -> np.ndarray:
    """Overlap in nm of every target voxel with every source voxel along an axis, by the definition."""
    s, t = source.voxel_size[axis], target.voxel_size[axis]
    centers = (source.axes()[axis], target.axes()[axis])
    return np.array([[overlap(c - t / 2, c + t / 2, d - s / 2, d + s / 2) for d in centers[0]] for c in centers[1]])


def reference_fraction(block: np.ndarray, source: VoxelGrid, target: VoxelGrid) -> np.ndarray:
    z, y, x = (reference_weights(source, target, axis) for axis in range(3))
    sums = np.einsum("az,by,cx,zyx->abc", z, y, x, block.astype(np.float64))
    volume = np.einsum("a,b,c->abc", z.sum(1), y.sum(1), x.sum(1))
    return np.divide(sums, volume, out=np.zeros_like(sums), where=volume > 1e-6)


def reference_interpolation(block: np.ndarray, source: VoxelGrid, target: VoxelGrid) -> np.ndarray:
    from scipy.ndimage import map_coordinates

    index = np.meshgrid(
        *[source.to_index(np.stack([a] * 3, 1))[:, k] for k, a in enumerate(target.axes())], indexing="ij"
    )
    return map_coordinates(block.astype(np.float64), index, order=1, mode="nearest")


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("dtype", [bool, np.uint8, np.uint16, np.int32, np.float32])
def test_area_fraction_is_the_mean_over_the_overlap_of_boxes(name, dtype):
    rng = np.random.default_rng(3)
    block = rng.integers(0, 2 if dtype is bool else 200, SOURCE.shape).astype(dtype)
    found = resample.area_fraction(block, SOURCE, TARGETS[name])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, reference_fraction(block, SOURCE, TARGETS[name]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", TARGETS)
def test_area_coverage_is_the_share_of_the_target_voxel_that_the_block_covers(name):
    target = TARGETS[name]
    shares = [reference_weights(SOURCE, target, axis).sum(1) / target.voxel_size[axis] for axis in range(3)]
    np.testing.assert_allclose(
        resample.area_coverage(SOURCE, target), np.einsum("a,b,c->abc", *shares), rtol=1e-5, atol=1e-6
    )


def test_area_fraction_of_nothing_is_zero():
    assert not resample.area_fraction(np.zeros(SOURCE.shape, bool), SOURCE, TARGETS["twice"]).any()


def test_linear_interpolates_where_the_target_is_finer():
    block = np.random.default_rng(4).integers(0, 255, SOURCE.shape, dtype=np.uint8)
    for target in (TARGETS["finer"], SOURCE, VoxelGrid((5.0, 4.0, 3.9), (80.0, 10.0, -9.0), (20, 15, 18))):
        found = resample.linear(block, SOURCE, target)
        np.testing.assert_allclose(found, reference_interpolation(block, SOURCE, target), atol=2e-3)


def test_linear_is_the_plain_mean_where_the_voxel_sizes_divide_each_other():
    block = np.random.default_rng(5).integers(0, 255, SOURCE.shape, dtype=np.uint8)
    target = TARGETS["twice"]
    np.testing.assert_allclose(
        resample.linear(block, SOURCE, target), reference_fraction(block, SOURCE, target), rtol=1e-5
    )


@pytest.mark.parametrize("name", ["coarser, not dividing", "finer", "finer on one axis, coarser on another", "twice"])
def test_linear_keeps_a_ramp_exactly_in_the_interior(name):
    target = TARGETS[name]
    box = SOURCE.box.grow(-np.maximum(SOURCE.voxel_size, target.voxel_size))
    index = target.slices(box)
    found = resample.linear(ramp(SOURCE), SOURCE, target)
    inner = tuple(slice(s.start + 1, s.stop - 1) for s in index)
    assert found[inner].size > 0
    np.testing.assert_allclose(found[inner], ramp(target)[inner], atol=1e-3)


def test_the_balanced_weights_of_linear_are_weights():
    for size, offset in itertools.product([4.1, 5.0, 6.28, 7.99, 8.0, 9.7, 13.3, 31.0], [0.0, 0.3, 1.7, 2.62, 3.9]):
        target = VoxelGrid((size,) * 3, (offset,) * 3, (12, 12, 12))
        source = VoxelGrid((4.0, 4.0, 4.0), (0.0, 0.0, 0.0), (80, 80, 80))
        for table in resample.raw_tables(source, target):
            assert table.weights.min() >= 0
            np.testing.assert_allclose(table.weights.sum(1), 1, atol=1e-6)


def test_linear_repeats_the_edge():
    block = np.full(SOURCE.shape, 7, np.uint8)
    for target in TARGETS.values():
        np.testing.assert_allclose(resample.linear(block, SOURCE, target), 7, rtol=1e-6)


def test_nearest_takes_the_voxel_whose_cell_holds_the_centre():
    block = np.random.default_rng(6).integers(1, 60000, SOURCE.shape).astype(np.uint16)
    for target in (target for name, target in TARGETS.items() if name != "twice"):  # its centres lie on faces
        found = resample.nearest(block, SOURCE, target)
        assert found.dtype == np.uint16
        expected = np.zeros(target.shape, np.uint16)
        for index in np.ndindex(*target.shape):
            cell = np.floor(SOURCE.to_index(target.to_world(index)) + 0.5).astype(int)
            if np.all(cell >= 0) and np.all(cell < SOURCE.shape):
                expected[index] = block[tuple(cell)]
        np.testing.assert_array_equal(found, expected)


def test_nearest_ties_go_up_whatever_the_rounding():
    source = VoxelGrid((1.74,) * 3, (0.87,) * 3, (40, 40, 40))
    target = VoxelGrid((3.48,) * 3, (1.74,) * 3, (20, 20, 20))  # every centre lies on a face
    block = np.broadcast_to(np.arange(40), source.shape).astype(np.int64)
    np.testing.assert_array_equal(resample.nearest(block, source, target)[0, 0], np.arange(1, 40, 2))


def test_empty_grids():
    empty = VoxelGrid((4.0, 4.0, 4.0), (0.0, 0.0, 0.0), (0, 3, 3))
    assert resample.linear(np.zeros(SOURCE.shape), SOURCE, empty).shape == (0, 3, 3)
    assert not resample.linear(np.zeros(empty.shape), empty, TARGETS["twice"]).any()
    assert not resample.area_fraction(np.ones(empty.shape), empty, TARGETS["twice"]).any()
    assert not resample.nearest(np.ones(empty.shape), empty, TARGETS["twice"]).any()


def test_a_block_that_does_not_fit_its_grid_is_refused():
    with pytest.raises(InputError, match="must agree"):
        resample.linear(np.zeros((2, 2, 2)), SOURCE, SOURCE)
