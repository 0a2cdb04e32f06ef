"""Instances block by block from Zarr to Zarr: time, peak memory, and equality with the global result.

    python benchmarks/bench_instances.py [--shape 1024 1024 1024] [--tubes 5000] [--block 256] [--workers 1]
        [--fill-holes] [--no-whole] [--folder DIR]
    python benchmarks/bench_instances.py --memory

The volume of probabilities (uint8) holds coiled tubes that are longer than a block, noise below the threshold, and
specks that are too small; it is painted block by block. With ``--fill-holes`` every tube is hollow and
closed. Measured: seconds, Mvoxel/s and the peak of resident memory of the process that leads, in a process of its own
(and of the largest of its workers). Then the same with cc3d on the whole array in another process, and whether the
labels are equal, number by number (``--no-whole`` leaves that out; it takes 10 bytes a voxel).

``--memory``: the peak for 512^3 and for 1536 x 1024 x 1024 voxels with the same number of objects.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

CHUNK = 64
LENGTH = 260  # of a tube, voxels: more than a block
STEP = 2.0  # voxels between the balls that a tube is drawn of


def tubes(shape: tuple[int, int, int], number: int, rng: np.random.Generator) -> np.ndarray:
    """The balls (n, 4) that the tubes are drawn of: center z y x and radius, voxels.

    Each tube is a coil along z of `LENGTH` voxels in a cell of its own, so that none touch.
    """
    layers = max(1, shape[0] // (LENGTH + 16))
    wide = int((shape[1] * shape[2] * layers / number) ** 0.5)
    while (shape[1] // wide) * (shape[2] // wide) * layers < number:
        wide -= 1
    if wide < 21:
        raise SystemExit(f"{number} tubes do not fit into {shape}: cells are {wide} voxels wide, of 21 that they need")
    cells = list(np.ndindex(layers, shape[1] // wide, shape[2] // wide))[:number]
    t = np.arange(0.0, LENGTH, STEP)
    found = []
    for layer, row, column in cells:
        depth = shape[0] // layers
        angle = rng.uniform(0, 6.28) + t / rng.uniform(8, 20)
        z = layer * depth + rng.uniform(6, depth - LENGTH - 6) + t
        y, x = (row + 0.5) * wide + 4 * np.sin(angle), (column + 0.5) * wide + 4 * np.cos(angle)
        found.append(np.stack([z, y, x, np.full(len(t), rng.uniform(3.6, 5.0))], axis=1))
    return np.concatenate(found)


def write_volume(location: Path, shape: tuple[int, int, int], number: int, hollow: bool, seed: int = 0) -> None:
    """Probabilities of tubes and specks, drawn block by block."""
    from connectomics.geometry import VoxelGrid
    from connectomics.io.write import create_multiscale

    rng = np.random.default_rng(seed)
    balls = tubes(shape, number, rng)
    grid = VoxelGrid((8, 8, 8), (0, 0, 0), shape)
    about = {"artefact": "probability", "class_name": "mito", "complete": True}
    (writer,) = create_multiscale(location, [grid], np.uint8, attrs={"connectomics": about})
    for begin, block in grid.blocks((4 * CHUNK,) * 3):
        values = rng.integers(0, 100, block.shape, np.uint8)
        specks = rng.integers(0, values.size, values.size // 20_000)
        values.reshape(-1)[specks] = 255
        low, high = np.asarray(begin), np.asarray(begin) + block.shape
        near = balls[((balls[:, :3] + balls[:, 3:] >= low) & (balls[:, :3] - balls[:, 3:] < high)).all(axis=1)]
        # the outside of all tubes first, then what they are hollow by
        for shrink, value in ((0.0, 230), (1.8, 20)) if hollow else ((0.0, 230),):
            for *center, radius in near:
                _paint(values, low, np.asarray(center), radius - shrink, value)
        writer.write(begin, values)


def _paint(values: np.ndarray, low: np.ndarray, center: np.ndarray, radius: float, value: int) -> None:
    begin = np.maximum(np.ceil(center - radius).astype(int), low)
    end = np.minimum(np.floor(center + radius).astype(int) + 1, low + values.shape)
    if (begin >= end).any():
        return
    z, y, x = np.ogrid[tuple(slice(a, b) for a, b in zip(begin, end, strict=True))]
    inside = (z - center[0]) ** 2 + (y - center[1]) ** 2 + (x - center[2]) ** 2 < radius**2
    values[tuple(slice(a, b) for a, b in zip(begin - low, end - low, strict=True))][inside] = value


def measure(source: str, out: str, block: int, workers: int, fill_holes: bool) -> dict[str, Any]:
    """Decode in this process (one worker) or from it."""
    from connectomics.config.schema import EngineConfig
    from connectomics.decoding.blocks.labels_task import objects_of
    from connectomics.decoding.blocks.stitched_task import ComponentsTask
    from connectomics.tasks import run_task

    stages: dict[str, float] = {}

    def told(done: int, blocks: int, stage: str = "") -> None:
        stages[f"{stage} {'begins' if done == 0 else 'ends'}"] = time.perf_counter() - begin

    task = ComponentsTask(source, out, "mito", parameters(fill_holes), (block,) * 3)
    before, begin = memory("VmRSS"), time.perf_counter()
    run_task(task, EngineConfig(workers=workers), told)
    seconds = time.perf_counter() - begin
    child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return {
        "objects": objects_of(task),
        "seconds": seconds,
        "uniting": stages["write begins"] - stages["label ends"],
        "mb": memory("VmHWM") / 1024,
        "above": (memory("VmHWM") - before) / 1024,
        "worker mb": child / 1024,
    }


def parameters(fill_holes: bool) -> Any:
    """What is decoded: components of at least 1e6 nm^3 (1,954 voxels)."""
    from connectomics.decoding.parameters import DecodeParameters

    return DecodeParameters(method="cc3d", min_size_nm3=1e6, fill_holes=fill_holes)


def compare(source: str, out: str, fill_holes: bool) -> dict[str, Any]:
    """Whether the labels at ``out`` are those of the whole array, in type and number by number."""
    from connectomics.decoding.cellmap_postprocess import semantic_to_instance
    from connectomics.decoding.probabilities import above
    from connectomics.io.multiscale import Multiscale

    probability, labels = Multiscale.open(source), Multiscale.open(out)
    mask, chosen = np.zeros(probability.grid.shape, np.bool_), parameters(fill_holes)
    blocks = list(probability.grid.blocks((4 * CHUNK,) * 3))
    for begin, part in blocks:
        where = tuple(slice(b, b + n) for b, n in zip(begin, part.shape, strict=True))
        mask[where] = above(probability.read_level(0, begin, part.shape)[0], chosen.threshold)
    begin_s = time.perf_counter()
    least = chosen.min_voxels(probability.grid.voxel_size)
    whole = semantic_to_instance(mask, least, connectivity=chosen.connectivity, fill_holes=fill_holes)
    seconds = time.perf_counter() - begin_s
    same = labels.levels[0].dtype == whole.dtype
    for begin, part in blocks:
        where = tuple(slice(b, b + n) for b, n in zip(begin, part.shape, strict=True))
        same = same and np.array_equal(labels.read_level(0, begin, part.shape)[0], whole[where])
    return {"same": bool(same), "objects": int(whole.max()), "seconds": seconds, "mb": memory("VmHWM") / 1024}


def memory(key: str) -> int:
    """Resident memory now (``VmRSS``) or at its peak (``VmHWM``), kB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1])
    raise KeyError(key)


def run(folder: Path, shape: tuple[int, int, int], number: int, options: argparse.Namespace) -> dict[str, Any]:
    """Paint a volume if it is not there, decode it in a process of its own, and say what that took."""
    name = "x".join(map(str, shape))
    source = folder / f"in{name}" / "d.zarr" / "c" / "mito"
    out = folder / f"out{name}" / "d.zarr" / "c" / "mito"
    if not source.exists():
        write_volume(source, shape, number, options.fill_holes)
    row = _apart("measure", [source, out, options.block, options.workers, int(options.fill_holes)])
    return {**row, "rate": np.prod(shape) / row["seconds"] / 1e6, "source": str(source), "out": str(out)}


def _apart(what: str, arguments: list[Any]) -> dict[str, Any]:
    command = [sys.executable, __file__, f"--{what}", *map(str, arguments)]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=(1024, 1024, 1024), help="voxels, z y x")
    parser.add_argument("--tubes", type=int, default=5000)
    parser.add_argument("--block", type=int, default=256)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--fill-holes", action="store_true")
    parser.add_argument("--no-whole", action="store_true", help="only block by block")
    parser.add_argument("--memory", action="store_true", help="peaks for two volumes with the same number of objects")
    parser.add_argument("--folder", type=Path, default=None, help="for the volumes; by default a temporary one")
    parser.add_argument("--measure", nargs=5, help=argparse.SUPPRESS)
    parser.add_argument("--compare", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        source, out, block, workers, fill = options.measure
        print(json.dumps(measure(source, out, int(block), int(workers), bool(int(fill)))))
        return
    if options.compare:
        source, out, fill = options.compare
        print(json.dumps(compare(source, out, bool(int(fill)))))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        run(folder, (320, CHUNK, CHUNK), 3, options)  # compiles the kernels
        shapes = [(512, 512, 512), (1536, 1024, 1024)] if options.memory else [tuple(options.shape)]
        number = 500 if options.memory else options.tubes
        for shape in shapes:
            row = run(folder, shape, number, options)
            print(
                f"{'x'.join(map(str, shape))}: {row['objects']} objects, {row['seconds']:.1f} s "
                f"({row['rate']:.1f} Mvoxel/s), of that uniting {row['uniting']:.1f} s; peak {row['mb']:.0f} MB "
                f"({row['above']:.0f} above the start), largest worker {row['worker mb']:.0f} MB",
                flush=True,
            )
            if not options.no_whole and not options.memory:
                found = _apart("compare", [row["source"], row["out"], int(options.fill_holes)])
                print(
                    f"whole array: {found['objects']} objects, {found['seconds']:.1f} s in memory, peak "
                    f"{found['mb']:.0f} MB; labels are the same: {found['same']}"
                )


if __name__ == "__main__":
    main()
