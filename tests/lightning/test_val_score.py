"""The challenge's score at a validation, against the metrics of the same decoded prediction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from connectomics.cellmap.catalog import Catalog
from connectomics.cellmap.label_codes import LabelCodes
from connectomics.config import RunConfig
from connectomics.config.schema import HeadConfig
from connectomics.data.volumes import CropVolume
from connectomics.decoding import decode_class, decode_parameters
from connectomics.decoding.probabilities import above
from connectomics.decoding.watershed.heights import HeadValues
from connectomics.errors import ConfigError
from connectomics.geometry import VoxelGrid
from connectomics.inference.sliding import predict_blocks
from connectomics.io.mirror import Extent
from connectomics.lightning.challenge_score import ChallengeScore
from connectomics.lightning.module import ConnectomicsModule
from connectomics.metrics.evaluate import LabelEvaluation, evaluate_label, summarize, totals
from connectomics.pipeline.train import train
from tests.lightning.synthetic_run import VOXEL, MadeUpData, label_codes, tiny_config
from tests.lightning.test_module import validate

DECODING: dict[str, dict[str, Any]] = {
    "mito": {"min_size_nm3": 2e4, "threshold": 0.52},
    "er": {"threshold": 0.48},
    "pm": {"fill_holes": True, "min_size_nm3": 1e4},
}
CLASSES = ("mito", "er", "pm")


@dataclass(frozen=True, eq=False)
class Annotated:
    """A crop with arrays in hand: image (D, H, W), label and known (C, D, H, W), ids by class."""

    name: str
    grid: VoxelGrid
    image: NDArray[np.float32]
    label: NDArray[np.float32]
    known: NDArray[np.bool_]
    ids: Mapping[str, NDArray[np.uint32]] = field(default_factory=dict)
    dataset: str = "made_up"

    def _at(self, grid: VoxelGrid) -> tuple[slice, ...]:
        begin = np.rint(self.grid.to_index(grid.translation)).astype(int)
        return tuple(slice(b, b + n) for b, n in zip(begin, grid.shape, strict=True))

    @property
    def raw_extent(self) -> Extent:
        return Extent((-(2**20),) * 3, (2**20,) * 3)

    def read_image(self, grid: VoxelGrid) -> NDArray[np.float32]:
        begin = np.rint(self.grid.to_index(grid.translation)).astype(int)
        index = [
            np.clip(b + np.arange(n), 0, s - 1) for b, n, s in zip(begin, grid.shape, self.grid.shape, strict=True)
        ]
        return self.image[np.ix_(*index)]

    def read_labels(self, grid: VoxelGrid) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        at = (slice(None), *self._at(grid))
        return self.label[at], self.known[at]

    def read_label_codes(self, grid: VoxelGrid) -> LabelCodes:
        return label_codes(grid, *self.read_labels(grid), CLASSES[: len(self.label)])

    def read_instances(
        self, class_name: str, grid: VoxelGrid
    ) -> tuple[NDArray[np.unsignedinteger], NDArray[np.bool_]] | None:
        if class_name not in self.ids:
            return None
        return self.ids[class_name][self._at(grid)], self.known[CLASSES.index(class_name)][self._at(grid)]


def annotated(name: str, seed: int) -> Annotated:
    """Bright balls on noise, a voxel beside the annotated ones; mito has ids, and a corner of everything is unknown."""
    rng = np.random.default_rng(seed)
    shape = (18, 20, 22)
    ids = np.zeros(shape, np.uint32)
    for number, centre in enumerate([(5, 5, 5), (12, 13, 6), (8, 7, 16)], start=1):
        ids[sum((i - c) ** 2 for i, c in zip(np.ogrid[:18, :20, :22], centre, strict=True)) < 16] = number
    image = (0.2 + 0.6 * np.roll(ids > 0, 1, axis=2) + 0.1 * rng.random(shape)).astype(np.float32)
    label = np.stack([ids > 0, image < 0.25, image > 0.22]).astype(np.float32)
    known = np.ones(label.shape, np.bool_)
    known[:, 12:, 10:, :9] = False
    return Annotated(name, VoxelGrid(VOXEL, (0.0, 0.0, 400.0 * seed), shape), image, label, known, {"mito": ids})


def configuration() -> RunConfig:
    config = tiny_config(dataset__classes=list(CLASSES), training__val_score=True, decoding__classes=DECODING)
    config.logging.images = False
    return config


@pytest.fixture
def module() -> ConnectomicsModule:
    return module_by("2026-06")


def module_by(rules: str) -> ConnectomicsModule:
    """A network that passes the image on: classes bright, dark and bright, so that there is something to decode."""
    config = configuration()
    config.score.rules = rules
    module = ConnectomicsModule(config).eval()
    network = torch.nn.Conv3d(1, 3, 1)
    network.weight = torch.nn.Parameter(torch.tensor([4.0, -4.0, 6.0]).reshape(3, 1, 1, 1, 1))
    network.bias = torch.nn.Parameter(torch.tensor([-2.0, 1.0, -1.45]))
    module.network = network
    return module.eval()


def by_hand(module: ConnectomicsModule, crop: Annotated) -> list[LabelEvaluation]:
    """Predicted in one block, stored as uint8, decoded whole, and compared as ``evaluate`` does."""
    blocks = predict_blocks(
        crop.read_image, crop.grid, module.probabilities, channels=3, window=16,
        overlap=module.config.inference.overlap, blending=module.config.inference.blending, block_size=256,
    )  # fmt: skip
    stored = np.rint(next(iter(blocks))[1] * 255).astype(np.uint8)
    parameters = decode_parameters(CLASSES, {}, DECODING)
    rows = []
    for channel, name in enumerate(CLASSES):
        found = decode_class(stored[channel], VOXEL, parameters[name])
        assert found.any()
        assert not found.all()
        truth = crop.ids.get(name, crop.label[channel] > 0)
        row = evaluate_label(
            found,
            truth,
            crop.known[channel],
            voxel_size=VOXEL if name == "mito" else None,
            class_name=name,
            crop=crop.name,
        )
        assert row is not None
        rows.append(row)
    return rows


def test_the_score_is_that_of_the_decoded_prediction_pooled_over_crops(module: ConnectomicsModule) -> None:
    crops = [annotated("a", 0), annotated("b", 1)]
    found = validate(module, crops)
    rows = [by_hand(module, crop) for crop in crops]
    expected = totals([row for crop in rows for row in crop], samples=1)
    for channel, name in enumerate(CLASSES):
        both = [crop[channel] for crop in rows]
        instances = [row.instances for row in both if row.instances is not None]
        score = (instances[0] + instances[1]).combined if instances else (both[0].counts + both[1].counts).iou
        assert 0 < score < 1
        assert found[f"val/{name}/score"] == pytest.approx(score, rel=1e-6)
    assert found["val/score"] == pytest.approx(expected["overall"], rel=1e-6)
    assert validate(module, [None, *crops]) == found


@pytest.mark.parametrize("rules", ["pq", "2026-07-exponential", "2026-07-affine"])
def test_the_score_is_by_the_rules_of_the_configuration(rules: str) -> None:
    module, crops = module_by(rules), [annotated("a", 0), annotated("b", 1)]
    rows = [row for crop in crops for row in by_hand(module, crop)]
    expected = totals(rows, samples=1, rules=rules)
    assert expected["overall"] != totals(rows, samples=1)["overall"]
    found = validate(module, crops)
    assert found["val/score"] == pytest.approx(expected["overall"], rel=1e-6)
    for row in summarize(rows, rules=rules, samples=1):
        assert found[f"val/{row['class']}/score"] == pytest.approx(row["score"], rel=1e-6)


def test_unknown_voxels_have_no_influence(module: ConnectomicsModule) -> None:
    crop = annotated("a", 0)
    other = replace(
        crop,
        label=np.where(crop.known, crop.label, 1 - crop.label),
        ids={"mito": np.where(crop.known[0], crop.ids["mito"], 9).astype(np.uint32)},
    )
    assert validate(module, [other]) == validate(module, [crop])
    image = crop.image.copy()
    image[14:, 14:, :2] = 0.9  # an object of its own, large enough to be kept
    assert by_hand(module, replace(crop, image=image, known=np.ones_like(crop.known))) != by_hand(
        module, replace(crop, known=np.ones_like(crop.known))
    )
    assert validate(module, [replace(crop, image=image)]) == validate(module, [crop])
    known = np.zeros_like(crop.known)
    assert validate(module, [replace(crop, name="b", known=known), crop]) == validate(module, [crop])


def test_classes_without_ids_or_without_anything_known_are_left_out(
    module: ConnectomicsModule, caplog: pytest.LogCaptureFixture
) -> None:
    crop = annotated("a", 0)
    known = crop.known.copy()
    known[1] = False
    found = validate(module, [replace(crop, ids={}, known=known)])
    assert {k for k in found if k.endswith("score")} == {"val/pm/score", "val/score"}
    assert found["val/score"] == found["val/pm/score"]
    assert "val/score leaves out mito, er: the validation crops have no ground truth for them" in caplog.text
    nothing = validate(module, [replace(crop, ids={}, known=np.zeros_like(known))])
    assert nothing["val/score"] == 0.0


def test_predicting_an_absent_class_adds_no_zero(module: ConnectomicsModule) -> None:
    crop = annotated("a", 0)
    everything = validate(module, [crop])
    label = crop.label.copy()
    label[1:] = 0
    found = validate(module, [replace(crop, label=label)])
    assert {k for k in found if k.endswith("score")} == {"val/mito/score", "val/score"}
    assert found["val/score"] == found["val/mito/score"] == everything["val/mito/score"]
    nobody = validate(module, [replace(crop, label=label, ids={"mito": np.zeros_like(crop.ids["mito"])})])
    assert "val/mito/score" not in nobody


def test_noise_of_which_the_challenge_drops_the_crop_counts_as_missed() -> None:
    config = configuration()
    config.decoding.classes = {"mito": {"min_size_nm3": 0.0}}
    crop = annotated("a", 0)
    score = ChallengeScore(config)
    one = score.begin(replace(crop, ids={"mito": (crop.ids["mito"] == 1).astype(np.uint32)}), crop.grid)
    noise = np.zeros((3, *crop.grid.shape), np.float32)
    noise[:, ::2, ::2, ::2] = 1.0
    one.add(crop.grid, noise, crop.label > 0, crop.known)
    one.finish()
    assert score.values[:3, 0].tolist() == [0, 0, 1]
    assert score.scores(score.values)["val/mito/score"] == 0.0


def test_objects_between_walls() -> None:
    config = configuration()
    config.decoding.classes = {"mito": {"boundary": "er", "min_size_nm3": 0.0}}
    crop = annotated("a", 0)
    values = np.stack([crop.image, 1 - crop.image, crop.image])
    values[1, :, :, 10] = 0.9
    values[0, 4:9, 4:9, 3:18] = 0.9
    score = ChallengeScore(config)
    one = score.begin(crop, crop.grid)
    for begin, block in crop.grid.blocks((7, 20, 9)):
        at = (slice(None), *(slice(b, b + n) for b, n in zip(begin, block.shape, strict=True)))
        one.add(block, values[at], crop.label[at] > 0, crop.known[at])
    one.finish()
    stored = np.rint(values * 255).astype(np.uint8)
    chosen = score.parameters["mito"]
    ids = decode_class(above(stored[0], 0.5), VOXEL, chosen, boundary=stored[1])
    row = evaluate_label(ids, crop.ids["mito"], crop.known[0], voxel_size=VOXEL)
    assert row is not None
    assert row.instances is not None
    assert score.scores(score.values)["val/mito/score"] == pytest.approx(row.instances.combined)
    config.decoding.classes = {"mito": {"boundary": "cell"}}
    with pytest.raises(ConfigError, match="cell"):
        ChallengeScore(config)


@pytest.mark.parametrize("height", ["distance", "boundary"])
def test_objects_from_a_head(height: str) -> None:
    """Two objects that touch, whose mask is one and whose head sees a border."""
    config = configuration()
    config.model.heads = [HeadConfig(kind=kind, class_name="mito", scale_nm=16.0) for kind in ("boundary", "distance")]
    config.decoding.classes = {
        "mito": {"method": "watershed", "height": height, "min_size_nm3": 0.0, "min_distance_nm": 16.0}
    }
    crop = annotated("a", 0)
    values = np.zeros((5, *crop.grid.shape), np.float32)
    values[0, 4:9, 4:9, 3:18] = 0.9
    values[3, :, :, 9:12] = 0.8
    values[4, 4:9, 4:9, 3:18] = 0.9
    values[4, :, :, 9:12] = 0.55
    score = ChallengeScore(config)
    one = score.begin(crop, crop.grid)
    for begin, block in crop.grid.blocks((7, 20, 9)):
        at = (slice(None), *(slice(b, b + n) for b, n in zip(begin, block.shape, strict=True)))
        one.add(block, values[at], crop.label[at] > 0, crop.known[at])
    found = one._decode("mito")
    stored = np.rint(values * 255).astype(np.uint8)
    mask, chosen = above(stored[0], 0.5), score.parameters["mito"]
    expected = (
        decode_class(mask, VOXEL, chosen, boundary=stored[3])
        if height == "boundary"
        else decode_class(mask, VOXEL, chosen, head=HeadValues(stored[4], 16.0))
    )
    np.testing.assert_array_equal(found, expected)
    assert found.max() == 2
    one.finish()
    row = evaluate_label(expected, crop.ids["mito"], crop.known[0], voxel_size=VOXEL)
    assert row is not None
    assert row.instances is not None
    assert score.scores(score.values)["val/mito/score"] == pytest.approx(row.instances.combined)
    config.model.heads = []
    with pytest.raises(ConfigError, match=f"decoding of mito with height {height} needs that head: add"):
        ChallengeScore(config)


@pytest.mark.parametrize("group", ["checkpoint", "early_stopping"])
def test_monitoring_a_score_that_is_not_computed_is_refused_at_the_start(group: str, tmp_path: Path) -> None:
    config = tiny_config(**{f"{group}__monitor": "val/score"})
    with pytest.raises(ConfigError, match=rf"{group}\.monitor is val/score, .* training\.val_score=true"):
        train(config, tmp_path / "run", datamodule=MadeUpData())
    assert not (tmp_path / "run").exists()


def test_checkpoints_are_chosen_by_the_score(tmp_path: Path) -> None:
    config = configuration()
    config.dataset.classes = ["mito", "er"]
    config.decoding.classes = {}
    config.training.max_epochs = 1
    config.checkpoint.monitor = config.early_stopping.monitor = "val/score"
    data = MadeUpData(patches=2)
    crop = annotated("a", 0)
    data.crops = [replace(crop, label=crop.label[:2], known=crop.known[:2])]  # type: ignore[list-item]
    result = train(config, tmp_path / "run", datamodule=data)
    assert result.best is not None
    assert result.best_checkpoint is not None
    assert [p.name for p in (tmp_path / "run" / "checkpoints").glob("epoch0000-score*.ckpt")]


def test_a_volume_gives_the_annotated_ids(phantom: Path) -> None:
    for crop in Catalog.open(str(phantom)).crops():
        kinds = {name: label.annotation.kind for name, label in crop.labels.items()}
        volume = CropVolume(crop, tuple(kinds), (16.0, 16.0, 16.0))
        for name, kind in kinds.items():
            found = volume.read_instances(name, volume.grid)
            assert (found is not None) == (kind == "instance")
            if found is not None:
                ids, known = found
                assert ids.shape == known.shape == volume.grid.shape
                assert not ids[~known].any()
        assert volume.read_instances("no_such_class", volume.grid) is None
