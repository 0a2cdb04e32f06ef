"""From ids to instances: train with affinities on the phantom, predict, and decode by mutex watershed."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from connectomics.config import RunConfig, load_config
from connectomics.decoding import decode_parameters
from connectomics.decoding.decode import decode_predictions
from connectomics.inference.task import require_complete
from connectomics.io import store
from connectomics.io.multiscale import Multiscale
from connectomics.lightning.inference import box_target, predict_cellmap_crops
from connectomics.lightning.train import train

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


@pytest.mark.parametrize("tta", ["none", "flips"])
def test_predictions_of_heads_say_what_they_are(phantom: Path, tmp_path: Path, tta: str) -> None:
    config = config_of(phantom, tmp_path, f"inference.tta={tta}")
    checkpoint = train(config, tmp_path / "run").checkpoint
    assert checkpoint is not None
    with (tmp_path / "run/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for name in ("mito/affinities", "mito/lsd", "nuc/distance"):
        assert any(row.get(f"train/loss/{name}") for row in rows), name
    target = box_target(config, "phantom-iso:100,100,100:300,260,340")
    (folder,) = predict_cellmap_crops(
        None, config, checkpoint, tmp_path / "out", targets=[target], device="cpu", progress=False
    )
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
    assert {done.class_name for done in labels} == {"mito", "nuc", "ld", "er"}
