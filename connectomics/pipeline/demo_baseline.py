"""The baseline of the demo: for each class the interval of raw intensities with the best Dice, then components."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.cellmap.catalog import Catalog
from connectomics.cellmap.crop_table import TableEntry
from connectomics.config import RunConfig
from connectomics.data.volumes import CropVolume
from connectomics.decoding.decode import decode_class
from connectomics.decoding.label_artifact import existing_labels, label_array, label_attrs, write_whole
from connectomics.decoding.parameters import DecodeParameters, decode_parameters
from connectomics.errors import InputError
from connectomics.io.artifacts import Provenance
from connectomics.io.multiscale import Multiscale
from connectomics.io.sharded import Storage
from connectomics.io.write import update_attrs

BINS = 256
#: The lowest and the highest raw value of a class, both inside; nothing is found if the first is higher.
Interval = tuple[int, int]


def intensity_histogram(raw: NDArray[Any], label: NDArray[Any], known: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return (2, 256) counts of the known voxels by raw value 0 to 255: where the class is absent, and present."""
    values = np.rint(raw[known])
    if values.size and not (values.min() >= 0 and values.max() < BINS):
        raise InputError(f"raw must lie in 0 to 255, got {values.min():.4g} to {values.max():.4g}; rescale it first")
    present = (label[known] > 0).astype(np.int64)
    counts = np.bincount(values.astype(np.int64) + BINS * present, minlength=2 * BINS)
    return counts.reshape(2, BINS).astype(np.int64)


def best_interval(histogram: NDArray[np.int64]) -> Interval:
    """Return the interval with the best Dice; of equals the one with the lowest start, then the lowest end."""
    absent, present = (np.concatenate(([0], np.cumsum(counts))) for counts in histogram)
    if present[-1] == 0:
        return 1, 0
    # for every pair of ends: 2 tp / (2 tp + fp + fn) = 2 tp / (tp + fp + all present)
    tp = present[None, 1:] - present[:-1, None]
    fp = absent[None, 1:] - absent[:-1, None]
    dice = np.where(np.tri(BINS, dtype=np.bool_).T, 2 * tp / np.maximum(tp + fp + present[-1], 1), -1.0)
    low, high = np.unravel_index(int(np.argmax(dice)), dice.shape)
    return int(low), int(high)


def fit_intervals(config: RunConfig, catalog: Catalog) -> dict[str, Interval]:
    """Return the best interval of every class on the annotated crops of a configuration."""
    data = config.dataset
    histograms = {name: np.zeros((2, BINS), np.int64) for name in data.classes}
    for crop in catalog.crops(data.datasets, data.crops, data.classes):
        volume = CropVolume(crop, tuple(data.classes), config.voxel_size)
        for _, block in volume.grid.blocks((128, 128, 128)):
            raw, _ = volume.read_raw(block)
            label, known = volume.read_labels(block)
            for channel, name in enumerate(data.classes):
                histograms[name] += intensity_histogram(raw, label[channel], known[channel])
    return {name: best_interval(histogram) for name, histogram in histograms.items()}


def write_baseline(config: RunConfig, root: str, entries: Iterable[TableEntry], output_dir: Path) -> None:
    """Fit the intervals on annotated crops, and write labels for the entries of a crop table as decode does."""
    catalog, decoding = Catalog.open(root), config.decoding
    parameters = decode_parameters(config.dataset.classes, decoding.default, decoding.classes)
    raw = {name: catalog.raw_location(name) for name in catalog.datasets}
    write_labels(entries, raw, fit_intervals(config, catalog), output_dir, parameters)


def write_labels(
    entries: Iterable[TableEntry],
    raw_locations: Mapping[str, str],
    intervals: Mapping[str, Interval],
    output_dir: Path,
    parameters: Mapping[str, DecodeParameters],
) -> None:
    """Write the labels of a crop table from intervals of raw at ``raw_locations[dataset]``."""
    for entry in entries:
        (low, high), chosen, grid = intervals[entry.class_name], parameters[entry.class_name], entry.grid
        raw, inside = Multiscale.open(raw_locations[entry.dataset]).read_raw(grid)
        values = np.rint(raw)
        labels = decode_class((values >= low) & (values <= high) & inside, grid.voxel_size, chosen)
        source = {"baseline": {"low": low, "high": high}}
        attrs = label_attrs(grid, entry.class_name, chosen, source, Provenance(), int(labels.max(initial=0)))
        location = output_dir / f"{entry.dataset}.zarr" / entry.crop_name / entry.class_name
        existing_labels(
            location, chosen, {}, Storage(), overwrite=True
        )  # refuses to replace files that decode did not write
        with label_array(location, [grid], labels.dtype, attrs, Storage()) as writers:
            write_whole(writers, labels)
        update_attrs(location.parent, {"connectomics": {"artefact": "labels", "complete": True}})
