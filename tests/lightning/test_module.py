"""The module: validation scores against counts by hand, configurations that cannot be, checkpoints."""

from __future__ import annotations

import csv
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, Dataset

import connectomics
from connectomics.data.augmentation import IntensityAugmentor
from connectomics.errors import ConfigError, CorruptDataError, InputError, MissingError, UnknownNameError
from connectomics.geometry import VoxelGrid
from connectomics.inference.sliding import predict_blocks
from connectomics.lightning.checkpoints import load_module, read_checkpoint
from connectomics.lightning.module import ConnectomicsModule
from connectomics.lightning.pooled_scores import ClassCounts, PooledCounts
from connectomics.lightning.trainer import build_trainer
from connectomics.pipeline.train import train
from tests.lightning.synthetic_run import MadeUpCrop, MadeUpData, Patches, tiny_config


class FixedData(MadeUpData):
    """Crops that are given."""

    def __init__(self, crops: list[Any]) -> None:
        super().__init__(patches=2)
        self.crops = crops


def validate(module: ConnectomicsModule, crops: list[Any]) -> dict[str, float]:
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, barebones=False
    )
    return dict(trainer.validate(module, datamodule=FixedData(crops), verbose=False)[0])


class OneAnnotation(MadeUpCrop):
    """Labels that a test hands in: label and known of the whole crop, by class."""

    def read_labels(self, grid: VoxelGrid) -> tuple[np.ndarray, np.ndarray]:
        label, known = ANNOTATIONS[self.name]
        begin = np.rint(self.grid.to_index(grid.translation)).astype(int)
        box = (slice(None), *(slice(b, b + n) for b, n in zip(begin, grid.shape, strict=True)))
        return label[box], known[box]


ANNOTATIONS: dict[str, tuple[np.ndarray, np.ndarray]] = {}


def annotate(name: str, seed: int, known_share: tuple[float, float], present: tuple[float, float]) -> OneAnnotation:
    """A crop in which class c is known at ``known_share[c]`` of the voxels and present at ``present[c]`` of them."""
    rng = np.random.default_rng(seed)
    shape = (2, 18, 16, 20 + seed)
    known = rng.random(shape) < np.reshape(known_share, (2, 1, 1, 1))
    label = (rng.random(shape) < np.reshape(present, (2, 1, 1, 1))).astype(np.float32)
    label[~known] = np.nan
    ANNOTATIONS[name] = (label, known)
    return OneAnnotation(name, VoxelGrid((8.0,) * 3, (0.0, 0.0, 400.0 * seed), shape[1:]))


@pytest.fixture
def module() -> ConnectomicsModule:
    torch.manual_seed(1)
    return ConnectomicsModule(tiny_config()).eval()


def predicted(module: ConnectomicsModule, crop: MadeUpCrop) -> np.ndarray:
    """The whole crop in one block."""
    blocks = predict_blocks(
        crop.read_image, crop.grid, module.probabilities, channels=2, window=16,
        overlap=module.config.inference.overlap, blending=module.config.inference.blending, block_size=64,
    )  # fmt: skip
    return next(iter(blocks))[1] > 0.5


class TestValidation:
    def test_scores_are_pooled_over_the_known_voxels_of_all_crops(self, module: ConnectomicsModule) -> None:
        crops = [annotate("a", 0, (0.5, 0.9), (0.4, 0.1)), annotate("b", 1, (0.2, 0.0), (0.8, 0.5))]
        tp, fp, fn = np.zeros(2), np.zeros(2), np.zeros(2)
        for crop in crops:
            label, known = ANNOTATIONS[crop.name]
            guess = predicted(module, crop)
            for c in range(2):
                g, t = guess[c][known[c]], label[c][known[c]] > 0.5
                tp[c] += (g & t).sum()
                fp[c] += (g & ~t).sum()
                fn[c] += (~g & t).sum()
        found = validate(module, crops)
        dice, iou = 2 * tp / (2 * tp + fp + fn), tp / (tp + fp + fn)
        assert found["val/mito/dice"] == pytest.approx(dice[0])
        assert found["val/er/iou"] == pytest.approx(iou[1])
        assert found["val/dice"] == pytest.approx(dice.mean())
        assert found["val/iou"] == pytest.approx(iou.mean())

    def test_an_unknown_class_is_left_out(self, module: ConnectomicsModule, caplog: pytest.LogCaptureFixture) -> None:
        found = validate(module, [annotate("a", 0, (0.5, 0.0), (0.4, 0.4))])
        assert "val/er/dice" not in found
        assert found["val/dice"] == found["val/mito/dice"]
        assert "val/dice is the mean over 1 of 2 classes: mito" in caplog.text
        assert "no ground truth for er (unknown everywhere)" in caplog.text

    def test_a_falsely_predicted_voxel_of_an_absent_class_adds_no_zero(
        self, module: ConnectomicsModule, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Else the mean jumps when the network first predicts, or no longer predicts, a class that is not there."""
        crop = annotate("a", 0, (0.9, 0.9), (0.4, 0.0))
        assert predicted(module, crop)[1].any()
        assert not predicted(module, crop)[1].all()
        found = validate(module, [crop])
        assert found["val/dice"] == found["val/mito/dice"] > 0
        assert found["val/iou"] == found["val/mito/iou"]
        assert "val/er/dice" not in found
        assert "no ground truth for er (nowhere present)" in caplog.text

    def test_a_class_that_is_present_is_logged_also_if_nothing_is_predicted(self, module: ConnectomicsModule) -> None:
        crop = annotate("a", 0, (0.9, 0.9), (0.4, 0.1))
        module.probabilities = module.all_probabilities = (
            lambda image: torch.zeros(  # type: ignore[method-assign]
                (len(image), 2, *image.shape[2:])
            )
        )
        assert validate(module, [crop]) == {
            f"val/{name}": 0.0 for name in ("dice", "iou", "mito/dice", "mito/iou", "er/dice", "er/iou")
        }

    def test_with_nothing_known_the_score_is_zero_and_said(
        self, module: ConnectomicsModule, caplog: pytest.LogCaptureFixture
    ) -> None:
        found = validate(module, [annotate("a", 0, (0.0, 0.0), (0.4, 0.4))])
        assert found == {"val/dice": 0.0, "val/iou": 0.0}
        assert "val/dice is logged as 0" in caplog.text

    def test_no_crop_for_this_process_and_empty_crops(self, module: ConnectomicsModule) -> None:
        empty = MadeUpCrop("empty", VoxelGrid((8.0,) * 3, (0.0,) * 3, (0, 4, 4)))
        whole = MadeUpCrop("whole", VoxelGrid((8.0,) * 3, (0.0,) * 3, (8, 20, 16)))
        assert validate(module, [None, empty, whole]) == validate(module, [whole])

    def test_the_picture_shows_the_middle_plane(self, module: ConnectomicsModule) -> None:
        crop = annotate("a", 0, (0.5, 0.9), (0.4, 0.1))
        validate(module, [crop])
        (plane,) = module.planes
        label, known = ANNOTATIONS["a"]
        assert plane.name == "made_up_a"
        np.testing.assert_array_equal(plane.label, np.where(known, label, 0)[:, 9])
        np.testing.assert_array_equal(plane.known, known[:, 9])
        np.testing.assert_array_equal(plane.probability > 0.5, predicted(module, crop)[:, 9])
        np.testing.assert_array_equal(plane.raw, crop.read_image(crop.grid)[9])


def test_a_class_known_but_nowhere_present_has_no_dice_whatever_is_predicted() -> None:
    counts = PooledCounts(2)
    known = np.ones((2, 4, 4, 4), np.bool_)
    label = np.zeros(known.shape, np.bool_)
    label[0, 0] = True
    guess = label.copy()
    guess[1, 2, 2, 2] = True
    counts.add(guess, label, known)
    scores = counts.scores(counts.values)
    assert scores.dice[0] == 1.0
    assert np.isnan(scores.dice[1])
    assert scores.mean(scores.dice) == scores.mean(scores.iou) == 1.0
    with pytest.raises(InputError, match="must have one shape with 2 channels"):
        counts.add(label[:1], label, known)


def logged(run_dir: Path, name: str) -> list[str]:
    """A column of ``metrics.csv`` as it is written."""
    with (run_dir / "metrics.csv").open() as file:
        return [row[name] for row in csv.DictReader(file) if row.get(name)]


def counted(patches: Patches) -> dict[str, int]:
    """Patches and voxels by class, one after another."""
    found = {f"data/{name}/{what}": 0 for name in ("mito", "er") for what in ("patches", "present", "known")}
    for patch in (patches[number] for number in range(len(patches))):
        for number, name in enumerate(("mito", "er")):
            present = int(patch["present"][number][patch["codes"].long()].sum())
            found[f"data/{name}/patches"] += present > 0
            found[f"data/{name}/present"] += present
            found[f"data/{name}/known"] += int(patch["known_states"][number][patch["codes"].long()].sum())
    return found


class StopAt(pl.Callback):
    """Stands for a killed process."""

    def __init__(self, epoch: int, batch: int) -> None:
        self.at = (epoch, batch)

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) == self.at:
            raise ArithmeticError("killed")


class TestCounts:
    """What the network was shown, by class."""

    def test_every_epoch_is_counted_by_itself(self, tmp_path: Path) -> None:
        data = MadeUpData(patches=8, unknown=(3, 4))
        train(tiny_config(training__max_epochs=2), tmp_path, datamodule=data)
        expected = counted(data.patches)
        assert expected["data/er/known"] == 3 * 16**3  # patches 0, 2 and 6
        assert expected["data/mito/known"] == 6 * 16**3
        for name, value in expected.items():
            assert logged(tmp_path, name) == [str(value)] * 2, name  # integers, every digit
        share = (expected["data/er/known"] + expected["data/mito/known"]) / (2 * 8 * 16**3)
        assert [float(v) for v in logged(tmp_path, "train/known")] == pytest.approx([share] * 2)

    def test_they_are_exact_beyond_what_float32_holds(self) -> None:
        counts = ClassCounts(["mito"])
        for _ in range(3):
            counts.add(torch.tensor([[1], [2**24 + 1], [2**40 + 1]]))
        found = counts.metrics(counts.values)
        assert found == {
            "data/mito/patches": 3,
            "data/mito/present": 3 * 2**24 + 3,
            "data/mito/known": 3 * 2**40 + 3,
        }

    def test_a_run_resumed_in_the_middle_of_an_epoch_counts_each_batch_once(self, tmp_path: Path) -> None:
        def fit(*callbacks: pl.Callback, checkpoint: Path | None = None) -> None:
            module = ConnectomicsModule(config)
            trainer = build_trainer(config, tmp_path, callbacks=callbacks)
            trainer.fit(
                module, datamodule=data, ckpt_path=None if checkpoint is None else str(checkpoint), weights_only=True
            )

        config = tiny_config(training__max_epochs=2, checkpoint__save_top_k=0, early_stopping__patience=0)
        data = MadeUpData(patches=8, unknown=(0,))
        data.train_dataloader = lambda: DataLoader(data.patches, batch_size=2)  # type: ignore[method-assign]
        middle = ModelCheckpoint(tmp_path, "middle", every_n_train_steps=6, save_top_k=-1)
        with pytest.raises(ArithmeticError):
            fit(middle, StopAt(1, 3))
        seen = read_checkpoint(tmp_path / "middle.ckpt")["connectomics"]["seen"]
        first = counted(Patches(4, unknown=(0,)))
        rows = [[first[f"data/{name}/{what}"] for name in ("mito", "er")] for what in ("patches", "present", "known")]
        assert seen.tolist() == rows  # of two batches of epoch 1
        fit(checkpoint=tmp_path / "middle.ckpt")
        # Lightning starts the loader from its beginning: the second half of the epoch sees the first patches again
        assert logged(tmp_path, "data/mito/known") == [
            str(counted(data.patches)["data/mito/known"]),
            str(2 * first["data/mito/known"]),
        ]

    def test_counts_of_other_classes_are_refused(self) -> None:
        with pytest.raises(InputError, match=r"counts of 1 classes must have shape \(3, 1\), got \(3, 2\)"):
            ClassCounts(["mito"]).load(torch.zeros((3, 2), dtype=torch.int64))


class Seen(pl.Callback):
    """Keeps the batches that the network is trained on."""

    def __init__(self) -> None:
        self.batches: list[dict[str, torch.Tensor]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        self.batches.append({name: value.clone() for name, value in batch.items()})


class TestBatches:
    @staticmethod
    def trained_on(tmp_path: Path, patches: Dataset[Any], **changes: Any) -> list[dict[str, torch.Tensor]]:
        config = tiny_config(training__max_epochs=1, early_stopping__patience=0, **changes)
        seen = Seen()
        loader = DataLoader(patches, batch_size=2)
        build_trainer(config, tmp_path, validate=False, callbacks=[seen]).fit(ConnectomicsModule(config), loader)
        return seen.batches

    def test_dense_ones_train_just_as_packed_ones(self, tmp_path: Path) -> None:
        class Dense(Patches):
            def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
                patch = super().__getitem__(index)
                codes = patch["codes"].long()
                label, known = patch["present"][:, codes].float(), patch["known_states"][:, codes]
                label[~known] = torch.nan
                return {"image": patch["image"], "label": label, "known": known}

        for patches in (Patches(4), Dense(4)):
            torch.manual_seed(0)
            self.trained_on(tmp_path / type(patches).__name__, patches)
        for column in ("train/loss", "train/known", "data/er/patches", "data/mito/present", "data/er/known"):
            assert logged(tmp_path / "Dense", column) == logged(tmp_path / "Patches", column) != []

    def test_intensity_is_augmented_by_the_seed_and_labels_stay(self, tmp_path: Path) -> None:
        plain = self.trained_on(tmp_path / "plain", Patches(4))
        noisy = self.trained_on(tmp_path / "noisy", Patches(4), data__intensity={"noise": {"prob": 1.0}})
        augmentor = IntensityAugmentor.from_config({"noise": {"prob": 1.0}}, [8.0, 8.0, 8.0])
        assert augmentor is not None
        for before, after in zip(plain, noisy, strict=True):
            expected, _ = augmentor(before["image"], before["codes"], before["seed"])
            assert torch.equal(after["image"], expected)
            assert not torch.equal(after["image"], before["image"])
            assert torch.equal(after["codes"], before["codes"])

    def test_a_monai_transform_that_the_device_can_do_is_done_there(self, tmp_path: Path) -> None:
        noise = {"RandGaussianNoised": {"keys": ["image"], "prob": 1.0, "std": 0.1}}
        module = ConnectomicsModule(tiny_config(data__augmentations=noise))
        assert module.intensity is not None
        assert [name for name, _ in module.intensity.own.kinds] == ["noise_monai"]
        assert ConnectomicsModule(tiny_config()).intensity is None

    def test_a_wrong_name_shows_before_any_data(self) -> None:
        with pytest.raises(UnknownNameError, match="did you mean 'noise'"):
            ConnectomicsModule(tiny_config(data__intensity={"nois": {}}))

    def test_codes_beyond_the_tables_are_refused(self, tmp_path: Path) -> None:
        class Broken(Patches):
            PRESENT, KNOWN = Patches.PRESENT[:, :1], Patches.KNOWN[:, :1]

        with pytest.raises(InputError, match="codes must be from 0 to 0"):
            self.trained_on(tmp_path, Broken(2))


class TestConfigurations:
    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"optimizer__name": "SDG"}, ConfigError, "optimizer.name must be one of .*did you mean 'SGD'"),
            ({"optimizer__lr": -1.0}, ConfigError, "optimizer.lr must be at least 0.*got -1.0"),
            ({"optimizer__lr": float("inf")}, ConfigError, "optimizer.lr must be a finite number"),
            ({"optimizer__lr": float("nan")}, ConfigError, "optimizer.lr must be"),
            ({"optimizer__weight_decay": float("nan")}, ConfigError, "optimizer.weight_decay must be"),
            ({"scheduler__power": float("nan")}, ConfigError, "scheduler.power must be"),
            ({"optimizer__weight_decay": -1.0}, ConfigError, "optimizer.weight_decay must be at least 0"),
            ({"optimizer__betas": [0.9]}, ConfigError, "optimizer.betas must be two numbers from 0 to below 1"),
            ({"scheduler__name": "cosin"}, ConfigError, "did you mean 'cosine'"),
            ({"scheduler__warmup_epochs": -1}, ConfigError, "scheduler.warmup_epochs must be at least 0"),
            ({"training__precision": "bf16"}, ConfigError, "precision must be .*did you mean 'bf16-mixed'"),
            ({"system__cpu_processes": 0}, ConfigError, "system.cpu_processes must be at least 1"),
            ({"system__num_gpus": -1}, ConfigError, "system.num_gpus must be at least 0"),
            ({"checkpoint__mode": "best"}, ConfigError, "checkpoint.mode must be one of min, max"),
            ({"early_stopping__mode": "up"}, ConfigError, "early_stopping.mode must be one of min, max"),
            ({"training__accumulate_grad_batches": 0}, ConfigError, "accumulate_grad_batches must be at least 1"),
            ({"training__val_every_n_epochs": 0}, ConfigError, "val_every_n_epochs must be at least 1"),
            ({"scheduler__min_lr": 1.0}, ConfigError, r"min_lr must be at most optimizer.lr \(0.01\), got 1.0"),
            ({"scheduler__name": "cosine", "training__max_epochs": -1}, ConfigError, "needs an end"),
            ({"model__out_channels": 3}, ConfigError, "dataset.classes has 2 classes"),
            ({"data__patch_size": [15, 16, 16]}, InputError, "multiple of"),
            ({"inference__window": [15, 16, 16]}, InputError, r"inference\.window: .* multiple of"),
            ({"model__architecture": "unetr", "model__options": {"hidden_size": 12, "mlp_dim": 8, "num_heads": 2},
              "data__patch_size": [32, 32, 32], "inference__window": [48, 32, 32]}, InputError, "patch size only"),
            ({"model__loss_functions": ["DiceLos"], "model__loss_weights": [1]}, UnknownNameError, "'DiceLoss'"),
        ],
    )  # fmt: skip
    def test_that_cannot_be(self, changes: dict[str, Any], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            ConnectomicsModule(tiny_config(**changes))

    def test_mednext_takes_its_size_from_the_model_group(self) -> None:
        config = tiny_config(
            model__architecture="mednext",
            model__mednext_size="S",
            model__mednext_kernel_size=5,
            model__options={"init_filters": 2},
            data__patch_size=[32, 32, 32],
        )
        kernels = {p.shape[-1] for n, p in ConnectomicsModule(config).named_parameters() if "enc_stages" in n}
        assert 5 in kernels


class TestCheckpoints:
    @pytest.fixture(scope="class")
    @classmethod
    def checkpoint(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        config = tiny_config(training__max_epochs=1)
        result = train(config, tmp_path_factory.mktemp("run"), datamodule=MadeUpData(patches=2))
        assert result.checkpoint is not None
        return result.checkpoint

    def test_it_is_self_contained(self, checkpoint: Path) -> None:
        ours = read_checkpoint(checkpoint)["connectomics"]
        assert ours["classes"] == ["mito", "er"]
        assert ours["version"] == connectomics.__version__
        assert ours["voxel_size"] == [8.0, 8.0, 8.0]
        module = load_module(checkpoint)
        assert not module.training
        assert module.config.optimizer.lr == 0.01
        weights = read_checkpoint(checkpoint)["state_dict"]
        assert all(torch.equal(v, weights[k]) for k, v in module.state_dict().items())
        assert module.probabilities(torch.rand(1, 1, 16, 16, 16)).shape == (1, 2, 16, 16, 16)

    def test_another_configuration_keeps_the_model(self, checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
        config = tiny_config(model__architecture="segresnet", model__options={}, inference__overlap=0.5)
        config.dataset.voxel_size = [4.0, 4.0, 4.0]
        module = load_module(checkpoint, config)
        assert module.config.model.architecture == "unet"
        assert module.config.inference.overlap == 0.5
        assert "was trained at [8.0, 8.0, 8.0] nm, the configuration has [4.0, 4.0, 4.0] nm" in caplog.text

    def test_other_classes(self, checkpoint: Path) -> None:
        config = tiny_config()
        config.dataset.classes = ["er", "mito"]
        with pytest.raises(InputError, match=r"for classes \['mito', 'er'\], .* configuration has \['er', 'mito'\]"):
            load_module(checkpoint, config)

    def test_missing(self, checkpoint: Path) -> None:
        with pytest.raises(MissingError, match=r"no checkpoint at .*bst\.ckpt; did you mean .*best\.ckpt"):
            load_module(checkpoint.with_name("bst.ckpt"))
        with pytest.raises(MissingError, match="no checkpoint at"):
            load_module("/nowhere/best.ckpt")

    @pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
    def test_truncated(self, checkpoint: Path, tmp_path: Path, share: float) -> None:
        whole = checkpoint.read_bytes()
        broken = tmp_path / "broken.ckpt"
        broken.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(CorruptDataError, match=r"broken\.ckpt") as caught:
            load_module(broken)
        assert "\n" not in str(caught.value)

    def test_damaged_inside(self, checkpoint: Path, tmp_path: Path) -> None:
        content = bytearray(checkpoint.read_bytes())
        content[200:400] = bytes(200)
        broken = tmp_path / "broken.ckpt"
        broken.write_bytes(content)
        with pytest.raises((CorruptDataError, InputError), match=r"broken\.ckpt"):
            load_module(broken)

    def test_of_something_else(self, tmp_path: Path) -> None:
        torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
        with pytest.raises(InputError, match="not a checkpoint of `pytc train`"):
            load_module(tmp_path / "other.ckpt")
        torch.save({"model": pickle.Pickler}, tmp_path / "objects.ckpt")
        with pytest.raises(InputError, match="not unpickled for safety"):
            load_module(tmp_path / "objects.ckpt")

    def test_of_a_later_version(self, checkpoint: Path, tmp_path: Path) -> None:
        content = read_checkpoint(checkpoint)
        content["connectomics"]["format"] = 99
        torch.save(content, tmp_path / "later.ckpt")
        with pytest.raises(InputError, match="has format 99"):
            load_module(tmp_path / "later.ckpt")

    def test_with_a_key_that_this_version_does_not_know(self, checkpoint: Path, tmp_path: Path) -> None:
        content = read_checkpoint(checkpoint)
        content["connectomics"]["config"]["optimizer"]["lookahead"] = 3
        torch.save(content, tmp_path / "odd.ckpt")
        with pytest.raises(ConfigError, match=r"in checkpoint .*odd\.ckpt .*lookahead"):
            load_module(tmp_path / "odd.ckpt")

    def test_with_weights_of_another_network(self, checkpoint: Path, tmp_path: Path) -> None:
        content = read_checkpoint(checkpoint)
        content["state_dict"].popitem()
        torch.save(content, tmp_path / "odd.ckpt")
        with pytest.raises(InputError, match="do not fit the network"):
            load_module(tmp_path / "odd.ckpt")

    def test_resuming_from_weights_alone(self, checkpoint: Path, tmp_path: Path) -> None:
        content = read_checkpoint(checkpoint)
        del content["optimizer_states"]
        torch.save(content, tmp_path / "weights.ckpt")
        with pytest.raises(InputError, match="weights only, no optimizer"):
            train(tiny_config(), tmp_path / "run", checkpoint=tmp_path / "weights.ckpt", datamodule=MadeUpData())
