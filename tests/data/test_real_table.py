"""Splits, sampling weights, epochs and validation windows of the challenge's real table of 289 crops."""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from connectomics.cellmap.catalog import Crop
from connectomics.cellmap.classes import CLASSES
from connectomics.config import EPOCH_PATCHES, RunConfig, load_config
from connectomics.data.contents import LabelCounter, content_of
from connectomics.data.run_split import half_patch, run_split
from connectomics.data.sampling import PatchSampler, SampledCrop
from connectomics.data.splits import Split, groups_of, leaks
from connectomics.data.validation_windows import validation_parts, validation_shape
from connectomics.errors import ConfigError
from connectomics.geometry import VoxelGrid
from tests.data.real_table import TABLE, table_crops

TUTORIALS = Path(__file__).resolve().parents[2] / "tutorials"
RUNS = ("cellmap_base", "cellmap_cos7", "cellmap_mito", "everything")


@cache
def config_of(run: str) -> RunConfig:
    config = load_config(TUTORIALS / ("cellmap_base.yaml" if run == "everything" else f"{run}.yaml"))
    if run == "everything":
        config.dataset.datasets = None
        config.dataset.classes = sorted(name for name, known in CLASSES.items() if known.scored)
    return config


@cache
def sides_of(run: str, occurs: float, seed: int) -> tuple[list[Crop], list[Crop]]:
    config = config_of(run)
    config.system.seed = seed
    crops = table_crops(config.dataset.datasets, config.dataset.classes, occurs, seed)
    return run_split(config, crops, None, LabelCounter())[1:]


@cache
def present_in(run: str, crop: Crop) -> frozenset[str]:
    """The classes of a run with positives in a crop."""
    present = content_of(crop, config_of(run).dataset.classes, LabelCounter()).present
    return frozenset(name for name, volume in present.items() if volume > 0)


def with_positives(run: str, crops: list[Crop]) -> set[str]:
    return {name for crop in crops for name in present_in(run, crop)}


def test_the_table_is_the_real_one() -> None:
    assert len(TABLE["crops"]) == 289
    assert len({dataset for dataset, *_ in TABLE["crops"]}) == 22
    assert len(config_of("everything").dataset.classes) == 48
    crops = table_crops(None, list(CLASSES))
    overlapping = [group for group in groups_of(crops) if len(group) > 1]
    assert sum(map(len, overlapping)) == 46  # as many as overlapping_crops.csv names


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(("occurs", "seed"), [(1.0, 42), pytest.param(0.3, 1, marks=pytest.mark.slow)])
def test_no_leak_and_every_class_on_both_sides(run: str, occurs: float, seed: int) -> None:
    train, val = sides_of(run, occurs, seed)
    classes = config_of(run).dataset.classes
    assert train
    assert val
    assert not leaks(train, val)
    both = [*train, *val]
    groups = groups_of(both, half_patch(config_of(run)))
    held = [with_positives(run, [both[i] for i in group]) for group in groups]
    for name in classes:
        having = sum(name in there for there in held)
        assert name in with_positives(run, train) or not having
        if having > 1:  # where the table allows it
            assert name in with_positives(run, val), name


@pytest.mark.parametrize("run", RUNS)
def test_validation_has_about_its_share(run: str) -> None:
    """Of the annotated volume, although one group of overlapping crops holds half or most of it in two tutorials."""
    volumes = [sum(float(np.prod(crop.box.extent)) for crop in side) for side in sides_of(run, 1.0, 42)]
    assert 0.05 < volumes[1] / sum(volumes) < 0.375


@pytest.mark.parametrize("run", RUNS)
def test_no_crop_has_more_than_a_twentieth_of_the_patches(run: str) -> None:
    config = config_of(run)
    train, _ = sides_of(run, 1.0, 42)
    classes = config.dataset.classes
    volumes = [float(VoxelGrid.covering(crop.box, config.dataset.voxel_size).size) for crop in train]
    points = [{c: np.zeros((1, 3)) for c in with_positives(run, [crop])} for crop in train]
    crops = [SampledCrop(c.dataset, v, p) for c, v, p in zip(train, volumes, points, strict=True)]
    sampler = PatchSampler(crops, 20_000, classes=classes, seed=1)
    drawn = Counter(request.index for request in sampler)
    most = max(drawn.values()) / len(sampler)
    assert most < (0.055 if len(crops) >= 40 else 0.7 * 2 / len(crops) + 0.3 * 2.2 / len(crops))
    assert len(drawn) == len(crops)
    # by volume alone, as before the cap, one crop would have far more
    assert run == "cellmap_base" or max(volumes) / sum(volumes) > 0.05
    assert EPOCH_PATCHES == 2000
    assert config.data.patches_per_epoch is None


@pytest.mark.parametrize("run", RUNS)
def test_one_validation_stays_below_2000_windows(run: str) -> None:
    config = config_of(run)
    _, val = sides_of(run, 1.0, 42)
    classes = config.dataset.classes
    grids = [VoxelGrid.covering(crop.box, config.dataset.voxel_size) for crop in val]
    shape = validation_shape(config)

    def points(number: int, name: str) -> np.ndarray:
        rng = np.random.default_rng([number, *name.encode()])
        return grids[number].to_world(rng.integers(0, grids[number].shape, (50, 3)))

    parts = validation_parts(grids, shape, config.data.validation_windows, points, classes, 1)
    windows = sum(shape.count(part) for tiles in parts for part in tiles)
    assert len(val) <= windows <= 1000
    assert windows > min(500, 0.9 * sum(map(shape.count, grids)))  # what is allowed is used
    assert all(parts)  # every crop is looked at
    assert parts == validation_parts(grids, shape, config.data.validation_windows, points, classes, 1)


def test_labels_coarser_than_twice_the_voxel_size_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    config = config_of("everything")
    train, val = sides_of("everything", 1.0, 42)
    sizes = [crop.grid.voxel_size for crop in (*train, *val)]
    assert max(max(size) for size in sizes) == 16.0
    assert len(sizes) == 289 - 36 - 2  # those of 32 and 64 nm
    caplog.clear()
    run_split(config, table_crops(None, config.dataset.classes), None, LabelCounter())
    (line,) = [r.message for r in caplog.records if "coarse_labels=true" in r.message]
    assert "38 of 289 crops" in line


def test_the_file_of_an_old_split_that_leaks_is_refused(tmp_path: Path) -> None:
    """A split of crops one by one put validation crops of `cellmap_cos7` inside training crops."""
    config = config_of("cellmap_cos7")
    crops = table_crops(config.dataset.datasets, config.dataset.classes)
    held = {"jrc_cos7-1a/crop236", "jrc_cos7-1b/crop235", "jrc_cos7-1b/crop240"}
    keys = [crop.key for crop in crops]
    Split(tuple(k for k in keys if k not in held), tuple(sorted(held))).save(tmp_path / "split.yaml")
    with pytest.raises(ConfigError, match=r"crop236 with jrc_cos7-1a/crop247.*move overlapping crops"):
        run_split(config, crops, tmp_path / "split.yaml", LabelCounter())
