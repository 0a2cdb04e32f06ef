"""Small data roots made by hand, for tests that need to know every voxel."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.cellmap.annotation import Annotation
from connectomics.geometry import VoxelGrid
from connectomics.io.write import ensure_group, write_multiscale

GROUND_TRUTH = "recon-1/labels/groundtruth"


def zarr_of(root: Path, dataset: str) -> Path:
    return root / dataset / f"{dataset}.zarr"


def write_raw(root: Path, dataset: str, data: NDArray[Any], grid: VoxelGrid, levels: int = 1) -> Path:
    location = zarr_of(root, dataset) / "recon-1" / "em" / "fibsem-uint8"
    ensure_group(location.parent)
    write_multiscale(location, data, grid, levels=levels, kind="raw")
    return location


def write_label(
    root: Path,
    dataset: str,
    crop: str,
    class_name: str,
    data: NDArray[Any],
    grid: VoxelGrid,
    *,
    unknown: int | None = None,
    kind: str = "semantic",
    counts: Mapping[str, int] | None = None,
    levels: int = 1,
) -> Path:
    location = zarr_of(root, dataset) / GROUND_TRUTH / crop / class_name
    ensure_group(location.parent)
    if counts is None:
        n_unknown = 0 if unknown is None else int((data == unknown).sum())
        counts = {"absent": int((data == 0).sum()), "unknown": n_unknown}
    annotation = Annotation(class_name, "instance" if kind == "instance" else "semantic", 0, unknown, counts)
    write_multiscale(location, data, grid, levels=levels, kind="label", attrs=annotation.to_attrs())
    return location


def grid_of(shape: tuple[int, int, int], voxel: float = 8.0, start: float = 0.0) -> VoxelGrid:
    """A grid whose first face is at ``start`` nm on every axis."""
    return VoxelGrid((voxel,) * 3, (start + voxel / 2,) * 3, shape)


def plain_root(root: Path, shape: tuple[int, int, int] = (16, 16, 16), voxel: float = 8.0) -> Path:
    """One data set, one crop, one class: raw noise and a mito cube."""
    rng = np.random.default_rng(0)
    write_raw(root, "set-a", rng.integers(0, 255, shape, dtype=np.uint8), grid_of(shape, voxel))
    label = np.zeros(shape, np.uint8)
    label[4:10, 4:10, 4:10] = 1
    write_label(root, "set-a", "crop1", "mito", label, grid_of(shape, voxel))
    return root
