"""The challenge, whole: plan all classes, follow the run book, and get a submission that validates."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from connectomics.cellmap.classes import CLASSES
from connectomics.cellmap.crop_table import CropTable, TableEntry
from connectomics.cli import main
from connectomics.config import load_config
from connectomics.data.normalization import table as gray_ranges
from connectomics.errors import InputError, WriteError
from connectomics.geometry import Box, VoxelGrid
from connectomics.io.multiscale import Multiscale
from connectomics.pipeline.challenge_plan import (
    forward_flops,
    gpu_of,
    plan_challenge,
    plan_cost,
    run_book,
)
from connectomics.pipeline.plan import hours
from tests.cellmap.roots import grid_of, write_label, write_raw
from tests.s3_server import FolderServer

ROOT = Path(__file__).resolve().parents[2]
SCORED = [c.name for c in CLASSES.values() if c.scored]
#: on top of any plan: two training steps of a few patches, on the CPU
_SHORT = [
    "data.batch_size=2", "data.patches_per_epoch=4", "data.validation_windows=4", "data.num_workers=0",
    "data.cache=none", "training.max_epochs=1", "training.precision='32'", "system.num_gpus=0", "system.num_cpus=1",
    "system.accelerator=cpu", "inference.block_size=[64,64,64]", "inference.tta=none", "logging.images=false",
    "logging.use_tensorboard=false",
]  # fmt: skip
#: small networks in place of those of a plan for the CPU, and for a GPU
TINY = [*_SHORT, "model.options.features=[4,8]", "data.patch_size=[1,32,32]", "inference.window=[8,32,32]"]
TINY_3D = [
    *_SHORT, "model.architecture=unet", "model.options={channels:[4,8],strides:[2],num_res_units:0}",
    "data.patch_size=[16,16,16]",
]  # fmt: skip
SMALL = ["ecs", "mito_mem", "mito_lum", "mito_ribo", "mito", "er"]


# -- the plan ----------------------------------------------------------------------------------------------------------
def test_all_48_classes_are_planned(phantom: Path, tmp_path: Path) -> None:
    found = plan_challenge(str(phantom), out=tmp_path, trial=False)
    planned = [name for plan in found.plans.plans.values() for name in plan.classes]
    unions = [name for names in found.unions.values() for name in names]
    assert sorted([*planned, *unions, *found.absent]) == sorted(SCORED)
    assert {"eres", "eres_mem", "eres_lum"} <= set(found.absent)  # the phantom has none
    assert len(found.absent) < 8
    for name, file in found.plans.files.items():
        config = load_config(file, [])
        assert config.dataset.classes == list(found.plans.plans[name].classes)
        assert (config.inference.groups or []) == list(found.unions.get(name, ()))
    book = found.run_book.read_text()
    assert f"CROPS ?= {phantom / 'test_crops.csv'}" in book
    assert ": these data are not public" in book
    assert "no step was tried and no speed given" in book
    (line,) = (line for line in book.splitlines() if line.startswith("CLASSES ?= "))
    assert set(line.split()[2:]) == set(SCORED) - set(found.absent)  # what it can give
    with pytest.raises(WriteError, match="--overwrite"):
        plan_challenge(str(phantom), out=tmp_path, trial=False)
    (tmp_path / "Makefile").write_text("all:\n")
    with pytest.raises(WriteError, match="was not written by plan"):
        plan_challenge(str(phantom), out=tmp_path, trial=False, overwrite=True)


def test_groups_are_unions_of_the_atoms_of_one_network(phantom: Path, tmp_path: Path) -> None:
    """By default only where no crop annotates the group alone, which crops of the phantom do."""
    classes = ["ves_mem", "ves_lum", "ves", "er"]
    found = plan_challenge(str(phantom), out=tmp_path / "a", classes=classes, trial=False)
    assert found.unions == {}
    found = plan_challenge(str(phantom), out=tmp_path / "b", classes=classes, trial=False, from_atoms=True)
    ((name, unions),) = found.unions.items()
    assert unions == ("ves",)
    config = load_config(found.plans.files[name], [])
    assert set(config.dataset.classes) - {"er"} == {"ves_mem", "ves_lum"}
    assert config.inference.groups == ["ves"]
    assert all("ves" not in plan.classes for plan in found.plans.plans.values())


def test_a_group_that_only_its_atoms_crops_annotate_needs_no_output(tmp_path: Path) -> None:
    grid = grid_of((16, 16, 16), 4.0)
    slab = np.zeros(grid.shape, np.uint8)
    slab[4:8] = 1
    write_raw(tmp_path / "data", "set", np.zeros(grid.shape, np.uint8), grid)
    for name, values in (("ves_mem", slab), ("ves_lum", np.roll(slab, 4, 0)), ("ves", slab | np.roll(slab, 4, 0))):
        write_label(tmp_path / "data", "set", "crop1", name, values, grid)
    found = plan_challenge(str(tmp_path / "data"), out=tmp_path / "a", trial=False)
    assert [*found.unions.values()] == [("ves",)]
    write_label(tmp_path / "data", "set", "crop2", "ves", slab, grid)  # from it only ves itself can be learned
    assert plan_challenge(str(tmp_path / "data"), out=tmp_path / "b", trial=False).unions == {}


def test_hours_of_a_given_gpu_follow_from_the_operations(phantom: Path, tmp_path: Path) -> None:
    gpu = gpu_of(80, 50)
    assert gpu is not None
    one = plan_challenge(str(phantom), out=tmp_path / "a", classes=["er"], gpu=gpu)
    two = plan_challenge(str(phantom), out=tmp_path / "b", classes=["er"], gpu=replace(gpu, flops=2 * gpu.flops))
    ((name, cost),), (other,) = one.costs.items(), two.costs.values()
    assert cost.by == "50 TFLOP/s, as given"
    assert cost.train_hours is not None
    assert other.train_hours == pytest.approx(cost.train_hours / 2)
    assert cost.predict_hours is not None
    assert other.predict_hours == pytest.approx(cost.predict_hours / 2)
    assert one.plans.machine.gpu == "a GPU with 80 GB"
    plan, table = one.plans.plans[name], CropTable.load(phantom / "test_crops.csv")
    plan.step_seconds = 2.0
    measured = plan_cost(plan, table, one.plans.machine)
    assert measured.train_hours == hours(plan)
    assert "measured on" in measured.by
    assert measured.flops == cost.flops
    other_class = replace(table.entries[0], crop=9999, class_name="nuc")  # this network is not asked for that crop
    assert plan_cost(plan, CropTable((*table, other_class)), one.plans.machine) == measured
    with pytest.raises(InputError, match="remote ROOT"):
        plan_challenge(str(phantom), out=tmp_path / "c", data_root="data", trial=False)
    with pytest.raises(InputError, match="together"):
        gpu_of(80, None)


def test_operations_are_counted_exactly() -> None:
    """One 3x3x3 convolution of 1 to 4 channels, a transposed one and so on: by hand for the first level alone."""
    config = load_config(
        None,
        ["model.architecture=unet", "model.options={channels:[4,8],strides:[1],num_res_units:0}",
         "data.patch_size=[16,16,16]"],
    )  # fmt: skip
    voxels = 16**3
    # two encoder convolutions, and the two transposed ones of MONAI's UNet: channels in times out times 27, twice
    expected = 2 * 27 * voxels * (1 * 4 + 4 * 8 + (4 + 8) * len(config.dataset.classes))
    assert forward_flops(config) == expected


def test_the_run_book_quotes_for_make_and_for_the_shell(tmp_path: Path) -> None:
    book = run_book("/a b/$x", "challenge", ["p"], ["note"], "s3://public")
    (tmp_path / "Makefile").write_text(book)
    (tmp_path / "p.yaml").write_text("")
    said = subprocess.run(
        ["make", "--no-print-directory", "-n"], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    lines = [shlex.split(line) for line in said.splitlines() if line.startswith("pytc")]
    assert [words[1] for words in lines] == ["fetch", "train", "predict", "predict", "tune", "merge", "validate"]
    assert lines[0][2] == "/a b/$x"


def test_the_names_of_the_challenge_s_data_sets() -> None:
    assert len(gray_ranges()) == 22
    assert {row.dataset for row in CropTable.challenge()} <= gray_ranges().keys()


# -- the run book ------------------------------------------------------------------------------------------------------
def steps(folder: Path, *variables: str) -> Iterator[list[str]]:
    """Words of the commands that make would run."""
    said = subprocess.run(
        ["make", "--no-print-directory", "-n", *variables], cwd=folder, capture_output=True, text=True, check=True
    ).stdout.replace("\\\n", " ")
    for line in said.splitlines():
        yield shlex.split(line)


def follow(folder: Path, monkeypatch: pytest.MonkeyPatch, *variables: str) -> list[str]:
    """Run what make would run, pytc in this process; return the verbs."""
    monkeypatch.chdir(folder)
    verbs = []
    for words in steps(folder, *variables):
        if words[0] == "pytc":
            assert main(words[1:]) == 0, words
            verbs.append(words[1])
        else:
            subprocess.run(shlex.join(words).replace("'&&'", "&&"), shell=True, check=True, cwd=folder)
    return verbs


def test_the_run_book_gives_a_submission(
    phantom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "crops.csv"
    box = Box((140.0, 140.0, 140.0), (220.0, 220.0, 220.0))
    grids = {name: VoxelGrid.covering(box, [4.0 if "_" in name else 8.0] * 3) for name in SMALL}
    CropTable(tuple(TableEntry(5, "phantom-iso", name, grid) for name, grid in grids.items())).save(table)
    plans = tmp_path / "plans"
    words = [word for name in SMALL for word in ("--class", name)]
    command = ["plan", str(phantom), "--challenge", *words, "--dataset", "phantom-iso", "--crops", str(table)]
    assert main([*command, "--out", str(plans), "--no-trial", "--from-atoms"]) == 0
    said = capsys.readouterr().out
    assert "run book: make -C" in said
    for file in plans.glob("plan_*.yaml"):  # one network of all, so that there is only one training
        chosen = yaml.safe_load(file.read_text())
        file.unlink()
    chosen["dataset"] |= {"classes": ["ecs", "mito_mem", "mito_lum", "mito_ribo", "er"], "voxel_size": [8.0] * 3}
    chosen["inference"] = {"groups": ["mito"]}
    (plans / "one.yaml").write_text(yaml.safe_dump(chosen))
    variables = ("PLANS=one", f"TRAIN={shlex.join(TINY)}", "TUNE=--trials 1")
    assert follow(plans, monkeypatch, *variables) == ["train", "predict", "predict", "tune", "merge", "validate"]
    assert "0 errors" in capsys.readouterr().out
    rows = json.loads((plans / "submission.merge/merge.json").read_text())["classes"]
    assert set(rows) == set(SMALL)
    assert Multiscale.open(str(plans / "test/one/phantom-iso.zarr/crop5/mito")).grid == grids["mito"]
    assert follow(plans, monkeypatch, *variables) == ["validate"]  # finished steps are left out


# -- all of it ---------------------------------------------------------------------------------------------------------
def named_after_the_challenge(phantom: Path, out: Path) -> Path:
    """A data root of 22 data sets with the challenge's names: the two of a phantom, each time with one of its crops."""
    for number, name in enumerate(sorted(gray_ranges())):
        source = ("phantom-iso", "phantom-aniso")[number % 2]
        zarr = out / name / f"{name}.zarr"
        shutil.copytree(phantom / source / f"{source}.zarr", zarr, copy_function=os.link)
        crops = sorted((zarr / "recon-1/labels/groundtruth").glob("crop*"))
        for place, crop in enumerate(crops):
            if place != number // 2 % len(crops):
                shutil.rmtree(crop)
    return out


def scaled_table(root: Path, extent_nm: float) -> CropTable:
    """The challenge's 413 arrays, each crop scaled down to at most ``extent_nm``, around the middle of the raw."""
    rows = []
    for entries in CropTable.challenge().crops().values():
        scale = extent_nm / max(max(entry.grid.box.extent) for entry in entries)
        dataset = entries[0].dataset
        raw = Multiscale.open(str(root / dataset / f"{dataset}.zarr/recon-1/em/fibsem-uint8")).levels[0].grid
        for entry in entries:
            shape = [max(2, round(n * scale)) for n in entry.grid.shape]
            rows.append(replace(entry, grid=VoxelGrid.centered(raw.box.center, entry.grid.voxel_size, shape)))
    return CropTable(tuple(rows))


@pytest.mark.slow
def test_22_data_sets_and_413_arrays_end_in_a_submission_that_validates(phantom: Path, tmp_path: Path) -> None:
    """From an empty data root over S3, as a user does it: make, with tiny networks."""
    public = named_after_the_challenge(phantom, tmp_path / "public")
    table = scaled_table(public, 96.0)
    assert (len(table), len(table.crops()), len({row.dataset for row in table})) == (413, 16, 6)
    table.save(tmp_path / "crops.csv")
    environment = {**os.environ, "AWS_ENDPOINT_URL": "", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pytc = [sys.executable, "-m", "connectomics"]

    def run(*words: str, cwd: Path = tmp_path) -> str:
        done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    with FolderServer(public) as server:
        environment["AWS_ENDPOINT_URL"] = server.endpoint
        options = ["--data-root", "data", "--crops", "crops.csv", "--gpu-memory", "80", "--gpu-tflops", "40"]
        said = run(*pytc, "plan", "s3://public", "--challenge", "--out", "plans", *options)
        assert "run book: make -C plans" in said
        assert len(list((tmp_path / "plans").glob("plan_*.yaml"))) > 1
        variables = [
            f"PYTC={shlex.join(pytc)}", "FETCH=--context 64", "TUNE=--trials 1",
            f"TRAIN={shlex.join(TINY_3D)}",
        ]  # fmt: skip
        run("make", *variables, cwd=tmp_path / "plans")
    assert "submission.zip: 0 errors" in run("make", "validate", *variables, cwd=tmp_path / "plans")
    rows = json.loads((tmp_path / "plans/submission.merge/merge.json").read_text())["classes"]
    assert 40 < len(rows) <= len(SCORED)  # the phantom lacks a few classes
