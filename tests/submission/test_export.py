"""Predictions onto the crop table's grids and into one zip: values, types, bytes, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import zarr

from connectomics.cellmap.crop_table import CropTable, TableEntry
from connectomics.config import load_config
from connectomics.errors import (
    CorruptDataError,
    IncompleteError,
    InputError,
    MetadataError,
    MissingError,
    UnknownNameError,
    WriteError,
)
from connectomics.geometry import VoxelGrid
from connectomics.inference.artifact import save_cellmap_predictions
from connectomics.io import s3
from connectomics.io.location import StoreError
from connectomics.io.place import place
from connectomics.io.write import write_multiscale
from connectomics.pipeline.apply_edits import apply_edits
from connectomics.pipeline.decode import decode
from connectomics.submission import export_submission
from connectomics.submission.findings import Finding
from connectomics.tasks.lock import leading
from tests.s3_server import BUCKET, KEYS, FaultyProxy, FolderServer

ROOT = Path(__file__).resolve().parents[2]
FINE = VoxelGrid((1.74, 2, 2), (23837.13, 7599, 35999), (40, 44, 48))
PLAIN = VoxelGrid((8, 8, 8), (804, 1604, 404), (30, 40, 50))
TABLE = CropTable(
    (
        TableEntry(7, "one", "mito", PLAIN),
        TableEntry(7, "one", "er", PLAIN),
        TableEntry(12, "two", "er", FINE),
        TableEntry(12, "two", "ves", FINE),
    )
)


def write(root, entry_or_place, values, grid, artefact="labels", **attrs):
    dataset, crop, name = entry_or_place
    about = {"artefact": artefact, "complete": True, **attrs}
    write_multiscale(
        root / f"{dataset}.zarr" / crop / name, values, grid, attrs={"connectomics": about}, overwrite=True
    )


def write_all(root, seed=0):
    """Labels for the whole table, on its grids."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for entry in TABLE:
        kind = "instance" if entry.class_name in ("mito", "ves") else "semantic"
        values = rng.integers(0, 300 if kind == "instance" else 2, entry.grid.shape).astype(np.uint16)
        values[:, ::2] = 0
        write(root, (entry.dataset, entry.crop_name, entry.class_name), values, entry.grid, kind=kind)
        arrays[f"{entry.crop_name}/{entry.class_name}"] = values
    return arrays


def opened(path):
    store = zarr.storage.ZipStore(path, mode="r") if path.suffix == ".zip" else path
    return zarr.open_group(store, mode="r", zarr_format=2)


def export_one(tmp_path, name, values, grid, target, **options):
    """Export one array from ``grid`` to ``target`` and read it back."""
    attrs = {k: options.pop(k) for k in ("artefact", "kind", "decode", "objects") if k in options}
    write(tmp_path / "p", ("one", "crop7", name), values, grid, **attrs)
    table = CropTable((TableEntry(7, "one", name, target),))
    result = export_submission(tmp_path / "p", tmp_path / "s.zip", crops=table, **options)
    return opened(tmp_path / "s.zip")[f"crop7/{name}"], result


# -- what is written ---------------------------------------------------------------------------------------------------
def test_the_zip_is_one_zarr_v2_group_of_plain_arrays_with_their_grids(tmp_path):
    arrays = write_all(tmp_path / "p")
    result = export_submission(tmp_path / "p", tmp_path / "out.zip", crops=TABLE)
    assert result.is_zip
    assert result.written == ("crop7/er", "crop7/mito", "crop12/er", "crop12/ves")
    assert result.missing == result.ignored == ()
    assert not result.partial
    assert not result.has_errors
    group = opened(tmp_path / "out.zip")
    assert sorted(group.group_keys()) == ["crop12", "crop7"]
    for entry in TABLE:
        array = group[f"{entry.crop_name}/{entry.class_name}"]
        assert array.attrs["voxel_size"] == list(entry.grid.voxel_size)
        assert array.attrs["translation"] == list(entry.grid.translation)
        truth = arrays[f"{entry.crop_name}/{entry.class_name}"]
        np.testing.assert_array_equal(array[:], truth if entry.class_name in ("mito", "ves") else truth > 0)
    assert group["crop7/er"].dtype == np.uint8
    assert group["crop7/mito"].dtype == np.uint16


def test_the_same_input_gives_the_same_bytes_whatever_the_threads_and_the_place(tmp_path):
    write_all(tmp_path / "p")
    export_submission(tmp_path / "p", tmp_path / "a.zip", crops=TABLE, workers=1)
    (tmp_path / "deep").mkdir()
    export_submission(tmp_path / "p", tmp_path / "deep/b.zip", crops=TABLE, workers=4)
    write_all(tmp_path / "q")
    export_submission(tmp_path / "q", tmp_path / "c.zip", crops=TABLE)
    data = (tmp_path / "a.zip").read_bytes()
    assert data == (tmp_path / "deep/b.zip").read_bytes() == (tmp_path / "c.zip").read_bytes()
    assert str(tmp_path).encode() not in data


def test_labels_on_s3_are_packed_into_a_zip_on_s3(tmp_path, monkeypatch):
    write_all(tmp_path / "bucket" / "labels")
    export_submission(tmp_path / "bucket" / "labels", tmp_path / "local.zip", crops=TABLE)
    with FolderServer(tmp_path / "bucket", writable=True) as server:
        for name, value in {**KEYS, "AWS_ENDPOINT_URL": server.endpoint}.items():
            monkeypatch.setenv(name, value)
        for _ in range(2):  # a second run replaces the first one's zip
            result = export_submission(f"s3://{BUCKET}/labels", f"s3://{BUCKET}/out/s.zip", crops=TABLE)
        assert str(result.path) == f"s3://{BUCKET}/out/s.zip"
        (tmp_path / "bucket" / "theirs.zip").write_bytes(b"not ours")
        with pytest.raises(WriteError, match=r"theirs\.zip was not written by export"):
            export_submission(f"s3://{BUCKET}/labels", f"s3://{BUCKET}/theirs.zip", crops=TABLE)
        with pytest.raises(InputError, match=r"must end in \.zip"):
            export_submission(f"s3://{BUCKET}/labels", f"s3://{BUCKET}/out/folder", crops=TABLE)
        with pytest.raises(MissingError, match=r"no predictions folder at s3://.*/none"):
            export_submission(f"s3://{BUCKET}/none", tmp_path / "s.zip", crops=TABLE)
        with monkeypatch.context() as patch:
            found = [Finding("error", "wrong", ".", "made up", "true", "nothing")]
            patch.setattr("connectomics.submission.export.validate_submission", lambda *_, **__: found)
            worse = export_submission(f"s3://{BUCKET}/labels", f"s3://{BUCKET}/out/s.zip", crops=TABLE)
            assert worse.summary().startswith("this submission, which was not kept: ")

            def fail(*_):
                raise StoreError("no answer")

            patch.setattr(s3, "get_range", fail)
            with pytest.raises(StoreError, match="no answer"):  # not that it is none of ours
                export_submission(f"s3://{BUCKET}/labels", f"s3://{BUCKET}/out/s.zip", crops=TABLE)
    assert (tmp_path / "bucket" / "out" / "s.zip").read_bytes() == (tmp_path / "local.zip").read_bytes()
    assert (tmp_path / "bucket" / "theirs.zip").read_bytes() == b"not ours"


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A bucket with labels, behind a proxy that counts what is sent."""
    write_all(tmp_path / "bucket" / "labels")
    with FolderServer(tmp_path / "bucket", writable=True) as server, FaultyProxy(server.endpoint) as proxy:
        for name, value in {**KEYS, "AWS_ENDPOINT_URL": proxy.endpoint}.items():
            monkeypatch.setenv(name, value)
        yield proxy


def test_of_an_earlier_zip_on_s3_only_its_list_and_attributes_are_read(tmp_path, served):
    export_submission(tmp_path / "bucket" / "labels", tmp_path / "bucket" / "s.zip", crops=TABLE)
    with zipfile.ZipFile(tmp_path / "bucket" / "s.zip", "a") as archive:
        archive.writestr("large", np.random.default_rng(0).bytes(24 << 20))
    served.reset()
    export_submission(f"s3://{BUCKET}/labels", f"s3://{BUCKET}/s.zip", crops=TABLE)
    assert served.sent_bytes < 8 << 20


def test_one_process_at_a_time_packs_a_zip_on_s3(tmp_path, served, monkeypatch):
    words = (f"s3://{BUCKET}/labels", f"s3://{BUCKET}/s.zip")
    lease = tmp_path / "bucket" / ".s.zip.lock"
    with leading(place(words[1])), pytest.raises(WriteError, match=r"process \d+ on .* is working on s3://.*/s\.zip"):
        export_submission(*words, crops=TABLE)
    assert not (tmp_path / "bucket" / "s.zip").exists()
    monkeypatch.setattr("connectomics.tasks.lease.RENEW_S", 0.05)

    def suspended(*_):
        if lease.read_text() != "of another process":
            lease.write_text("of another process")
            time.sleep(1)

    with pytest.raises(WriteError, match=r"another process has taken over s3://.*/\.s\.zip\.lock"):
        export_submission(*words, crops=TABLE, progress=suspended)
    assert not (tmp_path / "bucket" / "s.zip").exists()
    lease.unlink()
    assert export_submission(*words, crops=TABLE).written
    assert not lease.exists()


def test_empty_chunks_take_no_space_and_read_as_zero(tmp_path):
    grid = VoxelGrid((8, 8, 8), (0, 0, 0), (200, 130, 130))
    values = np.zeros(grid.shape, np.uint8)
    values[190:, 5, 5] = 1
    array, _ = export_one(tmp_path, "er", values, grid, grid)
    names = zipfile.ZipFile(tmp_path / "s.zip").namelist()
    assert names == [
        ".zattrs", ".zgroup", "crop7/.zgroup", "crop7/er/.zarray", "crop7/er/.zattrs", "crop7/er/1.0.0",
    ]  # fmt: skip
    np.testing.assert_array_equal(array[:], values)


def test_another_name_gives_a_folder_and_says_so(tmp_path):
    write_all(tmp_path / "p")
    result = export_submission(tmp_path / "p", tmp_path / "submission.zarr", crops=TABLE)
    assert not result.is_zip
    assert "the portal takes a zip" in result.summary()
    assert opened(tmp_path / "submission.zarr")["crop7/er"].shape == PLAIN.shape
    again = export_submission(tmp_path / "p", tmp_path / "submission.zarr", crops=TABLE)  # replaces its own
    assert again.bytes == result.bytes
    assert not list(tmp_path.glob("*.partial"))


# -- onto another grid -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("voxel", [(4, 4, 4), (16, 16, 16), (5.24, 4, 4), (11.3, 8, 20)])
def test_a_threshold_of_resampled_probabilities_lies_where_the_probability_says(tmp_path, voxel):
    source = VoxelGrid((8, 8, 8), (804, 1604, 404), (40, 40, 40))
    z, y, x = source.axes()
    # A ramp that crosses one half on an oblique plane; linear interpolation and symmetric means keep a ramp.
    height = 0.9 * (z[:, None, None] - 960) + 0.5 * (y[:, None] - 1760) - 0.3 * (x - 560)
    values = np.clip(np.rint(127.5 + height), 0, 255).astype(np.uint8)
    target = VoxelGrid.covering(source.box.grow(-24), voxel)
    target = target.crop((0, 0, 0), [n - 1 for n in target.shape])
    array, result = export_one(tmp_path, "er", values, source, target, artefact="probability")
    z, y, x = target.axes()
    plane = 0.9 * (z[:, None, None] - 960) + 0.5 * (y[:, None] - 1760) - 0.3 * (x - 560)
    clear = np.abs(plane) > 1.0  # nm: beyond the rounding of stored probabilities
    np.testing.assert_array_equal(array[:][clear] == 1, plane[clear] > 0)
    assert result.partial == {}
    assert dict(array.attrs)["connectomics"]["threshold"] == 0.5


@pytest.mark.parametrize("grid", [PLAIN, VoxelGrid((4, 4, 4), (802, 1602, 402), (60, 80, 100))])
def test_probabilities_as_float16_are_cut_where_they_say(tmp_path, grid):
    values = np.random.default_rng(0).random(grid.shape).astype(np.float16)
    found, _ = export_one(tmp_path, "er", values, grid, PLAIN, artefact="probability", thresholds={"er": 0.3})
    blocks = values.astype(np.float64).reshape(30, grid.shape[0] // 30, 40, -1, 50, grid.shape[2] // 50)
    mean = blocks.mean(axis=(1, 3, 5))
    assert (found[:] != (mean > 0.3))[np.abs(mean - 0.3) > 1e-5].sum() == 0
    assert 0 < found[:].sum() < found.size


def test_blocks_join_without_a_seam(tmp_path, monkeypatch):
    rng = np.random.default_rng(2)
    source = VoxelGrid((8, 8, 8), (804, 1604, 404), (30, 30, 30))
    values = rng.integers(0, 256, source.shape).astype(np.uint8)
    target = VoxelGrid.covering(source.box, (5.0, 6.0, 4.0))
    whole, _ = export_one(tmp_path / "a", "er", values, source, target, artefact="probability")
    monkeypatch.setattr("connectomics.submission.pack.CHUNK", (16, 16, 16))
    monkeypatch.setattr("connectomics.submission.export.CHUNK", (16, 16, 16))
    blocks, _ = export_one(tmp_path / "b", "er", values, source, target, artefact="probability")
    assert blocks.chunks == (16, 16, 16)
    np.testing.assert_array_equal(blocks[:], whole[:])


def test_the_threshold_can_be_given_by_class(tmp_path):
    values = np.full(PLAIN.shape, 150, np.uint8)
    array, _ = export_one(tmp_path, "er", values, PLAIN, PLAIN, artefact="probability", thresholds={"er": 150 / 255})
    assert not array[:].any()
    array, _ = export_one(tmp_path, "er", values, PLAIN, PLAIN, artefact="probability", thresholds={"er": 149 / 255})
    assert array[:].all()
    with pytest.raises(InputError, match="between 0 and 1"):
        export_one(tmp_path, "er", values, PLAIN, PLAIN, artefact="probability", thresholds={"er": 128})


def test_semantic_labels_are_present_where_they_fill_half_of_the_voxel(tmp_path):
    rng = np.random.default_rng(1)
    source = VoxelGrid((4, 4, 4), (802, 1602, 402), (60, 80, 100))
    values = (rng.random(source.shape) < 0.5).astype(np.uint8)
    array, _ = export_one(tmp_path, "er", values, source, PLAIN)
    share = values.reshape(30, 2, 40, 2, 50, 2).mean(axis=(1, 3, 5))
    np.testing.assert_array_equal(array[:], share >= 0.5)


def test_instances_keep_the_id_at_the_voxels_centre(tmp_path):
    rng = np.random.default_rng(1)
    source = VoxelGrid((16, 16, 16), (808, 1608, 408), (15, 20, 25))
    values = rng.integers(0, 5000, source.shape).astype(np.uint32)
    array, _ = export_one(tmp_path, "mito", values, source, PLAIN)
    np.testing.assert_array_equal(array[:], values.repeat(2, 0).repeat(2, 1).repeat(2, 2))
    assert array.dtype == np.uint16


def test_what_the_prediction_does_not_cover_is_background_and_said(tmp_path):
    source = PLAIN.crop((10, 0, 0), PLAIN.shape)
    for name, artefact in (("er", "probability"), ("er", "labels"), ("mito", "labels")):
        values = np.full(PLAIN.shape, 255, np.uint8)
        array, result = export_one(tmp_path, name, values, source, PLAIN, artefact=artefact)
        assert not array[:10].any()
        assert array[10:].all()
        assert result.partial == {f"crop7/{name}": pytest.approx(2 / 3)}
    half = VoxelGrid((16, 16, 16), PLAIN.to_world((10.5, 0.5, 0.5)), (15, 20, 25))
    array, _ = export_one(tmp_path, "er", np.full(half.shape, 255, np.uint8), half, PLAIN, artefact="probability")
    assert not array[:10].any()
    assert array[10:].all()
    away = PLAIN.crop((1000, 0, 0), PLAIN.shape)
    array, result = export_one(tmp_path, "er", np.full(PLAIN.shape, 255, np.uint8), away, PLAIN)
    assert not array[:].any()
    assert [f.rule for f in result.findings] == ["empty"]


@pytest.mark.parametrize(("ids", "dtype"), [(255, np.uint8), (256, np.uint16), (70000, np.uint32)])
@pytest.mark.parametrize("told", [True, False])
def test_the_type_holds_the_ids_and_never_wraps(tmp_path, ids, dtype, told):
    values = np.zeros(PLAIN.shape, np.uint64)
    values.reshape(-1)[: min(ids, 59999)] = np.arange(1, min(ids, 59999) + 1)
    values[-1, -1, -1] = ids
    attrs = {"objects": ids, "kind": "instance"} if told else {}
    array, _ = export_one(tmp_path, "mito", values, PLAIN, PLAIN, **attrs)
    assert array.dtype == dtype
    np.testing.assert_array_equal(array[:], values)


def test_ids_beyond_32_bits_are_numbered_anew(tmp_path):
    values = np.zeros(PLAIN.shape, np.uint64)
    values[0], values[2], values[4] = 2**40, 7, 2**40 + 256
    array, _ = export_one(tmp_path, "mito", values, PLAIN, PLAIN)
    assert array.dtype == np.uint8
    assert [int(array[z, 0, 0]) for z in range(5)] == [2, 0, 1, 0, 3]


def test_ids_that_are_the_same_as_floats_stay_two(tmp_path):
    values = np.zeros(PLAIN.shape, np.int64)
    values[0], values[2] = 2**53, 2**53 + 1
    array, _ = export_one(tmp_path, "mito", values, PLAIN, PLAIN)
    assert [int(array[z, 0, 0]) for z in range(3)] == [1, 0, 2]


def test_edited_labels_keep_ids_beyond_their_number(tmp_path):
    values = np.zeros(PLAIN.shape, np.uint16)
    values[0], values[2] = 7, 300
    write(tmp_path / "p", ("one", "crop7", "mito"), values, PLAIN, kind="instance")
    (tmp_path / "edits.jsonl").write_text('{"op": "delete", "class": "mito", "id": 7}\n')
    apply_edits(tmp_path / "p", tmp_path / "edits.jsonl", out=tmp_path / "edited")
    table = CropTable((TableEntry(7, "one", "mito", PLAIN),))
    export_submission(tmp_path / "edited", tmp_path / "s.zip", crops=table)
    assert np.unique(opened(tmp_path / "s.zip")["crop7/mito"][:]).tolist() == [0, 300]


def test_labels_that_hold_more_than_they_say_are_corrupt(tmp_path):
    values = np.full(PLAIN.shape, 300, np.uint16)
    with pytest.raises(CorruptDataError, match="holds the id 300, expected 0 to 255"):
        export_one(tmp_path, "mito", values, PLAIN, PLAIN, objects=2, kind="instance")
    with pytest.raises(InputError, match="holds the id -1"):
        export_one(tmp_path, "mito", np.full(PLAIN.shape, -1, np.int16), PLAIN, PLAIN)


def test_probabilities_of_an_instance_class_become_components_on_the_grid(tmp_path):
    values = np.zeros(PLAIN.shape, np.uint8)
    values[2:8, 2:8, 2:8] = values[12:20, 12:20, 12:20] = 200
    array, _ = export_one(tmp_path, "mito", values, PLAIN, PLAIN, artefact="probability")
    assert array[:].max() == 2
    assert array[3, 3, 3] != array[15, 15, 15]


def test_semantic_labels_are_made_from_their_probabilities_where_they_are_at_hand(tmp_path):
    source = VoxelGrid((16, 16, 16), (808, 1608, 408), (15, 20, 25))
    values = np.zeros(source.shape, np.uint8)
    values[:, :, :10], values[:, :, 10] = 255, 100
    decode = {"threshold": 0.6, "method": "threshold", "min_size_nm3": 0.0, "fill_holes": False}
    labels = (values > 153).astype(np.uint8)
    write(tmp_path / "prob", ("one", "crop7", "er"), values, source, artefact="probability")
    blunt, _ = export_one(tmp_path, "er", labels, source, PLAIN, kind="semantic", decode=decode)
    fine, _ = export_one(
        tmp_path, "er", labels, source, PLAIN, kind="semantic", decode=decode, probabilities_dir=tmp_path / "prob"
    )
    assert blunt[0, 0].sum() == 20
    assert fine[0, 0].sum() == 20
    assert fine.attrs["connectomics"]["from"] == "probability"
    assert fine.attrs["connectomics"]["threshold"] == 0.6
    # With a minimum size the labels are more than a threshold, so they stand.
    kept, _ = export_one(
        tmp_path, "er", labels, source, PLAIN, kind="semantic", decode={**decode, "min_size_nm3": 5000.0},
        probabilities_dir=tmp_path / "prob",
    )  # fmt: skip
    assert kept.attrs["connectomics"]["from"] == "labels"


def test_edits_are_packed_where_probabilities_are_at_hand(tmp_path):
    """A semantic class that got an instance is no threshold of its probabilities any more, nor is a copy of it."""
    mito, er = np.zeros(PLAIN.shape), np.zeros(PLAIN.shape)
    mito[2:9, 2:9, 2:9], er[20:] = 0.9, 0.9
    save_cellmap_predictions(np.stack([mito, er]), tmp_path / "prob/one.zarr/crop7", ["mito", "er"], PLAIN)
    labels = decode(tmp_path / "prob", out=tmp_path / "labels", config=load_config(None)).folder
    for number, edit in enumerate(('{"op": "reclassify", "class": "mito", "id": 1, "to": "er"}', "")):
        (tmp_path / f"{number}.jsonl").write_text(edit)
        labels = apply_edits(labels, tmp_path / f"{number}.jsonl", out=tmp_path / f"edited{number}").folder
        table = CropTable(TABLE.entries[:2])
        export_submission(labels, tmp_path / "s.zip", crops=table, probabilities_dir=tmp_path / "prob")
        packed = opened(tmp_path / "s.zip")
        np.testing.assert_array_equal(packed["crop7/er"][:], (mito + er > 0))
        assert not packed["crop7/mito"][:].any()


def test_attributes_carry_the_origin_without_paths(tmp_path):
    source = {"model": {"checkpoint": "/home/me/runs/last.ckpt", "sha256": "abc"}}
    write(tmp_path / "p", ("one", "crop7", "er"), np.ones(PLAIN.shape, np.uint8), PLAIN, source=source)
    export_submission(tmp_path / "p", tmp_path / "s.zip", crops=CropTable((TABLE.entries[1],)))
    assert opened(tmp_path / "s.zip")["crop7/er"].attrs["connectomics"]["source"] == {
        "model": {"checkpoint": "last.ckpt", "sha256": "abc"}
    }


# -- the plan's .npy layout --------------------------------------------------------------------------------------------
def npy(tmp_path, name, values):
    (tmp_path / "p/one").mkdir(parents=True, exist_ok=True)
    np.save(tmp_path / f"p/one/crop7_{name}.npy", values)


def test_npy_predictions_lie_on_the_tables_grid(tmp_path):
    rng = np.random.default_rng(0)
    mask = rng.random(PLAIN.shape) < 0.3
    ids = rng.integers(0, 400, PLAIN.shape)
    npy(tmp_path, "mito", ids)
    npy(tmp_path, "er", mask)
    npy(tmp_path, "er_mem", mask)
    result = export_submission(tmp_path / "p", tmp_path / "s.zip", ["mito", "er"], ["one"], crops=TABLE)
    assert result.written == ("crop7/er", "crop7/mito")
    assert result.ignored == ("one/crop7/er_mem",)
    group = opened(tmp_path / "s.zip")
    np.testing.assert_array_equal(group["crop7/mito"][:], ids)
    np.testing.assert_array_equal(group["crop7/er"][:], mask)


def test_npy_floats_are_probabilities_unless_all_are_whole(tmp_path):
    values = np.linspace(0, 1, PLAIN.size, dtype=np.float32).reshape(PLAIN.shape)
    values[0, 0, :3] = np.nan
    npy(tmp_path, "er", values)
    npy(tmp_path, "mito", np.where(values > 0.9, 3.0, 0.0))
    with pytest.warns(UserWarning, match="3 voxels are NaN"):
        export_submission(tmp_path / "p", tmp_path / "s.zip", ["mito", "er"], ["one"], crops=TABLE)
    group = opened(tmp_path / "s.zip")
    np.testing.assert_array_equal(group["crop7/er"][:], values > 0.5)
    np.testing.assert_array_equal(group["crop7/mito"][:], np.where(values > 0.9, 3, 0))


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        (np.zeros((30, 50, 40), np.uint8), InputError, r"shape \(30, 50, 40\), but the crop table says \(30, 40, 50\)"),
        (np.full(PLAIN.shape, -1), InputError, "negative values"),
        (np.full(PLAIN.shape, 7.5), InputError, "values up to 7.5; expected probabilities"),
        (np.full(PLAIN.shape, 1j), InputError, "holds complex128"),
    ],
)
def test_npy_arrays_that_cannot_be_meant_are_refused(tmp_path, values, error, message):
    npy(tmp_path, "er", values)
    with pytest.raises(error, match=message):
        export_submission(tmp_path / "p", tmp_path / "s.zip", ["er"], ["one"], crops=TABLE)
    assert not (tmp_path / "s.zip").exists()


def test_a_truncated_npy_is_named(tmp_path):
    npy(tmp_path, "er", np.zeros(PLAIN.shape))
    path = tmp_path / "p/one/crop7_er.npy"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CorruptDataError, match=r"crop7_er\.npy cannot be read as an array"):
        export_submission(tmp_path / "p", tmp_path / "s.zip", ["er"], ["one"], crops=TABLE)


# -- what is missing, broken or in the way -----------------------------------------------------------------------------
def test_missing_arrays_are_reported_and_the_rest_is_written(tmp_path):
    write(tmp_path / "p", ("one", "crop7", "er"), np.ones(PLAIN.shape, np.uint8), PLAIN)
    write(tmp_path / "p", ("one", "crop99", "er"), np.ones(PLAIN.shape, np.uint8), PLAIN)
    result = export_submission(tmp_path / "p", tmp_path / "s.zip", crops=TABLE)
    assert result.written == ("crop7/er",)
    assert result.missing == ("crop7/mito", "crop12/er", "crop12/ves")
    assert result.ignored == ("one/crop99/er",)
    assert not result.has_errors
    assert "3 arrays of the table without a prediction" in result.summary()
    assert {f.rule for f in result.findings} == {"missing-class", "missing-crop"}
    with pytest.raises(MissingError, match="3 of 4 arrays have no prediction"):
        export_submission(tmp_path / "p", tmp_path / "t.zip", crops=TABLE, strict=True)
    assert not (tmp_path / "t.zip").exists()


def test_crops_of_one_name_in_two_data_sets_are_not_one(tmp_path):
    """A submission has no data sets: of two arrays crop7/er, the second was left out, and counted as written."""
    for dataset in ("mine", "yours"):
        write(tmp_path / "p", (dataset, "crop7", "er"), np.ones((4, 4, 4), np.uint8), PLAIN.crop((0, 0, 0), (4, 4, 4)))
    with pytest.raises(InputError, match="crop7 is in mine and in yours"):
        export_submission(tmp_path / "p", tmp_path / "s.zip", datasets=["mine", "yours"])
    assert export_submission(tmp_path / "p", tmp_path / "s.zip", datasets=["yours"]).written == ("crop7/er",)


def test_wrong_names_are_refused_with_the_nearest(tmp_path):
    write_all(tmp_path / "p")
    with pytest.raises(UnknownNameError, match="did you mean 'mito'"):
        export_submission(tmp_path / "p", tmp_path / "s.zip", ["mitto"], crops=TABLE)
    with pytest.raises(UnknownNameError, match="unknown data set 'on'"):
        export_submission(tmp_path / "p", tmp_path / "s.zip", None, ["on"], crops=TABLE)
    with pytest.raises(MissingError, match=r"no predictions folder"):
        export_submission(tmp_path / "none", tmp_path / "s.zip", crops=TABLE)
    with pytest.raises(MissingError, match="no predictions for the crop table"):
        export_submission(tmp_path / "p", tmp_path / "s.zip")  # the challenge's table has none of these crops


def test_half_written_and_foreign_sources_are_refused(tmp_path):
    write(tmp_path / "p", ("one", "crop7", "er"), np.ones(PLAIN.shape, np.uint8), PLAIN, complete=False)
    with pytest.raises(IncompleteError, match="crop7/er is only half written"):
        export_submission(tmp_path / "p", tmp_path / "s.zip", crops=TABLE)
    write(tmp_path / "p", ("one", "crop7", "er"), np.ones(PLAIN.shape, np.float32), PLAIN)
    with pytest.raises(MetadataError, match="labels must be integers, found float32"):
        export_submission(tmp_path / "p", tmp_path / "s.zip", crops=TABLE)
    write(tmp_path / "p", ("one", "crop7", "er"), np.ones(PLAIN.shape, np.uint8), PLAIN, artefact="affinities")
    with pytest.raises(MetadataError, match="got affinities; run decode or predict first"):
        export_submission(tmp_path / "p", tmp_path / "s.zip", crops=TABLE)
    write_multiscale(tmp_path / "q/one.zarr/crop7/er", np.ones(PLAIN.shape, np.uint8), PLAIN)  # not ours: fine
    assert export_submission(tmp_path / "q", tmp_path / "s.zip", crops=TABLE).written == ("crop7/er",)


def test_a_corrupt_chunk_is_named_and_the_old_submission_stays(tmp_path):
    write_all(tmp_path / "p")
    export_submission(tmp_path / "p", tmp_path / "s.zip", crops=TABLE)
    before = (tmp_path / "s.zip").read_bytes()
    chunk = tmp_path / "p/two.zarr/crop12/er/s0/0/0/0"
    chunk.write_bytes(chunk.read_bytes()[:50])
    (tmp_path / "p/two.zarr/crop12/er/.zattrs").touch()
    with pytest.raises(CorruptDataError, match="crop12/er/s0"):
        export_submission(tmp_path / "p", tmp_path / "s.zip", crops=TABLE)
    assert (tmp_path / "s.zip").read_bytes() == before


def test_an_output_that_would_destroy_something_is_refused(tmp_path):
    write_all(tmp_path / "p")
    for target in (tmp_path / "p", tmp_path):
        with pytest.raises(InputError, match="would replace the predictions"):
            export_submission(tmp_path / "p", target, crops=TABLE)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a.txt").write_text("mine")
    with pytest.raises(WriteError, match="was not written by export and is left alone"):
        export_submission(tmp_path / "p", tmp_path / "notes", crops=TABLE)
    (tmp_path / "x.zip").mkdir()
    with pytest.raises(InputError, match="is a folder"):
        export_submission(tmp_path / "p", tmp_path / "x.zip", crops=TABLE)


def test_a_full_disk_leaves_the_old_submission_and_one_clear_line(tmp_path, monkeypatch):
    write_all(tmp_path / "p")
    export_submission(tmp_path / "p", tmp_path / "s.zip", crops=TABLE)
    before = (tmp_path / "s.zip").read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("connectomics.submission.pack.shutil.copyfileobj", full)
    with pytest.raises(WriteError, match="No space left on device; free space"):
        export_submission(tmp_path / "p", tmp_path / "s.zip", crops=TABLE)
    monkeypatch.undo()
    assert (tmp_path / "s.zip").read_bytes() == before


def test_a_killed_run_goes_on_where_it_stopped(tmp_path):
    write_all(tmp_path / "p")
    export_submission(tmp_path / "p", tmp_path / "whole.zip", crops=TABLE)

    class KilledError(Exception):
        pass

    def kill(done, _total, _name):
        if done == 2:
            raise KilledError

    with pytest.raises(KilledError):
        export_submission(tmp_path / "p", tmp_path / "s.zip", crops=TABLE, progress=kill)
    assert not (tmp_path / "s.zip").exists()
    # one array is half written, and the source of another has changed since
    array = tmp_path / "s.zip.partial/data/crop12/er"
    array.mkdir(parents=True)
    (array / "0.0.0").write_bytes(b"half")
    next(p for p in (tmp_path / "p/one.zarr/crop7/er/s0").rglob("*") if p.name.isdigit() and p.is_file()).touch()
    result = export_submission(tmp_path / "p", tmp_path / "s.zip", crops=TABLE)
    assert result.resumed == 1
    assert (tmp_path / "s.zip").read_bytes() == (tmp_path / "whole.zip").read_bytes()
    assert not (tmp_path / "s.zip.partial").exists()


# -- the scorer and the command ----------------------------------------------------------------------------------------
def test_what_is_exported_gets_the_official_score(tmp_path, shared_reference):
    """Labels of a submission with known official numbers, written as decode would, exported, scored."""
    from connectomics.metrics.challenge import score_submission

    folder = shared_reference / "official_scorer/submissions"
    table = CropTable.load(folder / "test_crop_manifest.csv")
    given = opened(folder / "exact_grid.zip")
    for e in table:
        values = given[f"{e.crop_name}/{e.class_name}"][:]
        write(tmp_path / "p", (e.dataset, e.crop_name, e.class_name), values, e.grid)
    result = export_submission(tmp_path / "p", tmp_path / "s.zip", crops=table)
    assert not result.findings
    found = score_submission(tmp_path / "s.zip", folder / "truth.zarr", table).to_dict()
    expected = json.loads((folder / "expected.json").read_text())["exact_grid"]
    for e in table:
        ours, official = found[e.crop_name][e.class_name], expected[e.crop_name][e.class_name]
        for key in ("tp", "fp", "fn", "hausdorff_norm_sum"):
            if key in official:
                assert ours[key] == pytest.approx(official[key], abs=1e-6), (e, key)
    assert found["overall_score"] == pytest.approx(expected["overall_score"], abs=1e-9)


def run_script(*arguments):
    command = [sys.executable, str(ROOT / "scripts/export_cellmap_submission.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_plans_script(tmp_path):
    npy(tmp_path, "er", np.ones(PLAIN.shape, np.uint8))
    TABLE.save(tmp_path / "crops.csv")
    common = ("--predictions_dir", tmp_path / "p", "--datasets", "one", "--crops", tmp_path / "crops.csv")
    good = run_script(*common, "--classes", "er", "--output_path", tmp_path / "s.zip")
    assert good.returncode == 0, good.stderr
    assert "1 array," in good.stdout
    np.testing.assert_array_equal(opened(tmp_path / "s.zip")["crop7/er"][:], 1)
    bad = run_script(*common, "--classes", "err", "--output_path", tmp_path / "t.zip")
    assert bad.returncode == 1
    assert bad.stderr.count("\n") == 1
    assert "did you mean 'er'" in bad.stderr
