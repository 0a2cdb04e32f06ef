"""The whole way on a few thousand voxels, verb by verb in this process: for tests that need what a verb leaves."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from connectomics.cellmap.crop_table import CropTable, TableEntry
from connectomics.cli import main
from connectomics.config import save_config
from connectomics.config.schema import (
    CheckpointConfig,
    DataConfig,
    DatasetConfig,
    InferenceConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    SystemConfig,
    TrainingConfig,
)
from tests.cellmap.roots import grid_of, write_label, write_raw


def pytc(*arguments: object) -> None:
    """Run a verb that must succeed."""
    words = [str(argument) for argument in arguments]
    assert main(words) == 0, words


@dataclass(frozen=True)
class Way:
    """Where everything of one small run is."""

    base: Path

    @property
    def root(self) -> Path:
        """One data set, set-a: raw of 40 voxels of 8 nm a side, crop1 and crop2 with mito (instances) and er."""
        return self.base / "root"

    @property
    def config(self) -> Path:
        return self.base / "run.yaml"

    @property
    def run(self) -> Path:
        return self.base / "run"

    @property
    def checkpoint(self) -> Path:
        return self.run / "checkpoints/last.ckpt"

    @property
    def predictions(self) -> Path:
        return self.base / "predictions"

    @property
    def labels(self) -> Path:
        return self.base / "labels"

    @property
    def table(self) -> Path:
        """A crop table that asks for what crop1 and crop2 hold."""
        return self.base / "table.csv"

    @property
    def truth(self) -> Path:
        return self.base / "truth.zarr"

    @property
    def submission(self) -> Path:
        return self.base / "submission.zip"

    @property
    def scores(self) -> Path:
        return self.base / "scores/scores.json"

    @property
    def evaluation(self) -> Path:
        return self.base / "evaluation.json"


def config_of(root: str | Path, cache: Path) -> RunConfig:
    """A run of one epoch of two patches that asks for a few seconds."""
    return RunConfig(
        name="small",
        system=SystemConfig(num_gpus=0, accelerator="cpu", seed=1),
        dataset=DatasetConfig(data_root=str(root), classes=["mito", "er"], train_val_split=0.5),
        model=ModelConfig(architecture="unet", options={"channels": [4, 8], "strides": [2], "num_res_units": 0}),
        data=DataConfig(
            patch_size=[16, 16, 16],
            num_workers=0,
            patches_per_epoch=2,
            batch_size=2,
            cache_dir=str(cache),
            cache="disk",
        ),
        optimizer=OptimizerConfig(name="AdamW", lr=0.1),
        training=TrainingConfig(max_epochs=1, precision="32"),
        checkpoint=CheckpointConfig(save_last=True),
        inference=InferenceConfig(block_size=[32, 32, 32], window=[16, 16, 16]),
    )


def make_data(way: Way) -> None:
    """Data root, crop table and truth."""
    rng = np.random.default_rng(0)
    write_raw(way.root, "set-a", rng.integers(0, 255, (40, 40, 40), dtype=np.uint8), grid_of((40, 40, 40)), levels=2)
    rows = []
    for number, start in ((1, 64.0), (2, 128.0)):
        grid = grid_of((16, 16, 16), 8, start)
        ids = np.zeros((16, 16, 16), np.uint8)
        ids[2:7, 2:7, 2:7], ids[9:14, 9:14, 9:14] = 1, 2
        for name, values, kind in (("mito", ids, "instance"), ("er", np.roll(ids > 0, 3, 1).astype(np.uint8), "")):
            write_label(way.root, "set-a", f"crop{number}", name, values, grid, kind=kind)
            rows.append(TableEntry(number, "set-a", name, grid))
            _write_truth(way.truth, f"crop{number}", name, values)
    CropTable(tuple(rows)).save(way.table)


def _write_truth(truth: Path, crop: str, name: str, values: np.ndarray) -> None:
    """One plain Zarr v2 array, as the challenge's truth has it."""
    folder = truth / crop / name
    folder.mkdir(parents=True)
    for group in (truth, truth / crop):
        (group / ".zgroup").write_text('{"zarr_format": 2}')
    about = {"voxel_size": [8, 8, 8], "translation": [0, 0, 0]}
    (folder / ".zattrs").write_text(json.dumps(about))
    meta = {"zarr_format": 2, "shape": values.shape, "chunks": values.shape, "dtype": "|u1", "compressor": None,
            "fill_value": 0, "filters": None, "order": "C", "dimension_separator": "."}  # fmt: skip
    (folder / ".zarray").write_text(json.dumps(meta))
    (folder / "0.0.0").write_bytes(values.tobytes())


def go(base: Path) -> Way:
    """Data, one epoch, prediction, labels, evaluation, submission, score."""
    way = Way(base)
    make_data(way)
    save_config(config_of(way.root, base / "cache"), way.config)
    pytc("train", way.config, "--run-dir", way.run)
    pytc("predict", way.config, "--checkpoint", way.checkpoint, "--out", way.predictions, "--device", "cpu")
    pytc("decode", way.predictions, way.labels, "decoding.default.threshold=0.25")
    pytc("evaluate", way.labels, way.root, "--out", way.evaluation)
    pytc("export", way.labels, way.submission, "--crops", way.table)
    pytc("score", way.submission, way.truth, "--crops", way.table, "--out", way.scores.parent)
    return way
