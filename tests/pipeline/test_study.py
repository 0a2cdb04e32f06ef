"""A study: rows of arms, seeds and folds, trained once each, resumed, compared in one table."""

from __future__ import annotations

import csv
import json
import math
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from connectomics.cellmap.catalog import Catalog
from connectomics.cli import main
from connectomics.config import config_from_dict, load_config
from connectomics.data.contents import LabelCounter, content_of
from connectomics.data.run_split import run_folds
from connectomics.errors import ConfigError, InputError, MissingError, UnknownNameError
from connectomics.geometry import VoxelGrid
from connectomics.lightning.run_state import keep_state
from connectomics.pipeline.study import StudyResult, arm_table, interval, study
from connectomics.pipeline.study_file import BASE, changed, load_study
from connectomics.tasks.lock import leading
from tests.cellmap.roots import write_label, write_raw

COST = ("cpu_s", "device_s", "folder")


def base_of(root: Path) -> dict[str, Any]:
    """A run that trains in about a second."""
    return {
        "system": {"accelerator": "cpu", "num_cpus": 1, "num_gpus": 0},
        "dataset": {
            "data_root": str(root), "datasets": ["set-a"], "classes": ["mito"], "voxel_size": [8, 8, 8],
            "train_val_split": 0.7,
        },
        "model": {"architecture": "unet", "options": {"channels": [4, 8], "strides": [2], "num_res_units": 1}},
        "data": {"patch_size": [16, 16, 16], "batch_size": 2, "patches_per_epoch": 8, "num_workers": 0},
        "optimizer": {"lr": 0.01},
        "scheduler": {"name": "cosine"},
        "training": {"max_epochs": 3, "precision": "32", "ema": 0.5},
        "checkpoint": {"save_top_k": 1},
        "early_stopping": {"patience": 0},
        "logging": {"use_tensorboard": False, "log_every_n_steps": 2},
    }  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One crop of 96 x 32 x 32 voxels with bright blobs."""
    folder = tmp_path_factory.mktemp("study") / "root"
    grid = VoxelGrid((8.0,) * 3, (4.0,) * 3, (96, 32, 32))
    z, y, x = np.meshgrid(*grid.axes(), indexing="ij")
    waves = np.sin(z / 40) + np.sin(y / 50) + np.sin(x / 60)
    raw = np.clip(110 + 30 * waves + np.random.default_rng(0).normal(0, 12, grid.shape), 0, 255).astype(np.uint8)
    write_raw(folder, "set-a", raw, grid)
    write_label(folder, "set-a", "crop1", "mito", (waves > 0.8).astype(np.uint8), grid)
    return folder


def write(folder: Path, root: Path, name: str = "tiny", **content: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump({"base": base_of(root), "seeds": [1, 2], **content}, sort_keys=False))
    return file


def without_cost(result: StudyResult) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    arms, rows = ([{k: v for k, v in row.items() if k not in COST} for row in t] for t in (result.arms, result.rows))
    return arms, rows


def of_base(result: StudyResult) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The part of a study that one without factors has."""
    arms, rows = without_cost(result)
    return arms[:1], [row for row in rows if row["arm"] == BASE]


FACTORS = {"optimizer.lr": [0.001], "loss": {"dice": {"model.loss_functions": ["DiceLoss"], "model.loss_weights": [1]}}}

SCORES = ["val/dice", "val/mito/iou"]


@pytest.fixture(scope="module")
def done(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StudyResult]:
    folder = tmp_path_factory.mktemp("done")
    file = write(folder, root, factors=FACTORS, scores=SCORES)
    return file, study(file, folder / "out")


# -- the table -------------------------------------------------------------------------------------------------------
def test_rows_are_the_base_and_single_changes_times_seeds(done: tuple[Path, StudyResult]) -> None:
    rows = done[1].rows
    assert [(row["arm"], row["seed"]) for row in rows] == [
        (arm, seed) for arm in (BASE, "optimizer.lr=0.001", "loss=dice") for seed in (1, 2)
    ]
    assert {row["state"] for row in rows} == {"complete"}
    assert {row["steps"] for row in rows} == {12}
    assert all(row["cpu_s"] > 0 and row["device_s"] is None for row in rows)
    assert done[1].unfinished == []
    assert len(list((done[1].folder / "folds").iterdir())) == 1  # all share one split


def test_scores_are_those_of_the_selected_weights(done: tuple[Path, StudyResult]) -> None:
    for row in done[1].rows:
        with (done[1].folder / "rows" / row["folder"] / "metrics.csv").open() as file:
            logged = [line for line in csv.DictReader(file) if line["val/dice"]]
        best = max(logged, key=lambda line: float(line["val/dice"]))
        assert row["val/dice"] == float(best["val/dice"])
        assert row["val/mito/iou"] == float(best["val/mito/iou"])
        assert row["last"] == float(logged[-1]["val/dice"])


def test_means_and_intervals(done: tuple[Path, StudyResult]) -> None:
    with (done[1].folder / "study.csv").open() as file:
        table = {line["arm"]: line for line in csv.DictReader(file)}
    values = {arm: [r["val/dice"] for r in done[1].rows if r["arm"] == arm] for arm in table}
    for arm, line in table.items():
        one, two = values[arm]
        half = 12.7062047 * abs(one - two) / 2  # t(0.975, 1) s / sqrt(2), s = |a - b| / sqrt(2)
        assert float(line["val/dice"]) == pytest.approx((one + two) / 2)
        assert float(line["val/dice low"]) == pytest.approx((one + two) / 2 - half, abs=1e-6)
        if arm != BASE:
            apart = [a - b for a, b in zip(values[arm], values[BASE], strict=True)]
            assert float(line["val/dice - base"]) == pytest.approx(sum(apart) / 2, abs=1e-9)
    assert table[BASE]["val/dice - base"] == ""
    assert interval([0.5]) == (0.5, None, None)
    assert interval([]) == (None, None, None)


def test_a_seed_counts_only_with_all_of_its_folds(done: tuple[Path, StudyResult]) -> None:
    arms = load_study(done[0])[2][:1]
    rows = [
        {"arm": BASE, "seed": s, "fold": f, "state": state, "s": value, "last": value, "steps": 1, "cpu_s": 1.0,
         "device_s": None}
        for s, f, state, value in ((1, "a", "complete", 0.2), (1, "b", "complete", 0.4), (2, "a", "complete", 0.9),
                                   (2, "b", "failed", None))
    ]  # fmt: skip
    (line,) = arm_table(arms, rows, ["s"])
    assert (line["s"], line["s low"], line["complete"], line["state"]) == (pytest.approx(0.3), None, 3, "failed")


def test_the_page_has_curves_of_every_arm_and_escapes(done: tuple[Path, StudyResult]) -> None:
    text = (done[1].folder / "study.html").read_text()
    for arm in (BASE, "optimizer.lr=0.001", "loss=dice"):
        assert f"{arm}: val/dice" in text
    assert "http" not in text.replace("http-equiv", "").replace("http://www.w3.org", "")


# -- the same again --------------------------------------------------------------------------------------------------
def test_the_same_seed_gives_the_same_table(done: tuple[Path, StudyResult], tmp_path: Path, root: Path) -> None:
    again = study(write(tmp_path, root, scores=SCORES), tmp_path / "again")
    assert without_cost(again) == of_base(done[1])
    scores = [row["val/dice"] for row in again.rows]
    assert scores[0] != scores[1]  # the seeds do something


@pytest.mark.slow
def test_processes_give_the_same_rows_and_one_that_is_killed_fails_alone(
    done: tuple[Path, StudyResult], tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "killed_at_import.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    monkeypatch.syspath_prepend(str(tmp_path))
    file = write(tmp_path, root, factors={"plugins": [["killed_at_import"]]}, seeds=[1])
    base, killed = study(file, tmp_path / "out", workers=2).rows
    assert base["val/dice"] == done[1].rows[0]["val/dice"]
    assert base["identity"] == done[1].rows[0]["identity"]
    assert (killed["state"], killed["error"]) == ("failed", "its process ended with code -9; see output.log")
    assert (tmp_path / "out/rows" / base["folder"] / "output.log").stat().st_size > 0


def test_a_finished_study_trains_nothing(done: tuple[Path, StudyResult], monkeypatch: pytest.MonkeyPatch) -> None:
    import connectomics.pipeline.train

    monkeypatch.setattr(connectomics.pipeline.train, "train", None)  # a call would fail
    assert study(done[0], done[1].folder) == done[1]


def test_a_changed_base_means_new_rows(done: tuple[Path, StudyResult]) -> None:
    before = done[1].rows
    changed_rows = study(done[0], done[1].folder, overrides=["data.batch_size=1"], dry_run=True).rows
    assert {row["state"] for row in changed_rows} == {"missing"}
    assert not {row["identity"] for row in changed_rows} & {row["identity"] for row in before}
    moved = study(done[0], done[1].folder, overrides=["data.cache_dir=/elsewhere"], dry_run=True).rows
    assert [row["identity"] for row in moved] == [row["identity"] for row in before]  # a place changes no result


def test_changed_labels_mean_new_rows(tmp_path: Path, root: Path) -> None:
    import shutil

    shutil.copytree(root, tmp_path / "root")  # keeps the times: the same data elsewhere
    file, moved = write(tmp_path, root, factors={}), write(tmp_path, tmp_path / "root", "moved", factors={})
    first = [row["identity"] for row in study(file, tmp_path / "out", dry_run=True).rows]
    assert [row["identity"] for row in study(moved, tmp_path / "out", dry_run=True).rows] == first
    chunk = next(p for p in (tmp_path / "root").rglob("groundtruth/crop1/mito/s0/0*") if p.exists())
    chunk = chunk if chunk.is_file() else next(p for p in chunk.rglob("*") if p.is_file())
    chunk.write_bytes(chunk.read_bytes())
    assert not set(first) & {row["identity"] for row in study(moved, tmp_path / "out", dry_run=True).rows}
    assert not (tmp_path / "out").exists()


# -- resuming and failing --------------------------------------------------------------------------------------------
def test_a_half_trained_row_resumes(tmp_path: Path, root: Path, done: tuple[Path, StudyResult],
                                    monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    from connectomics.pipeline.study_callback import RowCallback

    real = RowCallback.on_train_epoch_end

    def interrupted(self: RowCallback, trainer: Any, *args: Any) -> None:
        real(self, trainer, *args)
        if trainer.current_epoch == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(RowCallback, "on_train_epoch_end", interrupted)
    file = write(tmp_path, root, scores=SCORES)
    with pytest.raises(KeyboardInterrupt):
        study(file, tmp_path / "out")
    monkeypatch.undo()
    assert [row["state"] for row in study(file, tmp_path / "out", dry_run=True).rows] == ["started", "missing"]
    assert without_cost(study(file, tmp_path / "out")) == of_base(done[1])


def test_the_cost_is_kept_if_a_row_stops_within_an_epoch() -> None:
    from connectomics.pipeline.study_callback import RowCallback

    first = RowCallback(until=None)
    end = time.process_time() + 0.1
    while time.process_time() < end:
        pass
    kept = first.state_dict()
    assert kept["cpu_s"] >= 0.05  # clocks of processes have steps of 10 ms
    again = RowCallback(until=None)
    again.load_state_dict(kept)
    assert again.state_dict()["cpu_s"] >= kept["cpu_s"]


def test_a_failed_row_does_not_stop_the_others(tmp_path: Path, root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    factors = {"weights": {"none": {"model.weights": str(tmp_path / "no.ckpt")}}}
    file = write(tmp_path, root, factors=factors, seeds=[1])
    assert main(["study", str(file), "--out", str(tmp_path / "out"), "training.max_epochs=1"]) == 1
    said = capfd.readouterr()
    assert "weights=none, seed 1 : failed no checkpoint at" in said.out
    rows = study(file, tmp_path / "out", overrides=["training.max_epochs=1"], dry_run=True).rows
    assert [row["state"] for row in rows] == ["complete", "failed"]
    # the cause is fixed: the row is done, the other one is kept
    (checkpoint,) = (tmp_path / "out/rows").glob("base-*/checkpoints/best.ckpt")
    (tmp_path / "no.ckpt").write_bytes(checkpoint.read_bytes())
    assert main(["-q", "study", str(file), "--out", str(tmp_path / "out"), "training.max_epochs=1", "--json"]) == 0
    said = capfd.readouterr()
    assert [row["state"] for row in json.loads(said.out[said.out.index("{") :])["rows"]] == ["complete", "complete"]


def test_a_row_of_another_process_is_left_to_it(tmp_path: Path, root: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write(tmp_path, root, seeds=[1])
    (row,) = study(file, tmp_path / "out", dry_run=True).rows
    folder = tmp_path / "out/rows" / row["folder"]
    with leading(folder):
        assert [row["state"] for row in study(file, tmp_path / "out").unfinished] == ["missing"]
    assert "is working on" in caplog.text
    assert not folder.exists()


def test_a_row_that_was_never_validated_is_not_complete(tmp_path: Path, root: Path) -> None:
    file = write(tmp_path, root, seeds=[1], overrides={"training.val_every_n_epochs": 2, "training.max_epochs": 1})
    for _ in range(2):  # not after a second try either
        (row,) = study(file, tmp_path / "out").unfinished
        assert (row["state"], row["val/dice"]) == ("failed", None)
        assert "never validated, so there is no val/dice" in row["error"]


def test_a_score_that_does_not_exist_is_named(done: tuple[Path, StudyResult], tmp_path: Path, root: Path) -> None:
    file = write(tmp_path, root, factors=FACTORS, scores=["val/mito/iuo"])
    with pytest.raises(UnknownNameError, match=r"unknown score 'val/mito/iuo'.*did you mean 'val/mito/iou'"):
        study(file, done[1].folder, dry_run=True)


# -- halving ---------------------------------------------------------------------------------------------------------
def test_halving_stops_arms_and_continues_the_others_as_if_they_had_not_stopped(
    done: tuple[Path, StudyResult], tmp_path: Path, root: Path
) -> None:
    file = write(tmp_path, root, factors=FACTORS, scores=["val/dice"], halving={"steps": [3, 8], "keep": 0.5})
    found = study(file, tmp_path / "out")
    full = {(row["arm"], row["seed"]): row for row in done[1].rows}
    state = {row["arm"]: row["state"] for row in found.rows}
    assert state[BASE] == "complete"
    assert sorted(state.values()) in (["complete", "complete", "stopped"], ["complete", "stopped", "stopped"])
    for row in found.rows:
        if row["state"] == "complete":
            assert row["val/dice"] == full[row["arm"], row["seed"]]["val/dice"]  # the schedule is the whole one
            assert row["steps"] == 12
        else:
            assert row["steps"] in (4, 8)  # the end of the epoch that reaches a rung
    stopped = next(line for line in found.arms if line["state"] == "stopped")
    assert stopped["val/dice"] is None  # never compared with complete arms
    assert study(file, tmp_path / "out") == found
    assert found.unfinished == []


# -- folds -----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two data sets: four crops, of which two overlap, and one."""
    folder = tmp_path_factory.mktemp("several")
    rng = np.random.default_rng(1)
    for name, places in (("set-a", (0, 8, 64, 128)), ("set-b", (0,))):
        write_raw(
            folder,
            name,
            rng.integers(0, 255, (192, 16, 16), dtype=np.uint8),
            VoxelGrid((8.0,) * 3, (4.0,) * 3, (192, 16, 16)),
        )
        for number, at in enumerate(places, start=1):
            grid = VoxelGrid((8.0,) * 3, (4.0 + 8 * at, 4.0, 4.0), (32, 16, 16))
            write_label(folder, name, f"crop{number}", "mito", (rng.random(grid.shape) < 0.3).astype(np.uint8), grid)
    return folder


@pytest.mark.parametrize(("by", "number"), [("crop", 2), ("crop", 4), ("dataset", 2), ("box", 2)])
def test_folds_hold_out_everything_once_and_never_leak(several: Path, by: str, number: int) -> None:
    from connectomics.data.splits import check_leaks

    config = load_config(None, [
        f"dataset.data_root={several}", "dataset.classes=[mito]", "data.patch_size=[8,8,8]"])  # fmt: skip
    crops = Catalog.open(str(several)).crops(None, None, ["mito"])
    folds = run_folds(config, crops, LabelCounter(), by, number)
    assert len(folds) == number
    held: dict[str, float] = {}
    for name, split in folds.items():
        train, val = split.select(crops)
        assert train
        assert check_leaks(train, val, name, (32.0, 32.0, 32.0)) == []  # raises if they overlap
        for crop in val:
            held[crop.key] = held.get(crop.key, 0.0) + content_of(crop, ["mito"], LabelCounter()).known
    assert held == {crop.key: pytest.approx(content_of(crop, ["mito"], LabelCounter()).known) for crop in crops}


def test_too_many_folds_are_refused(several: Path) -> None:
    config = load_config(None, [
        f"dataset.data_root={several}", "dataset.classes=[mito]", "data.patch_size=[8,8,8]"])  # fmt: skip
    crops = Catalog.open(str(several)).crops(None, None, ["mito"])
    with pytest.raises(InputError, match="cannot make 5 folds of 5 crops: they form 4 groups"):
        run_folds(config, crops, LabelCounter(), "crop", 5)
    with pytest.raises(InputError, match="cannot be cut into 40 parts along z"):
        run_folds(config, crops, LabelCounter(), "box", 40)


def test_folds_of_one_crop_are_trained_and_evaluated(tmp_path: Path, root: Path) -> None:
    file = write(
        tmp_path, root, seeds=[1], folds={"by": "box", "number": 3}, scores=["val/dice", "evaluate/mito/dice"],
        overrides={"training.max_epochs": 1, "inference.window": [16, 16, 16], "data.patch_size": [8, 8, 8]},
    )  # fmt: skip
    found = study(file, tmp_path / "out")
    assert [(row["fold"], row["state"]) for row in found.rows] == [(f"box{n}", "complete") for n in (1, 2, 3)]
    assert all(row["evaluate/mito/dice"] is not None for row in found.rows)
    middle = yaml.safe_load(next((found.folder / "folds").glob("box2-*.yaml")).read_text())
    assert (len(middle["train"]), len(middle["val"])) == (2, 1)
    (line,) = found.arms
    assert line["val/dice"] == pytest.approx(np.mean([row["val/dice"] for row in found.rows]))
    assert not list(found.folder.glob("rows/*/probabilities"))


# -- few labels and other starts -------------------------------------------------------------------------------------
HELD = "set-a/crop1:640,0,0:768,256,256"  # 16 sections


def split_files(folder: Path) -> dict[int, str]:
    """Split files with so many sections to train on."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in (1, 4):
        train = f"set-a/crop1:0,0,0:{8 * number},256,256"
        (folder / f"{number}.yaml").write_text(yaml.safe_dump({"train": [train], "val": [HELD]}))
    return {number: str(folder / f"{number}.yaml") for number in (1, 4)}


def transfer(folder: Path, root: Path, weights: Path, **content: Any) -> Path:
    """A study of the number of sections against the start."""
    levels = {str(number): {"dataset.split_file": file} for number, file in split_files(folder / "splits").items()}
    start = {"scratch": {}, "other": {"model.weights": str(weights)},
             "adapters": {"model.weights": str(weights), "model.adapters": {"rank": 2}}}  # fmt: skip
    overrides = {"data.patch_size": [1, 16, 16], "model.architecture": "unet_2d", "training.max_epochs": 1,
                 "model.options": {"features": [4, 8], "stem": 1}, "data.patches_per_epoch": 4}  # fmt: skip
    factors = {"sections": levels, "start": start}
    return write(folder, root, "transfer", mode="grid", factors=factors, seeds=[1], overrides=overrides, **content)


def test_arms_may_train_on_fewer_sections_and_start_elsewhere(tmp_path: Path, root: Path) -> None:
    weights = tmp_path / "first.ckpt"
    file = transfer(tmp_path, root, weights)
    found = study(file, tmp_path / "out", dry_run=True)
    assert [(line["sections"], line["start"]) for line in found.arms] == [
        (sections, start) for sections in ("1", "4") for start in ("scratch", "other", "adapters")
    ]
    assert [row["start"] for row in found.rows] == ["scratch", "other", "adapters"] * 2
    assert len({row["identity"] for row in found.rows}) == 6
    weights.write_bytes(b"weights")
    again = study(file, tmp_path / "out", dry_run=True).rows
    same = [a["identity"] == b["identity"] for a, b in zip(again, found.rows, strict=True)]
    assert same == [True, False, False] * 2, "what is in the file counts"
    moved = transfer(tmp_path / "moved", root, weights.rename(tmp_path / "moved.ckpt"))
    elsewhere = study(moved, tmp_path / "out", dry_run=True).rows
    assert [row["identity"] for row in elsewhere] == [row["identity"] for row in again], "the place does not count"


def test_all_rows_start_from_the_same_weights(tmp_path: Path, root: Path) -> None:
    weights = tmp_path / "first.ckpt"
    weights.write_bytes(b"weights")
    file = write(tmp_path, root, overrides={"model.weights": str(weights)})
    changing = study(file, tmp_path / "out", progress=lambda *_: weights.write_bytes(b"others"))
    first, second = (row["error"] for row in changing.rows)
    assert "has changed since the study started" not in first
    assert f"model.weights={weights} has changed since the study started" in second
    again = study(file, tmp_path / "out", dry_run=True).rows
    assert {row["identity"] for row in again}.isdisjoint(row["identity"] for row in changing.rows)
    trained = tmp_path / "trained"
    trained.mkdir()
    (trained / "checkpoints").mkdir()
    weights.rename(trained / "checkpoints/last.ckpt")
    file = write(tmp_path, root, overrides={"model.weights": str(trained)})
    with keep_state(trained), pytest.raises(InputError, match=r"trained is still training \(process \d+\)"):
        study(file, tmp_path / "out")
    assert "still training" not in str(study(file, tmp_path / "out").rows)


def test_splits_of_arms_must_hold_out_the_same(tmp_path: Path, root: Path) -> None:
    with pytest.raises(ConfigError, match=r"sets dataset\.split_file, but folds make the splits"):
        load_study(transfer(tmp_path, root, tmp_path / "w.ckpt", folds={"by": "box", "number": 2}))
    file = transfer(tmp_path, root, tmp_path / "w.ckpt")
    split = tmp_path / "splits/4.yaml"
    split.write_text(split.read_text().replace("640,0,0", "648,0,0"))
    with pytest.raises(ConfigError, match=r"4.yaml validates on other crops than .*1.yaml.*same list val"):
        study(file, tmp_path / "out", dry_run=True)
    split.unlink()
    with pytest.raises(MissingError, match=r"4.yaml: no such file"):
        study(file, tmp_path / "out", dry_run=True)
    only = write(tmp_path, root, "only", overrides={"dataset.split_file": str(split)})
    with pytest.raises(MissingError, match=r"4.yaml: no such file"):
        study(only, tmp_path / "out", dry_run=True)
    one = write(tmp_path, root, "one", factors={"few": {"1": {"dataset.split_file": str(tmp_path / "splits/1.yaml")}}})
    with pytest.raises(MissingError, match=r"split_file=null: arms that differ in it need one each"):
        study(one, tmp_path / "out", dry_run=True)


@pytest.mark.parametrize("name", ["arm", "state", "steps", "val/dice", "val/dice low"])
def test_a_factor_cannot_be_called_as_a_column(name: str, tmp_path: Path, root: Path) -> None:
    levels = {"a": {}, "b": {"optimizer.lr": 0.02}}
    with pytest.raises(ConfigError, match=f"factor {name} has the name of a column"):
        load_study(write(tmp_path, root, mode="grid", factors={name: levels}, scores=["val/dice"]))
    load_study(write(tmp_path, root, factors={name: levels}))  # an ablation has no such columns


@pytest.mark.slow
def test_one_table_of_sections_against_starts(phantom: Path, tmp_path: Path) -> None:
    """From the isotropic data set of the phantom to sections of the other one."""
    from connectomics.lightning.checkpoints import load_network, read_checkpoint
    from connectomics.pipeline.train import train

    network = {"model.architecture": "unet_2d", "model.options": {"features": [4, 8], "stem": 1}}
    small = {"data.patch_size": [1, 32, 32], "data.patches_per_epoch": 16, "training.max_epochs": 2, **network}
    target = {**base_of(phantom), "dataset": {
        "data_root": str(phantom), "datasets": ["phantom-aniso"], "crops": ["crop201"], "classes": ["mito"],
        "voxel_size": [5.24, 4, 4],
    }}  # fmt: skip
    elsewhere = {"dataset.datasets": ["phantom-iso"], "dataset.crops": ["crop1"], "dataset.voxel_size": [4, 4, 4]}
    source = changed(config_from_dict(target), {**small, **elsewhere}, "source")
    first = train(source, tmp_path / "first")
    box = Catalog.open(str(phantom)).crop("phantom-aniso", "crop201").box
    (z, y, x), (_, y1, x1) = box.begin, box.end
    levels = {}
    for number in (1, 4):
        split = {
            "train": [f"phantom-aniso/crop201:{z + 12 * 5.24},{y},{x}:{z + (12 + number) * 5.24},{y1},{x1}"],
            "val": [f"phantom-aniso/crop201:{z},{y},{x}:{z + 10 * 5.24},{y1},{x1}"],
        }
        (tmp_path / f"{number}.yaml").write_text(yaml.safe_dump(split))
        levels[str(number)] = {"dataset.split_file": str(tmp_path / f"{number}.yaml")}
    start = {"scratch": {}, "other": {"model.weights": str(first.folder)},
             "adapters": {"model.weights": str(first.folder), "model.adapters": {"rank": 2}}}  # fmt: skip
    file = tmp_path / "transfer.yaml"
    content = {"base": target, "overrides": small, "mode": "grid", "seeds": [1, 2], "scores": ["val/mito/iou"],
               "factors": {"sections": levels, "start": start}}  # fmt: skip
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    found = study(file, tmp_path / "out")
    assert found.unfinished == []
    assert [(line["sections"], line["start"], line["complete"]) for line in found.arms] == [
        (sections, name, 2) for sections in ("1", "4") for name in start
    ]
    with (found.folder / "study.csv").open() as table:
        assert next(csv.reader(table))[:3] == ["arm", "sections", "start"]
    text = (found.folder / "study.html").read_text()
    assert "val/mito/iou by sections and start" in text
    for row in found.rows:
        checkpoint = found.folder / "rows" / row["folder"] / "checkpoints/best.ckpt"
        names = read_checkpoint(checkpoint)["state_dict"]
        assert any(name.endswith(".up") for name in names) == (row["start"] == "adapters")
        assert not any(name.endswith(".up") for name in load_network(checkpoint).state_dict())
    by_seed = [{row["val/mito/iou"] for row in found.rows if row["seed"] == seed} for seed in (1, 2)]
    assert all(len(values) > 3 for values in by_seed), "sections and starts make a difference"
    assert study(file, tmp_path / "out") == found


@pytest.mark.parametrize("name", ["transfer_mito", "transfer_mito_vnc"])
def test_the_studies_of_transfer_fit_the_data(name: str, shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)  # split files are relative to it
    found = study(root / f"tutorials/studies/{name}.yaml", overrides=[f"dataset.data_root={shared_data}"], dry_run=True)
    assert {(line["sections"], line["start"]) for line in found.arms} >= {
        (sections, start) for sections in ("1", "3", "10") for start in ("scratch", "lucchi", "lucchi_adapters")
    }
    assert len(found.rows) == 3 * len(found.arms)


# -- the file --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"factor": {}}, r"unknown key 'factor'; did you mean 'factors'"),
        ({"factors": {"optimizer.lrr": [1]}}, r"tiny.yaml, optimizer.lrr=1: unknown key 'optimizer.lrr'.*optimizer.lr"),
        ({"factors": {"optimizer.lr": [-1]}}, r"optimizer.lr=-1: optimizer.lr must be at least 0"),
        ({"factors": {"optimizer.lr": 1}}, "factor optimizer.lr must be a list of values"),
        ({"factors": {"system.seed": [1, 2]}}, "cannot change system.seed.*give seeds"),
        ({"factors": {"dataset.datasets": [["a"]]}}, "cannot change dataset.datasets"),
        ({"factors": {"optimizer.lr": [0.02, 0.02]}}, "are the same configuration|twice"),
        ({"factors": {"optimizer.lr.x": [1]}}, "cannot set optimizer.lr.x: optimizer.lr holds a value"),
        ({"overrides": {"~data.augmentations.RandFlipd": None}}, "there is no such key"),
        ({"seeds": []}, "seeds is empty"),
        ({"seeds": [1, 1]}, "names a seed twice"),
        ({"folds": {"by": "crops"}}, "folds.by must be one of crop, box, dataset"),
        ({"halving": {"steps": [8, 4]}}, "ascending order"),
        ({"best": "min"}, "best is min, but checkpoint.mode of val/dice is max"),
        ({"scores": ["evaluate/mito/dice"], "halving": {"steps": [4]}}, "put a val/ score first"),
        ({"overrides": {"system.cpu_processes": 2}}, "one device"),
        ({"base": 3}, "base must be a configuration file or its content"),
    ],
)  # fmt: skip
def test_wrong_files_are_refused(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_study(write(tmp_path, tmp_path, **content))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="no study file"):
        load_study(tmp_path / "no.yaml")


def test_a_grid_has_all_combinations(tmp_path: Path) -> None:
    factors = {"optimizer.lr": [0.1, 0.2], "schedule": {"none": {"scheduler.name": "constant"}, "as_is": None}}
    _, _, arms = load_study(write(tmp_path, tmp_path, factors=factors, mode="grid"))
    assert [arm.name for arm in arms] == [
        f"optimizer.lr={lr} schedule={name}" for lr in (0.1, 0.2) for name in ("none", "as_is")
    ]
    assert [(a.config.optimizer.lr, a.config.scheduler.name) for a in arms[:2]] == [(0.1, "constant"), (0.1, "cosine")]


def test_a_mapping_replaces_and_a_level_of_the_base_is_the_base(tmp_path: Path) -> None:
    study_file = write(tmp_path, tmp_path, factors={"optimizer.lr": [0.01, 0.02]})
    _, base, arms = load_study(study_file, ["optimizer.weight_decay=0.5"])
    assert [arm.name for arm in arms] == [BASE, "optimizer.lr=0.02"]
    assert {arm.config.optimizer.weight_decay for arm in arms} == {0.5}
    other = changed(base, {"model.options": {"channels": [8, 16], "strides": [2]}}, "here")
    assert "num_res_units" not in other.model.options
    assert "num_res_units" not in changed(base, {"~model.options.num_res_units": None}, "here").model.options
    assert base.model.options["num_res_units"] == 1
    assert math.isclose(other.optimizer.lr, 0.01)


@pytest.mark.parametrize(
    "file", sorted((Path(__file__).parents[2] / "tutorials/studies").glob("*.yaml")), ids=lambda p: p.stem
)
def test_the_studies_that_ship_are_valid(file: Path) -> None:
    content, _, arms = load_study(file)
    assert len(arms) > 1
    assert content.seeds


def test_the_study_of_the_documentation_has_the_arms_that_it_names(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    text = (root / "docs/studies.md").read_text(encoding="utf-8")
    block, starts, halving = re.findall(r"```yaml\n(.*?)```", text, re.S)
    file = tmp_path / "doc.yaml"
    file.write_text(block.replace("../phantom.yaml", str(root / "tutorials/phantom.yaml")) + halving)
    content, _, arms = load_study(file)
    named = re.findall(r"`([^`]+)`", re.findall(r"This file has six \*arms\*: (.*?), each", text, re.S)[0])
    assert [arm.name for arm in arms] == named
    assert "RandScaleIntensityd" not in arms[-1].config.data.augmentations
    assert content.halving is not None
    file.write_text(f"base: {root / 'tutorials/phantom.yaml'}\n{starts}")
    assert [arm.levels for arm in load_study(file)[2]] == [
        {"sections": sections, "start": start}
        for sections in ("1", "10")
        for start in ("scratch", "other_data", "adapters", "pretrained")
    ]
