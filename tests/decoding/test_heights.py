"""A watershed on what a head has learned: whole and block by block, and what cannot be read."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import ndimage

from connectomics.decoding.decode import decode_class
from connectomics.decoding.parameters import DecodeParameters
from connectomics.decoding.watershed.heights import HeadValues, LearnedDistance
from connectomics.decoding.watershed.watershed_task import WatershedTask
from connectomics.errors import ConfigError, IncompleteError, InputError, MetadataError, MissingError
from connectomics.geometry import VoxelGrid
from connectomics.io.multiscale import Multiscale
from connectomics.io.write import update_attrs, write_multiscale
from connectomics.tasks import run_task
from tests.decoding import watershed_reference as reference
from tests.decoding.decode_kit import decode_predictions

SIZE = (8.0, 8.0, 8.0)


def blobs(seed, shape, low=0.0):
    """A smooth field from 0 to 1, 0 for a share ``low`` of the voxels."""
    random = np.random.default_rng(seed)
    values = ndimage.gaussian_filter(random.standard_normal(shape), random.uniform(0.5, 2.0))
    values = np.clip(values - np.quantile(values, low), 0, None)
    return values / max(values.max(), 1e-6)


def stored(values, dtype):
    return np.rint(values * 255).astype(np.uint8) if dtype == np.uint8 else values.astype(np.float16)


def write(folder, name, values, scale_nm=None, **attrs):
    about = {"artefact": name.rpartition("/")[2] if scale_nm else "probability", "class_name": "mito", **attrs}
    about |= {"scale_nm": scale_nm} if scale_nm else {}
    location = folder / "in" / "d.zarr" / "c" / name
    grid = VoxelGrid(SIZE, (0, 0, 0), values.shape)
    write_multiscale(location, values, grid, attrs={"connectomics": {"complete": True, **about}})
    return location


def read(location):
    source = Multiscale.open(str(location))
    return source.read_level(0, (0, 0, 0), source.levels[0].grid.shape)[0]


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(1, 24), st.integers(1, 24), st.integers(1, 24)),
    block=st.tuples(st.integers(5, 12), st.integers(5, 12), st.integers(5, 12)),
    kind=st.sampled_from(["distance", "boundary"]),
    dtype=st.sampled_from([np.uint8, np.float16]),
    levels=st.sampled_from([3, 255]),
    connectivity=st.sampled_from([6, 18, 26]),
    max_depth=st.sampled_from([10.0, 320.0]),
    fill_holes=st.booleans(),
)
def test_blocks_give_the_labels_of_the_whole_array(
    tmp_path_factory, seed, shape, block, kind, dtype, levels, connectivity, max_depth, fill_holes
):
    folder = tmp_path_factory.mktemp("heights")
    probability = stored(blobs(seed, shape, 0.2), dtype)
    values = stored(np.rint(blobs(seed + 1, shape, 0.1) * levels) / levels, dtype)
    source = write(folder, "mito", probability)
    write(folder, f"mito/{kind}", values, scale_nm=16.0)
    parameters = DecodeParameters(
        threshold=0.1,
        method="watershed",
        height=kind,
        connectivity=connectivity,
        fill_holes=fill_holes,
        min_distance_nm=24.0,
        min_size_nm3=2000.0,
        max_depth_nm=max_depth,
    )
    output = folder / "out" / "d.zarr" / "c" / "mito"
    run_task(WatershedTask(str(source), str(output), "mito", parameters, block))
    mask = probability > (0.1 * 255 if dtype == np.uint8 else np.float16(0.1))
    if kind == "distance":
        expected = decode_class(mask, SIZE, parameters, head=HeadValues(values, 16.0))
    else:
        expected = decode_class(mask, SIZE, parameters, boundary=values)
    np.testing.assert_array_equal(read(output), expected)


@settings(max_examples=2)  # the definition in plain Python takes two seconds an example
@given(seed=st.integers(0, 2**32 - 1), cut_off=st.booleans())
def test_a_distance_is_flooded_as_a_watershed_is_defined(seed, cut_off):
    """Seeds are the deepest within their reach; the flood goes from there, and what is cut off is one."""
    shape = (6, 7, 6)
    random = np.random.default_rng(seed)
    mask = random.random(shape) < 0.8
    values = random.integers(0, 250, shape).astype(np.uint8)
    depth = 16.0 * np.arctanh(2 * 180 / 255 - 1) if cut_off else 320.0  # a distance that is stored as 180, or as 255
    parameters = DecodeParameters(method="watershed", height="distance", min_distance_nm=16.0, max_depth_nm=depth)
    floor = -180 if cut_off else -255
    height = np.maximum(-values.astype(int), floor)
    cores = np.zeros(shape, int)
    for number, voxel in enumerate(reference.seeds(mask, height, (2, 2, 2), 26), start=1):
        cores[voxel] = number
    expected = reference.watershed(mask, height, cores, 26, floor=floor)
    np.testing.assert_array_equal(decode_class(mask, SIZE, parameters, head=HeadValues(values, 16.0)), expected)


def test_the_floor_is_where_a_distance_is_stored_as_the_largest():
    assert LearnedDistance.of(64.0, 320.0, np.dtype(np.uint8)).floor == -255
    assert LearnedDistance.of(64.0, 64.0, np.dtype(np.uint8)).floor == -round(255 * (0.5 + np.tanh(1) / 2))
    half = int(np.float16(0.5 + np.tanh(1) / 2).view(np.int16))
    assert LearnedDistance.of(64.0, 64.0, np.dtype(np.float16)).floor == -half


def touching(folder):
    """Two boxes that share a wide face: the mask has no line there, the heads have."""
    ids = np.zeros((20, 24, 32), int)
    ids[2:18, 2:22, 2:16], ids[2:18, 2:22, 16:30] = 1, 2
    inside = np.max([ndimage.distance_transform_edt(ids == i) - 0.5 for i in (1, 2)], axis=0) * 8.0
    write(folder, "mito", np.where(ids > 0, 230, 10).astype(np.uint8))
    write(folder, "mito/distance", stored(0.5 + np.tanh(inside / 40) / 2, np.uint8), scale_nm=40.0)
    write(folder, "mito/boundary", np.where(inside < 8, 240, 15).astype(np.uint8), scale_nm=8.0)
    return ids


@pytest.mark.parametrize("kind", ["distance", "boundary"])
def test_objects_that_share_a_face_are_told_apart_whole_and_block_by_block(tmp_path, kind):
    ids = touching(tmp_path)
    plain = DecodeParameters(method="watershed")
    (done,) = decode_predictions(tmp_path / "in", tmp_path / "plain", {"mito": plain})
    assert done.objects == 1  # by its own distance to the background it is one slab
    for limit in (0, 10**9):
        chosen = DecodeParameters(method="watershed", height=kind)
        (done,) = decode_predictions(tmp_path / "in", tmp_path / f"l{limit}", {"mito": chosen}, blockwise_above=limit)
        labels = read(done.job.location)
        assert done.objects == 2
        assert (labels == ids).mean() > 0.98  # they meet within the width of the border


@pytest.mark.parametrize("limit", [0, 10**9])
def test_heads_that_cannot_be_read_are_named(tmp_path, limit):
    touching(tmp_path)
    place = tmp_path / "in/d.zarr/c/mito/distance"

    def decode():
        chosen = DecodeParameters(method="watershed", height="distance")
        decode_predictions(tmp_path / "in", tmp_path / "l", {"mito": chosen}, blockwise_above=limit)

    about = {"artefact": "distance", "class_name": "mito", "complete": True, "scale_nm": 40.0}
    for change, error, said in (
        ({"complete": False}, IncompleteError, "mito/distance is only half written; run predict to its end"),
        ({"artefact": "boundary"}, MetadataError, "expected a distance head written by predict, got boundary"),
        ({"scale_nm": None}, MetadataError, "expected the attribute scale_nm with a positive number, got None"),
    ):
        update_attrs(place, {"connectomics": about | change})
        with pytest.raises(error, match=said):
            decode()
    shutil.rmtree(place)
    with pytest.raises(
        MissingError, match=r"no distance head at .*mito/distance, .* \(model.heads\) and predict again"
    ):
        decode()


def test_parameters_that_do_not_go_together_are_refused():
    for wrong, said in (
        ({"height": "lsd"}, "height must be distance or boundary, got 'lsd'"),
        ({"height": "distance", "method": "cc3d"}, "height needs method watershed, got method cc3d"),
        ({"height": "distance", "boundary": "pm"}, r"either height or boundary, got height distance and boundary pm"),
    ):
        with pytest.raises(ConfigError, match=said):
            DecodeParameters(**{"method": "watershed", **wrong})
    chosen = DecodeParameters(method="watershed", height="distance")
    with pytest.raises(InputError, match="height distance needs that head of shape"):
        decode_class(np.ones((2, 2, 2), bool), SIZE, chosen)
