"""Levels of detail: the surface of each level, cut without a gap, and readable by neuroglancer's own decoder."""

from __future__ import annotations

import base64
import json
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from connectomics.cli import main
from connectomics.geometry import VoxelGrid
from connectomics.io.multiscale import Multiscale
from connectomics.io.write import write_multiscale
from connectomics.morphology.mesh_levels import BITS, CELLS, _varint, draco, surface_levels
from connectomics.morphology.mesh_surface import mesh_object, world_mesh
from connectomics.pages.view import ViewSources, VolumeServer, collect_layers, state_of

pytest.importorskip("zmesh", reason="meshes need pip install 'connectomics-cellmap[mesh]'")
GRID = VoxelGrid((6.0, 4.0, 4.0), (103.0, 52.0, 17.0), (90, 150, 110))


def two_objects() -> NDArray[np.uint16]:
    """A long ellipsoid of several fragments that the border cuts, and a small one."""
    z, y, x = np.ogrid[tuple(slice(n) for n in GRID.shape)]
    labels = np.zeros(GRID.shape, np.uint16)
    labels[((z - 40) / 38) ** 2 + ((y - 60) / 70) ** 2 + ((x - 52) / 45) ** 2 < 1] = 7
    labels[((z - 80) / 6) ** 2 + ((y - 140) / 6) ** 2 + ((x - 100) / 6) ** 2 < 1] = 9
    return labels


@pytest.fixture(scope="module")
def meshed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labels and their meshes, written by the command."""
    folder = tmp_path_factory.mktemp("meshed")
    about = {"artefact": "labels", "class_name": "mito", "kind": "instance", "complete": True}
    write_multiscale(folder / "l/d.zarr/crop1/mito", two_objects(), GRID, attrs={"connectomics": about})
    assert main(["mesh", str(folder / "l"), str(folder / "m"), "--class", "mito", "--format", "multilod"]) == 0
    return folder


class Stored:
    """An object as its files hold it, read by the specification of the format."""

    def __init__(self, folder: Path, label: int) -> None:
        index, data = (folder / f"{label}.index").read_bytes(), (folder / str(label)).read_bytes()
        values = np.frombuffer(index, "<f4")
        self.chunk, self.origin = values[:3].astype(float), values[3:6].astype(float)
        n = struct.unpack_from("<I", index, 24)[0]
        self.scales = np.frombuffer(index, "<f4", n, 28)
        self.offsets = np.frombuffer(index, "<f4", 3 * n, 28 + 4 * n).reshape(n, 3).astype(float)
        counts = np.frombuffer(index, "<u4", n, 28 + 16 * n)
        at, begin = 28 + 20 * n, 0
        self.fragments: list[list[tuple[NDArray[Any], bytes]]] = []
        for count in counts.tolist():
            rows = np.frombuffer(index, "<u4", 4 * count, at).reshape(4, count)
            at += 16 * count
            level = []
            for x, y, z, size in rows.T.tolist():
                level.append((np.array([x, y, z]), data[begin : begin + size]))
                begin += size
            self.fragments.append(level)
        assert (at, begin) == (len(index), len(data))

    def world(self, level: int, place: NDArray[Any], stored: NDArray[Any]) -> NDArray[np.float64]:
        """Vertices of a fragment, nm, x y z."""
        return self.origin + self.offsets[level] + self.chunk * 2**level * (place + stored / (2**BITS - 1))


def decoded(data: bytes) -> tuple[NDArray[Any], NDArray[Any]]:
    """Vertices and faces of a Draco mesh as this program writes it."""

    def varint(at: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            value |= (data[at] & 127) << shift
            shift, at = shift + 7, at + 1
            if data[at - 1] < 128:
                return value, at

    assert data[:11] == b"DRACO\x02\x02\x01\x00\x00\x00"
    n_faces, at = varint(11)
    n, at = varint(at)
    kind = "u1" if n < 256 else "<u2"
    faces = np.frombuffer(data, kind, 3 * n_faces, at + 1).reshape(-1, 3)
    at += 1 + faces.nbytes + 11
    raw = np.frombuffer(data, np.uint8, 9 * n, at).reshape(-1, 3).astype(np.uint32)
    return (raw @ np.array([1, 256, 65536], np.uint32) // 2).reshape(-1, 3), faces


def triangles(vertices: NDArray[Any], faces: NDArray[Any]) -> NDArray[np.float64]:
    """Corner positions, each triangle from its smallest corner on (the sense of rotation stays), sorted."""
    found = np.round(vertices[faces], 2)
    first = np.array([min(range(3), key=lambda i: tuple(t[i])) for t in found])
    turned = np.array([np.roll(t, -f, axis=0) for t, f in zip(found, first, strict=True)]).reshape(-1, 9)
    return turned[np.lexsort(turned.T)]


@pytest.mark.parametrize("label", [7, 9])
def test_each_level_is_the_surface_of_larger_voxels(meshed: Path, label: int) -> None:
    source = Multiscale.open(meshed / "l/d.zarr/crop1/mito")
    low, high = (f(np.argwhere(two_objects() == label), axis=0) for f in (np.min, np.max))
    levels = surface_levels(source, label, [*low, *high], max_vertices=10**7)
    stored = Stored(meshed / "m/d/crop1/mito", label)
    assert [len(f) > 1 for f in stored.fragments] == ([True, True, False] if label == 7 else [False])
    assert stored.scales.tolist() == [6.0 * level.stride for level in levels]
    for number, level in enumerate(levels):
        expected = world_mesh(GRID, level.corners, level.faces, level.stride)
        found = [np.zeros((0, 9))]
        for place, data in stored.fragments[number]:
            if data:
                vertices, faces = decoded(data)
                found.append(triangles(stored.world(number, place, vertices), faces))
        whole = np.concatenate(found)
        assert len(whole) == len(expected.faces)
        np.testing.assert_allclose(whole[np.lexsort(np.round(whole).T)], _sorted(expected), atol=0.02)
    finest = mesh_object(source, label, [*low, *high])
    assert len(levels[0].faces) == len(finest.faces)


def _sorted(mesh: Any) -> NDArray[np.float64]:
    found = triangles(mesh.vertices, mesh.faces)
    return found[np.lexsort(np.round(found).T)]


def test_every_fragment_lies_in_one_of_the_next_level_in_z_order(meshed: Path) -> None:
    stored = Stored(meshed / "m/d/crop1/mito", 7)
    for number, fragments in enumerate(stored.fragments):
        places = [tuple(int(n) for n in place) for place, _ in fragments]
        codes = [sum((n >> b & 1) << (3 * b + a) for b in range(8) for a, n in enumerate(p)) for p in places]
        assert codes == sorted(set(codes))
        if number + 1 < len(stored.fragments):
            above = {tuple(int(n) for n in place) for place, _ in stored.fragments[number + 1]}
            assert {(x // 2, y // 2, z // 2) for x, y, z in places} <= above
    assert [tuple(p) for p, _ in stored.fragments[-1]] == [(0, 0, 0)]


def test_the_folder_is_what_neuroglancer_opens(meshed: Path) -> None:
    info = json.loads((meshed / "m/d/crop1/mito/info").read_text())
    assert info["@type"] == "neuroglancer_multilod_draco"
    assert info["vertex_quantization_bits"] == BITS
    found = collect_layers(ViewSources(None, labels=meshed / "l", meshes=meshed / "m"))
    with VolumeServer(found.roots, found.made) as server:
        (layer,) = (one for one in state_of(found, server.url)["layers"] if one["name"] == "mito labels crop1")
        assert layer["source"][1]["url"] == f"precomputed://{server.url}/files/meshes/d/crop1/mito"


def test_simplification_and_levels_exclude_each_other(meshed: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["mesh", str(meshed / "l"), str(meshed / "x"), "--class", "mito", "--format", "multilod", "--simplify", "4"]
    assert main(words) == 1
    assert "leave simplify (--simplify) out" in capfd.readouterr().err


def test_neuroglancers_own_decoder_reads_every_fragment(meshed: Path) -> None:
    neuroglancer = pytest.importorskip(
        "neuroglancer", reason="its decoder needs pip install 'connectomics-cellmap[view]'"
    )
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node on this machine")
    decoder = next(
        (f for f in Path(neuroglancer.__file__).parent.rglob("*.wasm") if b"neuroglancer_draco" in f.read_bytes()), None
    )
    assert decoder is not None
    fragments = [
        (number, data)
        for label in (7, 9)
        for number, level in enumerate(Stored(meshed / "m/d/crop1/mito", label).fragments)
        for _, data in level
        if data
    ]
    rng = np.random.default_rng(0)  # and meshes with indices of every width
    for n in (3, 255, 256, 65535, 65536, 70000):
        corners = rng.integers(0, 2**BITS // 2, (n, 3)).astype(np.uint32)
        fragments.append((0, draco(corners, rng.integers(0, n, (n, 3)).astype(np.uint32))))
    requests = [{"data": base64.b64encode(data).decode(), "partition": number > 0} for number, data in fragments]
    script = Path(__file__).with_name("decode_draco.mjs")
    said = subprocess.run(
        [node, str(script), str(decoder)], input=json.dumps(requests), capture_output=True, text=True, check=True
    )
    for (number, data), mesh in zip(fragments, json.loads(said.stdout), strict=True):
        assert "code" not in mesh, mesh
        faces, vertices = (np.array(mesh[name]).reshape(-1, 3) for name in ("faces", "vertices"))
        if len(vertices) < 65536:
            expected, corners = decoded(data)
            assert np.array_equal(
                np.sort(vertices[faces].reshape(-1, 9), axis=0), np.sort(expected[corners].reshape(-1, 9), axis=0)
            )
        if number > 0:  # triangles by octant: none may reach into another
            half = 2 ** (BITS - 1)
            for octant, (begin, end) in enumerate(zip(mesh["offsets"], mesh["offsets"][1:], strict=False)):
                part = vertices[faces.ravel()[begin:end]]
                for axis in range(3):
                    upper = octant >> axis & 1
                    assert (part[:, axis] >= half).all() if upper else (part[:, axis] <= half).all()
    assert CELLS % 2 == 0


def test_numbers_of_any_length_are_stored_in_groups_of_seven_bits() -> None:
    def plain(number: int) -> list[int]:
        return [number] if number < 128 else [number & 127 | 128, *plain(number >> 7)]

    numbers = [n + d for n in (1, *(2 ** (7 * k) for k in range(1, 5)), 2**35 - 1) for d in (-1, 0)]
    assert list(_varint(*numbers)) == [byte for number in numbers for byte in plain(number)]
    assert [list(_varint(number)) for number in numbers] == [plain(number) for number in numbers]
