"""The made-up run with heads: objects are the bright blobs; also a script, for a run in two processes."""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from connectomics.config import RunConfig
from connectomics.config.schema import HeadConfig
from connectomics.geometry import VoxelGrid
from tests.lightning.synthetic_run import SIDE, VOXEL, MadeUpCrop, MadeUpData, Patches, tiny_config, world_label

KINDS = ("affinities", "boundary", "distance", "lsd")
OFFSETS = [[-8, 0, 0], [0, -8, 0], [0, 0, -8], [0, 0, 24]]


def head_config(*kinds: str, **changes: Any) -> RunConfig:
    """`tiny_config` with heads of ``kinds``."""
    config = tiny_config(**changes)
    scales = {"boundary": 8.0, "distance": 12.0, "lsd": 12.0}
    config.model.heads = [
        HeadConfig(kind, "mito", OFFSETS if kind == "affinities" else [], scales.get(kind)) for kind in kinds or KINDS
    ]
    return config


def world_ids(grid: VoxelGrid, within: VoxelGrid | None = None) -> NDArray[np.int32]:
    """(1, d, h, w): bright blobs, numbered from 1 in each grid; unknown outside of ``within``."""
    ids = ndimage.label(world_label(grid)[0])[0].astype(np.int32)[None]
    if within is not None:
        begin = np.rint(within.to_index(grid.translation)).astype(int)
        for axis, (b, n) in enumerate(zip(begin, within.shape, strict=True)):
            at = np.arange(ids.shape[1 + axis]) + b
            np.moveaxis(ids, 1 + axis, 0)[(at < 0) | (at >= n)] = -1
    return ids


class HeadPatches(Patches):
    """`Patches` with ids, -1 where nothing is known."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        grid = VoxelGrid(VOXEL, (index * 60.0, index * 35.0, index * 20.0), (SIDE,) * 3)
        ids = world_ids(grid)
        if index in self.unknown:
            ids[:] = -1
        return {**super().__getitem__(index), "ids": torch.from_numpy(ids)}


class HeadCrop(MadeUpCrop):
    """`MadeUpCrop` with objects."""

    def read_ids(self, grid: VoxelGrid) -> NDArray[np.int32]:
        return world_ids(grid, self.grid)


class HeadData(MadeUpData):
    """`MadeUpData` with objects."""

    def __init__(self, patches: int = 8, crops: int = 2, batch_size: int = 2, unknown: tuple[int, ...] = ()) -> None:
        super().__init__(patches, crops, batch_size, unknown)
        self.patches = HeadPatches(patches, unknown)
        self.crops = [HeadCrop(crop.name, crop.grid) for crop in self.crops]


def main(folder: str) -> None:
    """Two processes on the CPU: rank 1 sees patches of which nothing is known, and there is one crop for both."""
    from connectomics.pipeline.train import choose_run_dir, train

    config = head_config(system__cpu_processes=2)
    config.output_dir = folder
    run_dir = choose_run_dir(config)
    result = train(config, run_dir, datamodule=HeadData(patches=4, crops=1, batch_size=1, unknown=(1, 3)))
    print(json.dumps({"run_dir": str(result.folder), "epochs": result.epochs}))


if __name__ == "__main__":
    main(*sys.argv[1:])
