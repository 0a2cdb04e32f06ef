"""Further views of a window: of the same middle, whatever their voxel size, in files as in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from connectomics.errors import InputError
from connectomics.geometry import VoxelGrid
from connectomics.inference.blending import Forward
from connectomics.inference.predict_task import PredictTask, run_predict_task
from connectomics.inference.raw import FurtherInput
from connectomics.inference.sliding import predict_blocks
from connectomics.io.multiscale import Multiscale
from tests.cellmap.roots import grid_of, write_raw


def linear(grid: VoxelGrid) -> NDArray[np.float32]:
    """A linear function of world position: its mean over a box is its value in the middle."""
    z, y, x = grid.axes()
    values = 0.2 + 3e-4 * z[:, None, None] + 2e-4 * y[None, :, None] + 1e-4 * x[None, None, :]
    return values.astype(np.float32)


def mean_of_view(image: torch.Tensor, view: torch.Tensor) -> torch.Tensor:
    return view.mean(dim=(2, 3, 4), keepdim=True).expand(-1, 1, *image.shape[2:])


@pytest.mark.parametrize("ahead", [False, True])
def test_a_view_has_the_windows_middle(ahead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """``ahead``: what goes into the network is made while the network computes, as on a GPU."""
    if ahead:
        empty = torch.empty
        monkeypatch.setattr(Forward, "on_gpu", True)
        monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory=False, **more: empty(*shape, **more))
    grid = VoxelGrid((5.24, 4.0, 4.0), (100.0, 7.0, -3.0), (24, 16, 32))
    view = FurtherInput(linear, (16.0, 18.0, 20.0), (6, 5, 4))
    blocks = predict_blocks(
        linear, grid, mean_of_view, channels=1, window=8, overlap=0.0, blending="constant", context=0, batch_size=3,
        block_size=16, inputs=[view],
    )  # fmt: skip
    for block, values in blocks:
        for begin, part in block.blocks((8, 8, 8)):
            at = tuple(slice(b, b + 8) for b in begin)
            middle = linear(VoxelGrid.centered(part.box.center, (1.0, 1.0, 1.0), (1, 1, 1)))
            np.testing.assert_allclose(values[0][at], float(middle[0, 0, 0]), rtol=1e-5)


def test_what_a_view_reads_must_fit() -> None:
    view = FurtherInput(lambda grid: np.zeros((1, 1, 1), np.float32), (8.0,) * 3, (2, 2, 2))
    with pytest.raises(InputError, match="must give an array of shape"):
        list(predict_blocks(linear, grid_of((8, 8, 8)), mean_of_view, channels=1, window=8, inputs=[view]))


def test_a_task_with_views_says_so_and_reads_raw(tmp_path: Path) -> None:
    grid = grid_of((32, 32, 32))
    raw = np.rint(255 * linear(grid)).astype(np.uint8)
    location = write_raw(tmp_path, "set-a", raw, grid, levels=3)
    task = PredictTask(
        raw=str(location), output=str(tmp_path / "out.zarr/crop1"), classes=("mito",), targets={"mito": grid},
        voxel_size=(8.0,) * 3, window=(8, 8, 8), checkpoint="0", overlap=0.0, blending="constant", context=(0, 0, 0),
        inputs=(((16.0, 16.0, 16.0), (4, 4, 4)),),
    )  # fmt: skip
    assert PredictTask.from_dict(task.to_dict()) == task
    run_predict_task(task, mean_of_view)
    values = Multiscale.open(f"{task.output}/mito").read_level(0, (0, 0, 0), grid.shape)[0]
    for begin, part in grid.blocks((8, 8, 8)):
        middle = linear(VoxelGrid.centered(part.box.center, (1.0, 1.0, 1.0), (1, 1, 1)))
        at = tuple(slice(b, b + 8) for b in begin)
        np.testing.assert_allclose(values[at], 255 * float(middle[0, 0, 0]), atol=1.0)
