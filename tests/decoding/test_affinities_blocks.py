"""Instances from affinities block by block: as near to those of the whole array as is said, whatever is killed."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from connectomics.decoding.affinities.affinity_task import AffinitiesTask, agreement, stitched
from connectomics.decoding.blocks import groups
from connectomics.decoding.parameters import DecodeParameters, decode_parameters
from connectomics.decoding.prediction import StoredAffinities
from connectomics.decoding.probabilities import open_probabilities
from connectomics.errors import ConfigError, IncompleteError, InputError, MetadataError, MissingError
from connectomics.io import store
from connectomics.io.write import update_attrs
from connectomics.pipeline.run_task import load_task
from connectomics.tasks import run_task
from tests.decoding.affinity_kit import (
    OFFSETS,
    SIZE,
    affinities_of,
    cells,
    difference,
    instances,
    noisy,
    read_labels,
    write_prediction,
)
from tests.decoding.decode_kit import decode_predictions
from tests.trees import contents

METHODS = ["mutex_watershed", "agglomeration"]
SHAPE = (50, 60, 70)


@pytest.fixture(scope="module")
def truth() -> np.ndarray:
    return cells(SHAPE, 20, 16.0)


@pytest.fixture(scope="module")
def perfect(truth, tmp_path_factory) -> str:
    """A class predicted perfectly."""
    folder = tmp_path_factory.mktemp("perfect")
    return write_prediction(folder, np.where(truth, 255, 0).astype(np.uint8), affinities_of(truth, OFFSETS), OFFSETS)


def task_of(location: str, folder: Path, block=(24, 32, 40), **parameters) -> AffinitiesTask:
    chosen = DecodeParameters(**{"method": "mutex_watershed", **parameters})
    return AffinitiesTask(location, str(folder / "out.zarr" / "crop1" / "mito"), "mito", chosen, block)


# -- against the truth and the whole array -----------------------------------------------------------------------------
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("block", [(24, 32, 40), (17, 60, 23), (50, 60, 70)])
def test_perfect_affinities_give_the_truth_whatever_the_blocks(perfect, truth, tmp_path, method, block):
    task = task_of(perfect, tmp_path, block, method=method, halo_nm=80.0)
    run_task(task)
    found = read_labels(task.output)
    same = difference(found, truth)
    assert (same.voi_split, same.voi_merge, same.faces) == (0, 0, 0)
    assert same.objects == same.reference
    np.testing.assert_array_equal(found > 0, truth > 0)
    whole = instances(affinities_of(truth, OFFSETS), OFFSETS, truth > 0, method)
    np.testing.assert_array_equal(found, whole)  # number by number: by their first voxels
    with (Path(task.output) / "instances.csv").open() as file:
        assert [int(row["voxels"]) for row in csv.DictReader(file)] == np.bincount(truth.ravel())[1:][
            truth[np.unravel_index([np.flatnonzero(found.ravel() == i)[0] for i in range(1, found.max() + 1)], SHAPE)]
            - 1
        ].tolist()


@pytest.mark.parametrize("method", METHODS)
def test_under_noise_the_difference_from_the_whole_array_is_small(truth, tmp_path, method):
    """A sixteenth of all pairs of voxels is told wrongly here; stated bound: 0.05 bits, one face in a thousand."""
    affinities = noisy(truth, OFFSETS, 2.6)
    exact = affinities_of(truth, OFFSETS)
    assert 0.05 < np.mean((affinities > 127)[:, truth > 0] != (exact > 127)[:, truth > 0]) < 0.08
    location = write_prediction(tmp_path, np.where(truth, 255, 0).astype(np.uint8), affinities, OFFSETS)
    task = task_of(location, tmp_path, method=method, min_size_nm3=50 * 512.0)
    run_task(task)
    whole = instances(affinities, OFFSETS, truth > 0, method, min_size=50)
    found = difference(read_labels(task.output), whole)
    assert found.voi_split < 0.05
    assert found.voi_merge < 0.05
    assert found.faces < 0.001


@pytest.mark.parametrize("group", [(1, 1, 1), (2, 2, 1)])
def test_groups_give_the_labels_of_one_union_of_all_blocks(truth, tmp_path, monkeypatch, group):
    """Where blocks disagree, what is apart decides; 4x4x4 blocks, here all, are united as in one step."""
    location = write_prediction(tmp_path, np.where(truth, 255, 0).astype(np.uint8), noisy(truth, OFFSETS, 2.6), OFFSETS)
    found = []
    for name, chosen in (("all", (4, 4, 4)), ("groups", group)):
        monkeypatch.setattr(groups, "GROUP", chosen)
        task = task_of(location, tmp_path / name, (17, 20, 23), halo_nm=24.0, stitch_threshold=0.3)
        run_task(task)
        found.append(read_labels(task.output))
    np.testing.assert_array_equal(found[0], found[1])
    assert found[0].max() > 20


def test_an_object_that_turns_outside_a_block_is_one(tmp_path):
    """A horseshoe whose legs lie in two blocks and whose bend lies in a third pair, beyond the halo."""
    ids = np.zeros((8, 40, 100), np.uint8)
    ids[2:6, 4:12, 2:98] = ids[2:6, 26:34, 2:98] = 1
    ids[2:6, 4:34, 88:98] = 1
    ids[2:6, 14:24, 2:80] = 2
    location = write_prediction(tmp_path, ids * 100, affinities_of(ids, OFFSETS), OFFSETS)
    task = task_of(location, tmp_path, (8, 40, 30), threshold=0.3)
    run_task(task)
    np.testing.assert_array_equal(read_labels(task.output), ids)


@pytest.mark.parametrize("small", [1, 400])
def test_small_instances_are_small_in_the_volume_and_holes_are_filled(tmp_path, small):
    ids = np.zeros((20, 30, 40), np.uint8)
    ids[4:16, 4:16, 4:36] = 1
    ids[9:11, 9:11, 19:21] = 0  # a hole at the corner of blocks
    ids[2:18, 18:20, 10:22] = 2  # 384 voxels, in four blocks
    location = write_prediction(tmp_path, (ids > 0) * np.uint8(255), affinities_of(ids, OFFSETS), OFFSETS)
    task = task_of(location, tmp_path, (10, 10, 20), min_size_nm3=small * 512.0, fill_holes=True)
    run_task(task)
    filled = ids.copy()
    filled[9:11, 9:11, 19:21] = 1
    expected = {1: np.where(filled == 2, 1, np.where(filled == 1, 2, 0)), 400: filled == 1}[small]
    np.testing.assert_array_equal(read_labels(task.output), expected)


# -- the graph ---------------------------------------------------------------------------------------------------------
def test_agreement_of_two_blocks_about_one_face():
    first = np.array([1, 1, 1, 1, 2, 2, 0, 3])
    second = np.array([5, 5, 5, 0, 5, 6, 6, 0])
    pairs, scores = agreement(first, second)
    assert pairs.tolist() == [[1, 5], [2, 5], [2, 6]]
    assert scores.tolist() == [3 / 4, 1 / 2, 1 / 2]


def test_the_best_pairs_are_united_first_and_what_is_apart_stays_apart():
    pairs, scores = np.array([[0, 2], [1, 2], [2, 3], [4, 5]]), np.array([0.6, 0.9, 1.0, 0.7])
    none = np.empty((0, 2), np.int64)
    assert stitched(6, pairs, scores, none).tolist() == [0, 0, 0, 0, 4, 4]
    assert stitched(6, pairs, scores, np.array([[0, 1]])).tolist() == [0, 1, 1, 1, 4, 4]
    assert stitched(6, pairs, scores, np.array([[0, 3], [4, 5]])).tolist() == [0, 1, 1, 1, 4, 5]
    assert stitched(2, none, np.empty(0), none).tolist() == [0, 1]


def test_a_high_threshold_cuts_at_faces(perfect, truth, tmp_path):
    task = task_of(perfect, tmp_path, stitch_threshold=1.0)
    run_task(task)
    assert difference(read_labels(task.output), truth).voi_split == 0  # perfect affinities: both sides see the same


# -- as a task ---------------------------------------------------------------------------------------------------------
def test_killed_between_blocks_it_gives_the_same_bytes(perfect, tmp_path):
    one, two = task_of(perfect, tmp_path / "one"), task_of(perfect, tmp_path / "two")
    run_task(one)

    def kill(done: int, blocks: int, stage: str = "") -> None:
        if stage == "label" and done >= 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_task(two, None, kill)
    run_task(two)
    files = [contents(t.output) for t in (one, two)]
    for found in files:
        found.pop("task.json")
    assert files[0] == files[1]


def test_the_stored_task_is_the_task(perfect, tmp_path):
    task = task_of(perfect, tmp_path, method="agglomeration", merge_threshold=0.4, halo_nm=100.0)
    run_task(task)
    assert load_task(Path(task.output) / "task.json") == task
    assert task.halo == (13, 13, 13)
    assert task_of(perfect, tmp_path).halo == (25, 25, 25)
    assert task.cost("label").memory > 10 * 50 * 60 * 70


# -- decode ------------------------------------------------------------------------------------------------------------
def test_decode_reads_the_method_from_the_configuration(perfect, truth, tmp_path):
    root = Path(perfect).parents[2]
    by_class = {"mito": {"method": "mutex_watershed", "bias_short": 0.4, "bias_long": 0.6, "min_size_nm3": 0.0}}
    (result,) = decode_predictions(root, tmp_path / "labels", decode_parameters(["mito"], {}, by_class))
    assert result.objects == len(np.unique(truth)) - 1
    assert difference(read_labels(result.job.location), truth).voi_split == 0
    about = store.read_attrs(result.job.location)["connectomics"]
    assert about["decode"]["bias_long"] == 0.6
    (again,) = decode_predictions(root, tmp_path / "labels", decode_parameters(["mito"], {}, by_class))
    assert again.skipped


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"method": "mutex_watershed", "merge_threshold": 0.4}, "merge_threshold needs method agglomeration"),
        ({"method": "agglomeration", "bias_long": 0.4}, "bias_long needs method mutex_watershed"),
        ({"method": "cc3d", "stitch_threshold": 0.4}, "needs method mutex_watershed or agglomeration, got"),
        ({"method": "mutex_watershed", "bias_short": 1.5}, "bias_short must lie between 0 and 1"),
        ({"method": "mutex_watershed", "halo_nm": -8.0}, "halo_nm must be at least 0"),
        ({"method": "mutex_watershed", "boundary": "pm"}, "boundary separates objects"),
        ({"method": "mutex_watershed", "bias": 0.5}, "bias_"),
    ],
)
def test_parameters_of_another_method_are_refused(values, told):
    with pytest.raises(ConfigError, match=told):
        decode_parameters(["mito"], {}, {"mito": values})


def test_a_task_needs_a_method_of_affinities(perfect, tmp_path):
    with pytest.raises(ConfigError, match="expected method mutex_watershed or agglomeration, got cc3d"):
        task_of(perfect, tmp_path, method="cc3d")


# -- what is stored ----------------------------------------------------------------------------------------------------
@pytest.fixture
def small(tmp_path) -> str:
    ids = np.ones((4, 5, 6), np.uint8)
    return write_prediction(tmp_path, ids * 255, affinities_of(ids, OFFSETS[:4]), OFFSETS[:4], (8.0, 4.0, 5.24))


def test_offsets_are_those_in_nanometres(small):
    found = StoredAffinities.open(open_probabilities(small))
    assert found.offsets.tolist() == OFFSETS[:4].tolist()
    assert found.reach == (3, 1, 1)
    assert found.read((1, 1, 1), (2, 3, 4)).shape == (4, 2, 3, 4)


def _change(location: str, channel: int, **changes: object) -> None:
    place = Path(location) / "affinities" / str(channel)
    about = json.loads((place / ".zattrs").read_text())["connectomics"]
    update_attrs(place, {"connectomics": {**about, **changes}})


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        ({"complete": False}, IncompleteError, "only half written"),
        ({"artefact": "probability"}, MetadataError, "expected affinities written by predict, got probability"),
        ({"offset_nm": [4.0, 0.0, 0.0]}, MetadataError, "no whole number of voxels"),
        ({"offset_nm": None}, MetadataError, "expected the attribute offset_nm"),
        ({"offset_nm": [0.0, 4.0, 0.0]}, InputError, "differ from each other"),
    ],
)
def test_what_is_no_affinity_is_told_in_one_line(small, tmp_path, changes, error, told):
    _change(small, 0, **changes)
    task = task_of(small, tmp_path)
    with pytest.raises(error, match=told) as caught:
        run_task(task)
    assert "\n" not in str(caught.value)
    assert not Path(task.output).exists()


def test_affinities_that_are_not_there(small, tmp_path):
    shutil.rmtree(Path(small) / "affinities")
    with pytest.raises(MissingError, match="mito/affinities; train with a head of the kind affinities"):
        run_task(task_of(small, tmp_path))


def test_affinities_of_another_grid(small, tmp_path):
    other = cells((4, 5, 7), 3, 9.0)
    location = write_prediction(
        tmp_path / "other", other.astype(np.uint8), affinities_of(other, OFFSETS), OFFSETS, SIZE
    )
    shutil.rmtree(Path(small) / "affinities" / "2")
    shutil.copytree(Path(location) / "affinities" / "2", Path(small) / "affinities" / "2")
    with pytest.raises(MetadataError, match="another grid"):
        run_task(task_of(small, tmp_path))


def test_other_blocks_are_no_other_output(perfect, tmp_path):
    """Not of `free`: with other blocks a halo sees other things."""
    task = task_of(perfect, tmp_path)
    assert dataclasses.replace(task, block_shape=(20, 20, 20)).key != task.key
