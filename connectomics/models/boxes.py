"""Neighborhoods in nm as boxes of voxels, searched by max pooling on the device."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional

from connectomics.geometry import Index, index


def box_steps(length_nm: float, voxel_size: Sequence[float]) -> Index:
    """Return how many voxels (z, y, x) away a voxel may be to begin within ``length_nm`` of a voxel's center."""
    # a voxel s steps away begins s - 1/2 voxels from the center
    return index(math.floor(length_nm / side + 0.5 + 1e-6) for side in voxel_size)


def box_maximum(values: Tensor, steps: Index) -> Tensor:
    """Return the largest value within some steps along each axis (a box), of the same shape (N, C, D, H, W) float."""
    for axis, reach in enumerate(steps):
        if reach:
            kernel, pad = [1, 1, 1], [0, 0, 0]
            kernel[axis], pad[axis] = 2 * reach + 1, reach
            values = functional.max_pool3d(values, kernel, 1, pad)
    return values
