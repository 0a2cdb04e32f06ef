"""Blockwise decoding that is killed, or meets what cannot be read or written: it says so, and goes on."""

from __future__ import annotations

import os
import random
import resource
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest

from connectomics.decoding.blocks.labels_task import LabelsTask, MaskTask, objects_of
from connectomics.decoding.blocks.stitched_task import ComponentsTask
from connectomics.decoding.parameters import DecodeParameters
from connectomics.errors import BlocksFailedError, WriteError
from connectomics.geometry import VoxelGrid
from connectomics.io.write import write_multiscale
from connectomics.pipeline.decode import task_of as task_kind
from connectomics.tasks import run_task
from connectomics.tasks.blocks import DoneMap
from tests import trees

ROOT = Path(__file__).resolve().parents[2]
Labels = TypeVar("Labels", bound=LabelsTask)
FILLED = DecodeParameters(method="cc3d", fill_holes=True, min_size_nm3=20.0, connectivity=6)
PARAMETERS = {
    "components": FILLED,
    "walls": DecodeParameters(method="cc3d", boundary="mito_mem", min_size_nm3=20.0, connectivity=6),
    "watershed": DecodeParameters(method="watershed", min_size_nm3=20.0, min_distance_nm=4.0, max_depth_nm=20.0),
    "mask": DecodeParameters(method="threshold"),
}


def task_of(folder: Path, shape: tuple[int, int, int], block: int) -> ComponentsTask:
    """Noise near the share of foreground at which components span the volume."""
    values = (np.random.default_rng(0).random(shape) < 0.3).astype(np.uint8) * 255
    location = write_noise(folder, "mito", values, block)
    output = str(folder / "out.zarr" / "crop1" / "mito")
    return ComponentsTask(str(location), output, "mito", FILLED, (block,) * 3)


def write_noise(folder: Path, name: str, values: np.ndarray, block: int) -> Path:
    location = folder / "in.zarr" / "crop1" / name
    about = {"artefact": "probability", "class_name": name, "complete": True}
    grid = VoxelGrid((2, 2, 2), (0, 0, 0), values.shape)
    write_multiscale(location, values, grid, attrs={"connectomics": about}, chunks=(block,) * 3, overwrite=True)
    return location


def task_of_kind(kind: str, folder: Path, shape: tuple[int, int, int], block: int) -> LabelsTask:
    """Of one of the `PARAMETERS`; noise too, but for components in larger grains, and of which there is more."""
    task = task_of(folder, shape, block)
    if kind == "components":
        return task
    random = np.random.default_rng(1)
    coarse = random.random([n // 4 for n in shape]) < 0.6
    values = coarse.repeat(4, 0).repeat(4, 1).repeat(4, 2).astype(np.uint8) * 255
    write_noise(folder, "mito", values, block)
    write_noise(folder, "mito_mem", random.integers(0, 150, shape, np.uint8), block)
    of = task_kind(PARAMETERS[kind], True)
    assert of is not None
    return of(task.input, task.output, "mito", PARAMETERS[kind], task.block_shape)


def contents(task: LabelsTask) -> dict[str, bytes]:
    """All files of the finished output but the task, which names its folder."""
    return {name: data for name, data in trees.contents(task.output).items() if name != "task.json"}


def elsewhere(task: Labels, name: str) -> Labels:
    return replace(task, output=str(Path(task.output).parents[2] / f"{name}.zarr" / "crop1" / "mito"))


# -- killed ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kind", "workers", "kills", "edge"),
    [
        pytest.param("components", 1, 1, 80, id="here"),
        pytest.param("components", 1, 20, 160, id="here-20", marks=pytest.mark.slow),
        pytest.param("components", 2, 20, 192, id="two-processes-20", marks=pytest.mark.slow),
        pytest.param("walls", 1, 20, 160, id="walls-20", marks=pytest.mark.slow),
        pytest.param("watershed", 1, 20, 160, id="watershed-20", marks=pytest.mark.slow),
        pytest.param("mask", 1, 20, 288, id="mask-20", marks=pytest.mark.slow),
    ],
)
def test_killed_at_any_moment_and_run_again_the_output_is_the_same_to_the_bit(
    tmp_path, starter, kind, workers, kills, edge
):
    whole = replace(task_of_kind(kind, tmp_path, (edge, edge, edge), 16), pyramid=True)
    run_task(whole)
    task = elsewhere(whole, "killed")
    file = tmp_path / "task.json"
    task.save(file)
    command = ["pytc", "run-task", file, f"engine.workers={workers}"]
    chance, in_time = random.Random(edge), 0
    for _ in range(kills):
        before, leader = steps(task), starter.start(command)
        leader.wait_for(lambda before=before: steps(task) != before)  # it has begun to work
        time.sleep(0.3 * chance.random())
        in_time += leader.is_running()
        leader.kill()
    assert in_time >= 0.9 * kills  # it was not done long before
    done = starter.run(command)
    assert done.status == 0, done.said
    assert contents(task) == contents(whole)


def test_what_a_killed_process_left_of_a_chunk_is_removed(tmp_path):
    task = task_of(tmp_path, (32, 32, 32), 16)
    task.claim()
    left = task.folder / "s0" / "0" / "1" / ".1.part-4711-0a0b0c0d"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    run_task(task)
    assert Path(task.output, "s0", "0", "1", "1").exists()
    assert not Path(task.output, "s0", "0", "1", left.name).exists()


def steps(task: LabelsTask) -> int:
    """Files of blocks that are on the disk; the folder may be renamed meanwhile, which `os.walk` does not mind."""
    return sum(name.isdigit() for _, _, files in os.walk(task.folder) for name in files)


# -- what cannot be read -----------------------------------------------------------------------------------------------
def test_a_chunk_that_cannot_be_read_is_named_the_others_are_done_and_mending_it_ends_the_run(tmp_path):
    task = task_of(tmp_path, (48, 48, 48), 16)
    whole = elsewhere(task, "whole")
    run_task(whole)
    chunk = Path(task.input) / "s0" / "1" / "1" / "1"
    good = chunk.read_bytes()
    chunk.write_bytes(good[:50])
    with pytest.raises(BlocksFailedError, match=r"out/crop1/mito, label: 1 of 27 blocks failed \(block 13: .*s0/1/1/1"):
        run_task(task)
    assert DoneMap(task.folder / ".done-label", 27, task.key).missing.tolist() == [13]
    assert not Path(task.output).exists()
    chunk.write_bytes(good)
    told = []
    run_task(task, progress=lambda *step: told.append(step))
    assert told[0] == (26, 27, "label")
    assert contents(task) == contents(whole)


def test_the_verb_exits_with_an_error_and_names_the_chunk(tmp_path, starter):
    task = task_of(tmp_path, (32, 32, 32), 16)
    (Path(task.input) / "s0" / "1" / "0" / "1").write_bytes(b"no chunk")
    for name in ("second", "third"):  # other crops do not suffer
        shutil.copytree(Path(task.input).parent, tmp_path / "in.zarr" / name)
        shutil.copy(Path(task.input) / "s0/0/0/0", tmp_path / "in.zarr" / name / "mito/s0/1/0/1")
    said = starter.run(["pytc", "decode", tmp_path, tmp_path / "labels", "decoding.blockwise_above=0"])
    assert said.status == 1
    assert "in/crop1/mito, label: 1 of 1 blocks failed (block 0: " in said.stderr
    assert "s0/1/0/1" in said.stderr
    assert sorted(p.parent.name for p in (tmp_path / "labels" / "in.zarr").glob("*/mito")) == ["second", "third"]


def test_a_dry_run_says_what_is_left_and_writes_nothing(tmp_path, starter):
    task = task_of(tmp_path, (32, 32, 32), 16)
    shutil.copytree(Path(task.input), Path(task.input).with_name("er"))
    out = tmp_path / "labels"
    command = ["pytc", "decode", tmp_path, out, "--dry-run"]
    said = starter.run([*command, "decoding.blockwise_above=0"])
    assert said.status == 0, said.stderr
    assert "2 array(s): 0 decoded already, 0 to decode whole, 2 block by block" in said.stdout
    rows = {line.split()[0]: line.split()[1:3] for line in said.stdout.splitlines() if line.strip()}
    assert rows["label"] == ["1", "1"]
    assert rows["write"] == ["2", "2"]  # of the mask too
    assert not out.exists()
    said = starter.run(command)
    assert "2 array(s): 0 decoded already, 2 to decode whole, 0 block by block" in said.stdout


# -- what cannot be written --------------------------------------------------------------------------------------------
@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """No file may grow beyond ``size`` bytes: the kernel refuses the write, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [3_000, 20_000])
def test_a_full_disk_ends_it_with_one_line_and_it_goes_on_when_there_is_space(tmp_path, size):
    """At 3 kB no block can be kept; at 20 kB the table of all objects cannot."""
    task = task_of(tmp_path, (32, 32, 32), 16)
    whole = elsewhere(task, "whole")
    run_task(whole)
    with files_up_to(size), pytest.raises(WriteError, match=r"cannot write .*(free space|free)") as error:
        run_task(task)
    assert "\n" not in str(error.value)
    assert not Path(task.output).exists()
    run_task(task)
    assert contents(task) == contents(whole)


# -- what belongs to others --------------------------------------------------------------------------------------------
def test_the_done_map_of_another_task_is_refused(tmp_path):
    task = task_of(tmp_path, (32, 32, 32), 16)
    task.claim()
    DoneMap(task.folder / ".done-label", 8, "0123456789abcdef")
    with pytest.raises(WriteError, match=r"the done-map .*\.done-label is of another task"):
        run_task(task)
    run_task(task, overwrite=True)
    assert objects_of(task) > 0


def test_a_task_means_the_same_in_every_folder(tmp_path, monkeypatch):
    """Paths are absolute from the start, so a run that was begun with relative ones goes on."""
    task = task_of(tmp_path, (32, 32, 32), 16)
    monkeypatch.chdir(tmp_path)
    relative = replace(task, input="in.zarr/crop1/mito", output="out.zarr/crop1/mito")
    assert relative == task
    assert ComponentsTask("s3://bucket/p", "out", "mito", FILLED).input == "s3://bucket/p"
    run_task(relative)
    monkeypatch.chdir(ROOT)
    assert not run_task(task)


def test_a_mask_in_blocks_is_the_mask(tmp_path):
    task = task_of(tmp_path, (40, 33, 50), 16)
    mask = MaskTask(task.input, task.output, "mito", DecodeParameters(threshold=0.5), (16, 16, 16))
    run_task(mask)
    assert objects_of(mask) == 1
    whole = replace(mask, output=str(tmp_path / "w.zarr" / "crop1" / "mito"), block_shape=(64, 64, 64))
    run_task(whole)
    from connectomics.io.multiscale import Multiscale

    read = [Multiscale.open(t.output).read_level(0, (0, 0, 0), (40, 33, 50))[0] for t in (mask, whole)]
    np.testing.assert_array_equal(read[0], read[1])
    assert 0.25 < read[0].mean() < 0.35
    assert contents(mask).keys() == {".zattrs", ".zgroup"} | {n for n in contents(mask) if n.startswith("s0/")}
