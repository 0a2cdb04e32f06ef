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


def write_probability(layout: Layout, number: int, probability: NDArray[np.float32], writer: ArrayWriter) -> None:
    """Resample one class of a block (values on its region of the network's lattice) and store it."""
    low, high = float(probability.min()), float(probability.max())
    if low < -1e-3 or high > 1 + 1e-3:
        raise InputError(
            f"the network must give probabilities, found values from {low:.4g} to {high:.4g}; apply a sigmoid to logits"
        )
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
        values *= np.float32(255)
        np.rint(values, out=values)
        writer.write([a + b for a, b in zip(start, offset, strict=True)], values.astype(np.uint8))
