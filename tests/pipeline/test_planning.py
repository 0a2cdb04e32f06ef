"""Planning: what is measured is right, each choice follows from it, and what is written trains."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from connectomics.cellmap import catalog
from connectomics.cellmap.catalog import Catalog
from connectomics.cli import main
from connectomics.config import load_config
from connectomics.errors import InputError
from connectomics.geometry import Box, VoxelGrid
from connectomics.inference.windows import window_for
from connectomics.pipeline.challenge_plan import forward_flops
from connectomics.pipeline.data_facts import across_datasets, data_facts
from connectomics.pipeline.plan import MachineFacts, hours, propose
from connectomics.pipeline.trial_step import choose_batch, choose_format, try_step
from tests.cellmap.roots import grid_of, write_label, write_raw

CPU = MachineFacts(cores=4, memory=16 << 30, gpu=None, gpu_memory=0, disk=100 << 30)
H200 = MachineFacts(cores=16, memory=128 << 30, gpu="H200", gpu_memory=139 << 30, disk=500 << 30)


@pytest.fixture(scope="module")
def balls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Raw at 4 nm; nuc: a ball of 400 nm; pm: plates 16 nm thick; er: annotated and absent."""
    root = tmp_path_factory.mktemp("balls")
    grid = grid_of((112, 112, 112), 4.0)
    z, y, x = np.meshgrid(*grid.axes(), indexing="ij")
    ball = (z - 224) ** 2 + (y - 224) ** 2 + (x - 224) ** 2 <= 200**2
    plates = (np.floor(x / 16).astype(int) % 4 == 1) & np.ones(grid.shape, bool)
    write_raw(root, "set", (40 + 100 * ball).astype(np.uint8), grid, levels=3)
    write_label(root, "set", "crop1", "nuc", ball.astype(np.uint8), grid)
    write_label(root, "set", "crop1", "pm", plates.astype(np.uint8), grid)
    write_label(root, "set", "crop1", "er", np.zeros(grid.shape, np.uint8), grid)
    return root


def test_the_mean_chord_of_a_ball_is_two_thirds_of_its_diameter(balls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "_BLOCK_VOXELS", 5 * 112**2)  # blocks of five planes change nothing
    (facts,) = data_facts(str(balls), ["nuc"]).classes
    assert facts.chord_nm == pytest.approx(2 / 3 * 400, rel=0.03)
    assert facts.share == pytest.approx(4 / 3 * np.pi * 200**3 / 448**3, rel=0.01)


def cubes_that_touch(folder: Path) -> Any:
    """Eight cubes of 8 voxels in a cube of 16: half of the faces are shared, however the volume is read."""
    grid = grid_of((32, 32, 32), 8.0)
    ids = np.zeros(grid.shape, np.uint16)
    ids[8:24, 8:24, 8:24] = 1 + np.kron(np.arange(8).reshape(2, 2, 2), np.ones((8, 8, 8))).astype(np.uint16)
    write_raw(folder, "set", np.zeros(grid.shape, np.uint8), grid)
    write_label(folder, "set", "crop1", "cell", ids, grid, kind="instance")
    write_label(folder, "set", "crop1", "mito", (ids > 0).astype(np.uint8), grid)
    return data_facts(str(folder), ["cell", "mito"])


def test_instances_that_touch_get_a_head_that_separates_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "_BLOCK_VOXELS", 5 * 32**2)
    cell, mito = (data := cubes_that_touch(tmp_path)).classes
    assert (cell.chord_nm, cell.touching) == (pytest.approx(64.0), pytest.approx(0.5))
    assert (mito.chord_nm, mito.touching) == (pytest.approx(128.0), 0.0)
    for machine, kind, method in ((CPU, "boundary", "watershed"), (H200, "affinities", "mutex_watershed")):
        plans = [plan for plan in propose(data, machine, "r") if "cell" in plan.classes]
        assert [(head.kind, head.class_name) for head in plans[0].config().model.heads] == [(kind, "cell")]
        assert plans[0].settings["decoding.classes"]["cell"]["method"] == method


def test_instances_have_a_minimum_size_by_what_is_annotated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty rods of 1 to 40 voxels, in two crops and blocks of one plane: 5 % are two; ``er`` has no IDs."""
    monkeypatch.setattr(catalog, "_BLOCK_VOXELS", 1)
    grid = grid_of((40, 80, 4), 10.0)
    ids = np.zeros(grid.shape, np.uint16)
    for n in range(40):
        ids[: n + 1, 2 * n, 1] = 300 + n
    write_raw(tmp_path, "set", np.zeros(grid.shape, np.uint8), grid)
    for name in ("ves", "synapse"):
        for crop, part in (("crop1", ids < 320), ("crop2", ids >= 320)):
            write_label(tmp_path, "set", crop, name, ids * part, grid, kind="instance")
    write_label(tmp_path, "set", "crop1", "er", (ids > 0).astype(np.uint8), grid)
    data = data_facts(str(tmp_path), ["ves", "synapse", "er"])
    assert [facts.small_nm3 for facts in data.classes] == [2000.0, 2000.0, 0.0]
    decoding = {name: how for plan in propose(data, CPU, "r") for name, how in plan.config().decoding.classes.items()}
    assert decoding == {"ves": {"min_size_nm3": 2000.0}, "synapse": {"method": "cc3d", "min_size_nm3": 2000.0}}


@pytest.mark.slow
def test_a_step_with_a_head_is_tried(tmp_path: Path) -> None:
    one = next(plan for plan in propose(cubes_that_touch(tmp_path), CPU, "r") if "cell" in plan.classes)
    try_step(one, CPU)
    assert one.step_seconds is not None
    assert one.step_seconds > 0


def test_an_empty_crop_is_refused_as_by_training(tmp_path: Path) -> None:
    write_raw(tmp_path, "set", np.zeros((8, 8, 8), np.uint8), grid_of((8, 8, 8)))
    write_label(tmp_path, "set", "crop1", "nuc", np.ones((8, 8, 8), np.uint8), grid_of((8, 8, 8)))
    write_label(tmp_path, "set", "crop2", "nuc", np.zeros((0, 8, 8), np.uint8), grid_of((0, 8, 8)))
    with pytest.raises(InputError, match="set/crop2 is empty"):
        data_facts(str(tmp_path), ["nuc"])


def test_a_class_of_the_last_data_set_is_found(tmp_path: Path) -> None:
    """13 crops without ld come first; their counts say so, and what is read is spread over data sets."""
    grid = grid_of((8, 8, 8), 4.0)
    there = np.zeros(grid.shape, np.uint8)
    there[2:6, 2:6, 2:6] = 1
    for dataset, crops in (("a", 13), ("z", 2)):
        write_raw(tmp_path, dataset, np.zeros(grid.shape, np.uint8), grid)
        for number in range(crops):
            counts = {} if number == 1 else None  # one that must be read
            values = there if dataset == "z" else np.zeros(grid.shape, np.uint8)
            write_label(tmp_path, dataset, f"crop{number}", "ld", values, grid, counts=counts)
    (facts,) = data_facts(str(tmp_path), ["ld"]).classes
    assert facts.crops == 15
    assert facts.chord_nm == pytest.approx(16.0)
    assert facts.present_um3 == pytest.approx(2 * 64 * 64 / 1e9)
    assert facts.share == pytest.approx(2 * 64 / (15 * 512))
    crops = Catalog.open(str(tmp_path)).crops()
    order = [crops[number].dataset for number in across_datasets(crops)]
    assert sorted(across_datasets(crops)) == list(range(15))
    assert order[:4] == ["a", "z", "a", "z"]


def test_thin_classes_are_fine_and_large_ones_coarse(balls: Path) -> None:
    data = data_facts(str(balls), ["nuc", "pm", "er"])
    plans = {plan.voxel_nm: plan for plan in propose(data, H200, str(balls))}
    assert [plan.classes for plan in plans.values()] == [("nuc",), ("pm",)]
    assert min(plans) < max(plans)
    assert all("er" not in plan.classes for plan in plans.values())
    for plan in plans.values():
        assert len(plan.reasons) >= 8
        assert plan.config().dataset.classes == list(plan.classes)


def test_rare_classes_are_drawn_and_counted_by_batch(balls: Path) -> None:
    data = data_facts(str(balls), ["nuc"])
    rare = replace(data, classes=tuple(replace(facts, share=0.009) for facts in data.classes))
    for machine, options in ((CPU, {"DiceLoss": {"pooled": True}}), (H200, {})):
        (often,), (seldom,) = propose(data, machine, "r"), propose(rare, machine, "r")
        assert (often.config().data.sampling, seldom.config().data.sampling) == ({}, {"class": 1.0})
        assert (often.config().model.loss_options, seldom.config().model.loss_options) == ({}, options)


def test_the_machine_decides_the_network(balls: Path) -> None:
    data = data_facts(str(balls), ["nuc"])
    (large,), (small,) = propose(replace(data, raw_extents_nm=(1e5,) * 3), H200, "r"), propose(data, CPU, "r")
    assert large.settings["model.mednext_size"] == "B"
    assert large.settings["data.patch_size"] == [128] * 3
    assert window_for(large.config(), Box((0, 0, 0), (1e5, 1e5, 1e5)))[0] == (208, 208, 208)
    assert any("windows of 208 voxels" in reason for reason in large.reasons)
    large.step_seconds = 1.0
    assert hours(large) == pytest.approx(300 * 2000 / 3600)
    assert (small.settings["model.architecture"], small.settings["training.precision"]) == ("unet_2d", "32")
    assert small.settings["data.patch_size"] == [1, 32, 32], "the largest multiple of 32 in crops of 56 voxels"
    assert hours(small, cores=2) == pytest.approx(1), "120 CPU minutes on two cores"
    (fast,) = propose(data, replace(CPU, cpu_bf16=True), "r", minutes=30)
    assert (fast.settings["training.precision"], fast.settings["training.max_cpu_minutes"]) == ("bf16-mixed", 30)
    assert fast.settings["data.intensity"] == {"invert": {"prob": 0.3}}
    (short,) = propose(data, CPU, "r", minutes=29)
    assert "data.intensity" not in short.settings, "shorter trainings lose by more inverted patches"
    (timed,) = propose(data, H200, "r", minutes=30)
    assert hours(timed) == pytest.approx(0.5)
    assert timed.settings["training.max_epochs"] == -1
    assert timed.settings["model.mednext_size"] == "S", "more steps in the time"
    assert timed.settings["data.patch_size"] == [32] * 3, "not much wider than the raw, 28 voxels of 16 nm"
    (full,) = propose(data, replace(CPU, disk=1000), "r")
    assert full.settings["data.cache"] == "none"
    with pytest.raises(InputError, match="nothing to learn"):
        propose(data_facts(str(balls), ["er"]), CPU, "r")
    with pytest.raises(InputError, match="must be positive, got 0"):
        propose(data, CPU, "r", minutes=0)


def test_a_two_dimensional_network_works_coarsely_and_returns_every_voxel(balls: Path) -> None:
    """A ball of 400 nm spans 12 voxels of 16 nm; what is thin needs the 4 nm of the raw."""
    data = data_facts(str(balls), ["nuc"])
    thin = replace(data.classes[0], name="pm", chord_nm=30.0)
    plans = {plan.classes: plan.settings for plan in propose(replace(data, classes=(*data.classes, thin)), CPU, "r")}
    nuc, pm = plans["nuc",], plans["pm",]
    assert (nuc["dataset.voxel_size"], nuc["model.options"]["stem"]) == ([8.0] * 3, 2)
    assert (pm["dataset.voxel_size"], pm["model.options"]["stem"]) == ([4.0] * 3, 1)
    assert nuc["inference.tta"] == "planes"
    near = replace(data.classes[0], name="er", chord_nm=110.0)  # alone: 4 nm with a stem of 2
    (both,) = [p for p in propose(replace(data, classes=(near, thin)), CPU, "r") if "pm" in p.classes]
    assert both.classes == ("er", "pm")
    assert both.settings["model.options"]["stem"] == 1
    assert not any("stem of 2" in reason for reason in both.reasons)


def test_thick_sections_stay_as_they_are(tmp_path: Path) -> None:
    grid = VoxelGrid((40.0, 4.0, 4.0), (0, 0, 0), (6, 64, 64))
    there = np.zeros(grid.shape, np.uint8)
    there[:, 16:48, 16:48] = 1
    write_raw(tmp_path, "set", there, grid)
    write_label(tmp_path, "set", "crop1", "mito", there, grid)
    data = data_facts(str(tmp_path), ["mito"])
    assert data.raw_voxel == (40.0, 4.0, 4.0)
    (found,) = propose(data, CPU, "r")
    assert found.settings["dataset.voxel_size"][0] == 40.0
    assert found.settings["dataset.voxel_size"][1] == found.settings["dataset.voxel_size"][2] <= 8.0
    assert all(text.lstrip("-")[0] == "z" for text in found.settings["inference.tta"])
    assert found.config().data.patch_size[0] == 1
    (on_gpu,) = propose(replace(data, raw_extents_nm=(800.0, 4000.0, 4000.0)), H200, "r")
    assert on_gpu.settings["model.architecture"] == "residual_unet"
    z, y, x = on_gpu.settings["data.patch_size"]
    assert z == 20, "all sections"
    assert y == x
    assert y % 32 == 0
    assert y == pytest.approx(128 * (40 / on_gpu.voxel_nm) ** (1 / 3), abs=16), "as many voxels as a cube of 128"
    assert forward_flops(on_gpu.config()) > 0, "the network takes such patches"


@pytest.mark.parametrize(("memory", "batch"), [(100, 4), (3, 1)])
def test_the_batch_is_the_smallest_that_keeps_a_gpu_busy(balls: Path, memory: int, batch: int) -> None:
    """A GPU that does four patches as fast as one, and not more; if memory ends, half of what fits is left free."""

    def step(patches: int) -> tuple[float, int]:
        if patches > memory:
            raise torch.OutOfMemoryError
        return 0.5 * max(1, patches / 4), patches

    (plan,) = propose(data_facts(str(balls), ["nuc"]), H200, "r", minutes=10)
    choose_batch(plan, step)
    assert (plan.settings["data.batch_size"], plan.step_seconds, plan.step_memory) == (batch, 0.5, batch)
    assert plan.settings["data.patches_per_epoch"] == 60 * batch, "1,200 steps in all, 20 validations"
    assert plan.config().inference.batch_size == batch
    memory = 0
    with pytest.raises(InputError, match="not even one patch of"):
        choose_batch(plan, step)


@pytest.mark.parametrize(
    ("seconds", "last"),
    [({False: 0.2, True: 0.1}, True), ({False: 0.1, True: 0.2}, False), ({False: 0.1}, False), ({}, False)],
)
def test_the_memory_format_is_the_faster_one(balls: Path, seconds: dict[bool, float], last: bool) -> None:
    """One that does not run, for lack of memory or of a convolution, is not the faster one."""
    (plan,) = propose(data_facts(str(balls), ["nuc"]), H200, "r", minutes=10)

    def step() -> float:
        if (chosen := plan.config().training.channels_last) not in seconds:
            raise RuntimeError("no engine for this convolution")
        return seconds[chosen]

    choose_format(plan, step)
    assert plan.config().training.channels_last is last


def test_what_is_written_trains(
    balls: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("connectomics.pipeline.plan.usable_cores", lambda: 1)
    arguments = ["plan", str(balls), "--class", "nuc", "--out", str(tmp_path)]
    assert main([*arguments, "--no-trial"]) == 0
    (file,) = tmp_path.glob("plan_*.yaml")
    said = capsys.readouterr().out
    assert f"pytc train {file}" in said
    assert "\n1 core, " in said
    assert "1 cores" not in said
    assert load_config(file).dataset.classes == ["nuc"]
    small = ["data.patch_size=[1,32,32]", "inference.window=[1,32,32]", "data.cache=none", "data.num_workers=0"]
    assert main(["train", str(file), "--fast-dev-run", *small]) == 0
    capsys.readouterr()
    assert main([*arguments, "--no-trial"]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert main(["plan", str(balls), "--class", "nuk"]) == 1
    assert "did you mean 'nuc'" in capsys.readouterr().err
