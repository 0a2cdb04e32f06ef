"""Put the cores of windows into blocks: each voxel is taken from one window, so nothing is summed or divided."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from connectomics.inference.blending import Into, Row
from connectomics.inference.probability_values import store


class CoreRow(Row):
    """Take each voxel from the window whose core holds it. Blocks of whole cores have no window in common."""

    def advance(self, x0: int, x1: int, keep: int | None, into: Into) -> NDArray[Any]:
        """Return the values of voxels ``x0`` to ``x1``."""
        import torch

        out = into((self._forward.channels, *self._shape, x1 - x0))
        if self._runs is not None or self._forward.skip_empty:
            out[...] = 0  # no window may write it
        columns = self._lattice.touching(2, x0, x1)
        places = [self._along(*axis) for axis in zip(range(3), (*self._begin, x0), out.shape[1:], strict=True)]
        lows, highs = [0.0], [0.0]
        for column in self._columns(columns):
            for numbers, values in self._run(column):
                part, at = zip(*(along[n] for along, n in zip(places, numbers, strict=True)), strict=True)
                low, high = store(values, part, out, at)
                lows.append(low)
                highs.append(high)
        self._x = x0
        self._check(out, lows, highs, x0)
        if self._lattice.leaves_raw:
            self._clear_beyond(torch.from_numpy(out), (*self._begin, x0))
        return out

    def _along(self, axis: int, begin: int, length: int) -> dict[int, tuple[slice, slice]]:
        """Return which voxels of each window along an axis go to which of a region."""
        numbers = self._lattice.touching(axis, begin, begin + length)
        starts, faces = self._lattice.starts[axis], (self._lattice.faces or ((),) * 3)[axis]
        found = {}
        for n in numbers:  # the outermost windows also give what lies within `reach` beyond their cores
            low = begin if n == numbers[0] else faces[n]
            high = begin + length if n == numbers[-1] else faces[n + 1]
            found[n] = slice(low - starts[n], high - starts[n]), slice(low - begin, high - begin)
        return found
