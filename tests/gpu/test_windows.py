"""Windows on a GPU: what goes in is copied while the network computes, what comes out while nothing waits for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from connectomics.geometry import VoxelGrid
from connectomics.inference.raw import FurtherInput
from connectomics.inference.sliding import predict_blocks


def raw(grid: VoxelGrid) -> NDArray[np.float32]:
    """Other values in each voxel of the world, from 0 to 1."""
    z, y, x = (axis / size for axis, size in zip(grid.axes(), grid.voxel_size, strict=True))
    return ((37 * z[:, None, None] + 17 * y[None, :, None] + 7 * x[None, None, :]) % 64 / 64).astype(np.float32)


def slow(image: Tensor, further: Tensor) -> Tensor:
    """Takes longer than the host needs for the next windows, then reads its input."""
    n = 2048 if image.is_cuda else 8
    busy = torch.zeros(n, n, device=image.device)
    for _ in range(20):
        busy = busy @ busy
    return 0.5 * image + 0.5 * further.mean(dim=(2, 3, 4), keepdim=True) + busy[0, 0]


@pytest.mark.parametrize("blending", ["crop", "gaussian"])
def test_windows_are_those_of_the_cpu(blending: str, device: str) -> None:
    grid = VoxelGrid((8.0, 8.0, 8.0), (0.0, 0.0, 0.0), (40, 44, 100))
    view = FurtherInput(raw, (16.0, 16.0, 16.0), (6, 6, 6))
    found = []
    for place in ("cpu", device):
        blocks = predict_blocks(
            raw, grid, slow, channels=1, window=16, overlap=0.25, blending=blending, batch_size=3, block_size=32,
            inputs=[view], device=place,
        )  # fmt: skip
        found.append([values for _, values in blocks])
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(other, one, atol=1e-5)
