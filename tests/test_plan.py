"""The names and calls of the user's plan, each as it is written there."""

from __future__ import annotations

import json
import logging
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from connectomics.cli import join_lists, main
from connectomics.cli.plan_script import main as plan_main
from connectomics.config import load_config
from connectomics.data.dataset.build import get_dataset
from connectomics.data.dataset.dataset_base import BaseDataset
from connectomics.data.dataset.dataset_cellmap import CellMapDataset, CellMapMultiClassDataset
from connectomics.decoding.parameters import decode_parameters
from connectomics.errors import InputError, MissingError, UnknownNameError
from connectomics.geometry import VoxelGrid
from connectomics.io.multiscale import Multiscale
from connectomics.lightning.module import ConnectomicsModule
from connectomics.metrics.cellmap_metrics import evaluate_semantic
from connectomics.metrics.metrics_seg import get_dice, get_iou
from connectomics.pipeline.predict import predict_cellmap_crops, save_cellmap_predictions
from connectomics.submission import export_submission
from scripts.export_cellmap_submission import main as export_main
from tests.cellmap.roots import grid_of, write_label, write_raw
from tests.decoding.decode_kit import decode_predictions
from tests.pipeline.test_predict_crops import config_of, save_checkpoint
from tests.plan_root import TINY, named_root

COS7 = Path(__file__).resolve().parents[1] / "tutorials/cellmap_cos7.yaml"


@pytest.fixture(scope="module")
def root(phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return named_root(phantom, tmp_path_factory.mktemp("plan") / "cellmap")


# -- lists on a command line -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("dataset.crops=['crop234', 'crop236']", ["dataset.crops=[crop234, crop236]"]),
        ("a.yaml dataset.crops=[ 'a' , 'b' ] x=1", ["a.yaml", "dataset.crops=[ a , b ]", "x=1"]),
        ("x=[[0, 1], [0, 2]] --out y", ["x=[[0, 1], [0, 2]]", "--out", "y"]),
        ("model.options={a: [1, 2], b: 3}", ["model.options={a: [1, 2], b: 3}"]),
        ("++x={a: 1} 'y=[1, 2]'", ["++x={a: 1}", "y=[1, 2]"]),
        # what does not balance, and what is no override, stays as it is
        ("x=[1, 2 --out y", ["x=[1,", "2", "--out", "y"]),
        ("x=[1, y=2", ["x=[1,", "y=2"]),
        ("[a, b] --class x", ["[a,", "b]", "--class", "x"]),
        ("--box set:1,2,3:4,5,6 x=]1 2[", ["--box", "set:1,2,3:4,5,6", "x=]1", "2["]),
        ("", []),
    ],
)
def test_a_list_that_a_shell_took_apart_is_put_together(line: str, expected: list[str]) -> None:
    assert join_lists(shlex.split(line)) == expected


def test_bash_takes_it_apart_like_that() -> None:
    said = subprocess.run(
        ["bash", "-c", f"{sys.executable} -c 'import sys, json; print(json.dumps(sys.argv[1:]))' x=['a', 'b']"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(said.stdout) == ["x=[a,", "b]"]


# -- configuration -----------------------------------------------------------------------------------------------------
def test_a_configuration_has_get(root: Path) -> None:
    cfg = load_config(COS7, [*TINY, f"dataset.data_root={root}"])
    assert cfg.dataset.get("crops", None) is None
    assert cfg.dataset.get("classes") == ["nuc", "mito", "er", "golgi", "ves"]
    assert cfg.dataset.get("no_such", 3) == 3
    assert cfg.data.get("get", "not a key") == "not a key"
    assert len(get_dataset(cfg, None, mode="train")) == 4


# -- data sets ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", [CellMapDataset, CellMapMultiClassDataset])
def test_attributes_of_a_data_set(kind: type, root: Path) -> None:
    def augmentor(sample: dict) -> dict:
        return sample

    made = kind(data_root=str(root), datasets=["jrc_cos7-1a"], crops=["crop234"], classes=["mito"], mode="val",
                patch_size=(16, 16, 16), augmentor=augmentor)  # fmt: skip
    assert isinstance(made, BaseDataset)
    assert (made.data_root, made.datasets, made.augmentor) == (str(root), ["jrc_cos7-1a"], augmentor)
    assert (made.mode, made.patch_size, made.voxel_size) == ("val", (16, 16, 16), (8.0, 8.0, 8.0))
    with pytest.raises(UnknownNameError, match="did you mean 'train'"):
        BaseDataset(None, "trian")  # type: ignore[arg-type]


# -- measures ----------------------------------------------------------------------------------------------------------
def test_dice_and_iou() -> None:
    pred, gt = np.array([1, 1, 0, 2]), np.array([1, 0, 1, 1])
    assert (get_dice(pred, gt), get_iou(pred, gt)) == (4 / 6, 0.5)
    assert get_dice(pred, gt, [True, False, False, True]) == 1.0
    found = evaluate_semantic(pred, gt)
    assert (found["dice"], found["iou"]) == (get_dice(pred, gt), get_iou(pred, gt))


# -- checkpoints -------------------------------------------------------------------------------------------------------
def test_load_from_checkpoint_as_lightning_has_it(root: Path, tmp_path: Path) -> None:
    config = config_of(root, classes=["mito", "er"], crops=["crop234"], datasets=["jrc_cos7-1a"])
    path = save_checkpoint(tmp_path / "a.ckpt", config, 0)
    module = ConnectomicsModule.load_from_checkpoint(path)
    assert isinstance(module, ConnectomicsModule)
    assert module.config == config
    assert not module.training
    weights = torch.load(path, weights_only=True)["state_dict"]
    assert all(torch.equal(value, weights[name]) for name, value in module.state_dict().items())
    other = config_of(root, classes=["mito", "er"], crops=["crop236"])
    for given in ({"cfg": other}, {"config": other}):
        again = ConnectomicsModule.load_from_checkpoint(str(path), map_location="cpu", **given)
        assert again.config.dataset.crops == ["crop236"]
    with pytest.raises(InputError, match="both"):
        ConnectomicsModule.load_from_checkpoint(path, cfg=other, config=other)
    with pytest.raises(MissingError, match=r"did you mean .*a\.ckpt"):
        ConnectomicsModule.load_from_checkpoint(tmp_path / "b.ckpt")


# -- predictions -------------------------------------------------------------------------------------------------------
def test_predictions_of_one_s_own_loop_are_decoded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The plan's loop: its predictions, (1, C, D, H, W) in [0, 1], saved, decoded, and read where they lie."""
    predictions = np.zeros((1, 2, 12, 12, 12), np.float32)
    predictions[0, 0, 2:8, 2:8, 2:8], predictions[0, 1, :6] = 0.9, 0.7
    out, grid = tmp_path / "predictions", grid_of((12, 12, 12), 8, 64)
    place = f"{out}/jrc_cos7-1a.zarr/crop234"
    written = save_cellmap_predictions(predictions=predictions, output_path=place, classes=["mito", "er"], grid=grid)
    assert [p.name for p in written] == ["mito", "er"]
    assert Multiscale.open(str(written[0])).grid == grid
    decode_predictions(out, tmp_path / "labels", decode_parameters(["mito", "er"], {"min_size_nm3": 0.0}, {}))
    labels = zarr.open_array(tmp_path / "labels/jrc_cos7-1a.zarr/crop234/mito/s0", mode="r")[:]
    assert np.array_equal(labels > 0, predictions[0, 0] > 0.5)
    with caplog.at_level(logging.WARNING):
        save_cellmap_predictions(predictions=predictions[0], output_path=place, classes=["mito", "er"])
    assert "no grid was given" in caplog.text
    for bad, says in (
        ({"predictions": predictions * 3}, "apply a sigmoid"),
        ({"classes": ["mito"]}, r"must have shape \(1, D, H, W\), got \(2, 12, 12, 12\)"),
        ({"grid": VoxelGrid((8, 8, 8), (0, 0, 0), (12, 12, 13))}, "the grid"),
    ):
        with pytest.raises(InputError, match=says):
            save_cellmap_predictions(
                **{"predictions": predictions[0], "output_path": place, "classes": ["a", "b"], **bad}
            )


def test_predict_cellmap_crops_with_a_checkpoint(root: Path, tmp_path: Path) -> None:
    config = config_of(root, classes=["mito", "er"], crops=["crop234"], datasets=["jrc_cos7-1a"])
    config.inference.window = [16, 16, 16]
    path = save_checkpoint(tmp_path / "a.ckpt", config, 0)
    model = ConnectomicsModule.load_from_checkpoint(path, cfg=config)
    predict_cellmap_crops(model, config, str(path), str(tmp_path / "out"))
    assert (tmp_path / "out/jrc_cos7-1a.zarr/crop234/mito/s0").is_dir()


# -- export ------------------------------------------------------------------------------------------------------------
def test_export_of_a_data_set_without_test_crops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The example of the script's docstring: jrc_cos7-1a is no data set of the challenge's test crops."""
    labels, grid = np.zeros((12, 12, 12), np.uint8), grid_of((12, 12, 12), 8, 64)
    labels[2:6, 2:6, 2:6] = 1
    write_raw(tmp_path / "root", "jrc_cos7-1a", np.zeros((40, 40, 40), np.uint8), grid_of((40, 40, 40)))
    write_label(tmp_path / "root", "jrc_cos7-1a", "crop234", "mito", labels, grid)
    place = tmp_path / "outputs/labels/jrc_cos7-1a.zarr/crop234"
    predictions = np.stack([labels, labels]).astype(np.float32)
    save_cellmap_predictions(predictions, tmp_path / "p/jrc_cos7-1a.zarr/crop234", ["nuc", "mito"], grid)
    decode_predictions(tmp_path / "p", tmp_path / "outputs/labels", decode_parameters(["nuc", "mito"], {}, {}))
    assert place.is_dir()
    common = ["--output_path", str(tmp_path / "s.zip"), "--classes", "nuc", "mito", "--datasets", "jrc_cos7-1a"]
    assert export_main(["--predictions_dir", str(tmp_path / "outputs/labels"), *common]) == 0
    assert "the portal scores test crops only" in capsys.readouterr().out
    packed = export_submission(tmp_path / "outputs/labels", tmp_path / "folder", datasets=["jrc_cos7-1a"])
    assert packed.written == ("crop234/mito", "crop234/nuc")
    array = zarr.open_array(tmp_path / "folder/crop234/mito", mode="r")
    assert list(array.attrs["translation"]) == list(grid.translation)

    # the plan's own layout: {dataset}/{crop}_{class}.npy, whose place only the data root knows
    (tmp_path / "npy/jrc_cos7-1a").mkdir(parents=True)
    for name in ("nuc", "mito"):
        np.save(tmp_path / f"npy/jrc_cos7-1a/crop234_{name}.npy", labels)
    command = ["--predictions_dir", str(tmp_path / "npy"), *common]
    assert export_main(command) == 1
    assert "give --data_root ROOT" in capsys.readouterr().err
    assert export_main([*command, "--data_root", str(tmp_path / "root")]) == 0
    with pytest.raises(UnknownNameError, match="jrc_cos7-1z"):
        export_submission(tmp_path / "npy", tmp_path / "x", datasets=["jrc_cos7-1z"])


# -- the way -----------------------------------------------------------------------------------------------------------
def test_the_plan_s_way_with_crops_named_as_in_bash(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Train, then test two crops, which a shell hands over in two words; the same by the verb."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/cellmap").symlink_to(root)
    monkeypatch.chdir(tmp_path)
    tiny = [*TINY, "training.max_epochs=1", f"data.cache_dir={tmp_path}/cache"]
    assert plan_main(["--config", str(COS7), *tiny]) == 0
    checkpoint = "outputs/cellmap_cos7/version_0/checkpoints/last.ckpt"
    crops = ["dataset.datasets=[jrc_cos7-1a]", "dataset.crops=[crop234,", "crop236]"]
    assert plan_main(["--config", str(COS7), "--mode", "test", "--checkpoint", checkpoint, *tiny, *crops]) == 0
    out = tmp_path / "outputs/cellmap_cos7/version_0"
    assert {p.name for p in (out / "predictions/jrc_cos7-1a.zarr").glob("crop*")} == {"crop234", "crop236"}
    assert {row["crop"] for row in json.loads((out / "evaluation.json").read_text())["crops"]} == {"crop234", "crop236"}
    crops = ["dataset.datasets=[jrc_cos7-1a]", "dataset.crops=[crop234,", "crop239]"]
    assert main(["predict", str(COS7), "--checkpoint", checkpoint, *tiny, *crops, "--out", "x"]) == 1
    assert "unknown crop 'crop239'" in capsys.readouterr().err
