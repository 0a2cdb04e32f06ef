"""Memory is bounded by the block, not by the volume."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from connectomics.geometry import VoxelGrid
from connectomics.inference.predict_task import PredictTask
from connectomics.io.write import create_multiscale

_SCRIPT = """
import json, re, sys, threading, time
import psutil, torch, numba
from connectomics.inference.predict_task import PredictTask, run_predict_task

weights = torch.linspace(0.5, 1, 3).reshape(1, 3, 1, 1, 1)
baseline = psutil.Process().memory_info().rss
run_predict_task(PredictTask.load(sys.argv[1]), lambda x: x * weights)
# not ru_maxrss: it counts the parent
peak = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
print(json.dumps({"growth": peak - baseline, "baseline": baseline}))
"""


def growth(folder: Path, edge: int, **options) -> int:
    """Bytes that predicting edge^3 voxels with three classes takes above what the imports took."""
    grid = VoxelGrid((8, 8, 8), (4, 4, 4), (edge,) * 3)
    (writer,) = create_multiscale(folder / "raw.zarr" / "em", [grid], np.uint8, chunks=(128, 128, 128))
    noise = np.random.default_rng(0).integers(0, 255, (128, 128, 128), dtype=np.uint8)
    for begin, block in grid.blocks((128, 128, 128)):
        writer.write(begin, noise[: block.shape[0], : block.shape[1], : block.shape[2]])
    task = PredictTask(
        raw=str(folder / "raw.zarr" / "em"),
        output=str(folder / "out.zarr" / "crop1"),
        classes=("a", "b", "c"),
        targets=dict.fromkeys("abc", grid),
        voxel_size=(8, 8, 8),
        window=(128, 128, 128),
        checkpoint="",
        **options,
    )
    task.save(folder / "wanted.json")
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    command = [sys.executable, "-c", _SCRIPT, str(folder / "wanted.json")]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env)
    numbers = json.loads(done.stdout)
    print(f"{edge}^3: {numbers['growth'] / 1e6:.0f} MB above {numbers['baseline'] / 1e6:.0f} MB", task.plan()[0])
    return int(numbers["growth"])


@pytest.mark.slow
def test_a_crop_of_768_voxels_takes_less_than_two_gigabytes(tmp_path):
    assert growth(tmp_path, 768) < 2e9
