"""Group classes as unions of predicted atoms: which follow, their probability, what predict and decode make of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from connectomics.cellmap.classes import CLASSES, unions_of
from connectomics.config import load_config
from connectomics.errors import ConfigError, InputError, UnknownNameError
from connectomics.inference.trained_network import with_unions
from connectomics.io.multiscale import Multiscale
from connectomics.pipeline.evaluate import evaluate
from connectomics.pipeline.predict import predict_cellmap_crops
from tests.cellmap.roots import grid_of, write_label, write_raw
from tests.decoding.decode_kit import decode_predictions
from tests.pipeline.test_predict_crops import config_of, save_checkpoint

ATOMS = ["mito_mem", "mito_lum", "mito_ribo"]


def test_groups_follow_from_all_of_their_atoms() -> None:
    assert unions_of(ATOMS, True) == {"mito": tuple(ATOMS)}
    assert unions_of(ATOMS[:2], True) == {}
    assert unions_of([*ATOMS, "mito"], True) == {}
    assert unions_of(["np_in", "np_out"], ["np"]) == {"np": ("np_out", "np_in")}
    assert unions_of(ATOMS, False) == unions_of(ATOMS, []) == {}


def test_the_scored_atoms_give_14_of_the_17_scored_groups() -> None:
    scored = [c.name for c in CLASSES.values() if c.scored and not c.is_group]
    groups = [c.name for c in CLASSES.values() if c.scored and c.is_group]
    assert (len(scored), len(groups)) == (31, 17)
    assert set(groups) - set(unions_of(scored, True)) == {"nuc", "chrom", "cell"}
    every_atom = [c.name for c in CLASSES.values() if not c.is_group]
    assert set(groups) <= set(unions_of(every_atom, True))


@pytest.mark.parametrize(
    ("classes", "wanted", "says"),
    [
        (ATOMS[:2], ["mito"], "mito_ribo of its atoms are not in dataset.classes"),
        (ATOMS, ["mito_mem"], "predicts it itself"),
        (ATOMS, ["er_mem"], "it is no group"),
        ([*ATOMS, "mito"], ["mito"], "predicts it itself"),
    ],
)
def test_a_group_that_does_not_follow(classes: list[str], wanted: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        unions_of(classes, wanted)


def test_names_are_checked() -> None:
    with pytest.raises(UnknownNameError, match="mito"):
        unions_of(ATOMS, ["mitos"])
    with pytest.raises(ConfigError, match=r"inference\.groups"):
        load_config(None, ["inference.groups=mito"])
    assert load_config(None, ["inference.groups=[mito]"]).inference.groups == ["mito"]


def test_a_union_is_the_sum_of_parts_that_exclude_each_other() -> None:
    p = torch.tensor([[0.5, 0.5, 0.0], [0.9, 0.8, 0.1], [0.1, 0.2, 0.0]]).T.reshape(1, 3, 3, 1, 1)
    run = with_unions(lambda image: image, ATOMS, ["mito"])
    found = run(p)
    assert torch.equal(found[:, :3], p)
    assert found[0, 3].flatten().tolist() == pytest.approx([1.0, 1.0, 0.3])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A crop where membrane and lumen are annotated and ribosomes only as absent; mito has no array."""
    root = tmp_path_factory.mktemp("root")
    raw = np.random.default_rng(0).integers(0, 255, (40, 40, 40), dtype=np.uint8)
    write_raw(root, "set-a", raw, grid_of((40, 40, 40)))
    label = np.zeros((16, 16, 16), np.uint8)
    label[4:8] = 1
    grid = grid_of((16, 16, 16), 8, 64)
    write_label(root, "set-a", "crop1", "mito_mem", label, grid)
    write_label(root, "set-a", "crop1", "mito_lum", np.roll(label, 4, axis=0), grid)
    write_label(root, "set-a", "crop1", "mito_ribo", np.zeros_like(label), grid)
    return root


def test_predict_decode_and_evaluate_a_group(root: Path, tmp_path: Path) -> None:
    config = config_of(root, classes=ATOMS, crops=None)
    checkpoint = save_checkpoint(tmp_path / "a.ckpt", config, 0)
    content = torch.load(checkpoint, weights_only=True)
    bias = [name for name, value in content["state_dict"].items() if name.endswith("bias") and value.shape == (3,)]
    content["state_dict"][bias[-1]] -= 2.5  # so that sums stay below 1, and blending and the limit do not mix
    torch.save(content, checkpoint)
    config.inference.groups = True
    config.inference.dtype = "float16"
    out = tmp_path / "out"
    predict_cellmap_crops(None, config, checkpoint, out, device="cpu")
    place = out / "set-a.zarr/crop1"
    values = {n: Multiscale.open(str(place / n)).read_level(0, (0, 0, 0), (16, 16, 16))[0] for n in [*ATOMS, "mito"]}
    total = np.minimum(sum(values[name].astype(np.float32) for name in ATOMS), 1)
    assert 0.05 < total.mean() < total.max() < 0.9
    assert np.abs(values["mito"].astype(np.float32) - total).max() < 2e-3  # float16
    done = decode_predictions(out, tmp_path / "labels")
    assert {item.job.class_name for item in done} == {*ATOMS, "mito"}
    scores = evaluate(tmp_path / "labels", str(root))
    assert "mito" in scores.classes  # its truth follows from the arrays of its atoms


def test_a_group_is_part_of_what_a_prediction_was_started_with(root: Path, tmp_path: Path) -> None:
    from connectomics.pipeline.predict import predict_tasks

    config = config_of(root, classes=ATOMS, crops=None)
    config.inference.groups = ["mito"]
    checkpoint = save_checkpoint(tmp_path / "a.ckpt", config, 0)
    (task,), _, _ = predict_tasks([checkpoint], out=tmp_path / "out", config=config, device="cpu")
    assert task.classes == (*ATOMS, "mito")
    with task.open_networks("cpu") as (run,):
        assert run(torch.rand(1, 1, 16, 16, 16)).shape == (1, 4, 16, 16, 16)
    other = save_checkpoint(tmp_path / "b.ckpt", config_of(root, classes=ATOMS[:2], crops=None), 0)
    from dataclasses import replace

    with pytest.raises(InputError, match="was started with"):
        replace(task, checkpoints=(str(other),)).trained_networks()
