"""Callbacks of a run: pictures, the best checkpoint, the end of the loader's workers."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger

from connectomics.data.loader import PatchLoader
from connectomics.errors import ConnectomicsError
from connectomics.io.replacing import link_or_copy
from connectomics.lightning.checkpoints import read_checkpoint
from connectomics.lightning.module import ConnectomicsModule
from connectomics.lightning.panels import panel

log = logging.getLogger(__name__)


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

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Continue with the scores of the checkpoints in this folder, which may have been moved.

        A ``best.ckpt`` that is not the best one of the epochs before the resumed state is removed: it is of epochs that
        are repeated, or of another run. Numbered checkpoints of these epochs are renamed.
        """
        state = self._state(checkpoint)
        if state is None:
            return
        folder, best = Path(str(self.scored.dirpath)), None
        file = folder / "best.ckpt"
        with contextlib.suppress(ConnectomicsError):
            best = self._state(read_checkpoint(file))
        known = best is not None and _best_of(best) == _best_of(state)
        if file.is_file() and not known and trainer.is_global_zero:
            log.warning("%s is of epochs after the resumed state, or of another run, and is removed", file)
            file.unlink()
        names = {Path(name).name for name in state["best_k_models"]}
        for file in sorted(folder.glob("epoch*.ckpt")) if trainer.is_global_zero else ():
            epoch = re.match(r"epoch(\d+)-", file.name)
            if epoch and int(epoch[1]) >= checkpoint["epoch"] and file.name not in names:
                aside = file.rename(f"{file}.discarded")
                log.warning("%s is of an epoch after the resumed state, and is renamed %s", file, aside.name)
        kept = {str(folder / Path(name).name): score for name, score in state["best_k_models"].items()}
        kept = {name: score for name, score in kept.items() if known or Path(name).is_file()}
        worst, first = (min, max) if self.scored.mode == "max" else (max, min)
        if kept:
            kth, top = worst(kept, key=kept.__getitem__), first(kept, key=kept.__getitem__)
            state = {**state, "kth_best_model_path": kth, "kth_value": kept[kth], "best_model_path": top}
        checkpoint["callbacks"][self.scored.state_key] = {
            **(state if kept else self.scored.state_dict()),
            "dirpath": self.scored.dirpath,
            "best_k_models": kept,
            "best_model_score": kept.get(state["best_model_path"]),
        }

    def _state(self, checkpoint: dict[str, Any]) -> dict[str, Any] | None:
        """Return what a checkpoint says of the best ones by the same score, whatever else was set."""
        states = [state for key, state in checkpoint["callbacks"].items() if key.startswith("ModelCheckpoint")]
        return next((state for state in states if state["monitor"] == self.scored.monitor), None)

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
        link_or_copy(str(best), str(temporary))
        os.replace(temporary, target)
        self._linked = str(best)


def _best_of(state: dict[str, Any]) -> tuple[str, float]:
    """Return the file name and score of the best checkpoint."""
    return Path(state["best_model_path"]).name, float(state["best_model_score"] or 0.0)
