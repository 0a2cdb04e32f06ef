"""Instances from affinities: rate and memory in memory and block by block, and how far the two differ.

    python benchmarks/bench_affinities.py [--shape 256 256 256] [--block 192] [--noise 0.03] [--library] [--folder DIR]
    python benchmarks/bench_affinities.py --memory [--block 128] [--method mutex_watershed]

The volume holds balls that touch along flat faces (Voronoi cells of jittered points, cut off at 16 voxels), half of
it foreground. Its nine affinities (1, 3 and 9 voxels along each axis, uint8) are the true ones under noise: all vary by
up to 0.43, and each is on the wrong side of 0.5, by up to 0.16, with the probability ``--noise``. It is painted block
by block. For both methods: the whole
array in memory, then the task from Zarr to Zarr, each in a process of its own, and the difference of their labels from
each other and from the truth (variation of information in bits; share of neighbouring voxels that one has in one
object and the other in two). ``--library`` adds mwatershed on the same array (about 450 bytes a voxel).

``--memory``: peaks of the task for 512^3 and for 1536 x 1024 x 1024 voxels with about the same number of objects: balls
everywhere in and around one block that has neighbours on all sides, the same in both volumes, and `SCATTERED` others at
random, so that most blocks have something to do. Where no ball is near, the affinities are zero.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the test kit

Index = tuple[int, int, int]
OFFSETS = np.array([[reach * (axis == k) for axis in range(3)] for reach in (1, 3, 9) for k in range(3)])
SPACING, RADIUS = 32, 16  # voxels between the points, and of a ball
MARGIN = 9  # the longest offset
CHUNK = 64
SCATTERED = 300  # balls
METHODS = ("mutex_watershed", "agglomeration")


def truth(begin: Index, shape: Index, whole: Index, full: int | None = None) -> np.ndarray:
    """The instances (uint32) of a part of the volume; voxels outside the volume are background.

    With ``full``, only the balls around the second block (along each axis) of so many voxels, and `SCATTERED` others.
    """
    low = np.asarray(begin) // SPACING - 1
    high = (np.asarray(begin) + shape) // SPACING + 1
    nearest, ids = np.full(shape, np.float32(RADIUS**2)), np.zeros(shape, np.uint32)
    counts = np.asarray(whole) // SPACING + 6
    axes = [np.arange(b, b + n, dtype=np.float32) for b, n in zip(begin, shape, strict=True)]
    for cell in np.ndindex(*(high - low + 1)):
        place = low + cell
        if full is not None and not _kept(whole, full)[tuple(place + 2)]:
            continue
        jitter = np.random.default_rng([*(place + 10).tolist()]).uniform(-0.3, 0.3, 3)
        center = (place + 0.5 + jitter) * SPACING
        part = tuple(
            slice(max(0, int(c - RADIUS) - b), max(0, int(c + RADIUS) + 2 - b))
            for c, b in zip(center, begin, strict=True)
        )
        z, y, x = np.ix_(*(axis[p] - np.float32(c) for axis, p, c in zip(axes, part, center, strict=True)))
        distance = z * z + y * y + x * x
        closer = distance < nearest[part]
        nearest[part][closer] = distance[closer]
        ids[part][closer] = np.ravel_multi_index(tuple(place + 2), tuple(counts)) + 1
    for axis, (b, n, w) in enumerate(zip(begin, shape, whole, strict=True)):
        at = np.arange(b, b + n)
        ids[(slice(None),) * axis + ((at < 0) | (at >= w),)] = 0
    return ids


@lru_cache(maxsize=1)
def _kept(whole: Index, full: int) -> np.ndarray:
    """Whether there is a ball in a cell where there are few; the first entry stands for cell -2."""
    kept = np.random.default_rng(0).random(np.asarray(whole) // SPACING + 6) < SCATTERED * SPACING**3 / np.prod(whole)
    kept[(slice((full - 32) // SPACING + 2, (2 * full + 32) // SPACING + 2),) * 3] = True
    return kept


def write_volume(location: Path, shape: Index, noise: float, full: int | None = None) -> None:
    """The probabilities of the class and its affinities, block by block; ``full``: see `truth`."""
    from connectomics.geometry import VoxelGrid
    from connectomics.io.write import create_multiscale, ensure_group
    from tests.decoding.affinity_kit import affinities_of

    grid = VoxelGrid((8, 8, 8), (0, 0, 0), shape)
    about: dict[str, Any] = {"artefact": "probability", "class_name": "mito", "complete": True}
    (writer,) = create_multiscale(location, [grid], np.uint8, attrs={"connectomics": about})
    ensure_group(location / "affinities")
    channels = []
    for k, offset in enumerate(OFFSETS):
        ours = {**about, "artefact": "affinity", "offset": offset.tolist(), "offset_nm": (8.0 * offset).tolist()}
        place = location / "affinities" / str(k)
        channels.append(create_multiscale(place, [grid], np.uint8, attrs={"connectomics": ours})[0])
    for begin, block in grid.blocks((192 if full is None else CHUNK,) * 3):
        z, y, x = (b - MARGIN for b in begin)
        d, h, w = (n + 2 * MARGIN for n in block.shape)
        ids = truth((z, y, x), (d, h, w), shape, full)
        core = tuple(slice(MARGIN, MARGIN + n) for n in block.shape)
        rng = np.random.default_rng(list(begin))
        writer.write(begin, np.where(ids[core] > 0, 255, 0).astype(np.uint8))
        if full is not None and not ids.any():
            for channel in channels:
                channel.write(begin, np.zeros(block.shape, np.uint8))
            continue
        for k, channel in enumerate(channels):
            exact = affinities_of(ids, OFFSETS[k : k + 1])[0][core]
            wrong = rng.integers(0, 10_000, block.shape, np.uint16) < 10_000 * noise
            # 0 to 109 on the right side of 127.5; where it is wrong 0 to 39 on the other
            vary = np.where(wrong, 128 + rng.integers(0, 40, block.shape), rng.integers(0, 110, block.shape))
            channel.write(begin, np.where(exact > 0, 255 - vary, vary).astype(np.uint8))


def rule(method: str) -> dict[str, Any]:
    """The parameters that are measured: those that are the defaults, and objects of at least 200 voxels."""
    return {"method": method, "min_size_nm3": 200 * 512.0}


def whole(source: str, out: str, method: str) -> dict[str, Any]:
    """In memory; the labels go to a file."""
    from connectomics.decoding.decode import decode_class
    from connectomics.decoding.parameters import DecodeParameters
    from connectomics.decoding.prediction import StoredAffinities
    from connectomics.decoding.probabilities import above, open_probabilities, read_block

    tiny = np.ones((len(OFFSETS), 12, 12, 12), np.uint8)
    size, parameters = (8.0, 8.0, 8.0), DecodeParameters(**rule(method))
    decode_class(np.ones((12, 12, 12), np.bool_), size, parameters, affinities=(tiny, OFFSETS))  # compiles
    probability = open_probabilities(source)
    stored = StoredAffinities.open(probability)
    mask = above(read_block(probability, (0, 0, 0), probability.grid.shape), 0.5)
    values = stored.read((0, 0, 0), mask.shape)
    before, begin, cpu = memory("VmRSS"), time.perf_counter(), time.process_time()
    labels = decode_class(mask, size, parameters, affinities=(values, stored.offsets))
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    np.save(out, labels)
    return {
        "objects": int(labels.max()),
        "seconds": seconds,
        "cpu": cpu,
        "above": (memory("VmHWM") - before) / 1024,
        "foreground": float(mask.mean()),
    }


def library(source: str) -> dict[str, Any]:
    """mwatershed on the whole array: float64, no mask (the background repels by all its affinities)."""
    import mwatershed

    from connectomics.decoding.prediction import StoredAffinities
    from connectomics.decoding.probabilities import open_probabilities

    probability = open_probabilities(source)
    values = StoredAffinities.open(probability).read((0, 0, 0), probability.grid.shape) / 255 - 0.5
    before, begin = memory("VmRSS"), time.perf_counter()
    mwatershed.agglom(values, OFFSETS.tolist())
    return {"seconds": time.perf_counter() - begin, "above": (memory("VmHWM") - before) / 1024}


def blocks(source: str, out: str, method: str, block: int) -> dict[str, Any]:
    """The task, from Zarr to Zarr."""
    from connectomics.decoding.affinities.affinity_task import AffinitiesTask
    from connectomics.decoding.blocks.labels_task import objects_of
    from connectomics.decoding.parameters import DecodeParameters
    from connectomics.tasks import run_task

    stages: dict[str, float] = {}

    def told(done: int, number: int, stage: str = "") -> None:
        stages[f"{stage} {'begins' if done == 0 else 'ends'}"] = time.perf_counter() - begin

    task = AffinitiesTask(source, out, "mito", DecodeParameters(**rule(method)), (block,) * 3)
    before, begin, cpu = memory("VmRSS"), time.perf_counter(), time.process_time()
    run_task(task, None, told, overwrite=True)
    return {
        "objects": objects_of(task),
        "seconds": time.perf_counter() - begin,
        "cpu": time.process_time() - cpu,
        "uniting": stages["write begins"] - stages["label ends"],
        "mb": memory("VmHWM") / 1024,
        "above": (memory("VmHWM") - before) / 1024,
    }


def compare(labels: str, file: str) -> list[dict[str, float]]:
    """Blocks against the whole array, and both against the truth."""
    from dataclasses import asdict

    from connectomics.io.multiscale import Multiscale
    from tests.decoding.affinity_kit import difference

    volume, one = Multiscale.open(labels), np.load(file)
    found = volume.read_level(0, (0, 0, 0), volume.grid.shape)[0]
    true = truth((0, 0, 0), one.shape, one.shape)
    return [asdict(difference(a, b)) for a, b in ((found, one), (found, true), (one, true))]


def memory(key: str) -> int:
    """Resident memory now (``VmRSS``) or at its peak (``VmHWM``), kB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1])
    raise KeyError(key)


def _apart(what: str, *arguments: object) -> Any:
    command = [sys.executable, __file__, "--run", what, *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def _paint(folder: Path, shape: Index, noise: float, full: int | None = None) -> Path:
    place = folder / "x".join(map(str, shape)) / "d.zarr" / "c" / "mito"
    if not place.exists():
        write_volume(place, shape, noise, full)
    return place


def _show_difference(text: str, found: dict[str, float]) -> None:
    print(
        f"  {text}: VOI split {found['voi_split']:.5f}, merge {found['voi_merge']:.5f} bits; differing faces "
        f"{found['faces']:.2e}; {found['objects']} against {found['reference']} objects",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=(256, 256, 256), help="voxels, z y x")
    parser.add_argument("--block", type=int, default=None, help="voxels along an edge; 192, with --memory 128")
    parser.add_argument("--method", choices=METHODS, nargs="+", default=METHODS)
    parser.add_argument("--noise", type=float, default=0.03, help="share of affinities that are wrong")
    parser.add_argument("--library", action="store_true", help="mwatershed beside it")
    parser.add_argument("--memory", action="store_true", help="peaks for two volumes")
    parser.add_argument("--folder", type=Path, default=None, help="for the volumes; by default a temporary one")
    parser.add_argument("--run", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        what, *arguments = options.run
        if what == "blocks":
            arguments[-1] = int(arguments[-1])
        print(json.dumps({"whole": whole, "library": library, "blocks": blocks, "compare": compare}[what](*arguments)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        shapes: list[Index] = [(512, 512, 512), (1536, 1024, 1024)] if options.memory else [tuple(options.shape)]
        block = options.block or (128 if options.memory else 192)
        full = block if options.memory else None
        tiny = _paint(folder, (48, 48, 48), options.noise)
        for method in options.method:
            _apart("blocks", tiny, folder / "tiny" / "d.zarr" / "c" / "mito", method, 32)  # compiles
        for shape in shapes:
            source, voxels = _paint(folder, shape, options.noise, full), np.prod(shape) / 1e6
            print("x".join(map(str, shape)), flush=True)
            for method in options.method:
                out, file = folder / "out" / "d.zarr" / "c" / "mito", folder / "whole.npy"
                row = _apart("blocks", source, out, method, block)
                print(
                    f"  {method}, blocks of {block}: {row['objects']} objects, {row['seconds']:.1f} s, "
                    f"{row['cpu']:.1f} s of CPU "
                    f"({voxels / row['seconds']:.2f} Mvoxel/s), of that uniting {row['uniting']:.1f} s; peak "
                    f"{row['mb']:.0f} MB ({row['above']:.0f} above the start)",
                    flush=True,
                )
                if options.memory:
                    continue
                row = _apart("whole", source, file, method)
                print(
                    f"  {method}, in memory: {row['objects']} objects, {row['seconds']:.1f} s, "
                    f"{row['cpu']:.1f} s of CPU "
                    f"({voxels / row['seconds']:.2f} Mvoxel/s, {row['foreground']:.0%} of them foreground), "
                    f"{row['above']:.0f} MB beside its input",
                    flush=True,
                )
                results = _apart("compare", out, file)
                for text, found in zip(("blocks - memory", "blocks - truth", "memory - truth"), results, strict=True):
                    _show_difference(text, found)
            if options.library and not options.memory:
                row = _apart("library", source)
                print(f"  mwatershed: {row['seconds']:.1f} s, {row['above']:.0f} MB beside its input", flush=True)


if __name__ == "__main__":
    main()
