"""Blend windows into blocks that follow each other along x and share raw and windows.

A `BlockRow` keeps what one block leaves for the next: raw, and the weighted sums of windows that reach into it. Its
memory is used again by every block and row (`Buffers`): fresh memory costs more than the arithmetic. What is read, and
in which order, follows from the lattice, the blocks and a mask alone, so it can be read ahead (`planned_reads`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from connectomics.errors import InputError
from connectomics.geometry import Index, VoxelGrid, slices_of
from connectomics.inference.background_io import ReadAhead
from connectomics.inference.probability_values import divide, require_probabilities
from connectomics.inference.raw import FurtherInput
from connectomics.inference.windows import WindowLattice

if TYPE_CHECKING:
    import torch

    from connectomics.io.mirror import Extent

Region = tuple[Index, Index]  # begin and shape, voxels of the lattice's grid
Read = Callable[[VoxelGrid], NDArray[np.float32]]
Inside = Callable[[VoxelGrid], bool]  # whether a window is to be run, by the grid in which it counts
Runs = Callable[[Index], bool]  # the same, by its numbers
Into = Callable[[tuple[int, ...]], NDArray[Any]]  # gives memory for values (C, d, h, w): float32, or uint8 for 255 p

LEAST_WIDTH = 32  # voxels along x of raw per read, if windows are narrower: a chunk is decoded for each read
SLAB_VOXELS = 1 << 22  # voxels of raw per read: keeps what `read` needs beside its result small
SLAB_WIDTH = 64  # voxels along x of sums that lie together: the width of most chunks
_BATCHES_AHEAD = 2  # batches whose further inputs are read while the network computes


class NotFiniteError(InputError):
    """The network returns NaN or infinite values for a block."""


def planned_reads(
    lattice: WindowLattice, regions: Sequence[Region], inside: Inside | None = None
) -> Iterator[VoxelGrid]:
    """Yield the grids of raw that `predict_regions` over ``regions`` reads, in its order."""
    runs = windows_to_run(lattice, inside)
    row, next_column, read = None, 0, 0
    for begin, shape in regions:
        z, y, x = lattice.touched(begin, shape)
        if row is None or row[:2] != (begin[:2], shape[:2]) or begin[2] < row[2]:
            next_column, read = 0, lattice.starts[2][x.start]
        row = (begin[:2], shape[:2], begin[2])
        columns = range(max(x.start, next_column), x.stop)
        next_column = max(next_column, x.stop) if lattice.faces is None else 0
        for start, end in columns_of(lattice, columns):
            if start + lattice.window[2] > read:
                yield from _slabs(lattice, z, y, max(read, start), end, runs)
                read = end


def columns_of(lattice: WindowLattice, numbers: range) -> Iterator[tuple[int, int]]:
    """Yield first voxel along x of the window columns, and where a read of raw for each ends if one is needed."""
    starts, width = lattice.starts[2], lattice.window[2]
    for start in (starts[number] for number in numbers):
        yield start, min(start + max(width, LEAST_WIDTH), starts[numbers[-1]] + width)


def windows_to_run(lattice: WindowLattice, inside: Inside | None) -> Runs | None:
    """Return whether windows are to be run: those that see raw and count ``inside``; None if every window is."""
    if inside is None:
        return lattice.sees_raw if lattice.leaves_raw else None
    return lambda numbers: lattice.sees_raw(numbers) and inside(lattice.counted(numbers))


def reach(lattice: WindowLattice, region: Region) -> int:
    """Return how many voxels along x of the lattice's grid the windows over a region see, from the region's begin."""
    begin, width = region[0][2], region[1][2]
    last = lattice.touching(2, begin, begin + width)[-1]
    return min(lattice.grid.shape[2], max(lattice.starts[2][last] + lattice.window[2], begin + width)) - begin


def slabs_of(lattice: WindowLattice, region: Region) -> int:
    """Return how many slabs of sums hold what the windows over a region see."""
    return math.ceil((region[0][2] % SLAB_WIDTH + reach(lattice, region)) / SLAB_WIDTH)


def hull(lattice: WindowLattice, z: Sequence[int], y: Sequence[int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return first and last (exclusive) voxel along z and y of the windows with these ascending numbers."""
    along_z, along_y = (
        (lattice.starts[axis][t[0]], lattice.starts[axis][t[-1]] + lattice.window[axis])
        for axis, t in enumerate((z, y))
    )
    return along_z, along_y


def _slabs(
    lattice: WindowLattice, z: Sequence[int], y: Sequence[int], begin: int, end: int, runs: Runs | None
) -> Iterator[VoxelGrid]:
    """Yield the raw from ``begin`` to ``end`` along x of the windows with these numbers along z and y, split along z.

    With ``runs`` only the hull of the windows to run that see any of it, also if the next region runs them.
    """
    if begin >= end:
        return
    if runs is not None:
        columns = [k for k, at in enumerate(lattice.starts[2]) if begin - lattice.window[2] < at < end]
        wanted = [(i, j) for i in z for j in y if any(runs((i, j, k)) for k in columns)]
        if not wanted:
            return
        z, y = sorted({i for i, _ in wanted}), sorted({j for _, j in wanted})
    (z0, z1), (y0, y1) = hull(lattice, z, y)
    step = max(1, SLAB_VOXELS // ((y1 - y0) * (end - begin)))
    for first in range(z0, z1, step):
        yield lattice.grid.crop((first, y0, begin), (min(step, z1 - first), y1 - y0, end - begin))


class Buffers:
    """Memory that is used again, by name: float32, not initialized."""

    def __init__(self) -> None:
        self._flat: dict[str, torch.Tensor] = {}

    def __call__(self, name: str, shape: Sequence[int], device: str = "cpu") -> torch.Tensor:
        """Return a tensor; the one that was returned for the name before is no longer valid."""
        import torch

        size = math.prod(shape)
        if name not in self._flat or self._flat[name].numel() < size:
            self._flat.pop(name, None)  # first, so that both are never there
            self._flat[name] = torch.empty(size, dtype=torch.float32, device=device)
        return self._flat[name][:size].view(*shape)


@dataclass(frozen=True)
class Forward:
    """How windows go through a network.

    Attributes:
        network: see `connectomics.inference.sliding.predict_blocks`, as ``channels`` to ``inputs``.
        skip_empty: whether windows of constant raw are left out.
        inside: returns whether a window is run, by the grid in which it counts; None: every window.
        buffers: memory for what goes in.
    """

    network: Callable[..., torch.Tensor]
    channels: int
    batch_size: int
    device: str
    autocast: torch.dtype | None = None
    inputs: tuple[FurtherInput, ...] = ()
    skip_empty: bool = False
    inside: Inside | None = None
    buffers: Buffers = field(default_factory=Buffers, compare=False)

    def __call__(self, *inputs: list[NDArray[np.float32]]) -> torch.Tensor:
        """Return (B, channels, d, h, w) float32 of B windows (d, h, w), and of B of each further input."""
        return self.run(self.prepared(*inputs))

    @property
    def on_gpu(self) -> bool:
        """Whether the network runs beside this process."""
        return self.device.startswith("cuda")

    def prepared(self, *inputs: list[NDArray[np.float32]]) -> list[torch.Tensor]:
        """Return the inputs (B, 1, d, h, w) on the device; on a GPU in new memory, and copied while it computes."""
        return [self._batch(f"input {n}", arrays) for n, arrays in enumerate(inputs)]

    def run(self, given: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the network's output for `prepared` inputs."""
        import torch

        batch, *further = given
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

    def _batch(self, name: str, arrays: list[NDArray[np.float32]]) -> torch.Tensor:
        import torch

        shape = (len(arrays), 1, *arrays[0].shape)
        # torch gives pinned memory to nobody else before its copy has ended
        batch = torch.empty(shape, dtype=torch.float32, pin_memory=True) if self.on_gpu else self.buffers(name, shape)
        np.stack(arrays, out=batch.numpy()[:, 0])
        return batch.to(self.device, non_blocking=self.on_gpu)


class Row:
    """Regions with the same z and y extent, in ascending x, each of which uses raw of the one before."""

    def __init__(self, read: Read, lattice: WindowLattice, forward: Forward, region: Region, buffers: Buffers) -> None:
        """Begin at ``region``."""
        self._read, self._lattice, self._forward = read, lattice, forward
        self._runs = windows_to_run(lattice, forward.inside)
        begin, shape = region
        self._begin, self._shape = begin[:2], shape[:2]
        z, y, _ = lattice.touched(begin, shape)
        self._numbers = z, y  # of the windows
        self._hull = (z0, z1), (y0, y1) = hull(lattice, z, y)
        self._x = begin[2]  # first voxel of the latest region
        most = max(lattice.window[2], LEAST_WIDTH)
        self._raw: NDArray[np.float32] = buffers("raw", (z1 - z0, y1 - y0, most)).numpy()
        self._raw_begin = self._raw_end = lattice.starts[2][0]  # voxels along x that it holds

    def continues_with(self, begin: Index, shape: Index, after: int | None = None) -> bool:
        """Return whether a region can follow in this row, after the latest one or one that begins at ``after``."""
        return (begin[:2], shape[:2]) == (self._begin, self._shape) and begin[2] >= (
            self._x if after is None else after
        )

    def advance(self, x0: int, x1: int, keep: int | None, into: Into) -> NDArray[Any]:
        """Return the values of voxels ``x0`` to ``x1``; the next region begins at ``keep`` (None: in another row)."""
        raise NotImplementedError

    def _columns(self, numbers: range) -> Iterator[int]:
        """Yield the numbers of window columns with their raw at hand: one column's, or that of `LEAST_WIDTH`."""
        for column, (start, read_to) in zip(numbers, columns_of(self._lattice, numbers), strict=True):
            if start + self._lattice.window[2] > self._raw_end:
                self._fetch(start, read_to)
            yield column

    def _fetch(self, begin: int, end: int) -> None:
        """Hold raw of voxels ``begin`` to ``end`` along x; read only what is not there yet."""
        (z0, _), (y0, _) = self._hull
        have, shift = max(0, self._raw_end - begin), begin - self._raw_begin
        if have and shift:
            for plane in self._raw:  # numpy copies what it moves within an array: no more than a plane
                plane[:, :have] = plane[:, shift : shift + have]
        new = self._raw[..., have : end - begin]
        if self._runs is not None:
            new[...] = 0  # parts outside a mask are neither read nor used
        for grid in _slabs(self._lattice, *self._numbers, begin + have, end, self._runs):
            block = self._read(grid)
            if block.shape != grid.shape:
                raise InputError(f"read must give an array of shape {grid.shape} for {grid}, got {block.shape}")
            z, y, _ = self._lattice.grid.index_range(grid.box)[0]
            new[z - z0 : z - z0 + grid.shape[0], y - y0 : y - y0 + grid.shape[1]] = block
        self._raw_begin, self._raw_end = begin, end

    def _run(self, column: int) -> Iterator[tuple[Index, torch.Tensor]]:
        """Yield the windows of a column along x that are run: their numbers, and values (C, d, h, w)."""
        forward = self._forward
        windows = self._wanted(column)
        grids = [self._lattice.grid.crop(self._lattice.begin_of(at), self._lattice.window) for at in windows]
        ahead = _BATCHES_AHEAD * forward.batch_size * math.prod(self._lattice.window)
        with ExitStack() as stack:
            readers = [stack.enter_context(ReadAhead(given.around, grids, ahead)) for given in forward.inputs]

            def prepared(n: int) -> list[torch.Tensor]:
                part = slice(n, n + forward.batch_size)
                further = ([read(grid) for grid in grids[part]] for read in readers)
                return forward.prepared([self._window(at) for at in windows[part]], *further)

            given = None
            for n in range(0, len(windows), forward.batch_size):
                values = forward.run(given or prepared(n))
                following = n + forward.batch_size
                given = prepared(following) if forward.on_gpu and following < len(windows) else None
                yield from zip(windows[n:following], values, strict=True)
                del values  # before the next ones are there

    def _wanted(self, column: int) -> list[Index]:
        """Return the numbers of the windows to run in a column along x."""
        z, y = self._numbers
        windows = [(i, j, column) for i in z for j in y]
        if self._runs is not None:
            windows = [at for at in windows if self._runs(at)]
        if self._forward.skip_empty:
            seen = ((at, self._window(at)) for at in windows)  # with tissue, the first plane already decides
            windows = [at for at, values in seen if any((plane != values[0, 0, 0]).any() for plane in values)]
        return windows

    def _window(self, numbers: Index) -> NDArray[np.float32]:
        corner = (self._hull[0][0], self._hull[1][0], self._raw_begin)
        return self._raw[slices_of(np.subtract(self._lattice.begin_of(numbers), corner), self._lattice.window)]

    def _check(self, out: NDArray[Any], lows: Sequence[float], highs: Sequence[float], x0: int) -> None:
        """Raise `InputError` if ``out``, the values from voxel ``x0`` on, whose smallest and largest ones are given, is
        not finite, or has no probabilities to store."""
        if not math.isfinite(sum(lows) + sum(highs)):
            block = self._lattice.grid.crop((*self._begin, x0), out.shape[1:])
            raise NotFiniteError(
                f"the network's output has values that are not finite (NaN or infinite) in the block {block.box}; "
                "check the checkpoint, or use full precision"
            )
        if out.dtype == np.uint8:
            require_probabilities(min(lows), max(highs))

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


class BlockRow(Row):
    """Blend by weights; each region also uses the windows of the one before.

    The sums are a ring of slabs (channels + 1, dz, dy, `SLAB_WIDTH`; last the weights) along x: nothing is copied from
    block to block, and a block's voxels lie together. They are 0 beyond what is still wanted.
    """

    def __init__(
        self,
        read: Read,
        lattice: WindowLattice,
        forward: Forward,
        region: Region,
        buffers: Buffers,
        weights: torch.Tensor,
        slabs: int,
    ) -> None:
        """Begin at ``region``; ``slabs`` is the largest number of `slabs_of` this and those that will follow."""
        super().__init__(read, lattice, forward, region, buffers)
        self._weights = weights
        self._next_column = 0  # window columns before this one are in the sums, or touch nothing that is still wanted
        self._sums = buffers("sums", (slabs, forward.channels + 1, *self._shape, SLAB_WIDTH), forward.device)
        self._sums.zero_()

    def advance(self, x0: int, x1: int, keep: int | None, into: Into) -> NDArray[Any]:
        """Return the values of voxels ``x0`` to ``x1``; keep sums from ``keep`` on for the next region (None: none)."""
        lattice = self._lattice
        touching = lattice.touching(2, x0, x1)
        columns = range(max(touching.start, self._next_column), touching.stop)
        end = x0 + reach(lattice, ((*self._begin, x0), (*self._shape, x1 - x0)))
        for column in self._columns(columns):
            for at, values in self._run(column):
                self._add(values, lattice.begin_of(at), x0, end)
        self._x, self._next_column = x0, max(self._next_column, touching.stop)
        return self._normalized(x0, x1, min(end, x1 if keep is None else keep), into)

    def _parts(self, begin: int, end: int) -> Iterator[tuple[torch.Tensor, slice, slice]]:
        """Yield the slabs of voxels ``begin`` to ``end`` along x, the place in each, and which voxels these are."""
        for first in range(begin - begin % SLAB_WIDTH, end, SLAB_WIDTH):
            low, high = max(first, begin), min(first + SLAB_WIDTH, end)
            slab = self._sums[first // SLAB_WIDTH % len(self._sums)]
            yield slab, slice(low - first, high - first), slice(low - begin, high - begin)

    def _add(self, values: torch.Tensor, at: Index, x0: int, x1: int) -> None:
        """Add the network's ``values`` of the window that begins at ``at`` to voxels ``x0`` to ``x1``."""
        block = (*self._begin, x0), (*self._shape, x1 - x0)
        (*into, x), (*of, x_of) = zip(*map(_overlap, at, self._lattice.window, *block), strict=True)
        for slab, here, there in self._parts(x0 + x.start, x0 + x.stop):
            part = (*of, slice(x_of.start + there.start, x_of.start + there.stop))
            weights = self._weights[part]
            slab[(slice(0, -1), *into, here)].addcmul_(values[(slice(None), *part)], weights)
            slab[(-1, *into, here)].add_(weights)

    def _normalized(self, x0: int, x1: int, clear: int, into: Into) -> NDArray[Any]:
        """Return the values of voxels ``x0`` to ``x1``; the sums of voxels ``x0`` to ``clear`` become 0."""
        out = into((self._forward.channels, *self._shape, x1 - x0))
        lows, highs = [], []
        for slab, here, there in self._parts(x0, x1):
            if self._lattice.leaves_raw:
                self._clear_beyond(slab[:-1, ..., here], (*self._begin, x0 + there.start))
            low, high = divide(slab, here, out, there)
            lows.append(low)
            highs.append(high)
        for slab, here, _ in self._parts(x0, clear):
            slab[..., here].zero_()
        self._check(out, lows, highs, x0)
        return out


def _overlap(start: int, width: int, begin: int, length: int) -> tuple[slice, slice]:
    """Return slices of a block (from ``begin``, ``length`` long) and of a window (from ``start``) where they meet."""
    lo, hi = max(start, begin), min(start + width, begin + length)
    return slice(lo - begin, hi - begin), slice(lo - start, hi - start)
