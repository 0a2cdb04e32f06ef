"""Section ``learning``: a real training (tutorials/lucchi_gpu.yaml) for the time that is left, and its foreground IoU.

The last fifth of the annotated planes validates; its labels are never trained on. What is trained is the tutorial as it
is, but for the length of the training.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch

from connectomics.cellmap.catalog import EM, GROUND_TRUTH, Catalog, Crop
from connectomics.config import RunConfig, load_config
from connectomics.data.datamodule import CellMapDataModule
from connectomics.data.splits import Split
from connectomics.geometry import VoxelGrid
from connectomics.io.multiscale import Multiscale
from connectomics.io.write import write_multiscale
from connectomics.lightning.devices import set_threads, this_machine
from connectomics.lightning.module import ConnectomicsModule
from connectomics.lightning.trainer import build_trainer
from connectomics.metrics.cellmap_metrics import evaluate_semantic
from connectomics.pipeline.predict import predict_cellmap_crops
from connectomics.pipeline.targets import crop_target
from gpu_sections.record import LeftOutError, Section
from gpu_sections.steps import Turns, measure

RECIPE = Path(__file__).resolve().parents[2] / "tutorials" / "lucchi_gpu.yaml"
DATASET, CLASS = "lucchi-train", "mito"
TRAIN_SHARE = 0.8  # of the planes
_EPOCHS = 10  # each ends with a validation
_EDGE = 96  # voxels along y and x of the tiny version
_TINY = [
    "model.architecture=unet", "model.options={channels: [4, 8], strides: [2], num_res_units: 1}",
    "data.patch_size=[16,32,32]", "data.batch_size=2", "data.num_workers=0", "inference.overlap=0.25",
    "inference.batch_size=2",
]  # fmt: skip


def write_root(data: Path, out: Path, edge: int | None = None) -> Path:
    """Write a data root with the raw and labels of ``data/lucchi-train`` at the voxel size of the recipe.

    ``crop1`` is to train on, ``crop2`` (the last fifth of the planes) to validate on, and ``split.yaml`` says so; 10 nm
    makes it 17 MB. ``edge``: only so many voxels along y and x, from the middle.

    Raises `LeftOutError` if the data is not there.
    """
    if not (data / DATASET).is_dir():
        raise LeftOutError(f"skipped: no data: {data / DATASET} is missing; name its folder with --data")
    if (data / "split.yaml").is_file():  # written by this function
        return data
    (crop,) = Catalog.open(str(data)).crops([DATASET], ["crop1"], [CLASS])
    size = load_config(RECIPE, []).dataset.voxel_size
    label = crop.labels[CLASS].source
    level = label.level_for(size)
    whole = label.levels[level].grid
    wide = (whole.shape[0], *(min(edge or n, n) for n in whole.shape[1:]))
    begin = [(n - m) // 2 for n, m in zip(whole.shape, wide, strict=True)]
    grid = whole.crop(begin, wide)
    raw, inside = crop.raw_source.read_raw(grid)
    if not inside.all():
        raise LeftOutError(f"skipped: the raw of {data / DATASET} is not complete")
    ids = label.read_level(level, begin, grid.shape, absent_is_missing=False)[0]
    base = out / DATASET / f"{DATASET}.zarr"
    attrs = crop.labels[CLASS].annotation.to_attrs(with_counts=False)
    (base / EM).mkdir(parents=True)
    write_multiscale(base / EM / "fibsem-uint8", np.rint(raw).astype(np.uint8), grid)
    cut = round(TRAIN_SHARE * grid.shape[0])
    for name, first, end in (("crop1", 0, cut), ("crop2", cut, grid.shape[0])):
        part = grid.crop((first, 0, 0), (end - first, *grid.shape[1:]))
        (base / GROUND_TRUTH / name).mkdir(parents=True)
        place = base / GROUND_TRUTH / name / CLASS
        write_multiscale(place, np.ascontiguousarray(ids[first:end]), part, kind="label", attrs=attrs)
    Split((f"{DATASET}/crop1",), (f"{DATASET}/crop2",)).save(out / "split.yaml")
    return out


def run(section: Section) -> None:
    """The curve, then the prediction of the validation planes."""
    root: Path | None = None
    with section.row("data", f"{DATASET}, at the voxel size of {RECIPE.name}") as row:
        root = write_root(section.data, section.scratch / "root", _EDGE if section.tiny else None)
        row["Mvoxel"] = Multiscale.open(root / DATASET / f"{DATASET}.zarr" / EM / "fibsem-uint8").grid.size / 1e6
    if root is None:
        return
    config = configuration(section, root)
    speed = None
    with section.row("speed", "steps of the recipe") as row:
        config.data.patches_per_epoch = 20_000
        turns = Turns(1, 0.05) if section.tiny else Turns(5, 3.0)
        speed = measure(validated_by_none(config), section.folder("run"), section.device, turns)
        row["patches/s"] = speed.real
        row["real / constant"] = speed.real / speed.constant
        row["device GB"] = speed.memory
    if speed is None:
        return
    module = _train(section, config, speed.real)
    with section.row("prediction of the validation planes", "after the training, pytc predict") as row:
        _predict(section, config, module, row)


def configuration(section: Section, root: Path) -> RunConfig:
    """The recipe on ``root``."""
    place = [
        f"dataset.data_root={root}", f"dataset.datasets=[{DATASET}]", "dataset.crops=null",
        f"dataset.split_file={root / 'split.yaml'}", f"data.cache_dir={section.scratch / 'crops'}",
        "logging.use_tensorboard=false", "training.max_minutes=null", "training.val_every_n_epochs=1",
        "early_stopping.patience=0", f"system.accelerator={'gpu' if section.device == 'cuda' else 'cpu'}",
    ]  # fmt: skip
    small = [*_TINY, "system.num_cpus=1"] if section.tiny else []
    return load_config(RECIPE, [*place, *small])


def validated_by_none(config: RunConfig) -> RunConfig:
    """The same run without validation crops."""
    import copy

    changed = copy.deepcopy(config)
    changed.dataset.split_file, changed.dataset.train_val_split, changed.dataset.crops = None, 1.0, ["crop1"]
    return changed


@dataclass
class Curve(pl.Callback):
    """A row after each validation, and the end of the training when the time is over."""

    section: Section
    reserve: float  # seconds to leave for what comes after the training
    batch: int
    began: float = field(default_factory=time.monotonic)

    def on_train_start(self, *args: Any) -> None:
        """The clock starts."""
        self.began = time.monotonic()

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """End in time, with a validation."""
        if self.section.left < self.reserve and not self.section.tiny:
            trainer.should_stop = True

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """A point of the curve."""
        seconds = time.monotonic() - self.began
        with self.section.row("foreground IoU against training time", f"{seconds:.0f} s") as row:
            row["steps"] = trainer.global_step
            row["patches"] = trainer.global_step * self.batch
            row["IoU of the validation planes"] = float(trainer.callback_metrics[f"val/{CLASS}/iou"])


def _train(section: Section, config: RunConfig, rate: float) -> ConnectomicsModule:
    """As `connectomics.pipeline.train.train`, for as many steps as the time allows at ``rate`` patches per second."""
    reserve = 25.0
    time_left = max(1.0, section.left - reserve - 3.0 * _EPOCHS)
    epochs = 2 if section.tiny else _EPOCHS
    batches = 1 if section.tiny else max(1, int(time_left * rate / config.data.batch_size / epochs))
    config.training.max_epochs = epochs
    config.data.patches_per_epoch = batches * config.data.batch_size
    machine = this_machine(config)
    set_threads(config, 1)
    pl.seed_everything(config.system.seed, workers=True, verbose=False)
    module, data = ConnectomicsModule(config), CellMapDataModule(config)
    data.setup("fit")
    curve = Curve(section, reserve, config.data.batch_size)
    build_trainer(config, section.folder("run"), machine=machine, callbacks=[curve]).fit(module, datamodule=data)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return module


def _predict(section: Section, config: RunConfig, module: ConnectomicsModule, row: dict[str, Any]) -> None:
    crop: Crop
    (crop,) = Catalog.open(config.dataset.data_root).crops([DATASET], ["crop2"], [CLASS])
    out = section.folder("out")
    began = time.perf_counter()
    (folder,) = predict_cellmap_crops(
        module, config, None, out, targets=[crop_target(crop, [CLASS])], device=section.device
    )
    row["s"] = time.perf_counter() - began
    grid: VoxelGrid = crop.labels[CLASS].grid
    found = Multiscale.open(folder / CLASS).read_level(0, (0, 0, 0), grid.shape)[0] > 127
    truth = crop.labels[CLASS].read_stored((0, 0, 0), grid.shape) > 0
    scores = evaluate_semantic(found.astype(np.uint8), truth.astype(np.uint8))
    row["foreground IoU"] = float(scores["iou"])
    row["voxels present"] = int(truth.sum())
    shutil.rmtree(out, ignore_errors=True)
