"""Sliding-window prediction against MONAI's ``SlidingWindowInferer``: CPU seconds and peak memory, in one run.

    python benchmarks/bench_inference.py [--size 384] [--window 96] [--overlap 0.25] [--block 192] [--rounds 2]

Both run the same small network on the same windows over the same volume, each in a process of its own (so that the
peaks are its own), in turns. Printed: CPU seconds, the peak of resident memory above what the process held before the
prediction (the network's own activations are in both), their ratios, and the largest difference.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

CHANNELS = 3
METHODS = ("ours, one block", "ours, blocks", "monai", "network")


def small_network() -> Any:
    """Three channels out of two convolutions and a sigmoid, seeded."""
    import torch

    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv3d(1, 4, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv3d(4, CHANNELS, 3, padding=1),
        torch.nn.Sigmoid(),
    ).eval()


class PeakMemory:
    """Largest resident memory while it runs, sampled each 5 ms."""

    def __enter__(self) -> PeakMemory:
        import psutil

        self._process = psutil.Process()
        self.before = self.peak = self._process.memory_info().rss
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(0.005):
            self.peak = max(self.peak, self._process.memory_info().rss)

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def growth(self) -> int:
        """Bytes above the start."""
        return self.peak - self.before


def run_ours(volume: np.ndarray, options: argparse.Namespace, block: int, out: Path) -> None:
    """Block by block, each into a file of its own, as a writer would take them."""
    from connectomics.geometry import VoxelGrid
    from connectomics.inference.sliding import predict_blocks

    grid = VoxelGrid((8, 8, 8), (0, 0, 0), volume.shape)

    def read(target: VoxelGrid) -> np.ndarray:
        begin = np.round(grid.to_index(target.translation)).astype(int)
        return volume[tuple(slice(b, b + n) for b, n in zip(begin, target.shape, strict=True))]

    out.mkdir()
    for part, values in predict_blocks(
        read, grid, small_network(), channels=CHANNELS, window=options.window, overlap=options.overlap,
        block_size=block, context=0,
    ):  # fmt: skip
        begin = np.round(grid.to_index(part.translation)).astype(int)
        np.save(out / ("_".join(str(b) for b in begin) + ".npy"), values.astype(np.float16))


def largest_difference(blocks: Path, whole: Path) -> float:
    """Between our blocks and MONAI's array."""
    reference = np.load(whole)
    worst = 0.0
    for file in blocks.iterdir():
        values = np.load(file).astype(np.float32)
        begin = [int(b) for b in file.stem.split("_")]
        place = tuple(slice(b, b + n) for b, n in zip(begin, values.shape[1:], strict=True))
        worst = max(worst, float(np.abs(values - reference[(slice(None), *place)]).max()))
    return worst


def run_monai(volume: np.ndarray, options: argparse.Namespace, out: Path) -> None:
    """The whole array in memory, as MONAI does it."""
    import torch
    from monai.inferers import SlidingWindowInferer

    inferer = SlidingWindowInferer((options.window,) * 3, sw_batch_size=1, overlap=options.overlap, mode="gaussian")
    with torch.inference_mode():
        values = inferer(torch.from_numpy(volume)[None, None], small_network())[0].numpy()
    np.save(out, values)


def run_network(volume: np.ndarray, options: argparse.Namespace, out: Path) -> None:
    """Only the forward passes, as many as there are distinct windows: the lower bound."""
    import torch

    from connectomics.geometry import VoxelGrid
    from connectomics.inference.sliding import WindowLattice

    grid = VoxelGrid((8, 8, 8), (0, 0, 0), volume.shape)
    count = WindowLattice.over(grid, options.window, options.overlap, 0).count
    network = small_network()
    window = torch.from_numpy(np.ascontiguousarray(volume[(slice(0, options.window),) * 3]))[None, None]
    with torch.inference_mode():
        for _ in range(count):
            network(window)
    np.save(out, np.zeros(1))


def child(options: argparse.Namespace) -> None:
    """One method in this process; prints its numbers as JSON."""
    import monai.inferers  # noqa: F401 - imported before the baseline, in every child alike

    volume = np.random.default_rng(0).random((options.size,) * 3, dtype=np.float32)
    runs: dict[str, Callable[[], None]] = {
        "ours, one block": lambda: run_ours(volume, options, options.size, options.out),
        "ours, blocks": lambda: run_ours(volume, options, options.block, options.out),
        "monai": lambda: run_monai(volume, options, options.out),
        "network": lambda: run_network(volume, options, options.out),
    }
    with PeakMemory() as memory:
        begin, wall = time.process_time(), time.perf_counter()
        runs[options.method]()
        cpu, wall = time.process_time() - begin, time.perf_counter() - wall
    print(json.dumps({"cpu": cpu, "wall": wall, "memory": memory.growth}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=384, help="edge of the volume, voxels")
    parser.add_argument("--window", type=int, default=96, help="edge of a window, voxels")
    parser.add_argument("--overlap", type=float, default=0.25)
    parser.add_argument("--block", type=int, default=192, help="edge of a block, voxels")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--method", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.method:
        child(options)
        return
    numbers: dict[str, list[dict[str, float]]] = {m: [] for m in METHODS}
    for turn in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            files = {m: Path(folder) / f"{number}.npy" for number, m in enumerate(METHODS)}
            for method, file in files.items():
                command = [sys.executable, __file__, "--method", method, "--out", str(file)]
                for name in ("size", "window", "overlap", "block"):
                    command += [f"--{name}", str(getattr(options, name))]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                numbers[method].append(json.loads(done.stdout.splitlines()[-1]))
            if turn == 0:
                differences = [largest_difference(files[m], files["monai"]) for m in METHODS[:2]]
    print(
        f"{options.size}^3, window {options.window}, overlap {options.overlap}, blocks {options.block}, "
        f"{CHANNELS} channels, median of {options.rounds}"
    )
    reference = {k: median(n[k] for n in numbers["monai"]) for k in ("cpu", "memory")}
    for method in METHODS:
        cpu, memory = (median(n[k] for n in numbers[method]) for k in ("cpu", "memory"))
        print(
            f"{method:18s} {cpu:7.2f} CPU s ({cpu / reference['cpu']:.2f} of MONAI's)   "
            f"{memory / 1e6:7.0f} MB above the start ({memory / reference['memory']:.2f} of MONAI's)"
        )
    print(f"largest difference between ours and MONAI's (MONAI's float32, ours as float16): {max(differences):.1e}")


if __name__ == "__main__":
    main()
