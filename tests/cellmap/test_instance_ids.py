"""Ids of objects on any grid: voted as masks are, three-state, and one number a voxel together with the labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from connectomics.cellmap.catalog import Catalog, Crop, LabelArray
from connectomics.cellmap.label_codes import LabelCodes, LabelStates, StateTable
from connectomics.cellmap.labels import read_labels, vote_ids
from connectomics.errors import InputError, UnknownNameError
from connectomics.geometry import VoxelGrid
from tests.cellmap.plain_labels import restricted, volume_of
from tests.cellmap.roots import GROUND_TRUTH, grid_of, write_label, write_raw

FINE = VoxelGrid((2.62, 2.0, 2.0), (101.31, 51.0, 51.0), (24, 28, 30))


def crop_of(root: Path, arrays: dict[str, tuple[NDArray[Any], dict[str, Any]]], grid: VoxelGrid) -> Crop:
    """A crop with an array for each class: values, and how it is written."""
    write_raw(root, "set-a", np.zeros((4, 4, 4), np.uint8), grid_of((4, 4, 4)))
    for name, (values, options) in arrays.items():
        write_label(root, "set-a", "crop1", name, values, grid, **options)
    return Catalog.open(str(root)).crop("set-a", "crop1")


def ids_of(crop: Crop, name: str, grid: VoxelGrid) -> NDArray[np.int32]:
    return LabelCodes.of(read_labels(crop, [name], grid, [name])).ids()[0]


def blobs(seed: int = 0, shape: tuple[int, ...] = FINE.shape) -> NDArray[np.uint16]:
    """Objects of a few voxels that touch each other, and gaps."""
    rng = np.random.default_rng(seed)
    coarse = rng.choice([0, 0, 3, 7, 255, 4000], [-(-n // 4) for n in shape]).astype(np.uint16)
    fine = np.kron(coarse, np.ones((4, 4, 4), np.uint16))
    return fine[: shape[0], : shape[1], : shape[2]]


# -- the vote --------------------------------------------------------------------------------------------------------
def most(values: NDArray[Any], source: VoxelGrid, target: VoxelGrid) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The plain reference: of every target voxel, the id that fills most of it and whether that is clear."""
    shares = []
    for axis in range(3):
        begin, end = (
            [g.translation[axis] + (np.arange(g.shape[axis]) + s) * g.voxel_size[axis] for s in (-0.5, 0.5)]
            for g in (source, target)
        )
        low, high = np.maximum(begin[0], end[0][:, None]), np.minimum(begin[1], end[1][:, None])
        overlap = high - low  # nm of each target voxel (rows) in each source voxel; less than a femtometre is rounding
        shares.append(np.where(overlap > 1e-6, overlap, 0))
    ids = [int(i) for i in np.unique(values) if i]
    volumes = np.stack([
        np.einsum("ai,bj,ck,ijk->abc", *shares, (values == i).astype(float), optimize=True) for i in ids
    ])  # fmt: skip
    ranked = np.sort(volumes, axis=0)
    clear = (ranked[-1] - ranked[-2] > 1e-3 * ranked[-1]) | (ranked[-1] == 0)
    return np.where(ranked[-1] > 0, np.array(ids)[volumes.argmax(0)], 0), clear


@pytest.mark.parametrize(
    "size", [(2.62, 2.0, 2.0), (8.0, 8.0, 8.0), (5.24, 4.0, 4.0), (1.31, 1.0, 1.0), (3.5, 3.0, 1.7)]
)
def test_a_voxel_gets_the_id_that_fills_most_of_it(size: tuple[float, ...]) -> None:
    values = blobs()
    grid = VoxelGrid.covering(FINE.box, size).grow(1)
    found = vote_ids(values, values > 0, FINE, grid)
    wanted, clear = most(values, FINE, grid)
    assert clear.mean() > 0.8
    np.testing.assert_array_equal(found[clear], wanted[clear])
    assert set(np.unique(found)) == set(np.unique(values))


def test_where_voxel_sizes_are_equal_it_is_a_copy(tmp_path: Path) -> None:
    values = blobs()
    crop = crop_of(tmp_path, {"mito": (values, {"kind": "instance"})}, FINE)
    np.testing.assert_array_equal(ids_of(crop, "mito", FINE), values)


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_no_present_voxel_is_left_without_an_object(tmp_path: Path, factor: int) -> None:
    """The id at a voxel's centre would leave out the rim."""
    crop = crop_of(tmp_path, {"mito": (blobs(), {"kind": "instance"})}, FINE)
    grid = VoxelGrid.covering(crop.box, [s * factor for s in FINE.voxel_size])
    labels = read_labels(crop, ["mito"], grid, ["mito"])
    ids = LabelCodes.of(labels).ids()[0]
    present, known = labels.present_of("mito"), labels.known_of("mito")
    np.testing.assert_array_equal(ids > 0, present)
    np.testing.assert_array_equal(ids == 0, known & ~present)
    np.testing.assert_array_equal(ids == -1, ~known)


# -- what is no object -----------------------------------------------------------------------------------------------
def test_the_encoding_says_what_is_an_object_not_the_number(tmp_path: Path) -> None:
    values = np.zeros((4, 4, 4), np.uint16)
    values[0], values[1] = 255, 7
    for n, (unknown, counts, first) in enumerate([
        (255, {"absent": 32, "unknown": 0}, 255), (255, {"absent": 32, "unknown": 16}, -1), (None, None, 255),
    ]):  # fmt: skip
        options = {"kind": "instance", "unknown": unknown, "counts": counts}
        crop = crop_of(tmp_path / str(n), {"mito": (values, options)}, grid_of((4, 4, 4)))
        found = ids_of(crop, "mito", grid_of((4, 4, 4)))
        assert [np.unique(plane).tolist() for plane in found] == [[first], [7], [0], [0]]


def test_a_mask_does_not_say_which_object_a_voxel_is_of(tmp_path: Path) -> None:
    values = np.zeros((4, 4, 4), np.uint8)
    values[0], values[1] = 1, 255
    crop = crop_of(tmp_path, {"mito": (values, {"unknown": 255})}, grid_of((4, 4, 4)))
    assert [np.unique(p).tolist() for p in ids_of(crop, "mito", grid_of((4, 4, 4)))] == [[-1], [-1], [0], [0]]


def test_parts_say_where_a_group_is_and_not_which_object(tmp_path: Path) -> None:
    membrane, lumen = np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8)
    membrane[0], lumen[1] = 1, 1
    arrays = {"mito_mem": (membrane, {}), "mito_lum": (lumen, {}), "mito_ribo": (lumen * 0, {})}
    crop = crop_of(tmp_path, arrays, grid_of((4, 4, 4)))
    assert [np.unique(p).tolist() for p in ids_of(crop, "mito", grid_of((4, 4, 4)))] == [[-1], [-1], [0], [0]]


def test_parts_fill_in_what_the_ids_leave_unknown(tmp_path: Path) -> None:
    """Ids up to z = 2; beyond, the parts say present at z = 2 and absent at z = 3."""
    ids, membrane = np.full((4, 4, 4), 255, np.uint16), np.zeros((4, 4, 4), np.uint8)
    ids[0], ids[1], membrane[2] = 5, 0, 1
    none = (membrane * 0, {})
    arrays = {
        "mito": (ids, {"kind": "instance", "unknown": 255}), "mito_mem": (membrane, {}), "mito_lum": none,
        "mito_ribo": none,
    }  # fmt: skip
    crop = crop_of(tmp_path, arrays, grid_of((4, 4, 4)))
    assert [np.unique(p).tolist() for p in ids_of(crop, "mito", grid_of((4, 4, 4)))] == [[5], [0], [-1], [0]]


def test_a_class_that_nobody_annotated_is_unknown(tmp_path: Path) -> None:
    crop = crop_of(tmp_path, {"ves": (np.ones((4, 4, 4), np.uint8), {"kind": "instance"})}, grid_of((4, 4, 4)))
    labels = read_labels(crop, ["mito", "ves"], grid_of((4, 4, 4)).grow(1), ["ves", "mito"])
    assert labels.instances == ("ves", "mito")
    found = LabelCodes.of(labels).ids()
    assert found.shape == (2, 6, 6, 6)
    assert (found[0, 1:5, 1:5, 1:5] == 1).all()
    assert (found[0] == 1).sum() == 4**3
    assert (found[1] == -1).all()
    with pytest.raises(UnknownNameError, match="did you mean 'ves'"):
        read_labels(crop, ["mito", "ves"], grid_of((4, 4, 4)), ["vess"])


# -- one number a voxel ----------------------------------------------------------------------------------------------
def test_codes_with_objects_are_taken_apart_again(tmp_path: Path) -> None:
    arrays = {
        "mito": (blobs(1), {"kind": "instance", "unknown": 255}), "ld": (blobs(2), {"kind": "instance"}),
        "er": ((blobs(3) > 0).astype(np.uint8), {}),
    }  # fmt: skip
    crop = crop_of(tmp_path, arrays, FINE)
    names = ["er", "mito", "ld"]
    grid = FINE.grow(2)
    plain, told = (
        LabelCodes.of(read_labels(crop, names, grid)),
        LabelCodes.of(read_labels(crop, names, grid, names[1:])),
    )
    assert len(told.states) > len(plain.states)
    codes, ids = told.states.split(told.codes)
    np.testing.assert_array_equal(codes, plain.codes)  # numbered alike, and as narrow
    assert codes.dtype == plain.codes.dtype
    np.testing.assert_array_equal(told.states.plain.to_array(), plain.states.to_array())
    np.testing.assert_array_equal(ids, told.ids())
    for name, row in zip(names[1:], ids, strict=True):
        np.testing.assert_array_equal(row[2:-2, 2:-2, 2:-2], ids_of(crop, name, FINE))
    again = LabelStates.from_array(names, told.states.to_array(), names[1:])
    np.testing.assert_array_equal(again.numbers, told.states.numbers)
    volume = volume_of(told)
    assert volume.ids is not None
    back = LabelCodes.of(volume)
    np.testing.assert_array_equal(back.ids(), ids)
    where = np.zeros(grid.shape, bool)
    where[:, 5:9] = True
    for part in (told.restricted(where), LabelCodes.of(restricted(volume, where))):
        np.testing.assert_array_equal(part.ids(), np.where(where, ids, -1))


def test_large_ids_are_numbered_anew_and_small_ones_stay() -> None:
    words = np.array([[0], [3], [3], [3], [2]], np.uint64)
    ids = np.array([[0, 0], [7, 2**63], [9, 2**40], [7, 5], [0, 0]], np.uint64)
    states = LabelStates(("a", "b"), words, np.where(words > 0, 3, 0).astype(np.uint64), ("a", "b"), ids)
    assert states.numbers.tolist() == [[-1, 7, 9, 7, 0], [-1, 3, 2, 1, -1]]


def test_ids_that_do_not_fit_are_refused() -> None:
    words = np.zeros((1, 1), np.uint64)
    with pytest.raises(InputError, match="need as many ids"):
        LabelStates(("a",), words, words, ("a",))
    with pytest.raises(InputError, match="need as many ids"):
        LabelStates(("a",), words, words, ("a",), np.zeros((2, 1), np.uint64))
    grid = grid_of((2, 2, 2))
    volume = volume_without_ids(grid)
    with pytest.raises(InputError, match="ids of"):
        StateTable(("a",), ("a",)).encode(volume)


def volume_without_ids(grid: VoxelGrid) -> Any:
    from connectomics.cellmap.labels import LabelVolume

    with pytest.raises(InputError, match="needs ids"):
        LabelVolume(grid, ("a",), np.zeros((1, 2, 2, 2), np.uint64), np.zeros((1, 2, 2, 2), np.uint64), ("a",))
    return LabelVolume(grid, ("a",), np.zeros((1, 2, 2, 2), np.uint64), np.zeros((1, 2, 2, 2), np.uint64))


# -- real data -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "class_name", "size"),
    [("fib25-medulla", "cell", (20.0, 20.0, 20.0)), ("urocell-labels", "fv", (32.0, 32.0, 32.0))],
)
def test_real_objects_keep_their_voxels(
    shared_data: Path, name: str, class_name: str, size: tuple[float, float, float]
) -> None:
    folder = shared_data / name / f"{name}.zarr" / GROUND_TRUTH / "crop1" / class_name
    label = LabelArray(class_name, str(folder))
    crop = Crop(name, "crop1", "no raw is read", {class_name: label})
    grid = label.grid.crop((0, 0, 0), (48, 96, 96))
    stored = label.read_stored((0, 0, 0), grid.shape).astype(np.int64)
    assert len(np.unique(stored)) > 10
    np.testing.assert_array_equal(ids_of(crop, class_name, grid), stored)
    coarse = VoxelGrid.covering(grid.box, size)
    coarse = coarse.crop((0, 0, 0), [n - 1 for n in coarse.shape])  # the last may stick out of what was stored
    found = ids_of(crop, class_name, coarse)
    wanted, clear = most(stored, grid, coarse)
    told = clear & (found > 0)
    assert told.any()
    np.testing.assert_array_equal(found[told], wanted[told])
    present = read_labels(crop, [class_name], coarse).present_of(class_name)
    np.testing.assert_array_equal(found > 0, present)
