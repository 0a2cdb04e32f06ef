"""Predict, decode and measure with `output.format=0.5`: the same voxels and tables as with 0.4, in few files."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from connectomics.cellmap.catalog import Catalog
from connectomics.cellmap.crop_table import CropTable, TableEntry
from connectomics.config import load_config
from connectomics.decoding.blocks.stitched_task import ComponentsTask
from connectomics.decoding.parameters import DecodeParameters
from connectomics.errors import ConfigError, InputError, WriteError
from connectomics.geometry import VoxelGrid
from connectomics.inference.predict_task import PredictTask, run_predict_task
from connectomics.io.artifacts import about
from connectomics.io.multiscale import Multiscale
from connectomics.io.sharded import Storage
from connectomics.pages.view.layers import _artifacts
from connectomics.pipeline.decode import decode, decode_jobs
from connectomics.pipeline.measure import measure_labels, measure_tasks
from connectomics.submission import export_submission
from tests.decoding.decode_kit import decode_predictions
from tests.starter import Starter
from tests.trees import contents

SHAPE = (40, 70, 90)
CHUNK, SHARD = (16, 16, 16), (32, 32, 64)
PARAMETERS = {"mito": DecodeParameters(method="cc3d", threshold=0.6, fill_holes=True)}
STORAGES = {
    "0.4": Storage("0.4", CHUNK),
    "0.5": Storage("0.5", CHUNK, SHARD),
    "0.5 by block": Storage("0.5", CHUNK),
}


def predict_task(phantom: Path, out: Path, storage: Storage, **options: object) -> PredictTask:
    catalog = Catalog.open(str(phantom))
    raw = str(catalog.raw_location(catalog.datasets[0]))
    part = Multiscale.open(raw).levels[0].grid.crop((0, 0, 0), SHAPE)
    given: dict[str, object] = {
        "raw": raw, "output": str(out / "a.zarr" / "crop1"), "classes": ("mito",), "targets": {"mito": part},
        "voxel_size": part.voxel_size, "window": (16, 32, 32), "checkpoint": "abc", "block_size": (32, 64, 64),
        "uncertainty": "entropy", "pyramid": True, "storage": storage,
    }  # fmt: skip
    return PredictTask(**{**given, **options})  # type: ignore[arg-type]


def smooth(x: torch.Tensor) -> torch.Tensor:
    return 1 - torch.nn.functional.avg_pool3d(x, 3, 1, 1)


@dataclass
class Way:
    """One output of each stage."""

    folder: Path
    task: PredictTask

    def arrays(self, stage: str) -> dict[str, np.ndarray]:
        root = zarr.open_group(self.folder / stage / "a.zarr", mode="r")
        found = {}
        for name in ("mito", "mito/uncertainty"):
            for level in range(3):
                if f"crop1/{name}/s{level}" in root:
                    found[f"{name}/s{level}"] = root[f"crop1/{name}/s{level}"][:]
        return found


@pytest.fixture(scope="module")
def ways(phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Way]:
    found = {}
    for name, storage in STORAGES.items():
        folder = tmp_path_factory.mktemp("way")
        task = predict_task(phantom, folder / "p", storage)
        run_predict_task(task, smooth)
        for limit, labels in ((0, "l"), (10**9, "whole")):
            decode_predictions(folder / "p", folder / labels, PARAMETERS, blockwise_above=limit, storage=storage)
        measure_labels(measure_tasks(folder / "l", folder / "t"))
        found[name] = Way(folder, task)
    return found


@pytest.mark.parametrize("name", ["0.5", "0.5 by block"])
def test_voxels_and_tables_do_not_depend_on_the_format(ways: dict[str, Way], name: str) -> None:
    old, new = ways["0.4"], ways[name]
    for stage in ("p", "l", "whole"):
        expected, found = old.arrays(stage), new.arrays(stage)
        assert list(found) == list(expected)
        assert len(found) == (4 if stage == "p" else 1)
        for key, values in expected.items():
            assert found[key].dtype == values.dtype
            assert found[key].tobytes() == values.tobytes(), f"{stage}, {key}"
    assert old.arrays("l")["mito/s0"].max() > 1, "there are instances"
    assert contents(new.folder / "t")["mito.csv"] == contents(old.folder / "t")["mito.csv"]
    assert about(new.folder / "l/a.zarr/crop1/mito")["complete"] is True


def test_decode_uses_the_configuration_with_either_format(ways: dict[str, Way], tmp_path: Path) -> None:
    """The classes of a folder decide which parameters of the configuration count."""
    found = {}
    for name, way in ways.items():
        config = load_config(
            None, f"output.format={name[:3]}", "decoding.classes.mito={method: threshold, threshold: 0.7}"
        )
        labels = decode(way.folder / "p", out=tmp_path / name, config=config)
        assert labels.classes == ["mito"]
        found[name] = about(tmp_path / name / "a.zarr/crop1/mito")["decode"]["threshold"]
    assert set(found.values()) == {0.7}


def files_of(shape: tuple[int, ...], shard: tuple[int, ...]) -> int:
    return math.prod(math.ceil(n / s) for n, s in zip(shape, shard, strict=True))


def test_there_are_as_many_files_as_shards(ways: dict[str, Way]) -> None:
    """Each level has its shards and one zarr.json; the group has one more. The phantom leaves no shard empty here."""
    mito = ways["0.5"].folder / "p/a.zarr/crop1/mito"
    levels = Multiscale.open(mito).levels
    expected = sum(files_of(level.grid.shape, SHARD) + 1 for level in levels) + 1
    assert len(levels) == 2
    assert sum(path.is_file() for path in mito.rglob("*")) == 2 * expected, "probabilities and uncertainty"
    by_block = ways["0.5 by block"]
    block = by_block.task.layouts[0][0].block_shape
    stored = [p for p in (by_block.folder / "p/a.zarr/crop1/mito/s0/c").rglob("*") if p.is_file()]
    assert len(stored) == files_of(SHAPE, block) == by_block.task.blocks("predict")


def test_other_verbs_read_both(ways: dict[str, Way], tmp_path: Path) -> None:
    packed = []
    for name, way in ways.items():
        crop = way.folder / "p/a.zarr/crop1/mito"
        assert [place for place, _ in _artifacts(crop)] == [crop, crop / "uncertainty"], "what view shows"
        grid = Multiscale.open(crop).grid
        table = CropTable((TableEntry(1, "a", "mito", grid),))
        export_submission(way.folder / "l", tmp_path / name, crops=table, validate=False)
        packed.append(zarr.open_group(tmp_path / name, mode="r", zarr_format=2)["crop1/mito"][:])
    for other in packed[1:]:
        np.testing.assert_array_equal(packed[0], other)


def test_another_format_is_another_output(ways: dict[str, Way], phantom: Path) -> None:
    old, new = ways["0.4"], ways["0.5"]
    with pytest.raises(WriteError, match=r"made with other settings \(storage\.format, storage\.shard\)"):
        run_predict_task(replace(old.task, storage=STORAGES["0.5"]), smooth)
    with pytest.raises(WriteError, match=r"made with other settings \(output\.format\)"):
        decode_predictions(new.folder / "p", new.folder / "l", PARAMETERS, storage=STORAGES["0.4"])
    assert not run_predict_task(new.task, smooth), "the same again has nothing to do"
    done = decode_predictions(new.folder / "p", new.folder / "l", PARAMETERS, storage=STORAGES["0.5"])
    assert [item.skipped for item in done] == [True]


def test_the_key_of_a_task_in_the_old_format_is_that_of_earlier_versions(phantom: Path, tmp_path: Path) -> None:
    settings = predict_task(phantom, tmp_path, Storage()).settings()
    assert "storage" not in settings


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from connectomics.io.sharded import Storage
from connectomics.inference.predict_task import run_predict_task
from tests.pipeline.test_sharded_output import predict_task, smooth, STORAGES
calls = 0
def network(x):
    global calls
    calls += 1
    if calls == 80:
        os.kill(os.getpid(), signal.SIGKILL)
    return smooth(x)
run_predict_task(predict_task(Path(sys.argv[1]), Path(sys.argv[2]), STORAGES["0.5"]), network)
"""


def test_killed_and_resumed(ways: dict[str, Way], phantom: Path, tmp_path: Path, starter: Starter) -> None:
    assert starter.run(["-c", KILLED, phantom, tmp_path / "p"]).status == -9
    assert list((tmp_path / "p/a.zarr/crop1/mito/s0/c").rglob("*")), "some blocks are written"
    run_predict_task(predict_task(phantom, tmp_path / "p", STORAGES["0.5"]), smooth)
    found = contents(tmp_path / "p/a.zarr/crop1/mito")
    expected = contents(ways["0.5"].folder / "p/a.zarr/crop1/mito")
    assert {k: v for k, v in found.items() if not k.startswith(".")} == expected


# -- what does not fit -------------------------------------------------------------------------------------------------
def test_a_shard_that_two_workers_would_write_is_refused(phantom: Path, tmp_path: Path) -> None:
    task = predict_task(phantom, tmp_path, Storage("0.5", CHUNK, (64, 64, 64)))
    with pytest.raises(
        InputError, match=r"output\.shard of 48 voxels is larger than a block of 32 along z.*at least 48"
    ):
        run_predict_task(task, smooth)
    assert not (tmp_path / "a.zarr").exists()
    assert replace(task, block_size=(48, 64, 64)).layouts[0][0].block_shape == (48, 64, 64), "40 voxels along z"
    with pytest.raises(ConfigError, match=r"blocks of \[48, 64, 64\] voxels are no multiple of \[64, 64, 64\]"):
        ComponentsTask(
            "in", str(tmp_path / "a.zarr/crop1/mito"), "mito", PARAMETERS["mito"], (48, 64, 64),
            storage=Storage("0.5", CHUNK, (64, 64, 64)),
        )  # fmt: skip


def test_a_block_of_decode_becomes_a_shard(ways: dict[str, Way], tmp_path: Path) -> None:
    storage = Storage("0.5", (64, 64, 64), (512, 512, 512))
    (job,) = decode_jobs(ways["0.4"].folder / "p", tmp_path, PARAMETERS, blockwise_above=0, storage=storage)
    assert job.task is not None
    assert job.task.block_shape == (512, 512, 512)


def test_blocks_begin_at_shards(phantom: Path, tmp_path: Path) -> None:
    """Whatever the volume, no two blocks write one file."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        shape = tuple(int(n) for n in rng.integers(1, 400, 3))
        shard = tuple(int(n) * 16 for n in rng.integers(1, 5, 3))
        task = predict_task(
            phantom, tmp_path, Storage("0.5", CHUNK, shard), block_size=(80, 80, 80),
            targets={"mito": VoxelGrid((8, 8, 8), (4, 4, 4), shape)}, voxel_size=(8, 8, 8),
        )  # fmt: skip
        layout = task.layouts[0][0]
        assert layout.shards is not None
        for block, n, s in zip(layout.block_shape, shape, layout.shards, strict=True):
            assert block % s == 0 or block >= n
            assert s % 16 == 0
            assert block <= max(80, s)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("output.format=0.6", "output.format must be one of 0.4, 0.5"),
        ("output.shard=[4,64,64]", "must be three numbers of voxels"),
    ],
)
def test_the_configuration_is_checked(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, [override])
    assert load_config(None, ["output.format=0.5", "output.shard=[512,512,512]"]).output.shard == [512, 512, 512]
