"""Batches of a run as its network gets them: taken from the run's own loader, and explained.

What is shown comes from the loader's batches themselves. What a batch does not say (where its patches are, what they
were drawn for, what was done to them) comes from reading the same requests once more in this process; both must be the
same bit for bit, and the page says so where they are not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from connectomics.config import RunConfig, config_to_dict
from connectomics.data.cache import CropCache, cache_folder
from connectomics.data.datamodule import CellMapDataModule
from connectomics.data.dataset.dataset_cellmap import CellMapMultiClassDataset
from connectomics.data.intensity import BatchAugmentor
from connectomics.data.normalization import with_normalization
from connectomics.data.patches import PackedPatch, collate
from connectomics.data.sampling import PatchRequest
from connectomics.errors import InputError
from connectomics.geometry import Triple, VoxelGrid
from connectomics.report.inspect.loader import LoaderSpeed, take
from connectomics.report.inspect.numbers import (
    LabelNumbers,
    ValueRange,
    by_class,
    image_warnings,
    label_warnings,
)
from connectomics.report.inspect.raw import MissingRaw, RawShare, missing_raw, where_raw_is
from connectomics.report.steps import Progress

_MOST_WARNINGS = 12  # about images, one by one

Done = tuple[tuple[str, Mapping[str, Any]], ...]  # what was done to a patch: name, parameters


@dataclass(frozen=True)
class SeenPatch:
    """One patch as the network gets it.

    Attributes:
        batch, number: which batch, and which patch of it, from 0.
        crop: ``dataset/crop``. grid: where the patch was before augmentation, nm.
        drawn_by: what the sampler drew it for. seed: of its augmentation on the device.
        spatial, intensity: what was done to it in space, and to its values.
        images: float32 (D, H, W) on the unit scale, before they are centered, the run's view first.
        voxel_sizes: of each, nm, z y x.
        codes: (D, H, W). present, known: bool (C, K): what the codes mean.
        values: of each image. labels: the patch in numbers.
        raw: of each image, where there is raw; None where a transform after the reading moved it.
    """

    batch: int
    number: int
    crop: str
    grid: VoxelGrid
    drawn_by: str
    seed: int
    spatial: Done
    intensity: Done
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
    """All that was found.

    Attributes:
        name: of the run. classes: in channel order.
        patches: of all batches, in order. same: whether workers and this process gave the same patches bit for bit.
        asked: batches asked for; an epoch may have fewer.
        speed: of the loader. values: of each image over all patches.
        missing: crops with raw chunks that are not stored. crops: how many crops there are.
        cache: which (none, memory, disk); cache_bytes: what the training crops take in it.
        configuration: the keys that decide the data, dotted, and their values.
    """

    name: str
    classes: tuple[str, ...]
    patches: tuple[SeenPatch, ...]
    same: bool
    asked: int
    speed: LoaderSpeed
    values: tuple[ValueRange, ...]
    missing: tuple[MissingRaw, ...]
    crops: int
    cache: str
    cache_bytes: int
    configuration: dict[str, Any]

    @property
    def batches(self) -> int:
        """How many batches were taken."""
        return self.patches[-1].batch + 1 if self.patches else 0

    def warnings(self) -> list[str]:
        """What looks wrong, in words."""
        said = []
        if not self.same:
            said.append(
                "The loader's workers gave other patches than this process for the same requests. That must not be: "
                "what is shown is the loader's; places and augmentations may be wrong."
            )
        if self.batches < self.asked:
            said.append(f"An epoch has only {self.batches} batches, {self.asked} were asked for: all of them are here.")
        said += label_warnings([p.labels for p in self.patches])
        of_images: list[str] = []
        for patch in self.patches:
            for number, values in enumerate(patch.values):
                view = f", image_{number}" if number else ""
                raw = None if patch.raw is None else patch.raw[number]
                of_images += image_warnings(f"{patch.name}{view}", values, raw)
        said += of_images[:_MOST_WARNINGS]
        if len(of_images) > _MOST_WARNINGS:
            said.append(f"{len(of_images) - _MOST_WARNINGS} more of that kind.")
        if self.missing:
            first = self.missing[0]
            chunks = sum(m.missing for m in self.missing)
            said.append(
                f"{chunks} chunks of raw are not stored, in {len(self.missing)} of {self.crops} crops; labels count as "
                f"unknown there. The first: {first.first} ({first.crop}). Fetch them, or leave those crops out."
            )
        return said

    def to_dict(self) -> dict[str, Any]:
        """The summary as plain data, without pictures."""
        return {
            "name": self.name,
            "batches": self.batches,
            "same_as_loader": self.same,
            "warnings": self.warnings(),
            "known": pooled_known(self.patches),
            "classes": [asdict(row) for row in by_class([p.labels for p in self.patches])],
            "values": [asdict(v) for v in self.values],
            "patches": [
                {
                    "batch": p.batch,
                    "patch": p.number,
                    "crop": p.crop,
                    "grid": p.grid.to_dict(),
                    "drawn_by": p.drawn_by,
                    "seed": p.seed,
                    "spatial": [[name, plain(given)] for name, given in p.spatial],
                    "intensity": [[name, plain(given)] for name, given in p.intensity],
                    "values": [asdict(v) for v in p.values],
                    "labels": asdict(p.labels),
                    "raw": None if p.raw is None else [asdict(share) for share in p.raw],
                }
                for p in self.patches
            ],
            "loader": {
                **asdict(self.speed),
                "patches_per_s": self.speed.patches_per_s,
                "bytes_per_s": self.speed.bytes_per_s,
            },
            "missing_raw": [asdict(m) for m in self.missing],
            "cache": {"kind": self.cache, "bytes": self.cache_bytes},
            "configuration": self.configuration,
        }


def inspect_data(config: RunConfig, batches: int = 2, progress: Progress | None = None) -> Inspection:
    """Take the first batches of a run's first epoch from its own loader and look at them.

    Decodes crops into the run's cache as training would. The batches stay in memory. ``progress``: told after each
    crop whose raw was looked at and each patch: done, of how many, which.

    Raises:
        InputError: ``batches`` below 1. Whatever setting up the data of a training run raises.
    """
    if batches < 1:
        raise InputError(f"batches must be at least 1, found {batches}")
    if config.dataset.split_file is not None and not Path(config.dataset.split_file).is_file():
        # training would write it; to look at data should leave nothing behind
        config = replace(config, dataset=replace(config.dataset, split_file=None))
    module = CellMapDataModule(config)
    module.setup("fit")
    dataset = module.train_dataset
    loader = module.train_dataloader()
    try:
        taken, speed = take(loader, batches, loader.num_workers)
    finally:
        loader.stop()  # persistent workers wait for an epoch that does not come
    requests = list(islice(module.sampler(), len(taken) * config.data.batch_size))
    tell = progress or (lambda done, of, what: None)
    total = len(dataset.volumes) + len(requests)
    missing = []
    for number, volume in enumerate(dataset.volumes, start=1):
        found = missing_raw(volume)
        missing += [found] if found.missing else []
        tell(number, total, volume.crop.key)
    augmentor = BatchAugmentor.of(config)
    patches: list[SeenPatch] = []
    same = True
    for number, batch in enumerate(taken):
        asked = requests[number * config.data.batch_size : (number + 1) * config.data.batch_size]
        read = [dataset[request] for request in asked]
        packed = [patch for patch in read if isinstance(patch, PackedPatch)]  # requests give no others
        same &= equal(batch, collate(packed))
        patches += look_at(number, batch, packed, asked, dataset, augmentor)
        tell(len(dataset.volumes) + len(patches), total, f"batch {number + 1}")
    views = range(len(patches[0].images))
    return Inspection(
        name=config.name,
        classes=dataset.classes,
        patches=tuple(patches),
        same=same,
        asked=batches,
        speed=speed,
        values=tuple(ValueRange.of(np.concatenate([p.images[v].ravel() for p in patches])) for v in views),
        missing=tuple(missing),
        crops=len(dataset.volumes),
        cache=dataset.options.cache,
        cache_bytes=cache_bytes(dataset),
        configuration=data_keys(
            with_normalization(config, {name: found.to_dict() for name, found in module.normalization.items()})
        ),
    )


def look_at(
    number: int,
    batch: Mapping[str, Tensor],
    packed: Sequence[PackedPatch],
    requests: Sequence[PatchRequest],
    dataset: CellMapMultiClassDataset,
    augmentor: BatchAugmentor | None,
) -> list[SeenPatch]:
    """The patches of one batch of the loader, after the augmentation on the device (here: the CPU)."""
    batch = batch if augmentor is None else augmentor(batch)
    views = [name for name in ("image", *(f"image_{n}" for n in range(1, len(batch)))) if name in batch]
    sizes = (dataset.voxel_size, *(view.voxel_size for view, _ in dataset.reader.inputs))
    present, known = batch["present"].numpy(), batch["known_states"].numpy()
    seen = []
    for n, (patch, request) in enumerate(zip(packed, requests, strict=True)):
        images = tuple(batch[name][n, 0].numpy() for name in views)
        codes = batch["codes"][n].numpy()
        shape = (codes.shape[0], codes.shape[1], codes.shape[2])
        there = where_raw_is(dataset.reader, request)
        drawn = () if augmentor is None else augmentor.own.drawn(patch.seed, shape)
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
    """Whether two batches are the same, bit for bit."""
    return first.keys() == second.keys() and all(
        first[k].dtype == second[k].dtype and torch.equal(first[k], second[k]) for k in first
    )


def cache_bytes(dataset: CellMapMultiClassDataset) -> int:
    """Bytes of the entries of the crop cache that are in use, of the crops of a data set; 0 without a cache."""
    folder = cache_folder(dataset.options.cache, dataset.options.cache_dir)
    if folder is None:
        return 0
    crops = {volume.crop.key for volume in dataset.volumes}
    return sum(entry.size for entry in CropCache(folder).entries() if entry.processes and entry.crop in crops)


# -- plain values ------------------------------------------------------------------------------------------------------
def pooled_known(patches: Sequence[SeenPatch]) -> dict[str, float]:
    """``labels``: share of (class, voxel) pairs that are known; ``anything``: of voxels at which some class is."""
    labels = [p.labels for p in patches]
    voxels = sum(n.voxels for n in labels)
    return {
        "labels": sum(n.known_share * n.voxels for n in labels) / voxels,
        "anything": sum(n.anything for n in labels) / voxels,
    }


def data_keys(config: RunConfig) -> dict[str, Any]:
    """Every key of ``dataset`` and ``data``, and the seed, dotted."""
    values = config_to_dict(config)
    keys = {f"{group}.{key}": value for group in ("dataset", "data") for key, value in values[group].items()}
    return {**keys, "system.seed": config.system.seed}


def plain(value: Any) -> Any:
    """Numbers and containers as JSON has them; large arrays by their shape."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray) and value.size > 16:
        return f"array of {' x '.join(map(str, value.shape))}"
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(v) for v in value]
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)


def as_text(value: Any) -> str:
    """A value for people: JSON on one line, numbers with at most four digits."""
    return json.dumps(_rounded(plain(value)), ensure_ascii=False)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
