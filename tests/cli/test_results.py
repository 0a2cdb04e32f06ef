"""The verbs about results: export, validate, score and evaluate, on labels made from the phantom's truth."""

from __future__ import annotations

import csv
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from connectomics.cellmap.catalog import Catalog
from connectomics.cellmap.classes import is_instance_class
from connectomics.cellmap.crop_table import CropTable
from connectomics.cellmap.labels import read_instances, read_labels
from connectomics.cli import main, terminal
from connectomics.geometry import VoxelGrid
from connectomics.io.write import create_multiscale, ensure_group, write_multiscale
from connectomics.metrics.challenge.zarr_v2 import FolderStore, ZarrArray
from connectomics.pages.report.scores import Scores, evaluation_section

CLASSES = ("mito", "ld", "er")
CHOSEN = [word for name in CLASSES for word in ("--class", name)]


def write_labels(root: Path, values: Any, grid: VoxelGrid, instance: bool, **about: Any) -> None:
    ensure_group(root.parent)
    kind = {"artefact": "labels", "kind": "instance" if instance else "semantic", "complete": True, **about}
    (writer,) = create_multiscale(root, [grid], np.uint16 if instance else np.uint8, attrs={"connectomics": kind})
    writer.write((0, 0, 0), values.astype(np.uint16 if instance else np.uint8))


@pytest.fixture(scope="module")
def place(phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``labels`` of the test crops and ``known`` of training crops: the truth moved by a voxel."""
    out = tmp_path_factory.mktemp("results")
    truth = FolderStore(phantom / "truth.zarr")
    for entry in CropTable.load(phantom / "test_crops.csv").select(classes=CLASSES):
        values = np.roll(ZarrArray(truth, f"{entry.crop_name}/{entry.class_name}").read(), 1, axis=1)
        folder = out / "labels" / f"{entry.dataset}.zarr" / entry.crop_name / entry.class_name
        write_labels(folder, values, entry.grid, is_instance_class(entry.class_name))
    for crop in Catalog.open(phantom).crops(crops=["crop1", "crop2", "crop201"]):
        for name in CLASSES:
            if name not in crop.labels:
                continue
            grid, instance = crop.labels[name].grid, is_instance_class(name)
            values = (
                read_instances(crop, name, grid)[0] if instance else read_labels(crop, [name], grid).present_of(name)
            )
            folder = out / "known" / f"{crop.dataset}.zarr" / crop.name / name
            write_labels(folder, np.roll(values, 1, axis=2), grid, instance)
    return out


def pytc(*arguments: object) -> None:
    assert main([str(a) for a in arguments]) == 0


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of error that a command prints."""
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 1
    found = capsys.readouterr()
    (line,) = [line for line in found.err.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in found.err
    return line


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def packed(place: Path, phantom: Path) -> Path:
    pytc("export", place / "labels", place / "s.zip", "--crops", phantom / "test_crops.csv", *CHOSEN)
    return place / "s.zip"


# -- score -------------------------------------------------------------------------------------------------------------
def test_score_of_a_zip_and_of_the_labels_it_was_packed_from(
    packed: Path, place: Path, phantom: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = ["--crops", phantom / "test_crops.csv", *CHOSEN]
    pytc("score", packed, phantom / "truth.zarr", *table, "--out", tmp_path / "zip")
    shown = capsys.readouterr()
    assert "submitted only" in shown.out
    assert "overall" in shown.out
    assert "rules 2026-06, verified against the official scorer" in " ".join(shown.out.split())
    assert "2026-07-affine" in shown.out
    assert "scoring: " in shown.err
    pytc("score", place / "labels", phantom / "truth.zarr", *table, "--out", tmp_path / "folder")
    a, b = (json.loads((tmp_path / name / "scores.json").read_text()) for name in ("zip", "folder"))
    assert [a.pop("submission"), b.pop("submission")] == [str(packed), str(place / "labels")]
    assert a == b
    assert a["overall_score"] == a["submitted_only"]["overall_score"] > 0
    assert {r["class"] for r in rows(tmp_path / "zip/scores_per_class.csv")} == set(CLASSES)
    assert {r["crop"] for r in rows(tmp_path / "zip/scores_per_crop.csv")} == {"crop101", "crop301"}
    assert {"truth", "iou", "distance_nm"} <= set(rows(tmp_path / "zip/scores_per_instance.csv")[0])


def test_score_counts_missing_labels_in_one_total_only(packed: Path, phantom: Path, tmp_path: Path) -> None:
    pytc("score", packed, phantom / "truth.zarr", *CHOSEN, "--class", "nuc", "--out", tmp_path)
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["label_scores"]["nuc"]["combined_score"] == 0
    assert "nuc" not in scores["submitted_only"]["label_scores"]
    assert scores["overall_score"] < scores["submitted_only"]["overall_score"]


def test_score_of_one_class_in_one_crop_by_rules_that_are_not_verified(
    packed: Path, phantom: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = ["--class", "mito", "--crop", "101", "--rules", "2026-07"]
    pytc("score", packed, phantom / "truth.zarr", *chosen, "--out", tmp_path)
    assert "not verified" in capsys.readouterr().out
    (row,) = rows(tmp_path / "scores_per_crop.csv")
    assert (row["crop"], row["class"], row["verified"]) == ("crop101", "mito", "False")
    assert row["rules"] == "2026-07-exponential"
    assert json.loads((tmp_path / "scores.json").read_text())["verified"] is False


def test_what_score_cannot_do_is_one_line_and_leaves_nothing(
    packed: Path, place: Path, phantom: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truth, out = phantom / "truth.zarr", tmp_path / "out"
    table = tmp_path / "table.csv"
    lines = (phantom / "test_crops.csv").read_text().splitlines()
    table.write_text("\n".join([lines[0], lines[1].replace("8.0;8.0;8.0", "8.0;x;8.0")]))
    evil = tmp_path / "evil.zip"
    with zipfile.ZipFile(evil, "w") as archive:
        archive.writestr("../evil", "x")
    probability = tmp_path / "probabilities"
    write_labels(probability / "d.zarr/crop101/mito", np.ones((4, 4, 4)), VoxelGrid((8, 8, 8), (0, 0, 0), (4, 4, 4)),
                 False, artefact="probability")  # fmt: skip
    for arguments, says in (
        ((tmp_path / "no.zip", truth), "no submission at"),
        ((packed, tmp_path / "no.zarr"), "no folder at"),
        ((packed, truth, "--class", "mitos"), "did you mean 'mito'"),
        ((packed, truth, "--crop", "crop10"), "did you mean 'crop101'"),
        ((packed, truth, "--rules", "2026-08"), "2026-0"),
        ((packed, truth, "--crops", table), "table.csv line 2: voxel_size"),
        ((packed, truth, "--crops", tmp_path / "no.csv"), "no.csv"),
        ((evil, truth), "a path out of the archive"),
        ((probability, truth), "run decode first"),
    ):
        assert says in refused(capsys, "score", *arguments, "--out", out)
    assert not out.exists()
    assert not (tmp_path.parent / "evil").exists()


def test_score_warns_of_what_the_scorer_does_not_see(
    place: Path, phantom: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    group = tmp_path / "s.zarr"
    folder = place / "labels/phantom-iso.zarr/crop101"
    for name in ("mito", "er"):
        values = ZarrArray(FolderStore(folder / name), "s0").read().astype(np.float32)
        values[0, 0, :7] = np.nan
        (group / "crop101" / name).mkdir(parents=True)
        (group / ".zgroup").write_text('{"zarr_format": 2}')
        (group / "crop101/.zgroup").write_text('{"zarr_format": 2}')
        if name == "er":  # a multiscale group where a plain array is read
            (group / "crop101/er/.zgroup").write_text('{"zarr_format": 2}')
            continue
        meta = {"zarr_format": 2, "shape": values.shape, "chunks": values.shape, "dtype": "<f4", "compressor": None,
                "fill_value": 0, "filters": None, "order": "C"}  # fmt: skip
        (group / "crop101/mito/.zarray").write_text(json.dumps(meta))
        (group / "crop101/mito/0.0.0").write_bytes(values.tobytes())
    pytc("score", group, phantom / "truth.zarr", "--crop", "101", "--class", "mito", "--class", "er",
         "--out", tmp_path / "out")  # fmt: skip
    told = capsys.readouterr().err
    assert "warning: crop101: er are groups" in told
    assert "warning: crop101/mito: 7 voxels of the prediction are NaN" in told


# -- validate and export -----------------------------------------------------------------------------------------------
def test_validate_passes_what_export_wrote(
    packed: Path, phantom: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = ["--crops", phantom / "test_crops.csv", *CHOSEN]
    pytc("validate", packed, *table, "--truth", phantom / "truth.zarr", "--out", tmp_path / "findings.json")
    assert "0 errors" in capsys.readouterr().out
    assert json.loads((tmp_path / "findings.json").read_text())["findings"] == []


def test_validate_says_what_is_wrong_where_and_what_to_do_and_exits_with_1(
    packed: Path, phantom: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = ["--crops", phantom / "test_crops.csv"]
    assert main(["validate", str(packed), *map(str, table), "--class", "mito", "--class", "nuc",
                 "--out", str(tmp_path / "f.json")]) == 1  # fmt: skip
    shown = capsys.readouterr().out
    assert "error: crop101/nuc: expected a plain Zarr v2 array, got nothing; export it" in shown
    assert "2 errors" in shown
    found = json.loads((tmp_path / "f.json").read_text())["findings"]
    assert {f["rule"] for f in found if f["severity"] == "error"} == {"missing-class"}
    assert all(set(f) == {"severity", "rule", "path", "found", "expected", "what_to_do"} for f in found)


def test_export_packs_the_same_bytes_again(packed: Path, place: Path, phantom: Path, tmp_path: Path) -> None:
    pytc("export", place / "labels", tmp_path / "again.zip", "--crops", phantom / "test_crops.csv", *CHOSEN)
    assert (tmp_path / "again.zip").read_bytes() == packed.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["again.zip"]


# -- evaluate ----------------------------------------------------------------------------------------------------------
def test_evaluate_by_class_crop_and_data_set(
    place: Path, phantom: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "evaluation.json"
    pytc("evaluate", place / "known", phantom, "--out", out)
    shown = capsys.readouterr().out
    for heading in ("By class", "By data set", "By crop", "overall"):
        assert heading in shown
    result = json.loads(out.read_text())
    mito = result["classes"]["mito"]
    assert mito["dice_low"] <= mito["dice"] <= mito["dice_high"]
    assert mito["score_interval"] == [mito["score_low"], mito["score_high"]]
    assert mito["score"] == mito["combined_score"]
    assert {"precision", "recall", "rand_error", "voi_split", "voi_merge"} <= set(mito)
    assert result["classes"]["er"]["score"] == result["classes"]["er"]["iou"]
    assert {r["dataset"] for r in result["datasets"]} == {"phantom-iso", "phantom-aniso"}
    assert {r["crop"] for r in result["crops"]} == {"crop1", "crop2", "crop201"}
    total = result["totals"]
    assert total["overall"] == pytest.approx((total["instance"] * total["semantic"]) ** 0.5)
    assert total["overall_low"] <= total["overall"] <= total["overall_high"]
    for name, columns in (("class", "score_low"), ("dataset", "dataset"), ("crop", "crop")):
        assert columns in rows(tmp_path / f"evaluation_per_{name}.csv")[0]
    assert "Over known voxels only" in evaluation_section(out)


def test_one_key_says_the_rules_of_score_and_evaluate(
    packed: Path, place: Path, phantom: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("score:\n  rules: pq\n")
    verbs = {
        "scores.json": ["score", packed, phantom / "truth.zarr", *CHOSEN, "--out", tmp_path],
        "e.json": ["evaluate", place / "known", phantom, "--out", tmp_path / "e.json"],
    }
    for file, command in verbs.items():
        for words, rules in (
            (["--config", config], "pq"),
            (["--config", config, "score.rules=2026-07-affine"], "2026-07-affine"),
            (["--config", config, "--rules", "2026-06"], "2026-06"),
            ([], "2026-06"),
        ):
            pytc(*command, *words)
            written = json.loads((tmp_path / file).read_text())
            assert (written["rules"], written["verified"]) == (rules, rules == "2026-06")
            assert next(r["moves"] for r in written["by_rules"] if r["rules"] == rules) in (0.0, None)
            assert {r["rules"] for r in written["by_rules"]} == {
                "2026-06", "2026-07-exponential", "2026-07-affine", "pq"
            }  # fmt: skip
        assert "did you mean 'pq'" in refused(capsys, *command, "score.rules=pqq")
    assert Scores.load(tmp_path / "scores.json").rules == "2026-06"


def test_evaluate_takes_filters_and_rules(
    place: Path, phantom: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytc("evaluate", place / "known", phantom, "--crop", "2", "--class", "ld", "--dataset", "phantom-iso",
         "--rules", "2026-07", "--out", tmp_path / "e.json")  # fmt: skip
    assert "not verified" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "e.json").read_text())["crops"]
    assert (row["crop"], row["class"]) == ("crop2", "ld")
    assert "did you mean 'crop2'" in refused(capsys, "evaluate", place / "known", phantom, "--crop", "crop3")
    assert "did you mean 'ld'" in refused(capsys, "evaluate", place / "known", phantom, "--class", "ldd")
    assert "nothing to compare" in refused(capsys, "evaluate", place / "labels", phantom)


def test_evaluate_counts_known_voxels_only(phantom: Path, tmp_path: Path) -> None:
    """Whatever is predicted where nothing is known changes no number."""
    crop = next(c for c in Catalog.open(phantom).crops(crops=["crop1"]))
    label = crop.labels["er"].grid
    wide = VoxelGrid(label.voxel_size, [t - 4 * v for t, v in zip(label.translation, label.voxel_size, strict=True)],
                     [n + 8 for n in label.shape])  # fmt: skip
    volume = read_labels(crop, ["er"], wide)
    present, known = volume.present_of("er"), volume.known_of("er")
    assert not known.all()
    folder = tmp_path / f"labels/{crop.dataset}.zarr/crop1/er"
    write_labels(folder, present | ~known, wide, False)
    pytc("evaluate", tmp_path / "labels", phantom, "--out", tmp_path / "e.json")
    er = json.loads((tmp_path / "e.json").read_text())["classes"]["er"]
    assert (er["dice"], er["fp"], er["known"]) == (1.0, 0, int(known.sum()))


def test_half_written_labels_and_probabilities_are_refused(
    phantom: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = VoxelGrid((8, 8, 8), (0, 0, 0), (4, 4, 4))
    for name, about, says in (
        ("half", {"complete": False}, "half written"),
        ("probability", {"artefact": "probability"}, "run decode first"),
    ):
        write_labels(tmp_path / name / "phantom-iso.zarr/crop1/er", np.ones((4, 4, 4)), grid, False, **about)
        assert says in refused(capsys, "evaluate", tmp_path / name, phantom)
    write_multiscale(tmp_path / "other/phantom-iso.zarr/crop1/er", np.ones((4, 4, 4), np.uint8), grid)
    assert "expected labels written by decode, got an array of another program" in refused(
        capsys, "evaluate", tmp_path / "other", phantom
    )


# -- progress ----------------------------------------------------------------------------------------------------------
def test_progress_in_a_log_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("connectomics.progress.EVERY", 0.0)
    with terminal.counted("scoring") as advance:
        advance(1, 3, "crop1/mito")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "scoring ..."
    assert lines[1].startswith("scoring: 1/3 crop1/mito (")
    assert lines[2].startswith("scoring: ")


def test_progress_on_a_terminal_is_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with terminal.counted("scoring") as advance:
        advance(2, 3, "crop1/mito")
    assert "scoring: " in capsys.readouterr().err
