"""From ids to instances: train with affinities on the phantom, predict, and decode by mutex watershed."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from connectomics.cellmap.catalog import Catalog
from connectomics.cellmap.labels import read_instances
from connectomics.config import RunConfig, load_config
from connectomics.config.heads import channel_attributes, channel_names
from connectomics.decoding import decode_parameters
from connectomics.geometry import VoxelGrid
from connectomics.io import store
from connectomics.io.artifacts import require_complete
from connectomics.io.multiscale import Multiscale
from connectomics.metrics.cellmap_metrics import evaluate_instance
from connectomics.metrics.challenge import score_instance
from connectomics.pipeline.predict import predict_cellmap_crops
from connectomics.pipeline.targets import Target, box_target, grids_of
from connectomics.pipeline.train import train
from tests.decoding.decode_kit import decode_predictions

ROOT = Path(__file__).resolve().parents[2]
HEADS = (
    "model.heads=[{kind: affinities, class_name: mito, offsets_nm: [[-8,0,0],[0,-8,0],[0,0,-8],[-40,0,0],[0,-40,0],"
    "[0,0,-40]]}, {kind: lsd, class_name: mito, scale_nm: 24}, {kind: distance, class_name: nuc}]"
)


def config_of(phantom: Path, tmp_path: Path, *overrides: str) -> RunConfig:
    small = [
        f"dataset.data_root={phantom}", f"data.cache_dir={tmp_path / 'cache'}", "dataset.datasets=[phantom-iso]",
        "data.patch_size=[32,32,32]", "inference.window=[32,32,32]", "model.options.channels=[8,16,16,16]",
        "training.max_epochs=1", "data.patches_per_epoch=4", "logging.use_tensorboard=false", HEADS,
    ]  # fmt: skip
    return load_config(ROOT / "tutorials/phantom.yaml", [*small, *overrides])


@pytest.mark.parametrize("tta", ["none", pytest.param("flips", marks=pytest.mark.slow)])
def test_predictions_of_heads_say_what_they_are(phantom: Path, tmp_path: Path, tta: str) -> None:
    config = config_of(phantom, tmp_path, f"inference.tta={tta}")
    checkpoint = train(config, tmp_path / "run").checkpoint
    assert checkpoint is not None
    with (tmp_path / "run/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for name in ("mito/affinities", "mito/lsd", "nuc/distance"):
        assert any(row.get(f"train/loss/{name}") for row in rows), name
    target = box_target(config, "phantom-iso:100,100,100:300,260,340")
    (folder,) = predict_cellmap_crops(None, config, checkpoint, tmp_path / "out", targets=[target], device="cpu")
    assert set(store.list_groups(str(folder))) == {"mito", "nuc", "ld", "er"}
    assert set(store.list_groups(str(folder / "mito"))) == {"s0", "affinities"}  # descriptors are not written
    assert require_complete(folder)["classes"] == ["mito", "nuc", "ld", "er"]
    offsets = [[-1, 0, 0], [0, -1, 0], [0, 0, -1], [-5, 0, 0], [0, -5, 0], [0, 0, -5]]
    for number, offset in enumerate(offsets):
        place = folder / f"mito/affinities/{number}"
        about = require_complete(place)
        assert (about["artefact"], about["class_name"]) == ("affinity", "mito")
        assert (about["offset"], about["offset_nm"]) == (offset, [8.0 * o for o in offset])
        assert Multiscale.open(str(place)).levels[0].grid == target.grids["mito"]
    assert require_complete(folder / "nuc/distance")["artefact"] == "distance"
    labels = decode_predictions(
        tmp_path / "out",
        tmp_path / "labels",
        decode_parameters(config.dataset.classes, None, {"mito": {"method": "mutex_watershed"}}),
    )
    assert {done.job.class_name for done in labels} == {"mito", "nuc", "ld", "er"}


def test_a_class_with_affinities_is_predicted_where_neighbours_are_neighbours(phantom: Path, tmp_path: Path) -> None:
    config = config_of(phantom, tmp_path)
    fine, own = VoxelGrid((4.0,) * 3, (100.0,) * 3, (40, 41, 44)), VoxelGrid((2.0,) * 3, (101.0,) * 3, (32, 32, 32))
    target = Target("phantom-iso", "crop1", {"mito": fine, "nuc": own})
    grids = grids_of(target, channel_names(config), channel_attributes(config), (8.0,) * 3)
    assert grids["mito"] == grids["mito/affinities/0"] == fine.at_voxel_size((8.0,) * 3)
    assert grids["nuc"] == grids["nuc/distance"] == own
    assert set(grids) == {"mito", "nuc", "nuc/distance", *(f"mito/affinities/{n}" for n in range(6))}


@pytest.mark.slow
def test_instances_are_better_than_chance(phantom: Path, tmp_path: Path) -> None:
    config = config_of(phantom, tmp_path, "training.max_epochs=8", "data.patches_per_epoch=32")
    result = train(config, tmp_path / "run")
    crop = next(c for c in Catalog.open(str(phantom)).crops(["phantom-iso"], None, ["mito"]) if "mito" in c.labels)
    grid = crop.labels["mito"].grid
    target = Target(crop.dataset, crop.name, dict.fromkeys(config.dataset.classes, grid))
    (folder,) = predict_cellmap_crops(None, config, result.checkpoint, tmp_path / "out", targets=[target], device="cpu")
    parameters = decode_parameters(
        config.dataset.classes, None, {"mito": {"method": "mutex_watershed", "threshold": 0.3}}
    )
    decode_predictions(tmp_path / "out", tmp_path / "labels", parameters, classes=["mito"])
    label = Multiscale.open(str(tmp_path / "labels" / folder.relative_to(tmp_path / "out") / "mito"))
    found = label.read_nearest(grid, level=0)[0]
    truth, known = read_instances(crop, "mito", grid)
    found[~known] = 0  # on the class's own grid, 4 nm: predicted and decoded at 8 nm
    score = score_instance(found, truth, grid.voxel_size)
    shuffled = np.random.default_rng(0).permutation(found.reshape(-1)).reshape(found.shape)
    chance = evaluate_instance(shuffled, truth)
    ours = evaluate_instance(found, truth)
    assert score.tp > 0
    assert ours["voi_split"] + ours["voi_merge"] < 0.8 * (chance["voi_split"] + chance["voi_merge"])
