"""Tissue with dark blobs: a network learns them in seconds, and volumes cut from it show what it says at faces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from connectomics.cellmap.catalog import Catalog
from connectomics.config import RunConfig
from connectomics.data.dataset.build import run_dataset
from connectomics.data.normalization import of_crops
from connectomics.data.patches import centered, collate
from connectomics.data.sampling import PatchRequest
from connectomics.geometry import VoxelGrid
from connectomics.inference.predict_task import PredictTask, run_predict_task
from connectomics.io.multiscale import Multiscale
from connectomics.io.normalization import Normalization
from connectomics.lightning.module import ConnectomicsModule
from connectomics.models.batch_labels import labels_of
from tests.cellmap.roots import grid_of, write_label, write_raw

Index = tuple[int, int, int]
VOXEL = (8.0, 8.0, 8.0)


def blobs(shape: Index, seed: int = 0) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Raw around 150 with blobs around 110, which fill about a quarter, and where these are."""
    rng = np.random.default_rng(seed)
    field = ndimage.gaussian_filter(rng.standard_normal(shape), 4, mode="wrap")
    inside = field > np.quantile(field, 0.75)
    raw = np.where(inside, 110.0, 150.0) + 12 * rng.standard_normal(shape)
    return np.clip(np.rint(raw), 1, 254).astype(np.uint8), inside


def config_of(root: Path, architecture: str, patch: Index, options: dict[str, Any] | None = None) -> RunConfig:
    config = RunConfig()
    config.dataset.data_root = str(root)
    config.dataset.classes = ["mito"]
    config.model.architecture = architecture
    config.model.mednext_size = "S"
    config.model.options = dict(options or {})
    config.data.patch_size = list(patch)
    return config


def write_root(root: Path, raw: NDArray[np.uint8], inside: NDArray[np.bool_]) -> Path:
    shape = (raw.shape[0], raw.shape[1], raw.shape[2])
    write_raw(root, "set-a", raw, grid_of(shape))
    write_label(root, "set-a", "crop1", "mito", inside.astype(np.uint8), grid_of(shape))
    return root


def trained(
    config: RunConfig, steps: int, lr: float = 3e-3, batch: int = 2
) -> tuple[ConnectomicsModule, Normalization]:
    """A network after some steps on random patches of a root's crops, read as training reads them."""
    torch.manual_seed(0)
    module = ConnectomicsModule(config).train()
    crops = Catalog.open(config.dataset.data_root).crops()
    dataset = run_dataset(config, crops, "train")
    optimizer = torch.optim.AdamW((p for p in module.parameters() if p.requires_grad), lr)
    for step in range(steps):
        patches = [dataset.reader.read(PatchRequest(0, None, (step, n))) for n in range(batch)]
        inputs = centered(collate(patches))
        optimizer.zero_grad()
        module.loss(module.network(inputs["image"]), labels_of(inputs)).total.backward()
        optimizer.step()
    return module.eval(), of_crops(config, crops)["set-a"].normalization


def predicted(
    module: ConnectomicsModule,
    normalization: Normalization,
    folder: Path,
    raw: NDArray[np.uint8],
    context: int | None = None,
) -> NDArray[np.bool_]:
    """What the network takes for blobs in a volume of its own."""
    z, y, x = raw.shape
    grid: VoxelGrid = grid_of((z, y, x))
    location = write_raw(folder, "set-a", raw, grid)
    window = module.config.data.patch_size
    task = PredictTask(
        raw=str(location), output=str(folder / "out.zarr" / "crop1"), classes=("mito",), targets={"mito": grid},
        voxel_size=VOXEL, window=(window[0], window[1], window[2]), checkpoint="", normalization=normalization,
        context=None if context is None else (context,) * 3,
    )  # fmt: skip
    run_predict_task(task, module.probabilities)
    return Multiscale.open(f"{task.output}/mito").read_level(0, (0, 0, 0), grid.shape)[0] >= 128


def iou(found: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    return float((found & truth).sum() / max(1, (found | truth).sum()))
