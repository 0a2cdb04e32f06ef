"""The watershed: against edt and scikit-image on the same objects, and block by block against the whole array.

    python benchmarks/bench_watershed.py [--shape 256 256 256] [--balls 600] [--block 192] [--no-whole]
        [--boundary] [--folder DIR]

Overlapping balls of 4 to 12 voxels' radius. In memory: distances, seeds and flood of `split`, and edt, the peaks and
skimage.segmentation.watershed of every component in its box, one after the other in one process; for both the variation
of information against the ball whose surface is nearest. From Zarr to Zarr: blocks and whole, each in a process of its
own: seconds, Mvoxel/s, peak of resident memory above what the process held before; and whether the labels are the same.

``--boundary``: cut by a boundary class in place of distances (from Zarr to Zarr only): a shell of three voxels at the
surface of each ball, in noise below the threshold, so that the walls over which the cores grow are rough.
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
from numpy.typing import NDArray

REACH = 5.0  # voxels
BOUNDARY = "mito_mem"


def write_balls(location: Path, shape: tuple[int, int, int], balls: int, layer: int = 64) -> None:
    """Probabilities of balls at random places, and of their boundaries beside them, layer by layer."""
    from connectomics.geometry import VoxelGrid
    from connectomics.io.write import create_multiscale

    random = np.random.default_rng(0)
    centers, radii = random.uniform(0, shape, (balls, 3)), random.uniform(4, 12, balls)
    grid = VoxelGrid((8, 8, 8), (0, 0, 0), shape)
    writers = []
    for name in (location.name, BOUNDARY):
        about = {"artefact": "probability", "class_name": name, "complete": True}
        place = location.with_name(name)
        writers += create_multiscale(place, [grid], np.dtype(np.uint8), attrs={"connectomics": about})
    for start in range(0, shape[0], layer):
        values = np.zeros((min(layer, shape[0] - start), *shape[1:]), np.uint8)
        borders = random.integers(0, 100, values.shape, np.uint8)
        offset = np.asarray((start, 0, 0))
        for center, radius in zip(centers - offset, radii, strict=True):
            low = np.maximum(np.ceil(center - radius).astype(int), 0)
            high = np.minimum(np.floor(center + radius).astype(int) + 1, values.shape)
            if (low < high).all():
                box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
                z, y, x = np.ogrid[box]
                squared = (z - center[0]) ** 2 + (y - center[1]) ** 2 + (x - center[2]) ** 2
                values[box][squared < radius**2] = 230
                borders[box][(squared < radius**2) & (squared >= (radius - 3) ** 2)] = 230
        for writer, array in zip(writers, (values, borders), strict=True):
            writer.write((start, 0, 0), array)


def memory(key: str) -> int:
    """Resident memory now (``VmRSS``) or at its peak (``VmHWM``), kB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1])
    raise KeyError(key)


def same(one: Path, other: Path) -> bool:
    """Whether two label volumes are equal in type and in every voxel."""
    from connectomics.io.multiscale import Multiscale

    a, b = Multiscale.open(str(one)), Multiscale.open(str(other))
    parts = list(a.grid.blocks((256, 256, 256)))
    return a.levels[0].dtype == b.levels[0].dtype and all(
        np.array_equal(a.read_level(0, begin, part.shape)[0], b.read_level(0, begin, part.shape)[0])
        for begin, part in parts
    )


def boxes_of_skimage(mask: NDArray[np.bool_]) -> NDArray[np.int32]:
    """edt, box maxima and scikit-image's watershed, component by component."""
    import cc3d
    import edt
    from scipy import ndimage
    from skimage.segmentation import watershed

    labels = cc3d.connected_components(mask, connectivity=26)
    out, total = np.zeros(mask.shape, np.int32), 0
    for number, box in enumerate(cc3d.statistics(labels)["bounding_boxes"][1:], start=1):
        grown = tuple(slice(max(0, s.start - 1), s.stop + 1) for s in box)
        inside = labels[grown] == number
        depth = edt.edt(inside, black_border=False, parallel=1)
        highest = ndimage.maximum_filter(depth, 2 * int(REACH) + 1, mode="constant")
        peaks, n = ndimage.label(inside & (depth == highest), np.ones((3, 3, 3)))
        found = watershed(-depth, peaks, mask=inside, connectivity=3)
        out[grown][inside] = found[inside] + total
        total += n
    return out


def in_memory(shape: tuple[int, int, int], balls: int) -> None:
    from skimage.metrics import variation_of_information

    from connectomics.decoding.watershed.forest import split

    random = np.random.default_rng(0)
    truth, nearest = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    for number in range(1, balls + 1):
        center, radius = random.uniform(0, shape, 3), random.uniform(4, 12)
        low = np.maximum(np.ceil(center - radius).astype(int), 0)
        high = np.minimum(np.floor(center + radius).astype(int) + 1, shape)
        box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        z, y, x = np.ogrid[box]
        inner = (radius**2 - (z - center[0]) ** 2 - (y - center[1]) ** 2 - (x - center[2]) ** 2).astype(np.float32)
        better = inner > nearest[box]
        truth[box][better], nearest[box][better] = number, inner[better]
    mask = truth > 0
    split(mask[:16], 26, (1, 1, 1), REACH)  # compiles
    begin = time.perf_counter()
    ours = split(mask, 26, (1, 1, 1), REACH)
    middle = time.perf_counter()
    theirs = boxes_of_skimage(mask)
    end = time.perf_counter()
    for name, seconds, found in (("split", middle - begin, ours), ("skimage", end - middle, theirs)):
        merged = variation_of_information(truth[mask], found[mask].astype(np.int64))
        print(f"{name:8} {seconds:.2f} s, {found.max()} objects, VOI split {merged[1]:.4f} merge {merged[0]:.4f}")
    print(f"{balls} balls, foreground {mask.mean():.3f}; ratio of times {(end - middle) / (middle - begin):.2f}")


def measure(way: str, source: str, out: str, block: int, boundary: bool) -> dict[str, Any]:
    """One of the two ways from Zarr to Zarr, in this process."""
    from connectomics.decoding.blocks.stitched_task import ComponentsTask
    from connectomics.decoding.parameters import DecodeParameters
    from connectomics.decoding.watershed.forest import split
    from connectomics.decoding.watershed.watershed_task import WatershedTask
    from connectomics.pipeline.decode import decode_jobs, do_jobs
    from connectomics.tasks import run_task

    chosen, kind = DecodeParameters(method="watershed", min_size_nm3=1e4, min_distance_nm=8 * REACH), WatershedTask
    if boundary:
        chosen, kind = DecodeParameters(method="cc3d", min_size_nm3=1e4, boundary=BOUNDARY), ComponentsTask
    split(np.ones((4, 4, 4), np.bool_), 26, (1, 1, 1), REACH)
    before, begin = memory("VmRSS"), time.perf_counter()
    if way == "blocks":
        run_task(kind(source, out, "mito", chosen, (block,) * 3))
    else:
        root = Path(source).parents[2]
        labels = Path(out).parents[2]
        do_jobs(decode_jobs(root, labels, {"mito": chosen}, classes=["mito"], blockwise_above=1 << 62))
    return {"seconds": time.perf_counter() - begin, "mb": (memory("VmHWM") - before) / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=(256, 256, 256), help="voxels, z y x")
    parser.add_argument("--balls", type=int, default=600)
    parser.add_argument("--block", type=int, default=192)
    parser.add_argument("--boundary", action="store_true", help="cut by a boundary class")
    parser.add_argument("--no-whole", action="store_true", help="only block by block")
    parser.add_argument("--folder", type=Path, default=None, help="for the volumes; by default a temporary one")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(*options.measure, options.block, options.boundary)))
        return
    z, y, x = options.shape
    shape = (z, y, x)
    if not options.no_whole and not options.boundary:
        in_memory(shape, options.balls)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source = Path(folder, "in", "d.zarr", "c", "mito")
        write_balls(source, shape, options.balls)
        outs = {}
        for way in ("blocks",) if options.no_whole else ("blocks", "whole"):
            outs[way] = Path(folder, way, "d.zarr", "c", "mito")
            command = [sys.executable, __file__, "--block", str(options.block), "--measure", way, source, outs[way]]
            command += ["--boundary"] if options.boundary else []
            row = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            rate = z * y * x / row["seconds"] / 1e6
            print(f"{way:8} {row['seconds']:.1f} s ({rate:.2f} Mvoxel/s), peak {row['mb']:.0f} MB")
        if not options.no_whole:
            print("labels are the same:", same(outs["blocks"], outs["whole"]))


if __name__ == "__main__":
    main()
