"""Patches of made-up volumes; in a module that imports little, because loader workers import it."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from connectomics.geometry import VoxelGrid

SIDE = 16
VOXEL = (8.0, 8.0, 8.0)


def world_image(grid: VoxelGrid) -> NDArray[np.float32]:
    """Blobs: a function of world position."""
    z, y, x = np.meshgrid(*grid.axes(), indexing="ij")
    waves = np.sin(z / 19) + np.sin(y / 23) + np.sin(x / 29)
    return (0.5 + waves / 6).astype(np.float32)


def world_label(grid: VoxelGrid) -> NDArray[np.float32]:
    """Class 0 is bright, class 1 dark."""
    image = world_image(grid)
    return np.stack([image > 0.6, image < 0.35]).astype(np.float32)


class Patches(Dataset[dict[str, torch.Tensor]]):
    """Patches at fixed places; class 1 is known in every second patch only, and nothing in those of ``unknown``.

    Labels travel packed: codes 0 to 3 are known voxels of neither class, of class 0, of class 1, of both, and 4 to 7
    the same where class 1 is unknown; 8 is unknown.
    """

    PRESENT = torch.tensor([[0, 1, 0, 1, 0, 1, 0, 1, 0], [0, 0, 1, 1, 0, 0, 0, 0, 0]]).bool()
    KNOWN = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0, 0, 0, 0]]).bool()

    def __init__(self, count: int, unknown: tuple[int, ...] = ()) -> None:
        self.count, self.unknown = count, unknown

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        grid = VoxelGrid(VOXEL, (index * 60.0, index * 35.0, index * 20.0), (SIDE,) * 3)
        label = world_label(grid)
        codes = (label[0] + 2 * label[1] + 4 * (index % 2)).astype(np.uint8)
        if index in self.unknown:
            codes[:] = 8
        return {
            "image": torch.from_numpy(world_image(grid)[None]),
            "codes": torch.from_numpy(codes),
            "present": self.PRESENT,
            "known_states": self.KNOWN,
            "seed": torch.tensor(index),
        }
