"""The Lightning data module: catalog, split, volumes, sampler and loaders of a run."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from torch.utils.data import DataLoader, Dataset

from connectomics.cellmap.catalog import Catalog, Crop
from connectomics.config import EPOCH_PATCHES, RunConfig
from connectomics.data.cache import Progress, cache_folder, prepare
from connectomics.data.contents import LabelCounter
from connectomics.data.dataset.build import cache_mode, patch_options, run_dataset
from connectomics.data.dataset.dataset_cellmap import CellMapMultiClassDataset
from connectomics.data.loader import PatchLoader
from connectomics.data.normalization import Chosen, of_crops
from connectomics.data.patches import collate
from connectomics.data.run_split import check_known, run_split
from connectomics.data.sampling import PatchSampler, SampledCrop, check_sampling, foreground_points
from connectomics.data.splits import Split
from connectomics.data.validation_windows import WindowShape, validation_parts
from connectomics.data.volumes import CropVolume
from connectomics.errors import ConfigError
from connectomics.geometry import VoxelGrid
from connectomics.io.store import StoreOptions

log = logging.getLogger(__name__)


class ValidationCrops(Dataset[CropVolume | None]):
    """Whole crops, one an item: validation slides a window over each, reading as it goes.

    Each process gets its share, filled up with None to equal length: processes that validate meet at every step.
    """

    def __init__(self, volumes: Sequence[CropVolume], rank: int, world: int) -> None:
        share = -(-len(volumes) // world)
        own: list[CropVolume | None] = list(volumes[rank::world])
        self.volumes = own + [None] * (share - len(own))

    def __len__(self) -> int:
        return len(self.volumes)

    def __getitem__(self, index: int) -> CropVolume | None:
        return self.volumes[index]


class CellMapDataModule(pl.LightningDataModule):
    """Training patches (`PatchSampler`, augmented) and whole validation crops of the data that a run names."""

    def __init__(self, config: RunConfig, run_dir: Path | None = None, progress: Progress | None = None) -> None:
        """``run_dir``: where the split is written if ``dataset.split_file`` names no place for it. ``progress``: told
        (done, all, name) while crops are decoded into the cache; None logs a line now and then."""
        super().__init__()
        self.config = config
        self.run_dir = run_dir
        self.progress = progress
        self.split: Split | None = None
        self.normalization: dict[str, Chosen] = {}  # of each data set, after `setup`
        self._train: CellMapMultiClassDataset | None = None
        self._val: CellMapMultiClassDataset | None = None

    def setup(self, stage: str | None = None) -> None:
        """Find the crops, split them, and decode them into the cache where there is one."""
        if self._train is not None:
            return
        cfg = self.config
        if cfg.dataset.name != "cellmap":
            raise ConfigError(
                f"training needs all classes a sample (dataset.name=cellmap), found {cfg.dataset.name!r}; "
                "cellmap_single is for use by hand"
            )
        if cfg.model.in_channels != 1:
            raise ConfigError(
                f"patches have one channel of raw; model.in_channels is {cfg.model.in_channels}, set it to 1"
            )
        check_sampling(cfg.data.sampling, cfg.data.class_weights, cfg.dataset.classes)  # before any decoding
        store = StoreOptions(cache_bytes=cfg.data.chunk_cache_mb << 20)
        crops = Catalog.open(cfg.dataset.data_root, store).crops(
            cfg.dataset.datasets, cfg.dataset.crops, cfg.dataset.classes
        )
        file = self._split_file()
        self.split, train, val = run_split(cfg, crops, file, self._counter())
        if file is not None and not file.is_file() and _is_first_process():
            self.split.save(file)
        self.normalization = of_crops(cfg, [*train, *val])
        normalizations = {name: chosen.normalization for name, chosen in self.normalization.items()}
        options = replace(patch_options(cfg), normalizations=normalizations)
        self._train = run_dataset(cfg, train, "train", options)
        self._val = run_dataset(cfg, self._looked_at(val), "val", options)
        volumes = (*self._train.all_volumes, *self._val.all_volumes)
        prepare(
            volumes,
            processes=min(max(1, cfg.data.num_workers), os.cpu_count() or 1),
            budget=None if cfg.data.cache_gb is None else int(cfg.data.cache_gb * 1e9),
            progress=self.progress,
        )
        check_known(self._train.volumes)

    def _split_file(self) -> Path | None:
        """Where the split is read from, or written to if it does not exist."""
        if self.config.dataset.split_file:
            return Path(self.config.dataset.split_file)
        return self.run_dir / "split.yaml" if self.run_dir else None

    def _counter(self) -> LabelCounter:
        """Counts of label voxels are kept beside decoded crops, if those are kept."""
        folder = cache_folder(cache_mode(self.config), self.config.data.cache_dir)
        return LabelCounter(None if folder is None else folder / "counts")

    def _looked_at(self, crops: Sequence[Crop]) -> list[Crop]:
        """The validation crops, or, if they take more windows than ``data.validation_windows``, the parts of them that
        every validation of the run looks at."""
        cfg = self.config
        parts = validation_parts(
            [VoxelGrid.covering(crop.box, cfg.dataset.voxel_size) for crop in crops],
            validation_shape(cfg),
            cfg.data.validation_windows,
            lambda number, name: foreground_points(crops[number], name, cfg.system.seed),
            cfg.dataset.classes,
            cfg.system.seed,
        )
        found = []
        for crop, tiles in zip(crops, parts, strict=True):
            is_whole = len(tiles) == 1 and tiles[0].box.contains(crop.box, tolerance=1e-6)
            found += [crop] if is_whole else [replace(crop, region=tile.box.intersect(crop.box)) for tile in tiles]
        if len(found) > len(crops):
            log.info(
                "validation looks at %d fixed parts of %d crops: at most data.validation_windows=%d windows",
                len(found), len(crops), cfg.data.validation_windows,
            )  # fmt: skip
        return found

    # -- loaders -----------------------------------------------------------------------------------------------------
    @property
    def train_dataset(self) -> CellMapMultiClassDataset:
        """The training patches; `setup` first."""
        assert self._train is not None, "setup() comes first"
        return self._train

    @property
    def val_volumes(self) -> list[CropVolume]:
        """The validation crops; `setup` first."""
        assert self._val is not None, "setup() comes first"
        return self._val.volumes

    def sampler(self) -> PatchSampler:
        """The sampler of this process's share of each epoch."""
        dataset = self.train_dataset
        data = self.config.data
        rank, world = self._place()
        crops = [
            SampledCrop(v.dataset, float(v.grid.size), {c: dataset.points(i, c) for c in dataset.classes})
            for i, v in enumerate(dataset.volumes)
        ]
        return PatchSampler(
            crops,
            EPOCH_PATCHES if data.patches_per_epoch is None else data.patches_per_epoch,
            classes=dataset.classes,
            sampling=data.sampling,
            class_weights=data.class_weights,
            seed=self.config.system.seed,
            rank=rank,
            world=world,
        )

    def _place(self) -> tuple[int, int]:
        """This process's number and how many there are."""
        trainer = self.trainer
        return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)

    def train_dataloader(self) -> PatchLoader:
        """Batches of `collate`."""
        data = self.config.data
        sampler = self.sampler()
        if len(sampler) < data.batch_size:
            raise ConfigError(
                f"an epoch gives each process {len(sampler)} patches, less than one batch (data.batch_size "
                f"{data.batch_size}), so no step would be taken; raise data.patches_per_epoch or lower data.batch_size"
            )
        workers = min(data.num_workers, os.cpu_count() or 1)
        if workers < data.num_workers:
            log.info("data.num_workers is %d, this machine has %d cores: using %d", data.num_workers, workers, workers)
        if workers:
            # the kernels of the spatial pass are compiled at their first use: once here, not in every worker
            self.train_dataset[sampler.request(0, 0)]
        return PatchLoader(
            self.train_dataset,
            sampler,
            batch_size=data.batch_size,
            collate=collate,
            workers=workers,
            start=data.worker_start,
            persistent=data.persistent_workers,
            pin_memory=data.pin_memory and _has_cuda(),
        )

    def val_dataloader(self) -> DataLoader[Any]:
        """One `CropVolume` a batch, each process its share."""
        return DataLoader(ValidationCrops(self.val_volumes, *self._place()), batch_size=1, collate_fn=list)


def validation_shape(config: RunConfig) -> WindowShape:
    """How a run's validation slides over crops."""
    window, inference = config.inference.window or config.data.patch_size, config.inference
    return WindowShape((window[0], window[1], window[2]), inference.overlap, inference.context, inference.block_size)


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _is_first_process() -> bool:
    return all(os.environ.get(name, "0") == "0" for name in ("LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))
