"""A prediction task: every voxel written, resumed to the bit where it was killed, refused where it does not fit."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from connectomics.errors import IncompleteError, InputError, MetadataError, MissingError, UnknownNameError, WriteError
from connectomics.geometry import VoxelGrid
from connectomics.inference.predict_task import PredictTask, run_predict_task
from connectomics.io.artifacts import require_complete
from connectomics.io.multiscale import Multiscale
from connectomics.io.normalization import Normalization
from connectomics.io.write import write_multiscale
from tests.starter import Started, Starter
from tests.trees import contents

RAW_GRID = VoxelGrid((4, 4, 4), (2, 2, 2), (96, 96, 160))


def ramp(grid: VoxelGrid) -> np.ndarray:
    """Slopes that share no period with any voxel size, so that roundings average out."""
    z, y, x = np.meshgrid(*grid.axes(), indexing="ij")
    return 30 + 0.2317 * x + 0.0713 * y + 8 * np.sin(z / 80)


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> str:
    """uint8 raw whose value is a known function of the place."""
    location = tmp_path_factory.mktemp("raw") / "a.zarr" / "recon-1" / "em" / "fibsem-uint8"
    values = np.round(ramp(RAW_GRID)).astype(np.uint8)
    write_multiscale(location, values, RAW_GRID, levels=2, kind="raw")
    return str(location)


def task_of(raw: str, output: Path, grid: VoxelGrid, **options) -> PredictTask:
    defaults = dict(
        raw=raw,
        output=str(output / "a.zarr" / "crop1"),
        classes=("mito", "er"),
        targets={"mito": grid, "er": grid},
        voxel_size=(8, 8, 8),
        window=(16, 16, 16),
        checkpoint="abc",
        block_size=(32, 32, 32),
    )
    return PredictTask(**{**defaults, **options})


def constant(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.full_like(x, 0.702), torch.full_like(x, 0.0)], 1)


def identity(x: torch.Tensor) -> torch.Tensor:
    """The raw itself as a probability: what comes out must lie where it lay."""
    return torch.cat([x, 1 - x], 1)


def read(task: PredictTask, name: str) -> np.ndarray:
    values, inside = Multiscale.open(f"{task.output}/{name}").read_level(0, (0, 0, 0), task.targets[name].shape)
    assert inside.all(), "a chunk is missing"
    return values


TARGETS = {
    "same voxels": VoxelGrid((8, 8, 8), (36.0, 28, 44), (40, 40, 70)),
    "finer": VoxelGrid((2, 2, 2), (41.0, 51, 61), (100, 70, 130)),
    "finer, fractional": VoxelGrid((2.62, 2, 2), (41.3, 51, 61), (33, 70, 130)),
    "coarser": VoxelGrid((16, 16, 16), (48.0, 40, 40), (18, 20, 34)),
    "one voxel": VoxelGrid((4, 4, 4), (48.0, 40, 40), (1, 1, 1)),
    "beyond the raw": VoxelGrid((8, 8, 8), (-100.0, 200, 500), (30, 40, 50)),
}


@pytest.mark.parametrize("name", list(TARGETS))
def test_every_voxel_is_written(raw, tmp_path, name):
    task = task_of(raw, tmp_path, TARGETS[name], allow_missing_raw=name == "beyond the raw")
    seen: list[tuple[int, int]] = []
    run_predict_task(task, constant, progress=lambda done, total, what="": seen.append((done, total)))
    half = [size / 2 for size in TARGETS[name].voxel_size]
    axes = zip(TARGETS[name].axes(), half, RAW_GRID.box.end, strict=True)
    there = [(at + h > 0) & (at - h < end) for at, h, end in axes]
    expected = np.where(there[0][:, None, None] & there[1][:, None] & there[2], 179, 0)
    assert (read(task, "mito") == expected).all(), "0.702 x 255 = 179.01, also at the borders; 0 without raw"
    assert (read(task, "er") == 0).all()
    total = task.blocks("predict")
    assert (seen[0], seen[-1]) == ((0, total), (total, total))
    stored = Multiscale.open(f"{task.output}/mito")
    assert stored.grid == TARGETS[name]
    chunks = [p for p in Path(task.output, "mito", "s0").rglob("*") if p.is_file() and not p.name.startswith(".")]
    expected = [-(-n // c) for n, c in zip(stored.grid.shape, stored.levels[0].chunks, strict=True)]
    assert len(chunks) == np.prod(expected)
    attrs = require_complete(f"{task.output}/mito")
    assert attrs["artefact"] == "probability"
    assert attrs["class_name"] == "mito"
    assert attrs["grid"] == TARGETS[name].to_dict()
    assert attrs["model"]["checkpoint"] == "abc"
    assert require_complete(task.output)["classes"] == ["mito", "er"]


@pytest.mark.parametrize("name", ["same voxels", "finer", "finer, fractional", "coarser"])
def test_values_lie_where_the_raw_lay(raw, tmp_path, name):
    """A network that gives back its input: the ramp along x must come out in place, whatever the voxel sizes."""
    grid = TARGETS[name]
    task = task_of(raw, tmp_path, grid)
    run_predict_task(task, identity)
    error = read(task, "mito") - ramp(grid)
    assert abs(error.mean()) < 0.1, "a shift by a nanometre along x would show as 0.23"
    assert np.abs(error).max() < 1.5
    assert np.abs(read(task, "er").astype(int) + read(task, "mito") - 255).max() <= 1


def test_several_target_grids_of_one_region(raw, tmp_path):
    targets = {"er": TARGETS["coarser"], "mito": TARGETS["finer"]}
    task = task_of(raw, tmp_path, TARGETS["finer"], targets=targets)
    assert [names for _, names in task.layouts] == [("mito",), ("er",)]
    run_predict_task(task, constant)
    assert (read(task, "mito") == 179).all()
    assert read(task, "er").shape == TARGETS["coarser"].shape


def test_does_not_depend_on_the_blocks(raw, tmp_path):
    results = []
    for number, block in enumerate([(16, 16, 16), (64, 24, 64)]):
        task = task_of(raw, tmp_path / str(number), TARGETS["finer"], block_size=block)
        run_predict_task(task, torch.nn.Sequential(torch.nn.AvgPool3d(3, 1, 1), _Both()))
        results.append(read(task, "mito").astype(int))
    assert np.abs(results[0] - results[1]).max() <= 1
    assert (results[0] != results[1]).mean() < 1e-3


class _Both(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return identity(x)


def test_writes_only_the_classes_that_are_wanted(raw, tmp_path):
    task = task_of(raw, tmp_path, TARGETS["one voxel"], targets={"er": TARGETS["one voxel"]})
    run_predict_task(task, constant)
    assert sorted(p.name for p in Path(task.output).iterdir() if p.is_dir()) == ["er"]


def test_plan_of_a_task(raw, tmp_path):
    task = task_of(raw, tmp_path, TARGETS["same voxels"])
    (plan,) = task.plan()
    passes: list[int] = []
    run_predict_task(task, lambda x: passes.append(len(x)) or constant(x))
    assert plan.windows == len(passes) - 1, "and one of noise, to see whether the network gives probabilities"
    assert plan.bytes > 0
    twice = replace(task, symmetries=("zyx", "-zyx"), checkpoints=("a.ckpt", "b.ckpt")).plan()[0]
    assert (twice.windows, twice.voxels) == (4 * plan.windows, 4 * plan.voxels)


# -- resuming --------------------------------------------------------------------------------------------------------
def files_of(task: PredictTask) -> dict[str, bytes]:
    found = contents(task.output)
    ours = ("task.json", ".done-")  # name the output folder; and what a killed run was about to write
    return {name: content for name, content in found.items() if not name.startswith(ours) and ".part-" not in name}


def test_a_run_that_failed_goes_on_where_it_stopped(raw, tmp_path, monkeypatch):
    monkeypatch.setattr("connectomics.tasks.pool.REPORT_S", 0.0)
    task = task_of(raw, tmp_path / "a", TARGETS["same voxels"], batch_size=2)
    calls: list[int] = []

    def failing(x: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        if len(calls) == 80:
            raise KeyboardInterrupt
        return identity(x)

    with pytest.raises(KeyboardInterrupt):
        run_predict_task(task, failing)
    with pytest.raises(IncompleteError, match="half written"):
        require_complete(task.output)
    with pytest.raises(IncompleteError, match="half written"):
        require_complete(f"{task.output}/mito")
    seen: list[tuple[int, int]] = []
    run_predict_task(replace(task, batch_size=2), identity, progress=lambda *numbers: seen.append(numbers))
    assert 0 < seen[0][0] < seen[0][1]
    whole = replace(task, output=str(tmp_path / "b" / "a.zarr" / "crop1"))
    run_predict_task(whole, identity)
    assert files_of(task) == files_of(whole)


_SCRIPT = """
import sys, time, torch
from connectomics.inference.predict_task import PredictTask, run_predict_task
torch.set_num_threads(1)
def slow(x):
    time.sleep(float(sys.argv[2]))
    return torch.cat([torch.nn.functional.avg_pool3d(x, 3, 1, 1), 1 - x], 1)
print("here", flush=True)
run_predict_task(PredictTask.load(sys.argv[1]), slow)
"""


def run_script(starter: Starter, task: PredictTask, folder: Path, pause: float) -> Started:
    folder.mkdir(exist_ok=True)
    task.save(folder / "wanted.json")
    return starter.start(["-c", _SCRIPT, folder / "wanted.json", pause])


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_and_resumed_gives_the_same_bytes(raw, tmp_path, kills, starter):
    """Each time later after the imports, so that the last ones find blocks that are marked as done."""
    task = task_of(raw, tmp_path / "a", TARGETS["same voxels"], batch_size=2, pyramid=True)
    moments = np.random.default_rng(kills).uniform(0.05, 3.0, kills)
    for seconds in sorted(moments):
        process = run_script(starter, task, tmp_path / "a", 0.02)
        assert process.wait_for(lambda started=process: started.stdout == "here\n"), process.said
        time.sleep(seconds)
        process.kill()
    resumed = run_script(starter, task, tmp_path / "a", 0)
    assert resumed.wait() == 0, resumed.said
    whole = replace(task, output=str(tmp_path / "b" / "a.zarr" / "crop1"))
    run_predict_task(whole, lambda x: torch.cat([torch.nn.functional.avg_pool3d(x, 3, 1, 1), 1 - x], 1))
    assert files_of(task) == files_of(whole)


def test_a_finished_output_is_left_alone(raw, tmp_path):
    task = task_of(raw, tmp_path, TARGETS["one voxel"])
    run_predict_task(task, constant)
    seen: list[tuple[int, int]] = []
    run_predict_task(task, lambda x: pytest.fail("ran again"), progress=lambda *numbers: seen.append(numbers))
    assert seen == []
    run_predict_task(replace(task, batch_size=7), lambda x: pytest.fail("ran again"))


def test_an_array_that_was_removed_is_made_again(raw, tmp_path):
    task = task_of(raw, tmp_path, TARGETS["same voxels"])
    run_predict_task(task, constant)
    shutil.rmtree(Path(task.output, "mito"))
    run_predict_task(task, constant)
    assert (read(task, "mito") == 179).all()
    assert require_complete(f"{task.output}/mito")


def test_output_of_another_task_is_refused(raw, tmp_path):
    task = task_of(raw, tmp_path, TARGETS["one voxel"])
    run_predict_task(task, constant)
    other = replace(task, checkpoint="def", overlap=0.5)
    with pytest.raises(WriteError, match=r"other settings \(checkpoint, overlap\)"):
        run_predict_task(other, identity)
    assert (read(task, "mito") == 179).all()
    run_predict_task(other, identity, overwrite=True)
    assert require_complete(task.output)["model"]["checkpoint"] == "def"
    assert [p.name for p in Path(task.output).parent.iterdir() if p.name.startswith(".crop")] == []


def test_a_folder_that_is_not_ours_is_never_touched(raw, tmp_path):
    task = task_of(raw, tmp_path, TARGETS["one voxel"])
    Path(task.output).mkdir(parents=True)
    Path(task.output, "mine.txt").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(WriteError, match="was not written by a prediction"):
            run_predict_task(task, constant, overwrite=overwrite)
    assert Path(task.output, "mine.txt").read_text() == "precious"


# -- the task itself, bad input ----------------------------------------------------------------------------------------
def test_json_there_and_back(raw, tmp_path):
    task = task_of(
        raw, tmp_path, TARGETS["finer, fractional"], context=(3, 4, 5), normalization=Normalization(700, 3, 0.4, 0.2)
    )
    task.save(tmp_path / "task.json")
    assert PredictTask.load(tmp_path / "task.json") == task
    data = json.loads((tmp_path / "task.json").read_text())
    data["windows"] = data.pop("window")
    (tmp_path / "task.json").write_text(json.dumps(data))
    with pytest.raises(MetadataError, match="unknown key 'windows'; did you mean 'window'"):
        PredictTask.load(tmp_path / "task.json")
    data.pop("kind")
    (tmp_path / "task.json").write_text(json.dumps(data))
    with pytest.raises(MetadataError, match="holds no task"):
        PredictTask.load(tmp_path / "task.json")
    with pytest.raises(MissingError, match="no task"):
        PredictTask.load(tmp_path / "none.json")


def test_what_makes_no_task_is_refused(raw, tmp_path):
    grid = TARGETS["finer"]
    for options, error, message in [
        ({"targets": {"mitos": grid}}, UnknownNameError, "did you mean 'mito'"),
        ({"targets": {}}, InputError, "no target grid"),
        ({"targets": {"mito": grid.crop((0, 0, 0), (0, 5, 5))}}, InputError, "is empty.*leave it out"),
        ({"blending": "gauss"}, InputError, "blending must be one of"),
        ({"precision": "16"}, InputError, "precision must be one of"),
        ({"dtype": "float32"}, InputError, "dtype must be one of"),
        ({"batch_size": 0}, InputError, "batch_size must be at least 1, or auto"),
    ]:
        with pytest.raises(error, match=message):
            task_of(raw, tmp_path, grid, **options)


def test_a_region_without_raw_is_refused_before_anything_is_predicted(raw, tmp_path):
    grid = VoxelGrid((8, 8, 8), (9000, 0, 0), (20, 20, 20))
    task = task_of(raw, tmp_path, grid)
    with pytest.raises(InputError, match=r"has no raw for crop1 of a, which lies at \[8996 .*: it covers \[0 0 0\]"):
        run_predict_task(task, lambda x: pytest.fail("was run"))
    with pytest.raises(InputError, match="has no raw for crop1 of a"):
        task.check()
    assert not Path(task.output).exists()


def test_absent_chunks_are_no_raw(tmp_path):
    location = tmp_path / "raw.zarr" / "em"
    grid = VoxelGrid((8, 8, 8), (4, 4, 4), (128, 16, 16))
    write_multiscale(location, np.full(grid.shape, 255, np.uint8), grid, chunks=(64, 64, 64))
    (location / "s0" / "0" / "0" / "0").unlink()
    seen: list[torch.Tensor] = []

    def network(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.clone())
        return constant(x)

    task = task_of(str(location), tmp_path, grid.crop((70, 0, 0), (16, 16, 16)), context=(0, 0, 0))
    run_predict_task(task, network)
    assert all((x == 1).all() for x in seen[1:]), "after the window of noise"
    with pytest.raises(InputError, match="the chunks there are absent"):
        run_predict_task(task_of(str(location), tmp_path / "b", grid.crop((4, 0, 0), (16, 16, 16))), network)


def test_logits_are_refused(raw, tmp_path):
    task = task_of(raw, tmp_path, TARGETS["one voxel"])
    with pytest.raises(InputError, match=r"must give probabilities, got values from .* apply a sigmoid"):
        run_predict_task(task, lambda x: torch.cat([x, x - 5], 1))
    with pytest.raises(InputError, match="not finite"):
        run_predict_task(task, lambda x: torch.cat([x, x / 0 * 0], 1))


def test_require_complete_says_what_is_wrong(tmp_path, raw):
    with pytest.raises(MissingError):
        require_complete(tmp_path / "nothing")
    with pytest.raises(MetadataError, match=r"expected an output .* got an array of another program"):
        require_complete(raw)


@pytest.mark.slow
def test_full_disk_leaves_nothing_taken_for_whole(raw, tmp_path):
    """Writing fails in the middle (a folder that may not be written): one clear line, not complete, goes on later."""
    task = task_of(raw, tmp_path, TARGETS["same voxels"])
    calls: list[int] = []

    def network(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return constant(x)

    from connectomics.io import array_writer

    original = array_writer.write_file

    def full(path: Path, data: bytes) -> None:
        if len(calls) > 20:
            raise WriteError(f"cannot write {path}: No space left on device; free space")
        original(path, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(array_writer, "write_file", full)
        with pytest.raises(WriteError, match="No space left"):
            run_predict_task(task, network)
    with pytest.raises(IncompleteError):
        require_complete(task.output)
    run_predict_task(task, constant)
    assert (read(task, "mito") == 179).all()
