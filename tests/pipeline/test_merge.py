"""Merging predictions: the choice by validation score, means across voxel sizes, and the submission."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray

from connectomics.cellmap.crop_table import CropTable, TableEntry
from connectomics.cli import main
from connectomics.config import RunConfig, load_config, save_config
from connectomics.config.values import plain
from connectomics.decoding.average_task import AverageTask
from connectomics.decoding.parameters import DecodeParameters
from connectomics.errors import InputError, MissingError, UnknownNameError, WriteError
from connectomics.geometry import Box, VoxelGrid
from connectomics.inference.artifact import save_cellmap_predictions
from connectomics.io.artifacts import about
from connectomics.io.multiscale import Multiscale
from connectomics.io.write import create_multiscale, update_attrs
from connectomics.pipeline.merge import merge
from connectomics.pipeline.merge_choice import Candidate, choose
from connectomics.pipeline.results import Probabilities
from connectomics.pipeline.tune import tune
from connectomics.pipeline.tune_results import ClassScore, tuned_scores
from connectomics.tasks import run_task
from tests.cellmap.roots import grid_of, write_label, write_raw
from tests.pipeline.test_predict_crops import config_of, root, save_checkpoint  # noqa: F401  (root is a fixture)

FINE, COARSE = grid_of((24, 24, 24), 8, 64), grid_of((12, 12, 12), 16, 64)
RULES = ("2026-06", "2026-07-affine")
TABLE = CropTable((TableEntry(7, "one", "mito", FINE), TableEntry(7, "one", "er", FINE)))


def ramp(grid: VoxelGrid, scale: float = 1.0) -> NDArray[np.float32]:
    """Probabilities that rise along x with the position: the same function of nm on every grid."""
    values = (grid.axes()[2] - 64) / 192 * scale
    return np.broadcast_to(values, grid.shape).astype(np.float32)


def predicted(folder: Path, grid: VoxelGrid, classes: dict[str, NDArray[np.float32]], crop: str = "crop7") -> Path:
    save_cellmap_predictions(np.stack(list(classes.values())), folder / "one.zarr" / crop, list(classes), grid)
    return folder


def tuned(
    folder: Path, scores: dict[str, float], measure: str = "iou", crop: str = "one/crop1", rules: str = "2026-06"
) -> Path:
    folder.mkdir(parents=True)
    rows: dict[str, Any] = {
        name: {
            "measure": measure, "crops": [crop], "best_score": score,
            "best": plain(DecodeParameters(threshold=round(score, 2))),
        }
        for name, score in scores.items()
    }  # fmt: skip
    (folder / "tuning.json").write_text(json.dumps({"rules": rules, "classes": rows}))
    return folder


def stored(folder: Path, name: str, crop: str = "crop7") -> NDArray[Any]:
    source = Multiscale.open(str(folder / "one.zarr" / crop / name))
    return source.read_level(0, (0, 0, 0), source.grid.shape)[0]


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """Two predictions of one function, at 8 and at 16 nm; the first also has er."""
    first = predicted(tmp_path / "first", FINE, {"mito": ramp(FINE), "er": ramp(FINE, 0.5)})
    return first, predicted(tmp_path / "second", COARSE, {"mito": ramp(COARSE)})


# -- the choice --------------------------------------------------------------------------------------------------------
def candidate(folder: Path, **scores: float) -> Candidate:
    return Candidate(folder, {name: ClassScore("iou", score) for name, score in scores.items()})


def test_the_best_by_score_is_chosen_for_each_class(two: tuple[Path, Path]) -> None:
    first, second = two
    found = choose([candidate(first, mito=0.6), candidate(second, mito=0.7)])
    assert found["mito"].used == (second,)
    assert found["mito"].ranked == (second, first)
    assert found["er"].used == (first,)  # the only one; it needs no score
    found = choose([candidate(first, mito=0.7), candidate(second, mito=0.7)], average=5)
    assert found["mito"].used == (first, second)  # of equals the first
    assert (found["mito"].average, found["er"].average) == (2, 1)


def test_heads_are_not_averaged(two: tuple[Path, Path]) -> None:
    scored = [candidate(path, mito=0.5) for path in two]
    heads = DecodeParameters(method="watershed", height="distance")
    assert choose(scored, average=2, parameters={"mito": heads})["mito"].average == 1
    assert choose(scored, average=2)["mito"].average == 2


def test_scores_that_cannot_be_compared(two: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = two
    with pytest.raises(InputError, match="second has no validation score of it; give --tuned"):
        choose([candidate(first, mito=0.6), candidate(second)])
    other = Candidate(second, {"mito": ClassScore("dice", 0.9)})
    with pytest.raises(InputError, match=r"different measures \(dice, iou\)"):
        choose([candidate(first, mito=0.6), other])
    with pytest.raises(MissingError, match="no predictions"):
        choose([Candidate(tmp_path)])
    both = [tuned_scores(tuned(tmp_path / rules, {"mito": 0.5}, "combined", rules=rules)) for rules in RULES[:2]]
    with pytest.raises(InputError, match=rf"different measures \(combined, combined by {RULES[1]}\)"):
        choose([Candidate(first, both[0]), Candidate(second, both[1])])
    with pytest.raises(UnknownNameError, match="mitos"):
        choose([candidate(first)], classes=["mitos"])
    with pytest.raises(MissingError, match=r"tuning\.json"):
        tuned_scores(tmp_path)


def test_tuned_folders_in_another_order(
    two: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What tune wrote names the network, so that no prediction gets the scores and parameters of another one."""
    root = tmp_path / "root"  # noqa: F811
    write_raw(root, "one", np.zeros(FINE.shape, np.uint8), FINE, levels=1)
    write_label(root, "one", "crop1", "mito", (ramp(FINE) > 0.5).astype(np.uint8), FINE)
    folders = []
    for name, folder, scale in (("a", two[0], 1.0), ("b", two[1], 0.5)):
        predicted(tmp_path / name, FINE, {"mito": ramp(FINE, scale)}, crop="crop1")
        for place in [*folder.glob("one.zarr/crop7/[em]*"), tmp_path / name / "one.zarr/crop1/mito"]:
            update_attrs(place, {"connectomics": about(place) | {"model": {"checkpoint": f"hash of {name}"}}})
        tune(tmp_path / name, str(root), tmp_path / f"tuned-{name}", trials=2)
        folders.append(tmp_path / f"tuned-{name}")
    assert merge(two, out=tmp_path / "merged", tuned=folders).choices["mito"].scores.keys() == set(map(str, two))
    with pytest.raises(InputError, match=r"tuned-b was tuned on .* of the network of \S*second, not of that of"):
        merge(two, out=tmp_path / "other", tuned=folders[::-1])
    merge([two[0]], out=tmp_path / "one", tuned=[folders[1]])
    assert f"{folders[1]} was tuned on predictions of another network than {two[0]}" in caplog.text


def test_scores_are_looked_for_before_anything_is_predicted(root: Path, tmp_path: Path) -> None:  # noqa: F811
    """Runs without a validation: it was said once all of them were predicted."""
    config, runs = config_of(root), [tmp_path / "one", tmp_path / "two"]
    for number, run in enumerate(runs):
        (run / "checkpoints").mkdir(parents=True)
        save_checkpoint(run / "checkpoints/last.ckpt", config, number)
        save_config(config, run / "config.yaml")
    with pytest.raises(InputError, match=r"2 predictions have er, but .* has no validation score of it; give --tuned"):
        merge(runs, out=tmp_path / "merged")
    assert not list((tmp_path / "merged").glob("*"))
    with pytest.raises(InputError, match="one is given twice"):
        merge([runs[0], runs[0]], out=tmp_path / "merged")
    assert merge(runs[:1], out=tmp_path / "merged").choices.keys() == {"er", "mito"}


# -- means -------------------------------------------------------------------------------------------------------------
def test_a_mean_across_voxel_sizes_is_the_mean_on_the_grid(two: tuple[Path, Path], tmp_path: Path) -> None:
    """Both hold the same linear function, which resampling keeps; with blocks smaller than the array."""
    places = [str(folder / "one.zarr/crop7/mito") for folder in two]
    task = AverageTask(tuple(places), str(tmp_path / "mean/one.zarr/crop7/mito"), FINE, "float16", (64, 64, 8))
    assert run_task(task)
    assert not run_task(task)
    assert not list((tmp_path / "mean").rglob(".*partial*"))
    inner = (slice(None), slice(None), slice(2, -2))  # the coarse one repeats its last value at the border
    assert np.abs(stored(tmp_path / "mean", "mito").astype(float) - ramp(FINE))[inner].max() < 1 / 255
    whole = AverageTask(tuple(places), str(tmp_path / "whole/one.zarr/crop7/mito"), FINE, "float16")
    run_task(whole)
    assert np.array_equal(stored(tmp_path / "mean", "mito"), stored(tmp_path / "whole", "mito"))


def test_a_mean_of_different_values(tmp_path: Path) -> None:
    values = [np.full(FINE.shape, v, np.float32) for v in (0.2, 0.4, 0.9)]
    folders = [predicted(tmp_path / str(n), FINE, {"mito": value}) for n, value in enumerate(values)]
    target = tmp_path / "mean/one.zarr/crop7/mito"
    task = AverageTask(tuple(str(folder / "one.zarr/crop7/mito") for folder in folders), str(target), FINE)
    run_task(task)
    assert set(np.unique(stored(tmp_path / "mean", "mito"))) == {round((51 + 102 + 230) / 3)}
    other = replace(task, inputs=task.inputs[:2])
    with pytest.raises(WriteError, match="--overwrite"):
        run_task(other)
    assert run_task(other, overwrite=True)
    assert set(np.unique(stored(tmp_path / "mean", "mito"))) == {76}  # 76.5 to the even number


def test_a_prediction_that_does_not_cover_the_mean(two: tuple[Path, Path], tmp_path: Path) -> None:
    small = predicted(
        tmp_path / "small", FINE.crop((0, 0, 0), (24, 24, 12)), {"mito": np.zeros((24, 24, 12), np.float32)}
    )
    places = (str(two[0] / "one.zarr/crop7/mito"), str(small / "one.zarr/crop7/mito"))
    with pytest.raises(InputError, match="less than"):
        run_task(AverageTask(places, str(tmp_path / "mean/one.zarr/crop7/mito"), FINE))
    with pytest.raises(InputError, match="at least two predictions"):
        AverageTask(places[:1], str(tmp_path / "x"), FINE)


def test_thick_sections_are_no_tolerance_within_a_section(tmp_path: Path) -> None:
    """Nine of thirty columns are missing in one prediction: a mean with 0 would halve the other's probability there."""
    grid = VoxelGrid((40, 4, 4), (20, 2, 2), (6, 20, 30))
    folders = [
        predicted(tmp_path / str(part.shape[2]), part, {"mito": np.ones(part.shape, np.float32)})
        for part in (grid, grid.crop((0, 0, 0), (6, 20, 21)))
    ]
    places = tuple(str(folder / "one.zarr/crop7/mito") for folder in folders)
    with pytest.raises(InputError, match="less than"):
        run_task(AverageTask(places, str(tmp_path / "mean/one.zarr/crop7/mito"), grid))


def test_where_grids_end_differently_the_mean_is_of_what_is_there(tmp_path: Path) -> None:
    """A crop of 100 nm ends at 105 nm in voxels of 7 nm, and at 100 nm in voxels of 10 nm."""
    fine, coarse = (VoxelGrid.covering(Box((0, 0, 0), (100, 100, 100)), (size,) * 3) for size in (7.0, 10.0))
    folders = [
        predicted(tmp_path / str(n), grid, {"mito": np.full(grid.shape, value, np.float32)})
        for n, (grid, value) in enumerate([(fine, 0.8), (coarse, 0.4)])
    ]
    places = tuple(str(folder / "one.zarr/crop7/mito") for folder in folders)
    run_task(AverageTask(places, str(tmp_path / "mean/one.zarr/crop7/mito"), fine))
    found = stored(tmp_path / "mean", "mito")
    assert np.all(found[:14, :14, :14] == round(0.6 * 255))
    assert np.all(found[14] == round(0.8 * 255))


# -- the submission ----------------------------------------------------------------------------------------------------
def test_one_submission_of_two_runs(two: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = two
    scores = [tuned(tmp_path / "t1", {"mito": 0.6, "er": 0.25}), tuned(tmp_path / "t2", {"mito": 0.7})]
    out = tmp_path / "submission.zip"
    made = merge(two, out=out, tuned=scores, crops=TABLE)
    assert made.submission is not None
    assert made.submission.written == ("crop7/er", "crop7/mito")
    assert not made.submission.has_errors
    rows = json.loads((tmp_path / "submission.merge/merge.json").read_text())["classes"]
    assert rows["mito"]["used"] == [str(second)]
    assert rows["mito"]["scores"] == {str(first): 0.6, str(second): 0.7}
    array = zarr.open_array(zarr.storage.ZipStore(out, mode="r"), path="crop7/mito", mode="r")
    assert array.shape == FINE.shape
    values = np.asarray(array[:])
    # present where the coarse prediction is above 0.7; decoded at 16 nm, so right to half of its voxel
    assert np.argmax(values[12, 12] > 0) == pytest.approx(0.7 * 24, abs=1.01)
    er = zarr.open_array(zarr.storage.ZipStore(out, mode="r"), path="crop7/er", mode="r")[:]
    assert np.array_equal(np.asarray(er) > 0, stored(first, "er") > 63)

    inode = (tmp_path / "submission.merge/probabilities/one.zarr/crop7/er/s0/0/0/0").stat().st_ino
    again = merge(two, out=out, tuned=scores, crops=TABLE)  # nothing is made twice, and nothing is refused
    assert again.submission is not None
    assert (tmp_path / "submission.merge/probabilities/one.zarr/crop7/er/s0/0/0/0").stat().st_ino == inode


def test_the_mean_is_decoded(two: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = [tuned(tmp_path / "t1", {"mito": 0.6, "er": 0.25}), tuned(tmp_path / "t2", {"mito": 0.7})]
    TABLE.save(tmp_path / "table.csv")
    words = ["merge", str(tmp_path / "merged"), *map(str, two), "--tuned", str(scores[0]), "--tuned", str(scores[1])]
    assert main([*words, "--crops", str(tmp_path / "table.csv"), "--average", "2"]) == 0
    assert f"{two[1]} + {two[0]}" in capsys.readouterr().out
    assert (tmp_path / "merged/decoding.yaml").read_text().startswith("# written by pytc merge")
    inner = stored(tmp_path / "merged", "mito")[:, :, 2:-2]
    assert np.abs(inner - 255 * ramp(FINE)[:, :, 2:-2]).max() <= 1
    config = ["--config", str(tmp_path / "merged/decoding.yaml")]
    assert main(["decode", str(tmp_path / "merged"), str(tmp_path / "labels"), *config]) == 0
    assert np.array_equal(stored(tmp_path / "labels", "mito") > 0, stored(tmp_path / "merged", "mito") > 178)

    assert main([*words, "--crops", str(tmp_path / "table.csv")]) == 1  # the merged folder holds the mean
    assert "--overwrite" in capsys.readouterr().err
    assert main([*words, "--crops", str(tmp_path / "table.csv"), "--overwrite"]) == 0
    assert np.array_equal(stored(tmp_path / "merged", "mito"), stored(two[1], "mito"))


def test_a_crop_that_only_the_second_best_has(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = predicted(tmp_path / "first", FINE, {"mito": ramp(FINE)})
    predicted(first, FINE, {"mito": ramp(FINE, 0.5)}, crop="crop8")
    second = predicted(tmp_path / "second", FINE, {"mito": ramp(FINE, 0.25)})
    scores = [tuned(tmp_path / "t1", {"mito": 0.6}), tuned(tmp_path / "t2", {"mito": 0.7})]
    merge([first, second], out=tmp_path / "merged", tuned=scores)
    assert np.array_equal(stored(tmp_path / "merged", "mito"), stored(second, "mito"))
    assert np.array_equal(stored(tmp_path / "merged", "mito", "crop8"), stored(first, "mito", "crop8"))
    assert f"one/crop8: mito is from {first}, since {second} lacks the crop, but is decoded with" in caplog.text


def test_the_default_of_the_configuration_is_for_classes_without_tuned_parameters(
    two: tuple[Path, Path], tmp_path: Path
) -> None:
    config = RunConfig()
    config.decoding.default = {"threshold": 0.25}
    found = merge([two[0]], out=tmp_path / "a", config=config).choices
    assert {name: choice.parameters.threshold for name, choice in found.items()} == {"mito": 0.25, "er": 0.25}
    found = merge([two[0]], out=tmp_path / "b", config=config, tuned=[tuned(tmp_path / "t", {"mito": 0.75})]).choices
    assert {name: choice.parameters.threshold for name, choice in found.items()} == {"mito": 0.75, "er": 0.25}


def test_runs_are_decoded_as_their_configurations_say(two: tuple[Path, Path], tmp_path: Path) -> None:
    config = RunConfig()
    config.decoding.classes = {"mito": {"threshold": 0.75, "method": "cc3d", "min_size_nm3": 5.0}}
    one = Probabilities(two[0], config)
    found = merge([one], out=tmp_path / "a").choices
    assert found["mito"].parameters == DecodeParameters(threshold=0.75, method="cc3d", min_size_nm3=5.0)
    assert found["er"].parameters.threshold == 0.5
    chosen = tuned(tmp_path / "t", {"mito": 0.6})
    assert merge([one], out=tmp_path / "b", tuned=[chosen]).choices["mito"].parameters.threshold == 0.6
    mine = RunConfig()
    mine.decoding.default = {"threshold": 0.25}
    assert merge([one], out=tmp_path / "c", config=mine).choices["mito"].parameters.threshold == 0.25


def test_merged_arrays_have_the_format_of_what_they_are_from(tmp_path: Path) -> None:
    for name, scale in (("first", 1.0), ("second", 0.5)):
        plain_one = predicted(tmp_path / "0.4" / name, FINE, {"mito": ramp(FINE, scale)})
        place = tmp_path / name / "one.zarr/crop7/mito"
        said = {"connectomics": about(plain_one / "one.zarr/crop7/mito")}
        (writer,) = create_multiscale(place, [FINE], "uint8", chunks=(8, 8, 8), shards=(16, 16, 16), attrs=said)
        writer.write((0, 0, 0), stored(plain_one, "mito"))
    scores = [tuned(tmp_path / "t1", {"mito": 0.6}), tuned(tmp_path / "t2", {"mito": 0.5})]
    merge([tmp_path / "first", tmp_path / "second"], out=tmp_path / "best", tuned=scores, classes=["mito"])
    merge([tmp_path / "first", tmp_path / "second"], out=tmp_path / "mean", tuned=scores, classes=["mito"], average=2)
    for name, expected in (("best", 1.0), ("mean", 0.75)):
        group = zarr.open_group(tmp_path / name / "one.zarr", mode="r", zarr_format=3)
        found = np.asarray(group["crop7/mito/s0"][:])
        assert np.abs(found / 255 - ramp(FINE, expected)).max() < 0.01
        assert np.array_equal(stored(tmp_path / name, "mito"), found)


def test_what_an_earlier_merge_left_is_not_packed(tmp_path: Path) -> None:
    """A run is left out, and its class is in no other: it was packed all the same."""
    first = predicted(tmp_path / "first", FINE, {"mito": ramp(FINE)})
    second = predicted(tmp_path / "second", FINE, {"er": ramp(FINE)})
    out = tmp_path / "s.zip"
    merge([first, second], out=out, crops=TABLE)
    with pytest.raises(WriteError, match="holds one/crop7/er of an earlier merge"):
        merge([first], out=out, crops=TABLE)
    packed = merge([first], out=out, crops=TABLE, overwrite=True).submission
    assert packed is not None
    assert set(zarr.open_group(zarr.storage.ZipStore(out), mode="r")["crop7"]) == {"mito"}
    merge([first, second], out=out, crops=TABLE, classes=["er"])  # adds a class
    assert stored(tmp_path / "s.merge/labels", "mito").any()


def test_a_boundary_that_is_left_out(two: tuple[Path, Path], tmp_path: Path) -> None:
    config = load_config(None, ["decoding.classes.mito.boundary=er"])
    with pytest.raises(MissingError, match=r"no prediction of er at .*, the boundary that mito is decoded with"):
        merge([two[0]], out=tmp_path / "x.zip", crops=TABLE, classes=["mito"], config=config)
    merge([two[0]], out=tmp_path / "y.zip", crops=TABLE, config=config)


def test_what_is_refused(two: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing to merge"):
        merge([], out=tmp_path / "x")
    with pytest.raises(InputError, match="one folder for each of the 2 sources, got 1"):
        merge(two, out=tmp_path / "x", tuned=[tmp_path])
    with pytest.raises(MissingError, match="does not exist"):
        merge([tmp_path / "none"], out=tmp_path / "x")
    with pytest.raises(InputError, match="given twice"):
        merge([two[0], two[0]], out=tmp_path / "x")
    with pytest.raises(InputError, match="one of the predictions"):
        merge([two[0]], out=two[0])
    with pytest.raises(InputError, match="at least 1"):
        merge([two[0]], out=tmp_path / "x", average=0)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/state.json").write_text("{}")  # of a training, as RUN RUN without an output would be
    with pytest.raises(WriteError, match="run was not written by merge"):
        merge([two[0]], out=tmp_path / "run")
    (tmp_path / "x/one.zarr/crop7/er").mkdir(parents=True)
    with pytest.raises(WriteError, match="was not written by merge"):
        merge([two[0]], out=tmp_path / "x", overwrite=True)
