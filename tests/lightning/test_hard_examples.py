"""Hard examples: the loss of patches decides where the next epoch looks, and a resumed run looks there too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from connectomics.data.regions import region_weights
from connectomics.errors import ConfigError
from connectomics.lightning.checkpoints import read_checkpoint
from connectomics.pipeline.train import train
from tests.lightning.requested_patches import REGIONS
from tests.lightning.resume_run import run
from tests.lightning.synthetic_run import MadeUpData, tiny_config

HARD: dict[str, Any] = {"data__sampling": {"hard": 1.0}, "checkpoint__every_n_steps": 1}


def regions_of(folder: Path) -> list[list[Any]]:
    """[epoch, batch, regions] of every batch; of what was done twice, the last time."""
    rows = {(r[1], r[2]): r[4] for r in map(json.loads, (folder / "diary.txt").read_text().splitlines())}
    return [[*key, rows[key]] for key in sorted(rows)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hard") / "run"
    run(folder, workers=0, **HARD)
    return folder


def averages_of(folder: Path) -> np.ndarray:
    return read_checkpoint(folder / "checkpoints" / "last.ckpt")["HardExamples"]["averages"].numpy()


def test_averages_are_those_of_the_regions_that_were_seen(undisturbed: Path) -> None:
    seen = {region for _, _, regions in regions_of(undisturbed) for region in regions}
    found = averages_of(undisturbed)
    assert found.shape == (len(REGIONS),)
    assert set(np.flatnonzero(~np.isnan(found))) == seen
    assert (found[list(seen)] > 0).all()
    weights = region_weights(found)
    assert (weights[np.isnan(found)] == weights.max()).all()


@pytest.mark.parametrize("die_at", [(1, 4), (2, 0)])
def test_a_resumed_run_draws_the_same_patches(undisturbed: Path, tmp_path: Path, die_at: tuple[int, int]) -> None:
    folder = tmp_path / "run"
    with pytest.raises(ArithmeticError):
        run(folder, workers=0, die_at=die_at, **HARD)
    run(folder, workers=0, **HARD)
    assert regions_of(folder) == regions_of(undisturbed)
    np.testing.assert_array_equal(averages_of(folder), averages_of(undisturbed))
    states = [read_checkpoint(f / "checkpoints" / "last.ckpt")["state_dict"] for f in (folder, undisturbed)]
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())


def test_workers_draw_the_same_patches(undisturbed: Path, tmp_path: Path) -> None:
    run(tmp_path / "run", workers=2, **HARD)
    assert regions_of(tmp_path / "run") == regions_of(undisturbed)


def test_a_loader_without_regions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.sampling\.hard needs a loader with a PatchSampler"):
        train(tiny_config(data__sampling={"hard": 1.0}), tmp_path / "run", datamodule=MadeUpData())
