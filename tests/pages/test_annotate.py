"""Drawing labels: what is drawn is on disk, at the right voxels, and nothing else can write."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray

import connectomics as cx
from connectomics.cellmap.catalog import Catalog
from connectomics.cellmap.labels import read_labels
from connectomics.cli import main
from connectomics.errors import InputError, MetadataError, MissingError, WriteError
from connectomics.geometry import Box, Index, VoxelGrid
from connectomics.io.write import create_multiscale, update_attrs, write_multiscale
from tests.cellmap.roots import GROUND_TRUTH, grid_of, write_label, write_raw, zarr_of
from tests.pages.devtools import browser
from tests.trees import contents

SHAPE = (20, 60, 50)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Raw that says where it is (z), and the labels of crop1 inside: mito with an unknown half, er all known."""
    root = tmp_path / "root"
    raw = np.broadcast_to(np.arange(32, dtype=np.uint8)[:, None, None], (32, 96, 96))
    write_raw(root, "cube", np.ascontiguousarray(raw), grid_of((32, 96, 96)))
    label = np.zeros(SHAPE, np.uint8)
    label[5:10, 10:20, 10:20] = 1
    label[:, :, 25:] = 255
    grid = grid_of((32, 96, 96)).crop((6, 10, 12), SHAPE)
    write_label(root, "cube", "crop1", "mito", label, grid, unknown=255, levels=2)
    write_label(root, "cube", "crop1", "er", np.zeros(SHAPE, np.uint8), grid)
    return root


def place_of(root: Path, name: str, crop: str = "crop1") -> Path:
    return zarr_of(root, "cube") / GROUND_TRUTH / crop / name


def stored(root: Path, name: str, crop: str = "crop1", level: str = "s0") -> NDArray[Any]:
    """The array as zarr-python reads it from the disk now."""
    return np.asarray(zarr.open_array(str(place_of(root, name, crop) / level), mode="r")[:])


def ask(url: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    """A request below ``url``; a POST comes from the page itself unless ``headers`` say otherwise."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=20)
    sent = {"Origin": f"http://{parts.netloc}", **headers} if body is not None else headers
    sent = {name: value for name, value in sent.items() if value}
    connection.request("GET" if body is None else "POST", parts.path + path, body, sent)
    answer = connection.getresponse()
    return answer.status, answer.read()


def rectangle(z: int, y: int, x: int, height: int, width: int, name: str = "mito") -> str:
    return f"labels/{name}/{z}?y={y}&x={x}&height={height}&width={width}"


def test_a_stroke_is_on_disk_at_once(root: Path) -> None:
    expected = stored(root, "mito")
    with cx.annotate(root, crop=1) as drawing:
        patch = np.array([[1, 0, 255], [1, 1, 1]], np.uint8)
        assert ask(drawing.url, rectangle(7, 40, 24, 2, 3), patch.tobytes()) == (200, b"")
        expected[7, 40:42, 24:27] = patch
        assert np.array_equal(stored(root, "mito"), expected)
        assert ask(drawing.url, "labels/mito/7") == (200, expected[7].tobytes())
        # while it is drawn, nothing on disk says how many voxels are unknown
        assert "complement_counts" not in json.dumps(zarr.open_array(str(place_of(root, "mito") / "s0")).attrs.asdict())
    assert not stored(root, "er").any()
    crop = Catalog.open(str(root)).crop("cube", "crop1")
    found = crop.labels["mito"].annotation
    assert found.counts == {"absent": (expected == 0).sum(), "unknown": (expected == 255).sum()}
    volume = read_labels(crop, ["mito"], crop.grid)
    assert np.array_equal(volume.present_of("mito") > 0, expected == 1)
    assert np.array_equal(volume.known_of("mito") > 0, expected != 255)


def test_coarser_levels_follow_when_the_page_is_closed(root: Path) -> None:
    with cx.annotate(root, crop=1) as drawing:
        for z in (0, 1):
            assert ask(drawing.url, rectangle(z, 0, 0, 4, 4), np.ones(16, np.uint8).tobytes())[0] == 200
    assert stored(root, "mito", level="s1")[0, :2, :2].tolist() == [[1, 1], [1, 1]]


def test_an_array_without_unknown_voxels_gets_a_value_for_them(root: Path) -> None:
    assert Catalog.open(str(root)).crop("cube", "crop1").labels["er"].annotation.unknown is None
    with cx.annotate(root, crop="crop1", classes=["er"]) as drawing:
        assert ask(drawing.url, rectangle(0, 0, 0, 1, 2, "er"), bytes([255, 1]))[0] == 200
    crop = Catalog.open(str(root)).crop("cube", "crop1")
    assert not crop.labels["er"].annotation.fully_known
    assert read_labels(crop, ["er"], crop.grid).known_of("er")[0, 0, :3].tolist() == [0, 1, 1]


def test_an_object_with_the_value_of_unknown_stays_an_object(root: Path) -> None:
    ids = np.zeros(SHAPE, np.uint8)
    ids[0, 0, 0] = 255
    grid = Catalog.open(str(root)).crop("cube", "crop1").grid
    write_label(
        root, "cube", "crop1", "ves", ids, grid, unknown=255, kind="instance", counts={"absent": 9, "unknown": 0}
    )
    with cx.annotate(root, crop=1, classes=["ves"]) as drawing:
        assert drawing.labels["ves"].unknown is None
        assert ask(drawing.url, rectangle(0, 0, 1, 1, 1, "ves"), bytes([7, 0, 0, 0]))[0] == 200
    crop = Catalog.open(str(root)).crop("cube", "crop1")
    assert read_labels(crop, ["ves"], crop.grid).present_of("ves")[0, 0, :3].tolist() == [1, 1, 0]


def test_sections_of_raw_lie_where_the_labels_are(root: Path) -> None:
    with cx.annotate(root, crop=1) as drawing:
        for z in (-4, 0, 19, 23):
            status, data = ask(drawing.url, f"raw/{z}")
            section = np.frombuffer(data, np.uint8).reshape(SHAPE[1] + 64, SHAPE[2] + 64)
            assert status == 200
            assert set(np.unique(section[32:-32, 32:-32])) == {z + 6}
            assert section[0, 0] == 0  # 32 voxels before the crop there is no raw
        assert ask(drawing.url, "raw/-5")[0] == 400
        assert ask(drawing.url, "raw/24")[0] == 400


def test_nothing_is_written_by_a_bad_request(root: Path) -> None:
    one = b"\x01"
    good = rectangle(0, 0, 0, 1, 1)
    before = contents(root)
    with cx.annotate(root, crop=1) as drawing:
        drawn, url = contents(root), drawing.url
        stranger = url.rsplit("/", 2)[0] + "/guess/"
        wrong: list[tuple[int, str, str, bytes, dict[str, str]]] = [
            (403, stranger, good, one, {}),
            (403, url, good, one, {"Origin": "http://evil.example"}),
            (403, url, good, one, {"Origin": "null"}),
            (403, url, good, one, {"Origin": ""}),
            (403, url, good, one, {"Host": "evil.example", "Origin": "http://evil.example"}),
            (404, url, rectangle(0, 0, 0, 1, 1, "mitos"), one, {}),
            (404, url, rectangle(0, 0, 0, 1, 1, "../er"), one, {}),
            (404, url, rectangle(0, 0, 0, 1, 1, "%2e%2e%2fer"), one, {}),
            (404, url, "labels//etc/passwd/0?y=0&x=0&height=1&width=1", one, {}),
            (404, url, "predicted/mito/0?y=0&x=0&height=1&width=1", one, {}),
            (404, url, "", one, {}),
            (400, url, rectangle(20, 0, 0, 1, 1), one, {}),
            (400, url, rectangle(0, 60, 0, 1, 1), one, {}),
            (400, url, rectangle(0, -1, 0, 1, 1), one, {}),
            (400, url, rectangle(0, 0, 49, 1, 2), 2 * one, {}),
            (400, url, rectangle(0, 0, 0, 0, 1), b"", {}),
            (400, url, rectangle(0, 0, 0, 1, 2), one, {}),
            (400, url, "labels/mito/0?y=0&x=0&height=1", one, {}),
            (400, url, "labels/mito/0?y=a&x=0&height=1&width=1", one, {}),
            (400, url, good, b"\x02", {}),
            (413, url, good, one, {"Content-Length": str(1 << 27)}),
        ]
        for status, base, path, body, headers in wrong:
            assert ask(base, path, body, **headers)[0] == status, (path, headers)
            assert contents(root) == drawn, (path, headers)
        assert ask(url, "labels/mito/0", Origin="http://evil.example")[0] == 403
        assert ask(url, "raw/0", Host="evil.example")[0] == 403
        assert ask(stranger, "")[0] == 403
        assert ask(url, "files/root/cube")[0] == 404
        assert urlsplit(url).hostname == "127.0.0.1"
    assert contents(root) == before


def test_a_new_crop_starts_unknown_and_is_resumed(root: Path) -> None:
    box = "cube:40,80,80:120,400,400"
    with cx.annotate(root, crop=2, box=box, classes=["er", "ves"]) as drawing:
        assert {name: str(item.dtype) for name, item in drawing.labels.items()} == {"er": "uint8", "ves": "uint32"}
        grid = drawing.labels["er"].grid
        assert grid.box == Box((40, 80, 80), (120, 400, 400))
        assert ask(drawing.url, rectangle(3, 0, 39, 1, 1, "er"), b"\x01")[0] == 200
        ids = np.array([70_000], "<u4")
        assert ask(drawing.url, rectangle(3, 0, 39, 1, 1, "ves"), ids.tobytes())[0] == 200
        assert b'"next": 70001' in ask(drawing.url, "")[1]
    crop = Catalog.open(str(root)).crop("cube", "crop2")
    assert crop.grid == grid
    volume = read_labels(crop, ["er", "ves"], grid)
    for name in ("er", "ves"):
        assert np.argwhere(volume.known_of(name)).tolist() == [[3, 0, 39]]
        assert np.argwhere(volume.present_of(name)).tolist() == [[3, 0, 39]]
    assert crop.labels["er"].annotation.counts == {"absent": 0, "unknown": grid.size - 1}
    with cx.annotate(root, crop=2, box=box) as drawing:  # the same command again
        section = np.frombuffer(ask(drawing.url, "labels/ves/3")[1], "<u4").reshape(grid.shape[1:])
        assert section[0, 39] == 70_000
        assert (section == 2**32 - 1).sum() == section.size - 1
    with pytest.raises(InputError, match="crop2 exists with"):
        cx.annotate(root, crop=2, box="cube:48,80,80:120,400,400")
    with cx.annotate(root, crop=3, box=box, classes=["Golgi-2:instance", "ves:semantic", "er"]) as drawing:
        assert {name: item.kind for name, item in drawing.labels.items()} == {
            "Golgi-2": "instance", "ves": "semantic", "er": "semantic"
        }  # fmt: skip
        assert drawing.labels["Golgi-2"].dtype == np.uint32
    with cx.annotate(root, crop=3, classes=["Golgi-2"]) as drawing:
        assert drawing.labels["Golgi-2"].kind == "instance"
    with pytest.raises(InputError, match="labels of er in crop3 are semantic, not instance"):
        cx.annotate(root, crop=3, classes=["er:instance"])
    # ingest leaves alone what was drawn
    assert (
        json.loads((place_of(root, "er", "crop2") / ".zattrs").read_text())["connectomics"]["artefact"] == "annotated"
    )


def write_decoded(
    folder: Path,
    name: str,
    values: NDArray[Any],
    grid: VoxelGrid,
    shards: Index | None = None,
    box: str = "box_1",
    **more: Any,
) -> None:
    """``shards``: as OME-Zarr 0.5."""
    about = {"artefact": "labels", "kind": "semantic", "complete": True, "objects": int(values.max()), **more}
    attrs = {"connectomics": {**about, "grid": grid.to_dict()}}
    place = folder / f"cube.zarr/{box}/{name}"
    (writer,) = create_multiscale(place, [grid], values.dtype, attrs=attrs, shards=shards)
    writer.write((0, 0, 0), values)


def test_a_prediction_is_offered_where_labels_are_unknown(root: Path, tmp_path: Path) -> None:
    grid = grid_of((32, 96, 96)).crop((6, 10, 12), (20, 60, 40))  # not all of the crop
    values = np.zeros(grid.shape, np.uint8)
    values[:, 30:, :] = 1
    gap = grid.crop((4, 0, 0), (1, 60, 40)).box  # raw was missing there
    write_decoded(tmp_path / "labels", "mito", values, grid, (64, 64, 64), unknown=[{"box": [gap.begin, gap.end]}])
    with cx.annotate(root, crop=1, labels=tmp_path / "labels") as drawing:
        section = np.frombuffer(ask(drawing.url, "predicted/mito/3")[1], np.uint8).reshape(SHAPE[1:])
        assert set(np.unique(section[:30, :40])) == {0}
        assert set(np.unique(section[30:, :40])) == {1}
        assert set(np.unique(section[:, 40:])) == {255}
        assert set(ask(drawing.url, "predicted/mito/4")[1]) == {255}
        assert ask(drawing.url, "predicted/er/3")[0] == 404
    assert np.array_equal(stored(root, "mito") == 255, np.broadcast_to(np.arange(50) >= 25, SHAPE))


def test_predicted_objects_keep_their_ids(root: Path, tmp_path: Path) -> None:
    grid = Catalog.open(str(root)).crop("cube", "crop1").grid
    values = np.zeros(grid.shape, np.uint16)
    values[0, 0, :4] = [1, 254, 255, 256]
    write_decoded(tmp_path / "labels", "ves", values, grid, kind="instance")
    unknown = np.full(SHAPE, 255, np.uint8)
    write_label(root, "cube", "crop1", "ves", unknown.astype(np.uint16), grid, unknown=255, kind="instance")
    with cx.annotate(root, crop=1, classes=["ves"], labels=tmp_path / "labels") as drawing:
        section = np.frombuffer(ask(drawing.url, "predicted/ves/0")[1], "<u2").reshape(SHAPE[1:])
        assert section[0, :5].tolist() == [1, 254, 256, 257, 0]
    write_decoded(tmp_path / "other", "mito", values, grid)
    update_attrs(
        tmp_path / "other/cube.zarr/box_1/mito", {"connectomics": {"artefact": "probability", "complete": True}}
    )
    with pytest.raises(MetadataError, match="run decode first"):
        cx.annotate(root, crop=1, classes=["mito"], labels=tmp_path / "other")


def test_predicted_ids_may_have_gaps_and_crops_may_have_the_same_ids(root: Path, tmp_path: Path) -> None:
    """As `apply_edits` leaves them, and as two boxes of `predict` have them."""
    grid = Catalog.open(str(root)).crop("cube", "crop1").grid
    write_label(root, "cube", "crop1", "ves", np.full(SHAPE, 255, np.uint8), grid, unknown=255, kind="instance")
    left, right = np.zeros((20, 60, 25), np.uint16), np.zeros((20, 60, 25), np.uint16)
    left[0, 0, :3], right[0, 0, :3] = [1, 200, 0], [1, 2, 60]
    write_decoded(tmp_path / "labels", "ves", left, grid.crop((0, 0, 0), left.shape), kind="instance", objects=2)
    with cx.annotate(root, crop=1, classes=["ves"], labels=tmp_path / "labels") as drawing:
        assert b'"next": 201' in ask(drawing.url, "")[1]
    more = grid.crop((0, 0, 25), right.shape)
    write_decoded(tmp_path / "labels", "ves", right, more, box="box_2", kind="instance", objects=3)
    with cx.annotate(root, crop=1, classes=["ves"], labels=tmp_path / "labels") as drawing:
        section = np.frombuffer(ask(drawing.url, "predicted/ves/0")[1], "<u4").reshape(SHAPE[1:])  # 261 needs more bits
        assert stored(root, "ves").dtype == np.uint8
        assert ask(drawing.url, rectangle(0, 0, 0, *SHAPE[1:], "ves"), section.tobytes())[0] == 200
        assert section[0, [0, 1, 2, 25, 26, 27]].tolist() == [1, 200, 0, 201, 202, 261]
    found = stored(root, "ves")
    assert found.dtype == np.uint32
    assert np.array_equal(found[0], section)
    assert (found[1:] == 255).all()


def test_a_predicted_instance_never_gets_the_id_of_another_that_is_drawn(
    root: Path, instances: Path, tmp_path: Path
) -> None:
    """Nor does it lose its own: what was accepted keeps its ID when the page is opened again."""
    drawn = stored(root, "ves")
    drawn[2:5, 50:55, 40:45] = 2  # an object that somebody drew, which is not predicted
    drawn[8:10, 5:15, 5:15] = 1  # accepted in two sections
    shutil.rmtree(place_of(root, "ves"))
    grid = Catalog.open(str(root)).crop("cube", "crop1").grid
    write_label(root, "cube", "crop1", "ves", drawn, grid, unknown=255, kind="instance")
    log = tmp_path / "edits.jsonl"
    for _ in range(2):
        with cx.annotate(root, crop=1, classes=["ves"], labels=instances, edits=log) as drawing:
            section = np.frombuffer(ask(drawing.url, "predicted/ves/11")[1], "<u2").reshape(SHAPE[1:])
            assert [int(section[y, x]) for y, x in ((10, 10), (10, 20), (30, 10), (50, 10))] == [1, 258, 3, 256]
            assert ask(drawing.url, rectangle(11, 0, 0, *SHAPE[1:], "ves"), section.tobytes())[0] == 200
            assert ask(drawing.url, "edits", edit("merge", 258, 3))[0] == 200
            assert json.loads(ask(drawing.url, "edits")[1])[0]["ids"] == [258, 3]
            assert b'"next": 259' in ask(drawing.url, "")[1]
    assert [json.loads(line)["ids"] for line in log.read_text().splitlines()] == [[2, 3]] * 2


def test_the_next_instance_is_not_called_unknown(root: Path) -> None:
    grid, values = Catalog.open(str(root)).crop("cube", "crop1").grid, np.zeros(SHAPE, np.uint16)
    values[0, 0, :2] = 254, 255
    write_label(root, "cube", "crop1", "ves", values, grid, unknown=255, kind="instance")
    with cx.annotate(root, crop=1, classes=["ves"]) as drawing:
        assert b'"next": 256' in ask(drawing.url, "")[1]


def test_only_the_page_that_was_opened_last_draws(root: Path) -> None:
    """Another tab shows sections as they were, and would give a new instance the same ID."""
    with cx.annotate(root, crop=1, classes=["mito"]) as drawing:
        pages = [re.search(rb'"page": "(\w+)"', ask(drawing.url, "")[1]) for _ in range(2)]
        first, second = (found[1].decode() for found in pages if found is not None)
        status, said = ask(drawing.url, rectangle(3, 5, 5, 1, 1) + f"&page={first}", b"\x01")
        assert (status, b"another tab" in said) == (409, True)
        assert ask(drawing.url, rectangle(3, 5, 6, 1, 1) + f"&page={second}", b"\x01")[0] == 200
    assert stored(root, "mito")[3, 5, 5:7].tolist() == [0, 1]


def test_labels_without_raw_take_it_from_another_root(root: Path, tmp_path: Path) -> None:
    """As proposals come: a root of labels in the CellMap layout."""
    grid = Catalog.open(str(root)).crop("cube", "crop1").grid
    labels = tmp_path / "proposals" / "labels"
    write_label(labels, "cube", "crop9", "mito", np.ones(SHAPE, np.uint8), grid, unknown=255)
    with cx.annotate(labels, crop=9, raw=root) as drawing:
        assert set(np.frombuffer(ask(drawing.url, "raw/2")[1], np.uint8)) == {0, 8}
        assert ask(drawing.url, rectangle(2, 5, 5, 1, 1), b"\xff")[0] == 200
    assert np.argwhere(stored(labels, "mito", "crop9") == 255).tolist() == [[2, 5, 5]]
    with pytest.raises(MissingError, match="expected a raw volume"):
        cx.annotate(labels, crop=9)


def test_arrays_of_other_programs_are_converted_by_the_first_stroke(root: Path) -> None:
    place = place_of(root, "mito")
    values = stored(root, "mito")
    for level in ("s0", "s1"):
        attrs = json.loads((place / level / ".zattrs").read_text())
        copy = zarr.create_array(
            str(place / level), data=stored(root, "mito", level=level), chunks=(8, 8, 8), zarr_format=2,
            compressors=None, overwrite=True,
        )  # fmt: skip
        copy.attrs.update(attrs)
    with cx.annotate(root, crop=1, classes=["mito"]) as drawing:
        assert np.array_equal(stored(root, "mito"), values)
        assert ask(drawing.url, rectangle(0, 0, 0, 1, 1), b"\x01")[0] == 200
    values[0, 0, 0] = 1
    assert np.array_equal(stored(root, "mito"), values)
    assert (
        Catalog.open(str(root)).crop("cube", "crop1").labels["mito"].annotation.counts["absent"] == (values == 0).sum()
    )


def test_two_processes_do_not_draw_the_same_crop(root: Path) -> None:
    with cx.annotate(root, crop=1), pytest.raises(WriteError, match=f"process {os.getpid()}"):
        cx.annotate(root, crop=1)
    cx.annotate(root, crop=1).close()


def test_a_killed_process_leaves_whole_strokes_and_counts_are_made_later(root: Path) -> None:
    command = [sys.executable, "-m", "connectomics", "annotate", str(root), "--crop", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        url = next(line.strip() for line in running.stdout if line.startswith("http://"))
        for z in range(3):
            assert ask(url, rectangle(z, 0, 0, 60, 50), np.ones(SHAPE[1:], np.uint8).tobytes())[0] == 200
        running.send_signal(signal.SIGKILL)
    values = stored(root, "mito")
    assert (values[:3] == 1).all()
    killed = Catalog.open(str(root)).crop("cube", "crop1").labels["mito"].annotation
    assert not killed.counts
    assert killed.unknown == 255
    cx.annotate(root, crop=1).close()
    whole = Catalog.open(str(root)).crop("cube", "crop1").labels["mito"].annotation
    assert whole.counts == {"absent": (values == 0).sum(), "unknown": (values == 255).sum()}


def test_wrong_input_is_one_line(root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data, before = str(root), contents(root)
    small = "cube:0,0,0:80,80,80"
    for words, said in (
        ([data], "name the data set (cube) and the crop"),
        ([data, "--crop", "7"], "give --box to make a new crop"),
        ([data, "--crop", "one"], "a crop's name is crop and a number"),
        ([data, "--crop", "1", "--dataset", "cub"], "did you mean 'cube'"),
        ([data, "--crop", "7", "--box", small], "a new crop needs its classes"),
        ([data, "--crop", "7", "--box", small, "--class", "../er"], "a class's name is"),
        (
            [data, "--crop", "7", "--box", small, "--class", "er:ids"],
            "er: expected kind instance or semantic, got 'ids'",
        ),
        ([data, "--crop", "7", "--box", "cube:0,0,0"], "a box is DATASET:"),
        ([data, "--crop", "7", "--box", "cube:0,0,9000:80,80,9900", "--class", "er"], "lies outside the raw"),
        ([data, "--crop", "7", "--box", small, "--dataset", "other"], "name different data sets"),
        ([data, "--crop", "1", "--voxel-size", "8"], "--voxel-size is for a new crop"),
        ([data, "--crop", "1", "--labels", str(tmp_path / "nowhere")], "has no labels of"),
        ([str(tmp_path / "nowhere"), "--crop", "1"], "no data root"),
        (["s3://bucket/data", "--crop", "1"], "local"),
    ):
        assert main(["annotate", *words]) == 1, words
        (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
        assert said in line, words
    assert contents(root) == before


def test_a_link_out_of_the_root_is_not_followed(root: Path, tmp_path: Path) -> None:
    place = place_of(root, "mito")
    place.rename(tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="leads out of"):
        cx.annotate(root, crop=1, classes=["mito"])


def test_labels_that_cannot_be_drawn_are_refused(root: Path) -> None:
    grid = Catalog.open(str(root)).crop("cube", "crop1").grid
    write_label(root, "cube", "crop1", "cell", np.ones(SHAPE, np.int64), grid, kind="instance")
    with pytest.raises(MetadataError, match="only uint8, uint16 and uint32"):
        cx.annotate(root, crop=1, classes=["cell"])
    write_label(root, "cube", "crop1", "nuc", np.ones((5, 5, 5), np.uint8), grid_of((5, 5, 5)))
    with pytest.raises(InputError, match="on different grids"):
        cx.annotate(root, crop=1, classes=["mito", "nuc"])


# -- edits of predicted instances --------------------------------------------------------------------------------------
@pytest.fixture
def instances(root: Path, tmp_path: Path) -> Path:
    """Decoded instances of ves: 1 and 2 side by side, a dumbbell 3, and 255, which the page shows as 256."""
    grid = Catalog.open(str(root)).crop("cube", "crop1").grid
    values = np.zeros(SHAPE, np.uint16)
    values[8:14, 5:15, 5:15], values[8:14, 5:15, 15:25] = 1, 2
    values[6:16, 25:35, 5:15] = values[6:16, 25:35, 30:40] = values[10:12, 29:31, 15:30] = 3
    values[8:14, 45:55, 5:15] = 255
    write_decoded(tmp_path / "labels", "ves", values, grid, kind="instance")
    unknown = np.full(SHAPE, 255, np.uint16)
    write_label(root, "cube", "crop1", "ves", unknown, grid, unknown=255, kind="instance")
    return tmp_path / "labels"


def edit(op: str, *ids: int, **more: Any) -> bytes:
    return json.dumps({"op": op, "class": "ves", "ids": ids, **more}).encode()


def test_edits_are_lines_of_the_log(root: Path, instances: Path, tmp_path: Path) -> None:
    log = tmp_path / "edits.jsonl"
    log.write_text('{"op": "delete", "class": "mito", "id": 4, "crop": "other"}\n')
    with cx.annotate(root, crop=1, classes=["ves"], labels=instances, edits=log) as drawing:
        assert json.loads(ask(drawing.url, "edits")[1]) == []
        assert ask(drawing.url, "edits", edit("merge", 1, 2))[0] == 200
        status, said = ask(drawing.url, "edits", edit("delete", 256))
        assert (status, json.loads(said)[1]) == (200, {"op": "delete", "class": "ves", "ids": [256]})
        assert ask(drawing.url, "edits", edit("split", 3, seeds=[[10, 30, 8], [10, 30, 37]]))[0] == 200
        assert ask(drawing.url, "edits", edit("delete", 2))[0] == 200
        assert len(json.loads(ask(drawing.url, "edits?undo=1", b"")[1])) == 3
        before = log.read_bytes()
        for body in (b"{", edit("merge", 1), edit("paint", 1), edit("split", 3, seeds=[[1, 2], [3]]), b"[]",
                     edit("reclassify", 1, to="mito"), edit("delete", 0)):  # fmt: skip
            assert ask(drawing.url, "edits", body)[0] == 400, body
        assert ask(drawing.url, "edits", edit("delete", 1), Origin="http://evil.example")[0] == 403
        assert log.read_bytes() == before
    lines = [json.loads(line) for line in before.splitlines()]
    grid = Catalog.open(str(root)).crop("cube", "crop1").grid
    assert lines[1] == {"op": "merge", "class": "ves", "ids": [1, 2], "dataset": "cube", "crop": "box_1"}
    assert lines[2]["id"] == 255
    assert lines[3]["seeds"] == [grid.to_world((10, 30, 8)).tolist(), grid.to_world((10, 30, 37)).tolist()]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines[1:]))
    made = cx.apply_edits(instances, log, out=tmp_path / "out").folder / "cube.zarr/box_1/ves/s0"
    found = np.asarray(zarr.open_array(str(made), mode="r")[:])
    assert set(np.unique(found)) == {0, 1, 3, 256}
    assert (found[10, 30, 8], found[10, 30, 37], found[10, 10, 20]) == (3, 256, 1)


def test_the_last_line_of_another_crop_is_not_undone(root: Path, instances: Path, tmp_path: Path) -> None:
    log = tmp_path / "edits.jsonl"
    log.write_text('{"op": "delete", "class": "ves", "id": 4, "crop": "box_2"}\n')
    with cx.annotate(root, crop=1, classes=["ves"], labels=instances, edits=log) as drawing:
        assert ask(drawing.url, "edits?undo=1", b"")[0] == 400
    assert log.read_text().count("box_2") == 1


def test_edits_need_a_prediction_with_instances(root: Path, instances: Path, decoded: Path, tmp_path: Path) -> None:
    for arguments, error, message in (
        ({"classes": ["ves"]}, InputError, "give its folder with --labels"),
        ({"classes": ["mito"], "labels": decoded}, InputError, "have no instances to edit"),
        ({"classes": ["ves"], "labels": instances, "edits": tmp_path / "none/a.jsonl"}, MissingError, "no folder"),
    ):
        with pytest.raises(error, match=message):  # type: ignore[arg-type]
            cx.annotate(root, crop=1, **{"edits": tmp_path / "a.jsonl", **arguments})  # type: ignore[arg-type]
    with cx.annotate(root, crop=1, classes=["ves"], labels=instances) as drawing:
        assert ask(drawing.url, "edits")[0] == 404
        assert ask(drawing.url, "edits", edit("delete", 1))[0] == 404
    grid = Catalog.open(str(root)).crop("cube", "crop1").grid
    about = {"artefact": "labels", "kind": "instance", "complete": True, "objects": 1, "grid": grid.to_dict()}
    write_multiscale(instances / "cube.zarr/box_2/ves", np.ones(SHAPE, np.uint16), grid, attrs={"connectomics": about})
    with pytest.raises(InputError, match=r"several crops .* \(box_1, box_2\)"):
        cx.annotate(root, crop=1, classes=["ves"], labels=instances, edits=tmp_path / "a.jsonl")


# -- the page ----------------------------------------------------------------------------------------------------------
SAVED = "document.getElementById('status').textContent === 'saved'"
IS_READY = f"{SAVED} && document.getElementById('place').textContent.startsWith('10 ')"


@pytest.fixture
def decoded(root: Path, tmp_path: Path) -> Path:
    grid = Catalog.open(str(root)).crop("cube", "crop1").grid
    values = np.zeros(SHAPE, np.uint8)
    values[:, 20:40, 20:45] = 1
    write_decoded(tmp_path / "labels", "mito", values, grid)
    return tmp_path / "labels"


@pytest.mark.slow
def test_a_hand_draws_in_a_browser(root: Path, decoded: Path, tmp_path: Path) -> None:
    expected = stored(root, "mito")
    with (
        cx.annotate(root, crop=1, classes=["mito", "er"], labels=decoded) as drawing,
        browser(drawing.url, tmp_path / "profile") as tab,
    ):
        tab.wait(IS_READY)
        box = tab.js("(() => { const r = document.getElementById('view').getBoundingClientRect();"
                     "return [r.left, r.top, r.width, r.height]; })()")  # fmt: skip
        scale = min(box[2] / (SHAPE[2] + 64), box[3] / (SHAPE[1] + 64))

        def at(y: float, x: float) -> tuple[float, float]:
            """Where a voxel's center is on the screen."""
            left = box[0] + (box[2] - (SHAPE[2] + 64) * scale) / 2
            top = box[1] + (box[3] - (SHAPE[1] + 64) * scale) / 2
            return left + (x + 0.5 + 32) * scale, top + (y + 0.5 + 32) * scale

        def check() -> None:
            tab.wait(SAVED)
            assert np.array_equal(stored(root, "mito"), expected)

        tab.js("document.getElementById('size').value = 1")
        tab.drag([at(3, 2), at(3, 12)])  # brush: a line
        expected[10, 3, 2:13] = 1
        check()
        tab.key("e")  # eraser
        tab.drag([at(3, 5), at(3, 6)])
        expected[10, 3, 5:7] = 0
        check()
        tab.key("u")  # unknown
        tab.drag([at(3, 8), at(3, 8)])
        expected[10, 3, 8] = 255
        check()
        tab.screenshot(tmp_path / "drawn.png")
        for _ in range(3):
            tab.key("z")
        expected[10, 3, 2:13] = 0
        check()
        tab.key("y")
        expected[10, 3, 2:13] = 1
        check()
        tab.key("d")
        tab.key("f")
        tab.drag([at(50, 5), at(50, 5)])  # fill: all absent voxels around the line
        expected[10][expected[10] == 0] = 1
        check()
        tab.key("z")
        expected[10] = stored(root, "mito")[9]
        expected[10, 10:20, 10:20] = 0
        expected[10, 3, 2:13] = 1
        check()
        tab.mouse("mouseWheel", *at(5, 5), button="none", deltaX=0, deltaY=120)
        tab.wait("document.getElementById('place').textContent.startsWith('11 ')")
        tab.key("a")  # accept: unknown voxels as predicted
        expected[11, :, 25:] = 0
        expected[11, 20:40, 25:45] = 1
        check()
        tab.key("2")  # er is known everywhere
        tab.key("b")
        tab.drag([at(0, 0), at(0, 1)])
        tab.wait(SAVED)
        assert np.argwhere(stored(root, "er")).tolist() == [[11, 0, 0], [11, 0, 1]]
        check()
        tab.js("location.reload()")  # the section is still the same, and shows what is on disk
        tab.wait("document.readyState === 'complete' && document.getElementById('place').textContent.startsWith('11 ')")
        tab.wait(SAVED)
        tab.screenshot(tmp_path / "page.png")
        assert tab.errors == []
    assert (tmp_path / "page.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize("voxel_size", [(30.0, 12.0, 4.0), (8.0, 4.0, 8.0)])
def test_sections_have_the_shape_of_their_voxels_and_the_brush_is_round(
    tmp_path: Path, voxel_size: tuple[float, float, float]
) -> None:
    """A bright disc, round in nm, is round on the screen, and so is one click of the brush, where it is clicked."""
    shape, (y, x), root = (3, 60, 80), (24.0, 31.0), tmp_path / "root"
    tall, wide = np.array(voxel_size[1:]) / min(voxel_size[1:])
    rows, columns = np.mgrid[: shape[1], : shape[2]]
    disc = np.hypot(tall * (rows - 29.5), wide * (columns - 39.5)) < 28
    grid = VoxelGrid(voxel_size, (0.0, 0.0, 0.0), shape)
    write_raw(root, "cube", np.ascontiguousarray(np.broadcast_to(disc * np.uint8(255), shape)), grid)
    write_label(root, "cube", "crop1", "mito", np.zeros(shape, np.uint8), grid)
    with (
        cx.annotate(root, crop=1, classes=["mito"]) as drawing,
        browser(drawing.url, tmp_path / "profile") as tab,
    ):
        tab.wait(f"{SAVED} && document.getElementById('place').textContent.startsWith('1 ')")
        box = tab.js("(() => { const c = document.getElementById('view'), r = c.getBoundingClientRect();"
                     "return [r.left, r.top, c.width, c.height]; })()")  # fmt: skip
        bright = tab.js(
            "(() => { const c = document.getElementById('view');"
            "const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data; const at = [];"
            "for (let k = 0; k < d.length; k += 4) if (d[k + 2] > 127) at.push(k / 4);"
            "const xs = at.map((k) => k % c.width), ys = at.map((k) => Math.floor(k / c.width));"
            "const span = (v) => v.reduce((m, n) => [Math.min(m[0], n), Math.max(m[1], n)], [1e9, -1]);"
            "return [...span(ys), ...span(xs)]; })()"
        )
        margin = 32
        scale = min(box[2] / (wide * (shape[2] + 2 * margin)), box[3] / (tall * (shape[1] + 2 * margin)))
        height, width = bright[1] - bright[0] + 1, bright[3] - bright[2] + 1
        assert abs(height - width) <= 2 * scale * max(tall, wide)  # a voxel on each side
        assert abs(height - 56 * scale) <= 2 * scale * max(tall, wide)
        middle = np.array([box[1] + box[3] / 2, box[0] + box[2] / 2])
        sides, half = scale * np.array([tall, wide]), np.array(shape[1:]) / 2
        top, left = np.round(middle + sides * (np.array([y, x]) + 0.5 - half))  # a mouse is on whole pixels
        tab.js("document.getElementById('size').value = 9")
        tab.drag([(left, top), (left, top)])
        tab.wait(SAVED)
        tab.screenshot(tmp_path / "round.png")
        assert tab.errors == []
    y, x = (np.array([top, left]) - middle) / sides + half
    expected = np.hypot(tall * (rows + 0.5 - y), wide * (columns + 0.5 - x)) <= 4.5
    assert np.array_equal(stored(root, "mito")[1], expected)


@pytest.mark.slow
def test_an_id_that_does_not_fit_is_not_drawn_as_another(root: Path, tmp_path: Path) -> None:
    """256 in an array of 8 bits would be 0: absent."""
    grid, values = Catalog.open(str(root)).crop("cube", "crop1").grid, np.full(SHAPE, 7, np.uint8)
    write_label(root, "cube", "crop1", "ves", values, grid, unknown=255, kind="instance")
    with (
        cx.annotate(root, crop=1, classes=["ves"]) as drawing,
        browser(drawing.url, tmp_path / "profile") as tab,
    ):
        tab.wait(IS_READY)
        tab.js("document.getElementById('number').value = 254")
        tab.js("document.getElementById('number').dispatchEvent(new Event('change'))")
        tab.key("n")
        view = tab.js("(() => { const r = document.getElementById('view').getBoundingClientRect();"
                      "return [r.left + r.width / 2, r.top + r.height / 2]; })()")  # fmt: skip
        tab.drag([(view[0], view[1]), (view[0], view[1])])
        tab.wait("document.getElementById('status').textContent.startsWith('no ID is left')")
        tab.key("i")
        tab.drag([(view[0], view[1]), (view[0], view[1])])
        tab.key("e")
        tab.drag([(view[0], view[1]), (view[0], view[1])])
        tab.wait(SAVED)
    found = stored(root, "ves")
    assert (set(np.unique(found)), set(np.unique(found[:10])), set(np.unique(found[11:]))) == ({0, 7}, {7}, {7})


@pytest.mark.slow
def test_strokes_wait_in_the_page_until_they_can_be_saved(root: Path, tmp_path: Path) -> None:
    drawing = cx.annotate(root, crop=1, classes=["mito"])
    with browser(drawing.url, tmp_path / "profile") as tab:
        tab.wait(IS_READY)
        blocked = place_of(root, "mito") / "s0/0/0/0"
        content = blocked.read_bytes()
        blocked.unlink()
        blocked.mkdir()  # a chunk cannot be written where a folder is
        view = tab.js("(() => { const r = document.getElementById('view').getBoundingClientRect();"
                      "return [r.left + r.width / 2, r.top + r.height / 2]; })()")  # fmt: skip
        tab.drag([(view[0], view[1]), (view[0], view[1])])
        tab.wait("document.getElementById('status').textContent.startsWith('NOT SAVED')")
        blocked.rmdir()
        blocked.write_bytes(content)
        tab.wait(SAVED)
    drawing.close()
    assert (stored(root, "mito")[10] == 1).sum() > 10


@pytest.mark.slow
def test_a_hand_merges_splits_and_deletes_in_a_browser(root: Path, instances: Path, tmp_path: Path) -> None:
    log = tmp_path / "edits.jsonl"
    with (
        cx.annotate(root, crop=1, classes=["ves"], labels=instances, edits=log) as drawing,
        browser(drawing.url, tmp_path / "profile") as tab,
    ):
        tab.wait(IS_READY)
        box = tab.js("(() => { const r = document.getElementById('view').getBoundingClientRect();"
                     "return [r.left, r.top, r.width, r.height]; })()")  # fmt: skip
        scale = min(box[2] / (SHAPE[2] + 64), box[3] / (SHAPE[1] + 64))

        def click(y: float, x: float) -> None:
            left = box[0] + (box[2] - (SHAPE[2] + 64) * scale) / 2
            top = box[1] + (box[3] - (SHAPE[1] + 64) * scale) / 2
            place = left + (x + 0.5 + 32) * scale, top + (y + 0.5 + 32) * scale
            tab.drag([place, place])

        def logged(count: int) -> list[dict[str, Any]]:
            tab.wait(f"document.getElementById('logged').textContent === '{count} here'")
            return [json.loads(line) for line in log.read_text().splitlines()]

        def color(y: int, x: int) -> list[int]:
            """Of the canvas at a voxel, red, green and blue."""
            found = tab.js(
                "(() => { const c = document.getElementById('view'), k = devicePixelRatio;"
                f"const s = Math.min(c.width / {SHAPE[2] + 64}, c.height / {SHAPE[1] + 64});"
                f"const x = (c.width - {SHAPE[2] + 64} * s) / 2 + ({x} + 32.5) * s;"
                f"const y = (c.height - {SHAPE[1] + 64} * s) / 2 + ({y} + 32.5) * s;"
                "return [...c.getContext('2d').getImageData(x, y, 1, 1).data]; })()"
            )
            return list(found[:3])

        gray = color(2, 2)
        assert len({tuple(color(10, 10)), tuple(color(10, 18)), tuple(color(50, 10)), tuple(gray)}) == 4
        tab.key("g")  # merge: two clicks
        click(10, 10)
        tab.wait("document.getElementById('status').textContent.includes('click what belongs to it')")
        click(10, 10)
        tab.wait("document.getElementById('status').textContent.includes('is the same instance')")
        assert not log.exists()
        click(10, 20)
        assert logged(1)[0]["ids"] == [1, 2]
        tab.wait(SAVED)
        assert color(10, 10) == color(10, 18)
        tab.key("x")  # delete: one click
        click(50, 10)
        assert logged(2)[1] == {"op": "delete", "class": "ves", "id": 255, "dataset": "cube", "crop": "box_1"}
        assert color(50, 10) == gray
        click(50, 10)  # it is gone
        tab.wait("document.getElementById('status').textContent.includes('no predicted instance')")
        tab.key("s")  # split: two clicks in one instance, on different sections
        click(30, 8)
        tab.key(".")
        tab.wait("document.getElementById('place').textContent.startsWith('11 ')")
        click(10, 20)
        tab.wait("document.getElementById('status').textContent.includes('that is 1, not 3')")
        click(30, 37)
        grid = Catalog.open(str(root)).crop("cube", "crop1").grid
        assert logged(3)[2]["seeds"] == [grid.to_world((10, 30, 8)).tolist(), grid.to_world((11, 30, 37)).tolist()]
        click(30, 8)
        tab.wait("document.getElementById('status').textContent.includes('apply the edits')")
        tab.screenshot(tmp_path / "edited.png")
        tab.key("w")  # undo the split
        assert len(logged(2)) == 2
        assert tab.errors == []
    before = np.full(SHAPE, 255, np.uint16)
    assert np.array_equal(stored(root, "ves"), before)  # nothing was drawn
