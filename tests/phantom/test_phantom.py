"""The phantom: a function of world position, written as CellMap writes its data."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import zarr

from connectomics.cellmap.catalog import Catalog
from connectomics.cellmap.classes import CLASSES, INSTANCE_CLASSES
from connectomics.cellmap.crop_table import CropTable
from connectomics.cellmap.labels import read_labels
from connectomics.errors import ConnectomicsError, InputError, UnknownNameError, WriteError
from connectomics.geometry import Box, VoxelGrid
from connectomics.io.multiscale import Multiscale, PlainArray
from connectomics.phantom import PhantomInfo, PhantomOptions, make_phantom
from connectomics.phantom.kinds import KINDS
from connectomics.phantom.layout import datasets
from connectomics.phantom.scene import Scene, class_mask
from connectomics.testing.arrays import check_reader
from connectomics.testing.closed_form import (
    default_spheres,
    sphere_label,
    sphere_raw,
    write_registration_root,
)


@pytest.fixture(scope="module")
def info(tmp_path_factory: pytest.TempPathFactory) -> PhantomInfo:
    return make_phantom(tmp_path_factory.mktemp("phantom") / "root", PhantomOptions(preset="tiny"))


@pytest.fixture(scope="module")
def scene() -> Scene:
    return Scene.build(3, Box((100.0, -50.0, 20.5), (740.0, 590.0, 660.5)))


def _groundtruth(info: PhantomInfo, dataset: str) -> Path:
    return info.root / dataset / f"{dataset}.zarr" / "recon-1" / "labels" / "groundtruth"


def _digest(root: Path) -> dict[str, str]:
    files = (p for p in sorted(root.rglob("*")) if p.is_file())
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


# -- the scene -------------------------------------------------------------------------------------------------------
def test_what_is_at_a_point_does_not_depend_on_the_grid(scene: Scene) -> None:
    fine = VoxelGrid((4.0, 4.0, 4.0), (270.0, 180.0, 90.5), (66, 72, 70))
    part = scene.render(fine)
    other = VoxelGrid((8.0, 12.0, 4.0), (278.0, 192.0, 90.5 + 5 * 4.0), (30, 20, 40))
    coarse = scene.render(other)
    z, y, x = (slice(2, 62, 2), slice(3, 63, 3), slice(5, 45))
    assert np.array_equal(part.atoms[z, y, x], coarse.atoms)
    assert np.array_equal(part.owner[z, y, x], coarse.owner)
    assert np.array_equal(part.raw[z, y, x], coarse.raw)  # also the noise, which belongs to the raw's lattice
    single = scene.render(fine.crop((40, 33, 21), (1, 1, 1)))
    assert single.atoms[0, 0, 0] == part.atoms[40, 33, 21]
    assert single.raw[0, 0, 0] == part.raw[40, 33, 21]


ATOMS = {*(n for k in KINDS for n in (k.shell, k.inside))}
ATOMS |= {"ecs", "mito_ribo", "ne_mem", "ne_lum", "hchrom", "echrom", "nucpl"}


def test_every_voxel_has_one_atom_and_groups_are_unions(scene: Scene) -> None:
    grid = VoxelGrid.covering(scene.box, (16.0, 16.0, 16.0))
    atoms = scene.atoms(grid)
    known = {CLASSES[n].id for n in ATOMS}
    assert set(np.unique(atoms)) <= known
    assert len(np.unique(atoms)) > 20
    assert sum(class_mask(atoms, n).sum() for n in ATOMS) == atoms.size
    for name in ("mito", "nuc", "er", "ne", "ld", "cell"):
        union = np.isin(atoms, [CLASSES[a].id for a in CLASSES[name].atoms])
        assert np.array_equal(class_mask(atoms, name), union)
        assert union.any()
    assert np.array_equal(class_mask(atoms, "cell"), ~class_mask(atoms, "ecs"))


def test_objects_keep_their_id_and_do_not_touch(scene: Scene) -> None:
    grid = VoxelGrid.covering(scene.box, (8.0, 8.0, 8.0))
    part = scene.render(grid, raw=False)
    half = scene.instances_of(scene.render(grid.crop((20, 0, 10), (30, 80, 40)), raw=False), "mito")
    for name in ("mito", "ld", "np", "cell"):
        ids = scene.instances_of(part, name)
        assert np.array_equal(ids > 0, class_mask(part.atoms, name))
        for axis in range(3):  # neighbours of different objects never meet
            a, b = np.moveaxis(ids, axis, 0)[:-1], np.moveaxis(ids, axis, 0)[1:]
            assert not np.any((a > 0) & (b > 0) & (a != b))
    mito = scene.instances_of(part, "mito")
    assert np.array_equal(mito[20:50, :, 10:50], half)
    assert len(np.unique(mito)) - 1 >= 4
    with pytest.raises(InputError, match="no instances"):
        scene.instances_of(part, "er")


def test_membranes_are_dark_and_textures_overlap(scene: Scene) -> None:
    grid = VoxelGrid.covering(scene.box, (4.0, 4.0, 4.0)).crop((20, 0, 0), (60, 160, 160))
    part = scene.render(grid)
    mean = {n: part.raw[class_mask(part.atoms, n)].mean() for n in ("mito", "nuc", "cyto", "ecs", "ne_mem", "pm")}
    assert mean["pm"] < mean["mito"] < mean["cyto"] < mean["ecs"]
    assert mean["ne_mem"] < mean["nuc"]
    assert (part.raw < 30).mean() < 0.01  # not clipped to black
    inside = part.raw[class_mask(part.atoms, "mito_lum")].astype(float)
    around = part.raw[class_mask(part.atoms, "cyto")].astype(float)
    assert np.percentile(inside, 90) > np.percentile(around, 10)  # a threshold cannot tell them apart
    assert np.abs(np.diff(part.raw.mean((1, 2)))).max() > 0  # brightness drifts along z


def test_empty_grid_and_small_box() -> None:
    with pytest.raises(InputError, match="at least 200 nm"):
        Scene.build(0, Box((0, 0, 0), (100, 400, 400)))
    empty = Scene.build(0, Box((0, 0, 0), (330, 330, 330)))
    assert empty.atoms(VoxelGrid((4, 4, 4), (0, 0, 0), (0, 5, 5))).shape == (0, 5, 5)


# -- the data root ---------------------------------------------------------------------------------------------------
def test_same_seed_same_bytes(tmp_path: Path) -> None:
    small = PhantomOptions(seed=5, size_nm=330, crops=2, crop_nm=100, classes=("mito", "mito_mem", "nuc", "er", "ecs"))
    first = make_phantom(tmp_path / "a", small)
    second = make_phantom(tmp_path / "b", small)
    assert _digest(first.root) == _digest(second.root)
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b"}  # nothing temporary is left
    worlds = [plan.seed for k in range(3) for plan in datasets(PhantomOptions(seed=k))]
    assert len(set(worlds)) == 6  # and every seed and data set has a world of its own


def test_raw_pyramids(info: PhantomInfo) -> None:
    for dataset in info.datasets:
        where = info.root / dataset / f"{dataset}.zarr" / "recon-1" / "em" / "fibsem-uint8"
        levels = Multiscale.open(where).levels
        assert [level.path for level in levels] == ["s0", "s1", "s2", "s3"]
        finest = info.raw[dataset]
        for k, level in enumerate(levels):
            assert level.dtype == np.uint8
            assert level.grid.voxel_size == pytest.approx([v * 2**k for v in finest.voxel_size])
            expected = [t + (2**k - 1) / 2 * v for t, v in zip(finest.translation, finest.voxel_size, strict=True)]
            assert level.grid.translation == pytest.approx(expected)
            assert level.grid.box.begin == pytest.approx(finest.box.begin)
        s0, s1 = (zarr.open_array(str(where / f"s{k}"), mode="r")[:48, :48, :48].astype(float) for k in (0, 1))
        assert np.allclose(s0.reshape(24, 2, 24, 2, 24, 2).mean((1, 3, 5)), s1[:24, :24, :24], atol=0.51)
    assert info.raw["phantom-iso"].voxel_size == (4.0, 4.0, 4.0)
    assert info.raw["phantom-aniso"].voxel_size == (5.24, 4.0, 4.0)
    assert any(t % 1 for t in info.raw["phantom-aniso"].translation)


def test_raw_is_the_scene(info: PhantomInfo) -> None:
    for plan in datasets(PhantomOptions(preset="tiny")):
        where = info.root / plan.name / f"{plan.name}.zarr" / "recon-1" / "em" / "fibsem-uint8" / "s0"
        stored = zarr.open_array(str(where), mode="r")
        check_reader(Multiscale.open(where.parent), stored[...])
        block = plan.raw.crop((60, 70, 31), (20, 33, 40))
        assert np.array_equal(stored[60:80, 70:103, 31:71], plan.scene().render(block).raw)


def test_label_voxels_start_at_raw_faces(info: PhantomInfo) -> None:
    sizes = set()
    for crop in info.crops:
        raw = info.raw[crop.dataset]
        face = (np.asarray(crop.grid.box.begin) - raw.box.begin) / raw.voxel_size
        assert np.allclose(face, np.round(face), atol=1e-5)
        assert raw.box.contains(crop.grid.box, 1e-6)
        sizes.add(crop.grid.voxel_size)
    assert {(2.0, 2.0, 2.0), (4.0, 4.0, 4.0), (8.0, 8.0, 8.0), (16.0, 16.0, 16.0), (2.62, 2.0, 2.0)} <= sizes
    smallest = [min(e / 8 for e in c.grid.box.extent) for c in info.crops]
    assert min(smallest) < 128  # voxels of 8 nm: a patch is larger than its crop
    extents = [c.grid.box.extent for c in info.crops]
    assert any(max(e) > 3 * min(e) for e in extents)


def test_annotation_says_what_is_stored(info: PhantomInfo) -> None:
    seen_unknown = seen_object_255 = seen_empty = 0
    class_sets = set()
    for crop in (c for c in info.crops if not c.test):
        where = _groundtruth(info, crop.dataset) / crop.name
        names = sorted(p.name for p in where.iterdir() if p.is_dir())
        assert names == sorted(crop.voxels)
        class_sets.add(tuple(names))
        for name in names:
            group = json.loads((where / name / ".zattrs").read_text())
            kind = group["cellmap"]["annotation"]["annotation_type"]
            assert group["cellmap"]["annotation"]["class_name"] == name
            assert kind["type"] == ("instance" if name in INSTANCE_CLASSES else "semantic") + "_segmentation"
            levels = [d["path"] for d in group["multiscales"][0]["datasets"]]
            for level in levels:
                array = zarr.open_array(str(where / name / level), mode="r")
                values = np.asarray(array[...])
                counts = array.attrs["cellmap"]["annotation"]["complement_counts"]
                encoding = array.attrs["cellmap"]["annotation"]["annotation_type"]["encoding"]
                assert encoding == kind["encoding"]
                assert counts["absent"] == np.count_nonzero(values == encoding["absent"])
                if counts.get("unknown"):
                    assert counts["unknown"] == np.count_nonzero(values == encoding["unknown"])
                if name not in INSTANCE_CLASSES:
                    assert set(np.unique(values)) <= set(encoding.values())
                if level == "s0":
                    unknown = counts.get("unknown", 0)
                    assert crop.unknown.get(name, 0) == unknown
                    assert crop.voxels[name] == values.size - counts["absent"] - unknown
                    seen_unknown += unknown > 0
                    seen_empty += counts["absent"] == values.size
                    if encoding.get("unknown") == 255 and counts["unknown"] == 0 and name in INSTANCE_CLASSES:
                        seen_object_255 += bool((values == 255).any())
    assert seen_unknown
    assert seen_object_255
    assert seen_empty
    assert len(class_sets) > 3  # classes are missing in some crops


def test_labels_agree_with_each_other_and_with_the_scene(info: PhantomInfo) -> None:
    plan = datasets(PhantomOptions(preset="tiny"))[0]
    crop = next(c for c in info.crops if c.dataset == plan.name and c.name == "crop3")
    where = _groundtruth(info, plan.name) / crop.name
    values = {n: np.asarray(zarr.open_array(str(where / n / "s0"), mode="r")[...]) for n in crop.voxels if n != "ecs"}
    atoms = plan.scene().atoms(crop.grid)
    exclusive = sum(values[n].astype(int) for n in values if not CLASSES[n].is_group)
    assert exclusive.max() == 1
    for name, stored in values.items():
        assert np.array_equal(stored > 0, class_mask(atoms, name)), name
        if name in INSTANCE_CLASSES:
            assert set(np.unique(stored)) - {0} == set(range(1, crop.objects[name] + 1))


def test_the_catalog_reads_back_what_the_scene_says(info: PhantomInfo) -> None:
    scenes = {plan.name: plan.scene() for plan in datasets(PhantomOptions(preset="tiny"))}
    catalog = Catalog.open(str(info.root))
    assert sorted(catalog.datasets) == sorted(info.datasets)
    for crop in catalog.crops():
        written = next(c for c in info.crops if (c.dataset, c.name) == (crop.dataset, crop.name))
        assert not written.test
        volume = read_labels(crop, tuple(crop.labels), crop.grid)
        atoms = scenes[crop.dataset].atoms(crop.grid)
        for name in crop.labels:
            known, present, truth = volume.known_of(name), volume.present_of(name), class_mask(atoms, name)
            assert np.array_equal(present[known], truth[known]), (crop.name, name)
            if name not in written.unknown:
                assert known.all()
    partial = next(c for c in info.crops if c.unknown)
    crop = catalog.crop(partial.dataset, partial.name)
    assert not read_labels(crop, ("er",), crop.grid).known_of("er").all()


def test_test_crops_are_apart_and_in_the_table(info: PhantomInfo) -> None:
    table = CropTable.load(info.crop_table)
    assert {e.dataset for e in table} == set(info.datasets)
    for number, entries in table.crops().items():
        dataset = entries[0].dataset
        assert not (_groundtruth(info, dataset) / f"crop{number}").exists()
        for other in (c for c in info.crops if c.dataset == dataset and c.name != f"crop{number}"):
            assert other.grid.box.intersect(entries[0].grid.box).grow(-1e-3).is_empty
        assert len({e.grid.voxel_size for e in entries}) >= 3
        crop = next(c for c in info.crops if c.name == f"crop{number}" and c.test)
        for entry in entries:
            array = PlainArray.open(info.truth / f"crop{number}" / entry.class_name)
            assert array.grid == entry.grid
            values = array.read((0, 0, 0), entry.grid.shape)
            values = values[0] if isinstance(values, tuple) else values
            assert np.count_nonzero(values) == crop.voxels[entry.class_name]
            if entry.class_name in INSTANCE_CLASSES:
                assert set(np.unique(values)) - {0} == set(range(1, crop.objects[entry.class_name] + 1))
            else:
                assert values.max() <= 1
    assert all(c.objects["mito"] >= 1 and c.objects["nuc"] == 1 for c in info.crops if c.test)


def test_training_crops_do_not_overlap_and_each_data_set_has_mitochondria(info: PhantomInfo) -> None:
    mito = next(k.name for k in KINDS if k.instances == "mito")
    for dataset in info.datasets:
        boxes = [c.grid.box.grow(-1e-3) for c in info.crops if c.dataset == dataset]
        for i, a in enumerate(boxes):
            assert all(a.intersect(b).is_empty for b in boxes[i + 1 :])
        assert info.objects[dataset][mito] >= 6


def test_bad_options_and_places(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    with pytest.raises(WriteError, match="not empty"):
        make_phantom(tmp_path / "full", PhantomOptions(preset="tiny"))
    with pytest.raises(WriteError, match="not written by phantom"):
        make_phantom(tmp_path / "full", PhantomOptions(preset="tiny", overwrite=True))
    with pytest.raises(WriteError, match="it is a file"):
        make_phantom(tmp_path / "full" / "mine.txt", PhantomOptions(preset="tiny"))
    with pytest.raises(UnknownNameError, match="small"):
        PhantomOptions(preset="smal")
    with pytest.raises(UnknownNameError, match="mito"):
        PhantomOptions(classes=("mitoo",))
    with pytest.raises(InputError, match="size_nm"):
        PhantomOptions(size_nm=100)
    with pytest.raises(InputError, match="crop_nm"):
        PhantomOptions(crop_nm=2000)
    with pytest.raises(InputError, match="at least one"):
        PhantomOptions(crops=0)
    with pytest.raises(ConnectomicsError, match="no room"):
        make_phantom(tmp_path / "crowded", PhantomOptions(size_nm=400, crops=200, crop_nm=190, classes=("mito",)))
    assert (tmp_path / "full" / "mine.txt").read_text() == "keep"
    assert [p.name for p in tmp_path.iterdir()] == ["full"]


def test_overwrite_replaces_a_phantom(tmp_path: Path) -> None:
    small = PhantomOptions(size_nm=320, crops=1, crop_nm=90, classes=("mito", "ecs"))
    make_phantom(tmp_path / "p", small)
    with pytest.raises(WriteError, match="not empty"):
        make_phantom(tmp_path / "p", small)
    lines: list[str] = []
    again = make_phantom(tmp_path / "p", PhantomOptions(**{**vars(small), "overwrite": True, "seed": 1}), lines.append)
    assert json.loads((again.root / "phantom.json").read_text())["options"]["seed"] == 1
    assert any("phantom-aniso" in line for line in lines)


# -- closed forms ----------------------------------------------------------------------------------------------------
def test_sphere_raw_is_half_way_where_the_label_ends() -> None:
    grid = VoxelGrid((1.0, 1.0, 1.0), (-40.0, -40.0, -40.0), (81, 81, 81))
    raw = sphere_raw(grid, (0.25, -0.5, 0.0), 20.0, 12.0)
    label = sphere_label(grid, (0.25, -0.5, 0.0), 20.0)
    assert np.array_equal(raw > 130.0, label > 0)
    assert label.sum() == pytest.approx(4 / 3 * np.pi * 20**3, rel=0.01)


def test_registration_root(tmp_path: Path) -> None:
    made = write_registration_root(
        tmp_path, (5.24, 4, 4), (97.3, 51.0, -30.5), (2.62, 2, 2), (195.11, 150.0, 71.5), label_shape=(48, 56, 60)
    )
    recon = tmp_path / "registration" / "registration.zarr" / "recon-1"
    assert Multiscale.open(recon / "em" / "fibsem-uint8").levels[0].grid == made.raw
    label = Multiscale.open(recon / "labels" / "groundtruth" / "crop1" / "cyto")
    assert label.levels[0].grid == made.label
    assert made.raw.box.contains(made.label.box)
    assert made.spheres == default_spheres(made.label.box)
    instance = write_registration_root(
        tmp_path / "ids", (4, 4, 4), (0, 0, 0), (4, 4, 4), (100, 100, 100), label_shape=(40, 40, 40), class_name="mito"
    )
    where = tmp_path / "ids" / "registration" / "registration.zarr" / "recon-1" / "labels" / "groundtruth" / "crop1"
    assert zarr.open_array(str(where / "mito" / "s0"), mode="r")[...].max() == len(instance.spheres)
