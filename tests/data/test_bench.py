"""`pytc bench data` measures what training does: the very patches of the loader, in parts that add up."""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from connectomics.cellmap.catalog import Catalog
from connectomics.config import RunConfig, config_from_dict
from connectomics.data.augmentation import PatchAugmentor
from connectomics.data.bench import PeerError, bench_data, ensure_environment
from connectomics.data.bench.meter import Meter, can_measure_peaks, median_ratio, medians
from connectomics.data.bench.peer import OUR_AUGMENTED, Peer, compare
from connectomics.data.bench.run import endless, ours_for_peer, work_on
from connectomics.data.bench.stages import LIMITS, STAGES
from connectomics.data.dataset.dataset_cellmap import CellMapMultiClassDataset, PatchOptions
from connectomics.data.sampling import PatchSampler, SampledCrop
from connectomics.errors import InputError

CLASSES = ("mito", "nuc", "er")


def run_of(phantom: Path, crops: Path, **data: Any) -> RunConfig:
    settings = {"patch_size": [16, 24, 24], "batch_size": 2, "num_workers": 0, "cache": "disk", "cache_dir": str(crops)}
    return config_from_dict(
        {
            "system": {"accelerator": "cpu"},
            "dataset": {"data_root": str(phantom), "classes": list(CLASSES)},
            "data": {**settings, **data},
        }
    )


def dataset_of(phantom: Path, cache: Path, augmented: bool) -> CellMapMultiClassDataset:
    patch = (16, 24, 24)
    crops = Catalog.open(str(phantom)).crops(["phantom-iso"], None, CLASSES)
    augmentor = PatchAugmentor.of(OUR_AUGMENTED, patch) if augmented else None
    options = PatchOptions(cache="disk", cache_dir=str(cache))
    return CellMapMultiClassDataset.of_crops(crops, CLASSES, "train", patch, (8.0,) * 3, augmentor, options)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("crops")


@pytest.mark.parametrize("augmented", [False, True])
def test_what_is_measured_are_the_patches_of_the_data_set(phantom: Path, cache: Path, augmented: bool) -> None:
    dataset = dataset_of(phantom, cache, augmented)
    work = work_on(dataset, seed=3)
    crops = [SampledCrop(v.dataset, float(v.grid.size), {c: dataset.points(i, c) for c in CLASSES})
             for i, v in enumerate(dataset.volumes)]  # fmt: skip
    sampler = PatchSampler(crops, 4096, classes=CLASSES, sampling={}, class_weights={}, seed=3)
    for request in islice(endless(sampler), 5):
        measured, plain = work.patch(), dataset[request]
        np.testing.assert_array_equal(measured.images[0], plain.images[0])
        np.testing.assert_array_equal(measured.codes, plain.codes)
        assert (measured.grid, measured.seed) == (plain.grid, plain.seed)


def test_stages_add_up_and_limits_are_measured_beside_them(phantom: Path, cache: Path) -> None:
    work = work_on(dataset_of(phantom, cache, True))
    found = work.round(3, LIMITS)
    stages = [found[name] for name in STAGES if name in found]
    assert found["whole"] == pytest.approx(sum(stages))
    assert found["patch"] == pytest.approx(found["read"] + found["spatial"])
    assert all(found[name] > 0 for name in (*LIMITS, "read", "spatial", "collate", "whole_wall"))


def test_parts_within_a_part_are_not_counted_twice() -> None:
    meter = Meter()
    with meter.part("outer"):
        with meter.part("inner"):
            np.sort(np.random.default_rng(0).random(300_000))
        with meter.part("inner"):
            pass
    assert meter.costs["inner"].cpu > 10 * meter.costs["outer"].cpu > 0


@pytest.mark.skipif(not can_measure_peaks(), reason="this system does not tell a process its own peak memory")
def test_peaks_are_of_the_part_itself() -> None:
    meter = Meter(memory=True)
    with meter.part("outer"):
        with meter.part("inner"):
            np.ones(20_000_000, np.uint8)
        np.ones(60_000_000, np.uint8)
        with meter.part("nothing"):
            pass
    assert meter.costs["nothing"].peak_mb == pytest.approx(0, abs=4)
    assert meter.costs["inner"].peak_mb == pytest.approx(20, abs=4)
    # what the inner part gave back may still be the process's own when the outer one takes its share
    assert 56 < meter.costs["outer"].peak_mb < 84


def test_medians_are_of_ratios_within_rounds() -> None:
    rounds = [{"a": 2.0, "b": 1.0}, {"a": 40.0, "b": 20.0}, {"a": 9.0, "b": 3.0}]  # a slow round counts as any other
    assert medians(rounds) == {"a": 9.0, "b": 3.0}
    assert median_ratio(rounds, "a", "b") == 2.0


@pytest.mark.parametrize("mode", ["disk", "none"])
def test_a_run_is_measured_by_stage_and_as_a_whole(phantom: Path, cache: Path, mode: str) -> None:
    config = run_of(phantom, cache, cache=mode, intensity={"noise": {}})
    found = bench_data(config, patches=4).to_dict()
    assert set(found["stages"]) == set(STAGES) - {"others"}
    assert sum(found["stages"].values()) == pytest.approx(found["whole"], rel=1)
    # reading without the cache is a limit only for who has one
    assert set(found["limits"]) == set(LIMITS) - ({"decode"} if mode == "none" else set())
    assert all(value > 0 for part in ("stages", "limits", "ratios") for value in found[part].values())
    assert found["loader"]["workers"] == 0
    assert found["loader"]["patches"] >= 4
    assert found["loader"]["patches_per_s"] > 0
    assert found["setup"]["cache"] == mode
    assert found["peer"] == []


def test_no_patches_are_refused(phantom: Path, cache: Path) -> None:
    with pytest.raises(InputError, match="at least 1, found 0"):
        bench_data(run_of(phantom, cache), patches=0)


def test_a_folder_that_is_no_environment_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("all of it")
    with pytest.raises(PeerError, match="no virtual environment"):
        ensure_environment(tmp_path)
    assert (tmp_path / "thesis.tex").is_file()


@pytest.mark.slow
def test_the_official_loader_is_measured_on_the_same_data(phantom: Path, cache: Path) -> None:
    folder = os.environ.get("CONNECTOMICS_PEER_ENV")
    try:
        python = ensure_environment(Path(folder) if folder else None)
    except PeerError as error:
        pytest.skip(f"no environment for cellmap-data: {error}")
    dataset = dataset_of(phantom, cache, True)
    crops = [v.crop for v in dataset.volumes]
    with Peer(python, crops, dataset.classes, dataset.patch_size, dataset.voxel_size, augmented=True) as peer:
        shapes = peer.load(1)["shapes"]
        found = compare(peer, ours_for_peer(work_on(dataset)), augmented=True, rounds=2, patches=1)
    assert shapes["input"] == [1, 1, 16, 24, 24]
    assert shapes["output"] == [1, len(CLASSES), 16, 24, 24]
    assert found.ratio > found.dense_ratio > 0
    assert found.to_dict()["rounds"] == 2


@pytest.mark.slow
def test_a_loader_that_fails_says_why(phantom: Path, tmp_path: Path) -> None:
    crops = Catalog.open(str(phantom)).crops(["phantom-iso"], None, CLASSES)
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho 'ImportError: no module named cellmap_data' >&2\nexit 1\n")
    script.chmod(0o755)
    with pytest.raises(PeerError, match="no module named cellmap_data"):
        Peer(script, crops, CLASSES, (16, 16, 16), (8.0,) * 3, augmented=False)
