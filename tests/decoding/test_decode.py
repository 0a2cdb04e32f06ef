"""Predictions folder in, labels folder out: parameters, completeness, resuming, provenance."""

from __future__ import annotations

import csv
import json
import shutil

import cc3d
import numpy as np
import pytest

from connectomics.config.schema import EngineConfig
from connectomics.config.values import plain
from connectomics.decoding.decode import decode_class
from connectomics.decoding.parameters import DECODERS, DecodeParameters, decode_parameters, default_parameters
from connectomics.decoding.prediction import find_arrays, open_prediction, read_on
from connectomics.decoding.probabilities import above
from connectomics.errors import (
    ConfigError,
    CorruptDataError,
    IncompleteError,
    InputError,
    MetadataError,
    MissingError,
    UnknownNameError,
    WriteError,
)
from connectomics.geometry import VoxelGrid
from connectomics.io import store
from connectomics.io.multiscale import Multiscale
from connectomics.io.write import update_attrs, write_multiscale
from tests.decoding.decode_kit import decode_predictions

GRID = VoxelGrid((8, 8, 8), (804.0, 1604.0, 404.0), (70, 40, 33))
SPECK = 4  # voxels


def probabilities(seed=0):
    """Two boxes of high probability and a speck of four voxels."""
    values = np.random.default_rng(seed).integers(0, 100, GRID.shape).astype(np.uint8)
    values[5:25, 5:25, 5:25] = 200
    values[40:60, 10:30, 3:23] = 180
    values[66, 36, 28:32] = 255
    return values


def write_prediction(root, crop="crop7", name="mito", values=None, dataset="phantom", **attrs):
    about = {"artefact": "probability", "class_name": name, "complete": True, "model": {"sha256": "abc"}, **attrs}
    location = root / f"{dataset}.zarr" / crop / name
    write_multiscale(
        location, probabilities() if values is None else values, GRID, attrs={"connectomics": about}, overwrite=True
    )
    return location


def read(location):
    volume = Multiscale.open(str(location))
    return volume.read_level(0, (0, 0, 0), volume.grid.shape, absent_is_missing=False)[0], volume


# -- parameters --------------------------------------------------------------------------------------------------------
def test_instance_classes_are_components_and_others_masks_unless_told_otherwise():
    assert default_parameters("mito").method == "cc3d"
    assert default_parameters("er") == DecodeParameters()
    assert default_parameters("my_own_class").kind == "semantic"
    chosen = decode_parameters(
        ["mito", "er"], {"threshold": 0.4}, {"mito": {"method": "watershed", "min_size_nm3": 51200}, "nuc": {}}
    )
    assert chosen["er"] == DecodeParameters(threshold=0.4)
    assert chosen["mito"].method == "watershed"
    assert chosen["mito"].threshold == 0.4
    assert DecodeParameters(**plain(chosen["mito"])) == chosen["mito"]


def test_sizes_are_nanometres_so_they_mean_the_same_at_every_voxel_size():
    parameters = DecodeParameters(min_size_nm3=51200)
    assert parameters.min_voxels((8, 8, 8)) == 100
    assert parameters.min_voxels((4, 4, 4)) == 800
    assert parameters.min_voxels((16, 16, 16)) == 13  # 12.5 rounded up
    assert DecodeParameters().min_voxels((8, 8, 8)) == 0


@pytest.mark.parametrize(
    ("default", "by_class", "error", "message"),
    [
        ({"treshold": 0.5}, {}, ConfigError, "decoding.default: unknown key 'treshold'; did you mean 'threshold'"),
        ({}, {"mito": {"method": "otsu"}}, ConfigError, "must be one of threshold, cc3d, .*, got 'otsu'"),
        ({}, {"mito": {"threshold": 1.5}}, ConfigError, "between 0 and 1"),
        (
            {},
            {"mito": {"threshold": "high"}},
            ConfigError,
            "classes.mito: threshold must be a valid number, got 'high'",
        ),
        ({}, {"mito": {"fill_holes": 1}}, ConfigError, "fill_holes must be a valid boolean"),
        ({}, {"mitto": {}}, UnknownNameError, "did you mean 'mito'"),
        ({"connectivity": 8}, {}, ConfigError, "6, 18 or 26"),
        ({"min_size_nm3": -1.0}, {}, ConfigError, "at least 0"),
        ({"min_distance_nm": 0}, {}, ConfigError, "positive"),
    ],
)
def test_a_wrong_parameter_is_named(default, by_class, error, message):
    with pytest.raises(error, match=message):
        decode_parameters(["mito", "er"], default, by_class)


# -- one class in memory -----------------------------------------------------------------------------------------------
def test_foreground_is_strictly_above_the_threshold_for_stored_and_float_probabilities_alike():
    stored = np.arange(256, dtype=np.uint8)
    for threshold in (0.0, 0.25, 0.5, 128 / 255, 0.999, 1.0):
        np.testing.assert_array_equal(above(stored, threshold), stored.astype(np.float64) / 255 > threshold)
    assert above(stored, 0.5).sum() == 128
    assert not above(stored, 1.0).any()


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_thresholds_are_exact_for_stored_floats(dtype):
    """Not as numpy compares: it would round 0.3 to the float16 0.30005 first, and that value would not be above."""
    near = np.nextafter(dtype(0.3), dtype(1)), dtype(0.3), np.nextafter(dtype(0.3), dtype(0))
    stored = np.array([*near, 0, 1, 0.5, 0.25, 128 / 255], dtype)
    for threshold in (0.0, 0.25, 0.3, 0.5, 128 / 255, 0.7, 1.0):
        np.testing.assert_array_equal(above(stored, threshold), stored.astype(np.float64) > threshold)


def test_probabilities_that_are_none_are_refused():
    with pytest.raises(InputError, match=r"got -3 to 5; apply the sigmoid first"):
        above(np.array([-3.0, 5.0]), 0.5)
    with pytest.raises(InputError, match="got int64"):
        above(np.array([1, 2]), 0.5)


def test_nan_is_background_and_counted():
    with pytest.warns(UserWarning, match="2 of 3 probabilities are NaN"):
        np.testing.assert_array_equal(above(np.array([np.nan, 0.9, np.nan]), 0.5), [False, True, False])


def test_decode_class_gives_masks_or_ids():
    values = probabilities()
    mask = decode_class(values, GRID.voxel_size, DecodeParameters())
    assert mask.dtype == np.uint8
    assert mask.sum() == 2 * 8000 + SPECK
    cleaned = decode_class(values, GRID.voxel_size, DecodeParameters(min_size_nm3=5 * 512))
    assert cleaned.sum() == 2 * 8000
    assert cleaned.max() == 1
    ids = decode_class(values, GRID.voxel_size, DecodeParameters(method="cc3d"))
    assert ids.max() == 3
    values[12:15, 12:15, 12:15] = 0
    assert decode_class(values, GRID.voxel_size, DecodeParameters(fill_holes=True)).sum() == 2 * 8000 + SPECK
    half = decode_class(values / 255.0, GRID.voxel_size, DecodeParameters(threshold=0.75, method="watershed"))
    assert half.max() == 2


# -- artefact to artefact ----------------------------------------------------------------------------------------------
def test_labels_lie_on_the_predictions_grid_and_say_where_they_came_from(tmp_path):
    write_prediction(tmp_path / "p", name="mito")
    write_prediction(tmp_path / "p", name="er")
    done = decode_predictions(tmp_path / "p", tmp_path / "l")
    assert [(d.job.class_name, d.objects, d.skipped) for d in done] == [("er", 1, False), ("mito", 2, False)]
    labels, volume = read(tmp_path / "l/phantom.zarr/crop7/mito")
    assert volume.grid == GRID
    assert labels.dtype == np.uint8
    assert labels[10, 10, 10] != labels[50, 20, 10]
    about = volume.attrs["connectomics"]
    assert about["artefact"] == "labels"
    assert about["kind"] == "instance"
    assert about["complete"] is True
    assert about["objects"] == 2
    assert about["decode"] == plain(default_parameters("mito"))
    assert about["source"]["model"] == {"sha256": "abc"}
    mask, volume = read(tmp_path / "l/phantom.zarr/crop7/er")
    np.testing.assert_array_equal(mask, above(probabilities(), 0.5))
    assert volume.attrs["connectomics"]["kind"] == "semantic"
    assert store.read_attrs(str(tmp_path / "l/phantom.zarr/crop7"))["connectomics"]["complete"] is True


def test_blocks_of_a_semantic_class_join_without_a_seam(tmp_path, monkeypatch):
    monkeypatch.setattr("connectomics.decoding.prediction._BLOCK", (64, 64, 64))
    write_prediction(tmp_path / "p", name="er")
    decode_predictions(tmp_path / "p", tmp_path / "l", {"er": DecodeParameters(threshold=0.2)})
    np.testing.assert_array_equal(read(tmp_path / "l/phantom.zarr/crop7/er")[0], above(probabilities(), 0.2))


def test_what_is_done_is_skipped_and_what_changed_is_done_again_on_demand(tmp_path):
    p, out = tmp_path / "p", tmp_path / "l"
    write_prediction(p)
    first = decode_predictions(p, out)
    assert not first[0].skipped
    again = decode_predictions(p, out)
    assert again[0].skipped
    assert again[0].objects == 2
    assert not decode_predictions(p, out, overwrite=True)[0].skipped
    other = {"mito": DecodeParameters(method="cc3d", threshold=0.75)}
    with pytest.raises(WriteError, match=r"made with other settings \(threshold, min_size_nm3\)"):
        decode_predictions(p, out, other)
    changed = decode_predictions(p, out, other, overwrite=True)
    assert not changed[0].skipped
    assert changed[0].objects == 2
    write_prediction(p, model={"sha256": "another"})
    with pytest.raises(WriteError, match="made from other probabilities"):
        decode_predictions(p, out, other)
    assert not decode_predictions(p, out, other, overwrite=True)[0].skipped


@pytest.mark.parametrize("name", ["mito", "er"])
@pytest.mark.parametrize("limit", [0, 10**9])
def test_float16_probabilities_are_decoded_alike_whole_and_in_blocks(tmp_path, name, limit):
    values = (probabilities() / np.float32(255)).astype(np.float16)
    write_prediction(tmp_path / "p", name=name, values=values)
    chosen = DecodeParameters(threshold=0.3, method="cc3d" if name == "mito" else "threshold")
    (done,) = decode_predictions(tmp_path / "p", tmp_path / "l", {name: chosen}, blockwise_above=limit)
    labels, _ = read(done.job.location)
    np.testing.assert_array_equal(labels > 0, values.astype(np.float64) > 0.3)
    assert done.objects == (cc3d.connected_components(values > 0.3).max() if name == "mito" else 1)


def test_walls_are_read_as_float16_and_from_another_grid(tmp_path):
    """The wall of two cells between x = 16 and 17, predicted at twice the voxel size."""
    cell = np.full(GRID.shape, 255, np.uint8)
    write_prediction(tmp_path / "p", name="cell", values=cell)
    coarse = GRID.at_voxel_size((16, 16, 16))
    wall = np.zeros(coarse.shape, np.float16)
    wall[:, :, 8] = 0.875
    about = {"artefact": "probability", "class_name": "pm", "complete": True}
    write_multiscale(tmp_path / "p/phantom.zarr/crop7/pm", wall, coarse, attrs={"connectomics": about})
    np.testing.assert_array_equal(read_on(open_prediction(tmp_path / "p", "phantom", "crop7", "pm"), coarse), wall)
    chosen = DecodeParameters(method="cc3d", boundary="pm")
    (done,) = decode_predictions(tmp_path / "p", tmp_path / "l", {"cell": chosen}, classes=["cell"])
    labels, _ = read(done.job.location)
    assert done.objects == 2
    assert labels[30, 20].tolist() == [1] * 17 + [2] * 16


def test_a_crop_is_complete_when_all_its_classes_are(tmp_path):
    for name in ("mito", "er"):
        write_prediction(tmp_path / "p", name=name)
    decode_predictions(tmp_path / "p", tmp_path / "l", classes=["er"])
    crop = str(tmp_path / "l/phantom.zarr/crop7")
    assert store.read_attrs(crop)["connectomics"]["complete"] is False
    decode_predictions(tmp_path / "p", tmp_path / "l")
    assert store.read_attrs(crop)["connectomics"]["complete"] is True


def test_resume_goes_on_only(tmp_path):
    p, out = tmp_path / "p", tmp_path / "l"
    write_prediction(p)
    with pytest.raises(MissingError, match="--resume: nothing was begun below"):
        decode_predictions(p, out, resume=True)
    decode_predictions(p, out)
    assert decode_predictions(p, out, resume=True)[0].skipped
    other = {"mito": DecodeParameters(method="cc3d", threshold=0.75)}
    for limit in (0, 10**9):
        with pytest.raises(WriteError, match="mito holds labels made with other settings"):
            decode_predictions(p, out, other, resume=True, blockwise_above=limit)


@pytest.mark.parametrize("limit", [0, 10**9])
def test_the_table_of_instances_as_parquet(tmp_path, limit):
    import pyarrow.parquet as pq

    write_prediction(tmp_path / "p")
    decode_predictions(tmp_path / "p", tmp_path / "l", blockwise_above=limit)
    (done,) = decode_predictions(tmp_path / "p", tmp_path / "l", blockwise_above=limit, table="parquet")
    assert not done.skipped  # that table was not there
    assert decode_predictions(tmp_path / "p", tmp_path / "l", blockwise_above=limit, table="parquet")[0].skipped
    table = pq.read_table(f"{done.job.location}/instances.parquet")
    with open(f"{done.job.location}/instances.csv") as file:
        rows = list(csv.DictReader(file))
    assert table.column_names == list(rows[0])
    assert table.schema.field("volume_nm3").metadata == {b"unit": b"nm3"}
    for name in table.column_names:
        np.testing.assert_allclose(table[name].to_numpy(), [float(row[name]) for row in rows], atol=6e-4)


def test_arrays_in_blocks_are_spread_over_processes(tmp_path):
    values = np.random.default_rng(0).integers(0, 160, GRID.shape, np.uint8)
    for name in ("mito", "er"):
        write_prediction(tmp_path / "p", name=name, values=values)
    here = decode_predictions(tmp_path / "p", tmp_path / "a", blockwise_above=0)
    two = decode_predictions(tmp_path / "p", tmp_path / "b", blockwise_above=0, engine=EngineConfig(workers=2))
    for one, other in zip(here, two, strict=True):
        assert (one.job.class_name, one.objects) == (other.job.class_name, other.objects)
        np.testing.assert_array_equal(read(one.job.location)[0], read(other.job.location)[0])


def test_only_the_classes_asked_for(tmp_path):
    write_prediction(tmp_path / "p", name="mito")
    write_prediction(tmp_path / "p", name="er")
    assert [d.job.class_name for d in decode_predictions(tmp_path / "p", tmp_path / "l", classes=["er"])] == ["er"]
    with pytest.raises(UnknownNameError, match=r"unknown class 'mitos'.*did you mean 'mito'"):
        decode_predictions(tmp_path / "p", tmp_path / "l", classes=["mitos"])


def test_half_written_predictions_are_refused_before_anything_is_decoded(tmp_path):
    write_prediction(tmp_path / "p", name="er")
    write_prediction(tmp_path / "p", name="mito", complete=False)
    with pytest.raises(IncompleteError, match=r"crop7/mito is only half written; run predict"):
        decode_predictions(tmp_path / "p", tmp_path / "l")
    assert not (tmp_path / "l").exists()


def test_what_is_no_prediction_is_refused(tmp_path):
    with pytest.raises(MissingError, match="no predictions in"):
        decode_predictions(tmp_path, tmp_path / "l")
    write_prediction(tmp_path / "p", artefact="labels")
    with pytest.raises(MetadataError, match="expected probabilities written by predict, got labels"):
        decode_predictions(tmp_path / "p", tmp_path / "l")
    write_prediction(tmp_path / "q", values=probabilities().astype(np.uint16))
    with pytest.raises(InputError, match="expected uint8 or float16 probabilities"):
        decode_predictions(tmp_path / "q", tmp_path / "l")
    with pytest.raises(InputError, match="cannot write labels into the predictions folder"):
        decode_predictions(tmp_path / "q", tmp_path / "q")


@pytest.mark.parametrize("name", ["er", "mito"])
def test_a_lost_chunk_is_an_error_and_not_background(tmp_path, name):
    location = write_prediction(tmp_path / "p", name=name)
    (location / "s0/1/0/0").unlink()
    with pytest.raises(CorruptDataError, match="lacks chunks"):
        decode_predictions(tmp_path / "p", tmp_path / "l")
    assert list(find_arrays(tmp_path / "l")) == []


def test_a_failed_write_leaves_the_labels_that_were_there(tmp_path, monkeypatch):
    p, out = tmp_path / "p", tmp_path / "l"
    write_prediction(p)
    decode_predictions(p, out)
    before = read(out / "phantom.zarr/crop7/mito")[0]

    def full(*_):
        raise WriteError("disk full")

    monkeypatch.setattr("connectomics.io.write.ArrayWriter.write", full)
    with pytest.raises(WriteError):
        decode_predictions(p, out, overwrite=True)
    monkeypatch.undo()
    np.testing.assert_array_equal(read(out / "phantom.zarr/crop7/mito")[0], before)
    assert [path.name for path in (out / "phantom.zarr/crop7").iterdir() if path.is_dir()] == ["mito"]


def test_more_than_255_objects_get_a_wider_type(tmp_path):
    values = np.zeros(GRID.shape, np.uint8)
    values[::3, ::3, ::3] = 255
    write_prediction(tmp_path / "p", values=values)
    done = decode_predictions(tmp_path / "p", tmp_path / "l", {"mito": DecodeParameters(method="cc3d")})
    labels, _ = read(tmp_path / "l/phantom.zarr/crop7/mito")
    assert labels.dtype == np.uint16
    assert labels.max() == done[0].objects == 24 * 14 * 11


def test_labels_are_valid_ome_ngff(tmp_path):
    write_prediction(tmp_path / "p")
    decode_predictions(tmp_path / "p", tmp_path / "l")
    group = tmp_path / "l/phantom.zarr/crop7/mito"
    assert json.loads((group / ".zattrs").read_text())["multiscales"][0]["datasets"][0]["path"] == "s0"
    import zarr

    np.testing.assert_array_equal(zarr.open_array(str(group / "s0"), mode="r")[:], read(group)[0])


def test_leftovers_of_a_killed_run_do_not_count(tmp_path):
    write_prediction(tmp_path / "p")
    decode_predictions(tmp_path / "p", tmp_path / "l")
    crop = tmp_path / "l/phantom.zarr/crop7"
    shutil.copytree(crop / "mito", crop / ".mito.partial")
    assert list(find_arrays(tmp_path / "l")) == [("phantom", "crop7", "mito")]
    about = store.read_attrs(str(crop / "mito"))["connectomics"]
    update_attrs(crop / "mito", {"connectomics": {**about, "complete": False}})
    with pytest.raises(WriteError, match="labels that are only half written; overwrite them"):
        decode_predictions(tmp_path / "p", tmp_path / "l")
    assert not decode_predictions(tmp_path / "p", tmp_path / "l", overwrite=True)[0].skipped
    assert not (crop / ".mito.partial").exists()


def test_touching_objects_are_separated_by_a_boundary_class(tmp_path):
    """Two cells that fill the volume, a wall between them: two objects that together cover everything."""
    from connectomics.decoding.decode import decode_class

    mask = np.ones((8, 8, 20), bool)
    walls = np.zeros(mask.shape, np.uint8)
    walls[:, :, 9:11] = [200, 240]
    parameters = DecodeParameters(method="cc3d", boundary="pm")
    labels = decode_class(mask, (8.0, 8.0, 8.0), parameters, boundary=walls)
    assert set(np.unique(labels)) == {1, 2}
    assert len(np.unique(labels[:, :, :9])) == len(np.unique(labels[:, :, 11:])) == 1
    assert labels.all()
    with pytest.raises(ConfigError, match="needs method cc3d or watershed"):
        DecodeParameters(boundary="pm")


# -- what is unknown ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("limit", [0, 10**9], ids=["blocks", "whole"])
def test_the_table_counts_the_voxels_of_the_labels_where_parts_are_unknown(tmp_path, limit):
    """A mean of predictions is not 0 where one of them is unknown, and a filled hole may reach into what is unknown."""
    values = np.zeros(GRID.shape, np.uint8)
    values[3:30, 4:36, 4:30] = 250
    values[10:15, 10:20, 10:20] = values[20:23, 30:33, 20:24] = 0  # an unknown part, and a hole
    values[40:44, 10:14, 10:14] = 250  # an object that is all unknown
    values[50:54, 20:30, 20:24] = 250
    gaps = [GRID.crop(*part).box for part in (((12, 10, 10), (3, 10, 10)), ((40, 10, 10), (5, 10, 10)))]
    unknown = [{"box": [gap.begin, gap.end]} for gap in (*gaps, gaps[0])]
    write_prediction(tmp_path / "p", values=values, unknown=unknown, grid=GRID.to_dict())
    parameters = {"mito": DecodeParameters(method="cc3d", fill_holes=True)}
    for pyramid in (False, True):
        out = tmp_path / f"labels-{pyramid}"
        (done,) = decode_predictions(tmp_path / "p", out, parameters, blockwise_above=limit, pyramid=pyramid)
        labels = read(done.job.location)[0]
        ids, counts = np.unique(labels[labels > 0], return_counts=True)
        assert (ids.tolist(), done.objects) == ([1, 2], 2)
        assert not labels[12:15, 10:20, 10:20].any()
        assert labels[10:12, 10:20, 10:20].all()
        assert labels[21, 31, 21] == 1
        with open(f"{done.job.location}/instances.csv") as file:
            rows = list(csv.DictReader(file))
        assert [int(row["voxels"]) for row in rows] == counts.tolist()
        for number, row in zip((1, 2), rows, strict=True):
            center = GRID.to_world(np.argwhere(labels == number).mean(axis=0))
            assert [float(row[f"center_{axis}_nm"]) for axis in "zyx"] == pytest.approx(center, abs=1e-3)


def test_ids_of_a_registered_decoder_have_a_row_each(tmp_path, monkeypatch):
    """A decoder may leave IDs out, and label what is unknown: the table has the instances of the labels."""

    def three(values, voxel_size, chosen):
        ids = np.zeros(values.shape, np.int32)
        ids[2:6, 2:6, 2:6], ids[40:44, 10:14, 10:14], ids[20:26, 2:6, 2:6] = 2, 5, 7
        return ids

    monkeypatch.setitem(DECODERS, "three", three)
    gap = GRID.crop((40, 10, 10), (5, 10, 10)).box
    unknown = [{"box": [gap.begin, gap.end]}]
    write_prediction(tmp_path / "p", values=np.zeros(GRID.shape, np.uint8), unknown=unknown, grid=GRID.to_dict())
    (done,) = decode_predictions(tmp_path / "p", tmp_path / "labels", {"mito": DecodeParameters(method="three")})
    labels = read(done.job.location)[0]
    assert (np.unique(labels).tolist(), done.objects) == ([0, 1, 2], 2)
    with open(f"{done.job.location}/instances.csv") as file:
        assert [(int(row["id"]), int(row["voxels"])) for row in csv.DictReader(file)] == [(1, 64), (2, 96)]
