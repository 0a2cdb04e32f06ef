"""Pre-training: the network of a run learns to reconstruct raw of which it sees a part."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor

from connectomics.config import RunConfig
from connectomics.config.few_labels import is_pretraining
from connectomics.io.write import write_file
from connectomics.lightning.module import ConnectomicsModule
from connectomics.lightning.panels import gray_panel
from connectomics.models.batch_labels import labels_of
from connectomics.models.hidden_voxels import blind_spots, hide_blocks

_RATIOS = {"masked": 0.6, "denoise": 0.02}
_PICTURES = 4  # rows of the panel, from different batches
PANEL = "reconstruction.png"  # in the run folder


class Reconstruction(NamedTuple):
    """What a network makes of a batch; tensors are (B, 1, D, H, W)."""

    loss: Tensor  # mean squared error of normalized raw over counted voxels
    seen: Tensor  # the network's input
    output: Tensor
    counted: Tensor  # bool: hidden from the network, raw is stored, and inside the region


class PretrainingModule(ConnectomicsModule):
    """Trains the network of a `connectomics.config.few_labels.pretraining_config` to reconstruct normalized raw.

    Logged: ``train/loss``, ``train/loss_step``, ``train/lr``; ``val/loss`` on held-out raw, where the same voxels are
    hidden each time. Each validation also writes a picture, a row per patch: raw, what the network sees, and its
    reconstruction (``objective=masked``: of hidden voxels, within raw).
    """

    def __init__(self, config: RunConfig) -> None:
        """Build the network; raises as `ConnectomicsModule`."""
        super().__init__(config)
        self.pictures: list[list[NDArray[np.float32]]] = []

    def reconstruct(self, batch: Mapping[str, Tensor]) -> Reconstruction:
        """Hide voxels of a centered batch (see `collate`), which depend on its ``seed`` only, and reconstruct them."""
        image, options = batch["image"], self.config.pretraining
        ratio = _RATIOS[options.objective] if options.ratio is None else options.ratio
        block = options.block_size
        if options.block_nm is not None:
            block = [max(1, round(n)) for n in np.divide(options.block_nm, self.config.dataset.voxel_size)]
        pairs = []
        for sample, seed in zip(image[:, 0], batch["seed"].tolist(), strict=True):
            generator = torch.Generator().manual_seed(seed)
            if options.objective == "denoise":
                pairs.append(blind_spots(sample, ratio, generator))
            else:
                pairs.append(hide_blocks(sample, ratio, block, generator))
        seen, hidden = (torch.stack(parts)[:, None] for parts in zip(*pairs, strict=True))
        counted = hidden & labels_of(batch).of(0)[1].view_as(hidden)
        output = self(seen)
        errors = (output.float() - image).square() * counted
        return Reconstruction(errors.sum() / counted.sum().clamp(min=1), seen, output, counted)

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        loss = self.reconstruct(batch).loss
        size = len(batch["image"])
        self.log("train/loss", loss.detach(), on_step=False, on_epoch=True, batch_size=size, sync_dist=True)
        self.log_step(loss.detach(), size)
        return loss

    def on_train_epoch_end(self) -> None:
        """Log nothing of classes."""

    def on_validation_epoch_start(self) -> None:
        """Start a new panel."""
        self.pictures = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Add a batch to ``val/loss``, each hidden voxel with the same weight."""
        found = self.reconstruct(batch)
        size = int(found.counted.sum())
        self.log("val/loss", found.loss, on_epoch=True, batch_size=max(1, size), sync_dist=True)
        if self.config.logging.images and len(self.pictures) < _PICTURES:
            middle = batch["image"].shape[2] // 2
            shown = found.output.float()
            if self.config.pretraining.objective == "masked":
                shown = torch.where(found.counted, shown, batch["image"])
            self.pictures.append([t[0, 0, middle].float().cpu().numpy() for t in (batch["image"], found.seen, shown)])

    def on_validation_epoch_end(self) -> None:
        """Write the panel to the run folder and to TensorBoard."""
        if not self.pictures or not self.trainer.is_global_zero or not self.trainer.loggers:
            return
        from PIL import Image

        picture = gray_panel(self.pictures)
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "PNG")
        write_file(Path(self.trainer.default_root_dir) / PANEL, file.getvalue())
        for logger in self.trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                step = self.trainer.global_step
                logger.experiment.add_image("val/reconstruction", picture, global_step=step, dataformats="HWC")


def module_of(config: RunConfig) -> ConnectomicsModule:
    """Return the module that trains a run."""
    return PretrainingModule(config) if is_pretraining(config) else ConnectomicsModule(config)
