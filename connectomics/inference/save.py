"""Probabilities that somebody's own loop computed, as a prediction that `pytc decode` and `pytc export` read."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from connectomics.errors import InputError
from connectomics.geometry import VoxelGrid
from connectomics.inference.artifact import marks
from connectomics.inference.output import UNITS, require_probabilities
from connectomics.io.artifacts import Provenance
from connectomics.io.write import ensure_group, write_multiscale

log = logging.getLogger(__name__)


def save_cellmap_predictions(
    predictions: ArrayLike, output_path: str | Path, classes: Sequence[str], grid: VoxelGrid | None = None
) -> list[Path]:
    """Write the probabilities of a whole crop, one multiscale group a class, uint8 as ``round(255 p)``.

    Args:
        predictions: (C, D, H, W) or (1, C, D, H, W), in [0, 1], one channel a class.
        output_path: ``{out}/{dataset}.zarr/{crop}``; what is there of these classes is replaced.
        classes: names of the channels, in their order.
        grid: where the voxels lie, nm; None: nowhere in particular, voxels of 1 nm from 0, which is warned of.

    Returns:
        The groups written. Raises `InputError` for another number of channels or axes, another grid, and for values
        that are no probabilities (logits need a sigmoid).
    """
    values = np.asarray(predictions)
    values = values[0] if values.ndim == 5 and len(values) == 1 else values
    if values.ndim != 4 or len(values) != len(classes) or values.size == 0:
        raise InputError(
            f"predictions of {len(classes)} classes must have shape ({len(classes)}, D, H, W), found {values.shape}"
        )
    if grid is None:
        log.warning("%s: no grid was given, so its place and voxel size are not known (1 nm is written)", output_path)
        grid = VoxelGrid((1.0, 1.0, 1.0), (0.5, 0.5, 0.5), values.shape[1:])
    if tuple(grid.shape) != values.shape[1:]:
        raise InputError(f"predictions have {values.shape[1:]} voxels, the grid {grid.shape}")
    require_probabilities(float(values.min()), float(values.max()))
    place = Path(output_path)
    ensure_group(place)
    written = []
    for name, channel in zip(classes, values, strict=True):
        stored = np.rint(np.clip(channel, 0, 1) * np.float32(255)).astype(np.uint8)
        about = {**marks(Provenance()), "class_name": name, "scale": UNITS["uint8"]}
        write_multiscale(place / name, stored, grid, attrs={"connectomics": about}, overwrite=True)
        written.append(place / name)
    return written
