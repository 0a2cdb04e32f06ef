"""Tuning of decoding on made probabilities whose truth is known voxel by voxel."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from connectomics.cli import main
from connectomics.config import load_config
from connectomics.config.values import plain
from connectomics.decoding.parameters import DecodeParameters, decode_parameters
from connectomics.errors import InputError, MissingError, UnknownNameError, WriteError
from connectomics.io.artifacts import about
from connectomics.io.multiscale import Multiscale
from connectomics.io.write import update_attrs, write_multiscale
from connectomics.pipeline.evaluate import evaluate
from connectomics.pipeline.tune import TunedClass, tune
from connectomics.pipeline.tune_space import threshold_of
from tests.cellmap.roots import grid_of, write_label, write_raw
from tests.decoding.affinity_kit import OFFSETS, affinities_of, write_prediction
from tests.decoding.decode_kit import decode_predictions

SHAPE = (24, 32, 32)
UNKNOWN = 255


def balls() -> np.ndarray:
    """Four balls, touching neither each other nor the border."""
    z, y, x = np.ogrid[: SHAPE[0], : SHAPE[1], : SHAPE[2]]
    ids = np.zeros(SHAPE, np.uint8)
    for number, (b, c) in enumerate(((8, 8), (8, 23), (23, 8), (23, 23)), start=1):
        ids[(z - 12) ** 2 + (y - b) ** 2 + (x - c) ** 2 <= 36] = number
    return ids


def probabilities(ids: np.ndarray, seed: int) -> np.ndarray:
    """Too low by far: balls at about 0.31, bridges between them and specks at 0.2, noise below 0.12."""
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 30, SHAPE)
    values[12, 8, :] = np.maximum(values[12, 8, :], 50)
    values[rng.random(SHAPE) < 0.002] = 50
    return np.where(ids > 0, 80 + rng.integers(-8, 9, SHAPE), values).astype(np.uint8)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``root`` with two annotated crops of mito (ids) and er (mask), part of each unknown, and ``predictions``."""
    return make(tmp_path_factory.mktemp("made"), ["mito"])


def make(folder: Path, with_ids: list[str]) -> Path:
    grid = grid_of(SHAPE)
    write_raw(folder / "root", "set-a", np.zeros(SHAPE, np.uint8), grid)
    for seed, crop in enumerate(("crop1", "crop2")):
        ids = balls()
        values = probabilities(ids, seed)
        ids[:, :, 30:] = UNKNOWN
        for name in with_ids:
            write_label(folder / "root", "set-a", crop, name, ids, grid, unknown=UNKNOWN, kind="instance")
        mask = np.where(ids == UNKNOWN, UNKNOWN, ids > 0).astype(np.uint8)
        write_label(folder / "root", "set-a", crop, "er", mask, grid, unknown=UNKNOWN)
        for name in (*with_ids, "er"):
            about = {"artefact": "probability", "class_name": name, "complete": True, "model": {"sha256": "abc"}}
            write_multiscale(
                folder / f"predictions/set-a.zarr/{crop}/{name}", values, grid, attrs={"connectomics": about}
            )
    return folder


@pytest.fixture(scope="module")
def tuned(made: Path) -> dict[str, TunedClass]:
    return tune(made / "predictions", str(made / "root"), made / "tuned", trials=20)


def test_crops_that_were_trained_on_are_named(made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    predictions = shutil.copytree(made / "predictions", tmp_path / "predictions")
    for number, crop in enumerate(("crop1", "crop2")):
        array = predictions / f"set-a.zarr/{crop}/er"
        update_attrs(array, {"connectomics": {**about(array), "model": {"seen_in_training": number == 0}}})
    tune(predictions, str(made / "root"), tmp_path / "tuned", classes=["er"])
    assert "1 of 2 crops was used for training (set-a/crop1)" in caplog.text


def test_a_threshold_is_found_where_probabilities_are_too_low(made: Path, tuned: dict[str, TunedClass]) -> None:
    mito = tuned["mito"]
    assert mito.measure == "combined"
    assert mito.crops == ("set-a/crop1", "set-a/crop2")
    assert mito.trials[0]["base"]
    assert mito.base_score == mito.trials[0]["score"] < 0.1
    assert mito.best_score > 0.6
    assert len(mito.trials) == 20
    assert {t["state"] for t in mito.trials} == {"complete", "pruned"}
    assert mito.best_score == max(t["score"] for t in mito.trials if t["state"] == "complete")
    assert (made / "tuned/tuning.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((made / "tuned/tuning.json").read_text())["classes"]["mito"] == plain(mito)


def test_decode_reads_what_was_chosen_and_evaluate_finds_the_same_score(
    made: Path, tuned: dict[str, TunedClass]
) -> None:
    config = load_config(made / "tuned/decoding.yaml")
    read = decode_parameters(["mito", "er"], config.decoding.default, config.decoding.classes)
    assert read == {name: tuned[name].best for name in ("mito", "er")}
    decode_predictions(made / "predictions", made / "labels", read)
    rows = evaluate(made / "labels", str(made / "root"), samples=10)["classes"]
    for name in ("mito", "er"):
        assert rows[name]["score"] == pytest.approx(tuned[name].best_score)


@pytest.mark.parametrize("rules", ["pq", "2026-07-affine"])
def test_other_rules_are_what_evaluate_finds_by_them(made: Path, tmp_path: Path, rules: str) -> None:
    found = tune(made / "predictions", str(made / "root"), tmp_path, trials=5, rules=rules)
    expected = {"mito": "pq", "er": "pq"} if rules == "pq" else {"mito": "combined", "er": "iou"}
    assert {name: t.measure for name, t in found.items()} == expected
    decode_predictions(made / "predictions", tmp_path / "labels", {name: t.best for name, t in found.items()})
    result = evaluate(tmp_path / "labels", str(made / "root"), samples=10, rules=rules)
    for name, tuned in found.items():
        assert result["classes"][name]["score"] == pytest.approx(tuned.best_score)
    written = json.loads((tmp_path / "tuning.json").read_text())
    assert (written["rules"], written["verified"]) == (rules, False)
    with pytest.raises(InputError, match="or rules"):
        tune(made / "predictions", str(made / "root"), tmp_path, trials=5, classes=["mito"])


def test_a_class_of_your_own_is_scored_by_instances_if_it_is_decoded_to_them(tmp_path: Path) -> None:
    base = {name: DecodeParameters(method="cc3d", min_size_nm3=1e4) for name in ("mito", "Own-1")}
    predictions, root = make(tmp_path, list(base)) / "predictions", str(tmp_path / "root")
    found = tune(predictions, root, tmp_path / "tuned", trials=5, base=base, classes=list(base))
    assert {name: tuned.measure for name, tuned in found.items()} == {"mito": "combined", "Own-1": "combined"}
    assert found["Own-1"].best_score == found["mito"].best_score
    labels, best = tmp_path / "labels", {name: tuned.best for name, tuned in found.items()} | {"er": base["mito"]}
    decode_predictions(predictions, labels, best)
    for rules in ("2026-06", "pq"):
        scores = evaluate(labels, root, samples=10, rules=rules)
        rows = scores["classes"]
        assert rows["mito"] == rows["Own-1"]
        assert scores["totals"]["instance"] == pytest.approx(rows["mito"]["score"])
        assert "rand_error" not in rows["er"]
    mask = DecodeParameters(threshold=best["Own-1"].threshold)
    decode_predictions(predictions, tmp_path / "masks", {**best, "Own-1": mask})
    assert "rand_error" not in evaluate(tmp_path / "masks", root, samples=10)["classes"]["Own-1"]
    shutil.rmtree(labels / "set-a.zarr/crop2/Own-1")  # as if only this crop were decoded to a mask
    shutil.move(tmp_path / "masks/set-a.zarr/crop2/Own-1", labels / "set-a.zarr/crop2")
    scores = evaluate(labels, root, samples=10)
    own = {row["crop"]: row for row in scores["crops"] if row["class"] == "Own-1"}
    assert ("score" in own["crop1"], "score" in own["crop2"]) == (True, False)
    assert scores["classes"]["Own-1"]["score"] == own["crop1"]["score"] == own["crop1"]["combined_score"]


def test_the_threshold_of_a_mask_is_the_best_of_all(made: Path, tuned: dict[str, TunedClass]) -> None:
    hits, wrong = np.zeros(256), np.zeros(256)
    for seed in (0, 1):
        ids = balls()
        values, truth = probabilities(ids, seed)[:, :, :30], ids[:, :, :30] > 0
        for level in range(256):
            mask = values > int(np.floor(threshold_of(level) * 255 + 1e-9))
            hits[level] += (mask & truth).sum()
            wrong[level] += (mask ^ truth).sum()
    iou = hits / (hits + wrong)
    er = tuned["er"]
    assert [t for t, _ in er.thresholds] == [threshold_of(level) for level in range(256)]
    np.testing.assert_allclose([score for _, score in er.thresholds], iou)
    assert er.best_score == iou.max()
    assert er.base_score == iou[127] == 0
    assert threshold_of(127) == 0.5


def test_a_search_goes_on_without_trials_twice(made: Path, tuned: dict[str, TunedClass], tmp_path: Path) -> None:
    options = {"classes": ["mito"], "base": {"mito": DecodeParameters(method="cc3d", threshold=0.2)}}
    arguments = (made / "predictions", str(made / "root"), tmp_path / "out")
    first = tune(*arguments, trials=3, **options)["mito"]
    same = tune(*arguments, trials=3, **options)["mito"]
    assert same == first
    more = tune(*arguments, trials=6, **options)["mito"]
    assert more.trials[:3] == first.trials
    assert [t["number"] for t in more.trials] == list(range(6))
    assert sum(t["base"] for t in more.trials) == 1
    assert more.best_score >= first.best_score >= first.base_score
    with pytest.raises(InputError, match="other predictions, labels, crops, base parameters or rules"):
        tune(*arguments, trials=3, classes=["mito"])


def test_trials_on_labels_that_were_corrected_are_not_continued(made: Path, tmp_path: Path) -> None:
    """Objects that were merged: as many present and known voxels as before, but other scores."""
    root = shutil.copytree(made / "root", tmp_path / "root")
    arguments = (made / "predictions", str(root), tmp_path / "out")
    tune(*arguments, trials=2, classes=["mito"])
    ids = balls()
    merged = np.where(ids > 0, (ids + 1) // 2, 0).astype(np.uint8)
    merged[:, :, 30:] = UNKNOWN
    shutil.rmtree(next(root.rglob("crop1/mito")))
    write_label(root, "set-a", "crop1", "mito", merged, grid_of(SHAPE), unknown=UNKNOWN, kind="instance")
    with pytest.raises(InputError, match="holds trials of mito on other predictions, labels, crops"):
        tune(*arguments, trials=2, classes=["mito"])


def test_time_ends_a_search_but_the_base_is_tried(made: Path, tmp_path: Path) -> None:
    found = tune(made / "predictions", str(made / "root"), tmp_path, classes=["mito"], trials=50, seconds=1e-6)
    assert [t["base"] for t in found["mito"].trials] == [True]
    assert found["mito"].best == found["mito"].base
    config = load_config(tmp_path / "decoding.yaml")
    assert set(config.decoding.classes) == {"mito", "er"}  # a class that was not tuned keeps its base


def test_objects_between_walls_are_scored_as_decode_makes_them(made: Path, tmp_path: Path) -> None:
    base = DecodeParameters(method="cc3d", threshold=0.25, boundary="er")
    arguments = (made / "predictions", str(made / "root"))
    found = tune(*arguments, tmp_path, classes=["mito"], trials=2, base={"mito": base})["mito"]
    assert found.best.boundary == "er"
    decode_predictions(made / "predictions", tmp_path / "labels", {"mito": found.best}, classes=["mito"])
    row = evaluate(tmp_path / "labels", str(made / "root"), samples=10)["classes"]["mito"]
    assert row["score"] == pytest.approx(found.best_score)


@pytest.mark.parametrize("height", ["distance", "boundary"])
def test_heads_are_scored_as_decode_reads_them(made: Path, tmp_path: Path, height: str) -> None:
    shutil.copytree(made / "predictions", tmp_path / "predictions")
    for crop in ("crop1", "crop2"):
        depth = ndimage.distance_transform_edt(balls() > 0) * 8.0
        values = 0.5 + np.tanh(depth / 40) / 2 if height == "distance" else 1.0 * ((depth > 0) & (depth < 12))
        about = {"artefact": height, "class_name": "mito", "scale_nm": 40.0, "complete": True}
        place = tmp_path / "predictions" / "set-a.zarr" / crop / "mito"
        grid = Multiscale.open(str(place)).grid
        stored = np.rint(255 * values).astype(np.uint8)
        write_multiscale(place / height, stored, grid, attrs={"connectomics": about})
    base = DecodeParameters(method="watershed", threshold=0.25, height=height, max_depth_nm=40.0)
    arguments = (tmp_path / "predictions", str(made / "root"))
    found = tune(*arguments, tmp_path / "out", classes=["mito"], trials=3, base={"mito": base})["mito"]
    assert {(t["parameters"]["method"], t["parameters"]["height"]) for t in found.trials} == {("watershed", height)}
    decode_predictions(tmp_path / "predictions", tmp_path / "labels", {"mito": found.best}, classes=["mito"])
    row = evaluate(tmp_path / "labels", str(made / "root"), samples=10)["classes"]["mito"]
    assert row["score"] == pytest.approx(found.best_score)
    assert found.best_score > 0.5


def test_a_small_space_is_searched_whole(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("connectomics.pipeline.tune_space._LEVELS", range(47, 48))
    base = {"er": DecodeParameters(fill_holes=True)}
    arguments = (made / "predictions", str(made / "root"), tmp_path)
    found = tune(*arguments, classes=["er"], trials=60, base=base)["er"]
    distinct = {json.dumps(t["parameters"]) for t in found.trials}
    assert len(distinct) == len(found.trials) < 60
    assert {t["parameters"]["threshold"] for t in found.trials} == {0.5, threshold_of(47)}
    assert found.measure == "iou"
    assert len(tune(*arguments, classes=["er"], trials=60, base=base)["er"].trials) == len(found.trials)


@pytest.mark.parametrize("method", ["mutex_watershed", pytest.param("agglomeration", marks=pytest.mark.slow)])
def test_limits_of_affinities_are_searched_where_the_base_reads_them(tmp_path: Path, method: str) -> None:
    """Objects that touch; their affinities are 0.4 within and 0.15 between, so the middle of 0.5 splits everything."""
    ids = np.zeros(SHAPE, np.uint8)
    ids[6:18, 6:26, 4:15], ids[6:18, 6:26, 15:27] = 1, 2
    grid = grid_of(SHAPE)
    write_raw(tmp_path / "root", "set-a", np.zeros(SHAPE, np.uint8), grid)
    write_label(tmp_path / "root", "set-a", "crop1", "mito", ids, grid, unknown=UNKNOWN, kind="instance")
    offsets = OFFSETS[:6]
    affinities = np.where(affinities_of(ids, offsets) > 0, 102, 38).astype(np.uint8)
    probability = (ids > 0).astype(np.uint8) * 250
    size = (float(grid.voxel_size[0]), float(grid.voxel_size[1]), float(grid.voxel_size[2]))
    made = write_prediction(tmp_path / "made", probability, affinities, offsets, size, translation=grid.translation)
    shutil.copytree(Path(made).parent, tmp_path / "predictions" / "set-a.zarr" / "crop1")
    base = {"mito": DecodeParameters(method=method)}
    found = tune(tmp_path / "predictions", str(tmp_path / "root"), tmp_path / "tuned", base=base, trials=25)["mito"]
    assert found.base_score < 0.5
    assert found.best_score > 0.9
    assert found.best.method == method
    limit = found.best.bias_short if method == "mutex_watershed" else found.best.merge_threshold
    assert 0.15 <= limit <= 0.4
    labels = decode_predictions(tmp_path / "predictions", tmp_path / "labels", {"mito": found.best})
    assert labels[0].objects == 2


def test_bad_input_is_one_line(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predictions, root = made / "predictions", str(made / "root")
    with pytest.raises(UnknownNameError, match="did you mean 'mito'"):
        tune(predictions, root, tmp_path, classes=["mitto"])
    with pytest.raises(MissingError, match="no predictions in"):
        tune(tmp_path / "nowhere", root, tmp_path)
    with pytest.raises(InputError, match="at least one trial"):
        tune(predictions, root, tmp_path, trials=0)
    write_raw(tmp_path / "bare", "set-b", np.zeros(SHAPE, np.uint8), grid_of(SHAPE))
    with pytest.raises(MissingError, match="no annotated voxel of er, mito"):
        tune(predictions, str(tmp_path / "bare"), tmp_path / "out")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/tune.sqlite3").write_text("this is no data base, however long one reads in it\n" * 40)
    with pytest.raises(WriteError, match="cannot keep trials in"):
        tune(predictions, root, tmp_path / "broken", classes=["mito"])
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingError, match=r"pip install 'connectomics-cellmap\[tune\]'"):
        tune(predictions, root, tmp_path / "out", classes=["mito"])
    assert tune(predictions, root, tmp_path / "out", classes=["er"])["er"].best_score > 0.9  # needs no search


def test_the_verb_prints_a_table(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [made / "predictions", made / "root", "--out", tmp_path, "--trials", 2, "--class", "mito"]
    assert main(["tune", *map(str, arguments), "decoding.classes.mito.threshold=0.25"]) == 0
    text = capsys.readouterr().out
    assert "mito" in text
    assert str(tmp_path / "decoding.yaml") in text
    assert json.loads((tmp_path / "tuning.json").read_text())["classes"]["mito"]["base"]["threshold"] == 0.25
