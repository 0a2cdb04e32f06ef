"""Three-state labels: nothing unknown may become absent, and nothing known may be lost."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from connectomics.cellmap.annotation import Annotation
from connectomics.cellmap.catalog import Catalog, Crop
from connectomics.cellmap.classes import ATOMIC_CLASSES, CLASSES
from connectomics.cellmap.labels import read_instances, read_labels
from connectomics.cellmap.summary import label_counts
from connectomics.data.foreground import foreground_points
from connectomics.errors import InputError, MetadataError, UnknownNameError
from connectomics.geometry import VoxelGrid
from connectomics.pipeline.hold_out import hold_out
from tests.cellmap.plain_labels import counts, dense
from tests.cellmap.roots import grid_of, write_label, write_raw

NAMES = ("mito_mem", "mito_lum", "mito_ribo", "mito", "er_mem", "er_lum", "er", "np_out", "np", "cyto")
UNKNOWN = 255


def possible_states(volumes: dict[str, np.ndarray], name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Voxel by voxel, straight from the rules: 1 present, 0 absent, -1 unknown.

    Own array first; then: present in an atom -> other atoms absent; a group is present where an atom is, absent where
    all atoms are; an atom is absent where a group that holds it is.
    """

    def own(n: str) -> np.ndarray:
        if n not in volumes:
            return np.full(shape, -1)
        v = volumes[n].astype(int)
        return np.where(v == UNKNOWN, -1, v)

    atoms = {a for n in {*volumes, name} for a in (CLASSES[n].atoms or (n,))}
    groups = [n for n in {*volumes, name} if CLASSES[n].is_group]
    state = {n: own(n) for n in {*atoms, *groups}}
    for atom in atoms & ATOMIC_CLASSES:
        for other in atoms & ATOMIC_CLASSES - {atom}:
            hit = (state[atom] == -1) & (own(other) == 1)
            state[atom][hit] = 0
    for _ in range(3):
        for group in groups:
            parts = np.stack([state[a] for a in CLASSES[group].atoms])
            free = state[group] == -1
            state[group][free & (parts == 1).any(0)] = 1
            state[group][free & ~(parts == 1).any(0) & (parts == 0).all(0)] = 0
        for group in groups:
            for atom in CLASSES[group].atoms:
                state[atom][(state[atom] == -1) & (state[group] == 0)] = 0
    return state[name]


@st.composite
def annotations(draw: st.DrawFn) -> dict[str, np.ndarray]:
    names = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=5, unique=True))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    # at most one atom is present in a voxel: atoms exclude each other
    atoms = [n for n in names if n in ATOMIC_CLASSES]
    owner = rng.integers(-1, len(atoms), (4, 4, 4)) if atoms else np.full((4, 4, 4), -1)
    volumes = {}
    for name in names:
        if name in ATOMIC_CLASSES:
            values = (owner == atoms.index(name)).astype(np.uint8)
        else:
            inside = [atoms.index(a) for a in CLASSES[name].atoms if a in atoms]
            extra = rng.random((4, 4, 4)) < 0.2  # parts that no array of its own names
            values = (np.isin(owner, inside) | (extra & (owner == -1))).astype(np.uint8)
        values[rng.random((4, 4, 4)) < draw(st.sampled_from([0.0, 0.3, 0.9]))] = UNKNOWN
        volumes[name] = values
    return volumes


def open_crop(folder: Path, volumes: dict[str, np.ndarray], levels: int = 1) -> Crop:
    write_raw(folder, "set-a", np.zeros((4, 4, 4), np.uint8), grid_of((4, 4, 4)))
    for name, values in volumes.items():
        write_label(folder, "set-a", "crop1", name, values, grid_of((4, 4, 4)), unknown=UNKNOWN, levels=levels)
    return Catalog.open(str(folder)).crop("set-a", "crop1")


@settings(max_examples=40, deadline=None)
@given(annotations(), st.sampled_from(NAMES))
def test_states_on_the_own_grid_are_what_the_rules_say(volumes: dict[str, np.ndarray], name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        crop = open_crop(Path(folder), volumes)
        labels = read_labels(crop, [name], grid_of((4, 4, 4)))
        expected = possible_states(volumes, name, (4, 4, 4))
        np.testing.assert_array_equal(labels.present_of(name), expected == 1)
        np.testing.assert_array_equal(labels.known_of(name), expected != -1)


@settings(max_examples=20, deadline=None)
@given(annotations(), st.sampled_from(NAMES), st.floats(-8, 8), st.sampled_from([5.24, 8.0, 13.0, 16.0]))
def test_known_is_half_known_and_present_is_the_vote_on_any_grid(
    volumes: dict[str, np.ndarray], name: str, shift: float, voxel: float
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        crop = open_crop(Path(folder), volumes)
        target = VoxelGrid((voxel,) * 3, (shift,) * 3, (4, 4, 4))
        labels = read_labels(crop, [name], target)
        state = possible_states(volumes, name, (4, 4, 4))
        source = grid_of((4, 4, 4))
        for index in np.ndindex(4, 4, 4):
            cell = target.crop(index, (1, 1, 1)).box
            shares = dict.fromkeys((-1, 0, 1), 0.0)  # of the voxel's volume: unknown, absent, present
            for other in np.ndindex(4, 4, 4):
                part = cell.intersect(source.crop(other, (1, 1, 1)).box)
                if not part.is_empty:
                    shares[int(state[other])] += float(np.prod(part.extent) / np.prod(cell.extent))
            is_known, is_present = labels.known_of(name)[index], labels.present_of(name)[index]
            assert is_known or not is_present
            assert not is_known or shares[0] + shares[1] >= 0.5 - 1e-3, "known although most of it is unknown"
            if set(volumes) == {name} and abs(shares[0] + shares[1] - 0.5) > 1e-3:
                assert is_known == (shares[0] + shares[1] > 0.5)
            if set(volumes) == {name} and is_known and abs(shares[1] - shares[0]) > 1e-3:
                assert is_present == (shares[1] > shares[0])


def test_sparse_sections_keep_positives_and_negatives_alike(tmp_path: Path) -> None:
    """Every second section is annotated, half of each is mito: at twice the voxel size both halves are known."""
    values = np.full((8, 8, 8), 255, np.uint8)
    values[::2] = 0
    values[::2, :, :4] = 1
    write_raw(tmp_path, "set-a", np.zeros((8, 8, 8), np.uint8), grid_of((8, 8, 8)))
    write_label(tmp_path, "set-a", "crop1", "mito", values, grid_of((8, 8, 8)), unknown=255)
    labels = read_labels(Catalog.open(str(tmp_path)).crop("set-a", "crop1"), ["mito"], grid_of((4, 4, 4), voxel=16.0))
    assert counts(labels, "mito") == {"present": 32, "absent": 32, "unknown": 0}
    labels = read_labels(Catalog.open(str(tmp_path)).crop("set-a", "crop1"), ["mito"], grid_of((2, 2, 2), voxel=32.0))
    assert counts(labels, "mito") == {"present": 4, "absent": 4, "unknown": 0}


def test_a_class_without_an_array_is_unknown_not_absent(tmp_path: Path) -> None:
    crop = open_crop(tmp_path, {"er_mem": np.zeros((4, 4, 4), np.uint8)})
    labels = read_labels(crop, ["mito", "ld"], grid_of((4, 4, 4)))
    assert not labels.known_of("mito").any()
    assert not labels.known_of("ld").any()


def test_a_chunk_that_is_not_stored_is_the_fill_value_everywhere(tmp_path: Path) -> None:
    """Writers leave out chunks of fill value; where that means unknown, no reader may call it absent."""
    values = np.full((8, 8, 8), 255, np.uint8)
    values[:, :, :4] = 1
    write_raw(tmp_path, "set-a", np.zeros((8, 8, 8), np.uint8), grid_of((8, 8, 8)))
    location = write_label(tmp_path, "set-a", "crop1", "mito", values, grid_of((8, 8, 8)), unknown=255)
    meta = json.loads((location / "s0/.zarray").read_text())
    (location / "s0/.zarray").write_text(json.dumps({**meta, "fill_value": 255}))
    (location / "s0/0/0/0").unlink()
    crop = Catalog.open(str(tmp_path)).crop("set-a", "crop1")
    assert not read_labels(crop, ["mito"], grid_of((8, 8, 8))).known_of("mito").any()
    assert label_counts(crop.labels["mito"]) == {"present": 0, "absent": 0, "unknown": 512}
    assert len(foreground_points(crop, "mito", 0)) == 0
    with pytest.raises(InputError, match="nothing is known of mito"):
        hold_out(tmp_path / "set-a", tmp_path / "cut", ["mito"])


def test_an_array_without_voxels_does_not_move_its_crop(tmp_path: Path) -> None:
    write_raw(tmp_path, "set-a", np.zeros((8, 8, 8), np.uint8), grid_of((8, 8, 8)))
    far = grid_of((8, 8, 8), start=8000.0)
    write_label(tmp_path, "set-a", "crop1", "mito", np.ones((8, 8, 8), np.uint8), far)
    write_label(tmp_path, "set-a", "crop1", "ld", np.ones((0, 8, 8), np.uint8), grid_of((0, 8, 8), voxel=1.0))
    crop = Catalog.open(str(tmp_path)).crop("set-a", "crop1")
    assert crop.box == far.box
    assert crop.grid == far
    labels = read_labels(crop, ["mito", "ld"], far)
    assert labels.present_of("mito").all()
    assert not labels.known_of("ld").any()


def test_zero_is_absent_only_where_the_encoding_says_so() -> None:
    def annotation(**encoding: int) -> Annotation:
        kind = {"type": "semantic_segmentation", "encoding": encoding}
        return Annotation.from_attrs({"cellmap": {"annotation": {"annotation_type": kind}}}, {}, "here")

    with pytest.raises(MetadataError, match="names no value for absent"):
        annotation(present=1, unknown=255)
    present, known = annotation(present=1, unknown=0).decode(np.array([0, 1], np.uint8))
    assert known.tolist() == present.tolist() == [False, True]


def test_unknown_beyond_the_crop(tmp_path: Path) -> None:
    crop = open_crop(tmp_path, {"mito": np.ones((4, 4, 4), np.uint8)})
    labels = read_labels(crop, ["mito"], grid_of((4, 4, 4)).grow(3))
    expected = np.zeros((10, 10, 10), bool)
    expected[3:7, 3:7, 3:7] = True
    np.testing.assert_array_equal(labels.known_of("mito"), expected)
    np.testing.assert_array_equal(labels.present_of("mito"), expected)


def test_a_group_is_the_sum_of_its_parts_when_shrunk(tmp_path: Path) -> None:
    """Neither part fills half of the coarse voxel, but the group does."""
    membrane = np.zeros((4, 4, 4), np.uint8)
    membrane[0, :, :2] = membrane[1, :, 2:] = 1
    lumen = np.zeros((4, 4, 4), np.uint8)
    lumen[2, :, :] = 1
    crop = open_crop(tmp_path, {"mito_mem": membrane, "mito_lum": lumen, "mito_ribo": np.zeros((4, 4, 4), np.uint8)})
    labels = read_labels(crop, ["mito", "mito_mem", "mito_lum"], grid_of((1, 1, 1), voxel=32.0))
    assert labels.present_of("mito").all()
    assert not labels.present_of("mito_mem").any()
    assert labels.known_of("mito_mem").all()


def test_instances_keep_ids_and_255_can_be_an_object(tmp_path: Path) -> None:
    ids = np.zeros((4, 4, 4), np.uint16)
    ids[0], ids[1] = 255, 7
    write_raw(tmp_path, "set-a", np.zeros((4, 4, 4), np.uint8), grid_of((4, 4, 4)))
    counted = {"absent": 32, "unknown": 0}
    write_label(
        tmp_path, "set-a", "crop1", "mito", ids, grid_of((4, 4, 4)), unknown=255, kind="instance", counts=counted
    )
    counted = {"absent": 32, "unknown": 16}
    write_label(
        tmp_path, "set-a", "crop2", "mito", ids, grid_of((4, 4, 4)), unknown=255, kind="instance", counts=counted
    )
    catalog = Catalog.open(str(tmp_path))
    found, known = read_instances(catalog.crop("set-a", "crop1"), "mito", grid_of((4, 4, 4)))
    assert known.all()
    assert set(np.unique(found)) == {0, 7, 255}
    found, known = read_instances(catalog.crop("set-a", "crop2"), "mito", grid_of((4, 4, 4)))
    assert not known[0].any()
    assert set(np.unique(found)) == {0, 7}


def test_more_than_64_classes_take_a_second_word(tmp_path: Path) -> None:
    crop = open_crop(tmp_path, {"er_mem_all": np.ones((4, 4, 4), np.uint8)})
    names = sorted(CLASSES)
    labels = read_labels(crop, names, grid_of((4, 4, 4)))
    assert labels.present.shape[0] == 2
    filled, known = dense(labels, ["er_mem_all", "vacuole"])
    assert filled[0].all()
    assert known[0].all()
    assert not known[1].any()
    with pytest.raises(UnknownNameError, match="er_mem_all"):
        read_labels(crop, ["er_mem_all"], grid_of((4, 4, 4))).present_of("er_mem_al")
