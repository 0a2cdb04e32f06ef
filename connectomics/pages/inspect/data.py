"""Batches of a run as its network gets them, with an explanation of each patch.

The images and labels are those of the loader's batches. What a batch does not say (where its patches are, what they
were drawn for, how they were augmented) comes from reading the same requests again in this process. Both must be the
same bit for bit; if they are not, the page warns.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from connectomics.config import RunConfig, config_to_dict
from connectomics.data.augmentation import BatchAugmentor
from connectomics.data.cache import CropCache, cache_folder
from connectomics.data.datamodule import CellMapDataModule
from connectomics.data.dataset.dataset_cellmap import CellMapMultiClassDataset
from connectomics.data.normalization import with_normalization
from connectomics.data.patches import PackedPatch, collate
from connectomics.data.sampling import PatchRequest
from connectomics.errors import InputError
from connectomics.geometry import Triple, VoxelGrid
from connectomics.pages.inspect.numbers import (
    LabelNumbers,
    LoaderSpeed,
    MissingRaw,
    RawShare,
    ValueRange,
    by_class,
    image_warnings,
    label_warnings,
    missing_raw,
    take,
    where_raw_is,
)
from connectomics.progress import Progress, silent

_MOST_WARNINGS = 12  # about single images
_SUMMARY = ("crop", "drawn_by", "seed", "spatial", "intensity", "values", "labels", "raw")  # of a patch, as JSON

Augmentations = tuple[tuple[str, Mapping[str, Any]], ...]  # of a patch: name, parameters


@dataclass(frozen=True)
class SeenPatch:
    """One patch as the network gets it.

    Attributes:
        crop: ``dataset/crop``. grid: of the patch before augmentation, nm.
        drawn_by: what the sampler drew it for. seed: of its augmentation on the device.
        images: float32 (D, H, W) in [0, 1] before normalization, one per input of the network.
        codes: (D, H, W). present, known: bool (C, K) by class and code.
        raw: of each image, the share with raw; None if a MONAI transform moved the patch after reading.
    """

    batch: int
    number: int
    crop: str
    grid: VoxelGrid
    drawn_by: str
    seed: int
    spatial: Augmentations
    intensity: Augmentations
    images: tuple[NDArray[np.float32], ...]
    voxel_sizes: tuple[Triple, ...]
    codes: NDArray[np.integer]
    present: NDArray[np.bool_]
    known: NDArray[np.bool_]
    values: tuple[ValueRange, ...]
    labels: LabelNumbers
    raw: tuple[RawShare, ...] | None

    @property
    def name(self) -> str:
        """``batch 1, patch 2 (jrc_cos7-1a/crop234)``, counted from 1."""
        return f"batch {self.batch + 1}, patch {self.number + 1} ({self.crop})"


@dataclass(frozen=True)
class Inspection:
    """Batches and what was measured about them.

    Attributes:
        patches: of all batches. same: whether workers and this process read the same patches bit for bit.
        requested: number of batches to take; an epoch may have fewer. values: of each image over all patches.
        missing: crops with missing raw chunks. crops: number of training crops.
        cache: which crop cache (none, memory, disk); cache_bytes: size of the training crops in it.
        configuration: the keys that decide the data, dotted, and their values.
    """

    name: str
    classes: tuple[str, ...]
    patches: tuple[SeenPatch, ...]
    same: bool
    requested: int
    speed: LoaderSpeed
    values: tuple[ValueRange, ...]
    missing: tuple[MissingRaw, ...]
    crops: int
    cache: str
    cache_bytes: int
    configuration: dict[str, Any]

    @property
    def batches(self) -> int:
        """The number of batches."""
        return self.patches[-1].batch + 1 if self.patches else 0

    def warnings(self) -> list[str]:
        """Return a sentence for each thing that looks wrong."""
        warnings: list[str] = []
        if not self.same:
            warnings.append(
                "The loader's workers gave other patches than this process for the same requests, which is a bug. The "
                "patches shown are the loader's; their positions and augmentations may be wrong."
            )
        if self.batches < self.requested:
            warnings.append(
                f"Requested {self.requested} batches, but an epoch has only {self.batches} batches; all are shown."
            )
        warnings += label_warnings([p.labels for p in self.patches])
        of_images: list[str] = []
        for patch in self.patches:
            for number, values in enumerate(patch.values):
                name = patch.name + (f", image_{number}" if number else "")
                of_images += image_warnings(name, values, None if patch.raw is None else patch.raw[number])
        warnings += of_images[:_MOST_WARNINGS]
        if len(of_images) > _MOST_WARNINGS:
            warnings.append(f"{len(of_images) - _MOST_WARNINGS} more warnings about images.")
        if self.missing:
            first = self.missing[0]
            chunks = sum(m.missing for m in self.missing)
            warnings.append(
                f"{chunks} chunks of raw are missing in {len(self.missing)} of {self.crops} crops; labels count as "
                f"unknown there. The first: {first.first} ({first.crop}). Fetch the chunks, or remove those crops from "
                "the configuration."
            )
        return warnings

    def to_dict(self) -> dict[str, Any]:
        """Return the summary as plain data, without pictures."""
        speed = self.speed
        return {
            "name": self.name,
            "batches": self.batches,
            "same_as_loader": self.same,
            "warnings": self.warnings(),
            "known": pooled_known(self.patches),
            "classes": plain(by_class([p.labels for p in self.patches])),
            "values": plain(self.values),
            "patches": [
                {"batch": p.batch, "patch": p.number, "grid": p.grid.to_dict()}
                | {name: plain(getattr(p, name)) for name in _SUMMARY}
                for p in self.patches
            ],
            "loader": {**plain(speed), "patches_per_s": speed.patches_per_s, "bytes_per_s": speed.bytes_per_s},
            "missing_raw": plain(self.missing),
            "cache": {"kind": self.cache, "bytes": self.cache_bytes},
            "configuration": self.configuration,
        }


def inspect_data(config: RunConfig, batches: int = 2, progress: Progress | None = None) -> Inspection:
    """Take the first batches of a run's first epoch from its own loader and measure them.

    Crops are decoded into the run's cache as in training. The batches stay in memory. ``progress`` is called after
    each crop whose raw was checked and after each batch.

    Raises:
        InputError: ``batches`` is below 1. Errors of the data module pass through.
    """
    progress = progress or silent
    if batches < 1:
        raise InputError(f"batches must be at least 1, got {batches}")
    if config.dataset.split_file is not None and not Path(config.dataset.split_file).is_file():
        # training would write the file; inspecting must not change anything
        config = replace(config, dataset=replace(config.dataset, split_file=None))
    module = CellMapDataModule(config)
    module.setup("fit")
    dataset = module.train_dataset
    loader = module.train_dataloader()
    try:
        taken, speed = take(loader, batches, loader.num_workers)
    finally:
        loader.stop()  # persistent workers would wait for the next epoch
    requests = list(islice(module.sampler(), len(taken) * config.data.batch_size))
    total = len(dataset.volumes) + len(requests)
    missing = []
    for number, volume in enumerate(dataset.volumes, start=1):
        found = missing_raw(volume)
        missing += [found] if found.missing else []
        progress(number, total, volume.crop.key)
    augmentor = BatchAugmentor.of(config)
    patches: list[SeenPatch] = []
    same = True
    for number, batch in enumerate(taken):
        wanted = requests[number * config.data.batch_size : (number + 1) * config.data.batch_size]
        read = [dataset[request] for request in wanted]
        packed = [patch for patch in read if isinstance(patch, PackedPatch)]  # always, for requests
        same &= equal(batch, collate(packed))
        patches += _look_at(number, batch, packed, wanted, dataset, augmentor)
        progress(len(dataset.volumes) + len(patches), total, f"batch {number + 1}")
    return Inspection(
        name=config.name,
        classes=dataset.classes,
        patches=tuple(patches),
        same=same,
        requested=batches,
        speed=speed,
        values=tuple(ValueRange.of(np.stack(images)) for images in zip(*(p.images for p in patches), strict=True)),
        missing=tuple(missing),
        crops=len(dataset.volumes),
        cache=dataset.options.cache,
        cache_bytes=cache_bytes(dataset),
        configuration=_data_keys(
            with_normalization(config, {name: found.to_dict() for name, found in module.normalization.items()})
        ),
    )


def _look_at(
    number: int,
    batch: Mapping[str, Tensor],
    packed: Sequence[PackedPatch],
    requests: Sequence[PatchRequest],
    dataset: CellMapMultiClassDataset,
    augmentor: BatchAugmentor | None,
) -> list[SeenPatch]:
    """Return the patches of one batch of the loader, after the augmentation on the device (here: the CPU)."""
    batch = batch if augmentor is None else augmentor(batch)
    names = [name for name in ("image", *(f"image_{n}" for n in range(1, len(batch)))) if name in batch]
    sizes = (dataset.voxel_size, *(further.voxel_size for further, _ in dataset.reader.inputs))
    present, known = batch["present"].numpy(), batch["known_states"].numpy()
    seen = []
    for n, (patch, request) in enumerate(zip(packed, requests, strict=True)):
        images = tuple(batch[name][n, 0].numpy() for name in names)
        codes = batch["codes"][n].numpy()
        there = where_raw_is(dataset.reader, request)
        drawn = () if augmentor is None else augmentor.own.drawn(patch.seed, codes.shape)
        seen.append(
            SeenPatch(
                batch=number,
                number=n,
                crop=dataset.volumes[request.index].crop.key,
                grid=patch.grid,
                drawn_by=patch.drawn_by,
                seed=patch.seed,
                spatial=patch.augmentation,
                intensity=tuple((name, numbers) for name, _, numbers in drawn),
                images=images,
                voxel_sizes=sizes,
                codes=codes,
                present=present[n],
                known=known[n],
                values=tuple(ValueRange.of(image) for image in images),
                labels=LabelNumbers.of(codes, present[n], known[n], dataset.classes),
                raw=None if there is None else tuple(map(RawShare.of, images, there)),
            )
        )
    return seen


def equal(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """Return whether two batches are the same, bit for bit."""
    return first.keys() == second.keys() and all(
        first[k].dtype == second[k].dtype and torch.equal(first[k], second[k]) for k in first
    )


def cache_bytes(dataset: CellMapMultiClassDataset) -> int:
    """Return the size of a data set's crops in the crop cache, bytes; 0 without a cache."""
    folder = cache_folder(dataset.options.cache, dataset.options.cache_dir)
    if folder is None:
        return 0
    crops = {volume.crop.key for volume in dataset.volumes}
    return sum(entry.size for entry in CropCache(folder).entries() if entry.processes and entry.crop in crops)


# -- plain values ------------------------------------------------------------------------------------------------------
def pooled_known(patches: Sequence[SeenPatch]) -> dict[str, float]:
    """Return ``labels``: share of (class, voxel) pairs that are known; ``anything``: of voxels where some class is."""
    labels = [p.labels for p in patches]
    voxels = sum(n.voxels for n in labels)
    return {
        "labels": sum(n.known_share * n.voxels for n in labels) / voxels,
        "anything": sum(n.anything for n in labels) / voxels,
    }


def _data_keys(config: RunConfig) -> dict[str, Any]:
    """Return every key of ``dataset`` and ``data``, and the seed, dotted."""
    values = config_to_dict(config)
    keys = {f"{group}.{key}": value for group in ("dataset", "data") for key, value in values[group].items()}
    return {**keys, "system.seed": config.system.seed}


def plain(value: Any) -> Any:
    """Return dataclasses, numbers and containers as JSON has them; large arrays as their shape."""
    return json.loads(json.dumps(value, default=_json_value))


def _json_value(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return vars(value)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, np.ndarray) and value.size > 16:
        return f"array of {' x '.join(map(str, value.shape))}"
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)


def as_text(value: Any) -> str:
    """Return a value as JSON on one line, numbers with at most four digits."""
    rounded = json.loads(json.dumps(plain(value)), parse_float=lambda text: float(f"{float(text):.4g}"))
    return json.dumps(rounded, ensure_ascii=False)
