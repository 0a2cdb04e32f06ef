"""Blend windows into blocks that follow each other along x and share raw and windows.

A `BlockRow` keeps what one block leaves for the next: raw, and the weighted sums of windows that reach into it. What is
read, and in which order, follows from the lattice, the blocks and a mask alone, so it can be read ahead
(`planned_reads`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from connectomics.errors import InputError
from connectomics.geometry import Index, VoxelGrid
from connectomics.inference.background_io import ReadAhead
from connectomics.inference.raw import FurtherInput
from connectomics.inference.windows import WindowLattice

if TYPE_CHECKING:
    import torch

    from connectomics.io.mirror import Extent

Region = tuple[Index, Index]  # begin and shape, voxels of the lattice's grid
Read = Callable[[VoxelGrid], NDArray[np.float32]]
Inside = Callable[[VoxelGrid], bool]  # whether a window, by its grid, is to be run

LEAST_WIDTH = 32  # voxels along x of raw per read, if windows are narrower: a chunk is decoded for each read
SLAB_VOXELS = 1 << 22  # voxels of raw per read: keeps what `read` needs beside its result small
_BATCHES_AHEAD = 2  # batches whose further inputs are read while the network computes


class NotFiniteError(InputError):
    """The network returns NaN or infinite values for a block."""


def planned_reads(
    lattice: WindowLattice, regions: Sequence[Region], inside: Inside | None = None
) -> Iterator[VoxelGrid]:
    """Yield the grids of raw that `predict_regions` over ``regions`` reads, in its order."""
    inside = windows_to_run(lattice, inside)
    row, next_column, read = None, 0, 0
    for begin, shape in regions:
        z, y, x = (lattice.touching(a, begin[a], begin[a] + shape[a]) for a in range(3))
        if row is None or row[:2] != (begin[:2], shape[:2]) or begin[2] < row[2]:
            next_column, read = 0, lattice.starts[2][x.start]
        row = (begin[:2], shape[:2], begin[2])
        columns = range(max(x.start, next_column), x.stop)
        next_column = max(next_column, x.stop)
        for start, end in _columns(lattice, columns):
            if start + lattice.window[2] > read:
                yield from _slabs(lattice, z, y, max(read, start), end, inside)
                read = end


def _columns(lattice: WindowLattice, numbers: range) -> Iterator[tuple[int, int]]:
    """Yield first voxel along x of the window columns, and where a read of raw for each ends if one is needed."""
    starts, width = lattice.starts[2], lattice.window[2]
    for start in (starts[number] for number in numbers):
        yield start, min(start + max(width, LEAST_WIDTH), starts[numbers[-1]] + width)


def windows_to_run(lattice: WindowLattice, inside: Inside | None) -> Inside | None:
    """Return ``inside`` with windows without any raw left out; None if every window is to be run."""
    if not lattice.leaves_raw:
        return inside
    return lambda window: lattice.sees_raw(window) and (inside is None or inside(window))


def hull(lattice: WindowLattice, z: Sequence[int], y: Sequence[int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return first and last (exclusive) voxel along z and y of the windows with these ascending numbers."""
    (z0, z1), (y0, y1) = (
        (lattice.starts[axis][t[0]], lattice.starts[axis][t[-1]] + lattice.window[axis])
        for axis, t in enumerate((z, y))
    )
    return (z0, z1), (y0, y1)


def _slabs(
    lattice: WindowLattice, z: Sequence[int], y: Sequence[int], begin: int, end: int, inside: Inside | None
) -> Iterator[VoxelGrid]:
    """Yield the raw from ``begin`` to ``end`` along x of the windows with these numbers along z and y, split along z.

    With ``inside`` only the hull of the windows to run that see any of it, also if the next region runs them.
    """
    if begin >= end:
        return
    if inside is not None:
        columns = lattice.touching(2, begin, end)
        wanted = [(i, j) for i in z for j in y if any(inside(lattice.grid_of((i, j, k))) for k in columns)]
        if not wanted:
            return
        z, y = sorted({i for i, _ in wanted}), sorted({j for _, j in wanted})
    (z0, z1), (y0, y1) = hull(lattice, z, y)
    step = max(1, SLAB_VOXELS // ((y1 - y0) * (end - begin)))
    for first in range(z0, z1, step):
        yield lattice.grid.crop((first, y0, begin), (min(step, z1 - first), y1 - y0, end - begin))


@dataclass(frozen=True)
class Forward:
    """How windows go through a network.

    Attributes:
        network: see `connectomics.inference.sliding.predict_blocks`, as ``channels`` to ``inputs``.
        skip_empty: whether windows of constant raw are left out.
        inside: returns whether a window, by its grid, is run; None: every window.
    """

    network: Callable[..., torch.Tensor]
    channels: int
    batch_size: int
    device: str
    autocast: torch.dtype | None = None
    inputs: tuple[FurtherInput, ...] = ()
    skip_empty: bool = False
    inside: Inside | None = None

    def __call__(self, *inputs: list[NDArray[np.float32]]) -> torch.Tensor:
        """Return (B, channels, d, h, w) float32 of B windows (d, h, w), and of B of each further input."""
        import torch

        batch, *further = (torch.from_numpy(np.stack(arrays)[:, None]).to(self.device) for arrays in inputs)
        mixed: Any = contextlib.nullcontext()
        if self.autocast is not None:
            mixed = torch.autocast(torch.device(self.device).type, dtype=self.autocast)
        with torch.inference_mode(), mixed:
            out = self.network(batch, *further)
            wanted = (batch.shape[0], self.channels, *batch.shape[2:])
            found = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
            if found != wanted:
                raise InputError(f"the network must give one tensor of shape {wanted}, got {found}")
            return out.float()


class BlockRow:
    """Regions with the same z and y extent, in ascending x, each of which uses windows and raw of the one before."""

    def __init__(
        self,
        read: Read,
        lattice: WindowLattice,
        forward: Forward,
        weights: torch.Tensor,
        begin: Index,
        shape: Index,
    ) -> None:
        self._read, self._lattice, self._forward, self._weights = read, lattice, forward, weights
        self._begin, self._shape = begin[:2], shape[:2]
        z, y = (lattice.touching(a, begin[a], begin[a] + shape[a]) for a in range(2))
        self._numbers = z, y  # of the windows
        self._hull = hull(lattice, z, y)
        self._x = begin[2]  # first voxel of the latest region
        self._next_column = 0  # window columns before this one are in the sums, or touch nothing that is still wanted
        self._raw: NDArray[np.float32] | None = None
        self._raw_begin = 0
        self._sums: torch.Tensor | None = None  # (channels + 1, dz, dy, x): weighted values, and last the weights
        self._sums_begin = begin[2]

    def continues_with(self, begin: Index, shape: Index, after: int | None = None) -> bool:
        """Return whether a region can follow in this row, after the latest one or one that begins at ``after``."""
        return (begin[:2], shape[:2]) == (self._begin, self._shape) and begin[2] >= (
            self._x if after is None else after
        )

    def advance(self, x0: int, x1: int, keep: int | None) -> NDArray[np.float32]:
        """Return the values of voxels ``x0`` to ``x1``; keep sums from ``keep`` on for the next region (None: none)."""
        lattice, width = self._lattice, self._lattice.window[2]
        touching = lattice.touching(2, x0, x1)
        columns = range(max(touching.start, self._next_column), touching.stop)
        end = min(lattice.grid.shape[2], max(lattice.starts[2][touching[-1]] + width, x1))
        sums = self._extended(x0, end)
        for start, read_to in _columns(lattice, columns):  # never holds more raw than one column's, or `LEAST_WIDTH`
            if self._raw is None or start + width > self._raw_begin + self._raw.shape[2]:
                self._fetch(start, read_to)
            self._run(start, sums, x0)
        self._x, self._next_column = x0, max(self._next_column, touching.stop)
        following = lattice.starts[2][self._next_column :]
        if keep is None or self._raw is None or not following:
            self._raw = None
        else:
            cut = max(0, following[0] - self._raw_begin)
            self._raw, self._raw_begin = self._raw[..., cut:].copy(), self._raw_begin + cut
        if keep is not None:
            self._sums, self._sums_begin = sums[..., min(keep, end) - x0 :].clone(), keep
        return self._normalized(sums, x0, x1)

    def _extended(self, x0: int, end: int) -> torch.Tensor:
        """Return sums for voxels ``x0`` to ``end``: what was carried over, and zeros."""
        import torch

        sums = torch.zeros(
            (self._forward.channels + 1, *self._shape, end - x0), dtype=torch.float32, device=self._forward.device
        )
        if self._sums is not None:
            carried = self._sums[..., x0 - self._sums_begin :]
            sums[..., : carried.shape[3]] = carried
            self._sums = None
        return sums

    def _fetch(self, begin: int, end: int) -> None:
        """Hold raw of voxels ``begin`` to ``end`` along x; read only what is not there yet."""
        (z0, z1), (y0, y1) = self._hull
        shape, have = (z1 - z0, y1 - y0, end - begin), 0
        before, self._raw = self._raw, None
        kept = None
        if before is not None and begin < self._raw_begin + before.shape[2]:
            kept = before[..., begin - self._raw_begin :].copy()
        if before is not None and before.shape == shape:
            raw = before  # reuse its memory: a second array would add a third to what a prediction takes
        else:
            del before
            raw = np.empty(shape, dtype=np.float32)
        if kept is not None:
            have = kept.shape[2]
            raw[..., :have] = kept
        del kept
        if self._forward.inside is not None:
            raw[..., have:] = 0  # parts outside a mask are neither read nor used
        for grid in _slabs(self._lattice, *self._numbers, begin + have, end, self._forward.inside):
            block = self._read(grid)
            if block.shape != grid.shape:
                raise InputError(f"read must give an array of shape {grid.shape} for {grid}, got {block.shape}")
            z, y, _ = self._lattice.grid.index_range(grid.box)[0]
            raw[z - z0 : z - z0 + grid.shape[0], y - y0 : y - y0 + grid.shape[1], have:] = block
        self._raw = raw
        self._raw_begin = begin

    def _run(self, start: int, sums: torch.Tensor, x0: int) -> None:
        """Add the windows that begin at ``start`` along x to ``sums``, which begin at ``x0``."""
        size, forward = self._lattice.window, self._forward
        windows = self._wanted(start)
        grids = [self._lattice.grid.crop(at, size) for at in windows]
        ahead = _BATCHES_AHEAD * forward.batch_size * math.prod(size)
        with ExitStack() as stack:
            readers = [stack.enter_context(ReadAhead(given.around, grids, ahead)) for given in forward.inputs]
            for n in range(0, len(windows), forward.batch_size):
                batch, around = windows[n : n + forward.batch_size], grids[n : n + forward.batch_size]
                further = ([read(grid) for grid in around] for read in readers)
                out = forward([self._window(at) for at in batch], *further)
                for values, at in zip(out, batch, strict=True):
                    self._add(values, at, sums, x0)

    def _wanted(self, x: int) -> list[Index]:
        """Return the first voxels of the windows to run that begin at ``x``."""
        lattice, (z, y) = self._lattice, self._numbers
        windows = [(lattice.starts[0][i], lattice.starts[1][j], x) for i in z for j in y]
        if self._forward.inside is not None:
            windows = [at for at in windows if self._forward.inside(lattice.grid.crop(at, lattice.window))]
        if self._forward.skip_empty:
            windows = [at for at in windows if not _is_constant(self._window(at))]
        return windows

    def _window(self, at: Index) -> NDArray[np.float32]:
        corner = (self._hull[0][0], self._hull[1][0], self._raw_begin)
        part = tuple(slice(a - c, a - c + n) for a, c, n in zip(at, corner, self._lattice.window, strict=True))
        return cast("NDArray[np.float32]", self._raw)[part]

    def _add(self, values: torch.Tensor, at: Index, sums: torch.Tensor, x0: int) -> None:
        """Add the network's ``values`` of the window that begins at ``at``."""
        size = self._lattice.window
        block = (*self._begin, x0), (*self._shape, sums.shape[3])
        into, of = zip(*map(_overlap, at, size, *block), strict=True)
        weights = self._weights[of]
        sums[(slice(0, -1), *into)].addcmul_(values[(slice(None), *of)], weights)
        sums[(-1, *into)].add_(weights)

    def _normalized(self, sums: torch.Tensor, x0: int, x1: int) -> NDArray[np.float32]:
        if self._forward.skip_empty or self._forward.inside is not None:  # voxels that no window covers become 0 / 1
            sums[-1:].masked_fill_(sums[-1:] == 0, 1)
        # a new array: a view would keep all sums alive while the caller holds the block
        values = sums[:-1, ..., : x1 - x0] / sums[-1:, ..., : x1 - x0]
        if self._lattice.leaves_raw:
            self._clear_beyond(values, (*self._begin, x0))
        if not math.isfinite(float(values.sum())):
            begin, shape = (*self._begin, x0), (*self._shape, x1 - x0)
            raise NotFiniteError(
                f"the network's output has values that are not finite (NaN or infinite) in the block "
                f"{self._lattice.grid.crop(begin, shape).box}; check the checkpoint, or use full precision"
            )
        return cast("NDArray[np.float32]", values.cpu().numpy())

    def _clear_beyond(self, values: torch.Tensor, begin: Index) -> None:
        """Set values (C, d, h, w), which start at voxel ``begin``, to 0 where there is no raw. One voxel beyond the raw
        is kept: interpolation at the volume's faces reads it."""
        extent = cast("Extent", self._lattice.extent)
        for axis, (first, low, high) in enumerate(zip(begin, extent.low, extent.high, strict=True), start=1):
            n = values.shape[axis]
            before = min(n, max(0, low - 1 - first))
            after = min(n, max(0, high + 1 - first))
            values.narrow(axis, 0, before).zero_()
            values.narrow(axis, after, n - after).zero_()


def _is_constant(values: NDArray[np.float32]) -> bool:
    """Return whether all values are equal; with tissue, the first plane already decides."""
    return all(bool((plane == values[0, 0, 0]).all()) for plane in values)


def _overlap(start: int, width: int, begin: int, length: int) -> tuple[slice, slice]:
    """Return slices of a block (from ``begin``, ``length`` long) and of a window (from ``start``) where they meet."""
    lo, hi = max(start, begin), min(start + width, begin + length)
    return slice(lo - begin, hi - begin), slice(lo - start, hi - start)
