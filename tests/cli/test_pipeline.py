"""All the way on the tiny phantom, verb by verb, as a user would."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr

from connectomics.cellmap.crop_table import CropTable
from connectomics.cli import main
from connectomics.config import load_config
from connectomics.data.splits import Split
from connectomics.pipeline.targets import kept_out_targets

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "tutorials/phantom.yaml")
CLASSES = ["mito", "nuc", "ld", "er"]
SMALL = [
    "training.max_epochs=2", "data.patches_per_epoch=4", "data.patch_size=[32,32,32]", "inference.window=[32,32,32]",
    "model.options.channels=[8,16,16,16]",
]  # fmt: skip


def pytc(*arguments: object) -> None:
    assert main([str(a) for a in arguments]) == 0


@pytest.fixture(scope="module")
def way(phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run, its predictions, labels and submission."""
    out = tmp_path_factory.mktemp("way")
    fixed = [*SMALL, f"dataset.data_root={phantom}", f"data.cache_dir={out / 'cache'}"]
    pytc("train", CONFIG, "--run-dir", out / "run", *fixed)
    checkpoint = out / "run/checkpoints/last.ckpt"
    table = phantom / "test_crops.csv"
    pytc("predict", CONFIG, "--checkpoint", checkpoint, "--crops", table, "--out", out / "predictions", *fixed)
    pytc("decode", out / "predictions", out / "labels", "--config", CONFIG)
    chosen = [x for c in CLASSES for x in ("--class", c)]
    pytc("export", out / "labels", out / "submission.zip", "--crops", table, *chosen)
    # Without the truth: two epochs may leave a class empty, which is an error only where the truth is known.
    pytc("validate", out / "submission.zip", "--crops", table, *chosen)
    pytc("score", out / "submission.zip", phantom / "truth.zarr", "--crops", table, *chosen, "--out", out)
    return out


def test_the_run_folder_says_what_was_run(way: Path) -> None:
    there = {p.name for p in (way / "run").iterdir()}
    assert {"config.yaml", "split.yaml", "metrics.csv", "timing.json", "checkpoints"} <= there
    assert "val/dice" in (way / "run/metrics.csv").read_text().splitlines()[0]


def test_every_voxel_of_every_test_crop_is_written(way: Path, phantom: Path) -> None:
    table = CropTable.load(phantom / "test_crops.csv").select(classes=CLASSES)
    for entry in table:
        folder = way / "predictions" / f"{entry.dataset}.zarr" / entry.crop_name / entry.class_name
        array = zarr.open_array(folder / "s0", mode="r")
        assert array.shape == entry.grid.shape
        chunks = [-(-n // c) for n, c in zip(array.shape, array.chunks, strict=True)]
        stored = [p for p in (folder / "s0").rglob("*") if p.is_file() and not p.name.startswith(".")]
        assert len(stored) == np.prod(chunks)
        assert np.asarray(array[...]).std() > 0


def test_the_score_covers_the_table(way: Path) -> None:
    scores = json.loads((way / "scores.json").read_text())
    assert set(scores["label_scores"]) == set(CLASSES)
    assert 0 <= scores["overall_score"] <= 1


def test_labels_of_known_crops_are_evaluated(way: Path, phantom: Path) -> None:
    fixed = [*SMALL, f"dataset.data_root={phantom}"]
    checkpoint = way / "run/checkpoints/last.ckpt"
    where = ["dataset.datasets=[phantom-iso]", "dataset.crops=[crop2]"]
    pytc("predict", CONFIG, "--checkpoint", checkpoint, "--out", way / "val", *fixed, *where)
    pytc("decode", way / "val", way / "val_labels", "--class", "mito", "--class", "nuc",
         "decoding.classes.nuc.threshold=0.4")  # fmt: skip
    pytc("evaluate", way / "val_labels", phantom, "--out", way / "evaluation.json")
    rows = json.loads((way / "evaluation.json").read_text())["classes"]
    assert set(rows) == {"mito", "nuc"}
    assert 0 <= rows["nuc"]["dice"] <= 1
    assert "rand_error" in rows["nuc"]


def test_what_was_kept_out_of_training_is_predicted(
    way: Path, phantom: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--crops val` are the crops of split.yaml, of several checkpoints those that none was trained on."""
    fixed = [*SMALL, f"dataset.data_root={phantom}"]
    first, other = (shutil.copytree(way / "run", tmp_path / name) for name in ("first", "other"))
    predict = ["predict", CONFIG, "--checkpoint", first / "checkpoints/last.ckpt", "--crops", "val"]
    Split(("phantom-aniso/crop202",), ("phantom-iso/crop2", "phantom-iso/crop3")).save(first / "split.yaml")
    Split((), ("phantom-iso/crop2", "phantom-aniso/crop202")).save(other / "split.yaml")
    pytc(*predict, "--out", way / "kept_out", *fixed)
    assert sorted(p.name for p in (way / "kept_out").glob("*.zarr/[!.]*")) == ["crop2", "crop3"]
    config = load_config(CONFIG, fixed)
    both = kept_out_targets(config, [first / "checkpoints/last.ckpt", other / "checkpoints/last.ckpt"])
    assert [target.name for target in both] == ["crop2"]
    (other / "split.yaml").unlink()
    capsys.readouterr()
    assert main([str(a) for a in [*predict, "--checkpoint", other / "checkpoints/last.ckpt", *fixed]]) == 1
    assert "last.ckpt: no validation crops are known, from split.yaml of its run" in capsys.readouterr().err


def test_a_box_is_predicted(way: Path, phantom: Path) -> None:
    fixed = [*SMALL, f"dataset.data_root={phantom}"]
    pytc("predict", CONFIG, "--checkpoint", way / "run/checkpoints/last.ckpt", "--out", way / "box",
         "--box", "phantom-iso:100,100,100:300,260,200", *fixed)  # fmt: skip
    (crop,) = (way / "box/phantom-iso.zarr").glob("box_*")
    assert zarr.open_array(crop / "er/s0", mode="r").shape == (25, 20, 13)


def test_the_report_is_one_file(way: Path, phantom: Path) -> None:
    pytc("report", way / "report.html", "--run", way / "run", "--root", phantom, "--crops", phantom / "test_crops.csv",
         "--truth", phantom / "truth.zarr", "--labels", way / "labels", "--scores", way / "scores.json")  # fmt: skip
    page = (way / "report.html").read_text()
    assert "crop101" in page
    assert 'src="http' not in page


def test_a_run_goes_on_from_its_checkpoint(way: Path, phantom: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fixed = [*SMALL, f"dataset.data_root={phantom}", "training.max_epochs=3"]
    pytc("train", CONFIG, "--checkpoint", way / "run/checkpoints/last.ckpt", "--run-dir", way / "more", *fixed)
    epochs = {line.split(",")[0] for line in (way / "more/metrics.csv").read_text().splitlines()[1:]}
    assert "2" in epochs
    assert "0" not in epochs


def test_a_checkpoint_for_other_classes_is_refused(
    way: Path, phantom: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = main(["predict", CONFIG, "--checkpoint", str(way / "run/checkpoints/last.ckpt"), "--out",
                   str(way / "wrong"), f"dataset.data_root={phantom}", "dataset.classes=[mito,nuc,er,ld]"])  # fmt: skip
    assert status == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert "classes" in error
    assert not (way / "wrong").exists()
