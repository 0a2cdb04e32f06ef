"""The data set that a configuration names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, cast

import numpy as np

from connectomics.cellmap.catalog import Crop
from connectomics.config import RunConfig
from connectomics.config.heads import head_classes, instance_classes
from connectomics.data.augmentation import PatchAugmentor, augmentations_of
from connectomics.data.dataset.dataset_cellmap import CellMapDataset, CellMapMultiClassDataset, Mode, PatchOptions
from connectomics.data.normalization import of_crops
from connectomics.data.patch_reader import PatchShape
from connectomics.data.run_split import run_crops
from connectomics.errors import require_known
from connectomics.geometry import index, triple
from connectomics.io.store import StoreOptions


def patch_options(cfg: RunConfig) -> PatchOptions:
    """Return the `PatchOptions` of a run."""
    data = cfg.data
    return PatchOptions(
        seed=cfg.system.seed, cache=cast('Literal["none", "memory", "disk"]', data.cache), cache_dir=data.cache_dir,
        cache_context=data.cache_context, allow_missing_raw=data.allow_missing_raw, min_known=data.min_known,
        inputs=inputs_of(cfg), chunk_cache_bytes=data.chunk_cache_mb << 20, instances=instance_classes(cfg),
        regions=data.sampling.get("hard", 0) > 0, alternate_ties=data.label_ties == "alternate",
        soft_labels=data.soft_labels,
    )  # fmt: skip


def run_dataset(
    cfg: RunConfig, crops: Sequence[Crop], mode: Mode, options: PatchOptions | None = None
) -> CellMapMultiClassDataset:
    """Return the patches of a run in these crops, with its augmentation if ``mode`` is "train".

    The augmentation moves all inputs alike, so it reads as far as the widest input reaches. ``options`` None stands for
    `patch_options`.
    """
    chosen = patch_options(cfg) if options is None else options
    if not chosen.normalizations:
        chosen = replace(chosen, normalizations=normalizations(cfg, crops))
    augmentor = None
    if mode != "train":  # IDs for gaps are only needed in training
        chosen = replace(chosen, instances=head_classes(cfg))
    if mode == "train":
        extents = [np.asarray(cfg.data.patch_size, np.float64)]
        extents += [np.multiply(shape, np.divide(size, cfg.dataset.voxel_size)) for size, shape in inputs_of(cfg)]
        widest = np.max(extents, axis=0).tolist()
        augmentations, _ = augmentations_of(cfg.data, cfg.dataset.voxel_size)
        augmentor = PatchAugmentor.of(augmentations, cfg.data.patch_size, widest, cfg.dataset.voxel_size)
    return CellMapMultiClassDataset.of_crops(
        crops, cfg.dataset.classes, mode, cfg.data.patch_size, cfg.dataset.voxel_size, augmentor, chosen
    )


def normalizations(cfg: RunConfig, crops: Sequence[Crop]) -> dict[str, Any]:
    """Return the `Normalization` of each data set of a run, see `connectomics.data.normalization`."""
    return {name: chosen.normalization for name, chosen in of_crops(cfg, crops).items()}


def inputs_of(cfg: RunConfig) -> tuple[PatchShape, ...]:
    """Return ``data.inputs`` as (voxel size in nm, shape in voxels), z y x."""
    shapes = ((given.voxel_size, given.patch_size) for given in cfg.data.inputs)
    return tuple(PatchShape(triple(size), index(shape)) for size, shape in shapes)


def get_dataset(
    cfg: RunConfig, augmentor: Callable[[dict[str, Any]], dict[str, Any]] | None, mode: Mode = "train"
) -> CellMapDataset | CellMapMultiClassDataset:
    """Return the data set that ``dataset.name`` names: ``cellmap`` has all classes in a sample, ``cellmap_single`` one.

    Images are normalized and centered as the network gets them, which is measured here unless the configuration stores
    it. For a torch ``DataLoader`` with workers see `CropPatches`.
    """
    kinds: dict[str, type[CellMapDataset] | type[CellMapMultiClassDataset]]
    kinds = {"cellmap": CellMapMultiClassDataset, "cellmap_single": CellMapDataset}
    require_known("data set kind", [cfg.dataset.name], kinds, "dataset.name")
    options = patch_options(cfg)
    crops = run_crops(cfg, options=StoreOptions(cache_bytes=options.chunk_cache_bytes))
    return kinds[cfg.dataset.name](
        data_root=cfg.dataset.data_root, datasets=cfg.dataset.datasets, crops=cfg.dataset.crops,
        classes=cfg.dataset.classes, mode=mode, patch_size=cfg.data.patch_size, resolution=cfg.dataset.voxel_size,
        augmentor=augmentor, mode_kwargs=vars(replace(options, normalizations=normalizations(cfg, crops))),
    )  # fmt: skip
