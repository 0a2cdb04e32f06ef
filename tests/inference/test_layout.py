"""Blocks of a target grid and the part of the network's lattice behind each of them."""

from __future__ import annotations

import numpy as np
import pytest

from connectomics.geometry import VoxelGrid
from connectomics.inference.layout import Layout
from connectomics.inference.windows import Windows

GRIDS = {
    "same": VoxelGrid((8, 8, 8), (4.5, -20, 3), (300, 70, 65)),
    "finer": VoxelGrid((2, 2, 2), (4.5, -20, 3), (401, 130, 65)),
    "coarser": VoxelGrid((32, 32, 32), (16, 0, 3), (30, 70, 65)),
    "much coarser": VoxelGrid((64, 64, 64), (16, 0, 3), (70, 33, 10)),
    "mixed": VoxelGrid((13.92, 8, 2.62), (1.7, 0.3, 3), (100, 70, 365)),
}


def layout_of(grid: VoxelGrid, block: int = 128, channels: int = 2) -> Layout:
    windows = Windows((32, 32, 32), (0.25, 0.25, 0.25))
    return Layout(grid, channels, (8.0, 8.0, 8.0), (windows,), None, (block, block, block))


@pytest.mark.parametrize("name", list(GRIDS))
def test_blocks_are_whole_chunks_and_cover_the_target_once(name):
    grid = GRIDS[name]
    layout = layout_of(grid)
    seen = np.zeros(grid.shape, np.uint8)
    for begin, block in layout.blocks:
        assert all(b % c == 0 for b, c in zip(begin, layout.chunks, strict=True)), "two blocks would write one chunk"
        seen[tuple(slice(b, b + n) for b, n in zip(begin, block.shape, strict=True))] += 1
    assert (seen == 1).all()
    for _, shape in layout.regions:
        assert max(shape) <= 128 + 2, "a block takes no more of the network's lattice than asked for"


@pytest.mark.parametrize("name", list(GRIDS))
def test_the_region_of_a_block_covers_it_with_the_neighbours_that_interpolation_needs(name):
    layout = layout_of(GRIDS[name])
    for (_, block), (begin, shape) in zip(layout.blocks, layout.regions, strict=True):
        region = layout.model.crop(begin, shape)
        assert region.box.contains(block.box, tolerance=1e-3 * 8)
        assert layout.model.box.contains(region.box, tolerance=1e-6)
        for axis in range(3):
            if block.voxel_size[axis] < 8:
                first, last = block.axes()[axis][[0, -1]]
                centers = region.axes()[axis]
                assert centers[0] <= first <= last <= centers[-1], "never extrapolated"


def test_the_same_voxel_size_needs_nothing_around_it():
    layout = layout_of(GRIDS["same"])
    assert layout.same_voxels
    assert layout.model == GRIDS["same"]
    assert [begin for begin, _ in layout.regions] == [begin for begin, _ in layout.blocks]


def test_model_lattice_starts_at_the_targets_face():
    layout = layout_of(GRIDS["coarser"])
    assert layout.model.box == GRIDS["coarser"].box
    finer = layout_of(GRIDS["finer"])
    assert np.allclose(np.subtract(GRIDS["finer"].box.begin, finer.model.box.begin), 8)


def test_blocks_are_of_about_one_size():
    assert layout_of(VoxelGrid((8, 8, 8), (0, 0, 0), (300, 300, 300)), 256).block_shape == (192, 192, 192)
    assert layout_of(VoxelGrid((8, 8, 8), (0, 0, 0), (256, 100, 30)), 256).block_shape == (256, 128, 64)
    assert layout_of(VoxelGrid((32, 32, 32), (0, 0, 0), (1000,) * 3), 128).chunks == (32, 32, 32)


def test_many_channels_make_blocks_thinner_along_x():
    grid = VoxelGrid((4, 4, 4), (0, 0, 0), (1024, 1024, 1024))
    assert layout_of(grid, 256, channels=3).block_shape == (512, 512, 256)
    assert layout_of(grid, 256, channels=14).block_shape == (512, 512, 64)
    few, many = (layout_of(grid, 256, channels=c).plan(1, [1]) for c in (3, 14))
    assert few.windows == many.windows, "which costs no forward pass"
    assert many.bytes < 1.2e9
