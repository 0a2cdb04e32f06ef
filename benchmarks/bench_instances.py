"""Connected components block by block against cc3d on the whole array: time, peak memory, equality, in one run.

    python benchmarks/bench_instances.py [--size 512] [--balls 5000] [--block 256] [--no-whole] [--folder DIR]

A cube of probabilities holds overlapping balls of 4 to 12 voxels' radius, and specks that are too small. Both ways run
from Zarr to Zarr, each in a process of its own. The first one in blocks compiles the kernels, so a small one goes
before. Printed for both: seconds, Mvoxel/s, seconds of cc3d alone, the peak of resident memory above what the process
held before it began; and whether the labels are the same, number by number.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

CHUNK = 64


def write_balls(location: Path, size: int, balls: int, seed: int = 0) -> None:
    """Probabilities of balls and specks at random places, drawn layer by layer of chunks."""
    from connectomics.geometry import VoxelGrid
    from connectomics.io.write import create_multiscale

    rng = np.random.default_rng(seed)
    centers, radii = rng.uniform(0, size, (balls, 3)), rng.uniform(4, 12, balls)
    grid = VoxelGrid((8, 8, 8), (0, 0, 0), (size,) * 3)
    about = {"artefact": "probability", "class_name": "mito", "complete": True}
    (writer,) = create_multiscale(location, [grid], np.uint8, attrs={"connectomics": about})
    for start in range(0, size, CHUNK):
        layer = rng.integers(0, 100, (min(CHUNK, size - start), size, size), np.uint8)
        specks = rng.integers(0, layer.size, layer.size // 20_000)
        layer.reshape(-1)[specks] = 255
        for center, radius in zip(centers, radii, strict=True):
            low = np.maximum(np.ceil(center - radius).astype(int), (start, 0, 0))
            high = np.minimum(np.floor(center + radius).astype(int) + 1, (start + len(layer), size, size))
            if (low >= high).any():
                continue
            z, y, x = np.ogrid[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
            inside = (z - center[0]) ** 2 + (y - center[1]) ** 2 + (x - center[2]) ** 2 < radius**2
            layer[low[0] - start : high[0] - start, low[1] : high[1], low[2] : high[2]][inside] = 230
        writer.write((start, 0, 0), layer)


def measure(way: str, source: str, out: str, block: int) -> dict[str, Any]:
    """One of the two ways, in this process."""
    import cc3d

    from connectomics.decoding import cellmap_postprocess
    from connectomics.decoding.blocks import ComponentsTask
    from connectomics.decoding.blocks.labels_task import objects_of
    from connectomics.decoding.decode import decode_predictions
    from connectomics.decoding.parameters import DecodeParameters
    from connectomics.tasks import run_task

    spent = 0.0
    plain = cc3d.connected_components

    def timed(*arguments: Any, **options: Any) -> Any:
        nonlocal spent
        begin = time.perf_counter()
        found = plain(*arguments, **options)
        spent += time.perf_counter() - begin
        return found

    cc3d.connected_components = timed
    chosen = DecodeParameters(method="cc3d", min_size_nm3=1e4)
    cellmap_postprocess.components(np.ones((2, 2, 2), np.bool_), 26)
    before, begin = memory("VmRSS"), time.perf_counter()
    if way == "blocks":
        task = ComponentsTask(source, out, "mito", chosen, (block,) * 3)
        run_task(task)
        objects = objects_of(task)
    else:
        root = Path(source).parents[2]
        (done,) = decode_predictions(root, Path(out).parents[2], {"mito": chosen}, blockwise_above=1 << 62)
        objects = done.objects
    seconds = time.perf_counter() - begin
    return {"objects": objects, "seconds": seconds, "cc3d": spent, "mb": (memory("VmHWM") - before) / 1024}


def memory(key: str) -> int:
    """Resident memory now (``VmRSS``) or at its peak (``VmHWM``), kB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1])
    raise KeyError(key)


def same(one: str, other: str) -> bool:
    """Whether two label volumes are equal in type and in every voxel."""
    from connectomics.io.multiscale import Multiscale

    a, b = Multiscale.open(one), Multiscale.open(other)
    if a.levels[0].dtype != b.levels[0].dtype or a.grid != b.grid:
        return False
    return all(
        np.array_equal(a.read_level(0, begin, part.shape)[0], b.read_level(0, begin, part.shape)[0])
        for begin, part in a.grid.blocks((256, 256, 256))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=512, help="voxels along each axis")
    parser.add_argument("--balls", type=int, default=5000)
    parser.add_argument("--block", type=int, default=256)
    parser.add_argument("--no-whole", action="store_true", help="only block by block (1024 whole: about 12 GB)")
    parser.add_argument("--folder", type=Path, default=None, help="for the volumes; by default a temporary one")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(*options.measure, options.block)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found: dict[str, dict[str, Any]] = {}
        for size, balls in ((CHUNK, 10), (options.size, options.balls)):
            source = Path(folder, f"in{size}", "d.zarr", "c", "mito")
            write_balls(source, size, balls)
            for way in ("blocks",) if options.no_whole else ("blocks", "whole"):
                out = Path(folder, f"{way}{size}", "d.zarr", "c", "mito")
                command = [sys.executable, __file__, "--block", str(options.block), "--measure", way, source, out]
                found[way] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
                found[way]["out"] = str(out)
        for way, row in found.items():
            rate = options.size**3 / row["seconds"] / 1e6
            print(
                f"{way:7} {row['objects']} objects, {row['seconds']:.1f} s ({rate:.1f} Mvoxel/s; cc3d alone "
                f"{row['cc3d']:.1f} s), peak {row['mb']:.0f} MB"
            )
        if not options.no_whole:
            print("labels are the same:", same(found["blocks"]["out"], found["whole"]["out"]))


if __name__ == "__main__":
    main()
