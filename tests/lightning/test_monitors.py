"""A metric that a run would never log is refused before it begins."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from connectomics.config.schema import HeadConfig
from connectomics.errors import ConfigError, UnknownNameError
from connectomics.geometry import VoxelGrid
from connectomics.lightning.module import ConnectomicsModule
from connectomics.lightning.monitors import logged_names
from connectomics.pipeline.train import train
from tests.lightning.heads_run import HeadCrop, HeadData, head_config
from tests.lightning.synthetic_run import MadeUpCrop, MadeUpData, tiny_config


class NoEr(MadeUpCrop):
    """Its second class is known, and absent."""

    def read_labels(self, grid: VoxelGrid) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        label, known = super().read_labels(grid)
        label[1] = 0
        return label, known


class Unpredictable(MadeUpData):
    """Validation crops of which the last alone holds the second class."""

    def __init__(self, crops: int = 2) -> None:
        super().__init__(patches=2, crops=crops)
        self.crops = [*(NoEr(crop.name, crop.grid) for crop in self.crops[:-1]), self.crops[-1]]


@pytest.mark.parametrize("group", ["checkpoint", "early_stopping"])
@pytest.mark.parametrize(
    ("monitor", "near"), [("val/dcie", "val/dice"), ("val/mitp/dice", "val/mito/dice"), ("dice", "val/dice")]
)
def test_an_unknown_name_is_refused_before_training(group: str, monitor: str, near: str, tmp_path: Path) -> None:
    config = tiny_config(**{f"{group}__monitor": monitor})
    with pytest.raises(
        UnknownNameError, match=rf"unknown metric '{monitor}' in {group}\.monitor; did you mean '{near}'"
    ):
        train(config, tmp_path / "run", datamodule=MadeUpData(patches=2))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("group", ["checkpoint", "early_stopping"])
@pytest.mark.parametrize(
    ("monitor", "wrong"), [("train/loss", "max"), ("val/mito/distance/mae", "max"), ("val/dice", "min")]
)
def test_the_wrong_end_of_a_metric_is_refused_before_training(
    group: str, monitor: str, wrong: str, tmp_path: Path
) -> None:
    """The worst state would be kept as the best one."""
    config = head_config("distance")
    for key, value in (("monitor", monitor), ("mode", wrong)):
        setattr(getattr(config, group), key, value)
    with pytest.raises(
        ConfigError, match=rf"{group}\.mode is {wrong}, but the m..imum of {monitor} is better; set {group}\.mode="
    ):
        train(config, tmp_path / "run", datamodule=HeadData(patches=2))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("group", ["checkpoint", "early_stopping"])
def test_a_class_that_the_validation_crops_do_not_hold_is_refused_before_training(group: str, tmp_path: Path) -> None:
    config = tiny_config(**{f"{group}__monitor": "val/er/dice"})
    data = MadeUpData(patches=2)
    data.crops = [NoEr(crop.name, crop.grid) for crop in data.crops]
    with pytest.raises(ConfigError, match=rf"{group}\.monitor is val/er/dice, which is never logged: .* er is present"):
        train(config, tmp_path / "run", datamodule=data)
    assert not (tmp_path / "run" / "metrics.csv").exists()
    unused = {"checkpoint": {"checkpoint__save_top_k": 0}, "early_stopping": {"early_stopping__patience": 0}}[group]
    config = tiny_config(**{f"{group}__monitor": "val/er/dice"}, **unused, training__max_epochs=1)
    assert train(config, tmp_path / "run", datamodule=data).epochs == 1  # nothing goes by it


def test_a_head_without_objects_is_refused_before_training(tmp_path: Path) -> None:
    class Nothing(HeadCrop):
        def read_ids(self, grid: VoxelGrid) -> NDArray[np.int32]:
            return np.full((1, *grid.shape), -1, np.int32)

    config = head_config("affinities")
    config.checkpoint.monitor = "val/mito/affinities/dice"
    data = HeadData(patches=2)
    data.crops = [Nothing(crop.name, crop.grid) for crop in data.crops]
    with pytest.raises(ConfigError, match=r"never logged: .* mito is present, or no object ids of it"):
        train(config, tmp_path / "run", datamodule=data)


@pytest.mark.parametrize("lr", [0.0, 0.5])
def test_a_class_is_logged_at_every_validation_and_chosen_by(lr: float, tmp_path: Path) -> None:
    config = tiny_config(
        checkpoint__monitor="val/er/dice",
        early_stopping__monitor="val/er/dice",
        training__max_epochs=3,
        optimizer__lr=lr,
    )
    result = train(config, tmp_path / "run", datamodule=Unpredictable())
    with (tmp_path / "run" / "metrics.csv").open() as file:
        values = [float(row["val/er/dice"]) for row in csv.DictReader(file) if row["val/er/dice"]]
    assert len(values) == 3
    assert result.best == pytest.approx(max(values))


def test_training_metrics_can_be_monitored(tmp_path: Path) -> None:
    """The early stop looks at them at the end of an epoch, when they are known."""
    changes: dict[str, Any] = {
        f"{group}__{key}": value
        for group in ("checkpoint", "early_stopping")
        for key, value in (("monitor", "train/loss"), ("mode", "min"))
    }
    config = tiny_config(**changes, early_stopping__patience=2, training__val_every_n_epochs=2, training__max_epochs=4)
    assert train(config, tmp_path / "run", datamodule=MadeUpData(patches=2)).best is not None


def test_what_can_be_monitored_is_what_is_logged(tmp_path: Path) -> None:
    config = head_config("affinities", "boundary", "distance", "lsd")
    config.training.max_epochs = 1
    config.logging.images = False
    train(config, tmp_path / "run", datamodule=HeadData(patches=2))
    with (tmp_path / "run" / "metrics.csv").open() as file:
        columns = set(csv.DictReader(file).fieldnames or ())
    assert set(logged_names(config)) <= columns
    config.model.heads = [HeadConfig(kind="boundary", class_name="mito")]
    config.checkpoint.monitor = "val/mito/distance/mae"
    with pytest.raises(UnknownNameError, match="did you mean"):
        ConnectomicsModule(config)
