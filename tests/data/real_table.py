"""The challenge's training crops as a catalog without voxels: where all 289 lie and which arrays they have.

`train_crops.json` is the challenge's table of grids and classes. It does not say which classes occur in a crop, nor how
much of them: real arrays say so in ``complement_counts``. Here a seeded draw stands for those.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.cellmap.annotation import Annotation
from connectomics.cellmap.catalog import Crop, LabelArray, informs
from connectomics.geometry import VoxelGrid
from connectomics.io.multiscale import Level, Multiscale

TABLE = json.loads((Path(__file__).parent / "train_crops.json").read_text(encoding="utf-8"))


def table_crops(datasets: list[str] | None, classes: list[str], occurs: float = 1.0, seed: int = 0) -> list[Crop]:
    """The crops of these data sets (None: all) that inform any of ``classes``; a class of an array is present in the
    share ``occurs`` of the arrays, where it fills up to a tenth."""
    found, raw = [], _levels(VoxelGrid((2.0,) * 3, (1.0,) * 3, (20000,) * 3))
    for dataset, number, size, first, shape, which in TABLE["crops"]:
        names = TABLE["class_sets"][which]
        if (datasets is not None and dataset not in datasets) or not any(informs(c, names) for c in classes):
            continue
        grid = VoxelGrid(tuple(size), tuple(first), tuple(shape))
        rng = np.random.default_rng([seed, number])
        labels, levels = {}, _levels(grid)
        for name in names:
            there = rng.random() < occurs
            present = max(1, int(grid.size * 0.1 * rng.random())) if there else 0
            label = LabelArray(name, f"nowhere/{occurs}/{seed}/{dataset}/crop{number}/{name}")
            label.__dict__["source"] = _Volume.at(label.location, levels, there)
            counts = {"absent": grid.size - present, "unknown": 0}
            label.__dict__["annotation"] = Annotation(name, "semantic", 0, 255, counts)
            labels[name] = label
        crop = Crop(dataset, f"crop{number}", "nowhere", labels)
        crop.__dict__["raw_source"] = _Volume.at("nowhere", raw, False)
        found.append(crop)
    return found


def _levels(grid: VoxelGrid) -> list[Level]:
    grids = [grid]
    while min(grids[-1].shape) > 32:
        grids.append(grids[-1].at_voxel_size([2 * size for size in grids[-1].voxel_size]))
    return [Level(f"s{n}", g, np.dtype(np.uint8), (64, 64, 64)) for n, g in enumerate(grids)]


class _Volume(Multiscale):
    """A pyramid without storage: a pattern of present voxels all over, or none."""

    there = False

    @classmethod
    def at(cls, location: str, levels: list[Level], there: bool) -> Multiscale:
        made = cls(location, {}, [(level, None) for level in levels], [])  # no array is read
        made.there = there
        return made

    def read_level(
        self, level: int, begin: Sequence[int] | NDArray[Any], shape: Sequence[int], *, absent_is_missing: bool = True
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        z, y, x = (np.arange(b, b + n) // 4 for b, n in zip(begin, shape, strict=True))
        pattern = (z[:, None, None] + y[None, :, None] + x[None, None, :]) % 8 == 0
        return (pattern & self.there).astype(np.uint8), np.ones(tuple(shape), bool)
