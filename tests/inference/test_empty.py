"""Empty windows are left out: what is beside them does not change with it, what only they cover is 0."""

from __future__ import annotations

import numpy as np
import torch

from connectomics.geometry import VoxelGrid
from connectomics.inference.blending import Forward
from connectomics.inference.predict_task import PredictTask, run_predict_task
from connectomics.inference.sliding import predict_regions
from connectomics.inference.windows import WindowLattice, importance_map
from connectomics.io.multiscale import Multiscale
from connectomics.io.write import write_multiscale

GRID = VoxelGrid((8, 8, 8), (4, 4, 4), (20, 40, 72))


def half_empty() -> np.ndarray:
    """Noise, and one grey value from 30 voxels along x on."""
    values = np.random.default_rng(0).random(GRID.shape, dtype=np.float32)
    values[..., 30:] = 0.25
    return values


def blur(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.avg_pool3d(x, 3, 1, 1) * 0.5 + 0.4


def predicted(values: np.ndarray, skip: bool, batch: int = 1) -> tuple[np.ndarray, int]:
    """The whole grid, by blocks of 24 voxels along x, and the number of windows that were run."""
    ran: list[int] = []

    def network(x: torch.Tensor) -> torch.Tensor:
        ran.append(len(x))
        return blur(x)

    def read(grid: VoxelGrid) -> np.ndarray:
        begin = GRID.index_range(grid.box)[0]
        return values[tuple(slice(b, b + n) for b, n in zip(begin, grid.shape, strict=True))]

    regions = [(begin, block.shape) for begin, block in GRID.blocks((20, 40, 24))]
    lattice = WindowLattice.over(GRID, 16, 0.25, 0)
    blocks = predict_regions(read, lattice, Forward(network, 1, batch, "cpu", skip_empty=skip), regions)
    return np.concatenate([block[0] for block in blocks], 2), sum(ran)


def test_nothing_changes_where_nothing_is_empty():
    values = np.random.default_rng(0).random(GRID.shape, dtype=np.float32)
    for batch in (1, 3):
        with_it, ran = predicted(values, True, batch)
        without, all_of_them = predicted(values, False, batch)
        np.testing.assert_array_equal(with_it, without)
        assert ran == all_of_them


def test_the_mean_of_the_windows_that_ran_and_zero_without_any():
    """Against the definition, written out over the whole array."""
    values = half_empty()
    result, ran = predicted(values, True, 2)
    weights = importance_map((16, 16, 16)).numpy().astype(np.float64)
    total, weight, count = np.zeros(GRID.shape), np.zeros(GRID.shape), 0
    starts = WindowLattice.over(GRID, 16, 0.25, 0).starts
    for z in starts[0]:
        for y in starts[1]:
            for x in starts[2]:
                at = (slice(z, z + 16), slice(y, y + 16), slice(x, x + 16))
                window = values[at]
                if window.min() < window.max():
                    total[at] += weights * blur(torch.from_numpy(window.copy())[None, None])[0, 0].numpy()
                    weight[at] += weights
                    count += 1
    assert ran == count < np.prod([len(s) for s in starts])
    np.testing.assert_allclose(result, total / np.where(weight > 0, weight, 1), atol=1e-6)
    assert (result[..., 40:] == 0).all(), "covered by empty windows only"
    assert (result[..., :40] > 0.35).all(), "beside them nothing fades"


def test_a_task_leaves_out_padding_and_absent_chunks(tmp_path):
    raw = np.rint(half_empty() * 255).astype(np.uint8)
    write_multiscale(tmp_path / "raw.zarr" / "em", raw, GRID, chunks=(20, 40, 8))
    (tmp_path / "raw.zarr" / "em" / "s0" / "0" / "0" / "8").unlink()
    options = dict(
        raw=str(tmp_path / "raw.zarr" / "em"), classes=("mito",), targets={"mito": GRID}, voxel_size=(8, 8, 8),
        window=(16, 16, 8), checkpoint="", block_size=(16, 16, 16), context=(0, 0, 0), overlap=0.0,
        allow_missing_raw=True,
    )  # fmt: skip
    stored = []
    for skip in (False, True):
        task = PredictTask(output=str(tmp_path / f"{skip}.zarr" / "crop1"), skip_empty=skip, **options)
        run_predict_task(task, blur)
        stored.append(Multiscale.open(f"{task.output}/mito").read_level(0, (0, 0, 0), GRID.shape)[0])
    np.testing.assert_array_equal(stored[0][..., :32], stored[1][..., :32])
    assert (stored[0][..., 32:64] > 0).all()
    assert (stored[0][..., 64:] == 0).all(), "no raw"
    assert (stored[1][..., 32:] == 0).all()
