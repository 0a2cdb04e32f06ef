"""The augmentation preset ``em`` and its transforms of the tissue: uniform, in nm, and right for thin patches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from connectomics.cellmap.catalog import Catalog
from connectomics.cellmap.label_codes import LabelStates
from connectomics.config import load_config
from connectomics.data.arrays import CropArrays
from connectomics.data.augmentation import BatchAugmentor, CoordinateMap, SpatialAugmentor, augmentations_of, sample
from connectomics.data.augmentation.spatial_transforms import PatchFrame
from connectomics.data.augmentation.tissue_transforms import Elastic, Rotation, Symmetry, section_axis
from connectomics.data.dataset.build import run_dataset
from connectomics.data.patch_reader import places
from connectomics.data.sampling import PatchRequest
from connectomics.errors import ConfigError
from tests.cellmap.roots import grid_of, write_label, write_raw

CUBIC, SERIAL = (8.0, 8.0, 8.0), (40.0, 8.0, 8.0)
PLANE = (1, 32, 32)


def maps(
    transform: object, voxel_size: tuple[float, float, float], count: int, half: float = 20.0
) -> list[CoordinateMap]:
    rng, frame = np.random.default_rng(0), PatchFrame((41, 41, 41), voxel_size)
    return [transform.draw(rng, "x", np.full(3, half), frame) for _ in range(count)]  # type: ignore[attr-defined]


def nm(map: CoordinateMap, voxel_size: tuple[float, float, float]) -> np.ndarray:
    size = np.array(voxel_size)
    return map.outer * size[:, None] / size


@pytest.mark.parametrize(("voxel_size", "number"), [(CUBIC, 48), (SERIAL, 16)])
def test_symmetries_are_all_and_equally_likely(voxel_size: tuple[float, float, float], number: int) -> None:
    found = [tuple(m.outer.astype(int).ravel().tolist()) for m in maps(Symmetry(), voxel_size, 50 * number)]
    counts = np.array([found.count(one) for one in set(found)])
    assert len(counts) == number
    assert counts.min() > 20
    assert counts.max() < 90
    assert all(m.right_angles for m in maps(Symmetry(), voxel_size, 5))


def test_rotations_are_uniform() -> None:
    """Rotations in nm, so that a direction of the tissue goes anywhere on the sphere with equal probability."""
    turned = np.array([nm(m, CUBIC) for m in maps(Rotation(prob=1.0), CUBIC, 4000)])
    np.testing.assert_allclose(turned @ turned.transpose(0, 2, 1), np.broadcast_to(np.eye(3), turned.shape), atol=1e-9)
    np.testing.assert_allclose(np.linalg.det(turned), 1.0)
    np.testing.assert_allclose(turned.mean(0), 0, atol=0.04)
    np.testing.assert_allclose((turned**2).mean(0), 1 / 3, atol=0.02)
    np.testing.assert_allclose(np.histogram(turned[:, 0, 2], 4, (-1, 1))[0] / 4000, 0.25, atol=0.03)


def test_serial_sections_turn_within_themselves() -> None:
    assert section_axis(SERIAL) == 0
    assert section_axis((8.0, 8.0, 6.0)) is None
    for m in maps(Rotation(prob=1.0), (40.0, 8.0, 6.0), 20):
        np.testing.assert_allclose(m.outer[0], [1, 0, 0], atol=1e-12)
        turned = nm(m, (40.0, 8.0, 6.0))
        np.testing.assert_allclose(turned @ turned.T, np.eye(3), atol=1e-12)


def test_deformations_are_in_nm() -> None:
    """Their standard deviation, and the length over which their correlation falls to 1/e."""
    offsets = np.stack(np.meshgrid(*[np.arange(-40.0, 41, 5)] * 3, indexing="ij"), -1)
    beyond = offsets + np.array([0, 0, 25])  # 200 nm
    elastic = Elastic(prob=1.0, displacement=(24.0, 24.0), length=(200.0, 200.0))
    fields = [m.field for m in maps(elastic, CUBIC, 12, half=70.0)]
    here = np.array([8 * f.at(offsets) for f in fields if f is not None])
    there = np.array([8 * f.at(beyond) for f in fields if f is not None])
    np.testing.assert_allclose(here.std((0, 1, 2, 3)), 24.0, rtol=0.12)
    assert (here * there).mean() / (here**2).mean() == pytest.approx(1 / np.e, abs=0.12)
    serial = [m.field for m in maps(elastic, SERIAL, 8, half=70.0)]
    here = np.array([f.at(offsets) for f in serial if f is not None]) * SERIAL
    assert (here[..., 0] == 0).all()
    np.testing.assert_allclose(here[..., 1:].std((0, 1, 2, 3)), 24.0, rtol=0.15)


def test_a_plane_is_sampled_obliquely_where_the_map_says() -> None:
    """Raw is a ramp, which linear interpolation gives exactly: so each voxel of the plane says where it was read."""
    z, y, x = np.meshgrid(*[np.arange(60)] * 3, indexing="ij")
    none = LabelStates(("mito",), np.zeros((1, 1), np.uint64), np.zeros((1, 1), np.uint64))
    center = np.array([29.5, 29.0, 28.5])
    rotations = maps(Rotation(prob=1.0), CUBIC, 6)
    for axis, ramp in enumerate((z, y, x)):
        raw = (4 * ramp).astype(np.uint8)
        arrays = CropArrays(raw, (0, 0, 0), None, np.zeros((0, 0, 0), np.uint8), (0, 0, 0), none)
        for m in rotations:
            image, _ = sample(arrays, center, m, PLANE)
            offsets = np.stack(np.meshgrid([0.0], *[np.arange(32) - 15.5] * 2, indexing="ij"), -1)
            np.testing.assert_allclose(255 * image / 4, (center + m(offsets))[..., axis], atol=2e-3)
            low, high = m.bounds(PLANE)
            assert (low <= m(offsets).reshape(-1, 3).min(0) + 1e-9).all()
            assert (high >= m(offsets).reshape(-1, 3).max(0) - 1e-9).all()


@pytest.mark.parametrize("voxel_size", [CUBIC, SERIAL])
@pytest.mark.parametrize("size", [PLANE, (8, 24, 24)])
def test_no_draw_reaches_beyond_what_is_announced(
    size: tuple[int, int, int], voxel_size: tuple[float, float, float]
) -> None:
    config = load_config(None, "data.augmentation.preset=em", f"data.patch_size={list(size)}")
    augmentor, _ = SpatialAugmentor.split(augmentations_of(config.data, voxel_size)[0], size, None, voxel_size)
    assert augmentor is not None
    rng, most = np.random.default_rng(1), np.zeros(3)
    corners = np.stack(np.meshgrid(*[np.linspace(-(n - 1) / 2, (n - 1) / 2, min(n, 5)) for n in size]), -1)
    for _ in range(300):
        most = np.maximum(most, np.abs(augmentor.draw(rng)(corners)).reshape(-1, 3).max(0))
    assert (most <= augmentor.reach(size) + 1e-9).all()
    assert (most > 0.5 * augmentor.reach(size)).sum() >= 2


class TestPreset:
    def test_strength_0_is_flips_and_right_angles(self) -> None:
        config = load_config(None, "data.augmentation={preset: em, strength: 0}")
        assert augmentations_of(config.data, CUBIC) == ({"symmetry": {}}, {})
        assert BatchAugmentor.of(config) is None
        assert augmentations_of(load_config().data, CUBIC) == ({}, {})

    @pytest.mark.parametrize("strength", [0.3, 1.0, 2.0])
    @pytest.mark.parametrize("voxel_size", [CUBIC, SERIAL])
    def test_every_strength_is_valid(self, strength: float, voxel_size: tuple[float, float, float]) -> None:
        config = load_config(None, "data.augmentation.preset=em", f"data.augmentation.strength={strength}")
        config.dataset.voxel_size = list(voxel_size)
        intensity = augmentations_of(config.data, voxel_size)[1]
        assert BatchAugmentor.of(config) is not None
        assert ("missing_sections" in intensity) == ("shifted_sections" in intensity) == (voxel_size == SERIAL)

    def test_a_single_plane_has_no_missing_sections(self) -> None:
        config = load_config(None, "data.augmentation.preset=em", "data.patch_size=[1,64,64]")
        assert "missing_sections" not in augmentations_of(config.data, SERIAL)[1]

    def test_what_is_given_wins(self) -> None:
        config = load_config(
            None, "data.augmentation.preset=em", "data.augmentations={rotation: null, scale: {prob: 1.0}}",
            "data.intensity={noise: {std: 0.5}}",
        )  # fmt: skip
        spatial, intensity = augmentations_of(config.data, CUBIC)
        assert (spatial["rotation"], spatial["scale"], intensity["noise"]) == (None, {"prob": 1.0}, {"std": 0.5})
        augmentor, remaining = SpatialAugmentor.split(spatial, (8, 8, 8))
        assert augmentor is not None
        assert {name for name, _ in augmentor.transforms} == {"symmetry", "scale", "elastic"}
        assert remaining == {}

    def test_two_deformations_are_refused(self) -> None:
        monai = {"keys": ["image", "label"], "sigma_range": [4, 6], "magnitude_range": [50, 90]}
        with pytest.raises(ConfigError, match=r"data.augmentations.elastic: a patch has one elastic deformation"):
            SpatialAugmentor.split({"Rand3DElasticd": monai, "elastic": {}}, (8, 8, 8))


@pytest.mark.parametrize("strength", [0, 1])
def test_a_thin_crop_is_not_cut_across(tmp_path: Path, strength: int) -> None:
    """A plane of 24 x 24 in a crop of 6 planes: across it three quarters would be unknown."""
    write_raw(
        tmp_path,
        "set-a",
        np.random.default_rng(0).integers(0, 255, (40, 60, 60), dtype=np.uint8),
        grid_of((40, 60, 60)),
    )
    inner = grid_of((40, 60, 60)).crop((17, 10, 10), (6, 40, 40))
    write_label(tmp_path, "set-a", "crop1", "mito", np.ones((6, 40, 40), np.uint8), inner)
    config = load_config(
        None, "data.patch_size=[1,24,24]", "dataset.classes=[mito]", f"dataset.data_root={tmp_path}",
        f"data.augmentation={{preset: em, strength: {strength}}}", "model.architecture=unet",
    )  # fmt: skip
    crops = Catalog.open(str(tmp_path)).crops(None, None, ["mito"])
    dataset = run_dataset(config, crops, "train")
    config.data.augmentation.preset = "none"
    plain = run_dataset(config, crops, "train")
    requests = [PatchRequest(0, None, (7, n)) for n in range(60)]
    patches = [dataset.reader.read(request) for request in requests]
    straight = [plain.reader.read(request) for request in requests]
    known = [[float(np.take(p.states.known.any(1), p.codes).mean()) for p in side] for side in (patches, straight)]
    assert (np.divide(*known) < 0.5).mean() < 0.1
    assert np.divide(*np.mean(known, axis=1)) > 0.85
    assert len({repr(p.augmentation) for p in patches}) > 7
    again = dataset.reader.read(PatchRequest(0, None, (7, 3)))
    assert np.array_equal(again.images[0], patches[3].images[0])


def test_patches_lie_along_single_annotated_planes(tmp_path: Path) -> None:
    """Every sixth plane of a crop is annotated, all others are unknown; with a cache, patches are drawn along them."""
    raw = np.random.default_rng(0).integers(0, 255, (40, 60, 60), dtype=np.uint8)
    write_raw(tmp_path, "set-a", raw, grid_of((40, 60, 60)))
    labels = np.full((40, 60, 60), 255, np.uint8)
    labels[2::6] = 1
    write_label(tmp_path, "set-a", "crop1", "mito", labels, grid_of((40, 60, 60)), unknown=255)
    shares = {}
    for cache in ("none", "disk"):
        config = load_config(
            None, "data.patch_size=[1,24,24]", "dataset.classes=[mito]", f"dataset.data_root={tmp_path}",
            "data.augmentation={preset: em, strength: 1}", "model.architecture=unet", "data.min_known=0.5",
            f"data.cache={cache}", f"data.cache_dir={tmp_path / 'cache'}",
        )  # fmt: skip
        dataset = run_dataset(config, Catalog.open(str(tmp_path)).crops(None, None, ["mito"]), "train")
        patches = [dataset.reader.read(PatchRequest(0, None, (7, n))) for n in range(60)]
        shares[cache] = np.mean([np.take(p.states.known.any(1), p.codes).mean() for p in patches])
    assert shares["disk"] > 0.6 > 1.5 * shares["none"]


def test_the_share_that_is_known(tmp_path: Path) -> None:
    write_raw(tmp_path, "set-a", np.zeros((10, 40, 40), np.uint8), grid_of((10, 40, 40)))
    write_label(tmp_path, "set-a", "crop1", "mito", np.ones((10, 40, 40), np.uint8), grid_of((10, 40, 40)))
    config = load_config(None, "dataset.classes=[mito]", f"dataset.data_root={tmp_path}", "model.architecture=unet")
    (volume,) = run_dataset(config, Catalog.open(str(tmp_path)).crops(None, None, ["mito"]), "train").volumes
    straight = places(CoordinateMap.identity(), np.array([5.0, 20, 20]), (1, 16, 16))
    assert volume.known_share(straight) == 1
    upright = CoordinateMap.affine([[0, 1, 0], [1, 0, 0], [0, 0, 1]])
    assert volume.known_share(places(upright, np.array([4.5, 20, 20]), (1, 16, 16))) == 0.5
