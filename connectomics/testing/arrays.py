"""Checks that every reader of a multiscale volume must pass; they need no test framework."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.io.multiscale import Multiscale


def check_reader(source: Multiscale, expected: NDArray[Any], *, seed: int = 0, blocks: int = 20) -> None:
    """Check that reads of the finest level give ``expected`` (z, y, x): whole, in blocks, and beyond the volume.

    Beyond the volume nothing is known, and the dtype is that of the stored array.
    """
    level = source.levels[0]
    assert level.grid.shape == expected.shape, f"expected the shape {expected.shape}, got {level.grid.shape}"
    assert level.dtype == expected.dtype, f"expected the dtype {expected.dtype}, got {level.dtype}"
    rng = np.random.default_rng(seed)
    shape = np.array(expected.shape)
    boxes = [(np.zeros(3, int), shape), (np.full(3, -2), shape + 4)]
    for _ in range(blocks):
        begin = rng.integers(0, shape)
        boxes.append((begin, rng.integers(1, shape - begin + 1)))
    padded = np.pad(expected, 2)
    inside = np.pad(np.ones(expected.shape, bool), 2)
    for begin, size in boxes:
        values, known = source.read_nearest(level.grid.crop(begin.tolist(), size.tolist()), 0)
        place = tuple(slice(b + 2, b + 2 + n) for b, n in zip(begin, size, strict=True))
        where = f"block of {size.tolist()} voxels from {begin.tolist()}"
        assert values.shape == tuple(size), f"{where}: expected the shape of the block, got {values.shape}"
        np.testing.assert_array_equal(known, inside[place], f"{where}: known")
        np.testing.assert_array_equal(values[known], padded[place][inside[place]], f"{where}: values")
