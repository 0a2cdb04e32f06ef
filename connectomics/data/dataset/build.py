"""The data set that a configuration names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from connectomics.config import RunConfig
from connectomics.data.dataset.dataset_cellmap import (
    CellMapDataset,
    CellMapMultiClassDataset,
    Mode,
    PatchOptions,
)
from connectomics.errors import unknown_name


def patch_options(cfg: RunConfig) -> PatchOptions:
    """The `PatchOptions` of a run."""
    span = cfg.data.intensity_range
    return PatchOptions(
        seed=cfg.system.seed,
        balance=cfg.data.balance,
        intensity_range=None if span is None else (span[0], span[1]),
        use_cache=cfg.data.use_cache,
        cache_dir=cfg.data.cache_dir,
        cache_context=cfg.data.cache_context,
    )


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
