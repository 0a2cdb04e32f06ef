"""The data set that a configuration names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from connectomics.cellmap.catalog import Crop
from connectomics.config import RunConfig
from connectomics.config.heads import head_classes
from connectomics.data.augment import PatchAugmentor
from connectomics.data.dataset.dataset_cellmap import (
    CellMapDataset,
    CellMapMultiClassDataset,
    Mode,
    PatchOptions,
)
from connectomics.errors import unknown_name
from connectomics.geometry import Index, Triple, triple


def patch_options(cfg: RunConfig) -> PatchOptions:
    """The `PatchOptions` of a run."""
    data = cfg.data
    span = data.intensity_range
    return PatchOptions(
        seed=cfg.system.seed,
        intensity_range=None if span is None else (span[0], span[1]),
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
    augmentor = None
    if mode == "train":
        extents = [np.asarray(cfg.data.patch_size, np.float64)]
        extents += [np.multiply(shape, np.divide(size, cfg.dataset.resolution)) for size, shape in views_of(cfg)]
        widest = np.max(extents, axis=0).tolist()
        augmentor = PatchAugmentor.of(
            cfg.data.augmentations, cfg.data.patch_size, widest, bool(chosen.instances), cfg.dataset.resolution
        )
    return CellMapMultiClassDataset.of_crops(
        crops, cfg.dataset.classes, mode, cfg.data.patch_size, cfg.dataset.resolution, augmentor, chosen
    )


def instance_classes(cfg: RunConfig) -> tuple[str, ...]:
    """The classes of a run whose objects are told apart in its batches: those of ``model.heads``."""
    return head_classes(cfg)


def views_of(cfg: RunConfig) -> tuple[tuple[Triple, Index], ...]:
    """``data.inputs`` as (voxel size in nm, shape in voxels), z y x."""
    return tuple(
        (triple(view.resolution), (view.patch_size[0], view.patch_size[1], view.patch_size[2]))
        for view in cfg.data.inputs
    )


def cache_mode(cfg: RunConfig) -> Literal["none", "memory", "disk"]:
    """``data.cache``, and where that is not given what ``data.use_cache`` means."""
    chosen = cfg.data.cache or ("disk" if cfg.data.use_cache else "none")
    if chosen == "none":
        return "none"
    return "memory" if chosen == "memory" else "disk"


def get_dataset(
    cfg: RunConfig, augmentor: Callable[[dict[str, Any]], dict[str, Any]] | None, mode: Mode = "train"
) -> CellMapDataset | CellMapMultiClassDataset:
    """``dataset.name: cellmap`` gives all classes a sample, ``cellmap_single`` one class a sample."""
    kinds: dict[str, type[CellMapDataset] | type[CellMapMultiClassDataset]]
    kinds = {"cellmap": CellMapMultiClassDataset, "cellmap_single": CellMapDataset}
    if cfg.dataset.name not in kinds:
        raise unknown_name("data set kind", cfg.dataset.name, kinds, "dataset.name")
    options = patch_options(cfg)
    return kinds[cfg.dataset.name](
        data_root=cfg.dataset.data_root,
        datasets=cfg.dataset.datasets,
        crops=cfg.dataset.crops,
        classes=cfg.dataset.classes,
        mode=mode,
        patch_size=cfg.data.patch_size,
        resolution=cfg.dataset.resolution,
        augmentor=augmentor,
        mode_kwargs=vars(options),
    )
