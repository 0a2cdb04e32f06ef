"""Raw to pre-train on, without labels: parts of raw volumes as crops, and which of them are held out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch.utils.data import Dataset

from connectomics.cellmap.catalog import Catalog, Crop, box_of
from connectomics.config import RunConfig
from connectomics.data.patch_reader import PatchReader
from connectomics.data.patches import PackedPatch
from connectomics.data.sampling import PatchRequest
from connectomics.errors import InputError, MissingError, require_known
from connectomics.geometry import Box, Triple
from connectomics.io.multiscale import Multiscale
from connectomics.io.store import StoreOptions, is_s3

log = logging.getLogger(__name__)

_MOST_PARTS = 256  # of one data set, the largest


class FixedPatches(Dataset[PackedPatch]):
    """The patches of some requests, by number."""

    def __init__(self, reader: PatchReader, requests: Sequence[PatchRequest]) -> None:
        self.reader, self.requests = reader, list(requests)

    def __len__(self) -> int:
        return len(self.requests)

    def __getitem__(self, number: int) -> PackedPatch:
        return self.reader.read(self.requests[number])


def raw_parts(config: RunConfig) -> tuple[list[Crop], list[Crop]]:
    """Return parts of raw volumes to train and to validate on, as crops without labels.

    They are ``pretraining.boxes``, or all stored raw of ``dataset.datasets``. Of each part, the end of the axis that
    holds most patches is held out, ``1 - dataset.train_val_split`` of its length, with a gap of one patch; with another
    ``dataset.split`` than ``crop``, the data sets ``dataset.held_out`` are.

    Raises:
        UnknownNameError, MissingError: there is no such data set, or none of its raw is stored.
        InputError: a box is not valid or lies outside of the raw, or there is nothing to train on.
    """
    data = config.dataset
    catalog = Catalog.open(data.data_root, StoreOptions(cache_bytes=config.data.chunk_cache_mb << 20))
    names = catalog.datasets if data.datasets is None else data.datasets
    boxes: dict[str, list[Box]] = {}
    for name, box in map(box_of, config.pretraining.boxes):
        boxes.setdefault(name, []).append(box)
    for what, given in (("pretraining.boxes", boxes), ("dataset.held_out", data.held_out)):
        require_known("data set", given, names, f"dataset.datasets ({what})")
    train: list[Crop] = []
    val: list[Crop] = []
    for name in boxes or names:
        raw = catalog.raw_location(name)
        source = Multiscale.open(raw, catalog.options)
        for number, box in enumerate(boxes.get(name) or stored_boxes(source, config.voxel_size), start=1):
            inside = box.intersect(source.grid.box)
            if inside.is_empty:
                raise InputError(f"pretraining.boxes: {box} lies outside of the raw of {name}, {source.grid.box}")
            part = Crop(name, f"raw{number}", raw, {}, catalog.options, region=inside)
            if data.split != "crop":
                (val if name in data.held_out else train).append(part)
                continue
            own, held = _cut(inside, data.train_val_split, np.multiply(config.patch, config.voxel_size).tolist())
            train.append(replace(part, region=own))
            val += [] if held.is_empty else [replace(part, region=held)]
    if not train:
        raise InputError("dataset.held_out leaves no raw to train on; name fewer data sets")
    volumes = [sum(float(np.prod(crop.box.extent)) for crop in side) / 1e9 for side in (train, val)]
    log.info(
        "raw without labels: %.3g um^3 to train on, %.3g um^3 held out, of %s", *volumes, ", ".join(boxes or names)
    )
    return train, val


def stored_boxes(source: Multiscale, voxel_size: Triple) -> list[Box]:
    """Return boxes (nm) around the connected parts of raw whose chunks are stored, at the level for a voxel size: at
    most 256, the largest. On S3 the chunks are not listed, and the whole volume is returned."""
    from scipy import ndimage

    level = source.levels[source.level_for(voxel_size)]
    if is_s3(source.location):
        return [level.grid.box]
    array, begin, end = source.chunks_behind(level.grid)
    layers = [array.present_chunks((z, *begin[1:]), (z + 1, *end[1:])) for z in range(begin[0], end[0])]
    there = np.concatenate(layers)
    found = []
    for spans in ndimage.find_objects(ndimage.label(there)[0]):
        low = [s.start * c for s, c in zip(spans, level.chunks, strict=True)]
        high = [min(s.stop * c, n) for s, c, n in zip(spans, level.chunks, level.grid.shape, strict=True)]
        found.append(level.grid.crop(low, np.subtract(high, low).tolist()).box)
    if not found:
        raise MissingError(f"{source.location}: no chunk of its level {level.path} is stored; fetch some raw")
    return sorted(found, key=lambda box: -float(np.prod(box.extent)))[:_MOST_PARTS]


def _cut(box: Box, share: float, patch: Sequence[float]) -> tuple[Box, Box]:
    """Return the training and the held-out part of a box; ``patch`` in nm is the gap, or less in a small box."""
    axis = int(np.argmax(np.divide(box.extent, patch)))
    begin, length = box.begin[axis], share * box.extent[axis]
    gap = 0.0 if share == 1 else min(patch[axis], length / 2)
    return box.between(axis, begin, begin + length - gap), box.between(axis, begin + length, box.end[axis])
