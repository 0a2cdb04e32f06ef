"""The plain way to look at labels: two words per voxel, one class at a time. The reference for `LabelCodes`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from connectomics.cellmap.label_codes import LabelCodes
from connectomics.cellmap.labels import LabelVolume


def volume_of(codes: LabelCodes) -> LabelVolume:
    """Decode to two words per voxel."""
    states = codes.states

    def words(table: NDArray[np.uint64]) -> NDArray[np.uint64]:
        return np.ascontiguousarray(np.moveaxis(table[codes.codes], -1, 0))

    ids = None if states.ids is None else words(states.ids)
    return LabelVolume(codes.grid, states.classes, words(states.present), words(states.known), states.instances, ids)


def dense(volume: LabelVolume, names: Sequence[str] | None = None) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return label 0/1 and known, both (C, D, H, W)."""
    chosen = volume.classes if names is None else names
    present = np.stack([volume.present_of(name) for name in chosen])
    return present.astype(np.float32), np.stack([volume.known_of(name) for name in chosen])


def counts(volume: LabelVolume, name: str) -> dict[str, int]:
    """Return the number of present, absent and unknown voxels."""
    present, known = int(volume.present_of(name).sum()), int(volume.known_of(name).sum())
    return {"present": present, "absent": known - present, "unknown": volume.grid.size - known}


def restricted(volume: LabelVolume, where: NDArray[np.bool_]) -> LabelVolume:
    """Return the same labels, unknown outside of a mask."""
    keep = np.where(where, np.uint64(0xFFFF_FFFF_FFFF_FFFF), np.uint64(0))
    ids = None if volume.ids is None else volume.ids & keep
    return LabelVolume(volume.grid, volume.classes, volume.present & keep, volume.known & keep, volume.instances, ids)
