"""Callbacks of a run: pictures, the best checkpoint, the end of the loader's workers."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger

from connectomics.data.loader import PatchLoader
from connectomics.lightning.module import ConnectomicsModule
from connectomics.lightning.panels import panel


class EndWorkers(Callback):
    """Ends the loader's workers at once if training is interrupted; Lightning would wait for their reads."""

    def on_exception(self, trainer: pl.Trainer, *args: Any) -> None:
        """End the workers."""
        loader = trainer.train_dataloader
        if isinstance(loader, PatchLoader):
            loader.stop()


class PicturePanel(Callback):
    """Writes a picture of some validation crops to TensorBoard at each validation, see `panel`."""

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the planes that the module kept."""
        assert isinstance(pl_module, ConnectomicsModule)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                for plane in pl_module.planes:
                    name, picture = f"val/{plane.name}", panel(plane)
                    logger.experiment.add_image(name, picture, global_step=trainer.global_step, dataformats="HWC")
        pl_module.planes = []


class BestCheckpoint(Callback):
    """Keeps ``best.ckpt``, the checkpoint with the best score so far, next to the numbered checkpoints."""

    def __init__(self, scored: ModelCheckpoint) -> None:
        self.scored = scored
        self._linked = ""

    def on_train_epoch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Link the best checkpoint; those of the previous epoch are written."""
        self.link(trainer)

    def on_fit_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Link the best checkpoint; those of the last epoch are written."""
        self.link(trainer)

    def link(self, trainer: pl.Trainer) -> None:
        """Make ``best.ckpt`` a hard link to the best checkpoint, or a copy if the disk has no hard links."""
        best = Path(self.scored.best_model_path)
        if not trainer.is_global_zero or str(best) in (self._linked, ".") or not best.is_file():
            return
        target, temporary = best.with_name("best.ckpt"), best.with_name("best.ckpt.part")
        temporary.unlink(missing_ok=True)
        try:
            os.link(best, temporary)
        except OSError:
            shutil.copyfile(best, temporary)
        os.replace(temporary, target)
        self._linked = str(best)
