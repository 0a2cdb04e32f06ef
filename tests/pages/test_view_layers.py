"""Many crops and classes in few layers, test crops by name, and what tables say of instances, as the page gets it."""

from __future__ import annotations

import csv
import json
import shutil
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from connectomics.cellmap.classes import CLASSES
from connectomics.cellmap.crop_table import CropTable, TableEntry
from connectomics.cli import main
from connectomics.decoding.parameters import DecodeParameters
from connectomics.errors import UnknownNameError
from connectomics.geometry import VoxelGrid
from connectomics.inference.artifact import save_cellmap_predictions
from connectomics.io.multiscale import Multiscale
from connectomics.io.write import write_multiscale
from connectomics.morphology.contacts import ContactSpec
from connectomics.pages.view import ViewSources, VolumeServer, collect_layers, state_of, summary
from connectomics.pages.view.class_maps import merged
from connectomics.pipeline.measure import measure_labels, measure_tasks
from connectomics.pipeline.mesh import mesh_labels, mesh_tasks
from tests.cellmap.roots import grid_of, write_label, write_raw
from tests.decoding.decode_kit import decode_predictions

SCORED = [name for name, about in CLASSES.items() if about.scored]
SHAPE = (12, 10, 8)
DATASET = "cube"


def fetched(url: str) -> bytes:
    with urllib.request.urlopen(url) as answer:
        return bytes(answer.read())


def fetched_volume(server: VolumeServer, address: str, folder: Path) -> NDArray[Any]:
    """What the page draws of a small made volume, by our own reader of Zarr."""
    for name in (".zgroup", ".zattrs", "s0/.zarray", "s0/0/0/0"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(fetched(f"{server.url}/{address}/{name}"))
    source = Multiscale.open(folder)
    return source.read_level(0, (0, 0, 0), source.grid.shape)[0]


def half_planes(seed: int) -> dict[str, NDArray[np.uint8]]:
    """A mask for each scored class; they overlap."""
    rng = np.random.default_rng(seed)
    return {name: (rng.random(SHAPE) < 0.1).astype(np.uint8) for name in SCORED}


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven crops of all 48 scored classes, and a table of test crops."""
    root = tmp_path_factory.mktemp("many")
    write_raw(root, DATASET, np.zeros((16, 16, 16), np.uint8), grid_of((16, 16, 16)))
    for number in range(1, 8):
        for name, mask in half_planes(number).items():
            write_label(root, DATASET, f"crop{number}", name, mask, grid_of(SHAPE))
    CropTable((TableEntry(557, DATASET, "mito", grid_of((4, 4, 4), start=64)),)).save(root / "test_crops.csv")
    return root


def test_seven_crops_of_48_classes_are_a_few_layers(many: Path, tmp_path: Path) -> None:
    found = collect_layers(ViewSources(str(many)))
    expected = ["raw", *(f"{what} crop{n}" for n in range(1, 8) for what in ("truth", "known"))]
    assert [layer.name for layer in found.layers] == expected
    assert [layer.name for layer in found.layers if layer.visible] == ["raw", "truth crop1"]
    lines = summary(found)
    assert len(lines) <= 8
    assert "336 arrays are one layer per crop" in lines[-1]
    with VolumeServer(found.roots, found.made) as server:
        state = state_of(found, server.url)
        assert len(state["layers"]) == 16
        truth = state["layers"][1]
        volume, names = (source["url"] for source in truth["source"])
        said = json.loads(fetched(f"{names.removeprefix('precomputed://')}/info"))["inline"]
        of = dict(zip(map(int, said["ids"]), said["properties"][0]["values"], strict=True))
        drawn = fetched_volume(server, volume.removeprefix(f"zarr2://{server.url}/"), tmp_path / "truth")
        known = fetched_volume(server, "made/crop1-known", tmp_path / "known")
    assert sorted(of.values()) == sorted(SCORED)
    masks = half_planes(1)
    for place in np.ndindex(SHAPE):
        there = [name for name in SCORED if masks[name][place]]
        if not there:
            assert drawn[place] == 0
        else:  # atomic classes before groups, small groups before large ones
            assert of[int(drawn[place])] in there
            assert len(CLASSES[of[int(drawn[place])]].atoms) == min(len(CLASSES[name].atoms) for name in there)
    assert (known == 255).all()
    boxes = state["layers"][-1]
    assert boxes["name"] == "crops"
    assert [box["id"] for box in boxes["annotations"]] == [f"crop{n}" for n in range(1, 8)]
    assert boxes["annotations"][0]["pointB"] == [64.0, 80.0, 96.0]


def test_named_classes_and_crops_are_layers_of_their_own(many: Path) -> None:
    found = collect_layers(ViewSources(str(many), crops=("3", "crop4"), classes=("mito", "er")))
    names = [layer.name for layer in found.layers[1:]]
    assert names == [f"{c} {w} crop{n}" for n in (3, 4) for c in ("er", "mito") for w in ("truth", "known")]
    assert found.notes == []


def test_more_crops_than_fit_are_named_in_a_note(many: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    write_raw(root, DATASET, np.zeros((8, 8, 8), np.uint8), grid_of((8, 8, 8)))
    for number in range(1, 13):
        write_label(root, DATASET, f"crop{number}", "mito", np.ones((4, 4, 4), np.uint8), grid_of((4, 4, 4)))
    found = collect_layers(ViewSources(str(root)))
    assert len(found.layers) == 1 + 2 * 8
    assert found.notes == ["truth: 4 more crops are not shown; name them by --crop"]
    named = collect_layers(ViewSources(str(root), crops=tuple(f"crop{n}" for n in range(1, 13))))
    assert len(named.layers) == 1 + 2 * 12


def test_a_test_crop_is_shown_by_its_name(many: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = collect_layers(ViewSources(str(many), crops=("crop557",)))
    assert [layer.name for layer in found.layers] == ["raw"]
    assert found.position == (80.0, 80.0, 80.0)
    assert found.extent == 32.0
    assert list(found.boxes) == ["crop557"]
    with pytest.raises(UnknownNameError, match="did you mean 'crop557'"):
        collect_layers(ViewSources(str(many), crops=("crop558",)))
    assert main(["view", str(many), "--tables", str(many / "nowhere")]) == 1
    assert "--tables: there is no folder" in capfd.readouterr().err


def predicted(folder: Path, crops: int, classes: tuple[str, ...]) -> None:
    for number in range(crops):
        values = np.stack([np.random.default_rng(number * 100 + n).random(SHAPE) for n in range(len(classes))])
        place = folder / f"{DATASET}.zarr" / f"crop{number + 1}"
        save_cellmap_predictions(values.astype(np.float32), place, classes, grid_of(SHAPE))


def test_with_predictions_only_their_classes_have_truth(many: Path, tmp_path: Path) -> None:
    predicted(tmp_path, 2, ("mito", "er"))
    found = collect_layers(ViewSources(str(many), predictions=tmp_path, crops=("crop1", "crop2")))
    assert {layer.class_name for layer in found.layers[1:]} == {"mito", "er"}
    assert sum(layer.what == "truth" for layer in found.layers) == 4
    assert sum(layer.what == "probability" for layer in found.layers) == 4


def test_many_predicted_classes_are_one_layer_with_the_most_probable(tmp_path: Path) -> None:
    classes = ("mito", "er", "my_own", *[n for n in SCORED if n not in ("mito", "er")][:10])
    predicted(tmp_path, 2, classes)
    found = collect_layers(ViewSources(None, predictions=tmp_path))
    assert [layer.name for layer in found.layers] == ["predictions crop1", "predictions crop2"]
    with VolumeServer(found.roots, found.made) as server:
        drawn = fetched_volume(server, "made/crop2-predictions", tmp_path / "copy")
        said = json.loads(fetched(f"{server.url}/made/crop2-predictions-names/info"))["inline"]
    of = dict(zip(map(int, said["ids"]), said["properties"][0]["values"], strict=True))
    stored = {
        name: Multiscale.open(tmp_path / f"{DATASET}.zarr/crop2/{name}").read_level(0, (0, 0, 0), SHAPE)[0]
        for name in classes
    }
    for place in np.ndindex(SHAPE):
        best, expected = 0.0, 0
        for number, name in of.items():
            value = float(stored[name][place]) / 255
            groups = len(CLASSES[name].atoms) if name in CLASSES else 0
            if value >= 0.5 and value - 10 * groups > best - 1000 * (expected == 0):
                best, expected = value - 10 * groups, number
        assert drawn[place] == expected, place


def test_float16_probabilities_are_shown_as_bytes(tmp_path: Path) -> None:
    values = np.random.default_rng(0).random(SHAPE).astype(np.float16)
    grid = VoxelGrid((40, 4.6, 4.6), (-500, 1234.5, 0.3), SHAPE)
    about = {"artefact": "probability", "class_name": "mito", "complete": True, "scale": 1.0, "grid": grid.to_dict()}
    place = tmp_path / f"{DATASET}.zarr/crop1/mito"
    write_multiscale(place, values, grid, attrs={"connectomics": about})
    found = collect_layers(ViewSources(None, predictions=tmp_path))
    (layer,) = found.layers
    with VolumeServer(found.roots, found.made) as server:
        drawn = fetched_volume(server, layer.address, tmp_path / "copy")
    assert np.array_equal(drawn, np.rint(values.astype(np.float32) * 255))
    assert Multiscale.open(tmp_path / "copy").grid == grid


def test_true_instances_keep_ids_beyond_32_bits(tmp_path: Path) -> None:
    grid, ids = grid_of(SHAPE), np.zeros(SHAPE, np.uint64)
    ids[2:4], ids[6:9] = 2**40 + 7, 7
    write_raw(tmp_path / "root", DATASET, np.zeros((16, 16, 16), np.uint8), grid_of((16, 16, 16)))
    write_label(tmp_path / "root", DATASET, "crop1", "mito", ids, grid, kind="instance")
    found = collect_layers(ViewSources(str(tmp_path / "root")))
    with VolumeServer(found.roots, found.made) as server:
        drawn = fetched_volume(server, found.layers[1].address, tmp_path / "copy")
    assert np.array_equal(drawn, ids)


def test_ranks_and_ties_in_a_map() -> None:
    shares = [("b", np.array([[[1, 0]]]) > 0), ("a", np.array([[[1.0, 0.49]]])), ("mito", np.ones((1, 1, 2)))]
    drawn = merged(shares, {"b": 1, "a": 2, "mito": 3}, (1, 1, 2))
    assert CLASSES["mito"].atoms
    assert drawn.tolist() == [[[1, 3]]], "the first of two equal ones; a group only if nothing else is there"


@pytest.mark.parametrize("table", ["csv", "parquet"])
def test_instances_have_what_the_tables_say(tmp_path: Path, table: str) -> None:
    """Decoded and measured by the real commands; the page gets the numbers of the tables."""
    values = np.zeros((2, *SHAPE), np.float32)
    values[0, 2:5, 2:5, 2:5] = values[0, 9:12, 5:9, 5:7] = 1
    values[1, 5:7, 2:5, 2:5] = 1
    for number in (1, 2):  # two crops: the rows of one must not reach the other
        place = tmp_path / "p" / f"{DATASET}.zarr" / f"crop{number}"
        save_cellmap_predictions(values[:, ::number], place, ("mito", "er"), grid_of(values[0, ::number].shape))
    decode_predictions(tmp_path / "p", tmp_path / "l", {"mito": DecodeParameters(method="cc3d")}, table=table)
    tasks = measure_tasks(
        tmp_path / "l", tmp_path / "t", contacts=[ContactSpec("mito", "er", 10.0)], table_format=table
    )
    measure_labels(tasks)
    found = collect_layers(ViewSources(None, labels=tmp_path / "l", tables=tmp_path / "t", crops=("crop1",)))
    with VolumeServer(found.roots, found.made) as server:
        state = state_of(found, server.url)
        (layer,) = (layer for layer in state["layers"] if layer["name"] == "mito labels crop1")
        url = layer["source"][1]["url"].removeprefix("precomputed://")
        said = json.loads(fetched(f"{url}/info"))
    assert said["@type"] == "neuroglancer_segment_properties"
    inline = said["inline"]
    columns = {one["id"]: one for one in inline["properties"]}
    assert inline["ids"] == ["1", "2"]
    assert columns["label"]["values"] == ["mito 1", "mito 2"]
    assert (columns["tags"]["tags"], columns["tags"]["values"]) == (["mito"], [[0], [0]])
    assert columns["voxels"]["values"] == [27.0, 24.0]
    assert columns["volume_nm3"]["values"] == [27 * 512.0, 24 * 512.0]
    assert columns["partners_er_10nm"]["values"] == [1.0, 0.0]
    assert columns["contact_nm2_er_10nm"]["values"][0] > 0
    assert {"surface_nm2", "sphericity", "touches_border"} <= columns.keys()
    if table == "csv":
        with (tmp_path / "t/mito.csv").open() as file:
            rows = [row for row in csv.DictReader(file) if row["crop"] == "crop1"]
        assert columns["surface_nm2"]["values"] == pytest.approx([float(row["surface_nm2"]) for row in rows])


def test_tables_and_meshes_of_other_labels_are_named(tmp_path: Path) -> None:
    """Measured and meshed, then decoded again: instance 1 of the tables is not the one that is shown."""
    values = np.zeros((1, *SHAPE), np.float32)
    values[0, 2:5, 2:5, 2:5], values[0, 9:12, 5:9, 5:7] = 0.6, 0.9
    save_cellmap_predictions(values, tmp_path / f"p/{DATASET}.zarr/crop1", ("mito",), grid_of(SHAPE))
    sources = ViewSources(None, labels=tmp_path / "l", tables=tmp_path / "t", meshes=tmp_path / "m")
    for threshold in (0.5, 0.7):
        shutil.rmtree(tmp_path / "l", ignore_errors=True)
        parameters = DecodeParameters(method="cc3d", threshold=threshold, min_size_nm3=0)
        decode_predictions(tmp_path / "p", tmp_path / "l", {"mito": parameters})
        if threshold == 0.5:
            measure_labels(measure_tasks(tmp_path / "l", tmp_path / "t"))
            mesh_labels(mesh_tasks(tmp_path / "l", tmp_path / "m", "mito", file_format="precomputed"))
            assert collect_layers(sources).notes == []
    now = f"is of other labels than {tmp_path / 'l'} holds now"
    notes = [f"{DATASET}/crop1/mito: {tmp_path / 't'} {now}; run measure again"]
    notes += [f"{DATASET}/crop1/mito: {tmp_path / 'm'} {now}; run mesh again"]
    assert collect_layers(sources).notes == notes


def test_a_part_of_a_file_is_served_from_its_end_too(tmp_path: Path) -> None:
    """As readers of shards ask for their index."""
    (tmp_path / "a").write_bytes(b"0123456789")
    with VolumeServer({"r": tmp_path}, {}) as server:
        for asked, expected, said in (
            ("bytes=-3", b"789", "bytes 7-9/10"), ("bytes=4-", b"456789", "bytes 4-9/10"),
            ("bytes=0-99", b"0123456789", "bytes 0-9/10"),
        ):  # fmt: skip
            request = urllib.request.Request(f"{server.url}/files/r/a", headers={"Range": asked})
            with urllib.request.urlopen(request) as answer:
                assert (answer.status, answer.read(), answer.headers["Content-Range"]) == (206, expected, said)
        request = urllib.request.Request(f"{server.url}/files/r/a", method="HEAD")
        with urllib.request.urlopen(request) as answer:
            assert (answer.headers["Content-Length"], answer.read()) == ("10", b"")
