"""The Lightning data module: catalog, split, volumes, sampler and loaders of a run."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset

from connectomics.cellmap.catalog import Crop
from connectomics.config import EPOCH_PATCHES, RunConfig
from connectomics.config.few_labels import is_pretraining
from connectomics.data.cache import cache_folder, prepare
from connectomics.data.contents import LabelCounter, present_shares
from connectomics.data.dataset.build import patch_options, run_dataset
from connectomics.data.dataset.dataset_cellmap import CellMapMultiClassDataset, PatchOptions
from connectomics.data.loader import PatchLoader
from connectomics.data.normalization import Chosen, of_crops
from connectomics.data.patches import collate
from connectomics.data.raw_parts import FixedPatches, raw_parts
from connectomics.data.run_split import check_known, run_crops, run_split
from connectomics.data.sampling import PatchSampler, check_sampling
from connectomics.data.seen_data import changes, seen_data
from connectomics.data.splits import Split
from connectomics.data.unlabeled import PairedPatches, collate_pairs, unlabeled_dataset, unlabeled_parts
from connectomics.data.validation_windows import seen_parts
from connectomics.data.volumes import CropVolume
from connectomics.errors import ConfigError, InputError, first_of, number_of
from connectomics.io.store import StoreOptions
from connectomics.machine import is_first_process, usable_cores
from connectomics.progress import Progress

log = logging.getLogger(__name__)


class ValidationCrops(Dataset[CropVolume | None]):
    """Whole crops, one per item: validation slides a window over each and reads as it goes.

    Each process gets its share, padded with None to equal length, since validating processes synchronize at each step.
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
        """``run_dir``: folder for the split if ``dataset.split_file`` is not set. ``progress``: reports crops decoded
        into the cache; None logs a line now and then."""
        super().__init__()
        self.config = config
        self.run_dir = run_dir
        self.progress = progress
        self.split: Split | None = None
        self.normalization: dict[str, Chosen] = {}  # of each data set, after `setup`
        self.present_shares: dict[str, float] = {}  # of the training crops, if ``model.class_weights`` needs them
        self._train: CellMapMultiClassDataset | None = None
        self._val: CellMapMultiClassDataset | None = None
        self._unlabeled: CellMapMultiClassDataset | None = None  # for ``training.mean_teacher``
        self._seen: dict[str, dict[str, Any]] = {}  # what a checkpoint keeps, after `setup`

    def setup(self, stage: str | None = None) -> None:
        """Find the crops, split them, and decode them into the cache if there is one."""
        if self._train is not None:
            return
        cfg = self.config
        if cfg.dataset.name != "cellmap":
            raise ConfigError(
                f"training needs all classes in a sample: expected dataset.name=cellmap, got {cfg.dataset.name!r} (for "
                "use in your own code)"
            )
        if cfg.model.in_channels != 1:
            raise ConfigError(
                f"patches have one channel of raw; model.in_channels is {cfg.model.in_channels}, set it to 1"
            )
        check_sampling(cfg.data.sampling, cfg.data.class_weights, cfg.dataset.classes)  # before any decoding
        options = patch_options(cfg)
        without_labels = is_pretraining(cfg)
        train, val = raw_parts(cfg) if without_labels else self._split_crops(options)
        self.normalization = of_crops(cfg, [*train, *val])
        further: list[Crop] = []
        if cfg.training.mean_teacher.weight > 0:
            further = unlabeled_parts(cfg, train, val)
            new = of_crops(cfg, [part for part in further if part.dataset not in self.normalization])
            self.normalization |= new
        normalizations = {name: chosen.normalization for name, chosen in self.normalization.items()}
        options = replace(options, normalizations=normalizations)
        self._train = run_dataset(cfg, train, "train", options)
        self._val = run_dataset(cfg, val if without_labels else seen_parts(cfg, val), "val", options)
        prepare(
            (*self._train.all_volumes, *self._val.all_volumes),
            processes=min(max(1, cfg.data.num_workers), usable_cores()),
            budget=None if cfg.data.cache_gb is None else int(cfg.data.cache_gb * 1e9),
            progress=self.progress,
        )
        check_known(self._train.volumes)
        self._unlabeled = unlabeled_dataset(cfg, further, options) if further else None
        self._seen = seen_data(self._volumes())

    # -- what a checkpoint keeps -------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Return the split, and `seen_data` of all crops, as they were at `setup`."""
        split = self.split
        return {"seen": self._seen, "split": None if split is None else [list(split.train), list(split.val)]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raise `InputError` if crops have changed since the run of a checkpoint, which resumes, has seen them, and
        `ConfigError` if it would validate on others; warn if it would train on others."""
        if (split := state_dict.get("split")) and self.split is not None:
            train, val = map(set, split)
            if other := sorted(val ^ set(self.split.val)):
                raise ConfigError(
                    f"cannot resume: the split was edited after the run began, and {_are(other)} "
                    "validated on only now, or no longer; restore the split, or start another run with model.weights"
                )
            if (other := sorted(train ^ set(self.split.train))) and is_first_process():
                log.warning(
                    "the split was edited after the run began: %s trained on only now, or no longer", _are(other)
                )
        changed = changes(state_dict["seen"], self._volumes(), "the checkpoint")
        if changed:
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise InputError(
                f"cannot resume: the {', the '.join(changed[:3])}{more} changed after the run began; to train on the "
                f"new data, start another run (--run-dir) with model.weights={self.run_dir or 'CHECKPOINT'}; to "
                "resume, restore the data"
            )
        self._seen = {**state_dict["seen"], **self._seen}

    def _volumes(self) -> list[CropVolume]:
        """All volumes that training reads."""
        assert self._val is not None, "setup() comes first"
        unlabeled = self._unlabeled.all_volumes if self._unlabeled else []
        return [*self.train_dataset.all_volumes, *self._val.all_volumes, *unlabeled]

    def _split_crops(self, options: PatchOptions) -> tuple[list[Crop], list[Crop]]:
        """Return the training and the validation crops, and keep their split."""
        cfg = self.config
        store = StoreOptions(cache_bytes=cfg.data.chunk_cache_mb << 20)
        crops = run_crops(cfg, options=store)
        file = self.run_dir / "split.yaml" if self.run_dir else None
        if cfg.dataset.split_file:
            file = Path(cfg.dataset.split_file)
        folder = cache_folder(options.cache, options.cache_dir)  # counts are kept beside decoded crops
        counter = LabelCounter(None if folder is None else folder / "counts")
        self.split, train, val = run_split(cfg, crops, file, counter)
        if file is not None and not file.is_file() and is_first_process():
            self.split.save(file)
        if isinstance(cfg.model.class_weights, str):
            self.present_shares = present_shares(train, cfg.dataset.classes, counter)
        return train, val

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
        """Return the sampler of this process's share of each epoch."""
        data = self.config.data
        rank, world = self._place()
        return PatchSampler(
            self.train_dataset.sampled_crops(objects=data.sampling.get("instance", 0) > 0),
            EPOCH_PATCHES if data.patches_per_epoch is None else data.patches_per_epoch,
            classes=self.train_dataset.classes, sampling=data.sampling, class_weights=data.class_weights,
            seed=self.config.system.seed, rank=rank, world=world, regions=self.train_dataset.reader.regions,
        )  # fmt: skip

    def _place(self) -> tuple[int, int]:
        """This process's number, and the number of processes."""
        trainer = self.trainer
        return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)

    def train_dataloader(self) -> PatchLoader:
        """Return batches of `collate`."""
        data = self.config.data
        sampler = self.sampler()
        if len(sampler) < data.batch_size:
            raise ConfigError(
                f"an epoch gives each process {number_of(len(sampler), 'patch')}, less than one batch (data.batch_size "
                f"{data.batch_size}), so no step would be taken; raise data.patches_per_epoch or lower data.batch_size"
            )
        workers = min(data.num_workers, usable_cores())
        if workers < data.num_workers:
            log.info("data.num_workers is %d, but this process may use only %d cores", data.num_workers, workers)
        dataset: Dataset[Any] = self.train_dataset
        if self._unlabeled is not None:
            dataset = PairedPatches(self.train_dataset, self._unlabeled, self.config.system.seed)
        if workers:
            # the kernels of the spatial pass are compiled at first use: once here, not in every worker
            dataset[sampler.request(0, 0)]
        return PatchLoader(
            dataset, sampler, batch_size=data.batch_size,
            collate=collate if self._unlabeled is None else collate_pairs, workers=workers, start=data.worker_start,
            persistent=data.persistent_workers, pin_memory=data.pin_memory and torch.cuda.is_available(),
        )  # fmt: skip

    def first_batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """Yield the first patches of training, each as a batch, to count labels: at least 16, and 2^25 voxels."""
        dataset, sampler = self.train_dataset, self.sampler()
        count = min(len(sampler), max(16, 2**25 // math.prod(self.config.data.patch_size)), 256)
        for position in range(count):
            yield collate([dataset.reader.read(sampler.request(0, position))])

    def val_dataloader(self) -> DataLoader[Any]:
        """Return batches of one `CropVolume`, each process its share; for pre-training always of the same patches."""
        if is_pretraining(self.config):
            patches = self._held_out_patches()
            return DataLoader(patches, batch_size=self.config.data.batch_size, collate_fn=collate)
        return DataLoader(ValidationCrops(self.val_volumes, *self._place()), batch_size=1, collate_fn=list)

    def _held_out_patches(self) -> FixedPatches:
        """Return about as many patches of held-out raw as cover it, at most ``data.validation_windows``."""
        assert self._val is not None, "setup() comes first"
        cfg, (rank, world) = self.config, self._place()
        volumes = self._val.volumes
        if not volumes:
            return FixedPatches(self._val.reader, [])
        count = -(-sum(volume.grid.size for volume in volumes) // math.prod(cfg.data.patch_size))
        count = min(count, cfg.data.validation_windows or count)
        sampler = PatchSampler(
            self._val.sampled_crops(), count, classes=self._val.classes, sampling={"volume": 1.0},
            seed=cfg.system.seed, rank=rank, world=world,
        )  # fmt: skip
        return FixedPatches(self._val.reader, list(sampler))


def _are(entries: list[str]) -> str:
    return f"{first_of(entries, 3)} {'is' if len(entries) == 1 else 'are'}"
