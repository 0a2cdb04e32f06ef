"""The network, its loss and its scores as a Lightning module."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

import connectomics
from connectomics.config import RunConfig, check_config, config_to_dict, import_plugins
from connectomics.config.heads import channel_groups
from connectomics.data.augmentation import BatchAugmentor
from connectomics.data.dataset.build import inputs_of
from connectomics.data.normalization import with_normalization
from connectomics.data.patches import centered, input_names
from connectomics.data.volumes import CropVolume
from connectomics.errors import ConfigError, InputError
from connectomics.geometry import VoxelGrid
from connectomics.inference.raw import FurtherInput
from connectomics.inference.sliding import predict_blocks
from connectomics.inference.trained_network import TrainedNetwork
from connectomics.inference.windows import WindowFit
from connectomics.lightning.averaging import AveragedWeights
from connectomics.lightning.challenge_score import ChallengeScore
from connectomics.lightning.checkpoints import CHECKPOINT_FORMAT, CHECKPOINT_KEY, load_module
from connectomics.lightning.mean_teacher import MeanTeacher
from connectomics.lightning.monitors import check_monitors
from connectomics.lightning.network import build_network, freeze, inference_window, stages_from_output
from connectomics.lightning.optim import build_optimizer
from connectomics.lightning.panels import Plane
from connectomics.lightning.pooled_scores import ClassCounts, HeadScores, PooledCounts, Scores
from connectomics.lightning.validation import slabs, validation_block
from connectomics.models.batch_labels import labels_of
from connectomics.models.gaps import with_gaps
from connectomics.models.heads import HeadLosses, ids_of, split_channels
from connectomics.models.losses import build_loss, weigh_classes

log = logging.getLogger(__name__)

_PLANES = 4  # most crops in the pictures of a validation
_THRESHOLD = 0.5  # probability from which a voxel counts as predicted


class ConnectomicsModule(TrainedNetwork, pl.LightningModule):
    """Trains and validates the network of a run.

    A training batch is ``{"image": (B, 1, D, H, W) float32, ...}`` with labels, packed or dense (see `labels_of`), and
    with ``ids`` if there are ``model.heads`` (see `connectomics.models.targets`). A validation batch is a list of whole
    crops (`CropVolume`), or None if no crop is left for this process.

    Logged metrics:
        ``train/loss`` (with heads: the sum over classes and heads), ``train/<loss name>``, ``train/loss/<head>``: means
        over an epoch; ``train/loss_step``; ``train/known``: share of known labels; ``train/lr``. With
        ``training.mean_teacher`` the sum has the weighted consistency, and there are ``train/consistency`` (without the
        weight), ``train/consistency_weight`` and ``train/confident``, see `Consistency`.
        ``val/dice``, ``val/iou``, ``val/<class>/dice``, ``val/<class>/iou``: pooled over the known voxels of all
        validation crops, for the classes that are present in their ground truth, whatever the network predicts;
        ``val/<head>/dice`` or ``mae``, see `HeadScores`; with ``training.val_score`` also ``val/score`` and
        ``val/<class>/score``, see `ChallengeScore`.
        ``data/<class>/patches``, ``data/<class>/present``, ``data/<class>/known``: see `ClassCounts`.
    """

    def __init__(self, config: RunConfig) -> None:
        """Build network and loss; raise `InputError`, `ConfigError` or `UnknownNameError` if that is not possible."""
        check_config(config)
        import_plugins(config.plugins)
        check_monitors(config)
        classes = len(config.dataset.classes)
        if config.channels != classes:  # possible with dataset.name=cellmap_single
            raise ConfigError(f"model.out_channels is {config.channels}, expected one per class: {classes}")
        super().__init__(config, build_network(config, sum(channel_groups(config))))
        self.frozen_norms = freeze(self.network, config.model.freeze)
        self.train()
        model = config.model
        self.loss = build_loss(model.loss_functions, model.loss_weights, model.loss_options, config.voxel_size)
        weigh_classes(self.loss, config)
        self.head_losses = HeadLosses(self.heads)
        self.window = inference_window(config)
        self.intensity = BatchAugmentor.of(config)
        self.mean_teacher = MeanTeacher(config) if config.training.mean_teacher.weight > 0 else None
        self.seen = ClassCounts(self.classes)  # in the epoch so far
        self.sample_losses: Tensor | None = None  # (B,), of the classes, in the latest training batch
        self.counts = PooledCounts(len(self.classes))
        self.head_scores = HeadScores(self.heads)
        self.challenge = ChallengeScore(config) if config.training.val_score else None
        self.planes: list[Plane] = []  # of the latest validation, for the picture panel
        self.begun_outputs: list[str] = []  # output channels of `model.weights`
        self.only_a_look = False  # validate on one window of each crop, to test whether it runs
        self._logged: set[str] = set()

    # -- training ----------------------------------------------------------------------------------------------------
    def train(self, mode: bool = True) -> Self:
        """Set the mode of all parts; frozen norms stay in evaluation mode."""
        super().train(mode)
        for name in self.frozen_norms:
            self.network.get_submodule(name).eval()
        return self

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch over known voxels; zero, with a graph, if nothing is known."""
        labels = labels_of(batch)
        inputs = (batch[name] for name in input_names(len(self.config.data.inputs)))
        logits, *of_heads = split_channels(self(batch["image"], *inputs), self.channel_groups)
        result = self.loss(logits, with_gaps(labels, batch, self.config))
        self.sample_losses = result.samples
        total = result.total
        parts: dict[str, Any] = {f"train/{name}": value for name, value in result.parts.items()}
        if self.heads:
            ids = ids_of(batch)[:, : len(self.head_losses.classes)]  # those for gaps come after them
            heads = self.head_losses(of_heads, ids)
            total = total + heads.total
            parts |= {f"train/loss/{name}": value for name, value in heads.parts.items()}
        if self.mean_teacher is not None:
            more, logged = self._consistency(self.mean_teacher, batch)
            total, parts = total + more, parts | logged
        tally = labels.tally()
        self.seen.add(tally)
        known = tally[-1].sum() / math.prod(labels.shape)
        size = labels.batch
        means = {"train/loss": total.detach(), "train/known": known, **parts}
        self.log_dict(means, on_step=False, on_epoch=True, batch_size=size, sync_dist=True)
        self.log_step(total.detach(), size)
        return total

    def log_step(self, loss: Tensor, size: int) -> None:
        """Log the loss of a step and its learning rate; a number, or a progress bar, would make it wait for a GPU."""
        self.log("train/loss_step", loss, on_step=True, on_epoch=False, batch_size=size)
        rate = max(group["lr"] for group in self.trainer.optimizers[0].param_groups)
        self.log("train/lr", loss.new_full((), rate), on_step=False, on_epoch=True, batch_size=1)

    def _consistency(self, mean_teacher: MeanTeacher, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Return the weighted consistency loss of the batch's patches without labels, and what is logged of it."""
        if "unlabeled" not in batch:
            raise InputError(
                "training.mean_teacher needs batches with patches without labels (`unlabeled`), as CellMapDataModule "
                "gives them"
            )
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        averages = next((c for c in callbacks if isinstance(c, AveragedWeights)), None)
        if averages is None:  # not StopIteration, which ends an epoch of Lightning without a word
            raise InputError(
                "training.mean_teacher needs the callback AveragedWeights, whose averages are the teacher; train with "
                "`connectomics.train` and training.ema above 0, or add it to the trainer"
            )
        weight = mean_teacher.weight(self.trainer.global_step)
        loss, confident = mean_teacher(batch["unlabeled"], self.network, averages.network)
        logged = {"consistency": loss.detach(), "consistency_weight": loss.new_full((), weight), "confident": confident}
        return weight * loss, {f"train/{name}": value for name, value in logged.items()}

    def on_train_epoch_end(self) -> None:
        """Log the counts of the epoch to the loggers directly: Lightning's float32 is exact up to 16 million only."""
        # Lightning reduces an epoch's means over processes when they are first read, which the first process may
        # already have done for its progress line: the others must do it here, before all processes add the counts.
        _ = self.trainer.callback_metrics
        metrics = self.seen.metrics(self.of_all_processes(self.seen.values))
        self.seen.reset()
        for logger in self.trainer.loggers:  # at the step at which Lightning logs the epoch's means
            logger.log_metrics({**metrics, "epoch": self.current_epoch}, step=max(0, self.trainer.global_step - 1))

    def of_all_processes(self, counts: Tensor) -> Tensor:
        """Return the sum of ``counts`` over all processes; ``counts`` itself does not change."""
        total = counts.to(self.device, copy=True)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(total)
        return total

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer; `Schedule` sets its learning rate before each batch."""
        stages = None
        if self.config.optimizer.layer_decay < 1:
            stages = stages_from_output(self.config, self.network, sum(self.channel_groups))
        return build_optimizer((p for p in self.parameters() if p.requires_grad), self.config.optimizer, stages)

    # -- validation --------------------------------------------------------------------------------------------------
    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move a training batch; crops are read, and moved, window by window."""
        if isinstance(batch, Mapping):
            labels_of(batch)  # check the codes in host memory: on a GPU that would make each step wait
            moved = super().transfer_batch_to_device(batch, device, dataloader_idx)
            for there, here in ((moved, batch), (moved.get("unlabeled", {}), batch.get("unlabeled", {}))):
                if "seed" in here:  # the host reads it
                    there["seed"] = here["seed"]
            return moved
        return batch

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Augment the image of a packed training batch, then center it; spatial augmentations also move the labels."""
        if not isinstance(batch, Mapping):
            return batch
        if self.intensity is not None and self.trainer.training and {"codes", "seed"} <= batch.keys():
            batch = self.intensity(batch)
        return centered(batch)

    def setup(self, stage: str) -> None:
        """Store the normalization of the training data in the configuration: it belongs to the model."""
        data = getattr(self.trainer, "datamodule", None)
        found = getattr(data, "normalization", None) if stage == "fit" else None
        if found:
            entries = {name: chosen.to_dict() for name, chosen in found.items()}
            self.config = with_normalization(self.config, entries)

        if stage == "fit":
            weigh_classes(self.loss, self.config, getattr(data, "present_shares", {}))

    def on_validation_epoch_start(self) -> None:
        """Start new counts."""
        self.counts.reset()
        self.head_scores.reset()
        if self.challenge is not None:
            self.challenge.reset()
        self.planes = []

    def validation_step(self, batch: Sequence[CropVolume | None], batch_idx: int) -> None:
        """Predict whole crops and count; None stands for no crop."""
        for crop in batch:
            if crop is not None and crop.grid.size:
                self._validate(crop)

    def _validate(self, crop: CropVolume) -> None:
        grid = crop.grid
        if self.only_a_look:
            grid = _middle(grid, self.window)
        plane = self._plane(crop, grid)
        challenge = None if self.challenge is None else self.challenge.begin(crop, grid)
        settings = self.config.inference
        for block, everything in predict_blocks(
            crop.read_image,
            grid,
            self.all_probabilities,
            channels=sum(self.channel_groups),
            window=self.window,
            overlap=settings.overlap,
            blending=settings.blending,
            batch_size=1 if settings.batch_size == "auto" else settings.batch_size,
            block_size=validation_block(self.config, grid, sum(self.channel_groups), self.window),
            context=settings.context,
            extent=crop.raw_extent.seen_from(crop.grid.index_range(grid.box)[0]),  # grid: a part of the crop's
            fit=WindowFit.of(self.config),
            device=str(self.device),
            inputs=[FurtherInput(crop.read_input, size, shape) for size, shape in inputs_of(self.config)],
        ):
            for slab in slabs(crop.read_label_codes(block), everything, self.classes):
                probability = slab.values[: len(self.classes)]
                self.counts.add(probability > _THRESHOLD, slab.label, slab.known)
                if plane is not None:
                    plane.fill(grid, slab.grid, (slab.label, slab.known, probability))
                if challenge is not None:
                    challenge.add(slab.grid, slab.values, slab.label, slab.known)
            if self.heads:
                self.head_scores.add(crop, block, everything[len(self.classes) :], self.device)
        if challenge is not None:
            challenge.finish()

    def _plane(self, crop: CropVolume, grid: VoxelGrid) -> Plane | None:
        """Return the crop's middle z plane for a picture, without labels and prediction yet; None for no picture."""
        if not self.config.logging.images or not self.trainer.is_global_zero or len(self.planes) >= _PLANES:
            return None
        middle = grid.crop((grid.shape[0] // 2, 0, 0), (1, *grid.shape[1:]))
        self.planes.append(Plane.empty(f"{crop.dataset}_{crop.name}", crop.read_image(middle)[0], len(self.classes)))
        return self.planes[-1]

    def on_validation_epoch_end(self) -> None:
        """Add the counts of all processes and log the scores."""
        scores = PooledCounts.scores(self.of_all_processes(self.counts.values))
        dice, iou = scores.mean(scores.dice), scores.mean(scores.iou)
        if dice is None:
            self._log_once(
                "no class is both known and present in the validation crops: val/dice is logged as 0; put crops with "
                "annotated classes on the validation side of the split"
            )
        elif not self.only_a_look:
            self._log_once(*self._classes_in_mean(scores))
        values = {"val/dice": dice or 0.0, "val/iou": iou or 0.0}
        for number, name in enumerate(self.classes):
            if not np.isnan(scores.dice[number]):
                values[f"val/{name}/dice"] = float(scores.dice[number])
                values[f"val/{name}/iou"] = float(scores.iou[number])
        if self.challenge is not None:
            values |= self._challenge_scores(self.challenge)
        if self.heads:
            values |= self.head_scores.scores(self.of_all_processes(self.head_scores.values))
        # all processes have the same numbers; sync_dist only tells Lightning so
        self.log_dict(values, sync_dist=True, batch_size=1)

    def _challenge_scores(self, challenge: ChallengeScore) -> dict[str, float]:
        values = challenge.scores(self.of_all_processes(challenge.values))
        missing = [name for name in self.classes if f"val/{name}/score" not in values]
        if missing:
            self._log_once(
                f"val/score leaves out {', '.join(missing)}: the validation crops have no ground truth for them (a "
                "class that the challenge scores as instances needs annotated ids)"
                + ("" if len(values) > 1 else "; it is logged as 0")
            )
        return values

    def _classes_in_mean(self, scores: Scores) -> tuple[str, int]:
        """Return a message about the classes that `val/dice` is a mean over, and its log level."""
        counted = [name for name, dice in zip(self.classes, scores.dice, strict=True) if not np.isnan(dice)]
        parts = []
        for reason, which in (("unknown everywhere", scores.known == 0), ("nowhere present", scores.known > 0)):
            names = [n for n, absent in zip(self.classes, which & np.isnan(scores.dice), strict=True) if absent]
            if names:
                parts.append(f"{', '.join(names)} ({reason})")
        message = f"val/dice is the mean over {len(counted)} of {len(self.classes)} classes: {', '.join(counted)}"
        if not parts:
            return message, logging.INFO
        return f"{message}; the validation crops have no ground truth for {'; '.join(parts)}", logging.WARNING

    def _log_once(self, message: str, level: int = logging.WARNING) -> None:
        if message not in self._logged and self.trainer.is_global_zero:
            self._logged.add(message)
            log.log(level, message)

    # -- checkpoints -------------------------------------------------------------------------------------------------
    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: str | Path,
        map_location: Any = None,
        *,
        config: RunConfig | None = None,
        cfg: RunConfig | None = None,
    ) -> ConnectomicsModule:
        """Return the module of a checkpoint or a package, in evaluation mode; see `load_module`.

        ``cfg`` is another name for ``config``; ``map_location`` is the device of the module, by default the CPU.
        """
        if config is not None and cfg is not None:
            raise InputError("expected config or cfg, which are the same; got both")
        module = load_module(checkpoint_path, config if config is not None else cfg)
        return module if map_location is None else module.to(map_location)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what `load_module` needs to rebuild the module from the file."""
        checkpoint[CHECKPOINT_KEY] = {
            "format": CHECKPOINT_FORMAT,
            "version": connectomics.__version__,
            "classes": list(self.classes),
            "voxel_size": list(self.config.voxel_size),  # nm, z y x
            "config": config_to_dict(self.config),
            "seen": self.of_all_processes(self.seen.values).cpu(),  # in the epoch so far, by all processes
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the counts of an unfinished epoch: the first process takes over those of all processes."""
        self.seen.reset()
        counted = checkpoint[CHECKPOINT_KEY].get("seen")  # absent in older checkpoints, which end an epoch
        if counted is not None and self.trainer.is_global_zero:
            self.seen.load(counted)


def _middle(grid: VoxelGrid, shape: Sequence[int]) -> VoxelGrid:
    """Return the middle part of a grid, of at most ``shape`` voxels."""
    size = [min(n, s) for n, s in zip(grid.shape, shape, strict=True)]
    return grid.crop([(n - s) // 2 for n, s in zip(grid.shape, size, strict=True)], size)
