"""What ``data.intensity_range`` gives, and that training, validation and prediction make the same input of raw."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from connectomics.cellmap.catalog import Catalog
from connectomics.config import RunConfig
from connectomics.config.intensity_range import check_intensity_range
from connectomics.data.augmentation import BatchAugmentor
from connectomics.data.dataset.build import get_dataset, run_dataset
from connectomics.data.normalization import ALL, choose, kept, of_crops, table
from connectomics.data.patches import centered, collate
from connectomics.data.sampling import PatchRequest
from connectomics.errors import ConfigError, CorruptDataError, UnknownNameError
from connectomics.geometry import VoxelGrid
from connectomics.inference.raw import RawSource
from connectomics.io.multiscale import Multiscale
from connectomics.io.normalization import Normalization
from tests.cellmap.roots import grid_of, write_label, write_raw, zarr_of

SHAPE = (40, 48, 56)
SIZE = (8.0, 8.0, 8.0)


def root_of(root: Path, *datasets: tuple[str, np.ndarray]) -> Path:
    for name, raw in datasets:
        write_raw(root, name, raw, grid_of(raw.shape), levels=2)
        write_label(root, name, "crop1", "mito", np.ones((12, 20, 24), np.uint8), grid_of((12, 20, 24), 8, 64))
    return root


def tissue(low: float = 60, high: float = 200, dtype: Any = np.uint8, seed: int = 0) -> np.ndarray:
    """Values spread evenly from ``low`` to ``high``."""
    return np.rint(np.random.default_rng(seed).uniform(low, high, SHAPE)).astype(dtype)


def config_of(root: Path, **data: Any) -> RunConfig:
    config = RunConfig()
    config.dataset.data_root = str(root)
    config.dataset.classes = ["mito"]
    config.data.patch_size = [16, 24, 24]
    for key, value in data.items():
        setattr(config.data, key, value)
    return config


def chosen(root: Path, spec: Any = None, dataset: str = "set-a") -> Any:
    raw = Multiscale.open(Catalog.open(str(root)).raw_location(dataset))
    return choose(spec, dataset, raw, [[]], SIZE)


# -- which range -------------------------------------------------------------------------------------------------------
def test_auto_is_two_percentiles_without_padding(tmp_path: Path) -> None:
    raw = tissue()
    padded = raw.copy()
    padded[:25], padded[-3:] = 0, 255  # two thirds are none
    root = root_of(tmp_path, ("set-a", raw), ("set-b", padded))
    plain, beside_padding = chosen(root, "auto"), chosen(root, "auto", "set-b")
    n = plain.normalization
    assert n.range == pytest.approx((60.7, 199.3), abs=1.5)
    assert (n.mean, n.std) == pytest.approx((0.5, 0.29), abs=0.01)
    assert beside_padding.normalization.range == pytest.approx(n.range, abs=1.5)
    assert beside_padding.normalization.mean == pytest.approx(0.5, abs=0.02)
    assert plain == chosen(root, "auto"), "the same raw gives the same numbers"
    assert "percentiles 0.5 and 99.5" in plain.origin


def test_null_takes_the_table_where_the_data_set_is_in_it(tmp_path: Path) -> None:
    assert len(table()) == 22
    root = root_of(tmp_path, ("jrc_jurkat-1", tissue(212, 240)), ("set-a", tissue()))
    listed = chosen(root, None, "jrc_jurkat-1")
    assert listed.normalization.range == (215, 238)
    assert listed.normalization.mean == pytest.approx(0.5, abs=0.02)
    assert "table" in listed.origin
    assert "percentiles" in chosen(root, None).origin
    assert chosen(root, "auto", "jrc_jurkat-1").normalization.range != (215, 238)
    by_name = {"set-a": [10, 20], "jrc_jurkat-1": "auto"}
    assert chosen(root, by_name).normalization.range == (10, 20)
    with pytest.raises(UnknownNameError, match="set-a"):
        chosen(root, "table")


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_other_types_need_no_option(tmp_path: Path, dtype: Any) -> None:
    root = root_of(tmp_path, ("set-a", tissue(1000, 3000, dtype)))
    assert chosen(root).normalization.range == pytest.approx((1010, 2990), rel=0.01)


def test_inverted_contrast(tmp_path: Path) -> None:
    root = root_of(tmp_path, ("set-a", tissue()))
    n = chosen(root, [200, 60]).normalization
    assert n.unit(np.array([200, 130, 60], np.float32)).tolist() == [0, 0.5, 1]
    assert n.quantized(np.array([200, 130, 60, 20], np.float32)).tolist() == [0, 128, 255, 255]


@pytest.mark.parametrize("spec", ["autom", [1], [1, 2, 3], [5, 5], ["a", "b"], {"set-a": [5]}, 7])
def test_what_is_no_range_is_refused(spec: Any) -> None:
    with pytest.raises(ConfigError, match=r"data\.intensity_range.* must be auto, table, or \[low, high\]"):
        check_intensity_range(spec)


def test_constant_and_absent_raw_do_not_stop_anything(tmp_path: Path) -> None:
    root = root_of(tmp_path, ("set-a", np.full(SHAPE, 9, np.uint8)))
    assert chosen(root).normalization.range == (0, 255)
    shutil.rmtree(zarr_of(root, "set-a") / "recon-1/em/fibsem-uint8/s0/0")
    assert chosen(root).normalization.range == (0, 255)


def test_raw_of_two_values_has_their_range_also_if_one_looks_like_padding(tmp_path: Path) -> None:
    for name, low, high in (("set-a", 0, 1), ("set-b", 0, 255), ("set-c", 7, 9)):
        root = root_of(tmp_path, (name, np.where(tissue() > 130, high, low).astype(np.uint8)))
        assert chosen(root, dataset=name).normalization.range == (low, high)


def test_corrupt_chunks_are_reported_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = root_of(tmp_path, ("set-a", np.tile(tissue(), (1, 1, 4))))
    chunks = sorted((zarr_of(root, "set-a") / "recon-1/em/fibsem-uint8/s0").glob("[0-9]*/*/*"))
    for chunk in chunks[1:]:
        chunk.write_bytes(chunk.read_bytes()[:20])
    chosen(root)
    text = [record.getMessage() for record in caplog.records]
    assert len(text) == 1
    assert " sampled places take no part in measuring the gray range of " in text[0]
    assert "; the first: cannot decode a chunk of " in text[0]
    chunks[0].write_bytes(chunks[0].read_bytes()[:20])
    with pytest.raises(CorruptDataError, match=r"cannot decode a chunk of .*none of 256 sampled places can be read"):
        chosen(root)


def test_sampling_is_bounded_and_each_place_is_in_one_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = root_of(tmp_path, ("set-a", tissue()))
    asked: list[VoxelGrid] = []
    read = Multiscale.read_raw
    monkeypatch.setattr(Multiscale, "read_raw", lambda self, grid: (asked.append(grid), read(self, grid))[1])
    chosen(root)
    assert 0 < len(asked) <= 256
    assert sum(grid.size for grid in asked) <= (1 << 20) + 32**3


# -- kept with the model -----------------------------------------------------------------------------------------------
def test_what_is_kept_is_used_unless_another_pair_is_given(tmp_path: Path) -> None:
    root = root_of(tmp_path, ("set-a", tissue()), ("set-b", tissue(100, 140)))
    crops = Catalog.open(str(root)).crops()
    measured = of_crops(config_of(root), crops)
    assert list(measured) == ["set-a", "set-b"]
    entry = Normalization(50, 210, 0.4, 0.2)
    config = config_of(root, normalization={"set-a": {**entry.to_dict(), "origin": "somewhere"}})
    assert of_crops(config, crops)["set-a"].normalization == entry
    assert of_crops(config, crops)["set-b"] == measured["set-b"]
    assert kept(config, "set-a", "auto") is not None
    assert kept(config, "set-a", [50, 210]) is not None
    assert kept(config, "set-a", [0, 255]) is None
    assert kept(config, "set-c", None) is None
    config.data.normalization = {ALL: entry.to_dict()}
    assert kept(config, "set-c", None) is not None


# -- one input ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("cache", ["none", "disk"])
def test_training_validation_and_prediction_read_the_same_input(tmp_path: Path, cache: str) -> None:
    """To the bit, also beyond the volume and where a chunk is missing, and never one value for all that is empty."""
    rng = np.random.default_rng(2)
    write_raw(tmp_path, "set-a", rng.integers(30, 230, SHAPE, dtype=np.uint8), grid_of(SHAPE))
    write_label(tmp_path, "set-a", "crop1", "mito", np.ones(SHAPE, np.uint8), grid_of(SHAPE))
    location = zarr_of(tmp_path, "set-a") / "recon-1/em/fibsem-uint8"
    config = config_of(
        tmp_path, intensity_range=[0, 255], patch_size=[64, 24, 24], allow_missing_raw=True, cache=cache,
        cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    dataset = run_dataset(config, Catalog.open(str(tmp_path)).crops(), "train")
    volume = dataset.volumes[0]
    assert volume.normalized.mean > 0.3
    source = RawSource(str(location), volume.normalized)
    for n in range(6):
        patch = dataset.reader.read(PatchRequest(0, None, (n,)))
        seen = centered(collate([patch]))["image"][0, 0].numpy()
        np.testing.assert_array_equal(seen, source.read(patch.grid))
        np.testing.assert_array_equal(seen, volume.read_image(patch.grid))
        np.testing.assert_array_equal(seen, volume.read_input(patch.grid))
        begin = np.round(volume.grid.to_index(patch.grid.translation)).astype(int)
        assert begin[0] <= 0, "the patch holds all 40 voxels of the volume"
        assert begin[0] + 64 >= 40
        assert (begin[1:] >= 0).all(), "and lies inside it where it can"
        assert (begin[1:] + 24 <= SHAPE[1:]).all()
        known = patch.dense()["known"][0]
        assert known.any(axis=(1, 2)).sum() == 40, "what is mirrored is not known"


def test_a_missing_chunk_is_the_mean_of_tissue_in_all_of_them(tmp_path: Path) -> None:
    root = root_of(tmp_path, ("set-a", np.repeat(tissue(), 2, axis=2)))
    location = zarr_of(root, "set-a") / "recon-1/em/fibsem-uint8"
    chunk = next(p for p in sorted(location.glob("s0/0/0/*")) if p.name == "1")
    chunk.unlink()
    config = config_of(root, allow_missing_raw=True, intensity={"brightness": {"prob": 1.0, "shift": 0.2}})
    dataset = run_dataset(config, Catalog.open(str(root)).crops(), "train")
    volume = dataset.volumes[0]
    grid = grid_of((16, 24, 24), 8, 0).crop((4, 4, 56), (16, 24, 24))
    inside = volume.read_raw(grid)[1]
    assert 0 < inside.mean() < 1
    for image in (volume.read_image(grid), RawSource(str(location), volume.normalized).read(grid)):
        assert (image[~inside] == 0).all()
        assert abs(image[inside].mean()) < 0.2
    arrays = volume.arrays((-4, -4, 48), (12, 20, 72))
    assert arrays.fill == volume.normalized.mean
    patch = dataset.reader.read(PatchRequest(0, (68.0, 68.0, 68.0), (0,)))
    batch = collate([patch])
    augmentor = BatchAugmentor.of(config)
    assert augmentor is not None
    batch["image"][0, 0, :4] = batch["mean"][0]
    batch["codes"][0, :4] = 0
    after = centered(augmentor(batch))["image"][0, 0]
    assert (after[:4] == 0).all(), "augmentation leaves what is empty alone"
    assert abs(float(after[4:].mean())) > 0.05, "and moves the rest"


def test_data_sets_of_other_contrast_become_alike(tmp_path: Path) -> None:
    """The same tissue, imaged with a fifth of the contrast and inverted, gives the same input."""
    raw = tissue(50, 200)
    faint = np.rint(240 - (raw - 50.0) / 5).astype(np.uint8)
    root = root_of(tmp_path, ("set-a", raw), ("set-b", faint))
    config = config_of(root, intensity_range={"set-b": [240, 210], "set-a": [50, 200]})
    dataset = run_dataset(config, Catalog.open(str(root)).crops(), "val")
    patches = [dataset.reader.read(PatchRequest(k, None, (3,))) for k in range(2)]
    first, second = centered(collate(patches))["image"].numpy()
    assert abs(first.mean()) < 0.1
    assert first.std() == pytest.approx(1, abs=0.1)
    assert np.abs(first - second).max() < 0.15  # the faint one has 30 gray values
    assert get_dataset(config, None, "val")[0]["image"].min() < -1, "what is drawn by hand is centered, too"


def test_labels_beyond_the_raw_stay_unknown_whatever_is_mirrored(tmp_path: Path) -> None:
    """Labels begin and end beyond the raw; turned patches look beyond it on every side."""
    rng = np.random.default_rng(4)
    write_raw(tmp_path, "set-a", rng.integers(30, 230, (20, 30, 30), dtype=np.uint8), grid_of((20, 30, 30)))
    label = rng.integers(0, 2, (36, 24, 40), dtype=np.uint8)
    write_label(tmp_path, "set-a", "crop1", "mito", label, grid_of((36, 24, 40), 8, -64))
    turns = {"RandAffined": {"keys": ["image", "label"], "prob": 1.0, "rotate_range": [0.5, 0.5, 0.5]}}
    for augmentations in ({}, turns):
        config = config_of(tmp_path, augmentations=augmentations, patch_size=[24, 24, 24])
        dataset = run_dataset(config, Catalog.open(str(tmp_path)).crops(), "train")
        volume = dataset.volumes[0]
        for n in range(4):
            patch = dataset.reader.read(PatchRequest(0, None, (n,)))
            assert 0.2 < patch.images[0].mean() < 0.8
            assert patch.images[0].std(axis=(2, 3)).min() > 0.05, "no plane of one value"
            known = patch.dense()["known"][0]
            assert 0 < known.mean() < 1
            if not augmentations:
                np.testing.assert_array_equal(known, volume.read_labels(patch.grid)[1][0])
                seen = centered(collate([patch]))["image"][0, 0].numpy()
                np.testing.assert_array_equal(seen, volume.read_image(patch.grid))
