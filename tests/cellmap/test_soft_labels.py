"""Labels on coarser voxels: ties that do not make objects larger, and the share of a voxel that is present."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from connectomics.cellmap.catalog import Catalog, Crop
from connectomics.cellmap.label_codes import LabelCodes, LabelStates, StateTable
from connectomics.cellmap.labels import LabelVolume, read_labels
from connectomics.errors import InputError
from connectomics.geometry import VoxelGrid
from connectomics.testing.closed_form import sphere_label
from tests.cellmap.roots import grid_of, write_label, write_raw


def crop_of(folder: Path, values: NDArray[np.uint8], voxel: float = 4.0, unknown: int | None = None) -> Crop:
    grid = grid_of(values.shape, voxel)
    write_raw(folder, "set-a", np.zeros((2, 2, 2), np.uint8), grid_of((2, 2, 2)))
    write_label(folder, "set-a", "crop1", "mito", values, grid, unknown=unknown)
    return Catalog.open(str(folder)).crop("set-a", "crop1")


def shares(mask: NDArray[np.bool_], voxel: float, target: VoxelGrid) -> NDArray[np.float64]:
    """The share of every target voxel that a mask on `grid_of` fills, from the lengths of all overlaps."""
    tables = []
    for axis, n in enumerate(mask.shape):
        low = target.translation[axis] + (np.arange(target.shape[axis]) - 0.5) * target.voxel_size[axis]
        high, faces = low + target.voxel_size[axis], np.arange(n + 1) * voxel
        overlap = np.minimum(high[:, None], faces[1:]) - np.maximum(low[:, None], faces[:-1])
        tables.append(np.clip(overlap, 0, None) / target.voxel_size[axis])
    return np.einsum("az,by,cx,zyx->abc", *tables, mask.astype(np.float64), optimize=True)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.floats(-8, 8), st.sampled_from([2.62, 4.0, 8.0, 12.0, 13.0]))
def test_fractions_are_the_present_share_of_what_is_known(seed: int, shift: float, voxel: float) -> None:
    rng = np.random.default_rng(seed)
    values = rng.choice([0, 1, 255], (8, 8, 8), p=[0.4, 0.4, 0.2]).astype(np.uint8)
    target = VoxelGrid((voxel,) * 3, (shift,) * 3, (5, 4, 6))
    with tempfile.TemporaryDirectory() as folder:
        crop = crop_of(Path(folder), values, unknown=255)
        labels, plain = (read_labels(crop, ["mito"], target, soft=soft) for soft in (True, False))
    present, absent = (shares(values == state, 4.0, target) for state in (1, 0))
    known = labels.known_of("mito")
    assert labels.fractions is not None
    expected = 16 * present[known] / (present + absent)[known]
    assert np.abs(labels.fractions[0][known] - expected).max(initial=0) <= 0.5 + 1e-3  # rounded to sixteenths
    assert not labels.fractions[0][~known].any()
    np.testing.assert_array_equal(labels.present, plain.present)
    np.testing.assert_array_equal(labels.known, plain.known)


def test_eighths_are_exact() -> None:
    values = np.random.default_rng(0).integers(0, 2, (8, 8, 8)).astype(np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        labels = read_labels(crop_of(Path(folder), values), ["mito"], grid_of((4, 4, 4), 8.0), soft=True)
    assert labels.fractions is not None
    np.testing.assert_array_equal(labels.fractions[0], 2 * values.reshape(4, 2, 4, 2, 4, 2).sum((1, 3, 5)))


class TestTies:
    @pytest.mark.parametrize("axis", [0, 1, 2])
    def test_a_face_through_voxels_is_even(self, tmp_path: Path, axis: int) -> None:
        """A slab that ends in the middle of voxels: all of these are present by default, half of them alternating."""
        values = np.zeros((16, 16, 16), np.uint8)
        np.moveaxis(values, axis, 0)[3:9] = 1
        crop, grid = crop_of(tmp_path, values), grid_of((8, 8, 8), 8.0)
        volume = [
            read_labels(crop, ["mito"], grid, alternate_ties=even).present_of("mito").sum() for even in (False, True)
        ]
        assert volume == [4 * 64, 3 * 64]

    def test_every_block_of_a_lattice_is_read_alike(self, tmp_path: Path) -> None:
        values = np.random.default_rng(1).integers(0, 2, (24, 24, 24)).astype(np.uint8)
        crop = crop_of(tmp_path, values)
        for start in (0.0, 4.0, -4.0, 1.3):
            grid = grid_of((11, 11, 11), 8.0, start)
            whole = read_labels(crop, ["mito"], grid, alternate_ties=True).present_of("mito")
            part = read_labels(crop, ["mito"], grid.crop((3, 2, 5), (4, 5, 6)), alternate_ties=True).present_of("mito")
            np.testing.assert_array_equal(part, whole[3:7, 2:7, 5:11])

    def test_only_ties_change(self, tmp_path: Path) -> None:
        values = np.random.default_rng(2).integers(0, 2, (16, 16, 16)).astype(np.uint8)
        crop, grid = crop_of(tmp_path, values), grid_of((8, 8, 8), 8.0)
        before, after = (
            read_labels(crop, ["mito"], grid, alternate_ties=even).present_of("mito") for even in (False, True)
        )
        count = values.reshape(8, 2, 8, 2, 8, 2).sum((1, 3, 5))
        np.testing.assert_array_equal(before, count >= 4)
        odd = np.indices(count.shape).sum(0) % 2 == 1
        np.testing.assert_array_equal(after, np.where(count == 4, ~odd, count > 4))

    def test_the_volume_of_a_sphere(self, tmp_path: Path) -> None:
        """Labels at 4 nm read at 8 nm: ties enlarge the sphere, alternating ones and fractions do not."""
        label, grid = grid_of((60, 60, 60), 4.0), grid_of((30, 30, 30), 8.0)
        found = []
        for number, (shift, radius) in enumerate([(0.3, 100.0), (1.1, 96.0), (2.7, 104.0), (3.9, 100.0)]):
            values = sphere_label(label, (120.0 + shift, 120.0 - shift, 118.0), radius)
            crop = crop_of(tmp_path / str(number), values)
            soft = read_labels(crop, ["mito"], grid, soft=True)
            assert soft.fractions is not None
            even = read_labels(crop, ["mito"], grid, alternate_ties=True)
            exact = 4 / 3 * np.pi * (radius / 8) ** 3
            surface = 4 * np.pi * (radius / 8) ** 2
            volumes = soft.present_of("mito").sum(), even.present_of("mito").sum(), soft.fractions.sum() / 16
            found.append([(volume - exact) / surface for volume in volumes])  # voxels that the surface moves
        present, even_ties, fractions = np.mean(found, axis=0)
        assert present > 0.05
        assert abs(even_ties) < 0.01
        assert abs(fractions) < 0.003


def soft_volume(rng: np.random.Generator, n_classes: int, shape: tuple[int, int, int]) -> LabelVolume:
    """A few random combinations of fractions, unknown classes and ids of the first class."""
    names = tuple(f"c{n}" for n in range(n_classes))
    states = rng.integers(0, 17, (20, n_classes)).astype(np.uint8)
    seen = rng.random(states.shape) < 0.7
    states[~seen] = 0
    chosen = rng.integers(0, len(states), shape)
    words = np.zeros((2, -(-n_classes // 64), *shape), np.uint64)
    for c in range(n_classes):
        for word, bits in zip(words, (states[:, c] >= 8, seen[:, c]), strict=True):
            word[c // 64] |= bits[chosen].astype(np.uint64) << np.uint64(c % 64)
    ids = np.where(states[chosen][..., 0] >= 8, rng.integers(1, 4, shape), 0).astype(np.uint64)[None]
    fractions = np.ascontiguousarray(np.moveaxis(states[chosen], -1, 0))
    return LabelVolume(grid_of(shape), names, words[0], words[1], names[:1], ids, fractions)


class TestCodes:
    @pytest.mark.parametrize("n_classes", [1, 8, 9, 70])
    def test_codes_hold_fractions_and_ids(self, n_classes: int) -> None:
        volume = soft_volume(np.random.default_rng(n_classes), n_classes, (9, 8, 7))
        assert volume.fractions is not None
        codes = LabelCodes.of(volume)
        states = LabelStates.from_array(volume.classes, codes.states.to_array(), volume.instances)
        names = volume.classes[::-1]
        label, known = LabelCodes(volume.grid, codes.codes, states).dense(names)
        np.testing.assert_array_equal(label, volume.fractions[::-1] / np.float32(16))
        np.testing.assert_array_equal(known, [volume.known_of(name) for name in names])
        plain, ids = states.split(codes.codes)
        np.testing.assert_array_equal(states.plain.dense(plain)[0], volume.fractions / np.float32(16))
        assert volume.ids is not None
        there = volume.ids[0] > 0
        np.testing.assert_array_equal(ids[0][there], volume.ids[0][there].astype(np.int32))

    def test_a_table_takes_soft_labels_or_none(self) -> None:
        volume = soft_volume(np.random.default_rng(0), 3, (4, 4, 4))
        with pytest.raises(InputError, match="soft labels True"):
            StateTable(volume.classes, volume.instances).encode(volume)

    def test_one_fraction_for_every_class(self) -> None:
        volume = soft_volume(np.random.default_rng(0), 3, (4, 4, 4))
        assert volume.fractions is not None
        with pytest.raises(InputError, match="one array per class"):
            LabelVolume(volume.grid, volume.classes, volume.present, volume.known, fractions=volume.fractions[:2])
