"""Heads in a run: channels, losses, scores, checkpoints; alone, with deep supervision, halves and two processes."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from connectomics.config.heads import channel_names, heads_of
from connectomics.config.schema import HeadConfig
from connectomics.errors import ConfigError, InputError
from connectomics.geometry import VoxelGrid
from connectomics.lightning.challenge_score import ChallengeScore
from connectomics.lightning.checkpoints import check_resumable, load_module
from connectomics.lightning.module import ConnectomicsModule
from connectomics.lightning.pooled_scores import HeadScores
from connectomics.models.heads import HeadLosses, split_channels
from connectomics.models.losses import build_loss
from connectomics.models.targets import head_labels
from connectomics.pipeline.runs import Run
from connectomics.pipeline.train import train
from tests.lightning.heads_run import KINDS, HeadCrop, HeadData, HeadPatches, head_config, world_ids
from tests.lightning.synthetic_run import MadeUpData

ROOT = Path(__file__).resolve().parents[2]
NAMES = [f"mito/{kind}" for kind in KINDS]


def metrics(run_dir: Path, column: str) -> list[float]:
    with (run_dir / "metrics.csv").open() as file:
        return [float(row[column]) for row in csv.DictReader(file) if row.get(column)]


@pytest.fixture(scope="module")
def a_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    config = head_config(training__max_epochs=6, optimizer__lr=3e-2)
    return train(config, tmp_path_factory.mktemp("heads") / "run", datamodule=HeadData())


class TestTraining:
    def test_every_head_learns_and_is_scored(self, a_run: Run) -> None:
        for name in NAMES:
            losses = metrics(a_run.folder, f"train/loss/{name}")
            assert losses[-1] < losses[0], name
        for name in NAMES[:2]:
            assert 0 <= metrics(a_run.folder, f"val/{name}/dice")[-1] <= 1
        for name in NAMES[2:]:
            assert 0 < metrics(a_run.folder, f"val/{name}/mae")[-1] < 0.5
        assert metrics(a_run.folder, "val/mito/dice")  # classes as before

    def test_the_loss_is_the_sum_over_classes_and_weighted_heads(self, a_run: Run) -> None:
        parts = ["train/DiceLoss", "train/BCEWithLogitsLoss", *(f"train/loss/{name}" for name in NAMES)]
        total = sum(np.array(metrics(a_run.folder, part)) for part in parts)
        np.testing.assert_allclose(metrics(a_run.folder, "train/loss"), total, rtol=1e-4)

    @pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
    def test_deep_supervision_precision_and_accumulation(self, tmp_path: Path, precision: str) -> None:
        config = head_config(training__precision=precision, training__max_epochs=1)
        config.training.accumulate_grad_batches = 2
        config.model.architecture, config.model.deep_supervision = "dynunet", True
        config.model.options = {
            "filters": [4, 8, 8, 8], "strides": [1, 2, 2, 2], "kernel_size": [3, 3, 3, 3],
            "upsample_kernel_size": [2, 2, 2],
        }  # fmt: skip
        result = train(config, tmp_path / "run", datamodule=HeadData())
        assert all(np.isfinite(metrics(result.folder, f"train/loss/{name}")).all() for name in NAMES)

    def test_a_batch_without_ids_is_one_line(self) -> None:
        module = ConnectomicsModule(head_config())
        batch = {name: value[None] for name, value in HeadPatches(1)[0].items() if name != "ids"}
        with pytest.raises(InputError, match="must have instance ids"):
            module.training_step(batch, 0)

    @pytest.mark.slow
    def test_two_processes_of_which_one_knows_nothing(self, tmp_path: Path) -> None:
        command = [sys.executable, "-m", "tests.lightning.heads_run", str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        said = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
        assert said["epochs"] == 2
        assert np.isfinite(metrics(Path(said["run_dir"]), "train/loss/mito/affinities")).all()


class TestLosses:
    def test_of_each_head_its_own_over_its_channels(self) -> None:
        heads = heads_of(head_config("affinities", "distance"))
        losses = HeadLosses(heads)
        ids = torch.from_numpy(world_ids(VoxelGrid((8.0,) * 3, (0.0,) * 3, (16,) * 3)))[None]
        logits = torch.randn((1, 5, 16, 16, 16), requires_grad=True)
        result = losses(split_channels(logits, [4, 1]), ids)
        for head, part in zip(heads, (logits[:, :4], logits[:, 4:]), strict=True):
            expected = build_loss(head.losses)(part, head_labels(head, ids[:, 0])).total
            torch.testing.assert_close(result.parts[head.name], expected.detach())
        result.total.backward()
        assert logits.grad is not None
        assert (logits.grad.abs().sum((0, 2, 3, 4)) > 0).all()

    def test_where_nothing_is_known_the_loss_is_zero_and_has_a_graph(self) -> None:
        losses = HeadLosses(heads_of(head_config()))
        logits = torch.randn((1, 16, 16, 16, 16), requires_grad=True)
        result = losses(split_channels(logits, [4, 1, 1, 10]), torch.full((1, 1, 16, 16, 16), -1, dtype=torch.int32))
        result.total.backward()
        assert float(result.total.detach()) == 0
        assert logits.grad is not None
        assert not logits.grad.any()

    def test_ids_of_other_classes_are_refused(self) -> None:
        losses = HeadLosses(heads_of(head_config("distance")))
        with pytest.raises(InputError, match="the heads need ids"):
            losses([[torch.zeros((1, 1, 8, 8, 8))]], torch.zeros((1, 2, 8, 8, 8), dtype=torch.int32))


class TestScores:
    def test_they_do_not_depend_on_the_blocks(self) -> None:
        grid = VoxelGrid((8.0,) * 3, (1000.0, 40.0, 80.0), (24, 22, 26))
        crop = HeadCrop("crop0", grid)
        heads = heads_of(head_config())
        guess = np.random.default_rng(0).random((16, *grid.shape), np.float32)
        found = []
        for size in (26, 10):
            scores = HeadScores(heads)
            for begin, block in grid.blocks((size,) * 3):
                at = tuple(slice(b, b + n) for b, n in zip(begin, block.shape, strict=True))
                scores.add(crop, block, guess[:, *at], torch.device("cpu"))
            found.append(scores.scores(scores.values))
        assert set(found[0]) == {
            "val/mito/affinities/dice", "val/mito/boundary/dice", "val/mito/distance/mae", "val/mito/lsd/mae"
        }  # fmt: skip
        for name, value in found[0].items():
            # descriptors of whole objects are known also where they are wide: whether one is whole a block cannot see
            assert found[1][name] == pytest.approx(value, rel=0.1 if "lsd" in name else 1e-6), name

    def test_a_perfect_answer_is_scored_as_such(self) -> None:
        grid = VoxelGrid((8.0,) * 3, (1000.0, 40.0, 80.0), (20, 18, 21))
        heads = heads_of(head_config())
        ids = torch.from_numpy(world_ids(grid))
        answer = torch.cat([head_labels(head, ids).dense().label[0] for head in heads]).numpy()
        scores = HeadScores(heads)
        scores.add(HeadCrop("crop0", grid), grid, answer, torch.device("cpu"))
        values = scores.scores(scores.values)
        assert [values[f"val/{name}/dice"] for name in NAMES[:2]] == [1, 1]
        assert [values[f"val/{name}/mae"] for name in NAMES[2:]] == pytest.approx([0, 0], abs=1e-6)

    def test_a_head_without_objects_in_the_truth_is_not_logged_whatever_is_predicted(self) -> None:
        grid = VoxelGrid((8.0,) * 3, (1000.0, 40.0, 80.0), (20, 18, 21))
        heads = heads_of(head_config("affinities", "boundary"))
        scores = HeadScores(heads)

        class Empty(HeadCrop):
            def read_ids(self, grid: VoxelGrid) -> np.ndarray:
                return np.zeros((1, *grid.shape), np.int32)

        guess = np.ones((sum(head.channels for head in heads), *grid.shape), np.float32)
        scores.add(Empty("crop0", grid), grid, guess, torch.device("cpu"))
        assert scores.scores(scores.values) == {}


class Touching:
    """A crop with two objects that touch, known everywhere."""

    name, dataset = "crop1", "made_up"
    grid = VoxelGrid((8.0,) * 3, (0.0,) * 3, (16, 16, 20))

    def __init__(self) -> None:
        self.ids = np.zeros(self.grid.shape, np.uint32)
        self.ids[3:13, 3:13, 2:10], self.ids[3:13, 3:13, 10:18] = 1, 2

    def read_instances(self, class_name: str, grid: VoxelGrid) -> tuple[np.ndarray, np.ndarray] | None:
        return self.ids, np.ones(self.grid.shape, np.bool_)


class TestChallengeScore:
    def test_objects_that_touch_are_told_apart_by_their_affinities(self) -> None:
        crop = Touching()
        config = head_config("boundary", "affinities")  # so that affinities are not the first of the heads' channels
        ids = torch.from_numpy(crop.ids.astype(np.int32))[None]
        heads = [head_labels(head, ids).dense().label[0].numpy() for head in heads_of(config)]
        classes = np.stack([crop.ids > 0, np.zeros(crop.grid.shape)]).astype(np.float32)
        label, known = classes > 0.5, np.ones(classes.shape, np.bool_)
        scores = {}
        for method in ("cc3d", "mutex_watershed", "agglomeration"):
            config.decoding.classes = {"mito": {"method": method}}
            total = ChallengeScore(config)
            score = total.begin(crop, crop.grid)
            score.add(crop.grid, np.concatenate([classes, *heads]), label, known)
            score.finish()
            scores[method] = total.scores(total.values)["val/mito/score"]
        assert scores["mutex_watershed"] == scores["agglomeration"] == 1
        assert scores["cc3d"] < 0.9

    def test_a_decoding_by_affinities_that_are_not_there_is_one_line(self) -> None:
        config = head_config("distance")
        config.decoding.classes = {"mito": {"method": "mutex_watershed"}}
        with pytest.raises(ConfigError, match="decoding of mito with mutex_watershed needs affinities"):
            ChallengeScore(config)


class TestCheckpoints:
    def test_a_prediction_has_the_channels_that_are_written(self, a_run: Run) -> None:
        assert a_run.checkpoint is not None
        config = head_config()
        config.model.heads[1].write = False
        for asked, expected in ((None, 2 + 4 + 1 + 1), (config, 2 + 4 + 1)):
            module = load_module(a_run.checkpoint, asked)
            image = torch.rand((1, 1, 16, 16, 16))
            with torch.no_grad():
                found, everything = module.probabilities(image), torch.sigmoid(module(image))
            assert found.shape[1] == expected == len(channel_names(module.config))
            kept = [0, 1, 2, 3, 4, 5, 7] if asked else [*range(8)]
            torch.testing.assert_close(found, everything[:, kept])

    def test_other_heads_are_one_line(self, a_run: Run) -> None:
        assert a_run.checkpoint is not None
        config = head_config("affinities")
        with pytest.raises(
            InputError, match=r"was trained with heads mito/affinities .*; set model.heads as in training"
        ):
            load_module(a_run.checkpoint, config)
        config.model.heads = []
        with pytest.raises(InputError, match="the configuration has no heads"):
            load_module(a_run.checkpoint, config)
        other = head_config()
        other.model.heads[2] = HeadConfig("distance", "mito", scale_nm=16.0)
        with pytest.raises(InputError, match="mito/distance \\(16 nm\\)"):
            check_resumable(a_run.checkpoint, ConnectomicsModule(other))

    def test_weights_of_losses_may_change_when_a_run_goes_on(self, a_run: Run) -> None:
        assert a_run.checkpoint is not None
        config = head_config()
        config.model.heads[0].weight = 2.0
        check_resumable(a_run.checkpoint, ConnectomicsModule(config))


def test_validation_without_heads_asks_for_no_ids() -> None:
    module = ConnectomicsModule(head_config())
    assert module.head_scores.margin == [6, 6, 6]
    plain = head_config()
    plain.model.heads = []
    module = ConnectomicsModule(plain)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    found = trainer.validate(module, datamodule=MadeUpData(), verbose=False)[0]
    assert not [name for name in found if name.startswith("val/mito/aff")]
