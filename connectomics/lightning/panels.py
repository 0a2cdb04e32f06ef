"""Pictures of a validation crop: one row a class; columns raw, label, known, prediction. Plain numpy, no plotting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_GAP = 4  # pixels between tiles
_LARGEST = 256  # pixels a side of a tile; larger planes are thinned out
_ROWS = 16  # classes shown at most
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


def panel(plane: Plane) -> NDArray[np.uint8]:
    """The picture, (height, width, 3) uint8.

    In the label column unknown voxels are darkened, so that "absent" (plain raw) and "unknown" look different; the
    known column is white where known; in the prediction column the colour is as strong as the probability.
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


def _tint(
    image: NDArray[np.float32], colour: tuple[int, int, int], strength: NDArray[np.floating[Any]]
) -> NDArray[np.float64]:
    amount = np.clip(strength, 0, 1)[..., None].astype(np.float64)
    return image * (1 - amount) + np.asarray(colour, dtype=np.float64) / 255 * amount


def _join(tiles: list[NDArray[np.float64]], axis: int) -> NDArray[np.float64]:
    """Tiles beside (axis 1) or below (axis 0) each other, with a white gap."""
    shape = list(tiles[0].shape)
    shape[axis] = _GAP
    gap = np.ones(shape)
    parts = [part for tile in tiles for part in (tile, gap)][:-1]
    return np.concatenate(parts, axis=axis)
