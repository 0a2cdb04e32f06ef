"""Raw and label come out registered: at every voxel size of the challenge, every training voxel size, and after every
spatial augmentation. The volumes are closed-form: a ball with a soft edge in raw, a hard one in the label."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from connectomics.cellmap.catalog import Catalog
from connectomics.data.augmentation import build_augmentor
from connectomics.data.volumes import CropVolume
from connectomics.geometry import VoxelGrid
from tests.cellmap.roots import write_label, write_raw

#: label voxel sizes of the challenge's training crops (nm, z y x)
LABEL_SIZES = [
    (2.0, 2.0, 2.0), (1.62, 2.0, 2.0), (1.68, 2.0, 2.0), (1.72, 2.0, 2.0), (1.74, 2.0, 2.0), (2.28, 2.0, 2.0),
    (2.62, 2.0, 2.0), (4.0, 4.0, 4.0), (8.0, 8.0, 8.0), (16.0, 16.0, 16.0), (32.0, 32.0, 32.0),
]  # fmt: skip
RAW_TO_LABEL = (1.0, 2.0, 0.5)  # raw voxel size over label voxel size
TRAINING_SIZES = (4.0, 8.0, 16.0, 32.0)
#: within this many voxels of the training grid
TOLERANCE = 0.1


def ball(grid: VoxelGrid, center: NDArray[np.float64], radius: float, soft: float) -> NDArray[np.float64]:
    """1 inside, 0 outside, at the voxel centres; the edge ``soft`` nm wide (0: hard)."""
    z, y, x = grid.axes()
    distance = np.sqrt(
        (z[:, None, None] - center[0]) ** 2 + (y[None, :, None] - center[1]) ** 2 + (x[None, None, :] - center[2]) ** 2
    )
    if soft == 0:
        return (distance < radius).astype(np.float64)
    return np.clip((radius - distance) / soft + 0.5, 0, 1)


def centroid(grid: VoxelGrid, weight: NDArray[np.floating]) -> NDArray[np.float64]:
    """World position (nm) of the centre of mass."""
    z, y, x = grid.axes()
    total = weight.sum()
    return np.array([
        (weight.sum((1, 2)) * z).sum() / total, (weight.sum((0, 2)) * y).sum() / total,
        (weight.sum((0, 1)) * x).sum() / total,
    ])  # fmt: skip


def make_root(
    root: Path, label_size: tuple[float, ...], raw_ratio: float, training: float, center: NDArray[np.float64]
) -> None:
    """A ball of five training voxels' radius (at least five of the coarsest voxel), in a crop that just holds it."""
    coarsest = max(training, *label_size, *(s * raw_ratio for s in label_size))
    radius = 4.5 * coarsest
    half = radius + 2 * coarsest
    for kind, size in (("label", np.array(label_size)), ("raw", np.array(label_size) * raw_ratio)):
        # grids start at whole numbers of their own voxels: a raw voxel's face is a label voxel's face
        first = np.floor((center - half) / size) * size + size / 2
        shape = tuple(int(n) for n in np.ceil(2 * half / size) + 1)
        grid = VoxelGrid(tuple(size), tuple(first), shape)
        if kind == "raw":
            values = np.rint(55 + 145 * ball(grid, center, radius, 2 * coarsest)).astype(np.uint8)
            write_raw(root, "set-a", values, grid, levels=3)
        else:
            write_label(root, "set-a", "crop1", "mito", ball(grid, center, radius, 0).astype(np.uint8), grid, levels=3)


def offsets(volume: CropVolume) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Centroids of raw and label as the network gets them, nm."""
    raw, inside = volume.read_raw(volume.grid)
    label, known = volume.read_labels(volume.grid)
    weight = np.where(inside, np.clip(raw.astype(float) - 55, 0, None), 0)
    return centroid(volume.grid, weight), centroid(volume.grid, np.where(known[0], label[0], 0))


def cases() -> list[Any]:
    """All pairs; fine labels of large volumes, where a case takes seconds, are slow but one."""
    return [
        pytest.param(
            size, training, id="x".join(map(str, size)) + f"-{training}",
            marks=[pytest.mark.slow] if training > 12 * size[0] and size[0] != 2.62 else [],
        )
        for size in LABEL_SIZES
        for training in TRAINING_SIZES
    ]  # fmt: skip


@pytest.mark.parametrize(("label_size", "training"), cases())
def test_raw_and_label_are_registered(tmp_path: Path, label_size: tuple[float, ...], training: float) -> None:
    center = np.array([3132.21, 899.0, 25863.0]) + np.array([0.31, -0.17, 0.43]) * training
    for ratio in RAW_TO_LABEL:
        root = tmp_path / f"{ratio}"
        make_root(root, label_size, ratio, training, center)
        volume = CropVolume(Catalog.open(str(root)).crops()[0], ("mito",), (training,) * 3)
        raw, label = offsets(volume)
        # where stored voxels are coarser than the training grid's, they bound what can be known
        voxel = max(training, max(label_size) * max(1.0, ratio))
        assert np.abs(raw - label).max() < TOLERANCE * voxel, f"raw {ratio} times the label's voxels"
        assert np.abs(label - center).max() < TOLERANCE * voxel
        assert np.abs(raw - center).max() < TOLERANCE * voxel


def test_taking_translation_for_a_corner_would_be_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The measure is sharp enough: half a raw voxel of difference, as the corner convention gives, is seen."""
    center = np.array([3132.21, 899.0, 25863.0])
    make_root(tmp_path, (2.62, 2.0, 2.0), 2.0, 4.0, center)
    volume = CropVolume(Catalog.open(str(tmp_path)).crops()[0], ("mito",), (4.0,) * 3)
    raw, label = offsets(volume)
    assert np.abs(raw - label).max() < TOLERANCE * 4.0
    source = volume.crop.raw_source
    grid = source.levels[0].grid
    as_corner = tuple(t + s / 2 for t, s in zip(grid.translation, grid.voxel_size, strict=True))
    label_source = volume.crop.labels["mito"].source
    label_grid = label_source.levels[0].grid
    label_as_corner = np.add(label_grid.translation, np.divide(label_grid.voxel_size, 2))
    shift = np.subtract(np.subtract(as_corner, grid.translation), np.subtract(label_as_corner, label_grid.translation))
    assert np.abs(shift).max() > TOLERANCE * 4.0  # what a reader with the corner convention would be off by
    moved = np.abs((raw + shift) - label).max()
    assert moved > TOLERANCE * 4.0


SPATIAL = {
    "RandFlipd": {"prob": 1.0, "spatial_axis": [0, 1, 2]},
    "RandRotate90d": {"prob": 1.0, "spatial_axes": [[0, 1], [0, 2], [1, 2]]},
    "RandAffined": {
        "prob": 1.0, "rotate_range": [0.6, 0.6, 0.6], "scale_range": [0.1, 0.1, 0.1], "shear_range": [0.1] * 6,
        "translate_range": [2, 2, 2], "mode": ["bilinear", "nearest"],
    },
    "RandZoomd": {"prob": 1.0, "min_zoom": 0.8, "max_zoom": 1.2},
    "RandRotated": {"prob": 1.0, "range_x": 0.6, "range_y": 0.6, "range_z": 0.6},
    "Rand3DElasticd": {"prob": 1.0, "sigma_range": [5, 7], "magnitude_range": [100, 200]},
}  # fmt: skip


@pytest.mark.parametrize("name", SPATIAL)
def test_augmentation_keeps_them_registered(name: str) -> None:
    augmentor = build_augmentor({name: {"keys": ["image", "label"], **SPATIAL[name]}}, (32, 32, 32))
    assert augmentor is not None
    grid = VoxelGrid((1.0, 1.0, 1.0), (0.0, 0.0, 0.0), (32, 32, 32))
    center = np.array([14.3, 16.9, 15.4])
    image = ball(grid, center, 8.0, 2.0).astype(np.float32)
    label = ball(grid, center, 8.0, 0.0).astype(np.float32)
    differences = []
    for seed in range(12):
        augmentor.seed(seed)
        out = augmentor({"image": image[None], "label": label[None], "known": np.ones((1, 32, 32, 32), bool)})
        differences.append(centroid(grid, out["image"][0]) - centroid(grid, out["label"][0]))
    # a 0/1 label can lag behind a move of less than half a voxel, to either side alike; what must not be is a bias
    assert np.abs(differences).max() < 0.5
    assert np.abs(np.mean(differences, axis=0)).max() < TOLERANCE
