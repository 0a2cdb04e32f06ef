"""What a training patch costs: ``python benchmarks/bench_data.py [--rounds N] [--folder DIR] [--json FILE]``.

One data set of the phantom (4 nm raw, one crop of 1.32 um with all 48 classes), read at 8 nm from the crop cache in one
process with one torch thread. CPU milliseconds per patch of each stage (medians over rounds), and limits, each the
median of ratios within a round; the exit status is 1 if one is missed:

(a) 48 classes cost at most 1.5 times what 3 classes cost, 128^3 plain and 64^3 with flips and rotation;
(b) a plain patch of 128^3 costs at most 3 times a bare copy of its raw and codes out of the memory map;
(c) a patch of 128^3 with flips and rotation costs at most 2 times the bare spatial pass over arrays in memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data_roots import AUGMENTED, FOURTEEN, THREE, one_large_crop

from connectomics.cellmap.catalog import Catalog
from connectomics.config import config_from_dict
from connectomics.data.arrays import CropArrays
from connectomics.data.augmentation import BatchAugmentor, PatchAugmentor, sample
from connectomics.data.cache import prepare
from connectomics.data.dataset.dataset_cellmap import CellMapMultiClassDataset, PatchOptions
from connectomics.data.patches import collate
from connectomics.data.sampling import PatchRequest, PatchSampler
from connectomics.phantom import PHANTOM_CLASSES

#: ``patch`` is the data set's item; ``decode`` reads the same range from Zarr; ``copy`` and ``kernel`` are the limits.
STAGES = ("patch", "pack", "intensity", "unpack", "decode", "copy", "kernel")


def dataset_of(root: Path, cache: Path, classes: Sequence[str], side: int, augmented: bool) -> CellMapMultiClassDataset:
    """Return patches of a root, decoded into the cache."""
    crops = Catalog.open(str(root)).crops(None, None, classes)
    shape, options = (side,) * 3, PatchOptions(cache="disk", cache_dir=str(cache))
    augmentor = PatchAugmentor.of(AUGMENTED, shape) if augmented else None
    dataset = CellMapMultiClassDataset.of_crops(crops, classes, "train", shape, (8.0,) * 3, augmentor, options)
    prepare(dataset.all_volumes)
    return dataset


def measure(
    dataset: CellMapMultiClassDataset,
    requests: Sequence[PatchRequest],
    stages: Sequence[str] = STAGES,
    intensity: BatchAugmentor | None = None,
) -> dict[str, float]:
    """Return CPU seconds per patch of each stage over the same requests; ``whole`` is ``patch`` and ``pack``."""
    costs: dict[str, float] = {}

    def timed(name: str, work: Callable[..., Any], *args: Any) -> Any:
        begin = time.process_time()
        result = work(*args)
        costs[name] = costs.get(name, 0.0) + (time.process_time() - begin) / len(requests)
        return result

    for request in requests:
        patch = timed("patch", dataset.__getitem__, request)
        batch = timed("pack", collate, [patch])
        if intensity is not None and "intensity" in stages:
            timed("intensity", intensity, batch)
        if "unpack" in stages:
            timed("unpack", patch.dense)
        if not {"decode", "copy", "kernel"} & set(stages):
            continue
        volume = dataset.volumes[request.index]
        grid, moved, _ = dataset.reader.draw(request)
        center = volume.grid.to_index(np.asarray(grid.box.center))
        low, high = moved.bounds(grid.shape)
        lo, hi = np.floor(center + low).astype(int) - 1, np.ceil(center + high).astype(int) + 2
        arrays = volume.arrays(lo.tolist(), hi.tolist())
        if "decode" in stages:
            timed("decode", replace(volume, cache=None).arrays, lo.tolist(), hi.tolist())
        if "copy" in stages:
            begin = np.rint(volume.grid.to_index(grid.translation)).astype(int)
            timed("copy", _cut, arrays, begin, begin + grid.shape)
        if "kernel" in stages:
            timed("kernel", sample, _cut(arrays, lo, hi), center, moved, grid.shape)
    return {**costs, "whole": costs["patch"] + costs["pack"]}


def _cut(arrays: CropArrays, lo: Sequence[int], hi: Sequence[int]) -> CropArrays:
    """Copy the part from lattice index ``lo`` to ``hi`` (exclusive)."""

    def cut(block: np.ndarray[Any, Any], begin: Sequence[int]) -> tuple[np.ndarray[Any, Any], tuple[int, int, int]]:
        low = np.minimum(np.maximum(np.subtract(lo, begin), 0), block.shape)
        high = np.maximum(np.minimum(np.subtract(hi, begin), block.shape), low)
        z, y, x = (low + begin).tolist()
        return np.array(block[low[0] : high[0], low[1] : high[1], low[2] : high[2]]), (z, y, x)

    raw, raw_begin = cut(arrays.raw, arrays.raw_begin)
    codes, codes_begin = cut(arrays.codes, arrays.codes_begin)
    inside = None if arrays.inside is None else cut(arrays.inside, arrays.raw_begin)[0]
    return CropArrays(raw, raw_begin, inside, codes, codes_begin, arrays.states)


def rounds_of(
    dataset: CellMapMultiClassDataset, rounds: int, patches: int = 24, **options: Any
) -> list[dict[str, float]]:
    """Return `measure` of each round, after a warm-up (compilation, first pages)."""
    sampler = PatchSampler(dataset.sampled_crops(), (rounds + 1) * patches, classes=dataset.classes, seed=0)
    requests = iter(sampler)
    return [measure(dataset, list(islice(requests, patches)), **options) for _ in range(rounds + 1)][1:]


@dataclass(frozen=True)
class Limit:
    """One limit: the ratios measured, and the largest allowed median."""

    name: str
    ratios: tuple[float, ...]
    most: float

    @property
    def holds(self) -> bool:
        """Whether the median is within the limit."""
        return statistics.median(self.ratios) <= self.most

    def line(self) -> str:
        """Return a line of the report."""
        spread = f"{min(self.ratios):.2f} .. {max(self.ratios):.2f}"
        median = statistics.median(self.ratios)
        return f"{'pass' if self.holds else 'FAIL'}  {self.name:44} {median:6.2f}  <= {self.most:g} ({spread})"


def limits(root: Path, cache: Path, rounds: int) -> list[Limit]:
    """Measure and print all stages and limits."""
    found: list[Limit] = []
    intensity = BatchAugmentor.of(config_from_dict({"data": {"intensity": {"blur": {}, "noise": {}, "contrast": {}}}}))
    for side, augmented, what in ((128, False, "128^3, plain"), (64, True, "64^3, augmented")):
        few, many = (dataset_of(root, cache, names, side, augmented) for names in (THREE, PHANTOM_CLASSES))
        pairs = [
            (rounds_of(many, 1, stages=())[0]["whole"], rounds_of(few, 1, stages=())[0]["whole"]) for _ in range(rounds)
        ]
        found.append(Limit(f"(a) 48 classes / 3 classes, {what}", tuple(m / f for m, f in pairs), 1.5))
    for augmented, name, limit, most in (
        (False, "(b) plain patch / bare copy, 128^3", "copy", 3.0),
        (True, "(c) augmented patch / bare spatial pass, 128^3", "kernel", 2.0),
    ):
        dataset = dataset_of(root, cache, FOURTEEN, 128, augmented)
        costs = rounds_of(dataset, rounds, stages=("unpack", "intensity", limit), intensity=intensity)
        slow = rounds_of(dataset, 1, 2, stages=("decode",))[0]
        medians = {stage: statistics.median(c[stage] for c in costs) for stage in costs[0]} | {"decode": slow["decode"]}
        stages = ", ".join(f"{stage} {1e3 * seconds:.2f}" for stage, seconds in medians.items())
        print(f"{'augmented' if augmented else 'plain'} 128^3, CPU ms per patch: {stages}")
        found.append(Limit(name, tuple(c["patch"] / c[limit] for c in costs), most))
    for item in found:
        print(item.line())
    return found


def main() -> int:
    """Measure, print, and tell by the exit status whether all limits hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="keep root and cache here (default: a temporary folder)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        found = limits(one_large_crop(folder / "root"), folder / "cache", options.rounds)
    if options.json:
        options.json.write_text(json.dumps([{**vars(item), "holds": item.holds} for item in found], indent=1))
    return 0 if all(item.holds for item in found) else 1


if __name__ == "__main__":
    sys.exit(main())
