"""Further views of a window's place at other voxel sizes, for networks that take them (``data.inputs``)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from connectomics.errors import InputError
from connectomics.geometry import Index, Triple, VoxelGrid


@dataclass(frozen=True)
class View:
    """How a further input of the network is read.

    Attributes:
        read: gives the network's input, float32 (d, h, w), for a grid anywhere; zeros where there is no raw.
        voxel_size: of the view, nm, z y x. shape: its voxels, z y x.
    """

    read: Callable[[VoxelGrid], NDArray[np.float32]]
    voxel_size: Triple
    shape: Index

    def around(self, window: VoxelGrid) -> NDArray[np.float32]:
        """The view with the same middle as ``window``, float32 (d, h, w)."""
        grid = VoxelGrid.centered(window.box.center, self.voxel_size, self.shape)
        values = self.read(grid)
        if values.shape != grid.shape:
            raise InputError(f"read must give an array of shape {grid.shape} for {grid}, found {values.shape}")
        return values
