"""Every kind of task gives the same files on every engine: in this process, in two, on two Dask workers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch

from connectomics.config.schema import (
    DataConfig,
    DatasetConfig,
    EngineConfig,
    InferenceConfig,
    ModelConfig,
    RunConfig,
)
from connectomics.decoding.affinities.affinity_task import AffinitiesTask
from connectomics.decoding.average_task import AverageTask
from connectomics.decoding.blocks.labels_task import MaskTask
from connectomics.decoding.blocks.stitched_task import ComponentsTask, StitchedTask
from connectomics.decoding.edit_task import EditTask
from connectomics.decoding.edits import Edit
from connectomics.decoding.parameters import DecodeParameters
from connectomics.decoding.watershed.watershed_task import WatershedTask
from connectomics.geometry import Triple, triple
from connectomics.io.multiscale import Multiscale
from connectomics.morphology import ContactSpec
from connectomics.pipeline.measure import measure_tasks
from connectomics.pipeline.mesh import mesh_tasks
from connectomics.pipeline.predict import predict_tasks
from connectomics.pipeline.run_task import TASK_KINDS
from connectomics.tasks import open_engine, run_task
from connectomics.tasks.block_task import BlockTask
from tests.cellmap.roots import grid_of, write_label, write_raw
from tests.decoding.affinity_kit import OFFSETS, affinities_of, cells, write_prediction
from tests.pipeline.test_predict_crops import save_checkpoint

pytestmark = pytest.mark.slow
BLOCK = (24, 32, 40)
ENGINES = {
    "two processes": EngineConfig(workers=2),
    "two Dask workers": EngineConfig(name="dask", workers=2),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Probabilities and affinities of touching cells; raw, and a network."""
    place = tmp_path_factory.mktemp("inputs")
    ids = cells((48, 56, 60), 12, 15.0)
    write_prediction(
        place / "predictions", np.where(ids > 0, 220, 20).astype(np.uint8), affinities_of(ids, OFFSETS), OFFSETS
    )
    rng = np.random.default_rng(0)
    write_raw(place / "root", "set", rng.integers(0, 255, (48, 48, 64), dtype=np.uint8), grid_of((48, 48, 64)))
    write_label(place / "root", "set", "crop1", "mito", np.zeros((24, 24, 40), np.uint8), grid_of((24, 24, 40), 8, 64))
    torch.manual_seed(0)
    save_checkpoint(place / "net.ckpt", config_of(place), 0)
    return place


def config_of(place: Path) -> RunConfig:
    return RunConfig(
        dataset=DatasetConfig(data_root=str(place / "root"), classes=["mito"]),
        model=ModelConfig(architecture="unet", options={"channels": [4, 8], "strides": [2], "num_res_units": 0}),
        data=DataConfig(patch_size=[16, 16, 16], num_workers=0),
        inference=InferenceConfig(block_size=[16, 16, 16]),
    )


def tasks(inputs: Path, out: Path) -> Iterator[BlockTask]:
    """One of each kind, each built once what it reads is there."""
    source = str(inputs / "predictions/jrc_a.zarr/crop1/mito")
    kinds: list[tuple[type[BlockTask], DecodeParameters]] = [
        (ComponentsTask, DecodeParameters(method="cc3d", fill_holes=True)),
        (ComponentsTask, DecodeParameters(method="threshold", min_size_nm3=1e4)),
        (MaskTask, DecodeParameters(method="threshold")),
        (WatershedTask, DecodeParameters(method="watershed", min_distance_nm=80.0)),
        (AffinitiesTask, DecodeParameters(method="mutex_watershed", halo_nm=80.0)),
    ]
    for number, (kind, parameters) in enumerate(kinds):
        target = out / f"{number}/jrc_a.zarr/crop1/mito"
        yield kind(source, str(target), "mito", parameters, block_shape=BLOCK)  # type: ignore[call-arg]
    labels = out / "4"
    yield from measure_tasks(labels, out / "measures", contacts=[ContactSpec.parse("mito:mito:30")], block=BLOCK)
    yield from mesh_tasks(labels, out / "meshes", "mito")
    edited = out / "edited/jrc_a.zarr/crop1/mito"
    seeds = _seeds(labels / "jrc_a.zarr/crop1/mito", 1)
    yield EditTask(
        str(labels / "jrc_a.zarr/crop1/mito"), str(edited), "mito", DecodeParameters(method="cc3d"), block_shape=BLOCK,
        edits=(Edit("split", "mito", (1,), seeds), Edit("merge", "mito", (2, 3)), Edit("delete", "mito", (4,))),
    )  # fmt: skip
    mean, grid = str(out / "mean/jrc_a.zarr/crop1/mito"), Multiscale.open(source).grid
    yield AverageTask((source, source), mean, grid, block_shape=(64, 64, 64))
    yield from predict_tasks(inputs / "net.ckpt", out=out / "predicted", config=config_of(inputs), device="cpu")[0]


def _seeds(labels: Path, number: int) -> tuple[Triple, Triple]:
    """The first and the last voxel of an instance, nm."""
    source = Multiscale.open(str(labels))
    values = source.read_level(0, (0, 0, 0), source.grid.shape, absent_is_missing=False)[0]
    voxels = np.argwhere(values == number)
    return triple(source.grid.to_world(voxels[0])), triple(source.grid.to_world(voxels[-1]))


def results(out: Path) -> dict[str, bytes]:
    """Every chunk, table and mesh, by its place; what says where it was made, or how, is not compared."""
    found = {str(p.relative_to(out)): p for p in out.rglob("*") if p.is_file()}
    named = {n: p for n, p in found.items() if "task.json" not in n and not Path(n).name.startswith(".")}
    return {name: path.read_bytes() for name, path in named.items() if not name.endswith(".json")}


@pytest.fixture(scope="module")
def here(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("here")
    for task in tasks(inputs, out):
        assert run_task(task)
    return results(out)


def test_one_of_each_kind_is_compared(inputs: Path, here: dict[str, bytes], tmp_path: Path) -> None:
    made = tasks(inputs, tmp_path)
    first = [next(made) for _ in range(5)]
    assert all(isinstance(task, StitchedTask | MaskTask) for task in first)
    for task in first:
        run_task(task)
    assert {task.kind for task in [*first, *made]} == set(TASK_KINDS)
    assert any("/s0/" in name for name in here)
    assert any(name.endswith(".ply") for name in here)
    assert any(name.startswith("predicted") and "/s0/" in name for name in here)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_same_bytes(inputs: Path, here: dict[str, bytes], tmp_path: Path, engine: str) -> None:
    with ExitStack() as stack:
        opened = stack.enter_context(open_engine(ENGINES[engine], "cpu"))
        for task in tasks(inputs, tmp_path):
            assert run_task(task, opened)
    found = results(tmp_path)
    assert set(found) == set(here)
    assert [name for name in here if here[name] != found[name]] == []
