"""Peak memory and time of `pytc measure` (and of a mesh of each object) on volumes of two sizes, in one run.

    python benchmarks/bench_measure.py [--shapes 512,512,512 1536,1024,1024] [--balls 1000] [--contact-nm 30]
                                       [--no-mesh] [--folder DIR]

Each volume holds the same number of balls of 8 to 16 voxels' radius (8 nm), their ids as uint32, and a second class of
half as many other balls. Every measurement runs in a process of its own, the command as a user gives it; the first one
compiles the kernels, so a small one goes before. Printed: seconds, Mvoxel/s and the peak of resident memory above what
the process held when the labels had been found (imports and all).
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

CHUNK = 64
SMALL = (CHUNK, CHUNK, CHUNK)


def write_balls(location: Path, name: str, shape: tuple[int, int, int], balls: int, seed: int) -> None:
    """Labels of balls at random places, drawn layer by layer of chunks; later ones cover earlier ones."""
    from connectomics.geometry import VoxelGrid
    from connectomics.io.write import create_multiscale

    rng = np.random.default_rng(seed)
    centers, radii = rng.uniform(0, shape, (balls, 3)), rng.uniform(8, 16, balls)
    about = {"artefact": "labels", "class_name": name, "kind": "instance", "complete": True}
    grid = VoxelGrid((8, 8, 8), (0, 0, 0), shape)
    (writer,) = create_multiscale(location / name, [grid], np.uint32, attrs={"connectomics": about})
    for start in range(0, shape[0], CHUNK):
        layer = np.zeros((min(CHUNK, shape[0] - start), *shape[1:]), np.uint32)
        for number, (center, radius) in enumerate(zip(centers, radii, strict=True), start=1):
            low = np.maximum(np.ceil(center - radius).astype(int), (start, 0, 0))
            high = np.minimum(np.floor(center + radius).astype(int) + 1, (start + len(layer), *shape[1:]))
            if (low >= high).any():
                continue
            z, y, x = np.ogrid[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
            inside = (z - center[0]) ** 2 + (y - center[1]) ** 2 + (x - center[2]) ** 2 < radius**2
            layer[low[0] - start : high[0] - start, low[1] : high[1], low[2] : high[2]][inside] = number
        writer.write((start, 0, 0), layer)


def measure(way: str, labels: str, out: str, nm: float) -> dict[str, Any]:
    """One of the ways (instances, contacts, meshes), in this process."""
    from connectomics.morphology import ContactSpec
    from connectomics.pipeline.measure import measure_tasks
    from connectomics.pipeline.mesh import mesh_labels, mesh_tasks
    from connectomics.tasks import run_task

    tasks = measure_tasks(labels, out, classes=["mito"], contacts=[ContactSpec("mito", "er", nm)])
    before, begin = memory("VmRSS"), time.perf_counter()
    if way == "meshes":
        (done,) = mesh_labels(mesh_tasks(labels, out, "mito"))
        rows = done.number
    else:
        task = tasks[0 if way == "instances" else 1]
        run_task(task)
        rows = json.loads(task.summary_file.read_text())["instances"]
    seconds = time.perf_counter() - begin
    return {"rows": rows, "seconds": seconds, "mb": (memory("VmHWM") - before) / 1024, "whole": memory("VmHWM") / 1024}


def memory(key: str) -> int:
    """Resident memory now (``VmRSS``) or at its peak (``VmHWM``), kB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1])
    raise KeyError(key)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["512,512,512", "1536,1024,1024"], help="voxels, z,y,x")
    parser.add_argument("--balls", type=int, default=1000)
    parser.add_argument("--contact-nm", type=float, default=30.0)
    parser.add_argument("--no-mesh", action="store_true")
    parser.add_argument("--folder", type=Path, default=None, help="for the volumes; by default a temporary one")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(*options.measure, options.contact_nm)))
        return
    ways = ["instances", "contacts", *([] if options.no_mesh else ["meshes"])]
    shapes = [SMALL, *(tuple(int(n) for n in text.split(",")) for text in options.shapes)]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for shape in shapes:
            labels = Path(folder, "labels")
            crop = labels / "d.zarr" / "crop1"
            balls = 10 if shape == SMALL else options.balls
            write_balls(crop, "mito", shape, balls, 0)
            write_balls(crop, "er", shape, balls // 2, 1)
            for way in ways:
                command = [sys.executable, __file__, "--contact-nm", str(options.contact_nm)]
                command += ["--measure", way, str(labels), str(Path(folder, "out", way))]
                found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
                rate = np.prod(shape) / found["seconds"] / 1e6
                print(
                    f"{'x'.join(map(str, shape)):16} {way:10} {found['rows']} objects, {found['seconds']:.1f} s "
                    f"({rate:.1f} Mvoxel/s), peak {found['mb']:.0f} MB above {found['whole'] - found['mb']:.0f} MB",
                    flush=True,
                )
            shutil.rmtree(labels)
            shutil.rmtree(Path(folder, "out"))


if __name__ == "__main__":
    main()
