"""The training and validation crops of a run: which crops it may use, how they are split, and checks of the split."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from connectomics.cellmap.catalog import Catalog, Crop, LabelArray, informs
from connectomics.cellmap.classes import atoms_of
from connectomics.cellmap.labels import arrays_needed
from connectomics.config import RunConfig
from connectomics.data.contents import Content, LabelCounter, check_states, content_of
from connectomics.data.holdout import slabs
from connectomics.data.splits import (
    Split,
    check_leaks,
    entry_of,
    groups_of,
    leave_one_out,
    split_by_crop,
    split_by_dataset,
)
from connectomics.data.volumes import CropVolume
from connectomics.errors import ConfigError, InputError, first_of, number_of
from connectomics.geometry import Triple, triple
from connectomics.io.location import DEFAULT_OPTIONS
from connectomics.io.store import StoreOptions

log = logging.getLogger(__name__)

_COARSEST = 2.0  # voxel size of labels in voxels of the run
_BLOCK = (64, 64, 64)


def run_crops(
    config: RunConfig, classes: Sequence[str] | None = None, options: StoreOptions = DEFAULT_OPTIONS
) -> list[Crop]:
    """Return the crops of the data root that a run may use: those that tell about one of ``classes`` (None: its own).

    Raises:
        MissingError, UnknownNameError: there are none, or a name is unknown.
    """
    data = config.dataset
    return Catalog.open(data.data_root, options).crops(data.datasets, data.crops, classes or data.classes)


def run_split(
    config: RunConfig, crops: Sequence[Crop], file: Path | None, counter: LabelCounter
) -> tuple[Split, list[Crop], list[Crop]]:
    """Return the split of a run, read from ``file`` if it exists, with its training and validation crops.

    Warns about labels that are left out, classes without positives on a side, and crops close to each other.

    Raises:
        ConfigError: the split file cannot be read, or a validation crop overlaps a training crop.
        InputError: there is nothing to train on or to learn (see `connectomics.data.contents.check_states`).
    """
    dataset = config.dataset
    classes = dataset.classes
    margin = half_patch(config)
    fine = {crop.key: kept for crop in crops if (kept := _fine_labels(crop, config)) is not None}
    where = f"the split file {file}" if file is not None and file.is_file() else "the split"
    if file is not None and file.is_file():
        split = Split.load(file)
        usable = [fine.get(crop.key, crop) for crop in crops]  # a crop that the file names was asked for
    else:
        usable = [fine.get(c.key, c) for c in crops if c.key in fine or dataset.crops is not None]
        _say_what_is_coarse(crops, usable, config)
        usable = _known(_annotated(usable, config), classes, counter)
        split = _make(config, usable, [content_of(crop, classes, counter) for crop in usable], margin)
    _say_what_is_empty(usable, classes)
    train, val = split.select(usable, where)
    for crop in (*train, *val):
        crop.check_voxels()
    if not train:
        raise InputError("the split leaves no crop to train on; lower the share of validation or edit the split file")
    contents, held = ([content_of(crop, classes, counter) for crop in side] for side in (train, val))
    warnings = [*check_leaks(train, val, where, margin), *check_states(contents, classes)]
    if val:
        warnings += [
            f"class {name} has no positives in the validation crops: its validation scores say nothing, and the best "
            "checkpoint is chosen without it"
            for name in classes
            if not any(content.present[name] > 0 for content in held)
        ]
    for warning in warnings:
        log.warning(warning)
    volumes = [sum(content.known for content in side) for side in (contents, held)]
    unused = len({crop.key for crop in usable} - {crop.key for crop in (*train, *val)})
    log.info(
        "crops or parts of crops: %d for training, and %d for validation with %.0f %% of the annotated volume%s",
        len(train), len(val), 100 * volumes[1] / (sum(volumes) or 1.0),
        f"; {where} leaves out {number_of(unused, 'other crop')}" if unused else "",
    )  # fmt: skip
    return split, train, val


def run_folds(
    config: RunConfig, crops: Sequence[Crop], counter: LabelCounter, by: str, number: int
) -> dict[str, Split]:
    """Return the splits of a cross-validation, by name; the validation sides together hold all crops.

    Args:
        by: ``crop``: whole crops, in ``number`` folds of about the same annotated volume; crops that overlap or lie
            nearer than half a patch stay in one fold. ``box``: every crop is cut into ``number`` slabs
            (`connectomics.data.holdout.slabs`). ``dataset``: one fold for each data set.

    Raises:
        InputError: there are fewer groups of crops, or too little is annotated, for so many folds.
    """
    classes, margin = config.dataset.classes, half_patch(config)
    usable = [kept for crop in crops if (kept := _fine_labels(crop, config)) is not None]
    _say_what_is_coarse(crops, usable, config)
    usable = _annotated(usable, config)
    if by == "dataset":
        return leave_one_out(usable)
    groups = [[usable[n] for n in group] for group in groups_of(usable, margin)]
    sides: list[tuple[list[Crop], list[Crop]]] = [([], []) for _ in range(number)]
    if by == "box":
        for group in groups:
            for side, parts in zip(sides, slabs(group, classes, number, margin), strict=True):
                side[0].extend(parts[0])
                side[1].extend(parts[1])
    else:
        if len(groups) < number:
            raise InputError(
                f"cannot make {number} folds of {len(usable)} crops: they form {len(groups)} groups that lie half a "
                "patch apart; use fewer folds, or folds of boxes (by: box)"
            )
        known = [max(content_of(crop, classes, counter).known for crop in group) for group in groups]
        held = [0.0] * number
        for at in np.argsort(-np.asarray(known), kind="stable"):  # the largest first, each into the smallest fold
            smallest = int(np.argmin(held))
            held[smallest] += known[at] or 1e-9
            for fold, side in enumerate(sides):
                side[int(fold == smallest)].extend(groups[at])
    return {
        f"{by}{fold}": Split(*(tuple(entry_of(crop) for crop in side) for side in both))
        for fold, both in enumerate(sides, start=1)
    }


def half_patch(config: RunConfig) -> Triple:
    """Return half a patch in nm (z, y, x): the smallest distance between training and validation."""
    return triple([n / 2 * size for n, size in zip(config.patch, config.voxel_size, strict=True)])


def check_known(volumes: Sequence[CropVolume]) -> None:
    """Raise `InputError` if no voxel of any crop is known at the run's voxel size; stops at the first known one."""
    for volume in volumes:
        counts = volume.counts
        if counts is not None:
            if any(count["present"] + count["absent"] for count in counts.values()):
                return
            continue
        for _, block in volume.grid.blocks(_BLOCK):
            codes = volume.label_codes(block)
            if np.take(codes.states.known.any(axis=1), codes.codes).any():
                return
    raise InputError(
        f"nothing is known of {', '.join(volumes[0].classes)} at voxels of {list(volumes[0].voxel_size)} nm: fewer "
        "than half of the label voxels under each of them were annotated; set dataset.voxel_size to the voxel size of "
        "the labels"
    )


def _make(config: RunConfig, crops: Sequence[Crop], contents: Sequence[Content], margin: Triple) -> Split:
    dataset = config.dataset
    if dataset.split == "crop":
        return split_by_crop(crops, contents, dataset.classes, dataset.train_val_split, config.system.seed, margin)
    if dataset.split == "dataset":
        return split_by_dataset(crops, dataset.held_out)
    folds = leave_one_out(crops)
    if len(dataset.held_out) != 1 or dataset.held_out[0] not in folds:
        raise ConfigError(
            f"dataset.split=leave_one_out validates on one data set a run; set dataset.held_out=[NAME], one of "
            f"{', '.join(folds)}, and run once for each"
        )
    return folds[dataset.held_out[0]]


def _annotated(crops: list[Crop], config: RunConfig) -> list[Crop]:
    """Return the crops that annotate a class itself, or all of its atoms; all crops if there is none, or if
    ``dataset.crops`` names them.

    Other crops know a class only where a part of it, or a class that excludes it, was drawn: what is known there
    depends on what it is, and a network would learn the wrong share of it.
    """
    classes = config.dataset.classes
    kept = [
        crop
        for crop in crops
        if any(name in crop.labels or crop.labels.keys() >= set(atoms_of(name)) for name in classes)
    ]
    if config.dataset.crops is not None or not kept or len(kept) == len(crops):
        return crops
    left = [crop.key for crop in crops if crop not in kept]
    log.warning(
        "%s annotate none of the classes %s themselves, only parts of them or classes that exclude them, and are left "
        "out; name them in dataset.crops to use them",
        first_of(left, 4), ", ".join(classes),
    )  # fmt: skip
    return kept


def _known(crops: list[Crop], classes: Sequence[str], counter: LabelCounter) -> list[Crop]:
    """Return the crops without those in which no voxel is known, which could be the only ones that validate; all if
    there are no others. Crops without voxels stay, to be refused."""
    kept = [crop for crop in crops if content_of(crop, classes, counter).known or not crop.grid.size]
    if kept and len(kept) < len(crops):
        left = [crop.key for crop in crops if crop not in kept]
        log.warning(
            "no voxel of %s is known in %s, which is left out; ingest the labels again with the sections or the mask "
            "that was annotated",
            ", ".join(classes), first_of(left, 4),
        )  # fmt: skip
    return kept or crops


def _say_what_is_empty(crops: Sequence[Crop], classes: Sequence[str]) -> None:
    needed = [(crop.key, *item) for crop in crops for item in arrays_needed(crop, classes).items()]
    if empty := [f"{name} in {key} {label.grid.shape}" for key, name, label in needed if not label.grid.size]:
        log.warning(
            "labels without voxels: %s; ingest them again, or remove them",
            first_of(empty, 4),
        )  # fmt: skip


# -- labels that are too coarse ----------------------------------------------------------------------------------------
def _fine_labels(crop: Crop, config: RunConfig) -> Crop | None:
    """The crop without labels that are too coarse for the run; None if no class of the run is left."""
    if config.dataset.coarse_labels:
        return crop
    _ = crop.box  # opens all arrays at once, several at a time on S3
    kept = {name: label for name, label in crop.labels.items() if not _is_coarse(crop, label, config)}
    if not any(informs(name, kept) for name in config.dataset.classes):
        return None
    return crop if len(kept) == len(crop.labels) else replace(crop, labels=kept)


def _is_coarse(crop: Crop, label: LabelArray, config: RunConfig) -> bool:
    """Whether labels have more than twice the run's voxel size on some axis, and more than the raw's."""
    limits = [_COARSEST * size * (1 + 1e-6) for size in config.dataset.voxel_size]
    sizes = label.grid.voxel_size
    if all(size <= limit for size, limit in zip(sizes, limits, strict=True)):
        return False  # without opening the raw
    raw = crop.raw_source.levels[0].grid.voxel_size
    over = zip(sizes, limits, raw, strict=True)
    return any(size > max(limit, finest * (1 + 1e-6)) for size, limit, finest in over)


def _say_what_is_coarse(crops: Sequence[Crop], usable: Sequence[Crop], config: RunConfig) -> None:
    left = {crop.key: len(crop.labels) for crop in usable}
    gone = [crop.key for crop in crops if crop.key not in left]
    arrays = sum(len(crop.labels) - left.get(crop.key, 0) for crop in crops)
    if not arrays:
        return
    what = (
        f"{arrays} label arrays are stored at more than twice dataset.voxel_size ({config.dataset.voxel_size} nm) and "
        f"are left out, and with them {len(gone)} of {len(crops)} crops"
    )
    if not usable:
        raise InputError(f"{what}: nothing is left; set dataset.coarse_labels=true, or a coarser dataset.voxel_size")
    names = f" ({first_of(gone, 4)})" if gone else ""
    log.warning("%s%s; dataset.coarse_labels=true uses them", what, names)
