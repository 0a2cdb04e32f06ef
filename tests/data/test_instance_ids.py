"""Ids of objects from the crop to the batch: with the labels, whatever is cached and however the patch is turned."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from connectomics.cellmap.catalog import Catalog
from connectomics.config import RunConfig
from connectomics.config.heads import instance_classes
from connectomics.data.augmentation import (
    BatchAugmentor,
    CoordinateMap,
    IntensityAugmentor,
    PatchAugmentor,
    build_augmentor,
)
from connectomics.data.cache import cache_key, forecast, prepare
from connectomics.data.datamodule import CellMapDataModule
from connectomics.data.dataset import build
from connectomics.data.dataset.dataset_cellmap import CellMapDataset, CellMapMultiClassDataset, PatchOptions
from connectomics.data.patches import PackedPatch, collate
from connectomics.data.sampling import PatchRequest, place_patch
from connectomics.data.volumes import CropVolume
from connectomics.errors import UnknownNameError
from connectomics.geometry import VoxelGrid
from connectomics.models.batch_labels import labels_of
from tests.cellmap.roots import write_label, write_raw
from tests.data.test_patch_reader import SPATIAL
from tests.data.warp_reference import sample_reference

CLASSES = ["mito", "er", "cell"]
INSTANCES = ("cell", "mito")
#: raw 5.24x4x4 nm, labels half of that
LABELS = VoxelGrid((2.62, 2.0, 2.0), (393.0 + 1.31, 381.0, 381.0), (80, 110, 120))
SEEDS = np.random.default_rng(7).uniform(LABELS.box.begin, LABELS.box.end, (14, 3))


def truth(points: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """``cell`` at world positions (..., 3): Voronoi cells of `SEEDS`, of which every third is a gap. Ids 300, 301...,
    0 in gaps; and how far (nm) the nearest border to another cell is."""
    squared = ((points[..., None, :] - SEEDS) ** 2).sum(-1)
    nearest = squared.argmin(-1)
    # to the plane between the nearest and any other one
    apart = np.linalg.norm(SEEDS[:, None] - SEEDS, axis=-1)[nearest]
    distance = (squared - squared.min(-1, keepdims=True)) / np.where(apart > 0, 2 * apart, 1)
    border = np.where(apart > 0, distance, np.inf).min(-1)
    return np.where(nearest % 3 == 0, 0, nearest + 300), border


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``cell`` as ids, unknown beyond a plane; ``er`` a mask; ``mito`` only as its parts."""
    folder = tmp_path_factory.mktemp("cells")
    rng = np.random.default_rng(3)
    raw = VoxelGrid((5.24, 4.0, 4.0), (2.62, 2.0, 2.0), (170, 220, 220))
    write_raw(folder, "set-a", rng.integers(1, 255, raw.shape, dtype=np.uint8), raw)
    ids, _ = truth(LABELS.to_world(np.stack(np.indices(LABELS.shape), -1)))
    values = ids.astype(np.uint16)
    values[..., 100:] = 255
    write_label(folder, "set-a", "crop1", "cell", values, LABELS, kind="instance", unknown=255)
    odd, none = ids % 2, ids * 0
    for name, mask in (("er", 1 - odd), ("mito_mem", odd), ("mito_lum", none), ("mito_ribo", none)):
        values = mask.astype(np.uint8)
        values[..., 100:] = 255  # of nothing there is anything known: what is present in er is present in cell
        write_label(folder, "set-a", "crop1", name, values, LABELS, unknown=255)
    return folder


def dataset_of(root: Path, augmentations: dict[str, Any] | None = None, **options: Any) -> CellMapMultiClassDataset:
    shape, size = options.pop("patch_size", (24, 24, 24)), options.pop("resolution", (8.0, 8.0, 8.0))
    options.setdefault("instances", INSTANCES)
    augmentor = PatchAugmentor.of(augmentations or {}, shape)
    crops = Catalog.open(str(root)).crops()
    return CellMapMultiClassDataset.of_crops(crops, CLASSES, "train", shape, size, augmentor, PatchOptions(**options))


def patch_of(dataset: CellMapMultiClassDataset, seed: int) -> PackedPatch:
    patch = dataset[PatchRequest(0, None, (seed,))]
    assert isinstance(patch, PackedPatch)
    return patch


def ids_of(patch: PackedPatch) -> NDArray[np.int32]:
    assert patch.ids is not None
    return patch.ids


def check_agrees(ids: NDArray[Any], label: NDArray[Any], known: NDArray[Any]) -> None:
    """An id only where the class is present, 0 exactly where it is known absent, else -1."""
    assert not ((ids > 0) & ~((label > 0) & known)).any()
    np.testing.assert_array_equal(ids == 0, known & (label == 0))
    assert ids.min() >= -1


def same_partition(found: NDArray[Any], wanted: NDArray[Any]) -> bool:
    """Whether two labelings differ in their numbers only."""
    pairs = np.unique(np.stack([found.ravel(), wanted.ravel()]), axis=1)
    return all(len(np.unique(numbers)) == pairs.shape[1] for numbers in pairs)


# -- against the closed form -----------------------------------------------------------------------------------------
SIZES = [(8.0, 8.0, 8.0), (16.0, 16.0, 16.0), (2.0, 2.0, 1.5), (5.24, 4.0, 4.0), (2.62, 2.0, 2.0)]
NAMES = [None, "RandFlipd", "RandRotate90d", "RandAffined", "all"]


@pytest.mark.parametrize(
    ("name", "size"),
    [
        pytest.param(name, size, marks=[] if row == column and row in (0, 2, 4) else [pytest.mark.slow])
        for row, name in enumerate(NAMES)
        for column, size in enumerate(SIZES)
    ],
)
def test_objects_are_where_the_truth_has_them(root: Path, name: str | None, size: tuple[float, float, float]) -> None:
    """At every voxel size and through every fused transform, away from borders by what a voxel can hide."""
    shape = tuple(int(np.clip(200 / s, 10, 40)) for s in size)
    shape = (min(shape),) * 3
    chosen = {} if name is None else SPATIAL if name == "all" else {name: SPATIAL[name]}
    dataset = dataset_of(root, chosen, patch_size=shape, resolution=size)
    spatial = None if dataset.reader.augmentor is None else dataset.reader.augmentor.spatial
    volume, met = dataset.volumes[0], set()
    for seed in range(12):
        patch = patch_of(dataset, seed)
        rng = np.random.default_rng((seed,))  # the reader's own draws, again
        grid = place_patch(volume.grid, shape, None, rng)
        moved = CoordinateMap.identity() if spatial is None else spatial.draw(rng)
        offsets = np.stack(np.meshgrid(*[np.arange(n) - (n - 1) / 2 for n in shape], indexing="ij"), -1)
        world = np.asarray(grid.box.center) + moved(offsets) * np.array(size)
        wanted, border = truth(world)
        reach = np.linalg.norm(np.maximum(size, LABELS.voxel_size))  # nm: half a voxel moved, half a voxel voted
        inside = ((world > np.array(LABELS.box.begin) + reach) & (world < np.array(LABELS.box.end) - reach)).all(-1)
        unknown = LABELS.to_world((0, 0, 99.5))[2]
        sure = inside & (border > reach) & (world[..., 2] < unknown - reach)
        cell = ids_of(patch)[0]
        assert (cell[sure] >= 0).all()
        np.testing.assert_array_equal(cell[sure] == 0, wanted[sure] == 0)
        assert same_partition(cell[sure], wanted[sure])
        assert (cell[inside & (world[..., 2] > unknown + reach)] == -1).all()
        met |= set(np.unique(wanted[sure]))
    assert len(met) > 2


@pytest.mark.parametrize("name", [None, *SPATIAL, "all"])
def test_ids_agree_with_labels_and_masks_have_none(root: Path, name: str | None) -> None:
    dataset = dataset_of(root, {} if name is None else SPATIAL if name == "all" else {name: SPATIAL[name]})
    largest, any_cell = 0, False
    for seed in range(4):
        patch = patch_of(dataset, seed)
        assert patch.instances == INSTANCES
        sample = patch.dense()
        assert sample["ids"].dtype == np.int32
        assert sample["ids"].shape == (2, 24, 24, 24)
        for row, name_of in zip(sample["ids"], INSTANCES, strict=True):
            at = CLASSES.index(name_of)
            check_agrees(row, sample["label"][at], sample["known"][at])
        largest, any_cell = max(largest, sample["ids"][0].max()), any_cell or (sample["label"][0] > 0).any()
        assert sample["ids"][1].max() <= 0  # mito is known through its parts, which are masks
    assert largest >= 300
    assert any_cell


@pytest.mark.parametrize("name", [None, "RandRotate90d", "all"])
def test_the_pass_gives_the_reference_s_ids(root: Path, name: str | None) -> None:
    """One pass moves state and object together; the plain reference looks them up voxel by voxel."""
    dataset = dataset_of(root, {} if name is None else SPATIAL if name == "all" else {name: SPATIAL[name]})
    spatial = None if dataset.reader.augmentor is None else dataset.reader.augmentor.spatial
    volume = dataset.volumes[0]
    whole = volume.arrays([-60] * 3, [90] * 3)
    for seed in range(3):
        patch = patch_of(dataset, seed)
        rng = np.random.default_rng((seed,))
        grid = place_patch(volume.grid, (24,) * 3, None, rng)
        moved = CoordinateMap.identity() if spatial is None else spatial.draw(rng)
        _, codes = sample_reference(whole, volume.grid.to_index(np.asarray(grid.box.center)), moved, (24,) * 3)
        wanted = whole.states.numbers[:, codes]
        different = (ids_of(patch) != wanted).mean()  # float32 positions fall on either side of a face now and then
        assert different < (1e-3 if name == "all" else 1e-12)


# -- three ways to read ----------------------------------------------------------------------------------------------
def test_cached_and_streamed_ids_are_the_same(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ways = {
        mode: dataset_of(root, SPATIAL, cache=mode, cache_dir=str(tmp_path), inputs=(((32.0,) * 3, (12, 12, 12)),))
        for mode in ("none", "memory", "disk")
    }  # fmt: skip
    expected = [patch_of(ways["none"], seed) for seed in range(4)]
    whole = ways["none"].volumes[0].read_ids(ways["none"].volumes[0].grid.grow(2))
    for mode in ("memory", "disk"):
        prepare(ways[mode].all_volumes)
        assert ways[mode].input_volumes[0][0].instances == ()  # a further input has no labels

    def refuse(self: CropVolume, grid: VoxelGrid) -> None:
        raise AssertionError(f"read {grid} from Zarr")

    monkeypatch.setattr(CropVolume, "decode_labels", refuse)
    for mode in ("memory", "disk"):
        for seed, want in enumerate(expected):
            got = patch_of(ways[mode], seed)
            np.testing.assert_array_equal(ids_of(got), ids_of(want))
            np.testing.assert_array_equal(got.dense()["label"], want.dense()["label"])
        volume = ways[mode].volumes[0]
        np.testing.assert_array_equal(volume.read_ids(volume.grid.grow(2)), whole)


def test_where_there_is_no_raw_nothing_is_known(root: Path) -> None:
    volume = dataset_of(root).volumes[0]
    grid = volume.grid.grow(2)
    ids = volume.read_ids(grid)
    label, known = volume.read_labels(grid)
    assert not known.all()
    for row, name in zip(ids, INSTANCES, strict=True):
        at = CLASSES.index(name)
        check_agrees(row, label[at], known[at])


def test_the_cache_tells_runs_with_and_without_ids_apart(root: Path, tmp_path: Path) -> None:
    """A run without them has the entries that it always had: no name, file or byte of them is another."""
    without = dataset_of(root, instances=(), cache="disk", cache_dir=str(tmp_path))
    several = [without, dataset_of(root, instances=("cell",), cache="disk", cache_dir=str(tmp_path)),
               dataset_of(root, cache="disk", cache_dir=str(tmp_path))]  # fmt: skip
    volumes = [dataset.volumes[0] for dataset in several]
    assert len({cache_key(volume) for volume in volumes}) == 3
    prepare(volumes)
    entries = [tmp_path / cache_key(volume) for volume in volumes]
    said = [json.loads((entry / "entry.json").read_text()) for entry in entries]
    assert "instances" not in said[0]
    assert [s.get("instances") for s in said[1:]] == [["cell"], ["cell", "mito"]]
    assert [s["files"]["states.npy"]["shape"][1:] for s in said] == [[2, 1], [3], [4]]
    assert [set(s["files"]) == set(said[0]["files"]) for s in said] == [True] * 3
    assert said[0]["counts"] == said[1]["counts"]
    for volume, entry in zip(volumes, entries, strict=True):
        size = sum(file.stat().st_size for file in entry.iterdir())
        assert size < forecast(volume) + 4096
    for with_ids, plain in pairwise(reversed(several)):
        for seed in range(2):
            a, b = patch_of(with_ids, seed), patch_of(plain, seed)
            np.testing.assert_array_equal(a.codes, b.codes)
            np.testing.assert_array_equal(a.states.to_array(), b.states.to_array())
            np.testing.assert_array_equal(a.images[0], b.images[0])


# -- batches ---------------------------------------------------------------------------------------------------------
def test_batches_have_ids_where_they_are_asked_for(root: Path) -> None:
    dataset = dataset_of(root, SPATIAL)
    patches = [patch_of(dataset, seed) for seed in range(3)]
    batch = collate(patches)
    assert batch["ids"].dtype == torch.int32
    assert batch["ids"].shape == (3, 2, 24, 24, 24)
    for number, patch in enumerate(patches):
        np.testing.assert_array_equal(batch["ids"][number].numpy(), ids_of(patch))
    plain = collate([patch_of(dataset_of(root, SPATIAL, instances=()), seed) for seed in range(3)])
    assert "ids" not in plain
    assert all(torch.equal(plain[name], batch[name]) for name in plain)


def test_an_epoch_with_ids_does_not_depend_on_workers_or_cache(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "instance_classes", lambda config: INSTANCES)  # as heads of the network would ask
    found = []
    for options in ({}, {"cache": "disk", "cache_dir": str(tmp_path), "num_workers": 2}):
        config = RunConfig()
        config.dataset.data_root, config.dataset.classes = str(root), CLASSES
        config.dataset.train_val_split = 1.0
        config.data.patch_size, config.data.patches_per_epoch = [16, 16, 16], 4
        config.data.sampling = {"volume": 1.0}  # places of a class are other ones where its index is in the cache
        config.data.augmentations = {"RandFlipd": SPATIAL["RandFlipd"]}
        for name, value in {"num_workers": 0, "batch_size": 2, **options}.items():
            setattr(config.data, name, value)
        module = CellMapDataModule(config)
        module.setup()
        found.append(list(module.train_dataloader()))
    assert len(found[0]) == len(found[1]) == 2
    for a, b in zip(*found, strict=True):
        assert a["ids"].shape == (2, 2, 16, 16, 16)
        assert torch.equal(a["ids"], b["ids"])
        assert torch.equal(a["image"], b["image"])
    assert instance_classes is not build.instance_classes
    assert build.patch_options(config).instances == INSTANCES


def test_ids_move_with_sections_on_the_device(root: Path) -> None:
    dataset = dataset_of(root)
    batch = collate([patch_of(dataset, seed) for seed in range(3)])
    kinds = {"noise": {"prob": 1.0}, "shifted_sections": {"prob": 1.0, "sections": [8, 16], "displacement": [4, 8]}}
    own = IntensityAugmentor.from_config(kinds, (8.0, 8.0, 8.0))
    assert own is not None
    before = batch["ids"].clone()
    moved = BatchAugmentor(own)(batch)
    assert torch.equal(batch["ids"], before)
    assert moved["ids"].dtype == torch.int32
    assert not torch.equal(moved["ids"], before)
    labels = labels_of(moved)
    for channel, name in enumerate(INSTANCES):
        label, known = labels.of(CLASSES.index(name))
        for number in range(3):
            check_agrees(*(t[number].numpy() for t in (moved["ids"][:, channel], label, known)))
    still = IntensityAugmentor.from_config({"noise": {"prob": 1.0}}, (8.0, 8.0, 8.0))
    assert still is not None
    assert BatchAugmentor(still)(batch)["ids"] is batch["ids"]


# -- transforms that are not fused -----------------------------------------------------------------------------------
BOTH = {"keys": ["image", "label"], "prob": 1.0}


def test_monai_turns_ids_exactly(root: Path) -> None:
    """`RandAxisFlipd` is none of the fused ones: a flip of what the reader gives."""
    plain = dataset_of(root)
    flipped = dataset_of(root, {"RandAxisFlipd": BOTH})
    axes = set()
    for seed in range(6):
        want, got = patch_of(plain, seed), patch_of(flipped, seed)
        same = [axis for axis in range(3) if np.array_equal(np.flip(want.images[0], axis + 1), got.images[0])]
        assert same
        np.testing.assert_array_equal(np.flip(ids_of(want), same[0] + 1), ids_of(got))
        axes |= set(same)
    assert len(axes) > 1


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("RandGridDistortiond", {"num_cells": 3, "distort_limit": 0.2, "mode": ["bilinear", "bilinear"]}),
        ("RandZoomd", {"min_zoom": 0.7, "max_zoom": 0.8, "mode": ["nearest", "nearest"]}),
        ("RandGridDistortiond", {"num_cells": 3, "distort_limit": 0.2, "mode": ["bilinear", "nearest"]}),
    ],
)
def test_monai_resamples_ids_by_nearest_in_agreement_with_labels(
    root: Path, name: str, arguments: dict[str, Any]
) -> None:
    dataset = dataset_of(root, {name: {**BOTH, **arguments}})
    assert dataset.reader.augmentor is not None
    assert dataset.reader.augmentor.moves_labels
    plain = dataset_of(root)
    for seed in range(4):
        patch = patch_of(dataset, seed)
        sample, before = patch.dense(), ids_of(patch_of(plain, seed))
        for channel, name_of in enumerate(INSTANCES):
            at = CLASSES.index(name_of)
            check_agrees(sample["ids"][channel], sample["label"][at], sample["known"][at])
            assert set(np.unique(sample["ids"][channel])) <= set(np.unique(before[channel])) | {-1}
        present = sample["label"][2] > 0
        assert (sample["ids"][0][present] > 0).mean() > 0.9  # but for a rim, where vote and nearest differ


def test_plain_samples_carry_ids(root: Path) -> None:
    """By hand: data sets of dense samples, with a chain of MONAI transforms or without one."""
    made = {"data_root": str(root), "datasets": None, "classes": CLASSES, "mode": "val", "patch_size": (16, 16, 16)}
    options = {"instances": INSTANCES}
    plain = CellMapMultiClassDataset(**made, mode_kwargs=options)[0]
    assert plain["ids"].shape == (2, 16, 16, 16)
    one = CellMapDataset(**made, mode_kwargs=options)
    assert one[0]["label"].shape == (1, 16, 16, 16)
    assert one[0]["ids"].shape == (2, 16, 16, 16)
    chain = build_augmentor({"RandFlipd": {**BOTH, "spatial_axis": 0}}, (16, 16, 16))
    turned = CellMapMultiClassDataset(**made, mode_kwargs=options, augmentor=chain)[0]
    np.testing.assert_array_equal(turned["ids"], plain["ids"][:, ::-1])
    np.testing.assert_array_equal(turned["label"], plain["label"][:, ::-1])
    assert "ids" not in CellMapMultiClassDataset(**made)[0]


def test_what_does_not_fit_is_refused(root: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown instance class 'mitto'.*did you mean 'mito'"):
        dataset_of(root, instances=("mitto",))


def test_a_run_without_heads_asks_for_no_ids() -> None:
    assert instance_classes(RunConfig()) == ()
