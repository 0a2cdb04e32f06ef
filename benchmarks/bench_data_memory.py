"""Memory of the loader's workers: ``python benchmarks/bench_data_memory.py [--patches N] [--workers N]``.

10,000 patches of 128^3 voxels with 48 classes, flipped and turned by right angles, four workers (forkserver), batches
of two, a root of 40 crops read from the crop cache on disk. About every 100 patches each worker's private memory is
read (Private_Clean + Private_Dirty of smaps_rollup; what lies in shared memory or in mapped files counts as private
while no other process maps it). What must hold, else the exit status is 1: each worker below
700 MB (10^6 bytes) at every look, and the mean over workers in the last tenth of the run within 3 % of that in the
second tenth.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from data_roots import forty_crops
from numpy.typing import NDArray

from connectomics.cellmap.catalog import Catalog
from connectomics.data.augmentation import PatchAugmentor
from connectomics.data.cache import prepare
from connectomics.data.dataset.dataset_cellmap import CellMapMultiClassDataset, PatchOptions
from connectomics.data.loader import PatchLoader
from connectomics.data.patches import collate
from connectomics.data.sampling import PatchSampler
from connectomics.phantom import PHANTOM_CLASSES

LIMIT_MB = 700.0
FLAT = 0.03
BATCH = 2
_KEYS = ["image", "label"]
AUGMENTATIONS = {
    **{f"RandFlipd_{a + 2}": {"keys": _KEYS, "prob": 0.5, "spatial_axis": a} for a in range(3)},
    "RandRotate90d": {"keys": _KEYS, "prob": 0.5, "spatial_axes": [[0, 1], [0, 2], [1, 2]]},
}


def loader_of(root: Path, cache: Path, workers: int, patches: int, side: int) -> PatchLoader:
    """The loader of a run, as the data module makes it, with that many workers whatever the machine has."""
    crops = Catalog.open(str(root)).crops(None, None, PHANTOM_CLASSES)
    shape = (side,) * 3
    dataset = CellMapMultiClassDataset.of_crops(
        crops, PHANTOM_CLASSES, "train", shape, (8.0,) * 3, PatchAugmentor.of(AUGMENTATIONS, shape),
        PatchOptions(cache="disk", cache_dir=str(cache)),
    )  # fmt: skip
    prepare(dataset.all_volumes, None, processes=2)
    sampler = PatchSampler(dataset.sampled_crops(), patches, classes=dataset.classes, seed=0)
    return PatchLoader(
        dataset, sampler, batch_size=BATCH, collate=collate, workers=workers, start="forkserver", persistent=True
    )


def private_mb(pid: int) -> float:
    """Return the memory (10^6 bytes) that one process alone holds: Private_Clean + Private_Dirty of smaps_rollup."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    return (
        sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Clean:", "Private_Dirty:"))) * 1.024e-3
    )


def run(loader: PatchLoader, patches: int) -> tuple[NDArray[np.float64], float]:
    """Private memory (looks, workers) in MB, and patches a second."""
    every = max(1, min(100, patches // 100) // BATCH)  # batches
    looks = []
    begin = time.perf_counter()
    for number, _ in enumerate(loader):
        if number % every == every - 1:
            looks.append([private_mb(pid) for pid in loader.worker_pids])
    return np.array(looks), patches / (time.perf_counter() - begin)


def main() -> int:
    """Measure, print a table by tenths of the run, and tell by the exit status whether the limits hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patches", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--side", type=int, default=128, help="voxels of a patch's edge")
    parser.add_argument("--folder", type=Path, help="keep root and cache here (default: a temporary folder)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        begin = time.perf_counter()
        root = forty_crops(folder / "forty")
        made = time.perf_counter()
        loader = loader_of(root, folder / "cache", options.workers, options.patches, options.side)
        print(f"root {made - begin:.0f} s, crop cache {time.perf_counter() - made:.0f} s", flush=True)
        looks, speed = run(loader, options.patches)
    print(f"{'patches':>12}  mean MB  largest MB  (private memory of each of {options.workers} workers)")
    tenths = np.array_split(looks, 10)
    for number, tenth in enumerate(tenths, start=1):
        print(f"{options.patches * number // 10:12}  {tenth.mean():7.1f}  {tenth.max():10.1f}")
    change = tenths[-1].mean() / tenths[1].mean() - 1
    small, flat = looks.max() < LIMIT_MB, abs(change) < FLAT
    print(f"{speed:.1f} patches/s")
    print(f"{'pass' if small else 'FAIL'}  largest {looks.max():.0f} MB  < {LIMIT_MB:.0f}")
    print(f"{'pass' if flat else 'FAIL'}  last tenth against second {100 * change:+.2f} %  within {100 * FLAT:.0f} %")
    if options.json:
        found = {"patches_per_s": speed, "largest_mb": looks.max(), "change": change, "mb": looks.tolist()}
        options.json.write_text(json.dumps(found))
    return 0 if small and flat else 1


if __name__ == "__main__":
    sys.exit(main())
