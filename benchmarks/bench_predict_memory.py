"""Peak memory of a prediction from Zarr to Zarr, which must not grow with the volume.

    python benchmarks/bench_predict_memory.py [--shapes 512,512,512 1536,1024,1024] [--window 128] [--block 256]

Each volume (noise, uint8, chunks of 128^3; every chunk a file of its own, of a few different contents) is predicted by
a process of its own with a network of one layer and three classes. Printed: the peak of its memory above what the
imports took, how that compares with the first volume, and with what the task says beforehand (`PredictTask.cost`).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

CLASSES = ("a", "b", "c")
_CHUNK = 128
_SCRIPT = """
import json, resource, sys, time
import psutil, torch, numba
from connectomics.inference.predict_task import PredictTask, run_predict_task

weights = torch.linspace(0.5, 1, 3).reshape(1, 3, 1, 1, 1)
task = PredictTask.load(sys.argv[1])
baseline = psutil.Process().memory_info().rss
begin = time.perf_counter()
run_predict_task(task, lambda x: x * weights)
seconds = time.perf_counter() - begin
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"growth": peak - baseline, "baseline": baseline, "seconds": seconds}))
"""


def measure(folder: Path, shape: tuple[int, int, int], options: argparse.Namespace) -> dict[str, float]:
    """Bytes and seconds that a volume of ``shape`` takes."""
    from connectomics.geometry import VoxelGrid
    from connectomics.inference.predict_task import PredictTask
    from connectomics.io.write import create_multiscale

    grid = VoxelGrid((8, 8, 8), (4, 4, 4), shape)
    (writer,) = create_multiscale(folder / "raw.zarr" / "em", [grid], np.uint8, chunks=(_CHUNK,) * 3)
    noise = np.random.default_rng(0).integers(0, 255, (4, *(_CHUNK,) * 3), dtype=np.uint8)
    for number, (begin, block) in enumerate(grid.blocks((_CHUNK,) * 3)):
        writer.write(begin, noise[number % 4][tuple(slice(n) for n in block.shape)])
    task = PredictTask(
        raw=str(folder / "raw.zarr" / "em"), output=str(folder / "out.zarr" / "crop1"), classes=CLASSES,
        targets=dict.fromkeys(CLASSES, grid), voxel_size=(8, 8, 8), window=(options.window,) * 3, checkpoint="",
        block_size=(options.block,) * 3, pyramid=options.pyramid,
    )  # fmt: skip
    task.save(folder / "wanted.json")
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    command = [sys.executable, "-c", _SCRIPT, str(folder / "wanted.json")]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env)
    cost = task.cost("predict")
    return {**json.loads(done.stdout.splitlines()[-1]), "planned": cost.memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["512,512,512", "1536,1024,1024"], help="voxels, z,y,x")
    parser.add_argument("--window", type=int, default=128, help="edge of a window, voxels")
    parser.add_argument("--block", type=int, default=256, help="edge of a block, voxels")
    parser.add_argument("--pyramid", action="store_true", help="write coarser levels too")
    options = parser.parse_args()
    first = 0.0
    for text in options.shapes:
        z, y, x = (int(n) for n in text.split(","))
        with tempfile.TemporaryDirectory() as folder:
            found = measure(Path(folder), (z, y, x), options)
        first = first or found["growth"]
        print(
            f"{z}x{y}x{x}: {found['growth'] / 1e6:.0f} MB above {found['baseline'] / 1e6:.0f} MB of imports "
            f"({found['growth'] / first:.3f} of the first; {found['planned'] / 1e6:.0f} MB said beforehand), "
            f"{found['seconds']:.0f} s, {z * y * x / found['seconds'] / 1e6:.1f} Mvoxel/s",
            flush=True,
        )


if __name__ == "__main__":
    main()
