"""What a prediction can be asked for beside its classes: float16, a pyramid, a mask, batches found by trial."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from connectomics.errors import InputError, MissingError
from connectomics.geometry import VoxelGrid
from connectomics.inference.predict_task import PredictTask, run_predict_task
from connectomics.inference.predict_worker import best_batch
from connectomics.inference.raw import RawSource
from connectomics.io.artifacts import require_complete
from connectomics.io.levels import halve_raw
from connectomics.io.multiscale import Multiscale
from connectomics.io.write import write_multiscale

GRID = VoxelGrid((8, 8, 8), (4, 4, 4), (70, 90, 150))


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> str:
    location = tmp_path_factory.mktemp("raw") / "a.zarr" / "em"
    write_multiscale(location, np.random.default_rng(0).integers(1, 255, GRID.shape, dtype=np.uint8), GRID)
    return str(location)


def task_of(raw: str, folder: Path, **options: object) -> PredictTask:
    defaults: dict[str, object] = dict(
        raw=raw, output=str(folder / "a.zarr" / "crop1"), classes=("mito",), targets={"mito": GRID},
        voxel_size=(8, 8, 8), window=(32, 32, 32), checkpoint="abc", block_size=(64, 64, 64),
    )  # fmt: skip
    return PredictTask(**{**defaults, **options})  # type: ignore[arg-type]


def smooth(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.avg_pool3d(x, 3, 1, 1)


def level(task: PredictTask, number: int, name: str = "mito") -> np.ndarray:
    stored = Multiscale.open(f"{task.output}/{name}")
    values, inside = stored.read_level(number, (0, 0, 0), stored.levels[number].grid.shape)
    assert inside.all(), "every chunk is stored"
    return values


def test_float16_holds_the_probability_itself(raw: str, tmp_path: Path) -> None:
    fine = task_of(raw, tmp_path / "f", dtype="float16", uncertainty="entropy")
    coarse = task_of(raw, tmp_path / "u")
    for task in (fine, coarse):
        run_predict_task(task, smooth)
    assert level(fine, 0).dtype == np.float16
    assert np.abs(level(fine, 0) - level(coarse, 0) / 255).max() < 0.51 / 255 + 5e-4
    scales = [require_complete(f"{t.output}/mito")["scale"] for t in (fine, coarse)]
    assert scales == [1.0, 1 / 255]
    assert require_complete(f"{fine.output}/mito/uncertainty")["scale"] == 1.0


@pytest.mark.parametrize("dtype", ["uint8", "float16"])
def test_a_pyramid_is_the_mean_of_the_finest_level(raw: str, tmp_path: Path, dtype: str) -> None:
    task = task_of(raw, tmp_path, pyramid=True, dtype=dtype)
    run_predict_task(task, smooth)
    expected = level(task, 0)
    levels = Multiscale.open(f"{task.output}/mito").levels
    assert [entry.grid.shape for entry in levels] == [(70, 90, 150), (35, 45, 75), (18, 23, 38)]
    for number in (1, 2):
        expected = halve_raw(expected)
        np.testing.assert_array_equal(level(task, number), expected)
        assert levels[number].grid.box.begin == GRID.box.begin


def test_windows_outside_of_a_mask_are_neither_run_nor_read(
    raw: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the whole prediction where only windows inside are, and 0 where none are."""
    grid = VoxelGrid((16, 16, 16), (8, 8, 8), (35, 45, 75))
    inside = np.zeros(grid.shape, np.uint8)
    inside[:10, :10, :10] = 3
    write_multiscale(tmp_path / "mask.zarr" / "cell", inside, grid, kind="label")
    reads: list[VoxelGrid] = []
    original = RawSource.read
    monkeypatch.setattr(RawSource, "read", lambda self, part: (reads.append(part), original(self, part))[1])
    ran: list[int] = []

    def network(x: torch.Tensor) -> torch.Tensor:
        ran.append(len(x))
        return smooth(x)

    task = task_of(raw, tmp_path, mask=str(tmp_path / "mask.zarr" / "cell"), overlap=0.0, context=(0, 0, 0))
    run_predict_task(task, network)
    whole = task_of(raw, tmp_path / "whole", overlap=0.0, context=(0, 0, 0))
    masked, ran_masked = list(reads), sum(ran)
    run_predict_task(whole, network)
    # 10 mask voxels are 20 of the network's: the first window of 32 alone, along each axis
    assert ran_masked - 1 == 1
    assert all(part.box.end[0] <= 8 * 32 and part.box.end[1] <= 8 * 32 for part in masked)
    np.testing.assert_array_equal(level(task, 0)[:32, :32, :32], level(whole, 0)[:32, :32, :32])
    rest = level(task, 0)
    rest[:32, :32, :32] = 0
    assert not rest.any()
    with pytest.raises(MissingError, match="no multiscale volume"):
        task_of(raw, tmp_path / "b", mask=str(tmp_path / "none")).check()


def timed(rates: dict[int, float], memory: int = 10**9) -> Callable[[int], float]:
    def seconds(windows: int) -> float:
        if windows > memory:
            raise torch.OutOfMemoryError("no")
        return windows / rates.get(windows, 1.0)

    return seconds


def test_a_batch_is_doubled_as_long_as_that_pays() -> None:
    assert best_batch(timed({1: 1.0, 2: 1.8, 4: 1.82}), 64) == 2
    assert best_batch(timed({1: 1.0, 2: 2.0, 4: 4.0, 8: 8.0}), 4) == 4, "no more than allowed"
    assert best_batch(timed({2**n: 2.0**n for n in range(9)}, memory=20), 256) == 8, "half of what fits"
    with pytest.raises(InputError, match="single window does not fit"):
        best_batch(timed({}, memory=0), 4)


def test_an_automatic_batch_changes_nothing(raw: str, tmp_path: Path) -> None:
    tasks = [task_of(raw, tmp_path / str(batch), batch_size=batch) for batch in ("auto", 1)]
    for task in tasks:
        run_predict_task(task, smooth)
    np.testing.assert_array_equal(level(tasks[0], 0), level(tasks[1], 0))
    assert replace(tasks[0], output="", batch_size=1).key == replace(tasks[1], output="").key


def test_cost_says_about_what_is_read_and_written(raw: str, tmp_path: Path) -> None:
    task = task_of(raw, tmp_path, pyramid=True)
    cost = task.cost("predict")
    assert cost.written == 64**3
    assert 64**3 < cost.read <= 126**3
    assert cost.memory > max(plan.bytes for plan in task.plan())
    assert task.stages == ("predict", "pyramid-1")
    assert task.cost("pyramid-1").read == np.prod(GRID.shape)
