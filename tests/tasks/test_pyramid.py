"""The coarser levels of labels and probabilities: as of the whole array, resumable, and in bounded memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from connectomics.config import load_config
from connectomics.config.output import wants_pyramid
from connectomics.decoding.blocks.labels_task import LabelsTask, MaskTask
from connectomics.decoding.blocks.stitched_task import ComponentsTask
from connectomics.decoding.parameters import DecodeParameters
from connectomics.errors import WriteError
from connectomics.geometry import VoxelGrid
from connectomics.inference.predict_task import PredictTask, run_predict_task
from connectomics.io.artifacts import about
from connectomics.io.multiscale import Multiscale
from connectomics.io.sharded import Storage
from connectomics.io.write import ArrayWriter, write_multiscale
from connectomics.pages.view import ViewSources, VolumeServer, collect_layers, state_of
from connectomics.pipeline.status import status
from connectomics.tasks import DoneMap, run_task
from tests.decoding.decode_kit import decode_predictions
from tests.trees import contents

SHAPE = (140, 11, 21)
STORAGES = [Storage("0.4", (8, 8, 8)), Storage("0.5", (8, 8, 8), (16, 16, 16)), Storage("0.5", (8, 8, 8))]
INSTANCES = DecodeParameters(method="cc3d", threshold=0.85, connectivity=6)


def write_probabilities(folder: Path, shape: tuple[int, int, int] = SHAPE, **more: Any) -> str:
    """Noise whose components are of every size, and a part that was not predicted."""
    values = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    grid = VoxelGrid((8, 8, 8), (4, 4, 4), shape)
    told = {"artefact": "probability", "class_name": "mito", "complete": True, "grid": grid.to_dict(), **more}
    place = folder / "d.zarr" / "crop1" / "mito"
    write_multiscale(place, values, grid, attrs={"connectomics": told})
    return str(place)


def task_of(source: str, out: Path, storage: Storage, kind: type[LabelsTask] = ComponentsTask) -> LabelsTask:
    parameters = INSTANCES if kind is ComponentsTask else DecodeParameters(threshold=0.6)
    block = (16, 16, 16)
    output = str(out / "d.zarr/crop1/mito")
    return kind(source, output, "mito", parameters, block, storage=storage, pyramid=True)


def stored_levels(location: str | Path) -> list[NDArray[Any]]:
    source = Multiscale.open(location)
    return [source.read_level(n, (0, 0, 0), level.grid.shape)[0] for n, level in enumerate(source.levels)]


def plain_mode(values: NDArray[Any]) -> NDArray[Any]:
    """Voxel by voxel: the most frequent of up to eight values, the largest on a tie."""
    out = np.zeros([-(-n // 2) for n in values.shape], values.dtype)
    for z, y, x in np.ndindex(*out.shape):
        counts = Counter(values[2 * z : 2 * z + 2, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].ravel().tolist())
        out[z, y, x] = max(counts, key=lambda value: (counts[value], value))
    return out


@pytest.mark.parametrize("kind", [ComponentsTask, MaskTask])
@pytest.mark.parametrize("storage", STORAGES, ids=["0.4", "0.5", "0.5 by block"])
def test_levels_of_labels_are_those_of_the_whole_array(
    tmp_path: Path, storage: Storage, kind: type[LabelsTask]
) -> None:
    task = task_of(write_probabilities(tmp_path / "p"), tmp_path / "l", storage, kind)
    run_task(task)
    levels = stored_levels(task.output)
    assert [level.shape for level in levels] == [SHAPE, (70, 6, 11), (35, 3, 6)]
    assert len(np.unique(levels[0])) > (1000 if kind is ComponentsTask else 1)
    for finer, coarser in pairwise(levels):
        assert coarser.dtype == finer.dtype
        np.testing.assert_array_equal(coarser, plain_mode(finer))
    grids = [level.grid for level in Multiscale.open(task.output).levels]
    assert {grid.box.begin for grid in grids} == {(0.0, 0.0, 0.0)}
    assert [grid.voxel_size for grid in grids] == [(8.0,) * 3, (16.0,) * 3, (32.0,) * 3]


@pytest.mark.parametrize("storage", STORAGES[:2], ids=["0.4", "0.5"])
def test_labels_that_are_decoded_whole_have_the_same_levels(tmp_path: Path, storage: Storage) -> None:
    unknown = [{"box": [[400, 0, 0], [600, 88, 168]], "why": "a test"}]
    write_probabilities(tmp_path / "p", unknown=unknown)
    found = {}
    for limit in (0, 10**9):
        out = tmp_path / str(limit)
        how: dict[str, Any] = {"blockwise_above": limit, "storage": storage}
        decode_predictions(tmp_path / "p", out, {"mito": INSTANCES}, pyramid=True, **how)
        found[limit] = stored_levels(out / "d.zarr/crop1/mito")
    assert len(found[0]) == len(found[10**9]) == 3
    for one, other in zip(found[0], found[10**9], strict=True):
        np.testing.assert_array_equal(one, other)
    assert not found[0][1][26:37].any(), "what is unknown is 0 in every level"
    assert found[0][1][:20].any()


def test_labels_that_were_finished_without_levels_say_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_probabilities(tmp_path / "p")
    for pyramid, says in ((False, ""), (False, ""), (True, "decode again with --overwrite"), (False, "")):
        caplog.clear()
        decode_predictions(tmp_path / "p", tmp_path / "l", {"mito": INSTANCES}, pyramid=pyramid)
        assert says in caplog.text
        assert bool(says) == bool(caplog.text)
    decode_predictions(tmp_path / "p", tmp_path / "l", {"mito": INSTANCES}, pyramid=True, overwrite=True)
    decode_predictions(tmp_path / "p", tmp_path / "l", {"mito": INSTANCES}, pyramid=True)
    assert not caplog.text


class Killed(BaseException):
    pass


@pytest.mark.parametrize("storage", STORAGES[:2], ids=["0.4", "0.5"])
def test_killed_at_any_write_of_a_level_and_resumed(
    tmp_path: Path, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_probabilities(tmp_path / "p")
    whole, task = (task_of(source, tmp_path / name, storage) for name in ("whole", "killed"))
    run_task(whole)
    run_task(replace(task, output=str(tmp_path / "other.zarr/crop1/mito")))  # what is compiled takes no part
    write, attempts, left = ArrayWriter.write, 0, 0

    def until_killed(writer: ArrayWriter, begin: Any, block: Any) -> None:
        nonlocal left
        if "/s0" not in writer.location and ".blocks" not in writer.location:
            left -= 1
        if left < 0:
            raise Killed
        write(writer, begin, block)

    with monkeypatch.context() as patch:
        patch.setattr(ArrayWriter, "write", until_killed)
        while not Path(task.output).exists():
            attempts += 1
            left = attempts
            with suppress(Killed):
                run_task(task)
            if not Path(task.output).exists():
                assert about(task.folder) == {}, "neither complete nor with named levels"
    assert attempts > 2
    mine, theirs = ({n: d for n, d in contents(t.output).items() if n != "task.json"} for t in (task, whole))
    del mine[meta := "zarr.json" if storage.is_sharded else ".zattrs"], theirs[meta]  # the identity of each
    assert mine == theirs
    assert len(stored_levels(task.output)) == 3


def test_a_pyramid_is_no_other_output(tmp_path: Path) -> None:
    """Begun with levels and ended without, none are left; the other way round they are made."""
    source = write_probabilities(tmp_path / "p")
    for first in (True, False):
        task = task_of(source, tmp_path / str(first), Storage("0.4", (8, 8, 8)))
        begun = replace(task, pyramid=first)
        assert begun.check()
        begun.claim()
        for stage in begun.stages:
            begun.prepare(stage)
            with begun.open_worker(stage, "cpu") as worker:
                list(worker.run(range(begun.blocks(stage))))
        run_task(replace(task, pyramid=not first))
        assert type(task).load(Path(task.output) / "task.json").pyramid is not first
        assert len(stored_levels(task.output)) == (1 if first else 3)
        assert sorted(p.name for p in Path(task.output).glob("s*")) == (["s0"] if first else ["s0", "s1", "s2"])


def test_levels_are_added_to_a_finished_prediction_without_its_network(tmp_path: Path) -> None:
    grid = VoxelGrid((8, 8, 8), (4, 4, 4), (70, 40, 50))
    raw = tmp_path / "raw"
    write_multiscale(raw, np.random.default_rng(0).integers(0, 256, grid.shape, np.uint8), grid)

    def task(name: str, pyramid: bool) -> PredictTask:
        return PredictTask(
            raw=str(raw), output=str(tmp_path / name / "d.zarr/crop1"), classes=("mito",), targets={"mito": grid},
            voxel_size=grid.voxel_size, window=(16, 16, 16), checkpoint="abc", block_size=(32, 32, 32), pyramid=pyramid,
        )  # fmt: skip

    def network(x: torch.Tensor) -> torch.Tensor:
        return 1 - torch.nn.functional.avg_pool3d(x, 3, 1, 1)

    def refuse(x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the network ran again")

    run_predict_task(task("direct", True), network)
    run_predict_task(task("later", False), network)
    later = tmp_path / "later/d.zarr/crop1/mito"
    assert len(Multiscale.open(later).levels) == 1
    begun = task("later", True)
    begun.prepare("pyramid-1")
    DoneMap(begun.folder / ".done-pyramid-1", begun.blocks("pyramid-1"), begun.key)
    assert [(s.stage, s.state, s.done) for s in status(tmp_path / "later")] == [
        ("predict", "complete", 12), ("pyramid-1", "unfinished", 0)
    ]  # fmt: skip
    assert run_predict_task(task("later", True), refuse)
    for one, other in zip(stored_levels(later), stored_levels(tmp_path / "direct/d.zarr/crop1/mito"), strict=True):
        np.testing.assert_array_equal(one, other)
    assert len(Multiscale.open(later).levels) == 2
    assert PredictTask.load(later.parent / "task.json").pyramid
    assert not run_predict_task(task("later", True), refuse)
    assert not run_predict_task(task("later", False), refuse)
    assert [s.state for s in status(tmp_path / "later")] == ["complete", "complete"]


def test_a_prediction_from_when_overlap_was_one_number_goes_on(tmp_path: Path) -> None:
    grid = VoxelGrid((8, 8, 8), (4, 4, 4), (70, 40, 50))
    write_multiscale(tmp_path / "raw", np.random.default_rng(0).integers(0, 256, grid.shape, np.uint8), grid)
    task = PredictTask(
        raw=str(tmp_path / "raw"), output=str(tmp_path / "d.zarr/crop1"), classes=("mito",), targets={"mito": grid},
        voxel_size=grid.voxel_size, window=(16, 16, 16), checkpoint="abc", block_size=(32, 32, 32),
    )  # fmt: skip
    assert task.key == "2df6d6c2a2496802", "as then"
    run_predict_task(task, lambda x: x)
    stored = json.loads((task.folder / "task.json").read_text())
    stored["overlap"] = 0.25
    del stored["multiple"]
    (task.folder / "task.json").write_text(json.dumps(stored))
    assert not run_predict_task(task, lambda x: x)
    assert run_predict_task(replace(task, pyramid=True), lambda x: x)
    for name, value in {"overlap": (0.25, 0.25, 0.5), "multiple": (1, 8, 8)}.items():
        with pytest.raises(WriteError, match=rf"other settings \({name}\)"):
            run_predict_task(replace(task, **{name: value}), lambda x: x)
    assert replace(task, overlap=(0.0, 0.0, 0.0)).settings()["overlap"] == [0, 0, 0], "without a context now"


# One process makes a volume three times, until its heaps have settled, and then one of four times as much.
MEASURE = """
import re, sys
from connectomics.decoding.blocks.labels_task import MaskTask
from connectomics.decoding.parameters import DecodeParameters
from connectomics.tasks import run_task

for number, source in enumerate(sys.argv[1:]):
    out = f"{source}.out{number}/d.zarr/c/mito"
    run_task(MaskTask(source, out, "mito", DecodeParameters(), (64, 128, 128), pyramid=True))
    print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""


def test_memory_does_not_grow_with_the_volume(tmp_path: Path) -> None:
    shapes = [(576, 128, 128), (2304, 128, 128)]
    places = [write_probabilities(tmp_path / str(shape[0]), shape) for shape in shapes]
    command = [sys.executable, "-c", MEASURE, *places[:1] * 3, places[1]]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert (int(out[3]) - int(out[2])) * 1024 < 12e6  # 28 MB more are read and written


def test_large_outputs_have_levels_if_nothing_is_said() -> None:
    config = load_config()
    assert config.output.pyramid == "auto"
    assert not wants_pyramid("auto", 512**3)
    assert wants_pyramid("auto", 512**3 + 1)
    assert wants_pyramid(True, 1)
    assert not wants_pyramid(False, 10**12)
    assert load_config(None, "inference.pyramid=true").output.pyramid is True
    assert load_config(None, "output.pyramid=false").output.pyramid is False


@pytest.mark.parametrize("storage", STORAGES[:2], ids=["0.4", "0.5"])
def test_the_viewer_opens_the_whole_at_once(tmp_path: Path, storage: Storage) -> None:
    task = task_of(write_probabilities(tmp_path / "p"), tmp_path / "l", storage)
    run_task(task)
    found = collect_layers(ViewSources(None, labels=tmp_path / "l"))
    assert found.position == (560.0, 44.0, 84.0)
    assert found.extent == 1120.0
    with VolumeServer(found.roots, found.made) as server:
        (layer,) = (one for one in state_of(found, server.url)["layers"] if one["name"] == "mito labels crop1")
        url = layer["source"][0]["url"]
        assert url.startswith("zarr3://" if storage.is_sharded else "zarr2://")
        read = read_through_http(url.partition("://")[2], "zarr3" if storage.is_sharded else "zarr")
    for one, other in zip(read, stored_levels(task.output), strict=True):
        np.testing.assert_array_equal(one, other)


def read_through_http(url: str, driver: str) -> list[NDArray[Any]]:
    """All levels that the attributes name, read by tensorstore from the server, as a browser would."""
    import tensorstore

    def level(number: int) -> Any:
        store = {"driver": "http", "base_url": f"{url}/s{number}/"}
        return tensorstore.open({"driver": driver, "kvstore": store}).result()

    return [np.asarray(level(number).read().result()) for number in range(3)]
