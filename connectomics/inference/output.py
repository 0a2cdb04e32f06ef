"""Blocks of the network's lattice to the arrays of a target."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from connectomics.errors import InputError
from connectomics.inference.layout import Layout
from connectomics.io import resample
from connectomics.io.write import ArrayWriter

# target voxels written at a time along each axis, so that float32 copies stay small beside the network's block
_PIECE = 128
#: what a stored 1 stands for, by dtype: value = stored * unit
UNITS = {"uint8": 1 / 255, "float16": 1.0}


def require_probabilities(low: float, high: float) -> None:
    """Raise `InputError` where the least and the largest value of a network are not those of probabilities."""
    if not np.isfinite([low, high]).all():
        raise InputError(
            "the network's output has values that are not finite (NaN or infinite); check the checkpoint, or use full "
            "precision"
        )
    if low < -1e-3 or high > 1 + 1e-3:
        raise InputError(
            f"the network must give probabilities, found values from {low:.4g} to {high:.4g}; apply a sigmoid to logits"
        )


def write_probability(
    layout: Layout,
    number: int,
    probability: NDArray[np.float32],
    writer: ArrayWriter,
    absent: NDArray[np.bool_] | None = None,
) -> None:
    """Resample one class of a block (values on its region of the network's lattice) and store it in the array's dtype:
    uint8 as round(255 p), float16 as p; 0 at the block's voxels that are ``absent``."""
    require_probabilities(float(probability.min()), float(probability.max()))
    start, block = layout.blocks[number]
    origin = layout.regions[number][0]
    for offset, piece in block.blocks([max(c, _PIECE // c * c) for c in layout.chunks]):
        begin, shape = layout.region(piece)
        part = tuple(slice(b - o, b - o + n) for b, o, n in zip(begin, origin, shape, strict=True))
        if layout.same_voxels:
            values = np.clip(probability[part], 0, 1)
        else:
            values = resample.linear(probability[part], layout.model.crop(begin, shape), piece)
            np.clip(values, 0, 1, out=values)
        if absent is not None:
            values[absent[tuple(slice(a, a + n) for a, n in zip(offset, piece.shape, strict=True))]] = 0
        if writer.dtype == np.uint8:
            values *= np.float32(255)
            np.rint(values, out=values)
        writer.write([a + b for a, b in zip(start, offset, strict=True)], values.astype(writer.dtype))
