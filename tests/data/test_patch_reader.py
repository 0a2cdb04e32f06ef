"""From a request to a patch: what is read, where, and that raw, labels and further views stay together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from connectomics.cellmap.catalog import Catalog
from connectomics.data.augmentation import PatchAugmentor
from connectomics.data.cache import prepare
from connectomics.data.dataset.dataset_cellmap import CellMapMultiClassDataset, PatchOptions
from connectomics.data.patch_reader import context_needed
from connectomics.data.patches import PackedPatch, collate
from connectomics.data.sampling import PatchRequest, place_patch
from connectomics.data.volumes import CropVolume
from connectomics.errors import InputError
from connectomics.geometry import Triple, VoxelGrid
from connectomics.inference.raw import FurtherInput, RawSource
from connectomics.io.normalization import Normalization
from tests.cellmap.roots import write_label, write_raw

BOTH = ["image", "label"]
SPATIAL: dict[str, dict[str, Any]] = {
    "RandFlipd": {"keys": BOTH, "prob": 0.7, "spatial_axis": [0, 2]},
    "RandRotate90d": {"keys": BOTH, "prob": 1.0, "spatial_axes": [[0, 1], [0, 2], [1, 2]]},
    "RandAffined": {
        "keys": BOTH, "prob": 1.0, "rotate_range": [0.6, 0.6, 0.6], "scale_range": [0.1, 0.1, 0.1],
        "shear_range": [0.1, 0.1, 0.1, 0.1, 0.1, 0.1], "mode": ["bilinear", "nearest"],
    },
    "RandZoomd": {"keys": BOTH, "prob": 1.0, "min_zoom": 0.8, "max_zoom": 1.2},
    "Rand3DElasticd": {"keys": BOTH, "prob": 1.0, "sigma_range": [5, 7], "magnitude_range": [50, 100]},
}  # fmt: skip


def ball(grid: VoxelGrid, center: NDArray[np.float64], radius: float, soft: float) -> NDArray[np.float64]:
    """1 inside, 0 outside, at the voxel centres; the edge ``soft`` nm wide (0: hard)."""
    z, y, x = np.meshgrid(*grid.axes(), indexing="ij", sparse=True)
    distance = np.sqrt((z - center[0]) ** 2 + (y - center[1]) ** 2 + (x - center[2]) ** 2)
    return (distance < radius).astype(float) if soft == 0 else np.clip((radius - distance) / soft + 0.5, 0, 1)


CENTER = np.array([523.1, 498.7, 531.9])


@pytest.fixture(scope="module")
def ball_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Raw at 5.24x4x4 nm, far beyond the crop, labels at 2.62x2x2: a ball, soft in raw, hard in the label."""
    root = tmp_path_factory.mktemp("ball")
    raw_grid = VoxelGrid((5.24, 4.0, 4.0), (2.62, 2.0, 2.0), (200, 260, 260))
    raw = np.rint(55 + 145 * ball(raw_grid, CENTER, 90.0, 16.0)).astype(np.uint8)
    write_raw(root, "set-a", raw, raw_grid, levels=2)
    grid = VoxelGrid((2.62, 2.0, 2.0), (393.0 + 1.31, 381.0, 381.0), (100, 140, 140))
    write_label(root, "set-a", "crop1", "mito", ball(grid, CENTER, 90.0, 0.0).astype(np.uint8), grid, levels=1)
    return root


def dataset_of(root: Path, augmentations: dict[str, Any] | None = None, **options: Any) -> CellMapMultiClassDataset:
    shape = options.pop("patch_size", (32, 32, 32))
    return CellMapMultiClassDataset.of_crops(
        Catalog.open(str(root)).crops(), ["mito", "er"], "train", shape, (8.0, 8.0, 8.0),
        PatchAugmentor.of(augmentations or {}, shape), PatchOptions(**options),
    )  # fmt: skip


def patch_of(dataset: CellMapMultiClassDataset, seed: int, **request: Any) -> PackedPatch:
    patch = dataset[PatchRequest(request.pop("index", 0), request.pop("point", None), (seed,))]
    assert isinstance(patch, PackedPatch)
    return patch


def centroid(weight: NDArray[np.floating]) -> NDArray[np.float64]:
    """Centre of mass, voxels from the middle."""
    total = weight.sum()
    return np.array([
        (weight.sum(tuple(a for a in range(3) if a != axis)) * (np.arange(n) - (n - 1) / 2)).sum() / total
        for axis, n in enumerate(weight.shape)
    ])  # fmt: skip


def bright(image: NDArray[np.float32]) -> NDArray[np.float64]:
    return np.clip(image.astype(np.float64) * 255 - 55, 0, None)


def test_a_plain_patch_is_what_the_volume_holds(ball_root: Path) -> None:
    dataset = dataset_of(ball_root)
    for seed in range(4):
        patch = patch_of(dataset, seed)
        volume: CropVolume = dataset.volumes[0]
        np.testing.assert_array_equal(patch.images[0][0], volume.read_image(patch.grid))
        label, known = volume.read_labels(patch.grid)
        dense = patch.dense(["mito", "er"])
        np.testing.assert_array_equal(dense["label"], label)
        np.testing.assert_array_equal(dense["known"], known)
        assert known[0].any()
        assert not known[1].any()  # nobody annotated it
        assert patch.grid.same_lattice(volume.grid)


@pytest.mark.parametrize("name", [None, *SPATIAL, "all"])
def test_cached_and_streamed_patches_are_the_same_to_the_bit(
    name: str | None, ball_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = {} if name is None else SPATIAL if name == "all" else {name: SPATIAL[name]}
    plain = dataset_of(ball_root, chosen)
    cached = dataset_of(ball_root, chosen, cache="disk", cache_dir=str(tmp_path))
    expected = [patch_of(plain, seed) for seed in range(5)]
    prepare(cached.all_volumes)

    def refuse(self: CropVolume, grid: VoxelGrid) -> None:
        raise AssertionError(f"read {grid} past the cached context")

    monkeypatch.setattr(CropVolume, "decode_raw", refuse)  # the context is as wide as any draw can look
    monkeypatch.setattr(CropVolume, "decode_labels", refuse)
    for seed, want in enumerate(expected):
        got = patch_of(cached, seed)
        np.testing.assert_array_equal(got.images[0], want.images[0])
        np.testing.assert_array_equal(got.dense()["label"], want.dense()["label"])
        np.testing.assert_array_equal(got.dense()["known"], want.dense()["known"])
        assert (got.seed, got.grid) == (want.seed, want.grid)


@pytest.mark.parametrize("name", [*SPATIAL, "all"])
def test_raw_and_label_stay_registered(name: str, ball_root: Path) -> None:
    dataset = dataset_of(ball_root, SPATIAL if name == "all" else {name: SPATIAL[name]}, patch_size=(40, 40, 40))
    differences = []
    for seed in range(16):
        patch = patch_of(dataset, seed)
        label = patch.dense(["mito"])["label"][0]
        differences.append(centroid(bright(patch.images[0][0])) - centroid(label))
        assert patch.augmentation or name == "RandFlipd"
    # a 0/1 label lags behind a move of less than half a voxel to either side alike; what must not be is a bias
    assert np.abs(np.mean(differences, axis=0)).max() < 0.1
    assert np.abs(differences).max() < 0.4


def test_a_further_input_is_what_prediction_reads(tmp_path: Path) -> None:
    """Noise shows every interpolation: a training patch may be interpolated no more often than a prediction window."""
    grid = VoxelGrid((4.0, 4.0, 4.0), (0.0, 0.0, 0.0), (120, 120, 120))
    noise = np.random.default_rng(0).integers(1, 255, grid.shape, dtype=np.uint8)
    location = write_raw(tmp_path, "set-a", noise, grid, levels=3)
    labels = VoxelGrid((8.0, 8.0, 8.0), (210.0, 214.0, 218.0), (18, 19, 20))  # 2, 6, 10 nm from a voxel of 16 nm
    write_label(tmp_path, "set-a", "crop1", "mito", np.ones(labels.shape, np.uint8), labels)
    dataset = dataset_of(tmp_path, inputs=(((16.0,) * 3, (8, 9, 10)),), patch_size=(10, 10, 10))
    predicted = FurtherInput(RawSource(str(location), Normalization()).read, (16.0,) * 3, (8, 9, 10))
    for seed in range(4):
        patch = patch_of(dataset, seed)
        np.testing.assert_allclose(patch.images[1][0], predicted.around(patch.grid), atol=1 / 255)


@pytest.mark.parametrize("size", [(12.0, 12.0, 12.0), (24.0, 16.0, 8.0), (3.0, 4.0, 20.0)], ids=str)
def test_a_further_input_whose_voxels_are_not_stored_has_the_contrast_of_a_prediction(
    tmp_path: Path, size: Triple
) -> None:
    """Grains of some 8 nm: the next to smallest that voxels of 8 nm can show."""
    grid = VoxelGrid((4.0, 4.0, 4.0), (0.0, 0.0, 0.0), (120, 120, 120))
    grains = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=grid.shape), 1.5)
    raw = np.rint(128 + 40 * grains / grains.std()).clip(0, 255).astype(np.uint8)
    location = write_raw(tmp_path, "set-a", raw, grid, levels=3)
    labels = VoxelGrid((8.0, 8.0, 8.0), (210.0, 214.0, 218.0), (18, 19, 20))
    write_label(tmp_path, "set-a", "crop1", "mito", np.ones(labels.shape, np.uint8), labels)
    dataset = dataset_of(tmp_path, inputs=((size, (8, 9, 6)),), patch_size=(10, 10, 10))
    predicted = FurtherInput(RawSource(str(location), Normalization()).read, size, (8, 9, 6))
    for seed in range(4):
        patch = patch_of(dataset, seed)
        found, expected = patch.images[1].ravel(), predicted.around(patch.grid).ravel()
        assert np.corrcoef(found, expected)[0, 1] > 0.995
        assert found.std() / expected.std() == pytest.approx(1, abs=0.1)
        if size != (12.0, 12.0, 12.0):  # multiples of stored voxels, or finer than them
            np.testing.assert_allclose(found, expected, atol=1 / 255)


@pytest.mark.parametrize(("size", "read"), [(8.0, 4.0), (12.0, 12.0), (64.0, 64.0)])
def test_raw_without_coarser_levels_is_not_sampled_hundreds_of_times_for_a_voxel(
    tmp_path: Path, size: float, read: float
) -> None:
    grid = VoxelGrid((4.0, 4.0, 4.0), (0.0, 0.0, 0.0), (80, 80, 80))
    write_raw(tmp_path, "set-a", np.zeros(grid.shape, np.uint8), grid, levels=1)
    labels = VoxelGrid((8.0, 8.0, 8.0), (100.0, 100.0, 100.0), (18, 19, 20))
    write_label(tmp_path, "set-a", "crop1", "mito", np.ones(labels.shape, np.uint8), labels)
    dataset = dataset_of(tmp_path, inputs=(((size,) * 3, (8, 9, 6)),), patch_size=(10, 10, 10))
    assert dataset.input_volumes[0][0].grid.voxel_size == (read,) * 3
    assert patch_of(dataset, 0).images[1].shape == (1, 8, 9, 6)


def test_a_turned_plane_is_an_exact_copy(tmp_path: Path) -> None:
    """A patch of one plane has an odd side and two even ones: right angles must not point between voxels."""
    grid = VoxelGrid((8.0, 8.0, 8.0), (0.0, 0.0, 0.0), (40, 40, 40))
    raw = np.random.default_rng(0).integers(0, 256, grid.shape, dtype=np.uint8)
    write_raw(tmp_path, "set-a", raw, grid, levels=1)
    write_label(tmp_path, "set-a", "crop1", "mito", (raw > 128).astype(np.uint8), grid, levels=1)
    turns = {"RandRotate90d": {"keys": BOTH, "prob": 1.0, "spatial_axes": [[0, 1], [0, 2], [1, 2]]}}
    dataset = dataset_of(tmp_path, turns, patch_size=(1, 16, 16))
    thick = 0
    for seed in range(12):
        patch = patch_of(dataset, seed)
        sample = patch.dense(["mito"])
        gray = 255 * patch.images[0][0]
        np.testing.assert_allclose(gray, np.rint(gray), atol=1e-3)  # no mean of two voxels
        known = np.asarray(sample["known"][0]) > 0
        assert np.array_equal(np.asarray(sample["label"][0])[known] > 0, gray[known] > 128.5)
        thick += known.mean() > 0.5
    assert thick > 6


def test_no_empty_corners_where_there_is_raw(ball_root: Path) -> None:
    """A turned patch looks beyond itself, and beyond the crop: raw there is read, labels there are unknown."""
    dataset = dataset_of(ball_root, {"RandAffined": SPATIAL["RandAffined"]})
    for seed in range(6):
        patch = patch_of(dataset, seed)
        assert patch.images[0].min() > 50 / 255
        known = patch.dense(["mito"])["known"][0]
        assert known.any()


@pytest.mark.parametrize("augmented", [False, True])
def test_further_views_show_the_same_place(augmented: bool, ball_root: Path, tmp_path: Path) -> None:
    inputs = (((16.0, 16.0, 16.0), (24, 24, 24)), ((8.0, 16.0, 32.0), (40, 20, 12)))
    affine = {"RandAffined": {**SPATIAL["RandAffined"], "shear_range": None}}
    options = {"inputs": inputs, "cache": "disk", "cache_dir": str(tmp_path), "patch_size": (40, 40, 40)}
    dataset = dataset_of(ball_root, affine if augmented else {}, **options)
    prepare(dataset.all_volumes)
    differences: list[list[NDArray[np.float64]]] = [[], []]
    for seed in range(8):
        patch = patch_of(dataset, seed)
        assert [i.shape[1:] for i in patch.images] == [(40, 40, 40), (24, 24, 24), (40, 20, 12)]
        own = centroid(bright(patch.images[0][0])) * 8.0
        for number, (size, _) in enumerate(inputs):
            at = centroid(bright(patch.images[number + 1][0])) * np.array(size)
            differences[number].append((at - own) / np.array(size))
    for found in differences:
        assert np.abs(found).max() < 0.25
        assert np.abs(np.mean(found, axis=0)).max() < 0.1


def test_monai_transforms_that_are_not_fused_run_after(ball_root: Path) -> None:
    """One that moves labels, one that does not."""
    turned = dataset_of(ball_root, {
        "RandFlipd": SPATIAL["RandFlipd"],
        "RandRotated": {"keys": BOTH, "prob": 1.0, "range_x": 0.5, "range_y": 0.5, "range_z": 0.5},
    })  # fmt: skip
    differences = []
    for seed in range(16):
        patch = patch_of(turned, seed, point=CENTER)
        dense = patch.dense(["mito"])
        assert not dense["label"][~dense["known"]].any()
        seen = dense["known"][0]
        if not dense["label"].any():
            continue
        difference = centroid(bright(patch.images[0][0]) * seen) - centroid(dense["label"][0])
        differences.append(difference)
    assert np.abs(np.mean(differences, axis=0)).max() < 0.2
    histogram = {"RandHistogramShiftd": {"keys": ["image"], "prob": 1.0, "num_control_points": 5}}
    plain, shifted = patch_of(dataset_of(ball_root), 3), patch_of(dataset_of(ball_root, histogram), 3)
    assert not np.array_equal(plain.images[0], shifted.images[0])
    np.testing.assert_array_equal(plain.codes, shifted.codes)
    np.testing.assert_array_equal(patch_of(dataset_of(ball_root, histogram), 3).images[0], shifted.images[0])


def test_what_the_device_can_do_is_left_to_it(ball_root: Path) -> None:
    noise = {"RandGaussianNoised": {"keys": ["image"], "prob": 1.0, "mean": 0.0, "std": 0.1}}
    assert PatchAugmentor.of(noise, (32, 32, 32)) is None
    assert PatchAugmentor.of({}, (32, 32, 32)) is None


def test_a_share_of_known_voxels_can_be_asked_for(ball_root: Path) -> None:
    """The crop is 34x35x35 voxels: a patch of 16 fits, one of 64 holds all of it and can know a sixth at most."""
    for patch_size, least in (((16, 16, 16), 1.0), ((64, 64, 64), 0.99)):
        dataset = dataset_of(ball_root, min_known=least, patch_size=patch_size)
        for seed in range(4):
            known = patch_of(dataset, seed).dense(["mito"])["known"].mean()
            reachable = np.prod([min(n, p) / p for n, p in zip(dataset.volumes[0].grid.shape, patch_size, strict=True)])
            assert known >= 0.97 * least * reachable


@pytest.mark.parametrize("crop", [12, 40, 100])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_the_context_holds_every_look(crop: int, scale: float) -> None:
    """By brute force: no patch that can be placed looks beyond it, and the one that looks farthest needs it."""
    patch, reach = 32, 27.6
    context = context_needed((crop,) * 3, (patch,) * 3, (reach * scale,) * 3, (scale,) * 3)[0]
    lattice = VoxelGrid((1.0,) * 3, (0.5,) * 3, (crop,) * 3)
    rng = np.random.default_rng(0)
    beyond = 0.0
    for _ in range(400):
        middle = place_patch(lattice, (patch,) * 3, None, rng).box.center[0]
        beyond = max(beyond, reach - middle, middle + reach - crop)
    assert beyond * scale <= context <= max(0.0, beyond * scale) + 2


def test_a_batch_holds_crops_with_different_states(ball_root: Path) -> None:
    dataset = dataset_of(ball_root)
    patches = [patch_of(dataset, seed) for seed in range(2)]
    batch = collate(patches)
    for number, patch in enumerate(patches):
        dense = patch.dense()
        codes = batch["codes"][number].numpy()
        np.testing.assert_array_equal(batch["present"][number].numpy()[:, codes], dense["label"] > 0)
        np.testing.assert_array_equal(batch["known_states"][number].numpy()[:, codes], dense["known"])
    with pytest.raises(InputError, match="at least one"):
        collate([])
