"""Validation with many classes in bounded memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from connectomics.cellmap.label_codes import LabelCodes, LabelStates
from connectomics.geometry import VoxelGrid
from connectomics.inference.sliding import plan
from connectomics.lightning import validation
from connectomics.lightning.validation import slabs, validation_block
from tests.lightning.synthetic_run import VOXEL, tiny_config

ROOT = Path(__file__).parents[2]


def a_grid(side: int) -> VoxelGrid:
    return VoxelGrid(VOXEL, (0.0, 0.0, 0.0), (side,) * 3)


def test_few_classes_are_validated_in_the_blocks_of_the_configuration() -> None:
    config = tiny_config(inference__block_size=[256, 200, 256])
    assert validation_block(config, a_grid(400), 3, [128] * 3) == [256, 200, 256]
    assert validation_block(config, a_grid(100), 3, [64] * 3) == [100, 100, 100]


@pytest.mark.parametrize("side", [256, 400])
@pytest.mark.parametrize(
    ("blending", "overlap", "asked_gib", "more"), [("gaussian", 0.25, 8, 1.5), ("crop", 0.125, 2, 1)]
)
def test_48_classes_take_no_more_than_3_gib_and_a_half_more_windows(
    side: int, blending: str, overlap: float, asked_gib: int, more: float
) -> None:
    config = tiny_config(inference__block_size=[256] * 3, inference__blending=blending, inference__overlap=overlap)
    size = validation_block(config, a_grid(side), 48, [128] * 3)
    options = dict(channels=48, window=128, overlap=overlap, blending=blending)
    chosen, asked = (plan(a_grid(side), block_size=s, **options) for s in (size, 256))
    assert asked.bytes > asked_gib << 30
    assert chosen.bytes <= 3 << 30
    assert chosen.windows <= more * asked.windows


def test_slabs_are_the_labels_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "_SLAB", 2 * 6 * 7 * 2)
    states = LabelStates(("a", "b"), np.array([[0], [1], [2]], np.uint64), np.array([[0], [3], [2]], np.uint64))
    grid = VoxelGrid(VOXEL, (8.0, 16.0, 24.0), (5, 6, 7))
    rng = np.random.default_rng(0)
    labels = LabelCodes(grid, rng.integers(0, 3, grid.shape, np.uint8), states)
    values = rng.random((3, *grid.shape), np.float32)
    parts = list(slabs(labels, values, ("b", "a")))
    assert [part.grid for part in parts] == [grid.crop((z, 0, 0), (min(2, 5 - z), 6, 7)) for z in (0, 2, 4)]
    label, known = labels.dense(("b", "a"))
    np.testing.assert_array_equal(np.concatenate([part.label for part in parts], 1), label > 0)
    np.testing.assert_array_equal(np.concatenate([part.known for part in parts], 1), known)
    np.testing.assert_array_equal(np.concatenate([part.values for part in parts], 1), values)


CODE = """
import re

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from connectomics.cellmap.label_codes import LabelCodes, LabelStates
from connectomics.lightning import validation
from connectomics.lightning.module import ConnectomicsModule
from tests.lightning.synthetic_run import MadeUpCrop, tiny_config
from tests.lightning.test_validation import a_grid

CLASSES = tuple(f"class{number}" for number in range(48))
STATES = LabelStates(
    CLASSES,
    np.array([[0], *([1 << bit] for bit in range(48))], np.uint64),
    np.array([[0], *([(1 << 48) - 1] for _ in range(48))], np.uint64),
)


class ManyClasses(MadeUpCrop):
    def read_label_codes(self, grid):
        return LabelCodes(grid, np.random.default_rng(0).integers(1, 49, grid.shape, np.uint8), STATES)

    def read_labels(self, grid):
        return self.read_label_codes(grid).dense()


def peak():  # not ru_maxrss: it counts the parent
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024


validation._PREDICTION //= 8  # as much less as 128^3 is less than 256^3
config = tiny_config(dataset__classes=list(CLASSES), inference__block_size=[256] * 3)
config.inference.window = [32] * 3
config.logging.images = False
module = ConnectomicsModule(config)
module.network = torch.nn.Conv3d(1, 48, 1)
trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
before = peak()
crops = DataLoader([ManyClasses("crop1", a_grid(128))], batch_size=1, collate_fn=list)
(found,) = trainer.validate(module, crops, verbose=False)
assert len(found) == 2 + 2 * 48
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_validating_48_classes_takes_no_more_than_one_float_a_voxel_and_class() -> None:
    """Measured in a process of its own: 128^3 voxels, where one float32 a voxel and class is 403 MB."""
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) < 4 * 48 * 128**3
