"""What the pictures are read from: registered, three-state, in bounded memory."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import numpy as np
import pytest
from numpy.typing import NDArray

from connectomics.geometry import VoxelGrid
from connectomics.io import store
from connectomics.io.multiscale import Multiscale
from connectomics.metrics.cellmap_metrics import Counts
from connectomics.pages.report import crops, slice_viewer
from connectomics.pages.report.volumes import Findings, Item, Labels, examine, plain_labels, plane_grid, read_plane

from .conftest import GRIDS, Made, balls


def item_of(made: Made, crop: str, name: str = "mito") -> Item:
    """Truth and raw of a crop, no prediction."""
    dataset, grid = GRIDS[crop]
    truth = plain_labels(store.join(str(made.root / "truth.zarr"), crop, name), name)
    raw = Multiscale.open(made.root / "data" / dataset / f"{dataset}.zarr/recon-1/em/fibsem-uint8")
    return Item(dataset, crop, name, grid, truth=truth, raw=raw)


@pytest.mark.parametrize("crop", list(GRIDS))
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_raw_and_truth_of_a_slice_lie_on_each_other(made: Made, crop: str, axis: int) -> None:
    item = item_of(made, crop)
    for number, (middle, _) in enumerate(balls(item.grid), start=1):
        index = round(float(item.grid.to_index(middle)[axis]))
        plane = read_plane(item, axis, index, longest=512)
        assert plane.raw is not None
        assert plane.inside is not None
        assert plane.inside.all()
        near = np.zeros(plane.truth.shape, bool)
        where = np.argwhere(plane.truth == number)
        low, high = where.min(axis=0), where.max(axis=0) + 1
        near[max(0, low[0] - 2) : high[0] + 2, max(0, low[1] - 2) : high[1] + 2] = True
        darkness = np.where(near, np.clip((180 - plane.raw) / 120, 0, 1), 0)
        rows, columns = (a for a in range(3) if a != axis)
        found = np.array([(darkness.sum(axis=1 - k) * np.arange(s)).sum() for k, s in enumerate(darkness.shape)])
        middle_of_raw = found / darkness.sum()
        expected = item.grid.to_index(middle)[[rows, columns]]
        assert np.allclose(middle_of_raw, expected, atol=0.15)
        assert np.mean((darkness > 0.5)[near] == (plane.truth == number)[near]) > 0.93


def test_a_slice_keeps_the_true_proportions_of_oblong_voxels(made: Made) -> None:
    item = item_of(made, "crop9")
    xz = read_plane(item, 1, 10, longest=512)
    assert xz.truth.shape == (12, 28)
    assert xz.extent == pytest.approx((12 * 20.96, 28 * 8.0))
    row = crops.draw_plane(item, xz, Findings(), itertools.count()).html
    assert f'viewBox="0 0 {28 * 8.0:g} {12 * 20.96:g}"' in row
    assert 'preserveAspectRatio="none"' in row


def test_a_large_slice_is_shrunk_by_whole_factors_over_the_same_box() -> None:
    grid = VoxelGrid((8.0, 4.0, 4.0), (0.0, 2.0, 2.0), (100, 1000, 300))
    xy = plane_grid(grid, 0, 50, longest=384)
    assert xy.shape == (1, 334, 300)
    assert xy.voxel_size == (8.0, 12.0, 4.0)
    assert xy.box.begin == (396.0, 0.0, 0.0)


@dataclass
class Recorded:
    """Labels from a function of the grid, which remember the largest block that was read."""

    grid: VoxelGrid
    instance: bool
    at: tuple[int, int, int]
    largest: list[int] = field(default_factory=lambda: [0])
    layers: set[int] = field(default_factory=set)

    def read(self, grid: VoxelGrid) -> Labels:
        self.largest[0] = max(self.largest[0], grid.size)
        self.layers.add(int(grid.translation[0]))
        values = np.zeros(grid.shape, np.uint8)
        first = np.asarray(self.at) - np.round(self.grid.to_index(grid.translation)).astype(int)
        if np.all(first >= 0) and np.all(first < grid.shape):
            values[tuple(first)] = 1
        return values, np.ones(grid.shape, bool)


def test_large_volumes_are_looked_through_block_by_block_and_only_in_part() -> None:
    grid = VoxelGrid((1.0, 1.0, 1.0), (0.0, 0.0, 0.0), (640, 600, 600))
    truth = Recorded(grid, False, (5, 300, 400))
    found = examine(Item("d", "crop1", "er", grid, truth=truth), most_voxels=2 * 64 * 600 * 600)
    assert truth.largest[0] <= 64 * 256 * 512
    assert truth.layers == {0, 576}
    assert found.share == pytest.approx(0.2)
    assert found.position == (5, 300, 400)
    assert found.counts.fn == 1


def test_an_empty_class_shows_the_middle_of_its_crop() -> None:
    grid = VoxelGrid((1.0, 1.0, 1.0), (0.0, 0.0, 0.0), (10, 20, 30))
    found = examine(Item("d", "crop1", "er", grid, truth=Recorded(grid, False, (99, 0, 0))))
    assert found.position == (5, 10, 15)


@dataclass(frozen=True)
class Fixed:
    """Labels that are an array."""

    grid: VoxelGrid
    instance: bool
    values: NDArray[np.integer]
    known: NDArray[np.bool_]

    def read(self, grid: VoxelGrid) -> Labels:
        part = self.grid.slices(grid.box)
        return self.values[part], self.known[part]


def line(values: list[int]) -> NDArray[np.integer]:
    return np.array(values, np.uint16).reshape(1, 1, -1)


def test_splits_and_merges_are_wrong_objects_and_missed_ones_are_not() -> None:
    truth = line([1, 1, 1, 1, 0, 2, 2, 2, 0, 3, 3, 0, 4])
    found = line([5, 5, 5, 6, 0, 7, 7, 7, 7, 7, 7, 0, 0])  # 1 is split, 2 and 3 are merged, 4 is missed
    grid = VoxelGrid((1.0, 1.0, 1.0), (0.0, 0.0, 0.0), (1, 1, 13))
    known = np.ones(truth.shape, bool)
    item = Item(
        "d", "c", "mito", grid, truth=Fixed(grid, True, truth, known), prediction=Fixed(grid, True, found, known)
    )
    looked = examine(item)
    assert looked.matched == {1: 5, 2: 7}
    assert looked.partner == {5: 1, 6: 1, 7: 2}
    assert looked.counts == Counts(9, 1, 1, 2)
    wrong = crops.wrong_objects(read_plane(item, 0, 0, 64), looked)
    assert wrong.astype(int).tolist() == [[0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 1, 0, 0]]


def test_what_is_not_annotated_is_neither_counted_nor_shown_as_an_error() -> None:
    truth, found = line([1, 1, 0, 0]), line([0, 0, 1, 1])
    known = line([1, 0, 1, 0]) > 0
    grid = VoxelGrid((1.0, 1.0, 1.0), (0.0, 0.0, 0.0), (1, 1, 4))
    item = Item(
        "d", "c", "er", grid, truth=Fixed(grid, False, truth, known), prediction=Fixed(grid, False, found, known)
    )
    looked = examine(item)
    assert (looked.counts, looked.unknown) == (Counts(0, 1, 1, 0), 2)
    layers = crops.layers(item, read_plane(item, 0, 0, 64), looked)
    assert layers["errors"][0, 1].tolist() == layers["errors"][0, 3].tolist()
    assert layers["truth"][0, 1].tolist() == layers["errors"][0, 1].tolist()


def test_raw_that_is_not_there_is_left_transparent(made: Made) -> None:
    item = item_of(made, "crop7")
    outside = item.grid.crop((0, 0, -40), (1, 30, 60))
    plane = read_plane(Item("d", "crop7", "mito", outside, truth=item.truth, raw=item.raw), 0, 0, 64)
    gray = crops.gray_layer(plane, (0.0, 255.0))
    assert gray.shape == (30, 60, 4)
    assert not gray[:, :2, 3].any()
    assert gray[:, 40:, 3].all()


def test_the_viewer_has_evenly_spread_slices_of_all_classes_on_one_grid(made: Made) -> None:
    assert slice_viewer.slice_positions(16, 16) == list(range(16))
    assert slice_viewer.slice_positions(64, 16) == list(range(2, 64, 4))
    assert slice_viewer.slice_positions(0, 16) == []
    items = [item_of(made, "crop9", name) for name in ("mito", "er")]
    grid = slice_viewer.common_grid(items)
    assert grid.box.contains(items[0].grid.box, tolerance=1e-6)
    html = slice_viewer.viewer(items, 1, (200.0, 200.0, 200.0))
    assert html.count('class="over truth"') == 2 * 3
    assert '<option value="1" selected>er</option>' in html
    assert f'max="{items[0].grid.shape[0] - 1}"' in html


def test_a_single_layer_has_no_viewer(made: Made) -> None:
    item = item_of(made, "crop7")
    flat = Item("d", "crop7", "mito", item.grid.crop((3, 0, 0), (1, 30, 36)), truth=item.truth, raw=item.raw)
    assert slice_viewer.viewer([flat], 0, (0.0, 0.0, 0.0)) == ""


def test_half_of_a_viewers_slices_are_those_that_someone_wants_to_see() -> None:
    positions = slice_viewer.slice_positions(1000, 8, [17, 17, 990, 3000, 5, 600, 700])
    assert {17, 990, 999, 5} <= set(positions)
    assert len(positions) == 8
    assert positions == sorted(positions)
    assert 600 not in positions
