"""Crops for tests of volumes, cache and patches."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from connectomics.cellmap.catalog import Catalog
from connectomics.data.volumes import CropVolume
from connectomics.geometry import VoxelGrid
from tests.cellmap.roots import write_label, write_raw


def volume_of(root: Path, crop: int = 0, classes: tuple[str, ...] = ("mito", "ld"), **options: Any) -> CropVolume:
    """A crop of a root at 8 nm."""
    return CropVolume(Catalog.open(str(root)).crops()[crop], classes, (8.0, 8.0, 8.0), **options)


def write_fractional_root(root: Path) -> Path:
    """Raw at 5.24x4x4 with missing chunks, labels at 2.62x2x2 with unknown voxels."""
    rng = np.random.default_rng(5)
    raw_grid = VoxelGrid((5.24, 4.0, 4.0), (100.0, 52.0, 48.0), (100, 130, 140))
    location = write_raw(root, "set-a", rng.integers(1, 255, raw_grid.shape, dtype=np.uint8), raw_grid, levels=2)
    shutil.rmtree(location / "s0/0/1")
    shutil.rmtree(location / "s1/0/0")
    label_grid = VoxelGrid((2.62, 2.0, 2.0), (250.0 - 1.31, 201.0, 201.0), (60, 70, 80))
    values = rng.choice([0, 1, 255], label_grid.shape, p=[0.5, 0.4, 0.1]).astype(np.uint8)
    write_label(root, "set-a", "crop1", "mito", values, label_grid, unknown=255, levels=2)
    return root
