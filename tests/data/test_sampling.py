"""Splits, positions and random streams."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from connectomics.cellmap.catalog import Catalog, Crop, LabelArray
from connectomics.data.sampling import PatchSampler, foreground_points, place_patch
from connectomics.data.splits import Split, leave_one_out, split_by_crop, split_by_dataset
from connectomics.errors import ConfigError, InputError, UnknownNameError
from tests.cellmap.roots import grid_of, write_label, write_raw


def crop_with(dataset: str, number: int, *classes: str) -> Crop:
    return Crop(dataset, f"crop{number}", "nowhere", {c: LabelArray(c, "nowhere") for c in classes})


CROPS = [crop_with("a" if i % 2 else "b", i, "er", *(["mito"] if i % 4 == 0 else []), *(["nuc"] if i == 7 else []))
         for i in range(20)]  # fmt: skip


def test_split_is_stratified_seeded_and_total() -> None:
    split = split_by_crop(CROPS, ["er", "mito", "nuc"], 0.8, seed=1)
    assert split == split_by_crop(CROPS, ["er", "mito", "nuc"], 0.8, seed=1)
    assert split != split_by_crop(CROPS, ["er", "mito", "nuc"], 0.8, seed=2)
    assert sorted((*split.train, *split.val)) == sorted(c.key for c in CROPS)
    assert len(split.val) == 4
    held = [c for c in CROPS if c.key in split.val]
    assert sum("mito" in c.labels for c in held) == 1  # a fifth of five
    assert not any("nuc" in c.labels for c in held)  # the only crop of a class is trained on


def test_everything_can_be_trained_on_and_one_crop_is_not_split() -> None:
    assert split_by_crop(CROPS, ["er"], 1.0, seed=0).val == ()
    assert split_by_crop(CROPS[:1], ["er"], 0.5, seed=0).train == (CROPS[0].key,)
    with pytest.raises(InputError, match="no crops"):
        split_by_crop([], ["er"], 0.5, seed=0)


def test_split_by_data_set() -> None:
    split = split_by_dataset(CROPS, ["a"])
    assert all(k.startswith("b/") for k in split.train)
    assert all(k.startswith("a/") for k in split.val)
    assert leave_one_out(CROPS)["a"] == split
    with pytest.raises(InputError, match=r"leaves 0 training|leaves 20 training and 0"):
        split_by_dataset(CROPS, [])
    with pytest.raises(UnknownNameError, match="data set 'c'"):
        split_by_dataset(CROPS, ["c"])


@pytest.mark.parametrize("content", [b"\xa6\x00\xff", b"train: a/crop1\nval: []\n", b"train: [a/crop1\n", b"[]"])
def test_a_broken_split_file_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "split.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"split\.yaml"):
        Split.load(file)


def test_a_person_can_edit_the_split_file(tmp_path: Path) -> None:
    file = tmp_path / "split.yaml"
    split = split_by_crop(CROPS, ["er"], 0.8, seed=1)
    split.save(file)
    assert Split.load(file) == split
    moved = split.val[0]
    text = file.read_text().replace(f"  - {moved}\n", "").replace("train:\n", f"train:\n  - {moved}\n")
    file.write_text(text)
    assert moved in Split.load(file).train
    assert moved in [c.key for c in Split.load(file).select(CROPS)[0]]
    file.write_text(text.replace("val:", f"val:\n  - {moved}"))
    with pytest.raises(ConfigError, match="can be in one only"):
        Split.load(file)
    with pytest.raises(UnknownNameError, match="crop 'a/crop99'"):
        Split(("a/crop99",), ()).select(CROPS)


@given(st.tuples(*[st.integers(1, 40)] * 3), st.tuples(*[st.integers(1, 40)] * 3), st.integers(0, 2**31), st.booleans())
def test_a_patch_lies_in_the_crop_or_holds_it(
    crop: tuple[int, int, int], patch: tuple[int, int, int], seed: int, with_point: bool
) -> None:
    lattice = grid_of(crop, start=100.0)
    rng = np.random.default_rng(seed)
    voxel = [int(rng.integers(n)) for n in crop]
    point = tuple(lattice.to_world(voxel)) if with_point else None
    grid = place_patch(lattice, patch, point, rng)
    assert grid.shape == patch
    assert grid.same_lattice(lattice)
    begin = np.round(lattice.to_index(grid.translation)).astype(int)
    for axis in range(3):
        inner = begin[axis] >= 0 and begin[axis] + patch[axis] <= crop[axis]
        outer = begin[axis] <= 0 and begin[axis] + patch[axis] >= crop[axis]
        assert inner or outer
        if point is not None:
            assert begin[axis] <= voxel[axis] < begin[axis] + patch[axis]


def sampler(rank: int = 0, world: int = 1, seed: int = 3) -> PatchSampler:
    points = [{"mito": np.zeros((5, 3)), "er": np.zeros((0, 3))}, {"er": np.ones((2, 3))}, {}]
    return PatchSampler(points, [1.0, 2.0, 5.0], 600, balance=0.5, seed=seed, rank=rank, world=world)


def test_sampler_is_a_function_of_seed_epoch_and_position() -> None:
    first, second = sampler(), sampler()
    assert list(first) == list(second)
    first.set_epoch(1)
    assert list(first) != list(second)
    assert list(sampler(seed=4)) != list(second)


def test_processes_share_an_epoch_without_overlap() -> None:
    whole = list(sampler())
    parts = [list(sampler(rank, 3)) for rank in range(3)]
    assert [r for trio in zip(*parts, strict=True) for r in trio] == whole


def test_sampler_is_balanced() -> None:
    requests = list(sampler())
    through = [r for r in requests if r.point is not None]
    assert len(through) / len(requests) == pytest.approx(0.5, abs=0.07)
    assert sum(r.index == 0 for r in through) / len(through) == pytest.approx(0.5, abs=0.1)  # mito against er
    uniform = [r.index for r in requests if r.point is None]
    assert np.bincount(uniform, minlength=3) / len(uniform) == pytest.approx([1 / 8, 2 / 8, 5 / 8], abs=0.1)
    assert len({r.seed for r in requests}) == len(requests)


def test_foreground_points_are_where_the_class_is(tmp_path: Path) -> None:
    grid = grid_of((32, 32, 32), voxel=4.0, start=40.0)
    values = np.zeros(grid.shape, np.uint8)
    values[20:28, 4:12, 8:16] = 1
    values[0] = 255
    write_raw(tmp_path, "set-a", np.zeros(grid.shape, np.uint8), grid)
    write_label(tmp_path, "set-a", "crop1", "mito_mem", values, grid, unknown=255, levels=2)
    crop = Catalog.open(str(tmp_path)).crop("set-a", "crop1")
    for name in ("mito_mem", "mito"):  # the group through its atom
        points = foreground_points(crop, name, seed=0)
        assert len(points) > 0
        index = np.floor(grid.to_index(points) + 0.5).astype(int)
        assert np.all(values[tuple(index.T)] == 1)
    assert len(foreground_points(crop, "ld", seed=0)) == 0
