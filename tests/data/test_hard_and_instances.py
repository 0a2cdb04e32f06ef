"""Sampling by object and by recent loss."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from numpy.typing import NDArray

from connectomics.cellmap import catalog
from connectomics.cellmap.catalog import Catalog, Crop
from connectomics.data import foreground
from connectomics.data.dataset.dataset_cellmap import CellMapMultiClassDataset, PatchOptions
from connectomics.data.foreground import ObjectPoints, object_points
from connectomics.data.patches import PackedPatch, collate
from connectomics.data.regions import Regions, region_weights
from connectomics.data.sampling import PatchRequest, PatchSampler, SampledCrop
from connectomics.errors import ConfigError, InputError
from connectomics.geometry import VoxelGrid
from tests.cellmap.roots import grid_of, write_label, write_raw


@pytest.fixture(scope="module")
def crop(tmp_path_factory: pytest.TempPathFactory) -> Crop:
    """Objects of 2000, 16 and 1 voxels; 255 is an ID, and mito_mem is a mask."""
    folder = tmp_path_factory.mktemp("objects")
    grid = grid_of((24, 20, 20), 4.0, 8.0)
    ids = np.zeros(grid.shape, np.uint16)
    ids[2:7] = 9
    ids[10:14, 3:5, 3:5], ids[20, 19, 0] = 255, 3
    write_raw(folder, "set-a", np.zeros(grid.shape, np.uint8), grid)
    write_label(folder, "set-a", "crop1", "mito", ids, grid, kind="instance", levels=2)
    write_label(folder, "set-a", "crop1", "mito_mem", (ids > 0).astype(np.uint8), grid)
    return Catalog.open(str(folder)).crop("set-a", "crop1")


def numbers_at(crop: Crop, name: str, points: NDArray[np.float64]) -> NDArray[np.unsignedinteger]:
    label = crop.labels[name]
    at = np.rint(label.grid.to_index(points)).astype(int)
    return label.read_stored((0, 0, 0), label.grid.shape)[tuple(at.T)]


class TestObjects:
    def test_every_object_has_positions_in_it_and_small_ones_all_of_theirs(self, crop: Crop) -> None:
        found = object_points(crop, "mito", seed=0)
        sizes = np.diff(found.starts).tolist()
        assert sizes == [1, 512, 16]  # by ID: 3, 9, 255
        for number, (ID, size) in enumerate(zip((3, 9, 255), sizes, strict=True)):
            points = found.points[found.starts[number] : found.starts[number + 1]]
            assert set(numbers_at(crop, "mito", points)) == {ID}
            assert len(np.unique(points, axis=0)) == size
        z = found.points[1:513, 0]  # uniform over 5 planes
        assert np.unique(z, return_counts=True)[1] == pytest.approx([102] * 5, abs=35)

    def test_positions_do_not_depend_on_the_blocks(self, crop: Crop, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = object_points(crop, "mito", seed=1)
        monkeypatch.setattr(catalog, "_BLOCK_VOXELS", 20 * 20 * 3)
        parts = object_points(crop, "mito", seed=1)
        np.testing.assert_array_equal(parts.starts, whole.starts)
        np.testing.assert_array_equal(parts.points, whole.points)

    def test_many_objects_keep_fewer_each(self, crop: Crop, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(foreground, "_OBJECT_POINTS", 9)
        assert np.diff(object_points(crop, "mito", seed=0).starts).tolist() == [1, 4, 4]

    def test_a_mask_and_a_missing_class_have_no_objects(self, crop: Crop) -> None:
        for name in ("mito_mem", "er"):
            found = object_points(crop, name, seed=0)
            assert len(found) == 0
            assert found.points.shape == (0, 3)


def objects_of(*places: tuple[float, int]) -> ObjectPoints:
    """Objects with so many positions at z."""
    points = np.concatenate([np.full((n, 3), z) for z, n in places])
    return ObjectPoints(points, np.cumsum([0, *(n for _, n in places)]))


class TestInstanceStrategy:
    CROPS = (
        SampledCrop("a", 1.0, {}, {"mito": objects_of((1.0, 500), (2.0, 1))}),
        SampledCrop("a", 1.0, {}, {}),
        SampledCrop("b", 900.0, {}, {"mito": objects_of((3.0, 7)), "ves": objects_of((4.0, 9))}),
    )

    def sampler(self, **options: object) -> PatchSampler:
        settings = {"classes": ["mito", "er", "ves"], "sampling": {"instance": 1.0}} | options
        return PatchSampler(self.CROPS, 4000, **settings)  # type: ignore[arg-type]

    def test_every_object_of_a_class_counts_alike(self) -> None:
        requests = list(self.sampler())
        drawn = Counter((r.drawn_by, r.index, None if r.point is None else r.point[0]) for r in requests)
        mito, ves = "instance mito", "instance ves"
        assert set(drawn) == {(mito, 0, 1.0), (mito, 0, 2.0), (mito, 2, 3.0), (ves, 2, 4.0)}
        assert [drawn[mito, c, z] / 4000 for c, z in ((0, 1.0), (0, 2.0), (2, 3.0))] == pytest.approx(
            [1 / 6] * 3, abs=0.02
        )
        assert drawn[ves, 2, 4.0] == pytest.approx(2000, abs=8)  # stratified

    def test_classes_have_weights(self) -> None:
        found = Counter(r.drawn_by for r in self.sampler(class_weights={"ves": 0.0}))
        assert set(found) == {"instance mito"}

    def test_without_objects_the_rest_of_the_mixture_is_drawn_or_it_is_an_error(self) -> None:
        rest = self.sampler(classes=["er"], sampling={"instance": 1.0, "uniform": 1.0})
        assert {r.drawn_by for r in rest} == {"uniform"}
        with pytest.raises(ConfigError, match="only instance has a weight, but none of er is annotated with IDs"):
            self.sampler(classes=["er"])


GRIDS = (
    VoxelGrid((8.0, 8.0, 8.0), (104.0, 4.0, 4.0), (40, 16, 9)),
    VoxelGrid((8.0, 8.0, 8.0), (-4.0, 4.0, 4.0), (5, 33, 16)),
)
REGIONS = Regions.of(GRIDS, (16, 16, 16))


class TestRegions:
    def test_they_are_about_as_large_as_a_patch(self) -> None:
        assert REGIONS.shapes == ((2, 1, 1), (1, 2, 1))
        assert REGIONS.starts == (0, 2, 4)
        assert len(REGIONS) == 4

    def test_every_voxel_is_in_the_region_that_draws_it(self) -> None:
        rng = np.random.default_rng(0)
        for number in range(4):
            for u in (*rng.random((20, 3)), np.zeros(3), np.full(3, 1 - 1e-9)):
                crop, place = REGIONS.place(number, u)
                assert REGIONS.number(crop, place) == number
        assert REGIONS.number(0, (-900.0, 0.0, 0.0)) == 0  # beyond the crop: the nearest
        assert REGIONS.number(0, (9000.0, 0.0, 0.0)) == 1

    def test_weights_follow_the_loss_and_unseen_regions_come_first(self) -> None:
        np.testing.assert_allclose(region_weights(np.array([0.5, np.nan, 1.0, 0.0])), [0.5, 1.0, 1.0, 0.025])
        np.testing.assert_array_equal(region_weights(np.full(3, np.nan)), np.ones(3))
        np.testing.assert_array_equal(region_weights(np.zeros(3)), np.ones(3))


class TestHardStrategy:
    def sampler(self) -> PatchSampler:
        crops = [SampledCrop("a", float(grid.size)) for grid in GRIDS]
        return PatchSampler(crops, 4000, classes=["mito"], sampling={"hard": 1.0}, regions=REGIONS, seed=3)

    def regions_of(self, sampler: PatchSampler) -> NDArray[np.float64]:
        drawn = [REGIONS.number(r.index, r.point) for r in sampler if r.point is not None]
        assert len(drawn) == 4000
        return np.bincount(drawn, minlength=4) / 4000

    def test_regions_are_drawn_by_their_loss(self) -> None:
        sampler = self.sampler()
        assert self.regions_of(sampler) == pytest.approx([0.25] * 4, abs=0.02)
        sampler.prefer(np.array([0.1, 0.3, np.nan, 0.3]))
        assert self.regions_of(sampler) == pytest.approx([0.1, 0.3, 0.3, 0.3], abs=0.02)

    def test_requests_depend_on_seed_epoch_position_and_losses_alone(self) -> None:
        first, second = self.sampler(), self.sampler()
        for sampler in (first, second):
            sampler.prefer(np.array([0.1, 0.3, np.nan, 0.3]))
        assert list(first) == [second.request(0, n) for n in range(4000)]

    def test_it_needs_regions(self) -> None:
        with pytest.raises(InputError, match="needs regions"):
            PatchSampler([SampledCrop("a", 1.0)], 10, classes=["mito"], sampling={"hard": 1.0})


def test_a_patch_says_in_which_region_its_center_is(crop: Crop) -> None:
    def dataset(regions: bool) -> CellMapMultiClassDataset:
        options = PatchOptions(regions=regions)
        return CellMapMultiClassDataset.of_crops([crop], ["mito"], "train", (6, 6, 6), (8.0, 8.0, 8.0), None, options)

    data = dataset(True)
    regions = data.reader.regions
    assert regions is not None
    patches = [patch for n in range(8) if isinstance(patch := data[PatchRequest(0, None, (n,))], PackedPatch)]
    expected = [regions.number(0, patch.grid.box.center) for patch in patches]
    assert [patch.region for patch in patches] == expected
    assert collate(patches)["region"].tolist() == expected
    assert len(set(expected)) > 1
    plain = dataset(False)[PatchRequest(0, None, (0,))]
    assert isinstance(plain, PackedPatch)
    assert "region" not in collate([plain])
