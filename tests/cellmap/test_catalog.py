"""Finding data, and what is said when it is not as it should be."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from connectomics.cellmap.annotation import Annotation
from connectomics.cellmap.catalog import Catalog
from connectomics.cellmap.classes import CLASSES, INSTANCE_CLASSES, get_class
from connectomics.cellmap.crop_table import CropTable
from connectomics.cellmap.summary import summarize
from connectomics.cli import main
from connectomics.data.cache import prepare
from connectomics.data.volumes import CropVolume
from connectomics.errors import (
    ConnectomicsError,
    CorruptDataError,
    InputError,
    MetadataError,
    MissingError,
    UnknownNameError,
)
from connectomics.io.location import StoreOptions
from connectomics.io.write import ensure_group
from connectomics.pipeline.hold_out import hold_out
from tests.cellmap.roots import GROUND_TRUTH, grid_of, plain_root, write_label, write_raw, zarr_of
from tests.s3_server import FaultyProxy, FolderServer


def one_line(error: pytest.ExceptionInfo[ConnectomicsError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("7,set-a", "line 2: class_label, voxel_size, translation, shape is empty"),
        ("7,set-a,mito,[8;8;8],[0;0;0],[5.5;5;5]", "line 2: shape must be whole numbers"),
        ("7,set-a,mito,[8;8;8],[0;0;0],[0;5;5]", "line 2: shape must be whole numbers"),
        ("7,set-a,mito,[-8;8;8],[0;0;0],[5;5;5]", "line 2: voxel_size must be positive"),
        ("7,set-a,mito,[8;8],[0;0;0],[5;5;5]", "line 2: voxel_size must be three numbers"),
    ],
)
def test_a_bad_row_of_a_crop_table_is_named(tmp_path: Path, row: str, message: str) -> None:
    file = tmp_path / "crops.csv"
    file.write_text(f"crop_name,dataset,class_label,voxel_size,translation,shape\n{row}\n")
    with pytest.raises(MetadataError, match=message):
        CropTable.load(file)
    for name in ("crops.csv", "crops.json"):
        (tmp_path / name).write_bytes(b"\xa6\x00\xff")
        with pytest.raises(MetadataError, match="no text file"):
            CropTable.load(tmp_path / name)


def test_classes_are_the_challenges() -> None:
    assert sum(c.scored for c in CLASSES.values()) == 48
    assert {"nuc", "vim", "ves", "endo", "lyso", "ld", "perox", "mito", "np", "mt", "cell"} == INSTANCE_CLASSES
    assert get_class("mito").atoms == ("mito_mem", "mito_lum", "mito_ribo")
    assert all(a in CLASSES for c in CLASSES.values() for a in c.atoms)
    with pytest.raises(UnknownNameError, match="did you mean 'mito'"):
        get_class("mitoo")


def test_catalog_finds_what_is_there(tmp_path: Path) -> None:
    catalog = Catalog.open(str(plain_root(tmp_path)))
    assert catalog.datasets == ["set-a"]
    (crop,) = catalog.crops()
    assert (crop.dataset, crop.name, list(crop.labels)) == ("set-a", "crop1", ["mito"])
    assert crop.grid == grid_of((16, 16, 16))
    assert catalog.crops(classes=["mito_mem"]) == catalog.crops(classes=["mito"])  # a group speaks of its atoms
    with pytest.raises(MissingError, match="no crop with a label of ld"):
        catalog.crops(classes=["ld"])


def test_missing_things_are_named(tmp_path: Path) -> None:
    with pytest.raises(MissingError) as error:
        Catalog.open(str(tmp_path / "nowhere"))
    assert "no data root at" in one_line(error)
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingError, match="holds no data set"):
        Catalog.open(str(tmp_path / "empty"))
    catalog = Catalog.open(str(plain_root(tmp_path / "root")))
    with pytest.raises(UnknownNameError, match="did you mean 'set-a'"):
        catalog.crops(["set-b"])
    with pytest.raises(UnknownNameError, match="did you mean 'crop1'"):
        catalog.crops(crops=["crop11"])
    shutil.rmtree(zarr_of(tmp_path / "root", "set-a") / "recon-1/em/fibsem-uint8")
    with pytest.raises(MissingError, match="expected a raw volume"):
        catalog.crops()


@pytest.mark.parametrize(
    ("attrs", "message"),
    [
        ({}, "could mean absent or unknown"),
        ({"cellmap": {"annotation": {"class_name": "mito"}}}, "no annotation_type"),
        ({"cellmap": {"annotation": {"annotation_type": {"type": "painting", "encoding": {}}}}}, "'painting'"),
        (
            {
                "cellmap": {
                    "annotation": {"annotation_type": {"type": "semantic_segmentation", "encoding": {"absent": "x"}}}
                }
            },
            "whole numbers",
        ),
        ({"cellmap": 3}, "must be a mapping"),
    ],
)
def test_broken_annotations_are_refused(tmp_path: Path, attrs: dict, message: str) -> None:
    root = plain_root(tmp_path)
    group = zarr_of(root, "set-a") / GROUND_TRUTH / "crop1" / "mito"
    multiscales = json.loads((group / ".zattrs").read_text())["multiscales"]
    (group / ".zattrs").write_text(json.dumps({"multiscales": multiscales, **attrs}))
    crop = Catalog.open(str(root)).crop("set-a", "crop1")
    with pytest.raises(MetadataError, match=message) as error:
        _ = crop.labels["mito"].annotation
    assert "crop1/mito" in one_line(error)


def test_groups_that_are_no_class_are_listed_and_stop_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As real crops have them: ``all``, without annotation; beside it a class of one's own, and a plain group."""
    root = plain_root(tmp_path / "root")
    crop_folder = zarr_of(root, "set-a") / GROUND_TRUTH / "crop1"
    write_label(root, "set-a", "crop1", "axon", np.ones((16, 16, 16), np.uint8), grid_of((16, 16, 16)))
    shutil.copytree(crop_folder / "mito", crop_folder / "all")
    for attributes in (crop_folder / "all/.zattrs", crop_folder / "all/s0/.zattrs"):
        if attributes.exists():
            attributes.write_text(
                json.dumps({k: v for k, v in json.loads(attributes.read_text()).items() if k != "cellmap"})
            )
    ensure_group(crop_folder / "notes")
    crop = Catalog.open(str(root)).crop("set-a", "crop1")
    assert (sorted(crop.labels), crop.not_annotated) == (["axon", "mito"], ("all", "notes"))
    summary = summarize(str(root))
    assert sorted(summary["classes"]) == ["axon", "mito"]
    assert summary["not_annotated"] == {"all": 1, "notes": 1}
    assert main(["describe", str(root)]) == 0
    assert "all: a group without annotation in 1 crop(s)" in capsys.readouterr().out
    volume = CropVolume(crop, ("mito",), (8.0, 8.0, 8.0), cache=tmp_path / "cache")
    prepare([volume])
    assert volume.decode_labels(crop.grid).present_of("mito").sum() == 6**3


def test_only_labels_that_a_run_reads_must_be_readable(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = plain_root(tmp_path / "root")
    write_label(root, "set-a", "crop1", "nuc", np.ones((16, 16, 16), np.uint8), grid_of((16, 16, 16)))
    write_label(root, "set-a", "crop1", "cell", np.ones((16, 16, 16), np.uint8), grid_of((16, 16, 16)))
    crop_folder = zarr_of(root, "set-a") / GROUND_TRUTH / "crop1"
    (crop_folder / "nuc" / ".zattrs").unlink()  # no multiscale any more
    attrs = json.loads((crop_folder / "cell" / ".zattrs").read_text())
    (crop_folder / "cell" / ".zattrs").write_text(json.dumps({"multiscales": attrs["multiscales"]}))
    (crop_folder / "cell" / "s0" / ".zattrs").write_text("{}")
    crop = Catalog.open(str(root)).crop("set-a", "crop1")
    volume = CropVolume(crop, ("mito",), (8.0, 8.0, 8.0), cache=tmp_path / "cache")
    prepare([volume])
    assert volume.decode_labels(crop.grid).known_of("mito").all()
    assert "ignoring the labels of nuc" in caplog.text
    assert summarize(str(root))["not_annotated"] == {"cell": 1, "nuc": 1}
    for name in ("nuc", "cell"):
        with pytest.raises(MetadataError, match=f"crop1/{name}"):
            CropVolume(crop, (name,), (8.0, 8.0, 8.0)).decode_labels(crop.grid)


def test_raw_that_does_not_reach_the_crop_is_refused(tmp_path: Path) -> None:
    write_raw(tmp_path, "set-a", np.zeros((8, 8, 8), np.uint8), grid_of((8, 8, 8)))
    write_label(tmp_path, "set-a", "crop1", "mito", np.ones((8, 8, 8), np.uint8), grid_of((8, 8, 8), start=1000.0))
    crop = Catalog.open(str(tmp_path)).crop("set-a", "crop1")
    with pytest.raises(InputError, match="no raw to train on") as error:
        CropVolume(crop, ("mito",), (8.0, 8.0, 8.0)).check()
    assert "set-a/crop1" in one_line(error)


def test_a_truncated_label_chunk_is_named(tmp_path: Path) -> None:
    root = plain_root(tmp_path)
    chunk = next(
        p for p in (zarr_of(root, "set-a") / GROUND_TRUTH / "crop1/mito/s0").rglob("*") if p.is_file() and p.name == "0"
    )
    chunk.write_bytes(chunk.read_bytes()[:10])
    crop = Catalog.open(str(root)).crop("set-a", "crop1")
    with pytest.raises(CorruptDataError) as error:
        CropVolume(crop, ("mito",), (8.0, 8.0, 8.0)).read_labels(grid_of((4, 4, 4)))
    assert "crop1/mito/s0/0" in one_line(error)


def test_annotation_round_trip() -> None:
    annotation = Annotation("mito", "instance", 0, 255, {"absent": 3, "unknown": 2})
    assert Annotation.from_attrs(annotation.to_attrs(), {}, "here") == annotation


def test_summary_counts_states(tmp_path: Path) -> None:
    root = plain_root(tmp_path)
    values = np.zeros((16, 16, 16), np.uint8)
    values[:4], values[4:8] = 255, 1
    write_label(root, "set-a", "crop2", "mito", values, grid_of((16, 16, 16)), unknown=255)
    summary = summarize(str(root))
    voxel = 8**3 / 1e9
    found = summary["classes"]["mito"]
    assert found["crops"] == 2
    assert found["present_um3"] == pytest.approx((6**3 + 4 * 256) * voxel)
    assert found["unknown_um3"] == pytest.approx(4 * 256 * voxel)
    assert found["absent_um3"] == pytest.approx((16**3 - 6**3 + 8 * 256) * voxel)


def test_the_summary_of_a_local_root_has_data_sets_without_labels(tmp_path: Path) -> None:
    """Volumes that were imported and not annotated yet."""
    write_raw(tmp_path, "set-b", np.zeros((8, 8, 8), np.uint8), grid_of((8, 8, 8)))
    assert [item["name"] for item in summarize(str(tmp_path))["datasets"]] == ["set-b"]
    root = plain_root(tmp_path)
    found = {item["name"]: len(item["crops"]) for item in summarize(str(root))["datasets"]}
    assert found == {"set-a": 1, "set-b": 0}
    assert [item["name"] for item in summarize(str(root), ["set-b"])["datasets"]] == ["set-b"]
    assert [item["name"] for item in summarize(str(root), classes=["mito"])["datasets"]] == ["set-a"]


def test_shipped_table_is_the_challenges() -> None:
    table = CropTable.challenge()
    assert len(table) == 413
    assert len(table.crops()) == 16
    entry = next(e for e in table if e.crop == 557 and e.class_name == "mito")
    assert entry.crop_name == "crop557"
    assert entry.grid.translation == pytest.approx((23837.13, 7599.0, 35999.0))


def test_table_round_trip_and_selection(tmp_path: Path) -> None:
    table = CropTable.challenge()
    table.save(tmp_path / "t.csv")
    assert CropTable.load(tmp_path / "t.csv") == table
    some = table.select(crops=["crop557", 558], classes=["mito"])
    assert [(e.crop, e.class_name) for e in some] == [(557, "mito"), (558, "mito")]
    with pytest.raises(UnknownNameError, match="class 'mitoo'"):
        table.select(classes=["mitoo"])


def test_official_manifest_is_read(shared_reference: Path) -> None:
    table = CropTable.load(shared_reference / "official_scorer/submissions/test_crop_manifest.csv")
    assert len(table) == 10
    assert {e.crop for e in table} == {101, 102, 103, 104}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n1,2\n", "columns .* are missing"),
        (
            "crop_name,dataset,class_label,voxel_size,translation,shape\n1,d,mito,[8;8],[0;0;0],[4;4;4]\n",
            "line 2.*voxel_size",
        ),
        ("crop_name,dataset,class_label,voxel_size,translation,shape\n", "no rows"),
        (
            "crop_name,dataset,class_label,voxel_size,translation,shape\n" + "1,d,mito,[8;8;8],[0;0;0],[4;4;4]\n" * 2,
            "listed twice",
        ),
        (
            "crop_name,dataset,class_label,voxel_size,translation,shape\n1,d,mito,[8;8;8],[0;0;0],[4;4;4]\n"
            "crop1,e,er,[8;8;8],[0;0;0],[4;4;4]\n",
            "crop1 is in d and e; give each crop its own number",
        ),
    ],
)
def test_broken_tables_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(MetadataError, match=message):
        CropTable.load(tmp_path / "t.csv")


def test_held_out_masks_of_instance_classes_become_instances(tmp_path: Path) -> None:
    """Scored by instances, annotated as a mask: two balls in the held-out part are two objects of the truth."""
    import zarr

    shape = (8, 8, 80)
    write_raw(tmp_path / "root", "set-a", np.full(shape, 9, np.uint8), grid_of(shape))
    mask = np.zeros(shape, np.uint8)
    mask[2:4, 2:4, 64:66] = mask[5:7, 5:7, 72:75] = mask[2:6, 2:6, 5:9] = 1
    write_label(tmp_path / "root", "set-a", "crop1", "mito", mask, grid_of(shape))
    hold_out(tmp_path / "root" / "set-a", tmp_path / "out", ["mito"])
    truth = np.asarray(zarr.open_array(tmp_path / "out" / "truth.zarr" / "crop13" / "mito", mode="r")[...])
    assert truth.shape == (8, 8, 20)
    assert set(np.unique(truth)) == {0, 1, 2}
    np.testing.assert_array_equal(truth > 0, mask[:, :, 60:] > 0)


def test_raw_chunks_that_are_not_stored_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A partial download: raw of 2 x 2 x 2 chunks and its level of half the resolution, a crop under four of them."""
    grid = grid_of((128, 128, 128))
    raw = write_raw(tmp_path, "set-a", np.ones(grid.shape, np.uint8), grid, levels=2)
    write_label(tmp_path, "set-a", "crop1", "mito", np.ones((32, 32, 32), np.uint8), grid_of((32, 32, 32), start=256.0))
    label = grid_of((32, 100, 100))
    write_label(tmp_path, "set-a", "crop2", "mito", np.ones(label.shape, np.uint8), label)
    (raw / "s0/0/1/1").unlink()
    (raw / "s0/1/1/1").unlink()
    crop1, crop2 = Catalog.open(str(tmp_path)).crops()
    assert crop1.raw_source.missing_chunks(crop1.grid) == (0, 1, None)
    assert crop2.raw_source.missing_chunks(crop2.grid) == (1, 4, str(raw / "s0/0/1/1"))
    (dataset,) = summarize(str(tmp_path))["datasets"]
    assert dataset["raw_chunks"] == {"missing": 1, "total": 5}
    assert dataset["crops"][1]["raw_chunks"] == {"missing": 1, "total": 4, "first_missing": "s0/0/1/1"}
    (coarse,) = summarize(str(tmp_path), voxel_size=(16.0, 16.0, 16.0))["datasets"]
    assert coarse["raw_chunks"] == {"missing": 0, "total": 2}
    assert main(["describe", str(tmp_path)]) == 0
    assert "raw chunks stored 3 of 4 (first missing: s0/0/1/1)" in capsys.readouterr().out
    assert main(["describe", str(tmp_path), "--json", "--voxel-size", "8"]) == 0
    (dataset,) = json.loads(capsys.readouterr().out)["datasets"]
    assert dataset["crops"][1]["raw_chunks"]["missing"] == 1
    assert main(["describe", str(tmp_path), "--voxel-size", "x"]) != 0
    assert "--voxel-size: expected one number or three" in capsys.readouterr().err


def test_options_go_down_and_are_no_part_of_what_a_crop_is(tmp_path: Path) -> None:
    root = str(plain_root(tmp_path))
    options = StoreOptions(cache_bytes=1 << 20, threads=2)
    (plain,), (crop,) = Catalog.open(root).crops(), Catalog.open(root, options).crops()
    assert crop == plain
    assert hash(crop) == hash(plain)
    for each in (crop, pickle.loads(pickle.dumps(crop))):
        label = each.labels["mito"]
        for read_by in (each.options, label.options):
            assert (read_by.cache_bytes, read_by.threads) == (1 << 20, 2)
        for array in (*each.raw_source.arrays, *label.source.arrays):
            assert array.options.cache_bytes == 1 << 20


def test_a_root_on_s3_reads_like_one_on_disk(tmp_path: Path) -> None:
    """Catalog, grids, annotations and the summary, over a server that answers late and fails at times."""
    root = plain_root(tmp_path / "root")
    write_label(root, "set-a", "crop2", "nuc", np.ones((8, 8, 8), np.uint8), grid_of((8, 8, 8)))
    (zarr_of(root, "set-a") / "recon-1/em/fibsem-uint8/s0/0/0/0").unlink()
    with FolderServer(tmp_path) as server, FaultyProxy(server.endpoint, 0.01, 1 / 10) as proxy:
        options = StoreOptions(endpoint=proxy.endpoint)
        remote, local = Catalog.open("s3://public/root", options), Catalog.open(str(root))
        assert remote.datasets == local.datasets
        for one, other in zip(remote.crops(), local.crops(), strict=True):
            assert (one.key, one.grid, one.box, list(one.labels)) == (
                other.key,
                other.grid,
                other.box,
                list(other.labels),
            )
            missing, total, first = one.raw_source.missing_chunks(one.grid)
            assert (missing, total) == other.raw_source.missing_chunks(other.grid)[:2] == (1, 1)
            assert first == "s3://public/root/set-a/set-a.zarr/recon-1/em/fibsem-uint8/s0/0/0/0"
            for name, label in one.labels.items():
                assert label.annotation == other.labels[name].annotation
        assert proxy.failed.total() > 0
