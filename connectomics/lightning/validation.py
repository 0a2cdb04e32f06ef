"""How the memory of validation stays bounded for any number of classes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.cellmap.label_codes import LabelCodes
from connectomics.config import RunConfig
from connectomics.geometry import VoxelGrid
from connectomics.inference.sliding import plan
from connectomics.inference.windows import BLOCK, WindowFit

_PREDICTION = 3 << 30  # largest prediction of a block in bytes, if blocks of 32 voxels per side allow it
_SLAB = 1 << 24  # labels (classes times voxels) unpacked at a time, 5 bytes each
_LEAST = 32


@dataclass(frozen=True)
class Slab:
    """A part of a predicted block, arrays (C, d, h, w): ``values`` of all output channels of the network; ``label``,
    which is meaningless where it is not ``known``."""

    grid: VoxelGrid
    values: NDArray[np.float32]
    label: NDArray[np.bool_]
    known: NDArray[np.bool_]


def slabs(labels: LabelCodes, values: NDArray[np.float32], classes: Sequence[str]) -> Iterator[Slab]:
    """Split a predicted block (C, d, h, w) along z, so that labels are unpacked for one part at a time."""
    depth, height, width = labels.grid.shape
    step = max(1, _SLAB // max(1, len(classes) * height * width))
    present, is_known = labels.states.tables(classes)
    for z in range(0, depth, step):
        codes = labels.codes[z : z + step]
        grid = labels.grid.crop((z, 0, 0), codes.shape)
        label, known = (np.stack([row[codes] for row in table]) for table in (present, is_known))
        yield Slab(grid, values[:, z : z + step], label, known)


def validation_block(config: RunConfig, grid: VoxelGrid, channels: int, window: Sequence[int]) -> list[int]:
    """Return the block size (z, y, x) for validating ``grid``: ``inference.block_size``, or smaller for many channels.

    The block is halved along x first, because blocks that are neighbors along x share their windows, then along z and
    y, until its prediction takes at most 3 GiB. No side becomes smaller than 32 voxels.
    """
    size = [min(b, n) for b, n in zip(config.inference.block_size or (BLOCK,) * 3, grid.shape, strict=True)]
    settings: dict[str, Any] = {
        "channels": channels,
        "window": window,
        "overlap": config.inference.overlap,
        "batch_size": 1 if config.inference.batch_size == "auto" else config.inference.batch_size,
        "context": config.inference.context,
        "fit": WindowFit.of(config),
        "blending": config.inference.blending,
    }
    while plan(grid, block_size=size, **settings).bytes > _PREDICTION:
        axes = [axis for axis in ((2,) if size[2] > _LEAST else (0, 1)) if size[axis] > _LEAST]
        if not axes:
            break
        longest = max(axes, key=lambda axis: size[axis])
        size[longest] = max(_LEAST, math.ceil(size[longest] / 2))
    return size
