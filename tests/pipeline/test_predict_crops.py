"""From a configuration and a checkpoint to probabilities of crops, table rows and boxes."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from connectomics.cellmap.catalog import Catalog
from connectomics.cellmap.crop_table import CropTable, TableEntry
from connectomics.cli import main
from connectomics.config import save_config
from connectomics.config.schema import DataConfig, DatasetConfig, InferenceConfig, InputConfig, ModelConfig, RunConfig
from connectomics.data.normalization import of_crops
from connectomics.data.splits import Split
from connectomics.errors import InputError, MissingError, UnknownNameError, WriteError
from connectomics.geometry import VoxelGrid
from connectomics.inference.predict_task import PredictTask
from connectomics.inference.trained_network import weights_hash
from connectomics.io.artifacts import require_complete
from connectomics.io.multiscale import Multiscale
from connectomics.pipeline.decode import decode
from connectomics.pipeline.evaluate import evaluate
from connectomics.pipeline.package import write_package
from connectomics.pipeline.predict import predict_cellmap_crops
from connectomics.pipeline.targets import Target, chosen_targets, targets_of, with_trained
from connectomics.pipeline.tune import tune
from tests.cellmap.roots import grid_of, write_label, write_raw


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Two data sets: set-a with crops 1 (mito on 4 nm, er on 8 nm) and 2, set-b with uint16 raw and crop 3."""
    root = tmp_path_factory.mktemp("root")
    rng = np.random.default_rng(0)
    write_raw(root, "set-a", rng.integers(0, 255, (48, 48, 64), dtype=np.uint8), grid_of((48, 48, 64)), levels=2)
    write_label(root, "set-a", "crop1", "mito", np.zeros((24, 24, 40), np.uint8), grid_of((24, 24, 40), 4, 64))
    write_label(root, "set-a", "crop1", "er", np.zeros((12, 12, 20), np.uint8), grid_of((12, 12, 20), 8, 64))
    write_label(root, "set-a", "crop2", "er", np.zeros((10, 10, 10), np.uint8), grid_of((10, 10, 10), 8, 16))
    raw16 = rng.integers(1000, 3000, (32, 32, 32), dtype=np.uint16)
    write_raw(root, "set-b", raw16, grid_of((32, 32, 32)))
    write_label(root, "set-b", "crop3", "mito", np.zeros((8, 8, 8), np.uint8), grid_of((8, 8, 8), 8, 64))
    write_label(root, "set-b", "crop4", "mito", np.zeros((8, 8, 8), np.uint8), grid_of((8, 8, 8), 8, 4000))
    return root


def config_of(root: Path, **dataset) -> RunConfig:
    return RunConfig(
        dataset=DatasetConfig(
            data_root=str(root), **{"classes": ["er", "mito"], "crops": ["crop1", "crop2"], **dataset}
        ),
        model=ModelConfig(architecture="unet", options={"channels": [4, 8], "strides": [2], "num_res_units": 0}),
        data=DataConfig(patch_size=[16, 16, 16], num_workers=0),
        inference=InferenceConfig(block_size=[32, 32, 32]),
    )


def save_checkpoint(path: Path, config: RunConfig, seed: int) -> Path:
    from connectomics.lightning.module import ConnectomicsModule

    torch.manual_seed(seed)
    module = ConnectomicsModule(config)
    content = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(content)
    torch.save(content, path)
    return path


@pytest.fixture(scope="module")
def checkpoint(root, tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "best.ckpt", config_of(root), 0)


def predict(root: Path, checkpoint: Path, out: Path, config: RunConfig | None = None, **options) -> list[Path]:
    settings = {"device": "cpu", **options}
    return predict_cellmap_crops(None, config or config_of(root), checkpoint, out, **settings)


def test_crops_of_the_catalog_on_the_grids_of_their_labels(root, checkpoint, tmp_path):
    said: list[str] = []
    written = predict(root, checkpoint, tmp_path, progress=lambda done, total, what="": said.append(what))
    assert written == [tmp_path / "set-a.zarr" / "crop1", tmp_path / "set-a.zarr" / "crop2"]
    assert "crop1 of set-a, predict" in said
    for folder, name, grid in [
        (written[0], "mito", grid_of((24, 24, 40), 4, 64)),
        (written[0], "er", grid_of((12, 12, 20), 8, 64)),
        (written[1], "mito", grid_of((10, 10, 10), 8, 16)),
    ]:
        stored = Multiscale.open(folder / name)
        assert stored.grid == grid
        values, inside = stored.read_level(0, (0, 0, 0), grid.shape)
        assert inside.all()
        assert values.dtype == np.uint8
        assert values.std() > 0
        assert require_complete(folder / name)["model"]["classes"] == ["er", "mito"]


def test_equals_the_network_on_the_raw_itself(root, checkpoint, tmp_path):
    """The crop lies in one window: the stored probability is that of one forward pass on the raw around it. Centered,
    the window would begin one voxel before the raw, so it is shifted."""
    from connectomics.lightning.checkpoints import load_module

    (folder,) = predict(root, checkpoint, tmp_path, config_of(root, crops=["crop2"]))
    window = grid_of((16, 16, 16))
    values, inside = Multiscale.open(root / "set-a" / "set-a.zarr" / "recon-1" / "em" / "fibsem-uint8").read_raw(window)
    normalization = PredictTask.load(folder / "task.json").normalization
    values = normalization.centered(normalization.unit(values), inside)
    module = load_module(checkpoint)
    with torch.inference_mode():
        expected = module.probabilities(torch.from_numpy(values)[None, None])[0, 1, 2:12, 2:12, 2:12].numpy()
    found, _ = Multiscale.open(folder / "mito").read_level(0, (0, 0, 0), (10, 10, 10))
    assert np.abs(found - expected * 255).max() <= 0.51


def test_a_given_model_is_used_and_left_as_it_was(root, checkpoint, tmp_path):
    from connectomics.lightning.checkpoints import load_module

    module = load_module(checkpoint).train()
    (folder,) = predict_cellmap_crops(module, config_of(root, crops=["crop2"]), None, tmp_path, device="cpu")
    assert module.training
    assert require_complete(folder)["model"]["checkpoint"] == weights_hash(module)
    with torch.no_grad():
        next(module.parameters()).add_(0.1)
    with pytest.raises(WriteError, match=r"other settings \(checkpoint\)"):
        predict_cellmap_crops(module, config_of(root, crops=["crop2"]), None, tmp_path, device="cpu")


# -- several passes ----------------------------------------------------------------------------------------------------
def values_of(folder: Path, name: str) -> np.ndarray:
    stored = Multiscale.open(folder / name)
    return stored.read_level(0, (0, 0, 0), stored.grid.shape)[0].astype(np.float64)


def test_an_ensemble_in_any_order(root, checkpoint, tmp_path):
    config = config_of(root, crops=["crop2"])
    second = save_checkpoint(tmp_path / "second.ckpt", config_of(root), 1)
    folders = [predict(root, c, tmp_path / name, config)[0] for c, name in ((checkpoint, "a"), (second, "b"))]
    config = replace(config, inference=replace(config.inference, uncertainty="variance"))
    (both,) = predict(root, [checkpoint, second], tmp_path / "c", config)
    (turned,) = predict(root, [second, checkpoint], tmp_path / "d", config)
    for name in ("er", "mito"):
        single = [values_of(folder, name) for folder in folders]
        assert np.abs(values_of(both, name) - np.mean(single, axis=0)).max() <= 1
        scale = require_complete(both / name / "uncertainty")["scale"]
        variance = values_of(both, f"{name}/uncertainty") * scale
        assert np.abs(variance - np.var(single, axis=0) / 255**2).max() < 2e-3
        for kind in ("", "/uncertainty"):
            assert np.array_equal(values_of(both, name + kind), values_of(turned, name + kind))
    recorded = [require_complete(folder)["model"]["checkpoint"] for folder in (*folders, both, turned)]
    assert len(set(recorded[:3])) == 3
    assert recorded[2] == recorded[3]
    assert predict(root, [second, checkpoint], tmp_path / "c", config) == [both], "the same members: nothing to do"
    third = save_checkpoint(tmp_path / "third.ckpt", config_of(root), 2)
    with pytest.raises(WriteError, match=r"other settings \(checkpoint\)"):
        predict(root, [checkpoint, third], tmp_path / "c", config)


def test_several_checkpoints_on_the_command_line(root, checkpoint, tmp_path, capsys):
    second = save_checkpoint(tmp_path / "second.ckpt", config_of(root), 1)
    save_config(config_of(root, crops=["crop2"]), tmp_path / "run.yaml")
    command = ["predict", str(tmp_path / "run.yaml"), "--checkpoint", str(checkpoint), "--checkpoint", str(second)]
    assert main([*command, "--out", str(tmp_path / "out"), "--device", "cpu", "inference.tta=[zyx,-zyx]"]) == 0
    task = PredictTask.load(tmp_path / "out" / "set-a.zarr" / "crop2" / "task.json")
    assert task.symmetries == ("zyx", "-zyx")
    (folder,) = predict(root, [second, checkpoint], tmp_path / "b", config_of(root, crops=["crop2"]))
    assert task.checkpoint == PredictTask.load(folder / "task.json").checkpoint


def test_members_must_agree(root, checkpoint, tmp_path):
    copy = tmp_path / "copy.ckpt"
    copy.write_bytes(checkpoint.read_bytes())
    with pytest.raises(InputError, match=r"best\.ckpt and .*copy\.ckpt hold the same weights"):
        predict(root, [checkpoint, copy], tmp_path / "out")
    other = save_checkpoint(tmp_path / "other.ckpt", config_of(root, classes=["er", "ld"]), 1)
    with pytest.raises(InputError, match=r"other\.ckpt was trained for classes \['er', 'ld'\]"):
        predict(root, [checkpoint, other], tmp_path / "out")
    wide = config_of(root)
    wide = replace(wide, data=replace(wide.data, inputs=[InputConfig([16.0] * 3, [16] * 3)]))
    with_view = save_checkpoint(tmp_path / "view.ckpt", wide, 1)
    with pytest.raises(InputError, match=r"view\.ckpt was trained with further inputs .* at \[\[16"):
        predict(root, [checkpoint, with_view], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_test_time_augmentation_of_the_configuration(root, checkpoint, tmp_path):
    config = config_of(root, crops=["crop2"])
    config = replace(config, inference=replace(config.inference, tta="flips", uncertainty="variance"))
    (folder,) = predict(root, checkpoint, tmp_path, config)
    assert len(PredictTask.load(folder / "task.json").symmetries) == 8
    assert values_of(folder, "mito/uncertainty").max() > 0
    config = replace(config, inference=replace(config.inference, tta=["zyx", "z-y-x"]))
    with pytest.raises(WriteError, match=r"other settings \(symmetries\)"):
        predict(root, checkpoint, tmp_path, config)


def test_dropout_of_a_network_that_has_it(root, checkpoint, tmp_path):
    from connectomics.lightning.checkpoints import load_module

    config = config_of(root, crops=["crop2"])
    config = replace(config, inference=replace(config.inference, uncertainty="dropout", dropout_samples=2))
    with pytest.raises(InputError, match="needs a network that was trained with dropout"):
        predict(root, checkpoint, tmp_path / "out", config)
    assert not (tmp_path / "out").exists()
    drops = config_of(root)
    drops = replace(drops, model=replace(drops.model, options={**drops.model.options, "dropout": 0.3}))
    module = load_module(save_checkpoint(tmp_path / "drops.ckpt", drops, 0))
    (folder,) = predict_cellmap_crops(module, config, None, tmp_path / "out", device="cpu")
    assert values_of(folder, "mito/uncertainty").max() > 0
    assert not any(layer.training for layer in module.modules()), "off again"


def test_rows_of_a_crop_table(root, checkpoint, tmp_path):
    grid = VoxelGrid((2.62, 4, 4), (81.3, 82, 82), (30, 20, 20))
    rows = [TableEntry(901, "set-a", name, grid) for name in ("mito", "nuc")] + [TableEntry(902, "set-a", "nuc", grid)]
    table = CropTable(tuple(rows))
    config = config_of(root)
    (target,) = targets_of(config, crop_table=table)
    assert target == Target("set-a", "crop901", {"mito": grid})
    table.save(tmp_path / "table.csv")
    config = replace(config, dataset=replace(config.dataset, crop_table=str(tmp_path / "table.csv")))
    assert targets_of(config) == [target]
    (folder,) = predict(root, checkpoint, tmp_path / "out", config)
    assert [p.name for p in folder.iterdir() if p.is_dir()] == ["mito"]
    assert Multiscale.open(folder / "mito").grid == grid
    with pytest.raises(InputError, match="the crop table asks for mito, nuc; the network gives er"):
        targets_of(config_of(root, classes=["er"]), crop_table=table)
    challenge = {t.name: t for t in targets_of(config, crop_table="challenge")}
    assert len(challenge) == 13, "the test crops that ask for mito or er"
    assert challenge["crop557"].grids["mito"].voxel_size == (1.74, 2, 2)


def test_a_box_of_a_data_set(root, checkpoint, tmp_path):
    config = config_of(root)
    (target,) = targets_of(config, box="set-a:100,100.5,100:180,180,200")
    assert target.name == "box_100_100.5_100_180_180_200"
    assert target.grids["mito"].voxel_size == (8, 8, 8)
    assert target.grids["mito"].box.begin == (100, 100.5, 100)
    (folder,) = predict(root, checkpoint, tmp_path, targets=[target])
    assert Multiscale.open(folder / "er").grid.shape == (10, 10, 13)
    for wrong in ("set-a:", "set-a:0,0,0", "set-a:0,0,0:8,8", "set-a:0,0,0:8,0,8", "set-a:a,0,0:8,8,8", ":0,0,0:8,8,8"):
        with pytest.raises(InputError, match="a box is DATASET"):
            targets_of(config, box=wrong)


def test_the_name_of_a_data_set_alone_is_all_of_its_raw(root):
    """From face to face, so that the network's voxels are those of the raw."""
    raw = Multiscale.open(Catalog.open(str(root)).raw_location("set-a")).grid
    (target,) = targets_of(config_of(root), box="set-a")
    assert target.grids["mito"].box.begin == raw.box.begin
    assert all(end >= raw_end for end, raw_end in zip(target.grids["mito"].box.end, raw.box.end, strict=True))
    with pytest.raises(UnknownNameError, match="did you mean 'set-a'"):
        targets_of(config_of(root), box="set-aa")


def test_boxes_that_differ_never_share_a_name(root):
    config = config_of(root)
    corners = ["1234567,0,0", "1234568,0,0", "1234567.5,0,0", "0.1,0,0", "0.1000000001,0,0", "12345678901,-0,0"]
    names = [targets_of(config, box=f"set-a:{corner}:99999999999,8,8")[0].name for corner in corners]
    assert names[0] == "box_1234567_0_0_99999999999_8_8"
    assert names[-1] == "box_12345678901_0_0_99999999999_8_8"
    assert len(set(names)) == len(corners)


def test_raw_of_other_ranges(root, checkpoint, tmp_path):
    config = config_of(root, crops=["crop3"])
    config = replace(config, data=replace(config.data, intensity_range=[1000, 3000]))
    (folder,) = predict(root, checkpoint, tmp_path, config)
    assert PredictTask.load(folder / "task.json").normalization.range == (1000, 3000)
    (folder,) = predict(root, checkpoint, tmp_path / "b", config_of(root, crops=["crop3"]))
    low, high = PredictTask.load(folder / "task.json").normalization.range
    source = Multiscale.open(PredictTask.load(folder / "task.json").raw)
    raw = source.read_raw(source.grid)[0]
    assert [low, high] == pytest.approx(np.percentile(raw, (0.5, 99.5)).tolist(), rel=0.02)


def test_raw_that_was_fetched_at_coarser_voxels_is_named(root, checkpoint, tmp_path, caplog):
    """Of a partial download, the coarser level was read at the network's voxels, and nobody was told."""
    other = shutil.copytree(root, tmp_path / "root")
    config = config_of(other, crops=["crop2"])
    predict(other, checkpoint, tmp_path / "whole", config)
    assert "not stored" not in caplog.text
    shutil.rmtree(other / "set-a/set-a.zarr/recon-1/em/fibsem-uint8/s0")
    predict(other, checkpoint, tmp_path / "coarse", config)
    said = "set-a: its raw is read at 16 x 16 x 16 nm, coarser than 8 x 8 x 8 nm, since s0 is not stored"
    assert said in caplog.text
    caplog.clear()
    of_crops(config, Catalog.open(str(other)).crops(["set-a"], ["crop2"]))
    assert said in caplog.text


def test_a_patch_larger_than_the_raw_is_padded(root, checkpoint, tmp_path):
    config = config_of(root, crops=["crop3"])
    config = replace(config, inference=replace(config.inference, window=[64, 64, 64]))
    config = replace(config, data=replace(config.data, intensity_range=[1000, 3000]))
    (folder,) = predict(root, checkpoint, tmp_path, config)
    assert require_complete(folder)


def test_two_parts_of_a_crop_do_not_share_a_folder(root, checkpoint, tmp_path):
    """A split file may hold out two parts of a crop; with overwrite, the second replaced the first."""
    parts = [Target("set-a", "crop1", {"er": grid_of((4, 12, 20), 8, start)}) for start in (64.0, 128.0)]
    with pytest.raises(InputError, match="set-a/crop1 has several parts to predict"):
        predict(root, checkpoint, tmp_path, targets=parts, overwrite=True, resume=True)
    assert not list(tmp_path.iterdir())


def test_bad_input_is_refused_before_anything_is_predicted(root, checkpoint, tmp_path):
    far = config_of(root, crops=["crop3", "crop4"])
    far = replace(far, data=replace(far.data, intensity_range=[1000, 3000]))
    with pytest.raises(InputError, match=r"has no raw for crop4 of set-b, which lies at \[4000 4000 4000\] to"):
        predict(root, checkpoint, tmp_path, far)
    assert not (tmp_path / "set-b.zarr").exists(), "crop3 was predicted although crop4 cannot be"
    with pytest.raises(UnknownNameError, match="crop"):
        predict(root, checkpoint, tmp_path, config_of(root, crops=["crop7"]))
    with pytest.raises(UnknownNameError, match="did you mean 'set-a'"):
        predict(root, checkpoint, tmp_path, targets=targets_of(config_of(root), box="set-aa:0,0,0:80,80,80"))
    with pytest.raises(InputError, match="was trained for classes"):
        predict(root, checkpoint, tmp_path, config_of(root, classes=["mito", "er"]))
    with pytest.raises(InputError, match="give a model or a checkpoint"):
        predict_cellmap_crops(None, config_of(root), None, tmp_path)
    with pytest.raises(MissingError, match=r"no checkpoint at .*beast\.ckpt; did you mean .*best\.ckpt"):
        predict(root, checkpoint.with_name("beast.ckpt"), tmp_path)
    config = config_of(root)
    with pytest.raises(InputError, match=r"inference\.window"):
        predict(root, checkpoint, tmp_path, replace(config, inference=replace(config.inference, window=[15, 16, 16])))
    assert not list(tmp_path.iterdir())


def test_crops_that_a_network_was_trained_on_are_named(root, tmp_path, caplog):
    """Without --crops all annotated crops are predicted: evaluated or tuned on, the training crops look too good. The
    labels know it, too, wherever the run is now."""
    warning = "1 of 2 crops was used for training (set-a/crop1): do not evaluate or tune on training data"
    run = tmp_path / "run/checkpoints"
    run.mkdir(parents=True)
    place = save_checkpoint(run / "last.ckpt", config_of(root), 0)
    Split(("set-a/crop1:100,64,64:160,160,224",), ("set-a/crop2",)).save(tmp_path / "run/split.yaml")
    folders = predict(root, place, tmp_path / "out")
    assert warning in caplog.text
    shutil.rmtree(tmp_path / "run")
    assert [require_complete(folder)["model"]["seen_in_training"] for folder in folders] == [True, False]
    labels = decode(tmp_path / "out", out=tmp_path / "labels", config=config_of(root))
    caplog.clear()
    evaluate(labels, root, samples=10)
    assert warning in caplog.text
    caplog.clear()
    evaluate(labels, root, samples=10, crops=["2"])
    assert caplog.text == ""


def test_a_crop_that_overlaps_a_training_crop_is_named(root, tmp_path, caplog):
    """It is in no list of the split, but a corner of it was trained on under another name. One that only touches the
    box of a training crop was not."""
    near = shutil.copytree(root, tmp_path / "root")
    write_label(near, "set-a", "crop5", "er", np.zeros((8, 4, 4), np.uint8), grid_of((8, 4, 4), 8, 160))
    run = tmp_path / "run/checkpoints"
    run.mkdir(parents=True)
    config = config_of(near, crops=["crop2", "crop5"])
    place = save_checkpoint(run / "last.ckpt", config, 0)
    for train, seen in (("set-a/crop1", True), ("set-a/crop1:100,64,64:160,160,224", False)):
        Split((train,), ("set-a/crop5",)).save(tmp_path / "run/split.yaml")
        caplog.clear()
        found = {target.key: target.seen_in_training for target in with_trained(None, config, [place])}
        assert found == {"set-a/crop2": seen, "set-a/crop5": False}
        assert ("1 of 2 crops was used for training (set-a/crop2)" in caplog.text) == seen


def test_a_package_knows_what_its_network_was_trained_on(root, tmp_path, caplog):
    """Also a package of a package, and one that lies in the folder of another run, whose split is not its own."""
    run, other = (tmp_path / name / "checkpoints" for name in ("run", "other"))
    sides, config = (("set-a/crop1",), ("set-b/crop3",)), config_of(root, crops=["crop1", "crop3"])
    for folder, split in ((run, Split(*sides)), (other, Split(*sides[::-1]))):
        folder.mkdir(parents=True)
        split.save(folder.parent / "split.yaml")
    place = save_checkpoint(run / "last.ckpt", config, 0)
    write_package(place, tmp_path / "first.pytc")
    package = write_package(tmp_path / "first.pytc", other / "net.pytc").path
    lone = write_package(shutil.copy(place, tmp_path / "lone.ckpt"), tmp_path / "lone.pytc").path
    shutil.rmtree(run)
    targets, _ = chosen_targets(config, [package], "val", None)
    assert [target.key for target in targets] == ["set-b/crop3"]
    folders = predict_cellmap_crops(None, config, package, tmp_path / "out")
    assert "1 of 2 crops was used for training (set-a/crop1)" in caplog.text
    assert [require_complete(folder)["model"]["seen_in_training"] for folder in folders] == [True, False]
    with pytest.raises(MissingError, match=r"lone\.pytc: no validation crops are known, .* name crops that it"):
        chosen_targets(config, [lone], "val", None)


def test_a_part_of_a_crop_that_was_kept_out_is_not_named(root, tmp_path, caplog):
    """The only volume is cut in two: its other part, which touches the grid of this one, was trained on."""
    run = tmp_path / "run/checkpoints"
    run.mkdir(parents=True)
    place = save_checkpoint(run / "last.ckpt", config_of(root), 0)
    parts = ["set-a/crop1:64,64,64:100,160,224", "set-a/crop1:100,64,64:160,160,224"]
    Split((parts[0],), (parts[1],)).save(tmp_path / "run/split.yaml")
    targets, _ = chosen_targets(config_of(root), [place], "val", None)
    (folder,) = predict(root, place, tmp_path / "out", targets=targets)
    with pytest.raises(MissingError, match="no annotated voxel"):
        tune(tmp_path / "out", root, tmp_path / "tuned", classes=["er"])
    assert "used for training" not in caplog.text
    assert not require_complete(folder)["model"]["seen_in_training"]
