"""Components block by block: the same bytes as from the whole array, whatever the blocks, killed or not."""

from __future__ import annotations

import csv
import dataclasses
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest.mock import patch

import cc3d
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from connectomics.config.schema import EngineConfig
from connectomics.config.values import plain
from connectomics.decoding.blocks import groups, labels_task
from connectomics.decoding.blocks.labels_task import objects_of
from connectomics.decoding.blocks.pieces import Pieces
from connectomics.decoding.blocks.stitched_task import ComponentsTask
from connectomics.decoding.decode import decode_class
from connectomics.decoding.label_artifact import write_table
from connectomics.decoding.parameters import DecodeParameters
from connectomics.decoding.watershed.watershed_task import WatershedTask
from connectomics.errors import BlocksFailedError, ConfigError, InputError, MetadataError, WriteError
from connectomics.geometry import VoxelGrid
from connectomics.io import store
from connectomics.io.multiscale import Multiscale
from connectomics.io.write import ArrayWriter, write_multiscale
from connectomics.tasks import claims, run_task
from connectomics.tasks.blocks import BlockFiles, Lattice
from connectomics.tasks.estimate import estimate
from tests.decoding.decode_kit import decode_predictions
from tests.trees import contents

SIZE = (8.0, 4.0, 5.24)
#: Groups of blocks that a worker unites.
GROUPS = [(4, 4, 4), (1, 1, 1), (2, 1, 2)]
#: share of foreground near which components begin to span the volume: the most contacts across borders
PERCOLATION = {6: 0.31, 18: 0.14, 26: 0.10}


def write_input(folder: Path, values: np.ndarray) -> str:
    location = folder / "in.zarr" / "crop1" / "mito"
    about = {"artefact": "probability", "class_name": "mito", "complete": True, "model": {"sha256": "abc"}}
    grid = VoxelGrid(SIZE, (804.0, 1602.5, 404.0), values.shape)
    write_multiscale(location, values, grid, attrs={"connectomics": about}, overwrite=True)
    return str(location)


def noise(connectivity: int, shape: tuple[int, int, int] = (21, 34, 27), seed: int = 0) -> np.ndarray:
    mask = np.random.default_rng(seed).random(shape) < PERCOLATION[connectivity]
    return mask.astype(np.uint8) * 255


def task_of(folder: Path, values: np.ndarray, block: tuple[int, int, int], **parameters: float) -> ComponentsTask:
    chosen = DecodeParameters(method="cc3d", **parameters)
    output = str(folder / "out.zarr" / "crop1" / "mito")
    return ComponentsTask(write_input(folder, values), output, "mito", chosen, block, {"model": {"sha256": "abc"}})


def run(task: ComponentsTask, overwrite: bool = False) -> int:
    run_task(task, overwrite=overwrite)
    return objects_of(task)


def stored(task: ComponentsTask) -> np.ndarray:
    volume = Multiscale.open(task.output)
    return volume.read_level(0, (0, 0, 0), volume.grid.shape)[0]


def rows(task: ComponentsTask) -> list[dict[str, str]]:
    with (Path(task.output) / "instances.csv").open() as file:
        return list(csv.DictReader(file))


def files(task: ComponentsTask) -> dict[str, bytes]:
    """Everything in the output; of the task what is not the folder's name."""
    return {name: content for name, content in contents(task.output).items() if name != "task.json"}


# -- equality with the whole array -------------------------------------------------------------------------------------
@pytest.mark.parametrize("connectivity", [6, 18, 26])
@pytest.mark.parametrize(
    "block",
    [(8, 8, 8), (1, 34, 9), (40, 40, 40)]
    + [pytest.param(block, marks=pytest.mark.slow) for block in ((7, 10, 13), (5, 1, 27), (21, 3, 4))],
)
def test_labels_are_those_of_the_whole_array_number_by_number(tmp_path, connectivity, block):
    values = noise(connectivity)
    task = task_of(tmp_path, values, block, connectivity=connectivity)
    with patch.object(groups, "GROUP", GROUPS[connectivity % 3]):
        n = run(task)
    whole = cc3d.connected_components(values > 127, connectivity=connectivity)
    np.testing.assert_array_equal(stored(task), whole)
    assert n == whole.max() == len(rows(task))
    expected = decode_class(values, SIZE, task.parameters)
    assert stored(task).dtype == expected.dtype


@pytest.mark.parametrize("voxels", [2, 5, 40])
@pytest.mark.parametrize("block", [(8, 8, 8), (3, 11, 27), (1, 9, 27)])
def test_small_objects_are_small_in_the_volume_not_in_a_block(tmp_path, voxels, block):
    values = noise(26, seed=1)
    task = task_of(tmp_path, values, block, min_size_nm3=voxels * float(np.prod(SIZE)))
    n = run(task)
    expected = decode_class(values, SIZE, task.parameters)
    assert 0 < n == expected.max()
    np.testing.assert_array_equal(stored(task), expected)


def test_what_holds_together_only_across_an_edge_or_a_corner_of_blocks(tmp_path):
    """Pairs of voxels around corners where eight blocks meet: joined by 18 along edges, by 26 along diagonals."""
    pairs = [
        ((3, 3, 1), (4, 4, 1), 18), ((3, 4, 6), (4, 3, 6), 18), ((3, 1, 4), (4, 1, 3), 18), ((1, 3, 4), (1, 4, 3), 18),
        ((3, 3, 3), (4, 4, 4), 26), ((3, 3, 4), (4, 4, 3), 26), ((3, 4, 3), (4, 3, 4), 26), ((3, 4, 4), (4, 3, 3), 26),
        ((3, 3, 1), (4, 4, 2), 26), ((3, 4, 6), (4, 3, 5), 26), ((3, 1, 1), (4, 1, 1), 6), ((3, 1, 1), (4, 2, 2), 26),
    ]  # fmt: skip
    values = np.zeros((8 * len(pairs), 8, 8), np.uint8)
    for k, (a, b, _) in enumerate(pairs):
        values[8 * k : 8 * k + 8][a] = values[8 * k : 8 * k + 8][b] = 255
    for connectivity in (6, 18, 26):
        task = task_of(tmp_path, values, (4, 4, 4), connectivity=connectivity)
        run(task, overwrite=True)
        for k, (a, b, joined_by) in enumerate(pairs):
            found = stored(task)[8 * k : 8 * k + 8]
            assert (found[a] == found[b]) == (connectivity >= joined_by), (a, b)


def test_one_object_through_all_blocks_and_none_at_all(tmp_path):
    values = np.zeros((9, 24, 25), np.uint8)
    values[::2, :, :] = 200
    values[1::4, 0, 0] = 200  # a comb that turns at every second layer
    values[3::4, -1, -1] = 200
    task = task_of(tmp_path, values, (2, 5, 5), connectivity=6)
    assert run(task) == 1
    np.testing.assert_array_equal(stored(task), values > 0)
    empty = task_of(tmp_path, np.zeros((9, 24, 25), np.uint8), (4, 8, 8))
    assert run(empty, overwrite=True) == 0
    assert not stored(empty).any()
    assert rows(empty) == []


# -- holes -------------------------------------------------------------------------------------------------------------
def shells(seed: int) -> np.ndarray:
    """Closed, open and broken shells (balls, octahedra, boxes) in each other and over the border, and some noise."""
    rng = np.random.default_rng(seed)
    shape = rng.integers(3, 24, 3)
    volume = np.zeros(shape, bool)
    z, y, x = np.ogrid[: shape[0], : shape[1], : shape[2]]
    for _ in range(rng.integers(1, 25)):
        center, radius, power = rng.uniform(0, shape), rng.uniform(1, 9), rng.choice([1, 2, 8])
        away = sum(np.abs(g - c) ** power for g, c in zip((z, y, x), center, strict=True)) ** (1 / power)
        if rng.random() < 0.3:
            volume[away <= radius] = False
        volume[(away <= radius) & (away > radius - rng.uniform(0.8, 2.5))] = True
    if rng.random() < 0.4:
        volume ^= rng.random(shape) < 0.05
    return volume.astype(np.uint8) * 255


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    block=st.tuples(*[st.integers(4, 14)] * 3),
    connectivity=st.sampled_from([6, 18, 26]),
    least=st.sampled_from([0, 4, 20]),
    method=st.sampled_from(["cc3d", "threshold"]),
    group=st.sampled_from(GROUPS),
)
def test_holes_are_filled_as_in_the_whole_array(tmp_path_factory, seed, block, connectivity, least, method, group):
    """Nested shells: a cavity goes to the innermost object around it, whatever blocks it lies in."""
    values = shells(seed)
    parameters = {"connectivity": connectivity, "min_size_nm3": least * float(np.prod(SIZE)), "fill_holes": True}
    task = task_of(tmp_path_factory.mktemp("holes"), values, block, **parameters)
    task = dataclasses.replace(task, parameters=dataclasses.replace(task.parameters, method=method))
    with patch.object(groups, "GROUP", group):
        n = run(task)
    expected = decode_class(values, SIZE, task.parameters)
    np.testing.assert_array_equal(stored(task), expected)
    assert n == expected.max()
    if method == "cc3d":
        table = task.output + ".csv"
        write_table(Path(table), Pieces.measured(expected, n, (0, 0, 0), expected.shape), task.grid)
        assert Path(table).read_bytes() == Path(task.output, "instances.csv").read_bytes()


def test_a_cavity_across_blocks_belongs_to_the_inner_of_two_shells(tmp_path):
    values = np.zeros((24, 24, 24), np.uint8)
    for low, high in ((1, 23), (2, 22), (6, 18), (7, 17), (11, 13)):
        values[low:high, low:high, low:high] ^= 255
    task = task_of(tmp_path, values, (8, 8, 8), fill_holes=True)
    assert run(task) == 3
    found = stored(task)
    assert [found[at, 12, 12] for at in (0, 1, 4, 6, 9, 12)] == [0, 1, 1, 2, 2, 3]
    assert [int(row["voxels"]) for row in rows(task)] == [22**3 - 12**3, 12**3 - 2**3, 2**3]


@pytest.mark.parametrize("method", ["cc3d", "threshold"])
@pytest.mark.parametrize("fill_holes", [False, True])
def test_masks_are_cleaned_as_in_the_whole_array(tmp_path, method, fill_holes):
    values = noise(26, seed=4)
    task = task_of(tmp_path, values, (8, 9, 27), min_size_nm3=5 * float(np.prod(SIZE)), fill_holes=fill_holes)
    task = dataclasses.replace(task, parameters=dataclasses.replace(task.parameters, method=method))
    n = run(task)
    expected = decode_class(values, SIZE, task.parameters)
    np.testing.assert_array_equal(stored(task), expected)
    assert (n, stored(task).dtype) == (expected.max(), expected.dtype)
    assert Path(task.output, "instances.csv").exists() == (method == "cc3d")


def test_each_contact_between_blocks_is_looked_at_once():
    lattice = Lattice((5, 5, 5), (2, 2, 2))
    for connectivity, expected in ((6, 54), (18, 126), (26, 158)):
        pairs = [(n, m) for n in range(len(lattice)) for _, m in lattice.neighbors(n, connectivity)]
        assert len(pairs) == len(set(pairs)) == expected  # of a 3x3x3 lattice
        assert all(n < m for n, m in pairs)
        behind = [(m, n) for n in range(len(lattice)) for _, m in lattice.neighbors(n, connectivity, behind=True)]
        assert sorted(behind) == sorted(pairs)


# -- the table ---------------------------------------------------------------------------------------------------------
def test_the_table_says_size_box_and_center_in_nanometres(tmp_path):
    values = np.zeros((20, 20, 20), np.uint8)
    values[2:6, 3:9, 5:15] = 255
    values[15, 15, 15] = 255
    task = task_of(tmp_path, values, (4, 7, 6))
    run(task)
    first, second = rows(task)
    assert (first["id"], first["voxels"]) == ("1", "240")
    assert float(first["volume_nm3"]) == pytest.approx(240 * 8 * 4 * 5.24)
    begin = [804.0 + 1.5 * 8, 1602.5 + 2.5 * 4, 404.0 + 4.5 * 5.24]
    end = [804.0 + 5.5 * 8, 1602.5 + 8.5 * 4, 404.0 + 14.5 * 5.24]
    for axis, low, high in zip("zyx", begin, end, strict=True):
        assert float(first[f"begin_{axis}_nm"]) == pytest.approx(low, abs=1e-3)
        assert float(first[f"end_{axis}_nm"]) == pytest.approx(high, abs=1e-3)
        assert float(first[f"center_{axis}_nm"]) == pytest.approx((low + high) / 2, abs=1e-3)
    assert float(second["center_x_nm"]) == pytest.approx(404.0 + 15 * 5.24, abs=1e-3)


# -- killed, resumed, refused ------------------------------------------------------------------------------------------
class Killed(BaseException):
    pass


def stop_at(last: str) -> Callable[..., None]:
    """Progress of a run that is killed when a stage begins."""

    def progress(done: int, number: int, stage: str = "") -> None:
        if stage == last:
            raise Killed

    return progress


def test_killed_at_any_write_it_goes_on_and_writes_the_same_bytes(tmp_path, monkeypatch):
    values = noise(26, (20, 20, 20), seed=2)
    undisturbed = task_of(tmp_path, values, (10, 10, 11))
    run(undisturbed)
    task = dataclasses.replace(undisturbed, output=str(tmp_path / "again.zarr" / "crop1" / "mito"))
    write, attempts = ArrayWriter.write, 0
    while not Path(task.output).exists():
        attempts += 1
        left = attempts  # writes until the next kill

        def until_killed(writer: ArrayWriter, *arguments: object) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            write(writer, *arguments)

        monkeypatch.setattr(ArrayWriter, "write", until_killed)
        with suppress(Killed):
            run_task(task)
    assert attempts > 4
    assert files(task) == files(undisturbed)
    assert sorted(p.name for p in Path(task.output).parent.iterdir()) == [".zgroup", "mito"]


@pytest.mark.parametrize(
    "function",
    [
        *(
            "stitched_task.joined",
            "stitched_task.gathered",
            "stitched_task.save_mapped",
            "stitched_task.StitchedTask.create",
        ),
        "stitched_task.write_tables",
        *("labels_task.create_array", "labels_task.update_attrs", "labels_task.remove_tree", "labels_task.publish"),
    ],
)
def test_killed_between_the_steps(tmp_path, monkeypatch, function):
    values = noise(26, (20, 20, 20), seed=2)
    undisturbed = task_of(tmp_path, values, (10, 7, 11))
    run(undisturbed)
    task = dataclasses.replace(undisturbed, output=str(tmp_path / "again.zarr" / "crop1" / "mito"))

    def kill(*arguments: object, **named: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(f"connectomics.decoding.blocks.{function}", kill)
        with pytest.raises(Killed):
            run(task)
    run(task)
    assert files(task) == files(undisturbed)


def test_killed_while_it_goes_on_after_a_version_without_groups(tmp_path, monkeypatch):
    """Earlier versions left the array of the labels without the files of the groups: these are made, all or none."""
    undisturbed = task_of(tmp_path, noise(26, (20, 20, 20), seed=2), (10, 7, 11))
    run(undisturbed)
    task = dataclasses.replace(undisturbed, output=str(tmp_path / "again.zarr" / "crop1" / "mito"))
    monkeypatch.setattr(groups, "GROUP", (1, 1, 1))

    def kill(*arguments: object) -> None:
        raise Killed

    with pytest.raises(Killed):
        run_task(task, progress=stop_at("write"))
    for path in (task.scratch / "labels_of").iterdir():
        path.unlink()
    save = BlockFiles.save

    def once(blocks: BlockFiles, number: int, arrays: dict[str, np.ndarray]) -> None:
        save(blocks, number, arrays)
        kill()

    with monkeypatch.context() as patch:
        patch.setattr(BlockFiles, "save", once)
        with pytest.raises(Killed):
            run(task)
    assert len(list((task.scratch / "labels_of").iterdir())) == 1
    run(task)
    assert files(task) == files(undisturbed)


@pytest.mark.parametrize(
    ("kind", "share", "parameters"),
    [
        (ComponentsTask, 0.1, {"connectivity": 6}),
        (ComponentsTask, 0.3, {"connectivity": 6, "min_size_nm3": 4000.0}),
        pytest.param(ComponentsTask, 0.3, {"connectivity": 6, "fill_holes": True}, marks=pytest.mark.slow),
        pytest.param(WatershedTask, 0.6, {"min_distance_nm": 4.0}, marks=pytest.mark.slow),
    ],
)
def test_the_estimate_holds_for_uniting_noise(tmp_path, kind, share, parameters):
    values = (np.random.default_rng(0).random((64, 64, 64)) < share).astype(np.uint8) * 255
    method = "cc3d" if kind is ComponentsTask else "watershed"
    chosen = DecodeParameters(method=method, **parameters)
    task = kind(write_input(tmp_path, values), str(tmp_path / "out.zarr/crop1/mito"), "mito", chosen, (16, 16, 16))
    with pytest.raises(Killed):
        run_task(task, progress=stop_at("write"))
    worker, cost = task.label_worker("unite"), task.cost("unite")
    tracemalloc.start()
    try:
        worker.do(0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert cost.memory / 2.5 < peak < cost.memory


@pytest.mark.parametrize("killed_in", ["", "remove_tree", "publish"])
def test_a_job_that_comes_late_to_the_end_of_a_shared_decode_ends_with_it(tmp_path, monkeypatch, killed_in):
    """It has looked at a stage; then another one ends the whole task, or is killed in its last steps."""
    undisturbed = task_of(tmp_path, noise(26, (20, 20, 20), seed=2), (10, 10, 11))
    run(undisturbed)
    task = dataclasses.replace(undisturbed, output=str(tmp_path / "again.zarr" / "crop1" / "mito"))
    engine, turns = EngineConfig(share=True), iter(range(100))

    def kill(*arguments: object, **named: object) -> None:
        raise Killed

    @contextmanager
    def leading(*arguments: object, **named: object) -> Iterator[object]:
        with claims_leading(*arguments, **named) as require:
            yield require
        if next(turns) == 1:  # after the first stage was prepared
            with monkeypatch.context() as patch, suppress(Killed):
                if killed_in:
                    patch.setattr(labels_task, killed_in, kill)
                run_task(task, engine)
            assert Path(task.output).exists() == (not killed_in)

    claims_leading = claims.leading
    monkeypatch.setattr(claims, "leading", leading)
    run_task(task, engine)
    assert files(task) == files(undisturbed)


@pytest.mark.slow
def test_a_dry_run_names_what_it_cannot_time(tmp_path):
    task = task_of(tmp_path, noise(26, (20, 20, 20)), (10, 10, 10))
    found = estimate([task], EngineConfig())
    assert [(s.stage, s.blocks, s.seconds is not None) for s in found.stages] == [
        ("label", 8, True), ("unite", 1, False), ("write", 8, False)
    ]  # fmt: skip
    assert found.untimed == "unite could not be tried alone: it needs all blocks of the stages before it"


def test_a_dry_run_of_what_lacks_only_its_last_step(tmp_path, monkeypatch):
    task = task_of(tmp_path, noise(26, (20, 20, 20)), (10, 10, 10))

    def kill(folder: Path, *, maps: bool) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("connectomics.decoding.blocks.labels_task.remove_traces", kill)
        with pytest.raises(Killed):
            run(task)
    assert task.is_complete
    assert [s.left for s in estimate([task], EngineConfig(), timed=False).stages] == [0, 0, 0]
    assert run(task) > 0


def test_a_finished_output_stays_and_another_tasks_is_refused(tmp_path):
    task = task_of(tmp_path, noise(26), (8, 8, 8))
    run(task)
    before = files(task)
    assert not run_task(task)
    assert files(dataclasses.replace(task, block_shape=(5, 5, 5))) == before
    assert ComponentsTask.load(Path(task.output) / "task.json") == task
    other = dataclasses.replace(task, parameters=DecodeParameters(method="cc3d", connectivity=6))
    with pytest.raises(WriteError, match=r"holds labels made with other settings \(connectivity\); overwrite them"):
        run(other)
    run(other, overwrite=True)
    assert files(other) != before


def test_what_another_task_began_is_refused_and_replaced_on_demand(tmp_path):
    task = task_of(tmp_path, noise(26), (8, 8, 8))

    def kill(done: int, number: int, stage: str = "") -> None:
        if done > 0:
            raise Killed

    with pytest.raises(Killed):
        run_task(task, progress=kill)
    other = dataclasses.replace(task, block_shape=(9, 9, 9))
    with pytest.raises(
        WriteError, match=r"\.mito\.partial holds unfinished labels made with other settings \(block_shape\)"
    ):
        run(other)
    assert run(other, overwrite=True) == run(task)  # a finished output is the same whatever the blocks


def test_another_method_and_what_is_no_input_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="expected method cc3d or threshold, got watershed"):
        ComponentsTask("in", "out", "mito", DecodeParameters(method="watershed"))
    with pytest.raises(ConfigError, match="three positive numbers"):
        ComponentsTask("in", "out", "mito", DecodeParameters(method="cc3d"), (0, 8, 8))
    task = task_of(tmp_path, noise(26), (8, 8, 8))
    grid = VoxelGrid(SIZE, (0, 0, 0), (4, 4, 4))
    write_multiscale(task.input, np.zeros((4, 4, 4), np.float32), grid, overwrite=True)
    with pytest.raises(InputError, match="expected uint8 or float16 probabilities, got float32"):
        run(task)
    task = task_of(tmp_path, noise(26), (8, 8, 8))
    (Path(task.input) / "s0" / "0" / "0" / "0").unlink()
    with pytest.raises(BlocksFailedError, match=r"of 60 blocks all failed .*lacks chunks"):
        run(task)
    (tmp_path / "task.json").write_text('{"kind": "components", "raw": 1}')
    with pytest.raises(MetadataError, match=r"unknown key .raw."):
        ComponentsTask.load(tmp_path / "task.json")


# -- decode ------------------------------------------------------------------------------------------------------------
def test_decode_takes_large_arrays_block_by_block_with_the_same_result(tmp_path):
    values = noise(26, (40, 41, 42))
    write_input(tmp_path, values)
    parameters = {"mito": DecodeParameters(method="cc3d", min_size_nm3=500.0, min_distance_nm=99.0)}
    told: list[tuple[int, int, str]] = []

    def decode(out: str, limit: int):
        tell = lambda *step: told.append(step)  # noqa: E731
        folder = tmp_path / out
        (done,) = decode_predictions(
            tmp_path, folder, parameters, classes=["mito"], blockwise_above=limit, progress=tell
        )
        task = ComponentsTask("in", str(done.job.location), "mito", parameters["mito"])
        return done, {name: content for name, content in files(task).items()}

    # the input is found as data set "in"
    whole, expected = decode("whole", values.size)
    assert told == []
    blocks, found = decode("blocks", values.size - 1)
    assert told == [(done, 1, f"in/crop1/mito, {stage}") for stage in ("label", "unite", "write") for done in (0, 1)]
    assert blocks.objects == whole.objects > 10
    assert found == expected  # voxels, attributes and table, byte by byte
    assert decode("blocks", values.size - 1)[0].skipped
    assert decode("blocks", values.size)[0].skipped


def test_decode_keeps_in_memory_what_needs_the_whole_array(tmp_path):
    values = noise(26, (20, 20, 20))
    write_input(tmp_path, values)
    chosen = DecodeParameters(method="watershed", min_size_nm3=500.0)
    (done,) = decode_predictions(tmp_path, tmp_path / "out", {"mito": chosen}, blockwise_above=0)
    assert done.objects == decode_class(values, SIZE, chosen).max()
    assert store.read_attrs(done.job.location)["connectomics"]["decode"] == plain(chosen)


# -- memory ------------------------------------------------------------------------------------------------------------
MEASURE = """
import re, sys
from connectomics.decoding.blocks.stitched_task import ComponentsTask
from connectomics.decoding.blocks.labels_task import objects_of
from connectomics.decoding.parameters import DecodeParameters
from connectomics.tasks import claims, run_task
chosen = DecodeParameters(method="cc3d", min_size_nm3=1e4)
task = ComponentsTask(sys.argv[1], sys.argv[2], "mito", chosen, (64, 128, 128))
run_task(task)
print(objects_of(task))
print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])  # ru_maxrss would count the parent
"""


def test_a_larger_volume_takes_no_more_memory(tmp_path):
    peaks = []
    for layers in (128, 384):
        z, y, x = np.ogrid[:layers, :128, :128]
        balls = ((z % 16 - 8) ** 2 + (y % 16 - 8) ** 2 + (x % 16 - 8) ** 2 < 36).astype(np.uint8) * 255
        source = write_input(tmp_path / str(layers), balls)
        command = [sys.executable, "-c", MEASURE, source, str(tmp_path / f"{layers}.zarr" / "mito")]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        assert int(out[0]) == layers // 16 * 64
        peaks.append(int(out[1]))
    assert peaks[1] < 1.1 * peaks[0]
