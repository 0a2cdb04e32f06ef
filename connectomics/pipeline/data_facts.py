"""Measure a data root: voxel sizes, extents, volume and thickness of each class.

Thickness is the mean chord: the mean length of the runs of present voxels along the three axes. For convex bodies it is
4 V / S (Cauchy; a ball of diameter d has 2 d / 3). It needs no surfaces. With instance IDs, a run ends where another
instance begins.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.cellmap.catalog import Catalog, Crop, LabelArray
from connectomics.cellmap.crop_table import CropTable
from connectomics.data.contents import said_counts
from connectomics.geometry import Triple, triple
from connectomics.progress import Progress, silent

_MOST_CROPS = 12  # most crops whose thickness is measured per class, spread over the data sets
_SMALL = 0.05  # share of the instances that count as small


@dataclass(frozen=True)
class ClassFacts:
    """One class over all crops.

    Attributes:
        crops: number of crops that annotate it.
        present_um3, share: volume where it is present, and its share of the known volume; by the counts in the arrays'
            attributes, else from the crops that were read.
        chord_nm: mean chord in some crops of each data set, None if the class is present nowhere.
        test_nm: median voxel size of the class in the challenge, None if it has none.
        touching: share of the faces of instances that are shared with another instance, 0 without instance IDs.
        small_nm3: 5 % of the instances in these crops have this volume or less, nm^3; 0 without instance IDs.
    """

    name: str
    crops: int
    present_um3: float
    share: float
    chord_nm: float | None
    test_nm: float | None
    touching: float = 0.0
    small_nm3: float = 0.0


@dataclass(frozen=True)
class DataFacts:
    """Properties of the data.

    Attributes:
        raw_nm: smallest side of the finest raw voxels, nm.
        raw_voxel: finest raw voxels, nm, z y x, if all data sets have the same; None if they differ.
        extents_nm, raw_extents_nm: median size of the crops and of the raw around them, z y x.
    """

    crops: int
    volume_um3: float
    raw_nm: float
    raw_voxel: Triple | None
    raw_dtype: str
    extents_nm: Triple
    raw_extents_nm: Triple
    classes: tuple[ClassFacts, ...]


def data_facts(
    root: str, classes: Sequence[str], datasets: Sequence[str] | None = None, progress: Progress = silent
) -> DataFacts:
    """Measure a data root with a few label blocks in memory; errors: of `Catalog.crops` and `Crop.check_voxels`."""
    crops = Catalog.open(root).crops(list(datasets) if datasets else None, None, list(classes))
    for crop in crops:
        crop.check_voxels()
    extents = np.array([crop.box.extent for crop in crops])
    test_sizes: dict[str, list[float]] = {}
    for row in CropTable.challenge():
        test_sizes.setdefault(row.class_name, []).append(min(row.grid.voxel_size))
    raws = [crop.raw_source.levels[0].grid for crop in crops]
    finest = np.array([grid.voxel_size for grid in raws])
    facts = []
    for number, name in enumerate(classes):
        facts.append(_class_facts(name, crops, test_sizes.get(name)))
        progress(number + 1, len(classes), name)
    return DataFacts(
        crops=len(crops), volume_um3=float(np.prod(extents, axis=1).sum() / 1e9), raw_nm=float(finest.min()),
        raw_voxel=triple(finest[0]) if np.allclose(finest, finest[0], rtol=0.01) else None,
        raw_dtype=str(crops[0].raw_source.levels[0].dtype),
        extents_nm=triple(np.median(extents, axis=0)),
        raw_extents_nm=triple(np.median([grid.box.extent for grid in raws], axis=0)), classes=tuple(facts),
    )  # fmt: skip


def _class_facts(name: str, crops: Sequence[Crop], test_sizes: Sequence[float] | None) -> ClassFacts:
    own = [crop for crop in crops if name in crop.labels and crop.labels[name].grid.size]
    volumes = np.zeros(2)  # present and known, um^3
    lengths, runs, shared, sizes = np.zeros(3), np.zeros(3), 0, list[float]()
    may_have = []
    for crop in own:
        counts = said_counts(crop.labels[name])
        if counts is not None:
            voxel = float(np.prod(crop.labels[name].grid.voxel_size)) / 1e9
            volumes += np.array([counts["present"], counts["present"] + counts["absent"]]) * voxel
        if counts is None or counts["present"]:
            may_have.append((crop, counts))
    # read at most _MOST_CROPS crops, and more only until the class is found
    for number, place in enumerate(across_datasets([crop for crop, _ in may_have])):
        crop, counts = may_have[place]
        if number >= _MOST_CROPS and runs.any():
            break
        found, length, begun, touches, instances = _measure(crop.labels[name])
        lengths, runs, shared, sizes = lengths + length, runs + begun, shared + touches, sizes + instances
        if counts is None:
            volumes += found
    return ClassFacts(
        name=name, crops=len(own), present_um3=float(volumes[0]),
        share=float(volumes[0] / volumes[1]) if volumes[1] else 0.0,
        chord_nm=float(np.mean(lengths / runs)) if runs.all() else None,
        test_nm=float(np.median(test_sizes)) if test_sizes else None,
        touching=float(shared / runs.sum()) if runs.all() else 0.0,
        small_nm3=float(np.quantile(sizes, _SMALL, method="lower")) if sizes else 0.0,
    )  # fmt: skip


def across_datasets(crops: Sequence[Crop]) -> list[int]:
    """Return the indices of the crops in an order that alternates between data sets, spread over each data set."""
    rank: dict[int, tuple[int, int]] = {}
    for dataset in dict.fromkeys(crop.dataset for crop in crops):
        mine = [number for number, crop in enumerate(crops) if crop.dataset == dataset]
        # bit-reversed numbers are spread: neighbors in a catalog are often similar
        spread = sorted(range(len(mine)), key=lambda n: (int(f"{n:016b}"[::-1], 2), n))
        rank |= {mine[n]: (place, mine[n]) for place, n in enumerate(spread)}
    return sorted(rank, key=lambda number: rank[number])


def _measure(
    label: LabelArray,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64], int, list[float]]:
    """Measure a label array: present and known volume (um^3), total length (nm) and number of runs per axis; touches;
    volumes of the instances (nm^3), as far as they lie in the array.

    A run is a line of present voxels of one instance. Touches are runs that begin where another instance ends.
    """
    size = np.asarray(label.grid.voxel_size)
    volumes, lengths, runs, touches = np.zeros(2), np.zeros(3), np.zeros(3, np.int64), 0
    instances = Counter[int]()
    before: NDArray[Any] | None = None  # the last plane of the block above, where runs along z may start
    for _, _, stored, inside, known in label.blocks():
        ids = inside
        if label.annotation.kind == "instance":
            ids = np.where(inside, stored, 0)
            found, voxels = np.unique(stored[inside], return_counts=True)
            instances.update(dict(zip(found.tolist(), voxels.tolist(), strict=True)))
        count = np.array([np.count_nonzero(inside), np.count_nonzero(known)])
        volumes += count * (float(size.prod()) / 1e9)
        lengths += count[0] * size
        begun, touching = _run_starts(ids, before)
        runs, touches = runs + begun, touches + touching
        before = ids[-1]
    return volumes, lengths, runs, touches, [n * float(size.prod()) for n in instances.values()]


def _run_starts(ids: NDArray[Any], before: NDArray[Any] | None) -> tuple[NDArray[np.int64], int]:
    """Count the runs that start in a block, along z, y and x, and touches; ``before``: the plane above it."""
    found, touches = [], 0
    for axis in range(3):
        lines = np.moveaxis(ids, axis, 0)
        first = np.zeros_like(lines[0]) if axis or before is None else before
        starts = 0
        for ends, begins in ((first, lines[0]), (lines[:-1], lines[1:])):
            begun = (begins != 0) & (begins != ends)
            starts += int(np.count_nonzero(begun))
            touches += int(np.count_nonzero(begun & (ends != 0)))
        found.append(starts)
    return np.asarray(found), touches
