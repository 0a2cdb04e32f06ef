"""The watershed block by block: the labels of the whole array, number by number, wherever the blocks are cut."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from connectomics.decoding.blocks import groups
from connectomics.decoding.decode import decode_class
from connectomics.decoding.parameters import DecodeParameters
from connectomics.decoding.watershed.watershed_task import WatershedTask
from connectomics.geometry import VoxelGrid
from connectomics.io.multiscale import Multiscale
from connectomics.io.write import create_multiscale
from connectomics.tasks import run_task


def write(folder, values, voxel_size):
    location = folder / "in" / "d.zarr" / "c" / "mito"
    grid = VoxelGrid(voxel_size, (0, 0, 0), values.shape)
    about = {"artefact": "probability", "class_name": "mito", "complete": True}
    (writer,) = create_multiscale(location, [grid], values.dtype, attrs={"connectomics": about})
    writer.write((0, 0, 0), values)
    return location


def read(location):
    source = Multiscale.open(str(location))
    return source.read_level(0, (0, 0, 0), source.levels[0].grid.shape)[0]


def noise(seed, shape):
    """Smooth blobs that touch, with rough edges."""
    random = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(random.standard_normal(shape), random.uniform(0.5, 2.5))
    smooth -= np.quantile(smooth, random.uniform(0.2, 0.7))
    return (np.clip(smooth / max(smooth.max(), 1e-6), 0, 1) * 255).astype(np.uint8)


ANY_ARRAY = given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(1, 26), st.integers(1, 26), st.integers(1, 26)),
    block=st.tuples(st.integers(3, 12), st.integers(3, 12), st.integers(3, 12)),
    voxel_size=st.sampled_from([(8.0, 8.0, 8.0), (20.0, 4.0, 4.0), (5.24, 4.0, 4.0)]),
    connectivity=st.sampled_from([6, 18, 26]),
    min_distance=st.sampled_from([8.0, 24.0]),
    max_depth=st.sampled_from([12.0, 30.0, 200.0]),
    min_size=st.sampled_from([0.0, 4000.0]),
    fill_holes=st.booleans(),
    group=st.sampled_from([(1, 1, 1), (2, 1, 2), (2, 2, 2), (4, 4, 4)]),
)


def check(
    tmp_path_factory, seed, shape, block, voxel_size, connectivity, min_distance, max_depth, min_size, fill_holes, group
):
    folder = tmp_path_factory.mktemp("watershed")
    values = noise(seed, shape)
    parameters = DecodeParameters(
        threshold=0.1,
        method="watershed",
        min_size_nm3=min_size,
        fill_holes=fill_holes,
        connectivity=connectivity,
        min_distance_nm=min_distance,
        max_depth_nm=max_depth,
    )
    source = write(folder, values, voxel_size)
    output = folder / "out" / "d.zarr" / "c" / "mito"
    with patch.object(groups, "GROUP", group):
        run_task(WatershedTask(str(source), str(output), "mito", parameters, block))
    found = read(output)
    expected = decode_class(values, voxel_size, parameters)
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == expected.dtype


@settings(max_examples=8)
@ANY_ARRAY
def test_blocks_give_the_labels_of_the_whole_array(tmp_path_factory, **drawn):
    check(tmp_path_factory, **drawn)


@pytest.mark.slow
@settings(max_examples=60)
@ANY_ARRAY
def test_blocks_of_many_arrays_give_the_labels_of_the_whole_array(tmp_path_factory, **drawn):
    check(tmp_path_factory, **drawn)
