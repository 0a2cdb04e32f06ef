"""Objects between the walls of another class, block by block: `decode_class` on the whole array, number by number."""

from __future__ import annotations

import json
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import ndimage

from connectomics.cellmap.catalog import Catalog
from connectomics.cellmap.labels import read_labels
from connectomics.decoding.blocks import groups
from connectomics.decoding.blocks.stitched_task import ComponentsTask
from connectomics.decoding.decode import decode_class
from connectomics.decoding.parameters import DecodeParameters
from connectomics.decoding.prediction import read_on
from connectomics.decoding.probabilities import above
from connectomics.decoding.watershed.watershed_task import WatershedTask
from connectomics.errors import BlocksFailedError, MissingError
from connectomics.geometry import VoxelGrid
from connectomics.io.multiscale import Multiscale
from connectomics.io.write import write_multiscale
from connectomics.pipeline.run_task import load_task
from connectomics.tasks import run_task
from tests.decoding.decode_kit import decode_predictions

STAGES = ("label", "unite", "cores", "grow", "unite-grown", "write")
KINDS = {"cc3d": ComponentsTask, "watershed": WatershedTask}


def smooth(seed, shape, low):
    """Smooth blobs of probability, 0 for a share ``low`` of the voxels."""
    random = np.random.default_rng(seed)
    values = ndimage.gaussian_filter(random.standard_normal(shape), random.uniform(0.5, 2.0))
    values -= np.quantile(values, low)
    return (np.clip(values / max(values.max(), 1e-6), 0, 1) * 255).astype(np.uint8)


def sheets(seed, shape):
    """Walls as they are: thin sheets, some with gaps, where a smooth field is near one of its levels."""
    random = np.random.default_rng(seed)
    values = ndimage.gaussian_filter(random.standard_normal(shape), 2.0)
    values /= max(np.abs(values).max(), 1e-6)
    near = np.exp(-((values / 0.15) ** 2)) * random.uniform(0.7, 1.0, shape)
    return np.rint(near * 255).astype(np.uint8)


def write(folder, name, values, grid):
    location = folder / "in" / "d.zarr" / "c" / name
    about = {"artefact": "probability", "class_name": name, "complete": True}
    write_multiscale(location, values, grid, attrs={"connectomics": about})
    return location


def read(location):
    source = Multiscale.open(str(location))
    return source.read_level(0, (0, 0, 0), source.levels[0].grid.shape)[0]


def task_of(folder, cell, walls, parameters, block, voxel_size=(8.0, 8.0, 8.0), wall_grid=None):
    grid = VoxelGrid(voxel_size, (0, 0, 0), cell.shape)
    source = write(folder, "cell", cell, grid)
    write(folder, "pm", walls, wall_grid or grid)
    output = folder / "out" / "d.zarr" / "c" / "cell"
    return KINDS[parameters.method](str(source), str(output), "cell", parameters, block)


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(1, 24), st.integers(1, 24), st.integers(1, 24)),
    block=st.tuples(st.integers(5, 12), st.integers(5, 12), st.integers(5, 12)),
    voxel_size=st.sampled_from([(8.0, 8.0, 8.0), (20.0, 4.0, 4.0)]),
    method=st.sampled_from(["cc3d", "watershed"]),
    connectivity=st.sampled_from([6, 18, 26]),
    dtype=st.sampled_from([np.uint8, np.float16]),
    levels=st.sampled_from([2, 8, 255]),
    min_size=st.sampled_from([0.0, 4000.0]),
    fill_holes=st.booleans(),
    group=st.sampled_from([(1, 1, 1), (1, 2, 1), (4, 4, 4)]),
)
def test_blocks_give_the_labels_of_the_whole_array(
    tmp_path_factory, seed, shape, block, voxel_size, method, connectivity, dtype, levels, min_size, fill_holes, group
):
    """Also with few levels of probability, where most voxels are equally high and their order decides."""
    folder = tmp_path_factory.mktemp("between")
    cell = smooth(seed, shape, 0.2)
    walls = sheets(seed + 1, shape) if seed % 2 else smooth(seed + 1, shape, 0.5)
    walls = (np.rint(walls / 255 * levels) / levels * 255).astype(np.uint8)
    if dtype == np.float16:
        cell, walls = ((v / np.float32(255)).astype(np.float16) for v in (cell, walls))
    deep = {"max_depth_nm": 30.0, "min_distance_nm": 16.0} if method == "watershed" else {}
    parameters = DecodeParameters(
        threshold=0.1,
        method=method,
        min_size_nm3=min_size,
        fill_holes=fill_holes,
        connectivity=connectivity,
        boundary="pm",
        **deep,
    )
    task = task_of(folder, cell, walls, parameters, block, voxel_size)
    with patch.object(groups, "GROUP", group):
        run_task(task)
    found = read(task.output)
    expected = decode_class(above(cell, 0.1), voxel_size, parameters, boundary=walls)
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == expected.dtype


@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32 - 1),
    ratio=st.sampled_from([0.5, 0.7, 1.0, 1.31, 2.0, 3.7]),
    shift=st.sampled_from([0.0, 2.0, -37.3]),
    block=st.tuples(st.integers(6, 12), st.integers(6, 12), st.integers(6, 12)),
    dtype=st.sampled_from([np.uint8, np.float16]),
)
def test_walls_on_another_grid_are_the_same_in_every_block(tmp_path_factory, seed, ratio, shift, block, dtype):
    """They are predicted at another voxel size, beside the class or beyond it."""
    folder = tmp_path_factory.mktemp("grids")
    cell = smooth(seed, (18, 21, 16), 0.1)
    grid = VoxelGrid((8.0, 8.0, 8.0), (0, 0, 0), cell.shape)
    wall_grid = VoxelGrid((8.0 * ratio,) * 3, (shift,) * 3, tuple(max(1, round(n / ratio)) for n in cell.shape))
    walls = sheets(seed, wall_grid.shape)
    walls = (walls / np.float32(255)).astype(np.float16) if dtype == np.float16 else walls
    parameters = DecodeParameters(threshold=0.3, method="cc3d", boundary="pm", connectivity=6)
    task = task_of(folder, cell, walls, parameters, block, wall_grid=wall_grid)
    run_task(task)
    moved = read_on(Multiscale.open(str(folder / "in/d.zarr/c/pm")), grid)
    np.testing.assert_array_equal(
        read(task.output), decode_class(above(cell, 0.3), (8.0, 8.0, 8.0), parameters, boundary=moved)
    )


@pytest.mark.parametrize("method", ["cc3d", "watershed"])
@pytest.mark.parametrize(("name", "wall"), [("mito", "mito_mem"), ("er", "er_mem")])
def test_organelles_of_the_phantom(phantom, tmp_path, name, wall, method):
    """Blurred labels as probabilities; voxels are no cubes."""
    crop = Catalog.open(str(phantom)).crop("phantom-aniso", "crop203")
    labels = read_labels(crop, (name, wall), crop.grid)
    cell, walls = (
        np.rint(255 * ndimage.gaussian_filter(labels.present_of(n).astype(np.float32), 0.7)).astype(np.uint8)
        for n in (name, wall)
    )
    assert cell.any()
    assert walls.any()
    parameters = DecodeParameters(threshold=0.4, method=method, boundary="pm", fill_holes=True)
    task = task_of(tmp_path, cell, walls, parameters, (16, 24, 24), crop.grid.voxel_size)
    run_task(task)
    expected = decode_class(above(cell, 0.4), crop.grid.voxel_size, parameters, boundary=walls)
    np.testing.assert_array_equal(read(task.output), expected)
    assert expected.max() > 0


def made(folder, method="cc3d"):
    parameters = DecodeParameters(threshold=0.3, method=method, boundary="pm", fill_holes=True)
    return task_of(folder, smooth(3, (40, 37, 45), 0.05), sheets(3, (40, 37, 45)), parameters, (16, 16, 16))


@pytest.mark.parametrize("method", ["cc3d", "watershed"])
def test_a_stored_task_goes_on_from_every_stage_where_it_was_stopped(tmp_path, method):
    whole = made(tmp_path, method)
    run_task(whole)
    expected = read(whole.output)
    assert expected.max() > 3
    task = replace(whole, output=str(tmp_path / "again" / "d.zarr" / "c" / "cell"))
    task.save(tmp_path / "task.json")
    assert json.loads((tmp_path / "task.json").read_text())["parameters"]["boundary"] == "pm"
    seen = []
    for stage in STAGES:

        def stop(done, number, at="", stage=stage):
            seen.append((at, done, number))
            if at == stage and done == number:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run_task(load_task(tmp_path / "task.json"), progress=stop)
    assert [at for at, done, _ in seen if done == 0] == list(STAGES)  # each began once
    run_task(load_task(tmp_path / "task.json"))
    np.testing.assert_array_equal(read(task.output), expected)
    assert not task.folder.exists()


@pytest.mark.parametrize("method", ["cc3d", "watershed"])
def test_decode_gives_the_same_whole_and_block_by_block(tmp_path, method):
    made(tmp_path, method)
    parameters = {"cell": DecodeParameters(threshold=0.3, method=method, boundary="pm", min_size_nm3=3e4)}
    results = []
    for limit in (10**9, 0):
        out = tmp_path / f"labels{limit}"
        (done,) = decode_predictions(tmp_path / "in", out, parameters, classes=["cell"], blockwise_above=limit)
        results.append((read(done.job.location), done.objects, (out / "d.zarr/c/cell/instances.csv").read_bytes()))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    assert results[0][1:] == results[1][1:]


def test_walls_that_are_not_there_and_chunks_that_are_missing_are_named(tmp_path):
    task = made(tmp_path)
    chunk = tmp_path / "in/d.zarr/c/pm/s0/0/0/0"
    stored = chunk.read_bytes()
    chunk.unlink()
    with pytest.raises(BlocksFailedError, match=r"c/pm lacks chunks around voxel .*; run predict again"):
        run_task(task)
    chunk.write_bytes(stored)
    run_task(task)
    lost = replace(task, parameters=replace(task.parameters, boundary="no"), output=str(tmp_path / "o/d.zarr/c/cell"))
    with pytest.raises(MissingError, match=r"no prediction of no at .*/c/no, the boundary that cell"):
        run_task(lost)


def test_a_core_in_several_pieces_is_one_object(tmp_path):
    """A shell with an island in its cavity that a wall covers: filling the core takes the cavity in, and the island is
    the shell's although nothing of the mask joins them."""
    cell = np.zeros((24, 24, 24), np.uint8)
    cell[2:22, 2:22, 2:22] = 255
    cell[5:19, 5:19, 5:19] = 0
    cell[10:14, 10:14, 10:14] = 255
    walls = np.where(np.indices(cell.shape).min(0) >= 9, 200, 0).astype(np.uint8)
    walls[:5] = walls[:, :5] = walls[:, :, :5] = walls[19:] = walls[:, 19:] = walls[:, :, 19:] = 0
    parameters = DecodeParameters(method="cc3d", boundary="pm", fill_holes=True)
    task = task_of(tmp_path, cell, walls, parameters, (6, 7, 8))
    run_task(task)
    np.testing.assert_array_equal(read(task.output), (cell > 0).astype(np.uint8))
    assert decode_class(cell > 127, (8, 8, 8), parameters, boundary=walls)[12, 12, 12] == 1
    task = replace(task, parameters=replace(parameters, fill_holes=False))
    run_task(task, overwrite=True)
    assert read(task.output)[12, 12, 12] == 0  # the island holds together with no core
