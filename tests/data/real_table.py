"""The challenge's training crops as a catalog without voxels: where all 289 lie and which arrays they have.

`train_crops.json` is the challenge's table of grids and classes. It does not say which classes occur in a crop, nor how
much of them: real arrays say so in ``complement_counts``. Here a seeded draw stands for those.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from connectomics.cellmap.annotation import Annotation
from connectomics.cellmap.catalog import Crop, LabelArray, informs
from connectomics.geometry import VoxelGrid
from connectomics.io.multiscale import Level, Multiscale

TABLE = json.loads((Path(__file__).parent / "train_crops.json").read_text(encoding="utf-8"))


def table_crops(datasets: list[str] | None, classes: list[str], occurs: float = 1.0, seed: int = 0) -> list[Crop]:
    """The crops of these data sets (None: all) that inform any of ``classes``; a class of an array is present in the
    share ``occurs`` of the arrays, where it fills up to a tenth."""
    found = []
    for dataset, number, size, first, shape, which in TABLE["crops"]:
        names = TABLE["class_sets"][which]
        if (datasets is not None and dataset not in datasets) or not any(informs(c, names) for c in classes):
            continue
        grid = VoxelGrid(tuple(size), tuple(first), tuple(shape))
        rng = np.random.default_rng([seed, number])
        labels = {}
        for name in names:
            there = rng.random() < occurs
            present = max(1, int(grid.size * 0.1 * rng.random())) if there else 0
            label = LabelArray(name, f"nowhere/{occurs}/{seed}/{dataset}/crop{number}/{name}")
            label.__dict__["source"] = _volume(label.location, grid)
            counts = {"absent": grid.size - present, "unknown": 0}
            label.__dict__["annotation"] = Annotation(name, "semantic", 0, 255, counts)
            labels[name] = label
        crop = Crop(dataset, f"crop{number}", "nowhere", labels)
        crop.__dict__["raw_source"] = _volume("nowhere", VoxelGrid((2.0,) * 3, (1.0,) * 3, (20000,) * 3))
        found.append(crop)
    return found


def _volume(location: str, grid: VoxelGrid) -> Multiscale:
    return Multiscale(location, {}, [Level("s0", grid, np.dtype(np.uint8), (64, 64, 64))], [])
