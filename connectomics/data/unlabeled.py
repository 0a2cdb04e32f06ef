"""Patches without labels next to the labeled ones, for semi-supervised training (``training.mean_teacher``)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from connectomics.cellmap.catalog import Catalog, Crop
from connectomics.config import RunConfig
from connectomics.config.few_labels import RECONSTRUCTION
from connectomics.data.dataset.build import run_dataset
from connectomics.data.dataset.dataset_cellmap import CellMapMultiClassDataset, PatchOptions
from connectomics.data.patches import PackedPatch, collate
from connectomics.data.raw_parts import stored_boxes
from connectomics.data.sampling import PatchRequest, PatchSampler
from connectomics.errors import require_known
from connectomics.io.multiscale import Multiscale
from connectomics.io.store import StoreOptions

log = logging.getLogger(__name__)


def unlabeled_parts(config: RunConfig, train: Sequence[Crop], val: Sequence[Crop]) -> list[Crop]:
    """Return all stored raw of ``training.mean_teacher.datasets`` as crops without labels.

    The raw of validation crops is excluded: it counts as missing there.

    Raises:
        UnknownNameError, MissingError: there is no such data set, or none of its raw is stored.
    """
    catalog = Catalog.open(config.dataset.data_root, StoreOptions(cache_bytes=config.data.chunk_cache_mb << 20))
    chosen = config.training.mean_teacher.datasets
    parts: list[Crop] = []
    for name in list(dict.fromkeys(crop.dataset for crop in train)) if chosen is None else chosen:
        require_known("data set", [name], catalog.datasets, "training.mean_teacher.datasets")
        raw = catalog.raw_location(name)
        excluded = tuple(crop.box for crop in val if crop.dataset == name)
        for number, box in enumerate(stored_boxes(Multiscale.open(raw, catalog.options), config.voxel_size), start=1):
            parts.append(Crop(name, f"raw{number}", raw, {}, catalog.options, region=box, excluded=excluded))
    volume = sum(float(np.prod(part.box.extent)) for part in parts) / 1e9
    log.info("mean teacher: %.3g um^3 of raw, of %s", volume, ", ".join(dict.fromkeys(part.dataset for part in parts)))
    return parts


def unlabeled_dataset(config: RunConfig, parts: Sequence[Crop], options: PatchOptions) -> CellMapMultiClassDataset:
    """Return the patches of `unlabeled_parts`, with the spatial augmentation of the run; read without the crop cache.

    ``options``: those of the labeled patches. The only class of a patch is known where raw counts.
    """
    config = replace(config, dataset=replace(config.dataset, classes=[RECONSTRUCTION]))
    options = replace(
        options, cache="none", allow_missing_raw=True, min_known=0.0, instances=(), regions=False,
        alternate_ties=False, soft_labels=False,
    )  # fmt: skip
    return run_dataset(config, parts, "train", options)


class PairedPatches(Dataset[tuple[PackedPatch, PackedPatch]]):
    """For each request of a labeled patch, that patch and one without labels, drawn by volume.

    Which one depends on seed, epoch and position of the request only.
    """

    def __init__(self, labeled: CellMapMultiClassDataset, unlabeled: CellMapMultiClassDataset, seed: int) -> None:
        self.labeled, self.unlabeled = labeled, unlabeled
        crops, classes = unlabeled.sampled_crops(), unlabeled.classes
        self._sampler = PatchSampler(crops, 1, classes=classes, sampling={"volume": 1.0}, seed=seed + 1)

    def __getitem__(self, request: PatchRequest) -> tuple[PackedPatch, PackedPatch]:
        _, epoch, position, *_ = request.seed
        other = self._sampler.request(epoch, position)
        return self.labeled.reader.read(request), self.unlabeled.reader.read(other)


def collate_pairs(pairs: Sequence[tuple[PackedPatch, PackedPatch]]) -> dict[str, Any]:
    """Return the batch of the labeled patches (`collate`), with that of the others as ``unlabeled``."""
    labeled, unlabeled = zip(*pairs, strict=True)
    batch: dict[str, Any] = dict(collate(labeled))
    others: dict[str, torch.Tensor] = collate(unlabeled)
    return {**batch, "unlabeled": others}
