"""Small parts of the page: charts, numbers, metrics, scores."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest

from connectomics.cellmap.catalog import Catalog
from connectomics.cellmap.crop_table import CropTable, TableEntry
from connectomics.config import load_config
from connectomics.errors import MetadataError
from connectomics.inference.artifact import save_cellmap_predictions
from connectomics.io.artifacts import about
from connectomics.io.write import update_attrs
from connectomics.metrics.challenge.results import TOO_MANY, InstanceScore
from connectomics.pages import charts, page
from connectomics.pages.report import data_summary, run_folder, scores, training
from connectomics.pages.report.crops import choose, extremes, ranked
from connectomics.pages.report.library import Wanted
from connectomics.pages.report.scores import Scores
from connectomics.pipeline.apply_edits import apply_edits
from connectomics.pipeline.decode import decode
from connectomics.pipeline.evaluate import evaluate
from connectomics.pipeline.export import export
from connectomics.pipeline.report import report
from connectomics.pipeline.score import score
from tests.cellmap.roots import grid_of, write_label, write_raw

from .conftest import Made


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (0, 29, [0, 10, 20]), (3, 4.1, [3, 3.5, 4]), (2, 2, [2])],
)
def test_axes_have_round_ticks(low: float, high: float, expected: list[float]) -> None:
    assert charts.ticks(low, high) == pytest.approx(expected)


def test_long_curves_are_thinned_by_means() -> None:
    x = np.arange(1000.0)
    thin_x, thin_y = charts.thin(x, 2 * x, most=10)
    assert len(thin_x) == 10
    assert thin_x[0] == pytest.approx(np.mean(x[:100]))
    assert np.allclose(thin_y, 2 * thin_x)
    assert charts.thin(x[:5], x[:5]) == (pytest.approx(x[:5]), pytest.approx(x[:5]))


def test_a_line_chart_holds_every_series_by_name_within_its_frame() -> None:
    rng = np.random.default_rng(0)
    made = [charts.Series(f"class {k}", np.arange(50.0), rng.random(50)) for k in range(12)]
    chart = charts.line_chart(made, "Dice", "epoch", (0.0, 1.0))
    assert all(f">class {k}</text>" in chart for k in range(12))
    heights = [float(y) for y in re.findall(r'class="end[^"]*" x="[\d.]+" y="([\d.-]+)"', chart)]
    assert all(b - a >= charts.LINE - 0.2 for a, b in itertools.pairwise(heights))
    points = re.findall(r"([\d.-]+),([\d.-]+)", " ".join(re.findall(r'points="([^"]*)"', chart)))
    assert all(0 <= float(x) <= charts.WIDTH and 0 <= float(y) <= charts.HEIGHT for x, y in points)


def test_a_chart_of_one_point_is_drawn() -> None:
    assert "<circle" in charts.line_chart([charts.Series("a", np.array([3.0]), np.array([0.0]))], "t", "epoch")


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.84, "0.8 s"), (42.3, "42 s"), (59.7, "1 min 00 s"), (200, "3 min 20 s"), (3 * 3600 + 305, "3 h 05 min")],
)
def test_times_are_written_for_people(value: float, shown: str) -> None:
    assert page.seconds(value) == shown


def test_numbers_are_written_for_people() -> None:
    assert page.nm((5.24, 4.0, 4.0)) == "5.24 × 4 × 4"
    assert page.number(-0.001) == "0"
    assert page.count(1234567) == "1\u2009234\u2009567"
    assert page.size(999) == "999 B"
    assert page.size(223_400) == "223.4 kB"
    assert [page.percent(s) for s in (0, 0.00005, 0.0042, 0.047, 0.998)] == [
        "0 %",
        "< 0.01 %",
        "0.42 %",
        "4.7 %",
        "100 %",
    ]
    assert page.score(1 / 3) == '<data value="0.3333333333333333">0.333</data>'
    assert "–" in page.score(None)
    assert "–" in page.score(float("nan"))


def test_metrics_are_read_column_by_column_without_gaps(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(
        "epoch,step,train/loss,val/dice\n0,4,0.9,\n0,4,,0.5\n1,9,nan,\n,12,0.4,\n1,9,,0.75,surplus\n"
    )
    columns = run_folder.read_metrics(tmp_path)
    assert columns == {"train/loss": [(0, 4, 0.9), (1, 12, 0.4)], "val/dice": [(0, 4, 0.5), (1, 9, 0.75)]}


def test_metrics_with_nothing_in_them_are_said(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("epoch,step,something\n0,1,3\n")
    assert "holds no losses or scores" in training.curves(tmp_path)
    (tmp_path / "metrics.csv").write_text("")
    assert "holds no losses or scores" in training.curves(tmp_path)


def test_a_broken_configuration_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("a: [1,\n")
    with pytest.raises(MetadataError, match=r"config\.yaml"):
        run_folder.read_config(tmp_path)


def test_scores_of_the_official_scorer_are_read_as_they_are(shared_reference: Path, tmp_path: Path) -> None:
    expected = json.loads((shared_reference / "official_scorer/submissions/expected.json").read_text())
    for name, content in expected.items():
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(content))
        table = Scores.load(path)
        assert table.overall == content["overall_score"]
        assert len(table.results) == content["num_evals_done"]
        body = scores.section(table, None, {})
        for entry in content["label_scores"].values():
            assert repr(float(entry.get("combined_score", entry.get("iou")))) in body


def test_crops_and_classes_are_ranked_from_worst_to_best(made: Made) -> None:
    table = Scores.load(made.root / "scores/scores.json")
    by_crop = table.by_crop()
    means = [scores.mean_score(results) for results in by_crop.values()]
    assert means == sorted(means)
    for results in by_crop.values():
        values = [scores.rank_value(r) for r in results]
        assert values == sorted(values)
    wanted = [Wanted("d", crop, name, None) for crop in ("crop7", "crop8", "crop9") for name in ("er", "mito", "zz")]
    order = ranked(wanted, table)
    assert [crop for _, crop in order] == ["crop9", "crop7", "crop8"]
    assert order["d", "crop9"][-1].class_name == "zz"


def test_a_limit_takes_the_worst_of_every_crop_first() -> None:
    crops = {("d", c): [Wanted("d", c, n, None) for n in ("x", "y", "z")] for c in ("a", "b")}
    assert {(w.crop, w.class_name) for w in choose(crops, 3)} == {("a", "x"), ("b", "x"), ("a", "y")}
    assert choose(crops, 0) == set()
    assert len(choose(crops, 99)) == 6


def test_an_evaluation_is_shown_with_intervals_worst_first(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    classes = {"mito": {"dice": 0.8, "iou": 0.67, "crops": 2, "dice_interval": [0.7, 0.9]}, "er": {"dice": None}}
    rows = [{"dataset": "d", "crop": f"crop{k}", "class": "mito", "dice": k / 10} for k in (9, 3)]
    path.write_text(json.dumps({"classes": classes, "crops": rows}))
    body = scores.evaluation_section(path)
    assert body.index("crop3") < body.index("crop9")
    assert re.search(r"0\.70</data> to <data[^>]*>0\.90", body)
    assert "bootstrap over crops" in body
    assert "in one crop only has none" in body


def test_scores_of_other_labels_than_those_shown_are_named(tmp_path: Path) -> None:
    """Evaluated, then decoded with another threshold: the pictures are not of what was scored."""
    grid = grid_of((8, 8, 8))
    write_raw(tmp_path, "one", np.zeros(grid.shape, np.uint8), grid, levels=1)
    write_label(tmp_path, "one", "crop1", "er", np.eye(8, dtype=np.uint8)[None].repeat(8, 0), grid)
    save_cellmap_predictions(np.full((1, 8, 8, 8), 0.6), tmp_path / "found/one.zarr/crop1", ["er"], grid)
    labels, path = tmp_path / "labels", tmp_path / "evaluation.json"
    decode(tmp_path / "found", out=labels, config=load_config(None))
    evaluate(labels, str(tmp_path), out=path)
    assert "other labels" not in scores.evaluation_section(path, labels)
    decode(
        tmp_path / "found", out=labels, config=load_config(None, "decoding.default={threshold: 0.7}"), overwrite=True
    )
    found = scores.evaluation_section(path, labels)
    assert f"of other labels than {labels} holds now, for 1 of 1 array (one/crop1/er); run" in found
    assert "other labels" not in scores.evaluation_section(path)


def test_scores_of_another_submission_than_the_shown_labels_are_named(tmp_path: Path) -> None:
    """Packed and scored, then decoded with another threshold. A submission has no IDs, but says how it was made."""
    grid, table = grid_of((8, 8, 8)), CropTable((TableEntry(1, "one", "er", grid_of((8, 8, 8))),))
    save_cellmap_predictions(np.full((1, 8, 8, 8), 0.6), tmp_path / "found/one.zarr/crop1", ["er"], grid)
    labels, page = tmp_path / "labels", tmp_path / "report.html"
    packed = [tmp_path / name for name in ("s.zip", "other.zip")]
    decode(tmp_path / "found", out=labels, config=load_config(None))
    export(labels, packed[0], crops=table)
    export(labels, tmp_path / "truth", crops=table)
    for number, source in enumerate((packed[0], labels)):
        found = score(source, tmp_path / "truth", out=tmp_path / f"scores{number}")
        assert found["submission"] == str(source)
        for shown in ({"labels": labels}, {"submission": packed[0], "crop_table": table}):
            assert "These scores are of" not in report(found, out=page, **shown).read_text()
    other = load_config(None, "decoding.default={threshold: 0.7}")
    decode(tmp_path / "found", out=labels, config=other, overwrite=True)
    export(labels, packed[1], crops=table)
    for number, scored in enumerate((packed[0], labels)):
        path = tmp_path / f"scores{number}/scores.json"
        for shown in ({"labels": labels}, {"submission": packed[1], "crop_table": table}):
            place = next(iter(shown.values()))
            note = f"These scores are of other labels ({scored}) than {place} holds now, for 1 of 1 array (crop1/er)"
            assert note in report(out=page, scores=path, **shown).read_text()


def test_a_submission_that_was_packed_before_edits_is_named(tmp_path: Path) -> None:
    """Edited labels are of the same network and decoding: only the edits tell them from what was packed."""
    grid = grid_of((8, 8, 8))
    table = CropTable((TableEntry(1, "one", "mito", grid), TableEntry(1, "one", "er", grid)))
    found, edited, out = tmp_path / "found", tmp_path / "edited", tmp_path / "report.html"
    objects = np.full((2, 8, 8, 8), 0.1)
    objects[:, :3], objects[:, 5:] = 0.9, 0.8
    save_cellmap_predictions(objects, found / "one.zarr/crop1", ["mito", "er"], grid)
    mine = load_config(None, "decoding.default.min_size_nm3=0")
    labels = decode(found, out=tmp_path / "labels", config=mine).folder
    (tmp_path / "log.jsonl").write_text('{"op": "delete", "class": "mito", "id": 1}\n')
    apply_edits(labels, tmp_path / "log.jsonl", out=edited)
    (tmp_path / "none.jsonl").write_text("")
    copied = apply_edits(edited, tmp_path / "none.jsonl", out=tmp_path / "copied").folder
    before, after = (export(folder, tmp_path / f"{folder.name}.zip", crops=table).path for folder in (labels, edited))
    export(labels, tmp_path / "truth", crops=table)

    def named(folder: Path, packed: Path) -> tuple[bool, bool]:
        """Whether the page says that the scores, and the submission, are of other labels."""
        scored = score(packed, tmp_path / "truth", out=tmp_path / "scores")
        text = report(scored, out=out, labels=folder, submission=packed).read_text()
        said = f"The submission {packed} is of other labels than {folder} holds now, for 1 array (crop1/mito)."
        return "These scores are of other labels" in text, said in text

    assert [named(folder, before) for folder in (labels, edited, copied)] == [(False, False), *[(True, True)] * 2]
    assert [named(folder, after) for folder in (labels, edited, copied)] == [(True, True), *[(False, False)] * 2]


def test_labels_beside_probabilities_that_they_were_not_made_from_are_named(tmp_path: Path) -> None:
    """Predicted again, or by another network, after decode: pictures and calibration would be of two predictions."""
    grid, found, out = grid_of((8, 8, 8)), tmp_path / "found", tmp_path / "report.html"
    table = CropTable((TableEntry(1, "one", "er", grid),))

    def predict(checkpoint: str) -> None:
        save_cellmap_predictions(np.full((1, 8, 8, 8), 0.6), found / "one.zarr/crop1", ["er"], grid)
        place = found / "one.zarr/crop1/er"
        update_attrs(place, {"connectomics": {**about(place), "model": {"checkpoint": checkpoint}}})

    predict("a")
    labels, submission, edited = tmp_path / "labels", tmp_path / "s.zip", tmp_path / "edited"
    decode(found, out=labels, config=load_config(None))
    export(labels, submission, crops=table)
    (tmp_path / "log.jsonl").write_text("")
    apply_edits(labels, tmp_path / "log.jsonl", out=edited)

    def others(**shown: object) -> list[str]:
        text = report(out=out, probabilities=found, **shown).read_text()
        said = r"The labels in (\S+) were not made from the probabilities that \S+ holds now, for ([^<]*)"
        return re.findall(said, text)

    every = ({"labels": labels}, {"submission": submission, "crop_table": table}, {"labels": edited})
    assert [others(**shown) for shown in every] == [[], [], []]
    predict("a")  # the same network: only labels know which prediction they are from
    said = "1 array (crop1/er)."
    assert [others(**shown) for shown in every] == [[(str(labels), said)], [], []]
    predict("b")
    places = (labels, submission, edited)
    assert [others(**shown) for shown in every] == [[(str(place), said)] for place in places]


def test_a_class_of_one_crop_has_no_interval_in_an_evaluation(tmp_path: Path) -> None:
    """As written, both ends are the measure itself, which looks like certainty."""
    path = tmp_path / "evaluation.json"
    both = {"dice_interval": [0.8, 0.8], "score_interval": [0.7, 0.7]}
    path.write_text(json.dumps({"classes": {"mito": {"dice": 0.8, "crops": 1, **both}}, "crops": []}))
    body = scores.evaluation_section(path)
    assert " to <data" not in body
    assert "<u" not in body


def test_intervals_are_explained_where_there_are_scores(made: Made) -> None:
    table = Scores.load(made.root / "scores/scores.json")
    assert "1000 times" in scores.section(table, None, {}, "baseline")


def test_epochs_have_whole_ticks() -> None:
    chart = charts.line_chart([charts.Series("a", np.array([0.0, 1.0, 2.0]), np.ones(3))], "t", "epoch")
    assert re.findall(r'text-anchor="middle">([\d.]+)</text>', chart) == ["0", "1", "2"]


def test_long_names_beside_a_chart_keep_their_end() -> None:
    chart = charts.line_chart([charts.Series("a very long path/version_7", np.arange(2.0), np.ones(2))], "t", "epoch")
    assert re.search(r'class="end[^>]*>…[^<]*version_7</text>', chart)


def test_a_bar_has_its_interval_as_a_whisker() -> None:
    bar = page.environment().get_template("parts.html.j2").module.bar
    assert "left:20.0%;width:30.0%" in bar(0.4, None, (0.2, 0.5))
    assert "<u" not in bar(0.4)


def test_intervals_are_of_the_pooled_score_over_crops(made: Made) -> None:
    table = Scores.load(made.root / "scores/scores.json")
    found = scores.class_intervals(table)
    assert set(found) == {"er", "mito"}
    for name, (low, high) in found.items():
        alone = [scores.rank_value(r) for r in table.results if r.class_name == name]
        pooled = table.classes[name].get("combined_score", table.classes[name].get("iou"))
        assert low <= pooled <= high
        assert (low, high) == pytest.approx((min(alone), max(alone)))  # a draw of two crops may take either twice
    one = dataclasses.replace(table, results=tuple(r for r in table.results if r.crop == "crop7"))
    assert scores.class_intervals(one) == {}
    dropped = InstanceScore(0, 0, 0, 0.0, 0, TOO_MANY, "2026-06", True)
    (mito,) = (r for r in one.results if r.class_name == "mito")
    crops = tuple(dataclasses.replace(mito, crop=name) for name in ("crop8", "crop9"))
    crops += (dataclasses.replace(mito, crop="crop10", score=dropped),)
    low, high = scores.class_intervals(dataclasses.replace(table, results=crops))["mito"]
    assert low == high == scores.rank_value(mito) < 1  # a crop that does not count is not drawn


def test_the_worst_and_the_best_share_nothing(made: Made) -> None:
    table = Scores.load(made.root / "scores/scores.json")
    wanted = [Wanted("d", crop, name, None) for crop in ("crop7", "crop9") for name in ("er", "mito", "unscored")]
    worst, best = extremes(wanted, table)
    assert len(worst) == len(best) == 2
    assert not set(worst) & set(best)
    values = {(r.crop, r.class_name): scores.rank_value(r) for r in table.results}
    order = [values[w.crop, w.class_name] for w in [*worst, *reversed(best)]]
    assert order == sorted(order)
    assert extremes(wanted, None) == ([], [])


def test_a_quarter_of_the_pictures_is_for_the_best() -> None:
    crops = {("d", c): [Wanted("d", c, n, None) for n in "xyz"] for c in "abcd"}
    best = [crops["d", "d"][2], crops["d", "c"][2]]
    assert choose(crops, 4, best) & set(best) == {best[0]}
    assert len(choose(crops, 4, best)) == 4
    assert choose(crops, 3, best) & set(best) == set()


def test_a_class_without_all_counts_has_no_shares(tmp_path: Path) -> None:
    """Nothing says how many voxels of the second array are unknown; they are not present for that."""
    root, grid = tmp_path / "root", grid_of((4, 4, 4))
    write_raw(root, "set-a", np.zeros(grid.shape, np.uint8), grid)
    values = np.zeros(grid.shape, np.uint8)
    values[:2], values[3] = 255, 1
    write_label(root, "set-a", "crop1", "mito", values, grid, unknown=255)
    crop = Catalog.open(str(root)).crop("set-a", "crop1")
    expected = (0.25, 0.25, 0.5)
    assert data_summary._states([crop], 10)[0]["mito"].shares == expected
    write_label(root, "set-a", "crop2", "mito", values, grid, unknown=255, counts={"absent": 16})
    crops = [Catalog.open(str(root)).crop("set-a", name) for name in ("crop1", "crop2")]
    state = data_summary._states(crops, 10)[0]["mito"]
    assert (state.arrays, state.shares) == (2, expected)
    assert data_summary._states(crops[1:], 10)[0]["mito"].shares == (None, None, None)
