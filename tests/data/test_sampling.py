"""Splits, positions and random streams."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from connectomics.cellmap import catalog
from connectomics.cellmap.catalog import Catalog, Crop, LabelArray
from connectomics.data import foreground
from connectomics.data.contents import Content
from connectomics.data.foreground import Reservoir, foreground_points
from connectomics.data.holdout import capped_shares
from connectomics.data.sampling import PatchSampler, SampledCrop, place_known, place_patch
from connectomics.data.splits import (
    Split,
    check_leaks,
    groups_of,
    leaks,
    leave_one_out,
    split_by_crop,
    split_by_dataset,
)
from connectomics.errors import ConfigError, InputError, UnknownNameError
from connectomics.geometry import Box, VoxelGrid
from tests.cellmap.roots import grid_of, write_label, write_raw


def crop_with(dataset: str, number: int, *classes: str, at: float | None = None, size: float = 100.0) -> Crop:
    """A crop without voxels: a cube of ``size`` nm at ``at`` (else far from all others)."""
    crop = Crop(dataset, f"crop{number}", "nowhere", {c: LabelArray(c, "nowhere") for c in classes})
    begin = 10_000.0 * number if at is None else at
    crop.__dict__["box"] = Box((begin, 0.0, 0.0), (begin + size, size, size))
    return crop


def contents_of(crops: list[Crop], classes: list[str]) -> list[Content]:
    """Every class of a crop fills a tenth of it."""
    volumes = [float(np.prod(crop.box.extent)) for crop in crops]
    return [
        Content(v, {c: v / 10 if c in crop.labels else 0.0 for c in classes}, frozenset(classes))
        for crop, v in zip(crops, volumes, strict=True)
    ]


def split_of(crops: list[Crop], classes: list[str], share: float, seed: int, margin: float = 0.0) -> Split:
    return split_by_crop(crops, contents_of(crops, classes), classes, share, seed, (margin,) * 3)


CROPS = [crop_with("a" if i % 2 else "b", i, "er", *(["mito"] if i % 4 == 0 else []), *(["nuc"] if i == 7 else []))
         for i in range(20)]  # fmt: skip


def test_split_is_stratified_seeded_and_total() -> None:
    split = split_of(CROPS, ["er", "mito", "nuc"], 0.8, seed=1)
    assert split == split_of(CROPS, ["er", "mito", "nuc"], 0.8, seed=1)
    assert split != split_of(CROPS, ["er", "mito", "nuc"], 0.8, seed=2)
    assert sorted((*split.train, *split.val)) == sorted(c.key for c in CROPS)
    assert len(split.val) == 4
    held = [c for c in CROPS if c.key in split.val]
    assert sum("mito" in c.labels for c in held) == 1  # a fifth of five
    assert not any("nuc" in c.labels for c in held)  # the only crop of a class is trained on


def test_the_only_crop_with_a_class_is_never_held_out() -> None:
    """Whatever the seed: in 5 of 20 seeds, counting crops alone held it out."""
    crops = [crop_with("a", i, "mito", "er", *(["golgi"] if i == 3 else [])) for i in range(6)]
    for seed in range(20):
        split = split_of(crops, ["mito", "er", "golgi"], 0.8, seed)
        assert "a/crop3" in split.train
        assert len(split.val) == 1


def test_what_is_present_decides_not_which_arrays_there_are() -> None:
    """All crops have an array of golgi; it occurs in two."""
    crops = [crop_with("a", i, "mito", "golgi") for i in range(8)]
    contents = [
        Content(1e6, {"mito": 1e5, "golgi": 1e3 if i in (2, 5) else 0.0}, frozenset(("mito", "golgi")))
        for i in range(8)
    ]
    for seed in range(10):
        split = split_by_crop(crops, contents, ["mito", "golgi"], 0.75, seed)
        assert len({"a/crop2", "a/crop5"} & set(split.val)) == 1


def test_crops_that_overlap_or_nearly_touch_stay_together() -> None:
    crops = [
        crop_with("a", i, "mito", at=at) for i, at in enumerate((0.0, 90.0, 180.0, 1000.0, 1120.0, 3000.0, 5000.0))
    ]
    crops.append(crop_with("b", 9, "mito", at=0.0))  # of another data set: at the same place, and elsewhere
    assert groups_of(crops) == [[0, 1, 2], [3], [4], [5], [6], [7]]
    assert groups_of(crops, 30.0) == [[0, 1, 2], [3, 4], [5], [6], [7]]
    for seed in range(10):
        split = split_of(crops, ["mito"], 0.7, seed, margin=30.0)
        train, val = split.select(crops)
        assert val
        assert not leaks(train, val, 30.0)


def test_a_leak_in_a_split_is_refused_and_a_near_one_warned_of() -> None:
    crops = [crop_with("a", i, "mito", at=at) for i, at in enumerate((0.0, 90.0, 210.0))]
    with pytest.raises(ConfigError, match=r"my split.*overlap.*a/crop1 with a/crop0"):
        check_leaks(crops[:1], crops[1:], "my split", (0.0, 0.0, 0.0))
    (warning,) = check_leaks(crops[:2], crops[2:], "my split", (30.0, 30.0, 30.0))
    assert "within half a patch" in warning
    assert check_leaks(crops[:2], crops[2:], "my split", (10.0, 10.0, 10.0)) == []


def test_everything_can_be_trained_on() -> None:
    assert split_of(CROPS, ["er"], 1.0, seed=0).val == ()
    with pytest.raises(InputError, match="no crops"):
        split_of([], ["er"], 0.5, seed=0)


@given(st.lists(st.floats(0.0, 1e9), min_size=1, max_size=80))
def test_no_capped_share_is_above_twice_even_or_a_twentieth(volumes: list[float]) -> None:
    shares = capped_shares(np.array(volumes))
    there = np.count_nonzero(volumes)
    if not there:
        assert not shares.any()
        return
    assert shares.sum() == pytest.approx(1.0)
    assert shares.max() <= max(0.05, 2 / there) * (1 + 1e-6)
    assert not shares[np.array(volumes) == 0].any()


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
    split = split_of(CROPS, ["er"], 0.8, seed=1)
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
def test_a_patch_holds_a_part_of_the_crop_and_its_point(
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
        shared = min(begin[axis] + patch[axis], crop[axis]) - max(begin[axis], 0)
        assert shared >= min(crop[axis], patch[axis] / 4)
        if point is not None:
            assert begin[axis] <= voxel[axis] < begin[axis] + patch[axis]


@pytest.mark.parametrize("crop", [(30, 24, 20), (48, 25, 60), (40, 41, 70)])
def test_every_labeled_voxel_is_seen_equally_often(crop: tuple[int, int, int]) -> None:
    """Patches that stay inside the crop see its corners about 1 % as often as its center."""
    lattice, patch, rng = grid_of(crop), (24, 24, 24), np.random.default_rng(1)
    seen = [np.zeros(n) for n in crop]
    draws = 20_000
    for _ in range(draws):
        begin = np.round(lattice.to_index(place_patch(lattice, patch, None, rng).translation)).astype(int)
        for axis in range(3):
            seen[axis][max(0, begin[axis]) : begin[axis] + patch[axis]] += 1 / draws
    rarest, most = (np.prod([f(axis) for axis in seen]) for f in (np.min, np.max))  # axes are drawn independently
    assert rarest / most > 0.45
    distinct = {tuple(place_patch(lattice, patch, None, rng).translation) for _ in range(500)}
    assert len(distinct) > 40  # not a few fixed places


# -- the sampler -------------------------------------------------------------------------------------------------------
CROPS_TO_SAMPLE = [
    SampledCrop("one", 1.0, {"mito": np.zeros((5, 3)), "er": np.zeros((0, 3))}),
    SampledCrop("one", 2.0, {"er": np.ones((2, 3)), "mito": np.full((3, 3), 2.0)}),
    SampledCrop("two", 5.0),
]


def sampler(length: int = 2560, seed: int = 3, rank: int = 0, world: int = 1, **mixture: Any) -> PatchSampler:
    return PatchSampler(
        CROPS_TO_SAMPLE, length, classes=["mito", "er", "nuc"], seed=seed, rank=rank, world=world, **mixture
    )


def test_sampler_is_a_function_of_seed_epoch_and_position() -> None:
    first, second = sampler(), sampler()
    assert list(first) == list(second)
    assert [second.request(0, n) for n in (700, 3, 900)] == [list(first)[n] for n in (700, 3, 900)]
    assert list(sampler(length=300)) == list(first)[:300]
    first.set_epoch(1)
    assert list(first) != list(second)
    assert list(sampler(seed=4)) != list(second)
    assert len({r.seed for r in (*first, *second)}) == len(first) + len(second)


def test_processes_share_an_epoch_without_overlap() -> None:
    whole = list(sampler(999))
    parts = [list(sampler(999, rank=rank, world=3)) for rank in range(3)]
    assert [r for trio in zip(*parts, strict=True) for r in trio] == whole
    assert [len(sampler(1000, rank=rank, world=3)) for rank in range(3)] == [334] * 3


@pytest.mark.parametrize(
    ("mixture", "shares"),
    [
        ({}, {"class mito": 0.35, "class er": 0.35, "volume": 0.3}),
        ({"class_weights": {"er": 3, "nuc": 100}}, {"class mito": 0.175, "class er": 0.525, "volume": 0.3}),
        ({"sampling": {"class": 1}, "class_weights": {"mito": 0}}, {"class er": 1.0}),
        ({"sampling": {"uniform": 1, "dataset": 3}}, {"uniform": 0.25, "dataset": 0.75}),
    ],
)
def test_counts_follow_the_weights(mixture: dict[str, Any], shares: dict[str, float]) -> None:
    """In every 256 requests, each to within two: those at the edges of its share."""
    requests = list(sampler(**mixture))
    for start in range(0, len(requests), 256):
        found = Counter(r.drawn_by for r in requests[start : start + 256])
        assert set(found) == set(shares)
        for name, share in shares.items():
            assert abs(found[name] - 256 * share) < 2, name


def test_what_each_strategy_takes() -> None:
    def crops(strategy: str) -> NDArray[np.float64]:
        requests = list(sampler(length=6000, sampling={strategy: 1.0}))
        assert strategy == "class" or all(r.point is None and r.drawn_by == strategy for r in requests)
        return np.bincount([r.index for r in requests], minlength=3) / len(requests)

    assert crops("uniform") == pytest.approx([1 / 3, 1 / 3, 1 / 3], abs=0.03)
    assert crops("volume") == pytest.approx([1 / 8, 2 / 8, 5 / 8], abs=0.03)
    assert crops("dataset") == pytest.approx([1 / 6, 2 / 6, 3 / 6], abs=0.03)  # half to each, then by volume
    assert crops("class") == pytest.approx([1 / 4, 3 / 4, 0], abs=0.03)  # mito: both crops evenly; er: the second


def test_a_class_is_drawn_through_one_of_its_positions() -> None:
    where = {("class mito", 0): 0.0, ("class mito", 1): 2.0, ("class er", 1): 1.0}
    for request in sampler(sampling={"class": 1.0}):
        assert request.point == (where[request.drawn_by, request.index],) * 3


def test_positions_keep_their_fractions_of_a_nanometer() -> None:
    """Voxels of 0.4 nm: a whole number of nm lies up to two voxels beside the voxel that was drawn."""
    grid = VoxelGrid((0.4, 0.4, 0.4), (-3.8, 0.2, 0.2), (20, 20, 20))
    at = (3, 7, 14)
    drawn = PatchSampler([SampledCrop("a", 1.0, {"mito": grid.to_world([at])})], 8, classes=["mito"])
    for request in drawn:
        if request.drawn_by == "class mito":
            patch = place_patch(grid, (1, 1, 1), request.point, np.random.default_rng(0))
            assert np.array_equal(np.round(grid.to_index(patch.translation)), at)


def test_an_epoch_can_begin_in_its_middle_once() -> None:
    """Rank 1 of 2 goes on at its tenth request of epoch 4; the next epoch, and that one again, are whole."""
    whole = sampler(rank=1, world=2)
    whole.set_epoch(4)
    expected = list(whole)
    resumed = sampler(rank=1, world=2)
    resumed.start_at(4, 10)
    assert len(resumed) == len(expected)  # of a whole epoch: the trainer counts from its begin
    assert list(resumed) == expected[10:]
    assert list(resumed) == expected
    resumed.start_at(4, 10)
    resumed.set_epoch(5)  # that epoch had ended early
    assert len(list(resumed)) == len(expected)


def test_bad_mixtures_are_one_line() -> None:
    with pytest.raises(UnknownNameError, match=r"strategy 'clas' in data\.sampling; did you mean 'class'"):
        sampler(sampling={"clas": 1})
    with pytest.raises(UnknownNameError, match=r"class 'mitt' in data\.class_weights.*did you mean 'mito'"):
        sampler(class_weights={"mitt": 1})
    for weight in (-1, float("nan"), True, "much"):
        with pytest.raises(ConfigError, match=r"data\.sampling: the weight of 'class' is"):
            sampler(sampling={"class": weight})
    with pytest.raises(ConfigError, match=r"data\.class_weights: the weight of 'er' is -2"):
        sampler(class_weights={"er": -2})
    with pytest.raises(ConfigError, match=r"data\.sampling: all weights are 0"):
        sampler(sampling={"class": 0})
    with pytest.raises(ConfigError, match="only class has a weight, but none of mito, er, nuc"):
        sampler(sampling={"class": 1}, class_weights={"mito": 0, "er": 0})


def test_without_any_present_class_the_rest_of_the_mixture_is_drawn() -> None:
    bare = PatchSampler([SampledCrop("one", 1.0)], 300, classes=["mito"])
    assert {r.drawn_by for r in bare} == {"volume"}
    assert bare.drawn_classes == ()


# -- known voxels ------------------------------------------------------------------------------------------------------
def share_of(known: NDArray[np.bool_], lattice: VoxelGrid) -> Callable[[VoxelGrid], float]:
    """The plain count: known voxels of the patch, none beyond the crop."""

    def share(grid: VoxelGrid) -> float:
        begin = np.rint(lattice.to_index(grid.translation)).astype(int)
        inside = tuple(slice(max(0, b), max(0, b + n)) for b, n in zip(begin, grid.shape, strict=True))
        return float(known[inside].sum()) / grid.size

    return share


def test_patches_hold_their_share_of_known_voxels() -> None:
    lattice = grid_of((40, 16, 16))
    known = np.zeros(lattice.shape, bool)
    known[:16] = True
    share = share_of(known, lattice)
    plain = [share(place_patch(lattice, (16,) * 3, None, np.random.default_rng(n))) for n in range(50)]
    placed = [
        share(place_known(lattice, (16,) * 3, None, np.random.default_rng(n), share, 0.5, tries=40)) for n in range(50)
    ]
    assert min(placed) >= 0.5
    assert sum(s >= 0.5 for s in plain) < 30  # 9 of 25 places
    same = [place_known(lattice, (16,) * 3, None, np.random.default_rng(7), share, 0.5) for _ in range(2)]
    assert same[0] == same[1]


def test_in_a_crop_smaller_than_the_patch_the_share_is_of_what_it_can_hold() -> None:
    lattice = grid_of((8, 16, 16))
    asked: list[VoxelGrid] = []

    def share(grid: VoxelGrid) -> float:
        asked.append(grid)
        return share_of(np.ones(lattice.shape, bool), lattice)(grid)

    place_known(lattice, (16,) * 3, None, np.random.default_rng(0), share, 1.0)
    assert len(asked) == 1  # half of the patch is the most that there can be


def test_where_no_place_will_do_the_best_one_is_taken() -> None:
    lattice = grid_of((64, 16, 16))
    drawn: list[float] = []

    def share(grid: VoxelGrid) -> float:
        drawn.append(float(grid.translation[0]) / 1000)
        return drawn[-1]

    grid = place_known(lattice, (16,) * 3, None, np.random.default_rng(0), share, 1.0, tries=8)
    assert len(drawn) == 8
    assert float(grid.translation[0]) / 1000 == max(drawn)
    assert place_known(lattice, (16,) * 3, None, np.random.default_rng(0), share, 0.0) == place_patch(
        lattice, (16,) * 3, None, np.random.default_rng(0)
    )
    assert len(drawn) == 8


# -- where a class is --------------------------------------------------------------------------------------------------


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


def test_points_are_uniform_over_voxels_however_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dense slab of 4096 voxels and, far away, sparse ones of 64 each: each voxel has the same chance."""
    grid = grid_of((64, 16, 16), voxel=4.0)
    values = np.zeros(grid.shape, np.uint8)
    values[:16] = 1
    values[32:, ::4, ::4] = 1  # 32 slices of 16
    write_raw(tmp_path, "set-a", np.zeros(grid.shape, np.uint8), grid)
    write_label(tmp_path, "set-a", "crop1", "mito", values, grid)
    crop = Catalog.open(str(tmp_path)).crop("set-a", "crop1")
    monkeypatch.setattr(foreground, "_POINTS", 1000)
    whole = foreground_points(crop, "mito", seed=0)
    assert len(np.unique(whole, axis=0)) == 1000
    monkeypatch.setattr(catalog, "_BLOCK_VOXELS", 16 * 16 * 2)
    monkeypatch.setattr(foreground, "_PIECE", 100)
    assert np.array_equal(foreground_points(crop, "mito", seed=0), whole)
    sparse = float(np.mean(whole[:, 0] > 32 * 4.0))
    assert sparse == pytest.approx(512 / 4608, abs=0.04)  # 11 %; slab by slab it was half
    first_half = whole[:500, 0] > 32 * 4.0
    assert float(first_half.mean()) == pytest.approx(512 / 4608, abs=0.05)  # and in random order


def test_a_reservoir_weights_its_items() -> None:
    kept = Reservoir(200, np.random.default_rng(0))
    kept.add(5000, lambda n: np.repeat(n[:, None] * 0.0, 3, axis=1))
    kept.add(5000, lambda n: np.repeat(n[:, None] * 0.0 + 1, 3, axis=1), weight=3.0)
    assert len(kept) == 200
    assert float(kept.items[:, 0].mean()) == pytest.approx(0.75, abs=0.1)
