"""Measures of instances: closed forms of balls, boxes and planes, and block by block equal to the whole array."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from connectomics.cli import main
from connectomics.errors import IncompleteError, InputError, MetadataError, MissingError, UnknownNameError, WriteError
from connectomics.geometry import VoxelGrid
from connectomics.io.multiscale import Multiscale
from connectomics.io.write import write_multiscale
from connectomics.morphology import ContactSpec, measure_contacts, measure_instances
from connectomics.morphology.instances import direction_shares
from connectomics.pipeline.measure import measure_labels, measure_tasks

START = (804.0, -102.5, 404.0)
BLOCK = (5, 7, 6)


def stored(
    folder: Path,
    values: np.ndarray,
    size: tuple[float, float, float] = (1, 1, 1),
    name: str = "mito",
    crop: str = "crop1",
    **about: object,
) -> Multiscale:
    location = folder / "set-a.zarr" / crop / name
    attrs = {"artefact": "labels", "kind": "instance", "complete": True, **about}
    write_multiscale(location, values, VoxelGrid(size, START, values.shape), attrs={"connectomics": attrs})
    return Multiscale.open(str(location))


def ball(radius: float, size: tuple[float, float, float], off: tuple[float, float, float]) -> np.ndarray:
    """A ball whose centre lies ``off`` voxels from the middle."""
    axes = [
        (np.arange(n) - (n - 1) / 2 - o) * s for s, o in zip(size, off, strict=True) for n in [int(2 * radius / s) + 6]
    ]
    z, y, x = np.meshgrid(*axes, indexing="ij")
    return (z**2 + y**2 + x**2 <= radius**2).astype(np.uint8)


def noise(seed: int = 0, shape: tuple[int, int, int] = (17, 23, 19)) -> np.ndarray:
    """Instances that touch, with ids far from 1..n."""
    rng = np.random.default_rng(seed)
    cells = ndimage.zoom(rng.integers(0, 9, (5, 6, 5)), 4, order=0)[: shape[0], : shape[1], : shape[2]]
    return np.array([0, 3, 0, 7, 2**40, 5, 0, 2**63, 11], np.uint64)[cells]


# -- one instance ------------------------------------------------------------------------------------------------------
def test_cubic_voxels_have_the_published_weights() -> None:
    """Table 2 of Legland, Kieu and Devaux (2007)."""
    along, face, space = 0.04577789120476, 0.03698062787608, 0.03519563978232
    np.testing.assert_allclose(direction_shares((4, 4, 4)), [along, along, face, along, face, face, space], atol=1e-9)


@pytest.mark.parametrize(
    ("size", "radius"),
    [((1, 1, 1), 8), ((8, 8, 8), 100), ((2, 1, 1), 12), ((4, 1, 1), 20), ((1.31, 2, 2), 12), ((5.24, 4, 4), 60)],
)
def test_a_ball(tmp_path: Path, size: tuple[float, float, float], radius: float) -> None:
    off = (0.2, -0.4, 0.1)
    source = stored(tmp_path, ball(radius, size, off), size)
    found = measure_instances(source)
    assert found.volume[0] == pytest.approx(4 / 3 * np.pi * radius**3, rel=0.02)
    assert found.surface[0] == pytest.approx(4 * np.pi * radius**2, rel=0.02)
    assert found.sphericity[0] == pytest.approx(1, abs=0.02)
    center = source.grid.to_world((np.array(source.grid.shape) - 1) / 2 + off)
    np.testing.assert_allclose(found.centroid[0], center, atol=0.1 * max(size))
    assert not found.touches_border[0]


@pytest.mark.parametrize("size", [(1, 1, 1), (2, 1, 1), (4, 1, 1), (1.31, 2, 2), (11, 1, 1)])
@pytest.mark.parametrize(("radius", "error"), [(3, 0.04), (5, 0.02), (8, 0.012), (12, 0.008)])
def test_the_sphericity_of_a_ball_approaches_one(
    tmp_path: Path, size: tuple[float, float, float], radius: float, error: float
) -> None:
    """The radius is in the longest edges of a voxel. Counting faces would give 0.67 at any radius."""
    if radius * max(size) > 60:
        radius, error = 5, 0.02
    source = stored(tmp_path, ball(radius * max(size), size, (0.1, 0.3, -0.2)), size)
    assert measure_instances(source).sphericity[0] == pytest.approx(1, abs=error)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_long_ellipsoid(tmp_path: Path, axis: int) -> None:
    """Of revolution, with half axes a < c: 2 pi a^2 (1 + c / (a e) asin e) with e^2 = 1 - a^2 / c^2."""
    a, c, size = 24.0, 96.0, (5.24, 4.0, 4.0)
    half = np.full(3, a)
    half[axis] = c
    z, y, x = np.meshgrid(
        *[(np.arange(2 * int(h / s) + 7) - h / s - 3.3) * s / h for h, s in zip(half, size, strict=True)], indexing="ij"
    )
    found = measure_instances(stored(tmp_path, (z**2 + y**2 + x**2 <= 1).astype(np.uint8), size))
    e = np.sqrt(1 - (a / c) ** 2)
    surface = 2 * np.pi * a**2 * (1 + c / (a * e) * np.arcsin(e))
    volume = 4 / 3 * np.pi * a**2 * c
    assert found.volume[0] == pytest.approx(volume, rel=0.02)
    assert found.surface[0] == pytest.approx(surface, rel=0.03)
    assert found.sphericity[0] == pytest.approx(np.pi ** (1 / 3) * (6 * volume) ** (2 / 3) / surface, rel=0.03)


def test_a_box(tmp_path: Path) -> None:
    size = (3.0, 2.0, 1.5)
    values = np.zeros((20, 22, 24), np.uint16)
    values[4:14, 2:17, 1:21] = 900
    found = measure_instances(stored(tmp_path, values, size))
    assert found.ids.tolist() == [900]
    assert found.sizes.tolist() == [3000]
    assert found.volume.tolist() == [3000 * 9.0]
    np.testing.assert_allclose(found.box[0, :3], np.add(START, (np.array((4, 2, 1)) - 0.5) * size))
    np.testing.assert_allclose(found.box[0, 3:], np.add(START, (np.array((13, 16, 20)) + 0.5) * size))
    np.testing.assert_allclose(found.centroid[0], np.add(START, np.array((8.5, 9, 10.5)) * size))
    # of 10 x 15 x 20 voxels, those whose neighbour along a step lies outside, for both ends of each of its directions
    kinds = [(0, 0, 1), (0, 1, 0), (0, 1, 1), (1, 0, 0), (1, 0, 1), (1, 1, 0), (1, 1, 1)]
    assert found.steps[0].tolist() == [2 ** sum(k) * (3000 - (10 - k[0]) * (15 - k[1]) * (20 - k[2])) for k in kinds]


def test_a_cube_along_the_axes_is_the_worst_case(tmp_path: Path) -> None:
    values = np.zeros((40, 40, 40), np.uint8)
    values[5:35, 5:35, 5:35] = 1
    assert measure_instances(stored(tmp_path, values)).surface[0] == pytest.approx(6 * 30**2, rel=0.1)


def test_what_the_border_cuts_has_no_surface_there_and_no_sphericity(tmp_path: Path) -> None:
    whole = ball(10, (1, 1, 1), (0, 0, 0))
    half = measure_instances(stored(tmp_path, whole[: len(whole) // 2]))
    assert half.surface[0] == pytest.approx(2 * np.pi * 100, rel=0.03)
    assert half.touches_border[0]
    assert np.isnan(half.sphericity[0])
    full = measure_instances(stored(tmp_path, np.ones((4, 4, 4), np.uint8), name="cell"))
    assert full.surface[0] == 0


# -- blocks ------------------------------------------------------------------------------------------------------------
def test_block_by_block_equals_a_plain_reference(tmp_path: Path) -> None:
    values, size = noise(), (8.0, 4.0, 5.24)
    source = stored(tmp_path, values, size)
    found = measure_instances(source, block=BLOCK)
    ids = np.unique(values[values > 0])
    assert found.ids.tolist() == ids.tolist()
    last = np.array(values.shape) - 1
    for row, label in enumerate(ids):
        where = np.argwhere(values == label)
        assert found.sizes[row] == len(where)
        assert found.boxes[row].tolist() == [*where.min(axis=0), *where.max(axis=0)]
        np.testing.assert_allclose(found.centroid[row], START + where.mean(axis=0) * size)
        assert found.touches_border[row] == bool((where == 0).any() or (where == last).any())
    whole = measure_instances(source)
    assert np.array_equal(found.steps, whole.steps)
    assert np.array_equal(found.surface, whole.surface)


@pytest.mark.parametrize("nm", [0.0, 8.0, 13.0])
@pytest.mark.parametrize("same", [False, True])
def test_contacts_block_by_block_equal_a_plain_reference(tmp_path: Path, nm: float, same: bool) -> None:
    size, shape = (8.0, 4.0, 5.24), (12, 13, 11)
    a, b = noise(1)[:12, :13, :11], noise(2)[:12, :13, :11]
    of = stored(tmp_path, a, size)
    to = of if same else stored(tmp_path, b, size, "er")
    found = measure_contacts(of, to, nm, block=BLOCK)
    other = a if same else b
    expected: dict[int, set[int]] = {int(i): set() for i in np.unique(a[a > 0])}
    near = dict.fromkeys(expected, 0)
    padded = np.pad(a.astype(object), 1, constant_values=None)
    targets = np.argwhere(other > 0)
    for z, y, x in np.argwhere(a > 0):
        label = int(a[z, y, x])
        around = [v for v in padded[z : z + 3, y : y + 3, x : x + 3].ravel() if v is not None and v != label]
        gaps = np.maximum(np.abs(targets - (z, y, x)) - 1, 0) * size
        close = {int(v) for v in other[tuple(targets[np.linalg.norm(gaps, axis=1) <= nm + 1e-6].T)]}
        close -= {label} if same else set()
        if around and close:
            expected[label] |= close
            near[label] += len(around)
    assert a.shape == shape
    assert found.ids.tolist() == sorted(expected)
    assert [set(p) for p in found.partners] == [expected[i] for i in found.ids.tolist()]
    assert found.near.sum(axis=1).tolist() == [near[i] for i in found.ids.tolist()]
    whole = measure_contacts(of, to, nm)
    assert np.array_equal(found.near, whole.near)
    assert found.partners == whole.partners


# -- contacts ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_planes_are_in_contact_from_their_gap_on(tmp_path: Path, axis: int) -> None:
    size = (5.24, 4.0, 1.74)
    a, b = np.zeros((2, 20, 20, 20), np.uint8)
    np.moveaxis(a, axis, 0)[3:6] = 1
    np.moveaxis(b, axis, 0)[10:12] = 1  # four voxels between them
    gap = 4 * size[axis]
    of, to = stored(tmp_path, a, size), stored(tmp_path, b, size, "er")
    found = measure_contacts(of, to, gap, block=(7, 7, 7))
    assert found.partners == ((1,),)
    assert found.area[0] == pytest.approx(found.surface[0] / 2)  # one of its two sides
    assert measure_contacts(of, to, gap * 0.999, block=(7, 7, 7)).area[0] == 0
    assert measure_contacts(of, to, gap * 0.999, block=(7, 7, 7)).partners == ((),)


def test_balls_are_in_contact_from_their_gap_on_and_have_the_area_of_the_cap(tmp_path: Path) -> None:
    """The part of a ball within d of a plane at a gap g is a cap of height d - g, of 2 pi r (d - g); whole voxels
    count, so it is one voxel higher."""
    radius, nm = 15.0, 8.0
    a = np.pad(ball(radius, (1, 1, 1), (0, 0, 0)), ((0, 20), (0, 0), (0, 0)))
    b = np.zeros_like(a)
    top = int(np.argwhere(a)[:, 0].max())
    b[top + 4 :] = 5  # three voxels between them
    of, to = stored(tmp_path, a), stored(tmp_path, b, name="er")
    assert measure_contacts(of, to, 2.99).partners == ((),)
    assert measure_contacts(of, to, 3.0).partners == ((5,),)
    found = measure_contacts(of, to, nm)
    assert found.area[0] == pytest.approx(2 * np.pi * radius * (nm - 3 + 1), rel=0.05)


def test_the_other_class_may_have_another_voxel_size(tmp_path: Path) -> None:
    a = np.zeros((16, 16, 16), np.uint8)
    a[4:8] = 1
    of = stored(tmp_path, a, (2, 2, 2))
    b = np.zeros((8, 8, 8), np.uint8)
    b[6:] = 3  # from voxel 12 of the first grid on: a gap of 8 nm
    location = tmp_path / "coarse"
    write_multiscale(location, b, VoxelGrid((4, 4, 4), tuple(s + 1 for s in START), b.shape))
    to = Multiscale.open(str(location))
    assert measure_contacts(of, to, 8, block=(5, 5, 5)).partners == ((3,),)
    assert measure_contacts(of, to, 7.9, block=(5, 5, 5)).partners == ((),)


@pytest.mark.parametrize("text", ["mito", "mito:er:near", "mito:er:-1", "mito:er:nan", ":er:3", "a:b:3:4"])
def test_a_contact_that_is_none(text: str) -> None:
    with pytest.raises(InputError, match="CLASS:CLASS:NM"):
        ContactSpec.parse(text)


# -- folders -----------------------------------------------------------------------------------------------------------
@pytest.fixture
def labels(tmp_path: Path) -> Path:
    folder = tmp_path / "labels"
    stored(folder, noise(1), (8, 8, 8))
    stored(folder, noise(3), (8, 8, 8), crop="crop2")
    stored(folder, (noise(2) > 0).astype(np.uint8), (8, 8, 8), "er", kind="semantic")
    return folder


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_the_verb_writes_tables(labels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    words = ["measure", str(labels), "--contact", "mito:er:16", "--out", str(out)]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "mito:er:16" in text
    names = ["contacts_mito_er_16nm", "er", "mito"]
    ends = ("csv", "summary.json", "task.json")
    assert sorted(p.name for p in out.iterdir()) == [f"{name}.{end}" for name in names for end in ends]
    found = rows(out / "mito.csv")
    assert {row["crop"] for row in found} == {"crop1", "crop2"}
    assert found[0]["id"] == "3"
    assert float(found[0]["volume_nm3"]) == int(found[0]["voxels"]) * 512
    (er,) = rows(out / "er.csv")
    assert int(er["voxels"]) == int((noise(2) > 0).sum())
    contacts = rows(out / "contacts_mito_er_16nm.csv")
    assert {row["crop"] for row in contacts} == {"crop1"}  # where both are
    assert {row["partner_ids"] for row in contacts} <= {"", "1"}
    assert main([*words, "--json", "--class", "mito"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["classes"][0]["instances"] == len(found)
    assert summary["classes"][0]["volume_nm3"] == pytest.approx(sum(float(row["volume_nm3"]) for row in found))


def test_where_nothing_was_found_the_tables_are_empty(tmp_path: Path) -> None:
    nothing = np.zeros((9, 8, 7), np.uint8)
    stored(tmp_path, nothing)
    stored(tmp_path, nothing, name="er", kind="semantic")
    assert main(["measure", str(tmp_path), "--contact", "mito:er", "--out", str(tmp_path / "out")]) == 0
    assert rows(tmp_path / "out" / "mito.csv") == rows(tmp_path / "out" / "contacts_mito_er_30nm.csv") == []


def test_signed_labels_are_measured_unless_some_are_negative(tmp_path: Path) -> None:
    values = np.zeros((3, 4, 5), ">i4")
    values[1, 1, 1:3] = 2**30
    assert measure_instances(stored(tmp_path / "a", values)).ids.tolist() == [2**30]
    values[0, 0, 0] = -5
    with pytest.raises(InputError, match="the labels hold -5, expected IDs from 0 on"):
        measure_instances(stored(tmp_path / "b", values))


def test_bad_input_is_named(labels: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(MissingError, match="run decode first"):
        measure_labels(measure_tasks(tmp_path / "nowhere", out))
    with pytest.raises(UnknownNameError, match="did you mean 'mito'"):
        measure_labels(measure_tasks(labels, out, classes=["mitos"]))
    with pytest.raises(UnknownNameError, match="did you mean 'crop1'"):
        measure_labels(measure_tasks(labels, out, crops=["crop11"]))
    with pytest.raises(UnknownNameError, match="unknown class 'nuc'"):
        measure_labels(measure_tasks(labels, out, contacts=[ContactSpec("mito", "nuc")]))
    stored(labels, noise(2), (8, 8, 8), "nuc", crop="crop3")
    with pytest.raises(MissingError, match="holds both"):
        measure_labels(measure_tasks(labels, out, contacts=[ContactSpec("mito", "nuc")]))
    with pytest.raises(InputError, match="too far"):
        measure_labels(measure_tasks(labels, out, classes=["er"], contacts=[ContactSpec("mito", "er", 5000)]))
    stored(labels, noise(2), (8, 8, 8), "ld", complete=False)
    with pytest.raises(IncompleteError, match="half written"):
        measure_labels(measure_tasks(labels, out, classes=["ld"]))
    stored(labels, noise(2), (8, 8, 8), "np", artefact="probability")
    with pytest.raises(MetadataError, match="expected labels written by decode, got probability"):
        measure_labels(measure_tasks(labels, out, classes=["np"]))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(WriteError, match="cannot write"):
        measure_labels(measure_tasks(labels, tmp_path / "file", classes=["mito"]))
    assert not list(out.glob(".*"))
