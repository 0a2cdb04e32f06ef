"""A run on made-up volumes, small enough to train in a second; also a script, for runs in several processes."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from connectomics.cellmap.label_codes import LabelCodes, LabelStates
from connectomics.config import RunConfig
from connectomics.geometry import VoxelGrid
from connectomics.io.mirror import Extent
from tests.lightning.made_up_patches import SIDE, VOXEL, Patches, world_image, world_label


def tiny_config(**changes: Any) -> RunConfig:
    """A run of a network with some thousand weights; ``changes`` are dotted keys with ``__`` for the dot."""
    config = RunConfig()
    config.system.accelerator = "cpu"
    config.system.num_cpus = 1
    config.dataset.classes = ["mito", "er"]
    config.model.architecture = "unet"
    config.model.options = {"channels": [4, 8], "strides": [2], "num_res_units": 1, "dropout": 0.1}
    config.data.patch_size = [SIDE] * 3
    config.optimizer.lr = 1e-2
    config.training.precision = "32"
    config.training.max_epochs = 2
    config.early_stopping.patience = 50
    config.logging.log_every_n_steps = 1
    config.inference.block_size = [12, 32, 32]
    for key, value in changes.items():
        group, name = key.split("__")
        assert hasattr(getattr(config, group), name), key
        setattr(getattr(config, group), name, value)
    return config


def label_codes(
    grid: VoxelGrid, label: NDArray[np.float32], known: NDArray[np.bool_], classes: Sequence[str] = ("mito", "er")
) -> LabelCodes:
    """Labels (C, d, h, w) as codes."""
    bits = np.concatenate([np.where(known, label > 0.5, False), known]).reshape(2 * len(classes), -1)
    rows, codes = np.unique(np.concatenate([np.zeros((len(bits), 1), bool), bits], 1), axis=1, return_inverse=True)
    weights = 2 ** np.arange(len(classes), dtype=np.uint64)
    present, seen = ((half.T * weights).sum(1, dtype=np.uint64)[:, None] for half in np.split(rows, 2))
    return LabelCodes(
        grid, codes.reshape(-1)[1:].reshape(grid.shape).astype(np.uint8), LabelStates(tuple(classes), present, seen)
    )


@dataclass(frozen=True)  # as the real one is, which Lightning would refuse to move to a device
class MadeUpCrop:
    """A crop whose class 1 is known in its first half only."""

    name: str
    grid: VoxelGrid
    dataset: str = "made_up"

    @property
    def raw_extent(self) -> Extent:
        return Extent((-(2**20),) * 3, (2**20,) * 3)

    def read_image(self, grid: VoxelGrid) -> NDArray[np.float32]:
        return world_image(grid)

    def read_labels(self, grid: VoxelGrid) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        label = world_label(grid)
        known = np.ones(label.shape, np.bool_)
        known[1] = grid.axes()[0][:, None, None] < self.grid.box.center[0]
        label[~known] = np.nan
        return label, known

    def read_label_codes(self, grid: VoxelGrid) -> LabelCodes:
        return label_codes(grid, *self.read_labels(grid))


class MadeUpData(pl.LightningDataModule):
    """Shuffled patches by torch's random state, and crops of odd sizes."""

    def __init__(self, patches: int = 8, crops: int = 2, batch_size: int = 2, unknown: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.patches, self.batch_size = Patches(patches, unknown), batch_size
        self.crops = [
            MadeUpCrop(f"crop{n}", VoxelGrid(VOXEL, (1000.0 + 300 * n, 40.0, 80.0), (20, 18, 21 + n)))
            for n in range(crops)
        ]

    def train_dataloader(self) -> DataLoader[Any]:
        rank, world = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        if world == 1:
            return DataLoader(self.patches, batch_size=self.batch_size, shuffle=True)
        mine = range(rank, len(self.patches), world)
        return DataLoader(torch.utils.data.Subset(self.patches, list(mine)), batch_size=self.batch_size)

    def val_dataloader(self) -> DataLoader[Any]:
        rank, world = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        share: list[MadeUpCrop | None] = list(self.crops[rank::world])
        share += [None] * (-(-len(self.crops) // world) - len(share))
        return DataLoader(share, batch_size=1, collate_fn=list)  # type: ignore[arg-type]


def main(folder: str, resume: str) -> None:
    """Two processes on the CPU: rank 1 sees patches of which nothing is known, and there is one crop for both."""
    from connectomics.pipeline.train import choose_run_dir, train

    config = tiny_config(
        system__cpu_processes=2, training__max_epochs=2 if resume == "no" else 3, training__ema=0.5,
        training__max_cpu_minutes=60.0, training__max_minutes=60.0,
    )  # fmt: skip
    config.output_dir = folder
    checkpoint = None if resume == "no" else resume
    run_dir = choose_run_dir(config, checkpoint)
    data = MadeUpData(patches=4, crops=1, batch_size=1, unknown=(1, 3))
    result = train(config, run_dir, checkpoint=checkpoint, datamodule=data)
    print(json.dumps({"run_dir": str(result.folder), "epochs": result.epochs, "score": result.best}))


if __name__ == "__main__":
    main(*sys.argv[1:])
