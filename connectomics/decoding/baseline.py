"""The plain thing that a network has to beat: one interval of intensities per class, then connected components.

The interval is fitted on training crops, where the truth is known, for the best Dice; nothing else is learnt. It is the
strongest rule that looks at one voxel's value only: dark, bright or in between, whichever fits best.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.cellmap.crop_table import TableEntry
from connectomics.decoding.decode import DecodedArray, Progress, decode_mask
from connectomics.decoding.label_artifact import BLOCK, label_array, standing_labels, write_whole
from connectomics.decoding.parameters import DecodeParameters, default_parameters
from connectomics.errors import InputError, unknown_name
from connectomics.geometry import VoxelGrid
from connectomics.io.artifacts import Provenance
from connectomics.io.location import local_path
from connectomics.io.multiscale import Multiscale
from connectomics.io.write import update_attrs

BINS = 256


@dataclass(frozen=True)
class IntensityRule:
    """A voxel belongs to the class where ``low <= raw <= high`` (raw values as stored; uint8: 0 to 255).

    Attributes:
        low, high: the interval, both ends in it; low above high matches nothing.
        dice: on the voxels it was fitted to; None where the class was not present among them.
    """

    low: float
    high: float
    dice: float | None

    def apply(self, raw: NDArray[Any]) -> NDArray[np.bool_]:
        """The mask of a block of raw; values are rounded to whole ones first, as in fitting."""
        rounded = np.rint(raw)
        found: NDArray[np.bool_] = (rounded >= self.low) & (rounded <= self.high)
        return found


def intensity_histogram(raw: NDArray[Any], label: NDArray[Any], known: NDArray[np.bool_]) -> NDArray[np.int64]:
    """(2, 256) counts of the known voxels by raw value: row 0 where the class is absent, row 1 where it is present.

    Histograms of several crops add up to that of all of them.

    Args:
        raw: values in the range of uint8 (0 to 255), any shape, integer or float; rounded to whole numbers.
        label: present where above 0; the shape of ``raw``.
        known: which voxels say anything at all; the shape of ``raw``.
    """
    if raw.shape != label.shape or raw.shape != known.shape:
        raise InputError(f"raw, label and known must have one shape, found {raw.shape}, {label.shape}, {known.shape}")
    values = np.rint(raw[known])
    if values.size and not (values.min() >= 0 and values.max() < BINS):
        raise InputError(f"raw must lie in 0 to 255, found {values.min():.4g} to {values.max():.4g}; rescale it first")
    present = (label[known] > 0).astype(np.int64)
    counts = np.bincount(values.astype(np.int64) + BINS * present, minlength=2 * BINS)
    return counts.reshape(2, BINS).astype(np.int64)


def best_rule(histogram: NDArray[np.int64]) -> IntensityRule:
    """The interval with the best Dice of all 32,896; of equals the one with the lowest start, then the lowest end."""
    absent, present = (np.concatenate(([0], np.cumsum(row))) for row in histogram)
    total = int(present[-1])
    if total == 0:
        return IntensityRule(1.0, 0.0, None)
    # [low, high]: voxels between, for every pair of ends at once; 2 tp / (2 tp + fp + fn) = 2 tp / (tp + fp + total).
    tp = present[None, 1:] - present[:-1, None]
    fp = absent[None, 1:] - absent[:-1, None]
    dice = np.where(np.tri(BINS, dtype=np.bool_).T, 2 * tp / np.maximum(tp + fp + total, 1), -1.0)
    low, high = np.unravel_index(int(np.argmax(dice)), dice.shape)
    return IntensityRule(float(low), float(high), float(dice[low, high]))


def fit_threshold(raw: NDArray[Any], label: NDArray[Any], known: NDArray[np.bool_]) -> IntensityRule:
    """The best rule for one class from arrays of one shape; see `intensity_histogram` and `best_rule`."""
    return best_rule(intensity_histogram(raw, label, known))


def write_baseline(
    entries: Iterable[TableEntry],
    raw_locations: Mapping[str, str],
    rules: Mapping[str, IntensityRule],
    output_dir: str | Path,
    parameters: Mapping[str, DecodeParameters] | None = None,
    *,
    progress: Progress | None = None,
) -> list[DecodedArray]:
    """Apply the rules to the crops of a table and write labels as `decode_predictions` does.

    Args:
        entries: what to write: crop, class and grid (a `CropTable` will do).
        raw_locations: data set -> location of its raw multiscale group.
        rules: class -> rule; every class of ``entries`` needs one.
        parameters: class -> what to do with the mask (the threshold is not used); None: the kind's defaults.

    Where there is no raw, nothing is found. Raw is read once for each grid of a crop.
    """
    rows = list(entries)
    for row in rows:
        if row.class_name not in rules:
            raise unknown_name("class", row.class_name, rules, "the fitted intensity rules")
        if row.dataset not in raw_locations:
            raise unknown_name("data set", row.dataset, raw_locations, "the raw volumes")
    out, results = local_path(output_dir), []
    groups: dict[tuple[str, str, VoxelGrid], list[TableEntry]] = {}
    for row in rows:
        groups.setdefault((row.dataset, row.crop_name, row.grid), []).append(row)
    for (dataset, crop, grid), members in groups.items():
        raw, inside = _read_rounded(raw_locations[dataset], grid)
        for row in members:
            rule = rules[row.class_name]
            chosen = (parameters or {}).get(row.class_name) or default_parameters(row.class_name)
            labels = decode_mask(rule.apply(raw) & inside, grid.voxel_size, chosen)
            objects = int(labels.max(initial=0))
            about = {
                "decode": chosen.to_dict(),
                "source": {"baseline": {"low": rule.low, "high": rule.high}},
                "objects": objects,
                **Provenance().to_dict(),
            }
            location = out / f"{dataset}.zarr" / crop / row.class_name
            standing_labels(location, chosen, {}, overwrite=True)  # refuses what is not ours
            with label_array(
                location, grid, labels.dtype, class_name=row.class_name, kind=chosen.kind, about=about
            ) as writer:
                write_whole(writer, labels)
            results.append(DecodedArray(dataset, crop, row.class_name, str(location), objects, False))
            if progress is not None:
                progress(len(results), len(rows), f"{dataset}/{crop}/{row.class_name}")
        update_attrs(out / f"{dataset}.zarr" / crop, {"connectomics": {"artefact": "labels", "complete": True}})
    return results


def _read_rounded(location: str, grid: VoxelGrid) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Raw on a grid as uint8 and where there is any, read block by block: two bytes a voxel in all."""
    source = Multiscale.open(location)
    raw = np.zeros(grid.shape, np.uint8)
    inside = np.zeros(grid.shape, np.bool_)
    for begin, block in grid.blocks(BLOCK):
        z, y, x = (slice(b, b + n) for b, n in zip(begin, block.shape, strict=True))
        values, there = source.read_raw(block)
        raw[z, y, x] = np.clip(np.rint(values), 0, BINS - 1).astype(np.uint8)
        inside[z, y, x] = there
    return raw, inside
