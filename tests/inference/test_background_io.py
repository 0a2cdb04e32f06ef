"""Reading ahead and writing behind: the same results, bounded, unchanged errors, no thread left."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from connectomics.errors import BlocksFailedError, CorruptDataError, WriteError
from connectomics.geometry import VoxelGrid
from connectomics.inference.background_io import ReadAhead, WriteBehind
from connectomics.inference.predict_task import PredictTask, run_predict_task
from connectomics.inference.raw import RawSource
from connectomics.inference.sliding import predict_blocks
from connectomics.io.mirror import Extent
from connectomics.io.multiscale import Multiscale
from connectomics.io.write import write_multiscale

GRID = VoxelGrid((8, 8, 8), (4, 4, 4), (24, 40, 72))
PARTS = [grid for _, grid in GRID.blocks((24, 40, 8))]


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def numbers_of(grid: VoxelGrid) -> np.ndarray:
    return np.full(grid.shape, grid.translation[2], np.float32)


def test_reads_ahead_no_further_than_allowed():
    began = threading.Semaphore(0)
    seen: list[VoxelGrid] = []

    def read(grid: VoxelGrid) -> np.ndarray:
        seen.append(grid)
        began.release()
        return numbers_of(grid)

    with ReadAhead(read, PARTS, most=2 * PARTS[0].size) as ahead:
        assert seen == [], "nothing before it is asked for"
        for number, part in enumerate(PARTS):
            np.testing.assert_array_equal(ahead(part), numbers_of(part))
            assert len(seen) <= number + 3
            if number == 0:
                for _ in range(3):
                    assert began.acquire(timeout=10), "two are read while the first is worked on"
    assert seen == PARTS


def test_an_error_of_reading_comes_with_the_grid_it_belongs_to():
    def read(grid: VoxelGrid) -> np.ndarray:
        if grid == PARTS[1]:
            raise CorruptDataError("the second")
        return numbers_of(grid)

    with ReadAhead(read, PARTS) as ahead:
        ahead(PARTS[0])
        with pytest.raises(CorruptDataError, match="the second"):
            ahead(PARTS[1])
        with pytest.raises(RuntimeError, match="another order than planned"):
            ahead(PARTS[7])


def test_writes_in_order_one_at_a_time_and_to_the_end():
    stored: list[int] = []
    with WriteBehind(stored.append) as behind:
        for number in range(5):
            behind.put(number)
            assert len(stored) >= number
    assert stored == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("last", [2, 3])
def test_an_error_of_writing_reaches_the_caller(last):
    """With the next block, or at the end where there is none."""
    stored: list[int] = []

    def write(number: int) -> None:
        if number == 2:
            raise WriteError("full")
        stored.append(number)

    def run() -> None:
        with WriteBehind(write) as behind:
            for number in range(last + 1):
                behind.put(number)

    with pytest.raises(WriteError, match="full"):
        run()
    assert stored == [0, 1]


def test_what_is_under_way_is_written_when_something_else_fails():
    stored: list[int] = []

    def run() -> None:
        with WriteBehind(stored.append) as behind:
            behind.put(1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert stored == [1]


def task_of(folder: Path) -> PredictTask:
    noise = np.random.default_rng(0).integers(0, 255, GRID.shape, dtype=np.uint8)
    write_multiscale(folder / "raw.zarr" / "em", noise, GRID, chunks=(16, 16, 16))
    return PredictTask(
        raw=str(folder / "raw.zarr" / "em"), output=str(folder / "out.zarr" / "crop1"), classes=("mito",),
        targets={"mito": GRID}, voxel_size=(8, 8, 8), window=(16, 16, 16), checkpoint="", block_size=(16, 16, 16),
        batch_size=3,
    )  # fmt: skip


def smooth(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.avg_pool3d(x, 3, 1, 1)


def test_equals_to_the_bit_the_same_without_threads(tmp_path):
    task = task_of(tmp_path)
    run_predict_task(task, smooth)
    stored, _ = Multiscale.open(f"{task.output}/mito").read_level(0, (0, 0, 0), GRID.shape)
    read = RawSource(task.raw, task.normalization).read
    extent = Extent.of(GRID, GRID)
    for block, values in predict_blocks(
        read,
        GRID,
        smooth,
        channels=1,
        window=16,
        block_size=task.layouts[0][0].block_shape,
        batch_size=3,
        extent=extent,
    ):
        at = tuple(slice(b, b + n) for b, n in zip(GRID.index_range(block.box)[0], block.shape, strict=True))
        np.testing.assert_array_equal(stored[at], np.rint(values[0] * np.float32(255)).astype(np.uint8))


def test_raw_that_cannot_be_decoded_is_named_and_the_rest_is_done(tmp_path):
    task = task_of(tmp_path)
    chunk = Path(task.raw) / "s0" / "0" / "1" / "4"
    good = chunk.read_bytes()
    chunk.write_bytes(b"no chunk")
    blocks = task.blocks("predict")
    with pytest.raises(BlocksFailedError, match=rf"of {blocks} blocks failed \(block .*0/1/4") as failed:
        run_predict_task(task, smooth)
    wrong = int(str(failed.value).split("predict: ")[1].split(" of")[0])
    assert 0 < wrong < blocks / 2
    done = (task.folder / ".done-predict").read_bytes()[-blocks:]
    assert done.count(1) == blocks - wrong
    chunk.write_bytes(good)
    run_predict_task(task, smooth)
    whole = replace(task, output=str(tmp_path / "whole.zarr" / "crop1"))
    run_predict_task(whole, smooth)
    stored = [Multiscale.open(f"{t.output}/mito").read_level(0, (0, 0, 0), GRID.shape)[0] for t in (task, whole)]
    np.testing.assert_array_equal(*stored)
