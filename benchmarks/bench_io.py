"""Speed of reading, resampling and writing. ``python benchmarks/bench_io.py [--repeat N] [--json FILE]``.

A 4 nm uint8 volume with texture, in 64^3 chunks, is written to a temporary folder; 128^3 patches are then read at
random fractional positions, one process, one decoding thread, a chunk cache of 64 MiB. Medians, milliseconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from connectomics.geometry import VoxelGrid
from connectomics.io import resample
from connectomics.io.location import StoreOptions
from connectomics.io.multiscale import Multiscale
from connectomics.io.write import write_multiscale

SIDE = 448
PATCH = (128, 128, 128)


def texture(side: int) -> np.ndarray:
    """Smoothed noise, uint8, (side,)*3: compresses about as badly as EM."""
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(0)
    smooth = gaussian_filter(rng.standard_normal((side,) * 3).astype(np.float32), 2)
    return np.clip(128 + 400 * smooth + 10 * rng.standard_normal((side,) * 3), 0, 255).astype(np.uint8)


def median_ms(work: Callable[[int], Any], repeat: int) -> float:
    """Median wall time of ``work(i)`` in ms; the first call (compilation) is not counted."""
    work(0)
    times = []
    for number in range(1, repeat + 1):
        start = time.perf_counter()
        work(number)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    data = texture(SIDE)
    grid = VoxelGrid((4.0, 4.0, 4.0), (0.0, 0.0, 0.0), data.shape)
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        write_multiscale(Path(folder) / "x.zarr" / "em", data, grid, levels=1)
        found["write 448^3 uint8 (90 MB), MB/s"] = data.nbytes / 1e6 / (time.perf_counter() - start)
        rng = np.random.default_rng(1)
        for cache, name in ((64 << 20, ""), (0, ", no cache")):
            volume = Multiscale.open(Path(folder) / "x.zarr" / "em", StoreOptions(cache_bytes=cache))
            for size, what in ((4.0, "same"), (2.0, "half"), (8.0, "double"), (5.24, "5.24 nm")):
                for snap in (True, False) if size == 4.0 else (False,):

                    def patch(size: float = size, snap: bool = snap) -> VoxelGrid:
                        low = rng.uniform(0, (SIDE - 2) * 4.0 - 128 * size, 3)
                        return VoxelGrid((size,) * 3, tuple(np.round(low / 4) * 4 if snap else low), PATCH)

                    where = " lattice" if snap else ""
                    label = f"read_raw 128^3 at {what}{where} voxel size{name}"
                    found[label] = median_ms(lambda _, v=volume, p=patch: v.read_raw(p()), args.repeat)
    block = data[:260, :260, :260]
    source = VoxelGrid((4.0,) * 3, (0.0,) * 3, block.shape)
    target = VoxelGrid((8.0,) * 3, (2.0,) * 3, PATCH)
    odd = VoxelGrid((6.28,) * 3, (2.0,) * 3, PATCH)
    mask = block > 128
    found["area_fraction of a mask, 256^3 to 128^3"] = median_ms(
        lambda _: resample.area_fraction(mask, source, target), args.repeat
    )
    found["area_fraction of a mask, 4 to 6.28 nm, 128^3"] = median_ms(
        lambda _: resample.area_fraction(mask, source, odd), args.repeat
    )
    found["nearest, 256^3 to 128^3"] = median_ms(lambda _: resample.nearest(block, source, target), args.repeat)
    for label, value in found.items():
        print(f"{value:9.1f}  {label}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
