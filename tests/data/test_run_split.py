"""The sides of a run on data roots: a single volume is cut, labels are counted once, states are checked."""

from __future__ import annotations

import logging
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from connectomics.cellmap.catalog import Catalog
from connectomics.cellmap.ingest import Drawn, Known, ingest_labels, ingest_raw
from connectomics.cli import main
from connectomics.config import RunConfig, save_config
from connectomics.data.contents import LabelCounter, content_of
from connectomics.data.datamodule import CellMapDataModule
from connectomics.data.run_split import run_split
from connectomics.data.sampling import PatchRequest
from connectomics.data.splits import Split, parse_entry
from connectomics.data.validation_windows import validation_shape
from connectomics.errors import ConfigError, InputError
from connectomics.geometry import Box, VoxelGrid
from connectomics.io.formats import open_volume
from connectomics.io.write import ensure_group
from connectomics.pipeline.package import write_package
from connectomics.pipeline.runs import Run
from connectomics.pipeline.targets import kept_out_targets, with_trained
from connectomics.pipeline.train import train
from tests.cellmap.roots import GROUND_TRUTH, grid_of, write_label, write_raw, zarr_of

LONG = (16, 16, 96)  # voxels of 8 nm


def config_of(root: Path, classes: tuple[str, ...] = ("mito",), **data: Any) -> RunConfig:
    config = RunConfig()
    config.dataset.data_root = str(root)
    config.dataset.classes = list(classes)
    for name, value in {"patch_size": [16, 16, 16], "num_workers": 0, "patches_per_epoch": 8, **data}.items():
        setattr(config.data, name, value)
    return config


def labels_with_blobs(shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).random(shape) < 0.2).astype(np.uint8)


def single_volume(root: Path) -> Path:
    write_raw(root, "mine", np.random.default_rng(0).integers(0, 255, LONG, dtype=np.uint8), grid_of(LONG))
    write_label(root, "mine", "crop1", "mito", labels_with_blobs(LONG), grid_of(LONG))
    return root


# -- a single volume ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("cache", ["none", "memory"])
def test_a_single_volume_validates_on_a_region_that_training_never_sees(tmp_path: Path, cache: str) -> None:
    config = config_of(single_volume(tmp_path), cache=cache)
    module = CellMapDataModule(config, tmp_path / "run")
    module.setup()
    split = Split.load(tmp_path / "run/split.yaml")
    assert split == module.split
    ((_, train), (_, val)) = (parse_entry(entry) for side in (split.train, split.val) for entry in side)
    assert train is not None
    assert val is not None
    first, second = sorted((train, val), key=lambda box: box.begin)
    assert second.begin[2] - first.end[2] >= 64.0 - 1e-6  # half a patch lies between
    assert 0.05 < val.extent[2] / (train.extent[2] + val.extent[2]) < 0.3  # about 15 % validate
    (volume,) = module.val_volumes
    assert val.contains(volume.grid.box, tolerance=8.0)
    held = set()
    for seed in range(40):
        patch = module.train_dataset[PatchRequest(0, None, (seed,))]
        known = patch.dense()["known"][0]  # type: ignore[union-attr]
        places = patch.grid.to_world(np.argwhere(known))  # type: ignore[union-attr]
        assert (places[:, 2] > train.begin[2] - 8).all()
        assert (places[:, 2] < train.end[2] + 8).all()
        held |= set(np.round(places[:, 2]).tolist())
    assert len(held) > 30  # patches go all over the training region
    points = module.train_dataset.points(0, "mito")
    assert len(points) > 100
    assert (points >= train.begin).all()
    assert (points <= train.end).all()


def test_what_was_ingested_trains_with_an_honest_validation(tmp_path: Path) -> None:
    """Sections 0 to 19 of 24 were annotated, in a volume that is longest along z."""
    raw = np.random.default_rng(0).integers(0, 255, (24, 12, 12), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "raw.tif", raw)
    tifffile.imwrite(tmp_path / "mito.tif", labels_with_blobs(raw.shape))
    root = tmp_path / "root"
    ingest_raw(root, "mine", open_volume(str(tmp_path / "raw.tif")), (8.0, 8.0, 8.0))
    drawn = Drawn("mito", open_volume(str(tmp_path / "mito.tif")), "semantic")
    ingest_labels(root, "mine", "crop1", drawn, (8.0, 8.0, 8.0), known=Known(slices=frozenset(range(20))))
    module = CellMapDataModule(config_of(root, patch_size=[8, 8, 8]))
    module.setup()
    (volume,) = module.val_volumes
    label, known = volume.read_labels(volume.grid)
    assert known.any()
    assert label.any()
    assert volume.grid.box.intersect(module.train_dataset.volumes[0].grid.box).is_empty


def test_classes_that_only_one_of_two_crops_has_are_cut_rather_than_lost(tmp_path: Path) -> None:
    raw_grid = grid_of((16, 16, 300))
    write_raw(tmp_path, "mine", np.random.default_rng(0).integers(0, 255, raw_grid.shape, dtype=np.uint8), raw_grid)
    far = VoxelGrid((8.0,) * 3, (4.0, 4.0, 8 * 180 + 4.0), LONG)
    write_label(tmp_path, "mine", "crop1", "mito", labels_with_blobs(LONG), grid_of(LONG))
    write_label(tmp_path, "mine", "crop2", "er", labels_with_blobs(LONG), far)
    module = CellMapDataModule(config_of(tmp_path, ("mito", "er")))
    module.setup()
    assert module.split is not None
    assert len(module.split.train) == len(module.split.val) == 2


def test_regions_are_predicted_and_what_leaks_is_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = single_volume(tmp_path)
    write_label(root, "mine", "crop2", "mito", np.ones((8, 8, 8), np.uint8), grid_of((8, 8, 8)))
    run = tmp_path / "run"
    Split(("mine/crop1:0,0,0:128,128,500",), ("mine/crop1:0,0,600:128,128,768", "mine/crop2")).save(run / "split.yaml")
    (target,) = kept_out_targets(config_of(root), [run / "checkpoints/last.ckpt"])
    assert target.grids["mito"].box == Box((0.0, 0.0, 600.0), (128.0, 128.0, 768.0))
    assert "mine/crop2" in caplog.text
    Split(("mine/crop2",), ("mine/crop1:0,0,640:128,128,700",)).save(tmp_path / "other/split.yaml")
    both = [run / "checkpoints/last.ckpt", tmp_path / "other/checkpoints/last.ckpt"]
    (target,) = kept_out_targets(config_of(root), both)
    assert target.grids["mito"].box == Box((0.0, 0.0, 640.0), (128.0, 128.0, 704.0))  # whole voxels


@pytest.fixture
def trained(tmp_path: Path) -> tuple[RunConfig, Run, Path]:
    """A run of a step, its configuration, and a split file with training and validation exchanged."""
    root, far = tmp_path / "root", VoxelGrid((8.0,) * 3, (4.0, 4.0, 8 * 64 + 4.0), (16, 16, 32))
    write_raw(root, "mine", np.random.default_rng(0).integers(0, 255, LONG, dtype=np.uint8), grid_of(LONG))
    write_label(root, "mine", "crop1", "mito", labels_with_blobs((16, 16, 48)), grid_of((16, 16, 48)))
    write_label(root, "mine", "crop2", "mito", labels_with_blobs(far.shape), far)
    config = config_of(root, patches_per_epoch=2)
    config.model.architecture = "unet"
    config.model.options = {"channels": [4, 8], "strides": [2], "num_res_units": 0}
    config.system.accelerator, config.logging.use_tensorboard = "cpu", False
    config.training.precision, config.training.max_epochs = "32", 1
    config.dataset.split_file = str(tmp_path / "first.yaml")
    Split(("mine/crop1",), ("mine/crop2",)).save(tmp_path / "first.yaml")
    Split(("mine/crop2",), ("mine/crop1",)).save(tmp_path / "other.yaml")
    return config, train(config, tmp_path / "run"), tmp_path / "other.yaml"


def test_a_run_does_not_resume_on_the_crops_that_it_validated(trained: tuple[RunConfig, Run, Path]) -> None:
    config, run, other = trained
    before = config.dataset.split_file
    config.training.max_epochs, config.dataset.split_file = 2, str(other)
    with pytest.raises(ConfigError, match=r"it would on others, which it may have trained on; set dataset\.split_file"):
        train(config, run.folder, resume=True)
    with pytest.raises(ConfigError, match=r"start a new run with model\.weights"):
        train(config, run.folder.parent / "copy", checkpoint=run.last_checkpoint)
    config.dataset.split_file = before
    assert train(config, run.folder, resume=True).epochs == 2


def test_validation_crops_that_the_weights_were_trained_on_are_named(
    trained: tuple[RunConfig, Run, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, run, other = trained
    config.model.weights = str(run.folder)
    train(config, run.folder.parent / "same")
    assert "model.weights was trained on" not in caplog.text
    config.dataset.split_file = str(other)
    exchanged = train(config, run.folder.parent / "exchanged")
    assert "1 of 1 crop was used for training (mine/crop1): validation is on what model.weights was" in caplog.text
    split = Split.load(exchanged.folder / "split.yaml")
    assert split == replace(Split.load(other), seen=Split.load(run.folder / "split.yaml").train)
    with pytest.raises(InputError, match=r"no crop of .* was kept out of the training"):
        kept_out_targets(config, [exchanged.folder / "checkpoints/last.ckpt"])
    package = write_package(exchanged, tmp_path / "exchanged.pytc")
    for network in (exchanged.last_checkpoint, package.path):
        assert all(target.seen_in_training for target in with_trained(None, config, [network]))
    config.training.max_epochs = 2
    assert train(config, exchanged.folder, resume=True).epochs == 2
    assert Split.load(exchanged.folder / "split.yaml") == split
    config.model.weights, config.dataset.split_file = None, str(exchanged.folder / "split.yaml")
    assert Split.load(train(config, run.folder.parent / "new").folder / "split.yaml").seen == ()


def test_a_run_that_replaces_another_has_its_own_split_and_checkpoints(trained: tuple[RunConfig, Run, Path]) -> None:
    config, run, other = trained
    config.dataset.split_file = str(other)
    train(config, run.folder, overwrite=True)
    assert Split.load(run.folder / "split.yaml") == Split.load(other)
    (target,) = kept_out_targets(config, [run.folder / "checkpoints/last.ckpt"])
    assert target.name == "crop1"
    config.dataset.split_file, config.dataset.train_val_split = None, 1.0
    without = train(config, run.folder, overwrite=True)
    assert Split.load(run.folder / "split.yaml").val == ()
    assert without.best_checkpoint is None  # that of the replaced run is not the best of this one
    assert without.checkpoint == run.folder / "checkpoints/last.ckpt"


@pytest.mark.parametrize("entry", ["mine/crop1:0,0:1,1", "mine/crop1:5,5,5:5,9,9", "mine/crop1:a,b,c:1,1,1"])
def test_an_entry_that_cannot_be_read_is_named(tmp_path: Path, entry: str) -> None:
    (tmp_path / "split.yaml").write_text(f"train: [mine/crop2]\nval:\n  - {entry}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"split\.yaml"):
        Split.load(tmp_path / "split.yaml")
    outside = Split(("mine/crop1:9000,9000,9000:9100,9100,9100",), ())
    with pytest.raises(ConfigError, match="outside of the crop"):
        outside.select(Catalog.open(str(single_volume(tmp_path / "root"))).crops())


# -- counts ------------------------------------------------------------------------------------------------------------
def test_counts_are_read_from_attributes_else_counted_once(tmp_path: Path) -> None:
    write_raw(tmp_path, "mine", np.zeros((8, 8, 8), np.uint8), grid_of((8, 8, 8)))
    values = np.full((8, 8, 8), 255, np.uint8)
    values[:2], values[2:5] = 1, 0
    write_label(tmp_path, "mine", "crop1", "mito", values, grid_of((8, 8, 8)), unknown=255)
    write_label(tmp_path, "mine", "crop1", "er", values, grid_of((8, 8, 8)), unknown=255, counts={})
    crop = Catalog.open(str(tmp_path)).crop("mine", "crop1")
    folder = tmp_path / "counts"
    found = content_of(crop, ["mito", "er"], LabelCounter(folder))
    assert found.present == {"mito": 128 * 512.0, "er": 128 * 512.0}
    assert found.known == 320 * 512.0
    assert found.absent == {"mito", "er"}
    assert len(list(folder.iterdir())) == 1  # er alone
    (kept,) = folder.iterdir()
    kept.write_text('{"present": 7, "absent": 1, "unknown": 0}')
    again = Catalog.open(str(tmp_path)).crop("mine", "crop1")
    assert content_of(again, ["er"], LabelCounter(folder)).present == {"er": 7 * 512.0}
    location = zarr_of(tmp_path, "mine") / GROUND_TRUTH / "crop1/er/s0"
    next(p for p in location.rglob("*") if p.is_file() and not p.name.startswith(".")).touch()
    changed = Catalog.open(str(tmp_path)).crop("mine", "crop1")
    assert content_of(changed, ["er"], LabelCounter(folder)).present == {"er": 128 * 512.0}


# -- states ------------------------------------------------------------------------------------------------------------
def root_with(root: Path, **arrays: tuple[np.ndarray, int | None]) -> RunConfig:
    write_raw(root, "mine", np.zeros(LONG, np.uint8), grid_of(LONG))
    for name, (values, unknown) in arrays.items():
        write_label(root, "mine", "crop1", name, values, grid_of(LONG), unknown=unknown)
    config = config_of(root, tuple(arrays))
    config.dataset.train_val_split = 1.0
    return config


@pytest.mark.parametrize(
    ("value", "message"),
    [(255, "nothing is known of mito"), (1, "only where mito are, nowhere that they are not"), (0, "none of mito is")],
)
def test_a_run_that_knows_one_state_only_is_refused(tmp_path: Path, value: int, message: str) -> None:
    values = np.full(LONG, 255, np.uint8)
    values[:, :, :30] = value
    with pytest.raises(InputError, match=message):
        CellMapDataModule(root_with(tmp_path, mito=(values, 255))).setup()


def test_a_class_with_one_state_only_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = root_with(
        tmp_path, mito=(labels_with_blobs(LONG), None), er=(np.zeros(LONG, np.uint8), None),
        mine=(np.ones(LONG, np.uint8), None),
    )  # fmt: skip
    CellMapDataModule(config).setup()
    assert "class er has no positives in the training crops" in caplog.text
    assert "class mine is known only where it is present" in caplog.text
    assert "class mito" not in caplog.text


def test_sections_too_sparse_for_the_voxel_size_are_refused(tmp_path: Path) -> None:
    values = np.full(LONG, 255, np.uint8)
    values[::3] = labels_with_blobs(LONG)[::3]
    config = root_with(tmp_path, mito=(values, 255))
    CellMapDataModule(config).setup()
    config.dataset.voxel_size = [16.0, 8.0, 8.0]
    values[::3] = 255
    values[::4] = labels_with_blobs(LONG)[::4]
    shutil.rmtree(tmp_path / "mine")
    config = root_with(tmp_path, mito=(values, 255))
    config.dataset.voxel_size = [32.0, 8.0, 8.0]
    with pytest.raises(InputError, match=r"nothing is known of mito at voxels of \[32"):
        CellMapDataModule(config).setup()


def test_a_class_without_positives_in_validation_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = single_volume(tmp_path)
    only = np.zeros(LONG, np.uint8)
    only[4:8, 4:8, 44:52] = 1  # in the middle, which is trained on from either end
    write_label(root, "mine", "crop1", "ld", only, grid_of(LONG))
    CellMapDataModule(config_of(root, ("mito", "ld"))).setup()
    assert "class ld has no positives in the validation crops" in caplog.text
    assert "class mito" not in caplog.text


# -- bounds ------------------------------------------------------------------------------------------------------------
def test_validation_looks_at_a_fixed_subset_on_the_crop_s_own_lattice(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "connectomics")
    root = single_volume(tmp_path)
    Split(("mine/crop1:0,0,0:128,128,100",), ("mine/crop1:0,0,200:128,128,768",)).save(tmp_path / "split.yaml")
    parts = {}
    for limit in (3, 1000):
        config = config_of(root, validation_windows=limit, patch_size=[12, 12, 12])
        config.dataset.split_file = str(tmp_path / "split.yaml")
        modules = [CellMapDataModule(config), CellMapDataModule(config)]
        for module in modules:
            module.setup()
        parts[limit], again = ([volume.grid for volume in module.val_volumes] for module in modules)
        assert parts[limit] == again
    (whole,) = parts[1000]
    assert validation_shape(config).count(whole) > 3
    assert 1 < len(parts[3]) <= 3
    assert sum(validation_shape(config).count(part) for part in parts[3]) <= 3
    assert all(part.same_lattice(whole) and whole.box.contains(part.box, 1e-6) for part in parts[3])
    assert "3 fixed parts of 1 crop:" in caplog.text


def test_coarse_labels_are_left_out_unless_asked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = single_volume(tmp_path)
    coarse = VoxelGrid((32.0,) * 3, (16.0,) * 3, (4, 4, 24))
    write_label(root, "mine", "crop1", "er", labels_with_blobs(coarse.shape), coarse)
    module = CellMapDataModule(config_of(root, ("mito", "er")))
    module.setup()
    (line,) = [r.message for r in caplog.records if "coarse_labels" in r.message]
    assert "1 label arrays" in line
    assert "er" not in module.train_dataset.volumes[0].crop.labels
    config = config_of(root, ("mito", "er"))
    config.dataset.coarse_labels = True
    module = CellMapDataModule(config)
    module.setup()
    assert "er" in module.train_dataset.volumes[0].crop.labels
    config = config_of(root, ("er",))
    with pytest.raises(InputError, match=r"nothing is left.*coarse_labels=true"):
        CellMapDataModule(config).setup()


def test_crops_that_only_imply_a_class_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """crop2 draws the membrane of mitochondria and vesicles, so mito is known there only where one of them is."""
    shape = (32, 32, 64)
    write_raw(tmp_path, "set-a", np.full(shape, 99, np.uint8), grid_of(shape))
    for crop, name in (("crop1", "mito"), ("crop2", "mito_mem"), ("crop2", "ves")):
        write_label(tmp_path, "set-a", crop, name, labels_with_blobs(shape), grid_of(shape))
    crops = Catalog.open(str(tmp_path)).crops(None, None, ["mito"])
    config = config_of(tmp_path)
    _, train, val = run_split(config, crops, None, LabelCounter())
    assert {crop.name for crop in (*train, *val)} == {"crop1"}
    assert "set-a/crop2 annotate none of the classes mito themselves" in caplog.text
    config.dataset.crops = ["crop1", "crop2"]
    _, train, val = run_split(config, crops, None, LabelCounter())
    assert {crop.name for crop in (*train, *val)} == {"crop1", "crop2"}
    config.dataset.crops, implied = None, [crop for crop in crops if crop.name == "crop2"]
    _, train, val = run_split(config, implied, None, LabelCounter())
    assert train


# -- crops with nothing in them ----------------------------------------------------------------------------------------
def write_crop2(root: Path, kind: str) -> None:
    """A second crop in the raw of `single_volume`: of size zero, without any known voxel, or without label arrays."""
    grid = grid_of(LONG).crop((0, 0, 0), (8, 8, 8))
    if kind == "zero":
        empty = VoxelGrid(grid.voxel_size, grid.translation, (0, 8, 8))
        write_label(root, "mine", "crop2", "mito", np.zeros(empty.shape, np.uint8), empty)
    elif kind == "unknown":
        write_label(root, "mine", "crop2", "mito", np.full(grid.shape, 255, np.uint8), grid, unknown=255)
    elif kind == "other class":
        write_label(root, "mine", "crop2", "nuc", np.zeros(grid.shape, np.uint8), grid)
    else:
        ensure_group(zarr_of(root, "mine") / GROUND_TRUTH / "crop2")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("zero", r"mine/crop2 is empty, with labels of \(0, 8, 8\); ingest them again, or remove it"),
        ("unknown", "nothing is known of mito in the training crops: .* ingest the labels again"),
        ("no array", "no crop named crop2 with a label of mito in mine of .*; see `pytc describe`, and ingest labels"),
        ("other class", "no crop named crop2 with a label of mito in mine of .*; see `pytc describe`, and ingest"),
    ],
)
def test_a_run_of_an_empty_crop_alone_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, said: str
) -> None:
    config = config_of(single_volume(tmp_path / "root"))
    write_crop2(tmp_path / "root", kind)
    save_config(config, tmp_path / "run.yaml")
    words = ["train", str(tmp_path / "run.yaml"), "--run-dir", str(tmp_path / "run")]
    assert main([*words, "dataset.crops=[crop2]", "data.patch_size=[32,32,32]"]) == 1
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error:"))
    assert re.match(f"error: {said}", line), line


def test_an_empty_crop_beside_another_is_refused_or_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for kind in ("zero", "unknown", "no array", "other class"):
        config = config_of(single_volume(tmp_path / kind))
        write_crop2(tmp_path / kind, kind)
        module = CellMapDataModule(config, tmp_path / f"run-{kind}")
        caplog.clear()
        if kind == "zero":
            with pytest.raises(InputError, match="mine/crop2 is empty"):
                module.setup()
            continue
        module.setup()
        assert module.split is not None
        assert all(entry.startswith("mine/crop1:") for entry in (*module.split.train, *module.split.val))
        left_out = "no voxel of mito is known in mine/crop2, which is left out; ingest the labels again with"
        assert (left_out in caplog.text) is (kind == "unknown")


def test_labels_without_voxels_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One class of a crop has no planes and the other has; without a name the error would look elsewhere."""
    config = config_of(single_volume(tmp_path))
    write_label(tmp_path, "mine", "crop1", "er", np.zeros((0, 8, 8), np.uint8), grid_of((0, 8, 8)))
    config.dataset.classes = ["er"]
    with pytest.raises(InputError):
        CellMapDataModule(config, tmp_path / "run").setup()
    assert "labels without voxels: er in mine/crop1 (0, 8, 8); ingest them again, or remove them" in caplog.text
