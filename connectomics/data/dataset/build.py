"""The data set that a configuration names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, cast

import numpy as np

from connectomics.cellmap.catalog import Catalog, Crop
from connectomics.config import RunConfig
from connectomics.config.heads import head_classes
from connectomics.data.augmentation import PatchAugmentor
from connectomics.data.dataset.dataset_cellmap import (
    CellMapDataset,
    CellMapMultiClassDataset,
    Mode,
    PatchOptions,
)
from connectomics.data.normalization import of_crops
from connectomics.errors import unknown_name
from connectomics.geometry import Index, Triple, triple
from connectomics.io.normalization import Normalization
from connectomics.io.store import StoreOptions


def patch_options(cfg: RunConfig) -> PatchOptions:
    """The `PatchOptions` of a run."""
    data = cfg.data
    return PatchOptions(
        seed=cfg.system.seed,
        cache=cache_mode(cfg),
        cache_dir=data.cache_dir,
        cache_context=data.cache_context,
        allow_missing_raw=data.allow_missing_raw,
        min_known=data.min_known,
        inputs=views_of(cfg),
        chunk_cache_bytes=data.chunk_cache_mb << 20,
        instances=instance_classes(cfg),
    )


def run_dataset(
    cfg: RunConfig, crops: Sequence[Crop], mode: Mode, options: PatchOptions | None = None
) -> CellMapMultiClassDataset:
    """The patches of a run in these crops; for training with its augmentation, which moves all views alike and so reads
    as far as the widest of them does. ``options``: None for the run's own (`patch_options`)."""
    chosen = patch_options(cfg) if options is None else options
    if not chosen.normalizations:
        chosen = replace(chosen, normalizations=normalizations(cfg, crops))
    augmentor = None
    if mode == "train":
        extents = [np.asarray(cfg.data.patch_size, np.float64)]
        extents += [np.multiply(shape, np.divide(size, cfg.dataset.voxel_size)) for size, shape in views_of(cfg)]
        widest = np.max(extents, axis=0).tolist()
        augmentor = PatchAugmentor.of(cfg.data.augmentations, cfg.data.patch_size, widest, cfg.dataset.voxel_size)
    return CellMapMultiClassDataset.of_crops(
        crops, cfg.dataset.classes, mode, cfg.data.patch_size, cfg.dataset.voxel_size, augmentor, chosen
    )


def normalizations(cfg: RunConfig, crops: Sequence[Crop]) -> dict[str, Normalization]:
    """The normalization of each data set of a run, see `connectomics.data.normalization`."""
    return {name: chosen.normalization for name, chosen in of_crops(cfg, crops).items()}


def instance_classes(cfg: RunConfig) -> tuple[str, ...]:
    """The classes of a run whose objects are told apart in its batches: those of ``model.heads``."""
    return head_classes(cfg)


def views_of(cfg: RunConfig) -> tuple[tuple[Triple, Index], ...]:
    """``data.inputs`` as (voxel size in nm, shape in voxels), z y x."""
    return tuple(
        (triple(view.voxel_size), (view.patch_size[0], view.patch_size[1], view.patch_size[2]))
        for view in cfg.data.inputs
    )


def cache_mode(cfg: RunConfig) -> Literal["none", "memory", "disk"]:
    """Return ``data.cache``."""
    return cast('Literal["none", "memory", "disk"]', cfg.data.cache)


def get_dataset(
    cfg: RunConfig, augmentor: Callable[[dict[str, Any]], dict[str, Any]] | None, mode: Mode = "train"
) -> CellMapDataset | CellMapMultiClassDataset:
    """``dataset.name: cellmap`` gives all classes a sample, ``cellmap_single`` one class a sample. Images are as the
    run's network gets them, centered."""
    kinds: dict[str, type[CellMapDataset] | type[CellMapMultiClassDataset]]
    kinds = {"cellmap": CellMapMultiClassDataset, "cellmap_single": CellMapDataset}
    if cfg.dataset.name not in kinds:
        raise unknown_name("data set kind", cfg.dataset.name, kinds, "dataset.name")
    options = patch_options(cfg)
    crops = Catalog.open(cfg.dataset.data_root, StoreOptions(cache_bytes=options.chunk_cache_bytes)).crops(
        cfg.dataset.datasets, cfg.dataset.crops, cfg.dataset.classes
    )
    options = replace(options, normalizations=normalizations(cfg, crops))
    return kinds[cfg.dataset.name](
        data_root=cfg.dataset.data_root,
        datasets=cfg.dataset.datasets,
        crops=cfg.dataset.crops,
        classes=cfg.dataset.classes,
        mode=mode,
        patch_size=cfg.data.patch_size,
        resolution=cfg.dataset.voxel_size,
        augmentor=augmentor,
        mode_kwargs=vars(options),
    )
