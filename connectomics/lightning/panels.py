"""Pictures of a validation crop: one row per class; columns raw, label, known, prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.geometry import VoxelGrid

_GAP = 4  # pixels between tiles
_LARGEST = 256  # largest side of a tile in pixels; larger planes are subsampled
_ROWS = 16  # largest number of classes
_GREEN, _ORANGE = (64, 220, 96), (255, 150, 32)


@dataclass
class Plane:
    """One z plane of a crop.

    Attributes:
        name: data set and crop, for the title.
        raw: (H, W) float32, of any range; shown from its smallest value to its largest.
        label, known, probability: (C, H, W); float32 0/1, bool, float32 in [0, 1].
    """

    name: str
    raw: NDArray[np.float32]
    label: NDArray[np.float32]
    known: NDArray[np.bool_]
    probability: NDArray[np.float32]

    @classmethod
    def empty(cls, name: str, raw: NDArray[np.float32], channels: int) -> Plane:
        """Return a plane of raw (H, W) without labels and prediction."""
        shape = (channels, *raw.shape)
        return cls(name, raw, np.zeros(shape, np.float32), np.zeros(shape, np.bool_), np.zeros(shape, np.float32))

    def fill(self, grid: VoxelGrid, block: VoxelGrid, values: Sequence[NDArray[Any]]) -> None:
        """Copy label, known, probability (C, d, h, w) of a block that contains the middle z plane of ``grid``."""
        z, (first, top, left) = grid.shape[0] // 2, np.rint(grid.to_index(block.translation)).astype(int)
        if first <= z < first + block.shape[0]:
            at = (slice(top, top + block.shape[1]), slice(left, left + block.shape[2]))
            for target, value in zip((self.label, self.known, self.probability), values, strict=True):
                target[:, *at] = value[:, z - first]


def panel(plane: Plane) -> NDArray[np.uint8]:
    """Return the picture, (height, width, 3) uint8.

    The label column darkens unknown voxels, to distinguish them from absent ones (plain raw); the known column is white
    where voxels are known; the color of the prediction column is as strong as the probability.
    """
    step = max(1, -(-max(plane.raw.shape) // _LARGEST))
    thin = (slice(None, None, step), slice(None, None, step))
    low, high = float(plane.raw.min()), float(plane.raw.max())
    shown = (plane.raw[thin] - low) / (high - low) if high > low else np.full_like(plane.raw[thin], 0.5)
    gray = shown[..., None].repeat(3, axis=-1)
    rows = []
    for channel in range(min(len(plane.label), _ROWS)):
        label, known, probability = (a[channel][thin] for a in (plane.label, plane.known, plane.probability))
        shown = _tint(gray, _GREEN, np.where(known, label, 0) * 0.6)
        shown[~known] *= 0.4
        tiles = [gray, shown, known[..., None].repeat(3, axis=-1), _tint(gray, _ORANGE, probability * 0.7)]
        rows.append(_join([np.asarray(t, dtype=np.float64) for t in tiles], axis=1))
    return (_join(rows, axis=0) * 255).round().astype(np.uint8)


def gray_panel(rows: Sequence[Sequence[NDArray[np.float32]]]) -> NDArray[np.uint8]:
    """Return rows of pictures (H, W) as one, (height, width, 3) uint8; the first of each row sets its gray range."""
    lines = []
    for row in rows:
        step = max(1, -(-max(row[0].shape) // _LARGEST))
        low, high = float(row[0].min()), float(row[0].max())
        shown = [np.clip((tile[::step, ::step] - low) / max(high - low, 1e-6), 0, 1) for tile in row]
        lines.append(_join([np.asarray(tile, np.float64)[..., None].repeat(3, axis=-1) for tile in shown], axis=1))
    return (_join(lines, axis=0) * 255).round().astype(np.uint8)


def _tint(
    image: NDArray[np.float32], color: tuple[int, int, int], strength: NDArray[np.floating[Any]]
) -> NDArray[np.float64]:
    amount = np.clip(strength, 0, 1)[..., None].astype(np.float64)
    return image * (1 - amount) + np.asarray(color, dtype=np.float64) / 255 * amount


def _join(tiles: list[NDArray[np.float64]], axis: int) -> NDArray[np.float64]:
    """Join tiles along ``axis`` with white gaps."""
    shape = list(tiles[0].shape)
    shape[axis] = _GAP
    parts = [part for tile in tiles for part in (tile, np.ones(shape))][:-1]
    return np.concatenate(parts, axis=axis)
