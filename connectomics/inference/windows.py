"""Where the windows of a prediction lie, and how much each of their voxels counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from connectomics.errors import InputError
from connectomics.geometry import Index, VoxelGrid

if TYPE_CHECKING:
    import torch

BLENDINGS = ("gaussian", "constant")
_SIGMA_SCALE = 0.125  # MONAI's default: sigma in window widths
_LEAST_WEIGHT = 1e-3  # MONAI clamps its importance map here


def whole_index(values: Sequence[int] | int, what: str, least: int) -> Index:
    """Three whole numbers (one stands for all axes), each at least ``least``."""
    numbers = [values] * 3 if isinstance(values, int) else [int(v) for v in values]
    if len(numbers) != 3 or min(numbers) < least:
        raise InputError(f"{what} must be three whole numbers >= {least} (z, y, x), found {values!r}")
    return numbers[0], numbers[1], numbers[2]


@dataclass(frozen=True)
class WindowLattice:
    """All windows of one prediction.

    Attributes:
        grid: the voxels that are predicted.
        window: window shape in voxels, z y x.
        starts: per axis the first voxels of the windows, ascending, in voxels of ``grid``; negative where a window
            begins in the context before the grid.
    """

    grid: VoxelGrid
    window: Index
    starts: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]

    @classmethod
    def over(
        cls,
        grid: VoxelGrid,
        window: Sequence[int] | int,
        overlap: float = 0.25,
        context: Sequence[int] | int | None = None,
    ) -> WindowLattice:
        """The windows over ``grid`` and ``context`` voxels on every side of it.

        ``context=None``: half the overlap, at least 8 and at most a quarter of the window, so that a voxel at a face of
        the grid is no nearer to a window's face than one in the middle of the volume; less, down to half of that, on an
        axis where the grid then fits into one window. An extent below the window's takes one window, centred.
        Raises `InputError` for an empty grid, ``overlap`` outside [0, 1) or a negative context.
        """
        size = whole_index(window, "window", 1)
        if grid.size == 0:
            raise InputError(f"nothing to predict in an empty grid ({grid})")
        if not 0 <= overlap < 1:
            raise InputError(f"overlap must be at least 0 and below 1, found {overlap}")
        given = None if context is None else whole_index(context, "context", 0)
        starts = []
        for axis, (n, w) in enumerate(zip(grid.shape, size, strict=True)):
            margin = _default_context(n, w, overlap) if given is None else given[axis]
            starts.append(_scan(n, w, overlap, margin))
        return cls(grid, size, (starts[0], starts[1], starts[2]))

    @property
    def count(self) -> int:
        """Number of windows."""
        return math.prod(len(s) for s in self.starts)

    def touching(self, axis: int, begin: int, end: int) -> range:
        """Numbers of the windows along ``axis`` that hold any of the voxels ``begin`` to ``end`` (exclusive)."""
        starts = self.starts[axis]
        first = int(np.searchsorted(starts, begin - self.window[axis], side="right"))
        return range(first, int(np.searchsorted(starts, end, side="left")))


def _default_context(n: int, window: int, overlap: float) -> int:
    wanted = min(max(8, math.ceil(window * overlap / 2)), window // 4)
    spare = (window - n) // 2
    return spare if wanted / 2 <= spare < wanted else wanted


def _scan(n: int, window: int, overlap: float, margin: int) -> tuple[int, ...]:
    """Window starts along one axis of ``n`` voxels: the rule of `monai.data.utils.dense_patch_slices`."""
    extent = max(window, n + 2 * margin)
    step = max(1, int(window * (1 - overlap)))
    before = (extent - n) // 2
    starts = [*range(0, extent - window, step), extent - window]
    return tuple(s - before for s in starts)


def importance_map(window: Sequence[int], blending: str = "gaussian") -> torch.Tensor:
    """Weight of a window's voxels, float32 (d, h, w).

    ``gaussian``: a product of Gaussians around the middle with sigma 1/8 of the width, never below the larger of 1e-3
    and its own least value, as `monai.data.utils.compute_importance_map` computes it; ``constant``: ones.
    """
    import torch

    if blending not in BLENDINGS:
        raise InputError(f"blending must be one of {', '.join(BLENDINGS)}, found {blending!r}")
    size = whole_index(window, "window", 1)
    if blending == "constant":
        return torch.ones(size, dtype=torch.float32)
    profiles = []
    for n in size:
        x = torch.arange(n, dtype=torch.float32) - (n - 1) / 2
        profiles.append(torch.exp(x**2 / (-2 * (_SIGMA_SCALE * n) ** 2)))
    weights = profiles[0][:, None, None] * profiles[1][None, :, None] * profiles[2][None, None, :]
    return torch.clamp_(weights, min=max(float(weights.min()), _LEAST_WEIGHT))
