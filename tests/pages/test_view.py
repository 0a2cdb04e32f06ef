"""The viewer: the right layers at the right places, only what was given, and a page that shows them."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import shutil
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest

from connectomics.cellmap.catalog import Catalog
from connectomics.cellmap.labels import read_labels
from connectomics.cli import main
from connectomics.errors import InputError, UnknownNameError
from connectomics.geometry import VoxelGrid
from connectomics.io.multiscale import Multiscale
from connectomics.io.write import write_multiscale
from connectomics.pages.view import ViewSources, VolumeServer, collect_layers, open_viewer, state_of
from connectomics.pages.view.in_napari import add_layers, levels_of
from tests.cellmap.roots import grid_of, write_label, write_raw

CHROMIUM = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)


def get(url: str, path: str) -> tuple[int, bytes]:
    """A request with the path as it is given (urllib would tidy it)."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=10)
    connection.request("GET", f"{parts.path}/{path}")
    answer = connection.getresponse()
    return answer.status, answer.read()


@pytest.fixture
def cube(tmp_path: Path) -> Path:
    """A data set whose raw is bright in a box off the middle, and whose mito is that box; half of it is unknown."""
    root = tmp_path / "root"
    data = np.full((64, 64, 64), 40, np.uint8)
    data[16:48, 24:56, 8:40] = 220
    write_raw(root, "cube", data, grid_of((64, 64, 64)), levels=2)
    label = (data > 100).astype(np.uint8)
    label[:, :, 60:] = 255
    write_label(root, "cube", "crop1", "mito", label, grid_of((64, 64, 64)), unknown=255)
    return root


def test_the_layers_of_a_root(phantom: Path) -> None:
    found = collect_layers(ViewSources(str(phantom), dataset="phantom-iso", crops=("crop1",), classes=("mito", "er")))
    names = [layer.name for layer in found.layers]
    assert names == ["raw", "er truth crop1", "er known crop1", "mito truth crop1", "mito known crop1"]
    assert [layer.kind for layer in found.layers] == ["raw", "mask", "mask", "ids", "mask"]
    crop = Catalog.open(str(phantom)).crop("phantom-iso", "crop1")
    assert found.position == pytest.approx(crop.grid.box.center)
    state = state_of(found, "http://x")
    assert state["dimensions"]["x"] == [1e-9, "m"]
    assert state["position"] == pytest.approx(list(reversed(crop.grid.box.center)))


def test_made_volumes_are_the_labels(phantom: Path, tmp_path: Path) -> None:
    found = collect_layers(ViewSources(str(phantom), dataset="phantom-iso", crops=("crop1",), classes=("er",)))
    crop = Catalog.open(str(phantom)).crop("phantom-iso", "crop1")
    grid = crop.labels["er"].grid
    volume = read_labels(crop, ["er"], grid)
    with VolumeServer(found.roots, found.made) as server:
        for what, expected in (("present", volume.present_of("er")), ("known", volume.known_of("er"))):
            copy = tmp_path / what
            (copy / "s0").mkdir(parents=True)
            for name in (".zgroup", ".zattrs", "s0/.zarray"):
                (copy / name).write_bytes(get(server.url, f"made/crop1-er-{what}/{name}")[1])
            counts = [-(-n // 64) for n in grid.shape]
            for index in np.ndindex(*counts):
                place = copy / "s0" / "/".join(map(str, index))
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(get(server.url, f"made/crop1-er-{what}/s0/{'/'.join(map(str, index))}")[1])
            source = Multiscale.open(str(copy))
            assert source.levels[0].grid == grid
            assert np.array_equal(source.read_level(0, (0, 0, 0), grid.shape)[0], expected)
            beyond = "/".join(str(n) for n in counts)
            assert get(server.url, f"made/crop1-er-{what}/s0/{beyond}")[0] == 404


def test_only_what_is_below_the_roots_is_served(tmp_path: Path) -> None:
    (tmp_path / "shown").mkdir()
    (tmp_path / "shown/a b.txt").write_text("yes")
    (tmp_path / "secret.txt").write_text("no")
    (tmp_path / "shown/link").symlink_to(tmp_path / "secret.txt")
    with VolumeServer({"r": tmp_path / "shown"}, {}) as server:
        assert get(server.url, "files/r/a%20b.txt") == (200, b"yes")
        for path in (
            "files/r/../secret.txt", "files/r/%2e%2e/secret.txt", "files/r/..%2fsecret.txt", "files/r/link",
            "files/r//" + str(tmp_path / "secret.txt"), "files/r/%00", "files/other/a", "files/r/", "files/r",
            "made/x/.zgroup", "..%5c..%5csecret.txt", "",
        ):  # fmt: skip
            status, body = get(server.url, path)
            assert (status, body) == (404, b""), path
        stranger = server.url.rsplit("/", 1)[0] + "/guess"
        assert get(stranger, "files/r/a%20b.txt") == (403, b"")
        assert urlsplit(server.url).hostname == "127.0.0.1"
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(urllib.request.Request(f"{server.url}/files/r/a%20b.txt", method="POST", data=b"x"))


def test_parts_of_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"0123456789")
    with VolumeServer({"r": tmp_path}, {}) as server:
        request = urllib.request.Request(f"{server.url}/files/r/a", headers={"Range": "bytes=2-4"})
        with urllib.request.urlopen(request) as answer:
            assert (answer.status, answer.read(), answer.headers["Content-Range"]) == (206, b"234", "bytes 2-4/10")


def test_bad_input_is_one_line(phantom: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="nothing to look at"):
        collect_layers(ViewSources())
    with pytest.raises(InputError, match="name one with --dataset"):
        collect_layers(ViewSources(str(phantom)))
    with pytest.raises(UnknownNameError, match="did you mean 'phantom-iso'"):
        collect_layers(ViewSources(str(phantom), dataset="phantom-is"))
    with pytest.raises(UnknownNameError, match="unknown class"):
        collect_layers(ViewSources(str(phantom), dataset="phantom-iso", crops=("crop1",), classes=("mitoo",)))
    assert main(["view", str(tmp_path / "nowhere")]) == 1
    assert main(["view", "--labels", str(tmp_path / "nowhere")]) == 1
    assert len([line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]) == 2


def test_labels_are_not_shown_as_probabilities_nor_these_as_labels(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for artefact in ("labels", "probability"):
        about = {"artefact": artefact, "kind": "instance", "complete": True}
        place = tmp_path / artefact / "cube.zarr/crop1/mito"
        write_multiscale(place, np.ones((4, 4, 4), np.uint8), grid_of((4, 4, 4)), attrs={"connectomics": about})
    labels, predictions = tmp_path / "labels", tmp_path / "probability"
    found = collect_layers(ViewSources(None, predictions, labels))
    assert [layer.name for layer in found.layers] == ["mito probability crop1", "mito labels crop1"]
    for option, folder, other in (("--predictions", labels, "--labels"), ("--labels", predictions, "--predictions")):
        assert main(["view", option, str(folder)]) == 1
        (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
        assert f"give {folder} by {other}" in line


def test_a_port_that_is_taken_is_one_line(cube: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("neuroglancer", reason="the viewer needs pip install 'connectomics-cellmap[view]'")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["view", str(cube), "--port", str(port)]) == 1
    said = capfd.readouterr().err
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if line.startswith("error:")]
    assert f"port {port} of 127.0.0.1" in line
    assert "give another --port" in line


def test_layers_as_napari_slices_them(cube: Path) -> None:
    found = collect_layers(ViewSources(str(cube)))
    raw = levels_of(found.layers[0], found)
    assert [level.shape for level in raw] == [(64, 64, 64), (32, 32, 32)]
    assert raw[0][20, 30:34, 8:10].shape == (4, 2)
    assert int(raw[0][20, 30, 10]) == 220
    (truth,) = levels_of(found.layers[1], found)
    assert np.array_equal(truth[20], (raw[0][20] > 100))


def test_napari_finds_every_value_in_its_place(cube: Path) -> None:
    """In napari's own model of a viewer, which needs no screen."""
    components = pytest.importorskip("napari.components", reason="napari is not installed: pip install napari")
    viewer = components.ViewerModel()
    add_layers(viewer, collect_layers(ViewSources(str(cube))))
    layers = {layer.name: layer for layer in viewer.layers}
    assert list(layers) == ["raw", "mito truth crop1", "mito known crop1"]
    assert layers["raw"].multiscale
    assert not layers["mito known crop1"].visible
    layers["mito known crop1"].visible = True  # a layer that is off has no values
    grid = grid_of((64, 64, 64))
    for index, raw, object_id, known in (((20, 30, 20), 220, 1, 1), ((20, 30, 50), 40, 0, 1), ((20, 30, 62), 40, 0, 0)):
        place = grid.to_world(index)
        viewer.dims.set_point([0, 1, 2], place)
        values = [layer.get_value(place, world=True) for layer in layers.values()]
        level, value = values[0]
        assert level >= 0
        assert value == raw
        assert int(values[1] or 0) == object_id
        assert int(values[2]) == known


@contextlib.contextmanager
def browser(url: str, folder: Path) -> Iterator[None]:
    assert CHROMIUM is not None
    flags = ["--headless=new", "--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--mute-audio"]
    flags += [
        "--ignore-gpu-blocklist",
        "--window-size=1000,800",
        f"--user-data-dir={folder}",
        "--remote-debugging-port=0",
    ]
    running = subprocess.Popen([CHROMIUM, *flags, url], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        running.terminate()
        running.wait()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_shows_raw_and_labels_in_one_place(cube: Path, tmp_path: Path) -> None:
    from PIL import Image

    found = collect_layers(ViewSources(str(cube)))
    viewing = open_viewer(found)
    try:
        with browser(viewing.url, tmp_path / "profile"):
            with viewing.viewer.txn() as state:
                state.layout = "xy"
                state.show_axis_lines = False
                state.show_scale_bar = False
                state.cross_section_scale = 1.0
                state.selected_layer.visible = False
            pictures = {}
            for shown in ("raw", "mito truth crop1"):
                with viewing.viewer.txn() as state:
                    for layer in state.layers:
                        layer.visible = layer.name == shown
                reply = viewing.viewer.screenshot(size=[600, 600])
                image = np.asarray(Image.open(io.BytesIO(reply.screenshot.image)).convert("RGB")).astype(int)
                pictures[shown] = image
            names = [layer.name for layer in viewing.viewer.state.layers]
    finally:
        viewing.close()
    assert names == ["raw", "mito truth crop1", "mito known crop1", "crops"]
    boxes = []
    for picture in pictures.values():
        bright = np.abs(picture - picture[364, 236]).max(axis=2) < 8  # the middle of the box
        rows, columns = np.flatnonzero(bright.any(1)), np.flatnonzero(bright.any(0))
        boxes.append((rows[0], rows[-1] + 1, columns[0], columns[-1] + 1))
    # 1 nm a pixel; the box is 256 nm wide, from (y 192, x 64) nm of 512; the picture's middle is that of the crop
    expected = (300 - 256 + 192, 300 - 256 + 448, 300 - 256 + 64, 300 - 256 + 320)
    for box in boxes:
        assert np.abs(np.subtract(box, expected)).max() <= 2, (boxes, expected)


def test_the_state_can_be_written_and_read(cube: Path) -> None:
    state = state_of(collect_layers(ViewSources(str(cube))), "http://127.0.0.1:1/secret")
    assert json.loads(json.dumps(state)) == state
    grid = VoxelGrid((8.0,) * 3, (4.0,) * 3, (64,) * 3)
    assert state["position"] == list(grid.box.center)
