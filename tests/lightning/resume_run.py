"""A tiny run over a `PatchLoader` that writes down which patches it trains on."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from torch.utils.data import DataLoader

from connectomics.config import RunConfig
from connectomics.data.loader import PatchLoader
from connectomics.data.sampling import PatchSampler, SampledCrop
from tests.lightning.requested_patches import REGIONS, Requested, collate
from tests.lightning.synthetic_run import MadeUpData, tiny_config

BATCHES = 7  # an epoch; with 2 accumulated, optimizer steps follow batches 1, 3, 5 and 6


class RequestedData(MadeUpData):
    """As `MadeUpData`, with a sampler and workers."""

    def __init__(self, workers: int, hard: bool = False) -> None:
        super().__init__(crops=1)
        self._workers, self._hard = workers, hard

    def train_dataloader(self) -> DataLoader[Any]:
        sampler = PatchSampler(
            [SampledCrop("a", 1.0)], 2 * BATCHES + 1, classes=["mito"], seed=5,
            sampling={"hard": 1.0} if self._hard else None, regions=REGIONS,
        )  # fmt: skip
        return PatchLoader(
            Requested(),
            sampler,
            batch_size=2,
            collate=collate,
            workers=self._workers,
            start="spawn" if self._workers == 1 else "forkserver",
            persistent=self._workers > 1,
        )


class Diary(pl.Callback):
    """Writes each step's patches into a file, and ends the process, or sends it a signal, at a batch of an epoch."""

    def __init__(self, file: Path, die_at: tuple[int, int] | None, how: str) -> None:
        self.file, self.die_at, self.how = file, die_at, how

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) == self.die_at:
            if self.how == "raise":
                raise ArithmeticError("killed")
            os.kill(os.getpid(), signal.Signals[self.how])
        row = [trainer.global_step, trainer.current_epoch, batch_idx, batch["place"].tolist()]
        row += [batch["region"].tolist()] if "region" in batch else []
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")


def config_of(**changes: Any) -> RunConfig:
    settings = {
        "training__max_epochs": 3,
        "training__accumulate_grad_batches": 2,
        "checkpoint__every_n_steps": 3,
        "scheduler__name": "cosine",
        "logging__images": False,
        "logging__use_tensorboard": False,
    }
    return tiny_config(**(settings | changes))


def run(folder: Path, workers: int, die_at: tuple[int, int] | None = None, how: str = "raise", **changes: Any) -> None:
    """Train in ``folder``, from its last checkpoint where there is one."""
    from connectomics.lightning import trainer as trainer_module
    from connectomics.pipeline.train import train

    build = trainer_module.build_trainer
    diary = Diary(folder / "diary.txt", die_at, how)
    folder.mkdir(exist_ok=True)
    trainer_module.build_trainer = lambda *a, callbacks=(), **k: build(*a, **k, callbacks=[*callbacks, diary])
    last = folder / "checkpoints" / "last.ckpt"
    try:
        train(
            config_of(**changes),
            folder,
            checkpoint=last if last.is_file() else None,
            datamodule=RequestedData(workers, "hard" in config_of(**changes).data.sampling),
        )
    finally:
        trainer_module.build_trainer = build
