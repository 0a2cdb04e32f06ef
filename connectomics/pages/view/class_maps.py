"""Many classes in one layer: at each voxel the number of its class, computed when the viewer asks for it.

If several classes are there, an atomic class wins against a group, a small group against a large one, and among
probabilities the largest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.cellmap.catalog import Crop
from connectomics.cellmap.classes import CLASSES
from connectomics.cellmap.labels import read_labels
from connectomics.decoding.probabilities import as_bytes
from connectomics.geometry import VoxelGrid
from connectomics.io.multiscale import Multiscale
from connectomics.pages.view.volume_server import MadeVolume

_OWN = 1000  # classes that the challenge does not number are counted from here on
_ATOMIC = 100  # rank of an atomic class; a group has one less for each of its atoms


def class_numbers(classes: Iterable[str]) -> dict[str, int]:
    """Return the number of each class in a map: the challenge's, or one from 1000 on for your own."""
    own = sorted(name for name in set(classes) if name not in CLASSES)
    return {name: CLASSES[name].id if name in CLASSES else _OWN + own.index(name) for name in classes}


def merged(
    shares: Iterable[tuple[str, NDArray[Any]]], numbers: Mapping[str, int], shape: Sequence[int]
) -> NDArray[np.uint16]:
    """Return the map of classes, uint16 (D, H, W), 0 if there is none.

    shares: class and its share or probability at each voxel, (D, H, W) from 0 to 1, or bool; from one half on it
    counts.
    """
    out, best = np.zeros(tuple(shape), np.uint16), np.zeros(tuple(shape), np.float32)
    for name, share in shares:
        rank = _ATOMIC - len(CLASSES[name].atoms) if name in CLASSES else _ATOMIC
        score = np.where(share >= 0.5, share.astype(np.float32) + 2 * rank, 0)
        better = score > best
        out[better], best[better] = numbers[name], score[better]
    return out


def truth_map(crop: Crop, classes: Sequence[str]) -> MadeVolume:
    """Return the map of a crop's true classes, on its finest grid."""
    numbers = class_numbers(classes)

    def values(part: VoxelGrid) -> NDArray[np.uint16]:
        labels = read_labels(crop, classes, part)
        return merged(((name, labels.present_of(name)) for name in classes), numbers, part.shape)

    return MadeVolume(crop.grid, np.uint16, values)


def known_share(crop: Crop, classes: Sequence[str]) -> MadeVolume:
    """Return the share of ``classes`` that are known at each voxel of a crop: uint8, 255 for all of them."""

    def values(part: VoxelGrid) -> NDArray[np.uint8]:
        labels = read_labels(crop, classes, part)
        known = sum((labels.known_of(name) for name in classes), np.zeros(part.shape, np.uint16))
        return (known * 255 // len(classes)).astype(np.uint8)

    return MadeVolume(crop.grid, np.uint8, values)


def result_map(places: Mapping[str, Path]) -> MadeVolume:
    """Return the map of predicted classes of one crop; ``places``: the group of each class, labels or probabilities.

    It has as many levels as each of them, and reads no finer level than the viewer shows.
    """
    sources = {name: Multiscale.open(place) for name, place in places.items()}
    numbers = class_numbers(sources)
    finest = min((source.grid for source in sources.values()), key=lambda grid: np.prod(grid.voxel_size))

    def values(part: VoxelGrid) -> NDArray[np.uint16]:
        return merged(((name, _share(source, part)) for name, source in sources.items()), numbers, part.shape)

    return MadeVolume(finest, np.uint16, values, min(len(source.levels) for source in sources.values()))


def in_bytes(source: Multiscale) -> MadeVolume:
    """Return probabilities that are stored as float16 as uint8, 255 for 1, with the same levels."""
    return MadeVolume(source.grid, np.uint8, lambda part: as_bytes(source.read_nearest(part)[0]), len(source.levels))


def _share(source: Multiscale, part: VoxelGrid) -> NDArray[Any]:
    about: Mapping[str, Any] = source.attrs.get("connectomics", {})
    read: Callable[[VoxelGrid], tuple[NDArray[Any], NDArray[np.bool_]]] = source.read_nearest
    stored, _ = read(part)
    return stored > 0 if about.get("artefact") == "labels" else stored * np.float32(about.get("scale", 1 / 255))
