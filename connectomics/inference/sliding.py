"""A network over a volume: overlapping windows, blended, block by block, in bounded memory.

The windows lie on one lattice that is fixed for the whole grid, whatever the blocks (`WindowLattice`): MONAI's scan
rule (``int(window * (1 - overlap))`` voxels from window to window, the last one moved back to fit) on the grid and a
margin of context around it. A voxel's value is the mean of what the windows over it say, weighted by MONAI's Gaussian
importance map; so over the same extent the result equals ``monai.inferers.SlidingWindowInferer`` on the whole array.

**Blocks.** A block runs the windows that touch it and accumulates into memory of its own size; its values do not depend
on which other blocks are asked for, so blocks can be left out (they are on disk already) or run elsewhere. The price is
that a window across a border is run by every block that it touches: with windows of w voxels and blocks of B, about
(1 + w/B)^3 times the forward passes. Blocks that follow each other along x therefore share: their common windows are
run once and their weighted sums carried over, which leaves (1 + w/B)^2 along z and y (2.25 for B = 2w, 1.56 for
B = 4w, 1 where a block spans the grid). `plan` gives the numbers for a case before it is run.

Windows go through the network in batches that depend on the lattice, the block and the raw alone, never on what was
done before, so a run that was killed and resumed repeats the same arithmetic to the bit.

**Empty windows** can be left out: those whose raw has one value everywhere (padding, or zeros where there is no raw).
A voxel is then the weighted mean of what the other windows over it say, and 0 where there are none: a left out window
says nothing, rather than 0, so tissue beside padding does not fade. Further views of a window do not count: they show
other places, and what is to be labelled lies in the window.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from connectomics.errors import InputError
from connectomics.geometry import Index, VoxelGrid
from connectomics.inference.threads import AHEAD
from connectomics.inference.views import View
from connectomics.inference.windows import WindowLattice, importance_map, whole_index

if TYPE_CHECKING:
    import torch

Region = tuple[Index, Index]  # begin and shape, voxels of the lattice's grid
Read = Callable[[VoxelGrid], NDArray[np.float32]]

_SLAB = 1 << 24  # voxels of raw that are asked for at once: what `read` needs beside its result stays small


@dataclass(frozen=True)
class Plan:
    """What a prediction will cost, for dry runs.

    Attributes:
        blocks: blocks that are computed one after the other.
        windows: forward passes in all; at most so many where empty windows are left out.
        distinct_windows: windows of the lattice: the forward passes that one block over everything would take.
        voxels: voxels that go through the network (``windows`` times the window).
        bytes: largest working memory of a block: sums, weights, its values and those of the block before (which are
            being written), raw and what is read ahead of it, one batch in and out; not the network's own.
    """

    blocks: int
    windows: int
    distinct_windows: int
    voxels: int
    bytes: int

    @property
    def overhead(self) -> float:
        """Forward passes per distinct window: 1 where nothing is computed twice."""
        return self.windows / self.distinct_windows


def plan(
    grid: VoxelGrid,
    *,
    channels: int,
    window: Sequence[int] | int,
    overlap: float = 0.25,
    batch_size: int = 1,
    block_size: Sequence[int] | int = 256,
    context: Sequence[int] | int | None = None,
) -> Plan:
    """What `predict_blocks` with these arguments will cost."""
    lattice = WindowLattice.over(grid, window, overlap, context)
    regions = [(begin, block.shape) for begin, block in grid.blocks(whole_index(block_size, "block_size", 1))]
    return plan_regions(lattice, regions, channels=channels, batch_size=batch_size)


def plan_regions(lattice: WindowLattice, regions: Sequence[Region], *, channels: int, batch_size: int = 1) -> Plan:
    """What `predict_regions` over ``regions`` will cost."""
    windows, most, row, ran = 0, 0, None, 0
    for begin, shape in regions:
        z, y, x = (lattice.touching(a, begin[a], begin[a] + shape[a]) for a in range(3))
        key = (begin[:2], shape[:2])
        ran = ran if key == row else 0
        row = key
        windows += len(z) * len(y) * len(range(max(x.start, ran), x.stop))
        ran = x.stop
        most = max(most, _working_bytes(lattice, (begin, shape), channels, batch_size))
    return Plan(len(regions), windows, lattice.count, windows * math.prod(lattice.window), most)


def planned_reads(lattice: WindowLattice, regions: Sequence[Region]) -> Iterator[VoxelGrid]:
    """The grids of raw that `predict_regions` over ``regions`` asks for, in its order."""
    row, next_column, read = None, 0, 0
    for begin, shape in regions:
        z, y, x = (lattice.touching(a, begin[a], begin[a] + shape[a]) for a in range(3))
        if row is None or row[:2] != (begin[:2], shape[:2]) or begin[2] < row[2]:
            next_column, read = 0, lattice.starts[2][x.start]
        row = (begin[:2], shape[:2], begin[2])
        columns = range(max(x.start, next_column), x.stop)
        next_column = max(next_column, x.stop)
        if columns:
            end = lattice.starts[2][columns[-1]] + lattice.window[2]
            yield from _slabs(lattice, _hull(lattice, z, y), max(read, lattice.starts[2][columns[0]]), end)
            read = end


def _hull(lattice: WindowLattice, z: range, y: range) -> tuple[tuple[int, int], tuple[int, int]]:
    """First and last (exclusive) voxel along z and y of the windows with these numbers."""
    (z0, z1), (y0, y1) = (
        (lattice.starts[axis][t[0]], lattice.starts[axis][t[-1]] + lattice.window[axis])
        for axis, t in enumerate((z, y))
    )
    return (z0, z1), (y0, y1)


def _slabs(
    lattice: WindowLattice, hull: tuple[tuple[int, int], tuple[int, int]], begin: int, end: int
) -> Iterator[VoxelGrid]:
    """The raw of a hull from ``begin`` to ``end`` along x, in parts along z that are asked for one by one."""
    (z0, z1), (y0, y1) = hull
    step = max(1, _SLAB // ((y1 - y0) * max(1, end - begin)))
    for z in range(z0, z1 if begin < end else z0, step):
        yield lattice.grid.crop((z, y0, begin), (min(step, z1 - z), y1 - y0, end - begin))


def _working_bytes(lattice: WindowLattice, region: Region, channels: int, batch_size: int) -> int:
    """Memory of one region's sums with their carry, of two results, of raw (with a slab of it while it is read, and
    what is read ahead) and of a batch."""
    begin, shape = region
    hull = []
    for axis, (starts, w) in enumerate(zip(lattice.starts, lattice.window, strict=True)):
        touching = lattice.touching(axis, begin[axis], begin[axis] + shape[axis])
        hull.append((starts[touching[0]], starts[touching[-1]] + w))
    width = min(hull[2][1], lattice.grid.shape[2]) - begin[2]
    sums = (channels + 1) * shape[0] * shape[1] * (2 * width - shape[2])
    batch = batch_size * (1 + channels) * math.prod(lattice.window)
    raw = math.prod(end - start for start, end in hull)
    results = 2 * channels * math.prod(shape)
    return 4 * (sums + results + raw + 2 * min(raw, _SLAB) + min(raw, AHEAD) + batch)


def predict_blocks(
    read: Read,
    grid: VoxelGrid,
    network: Callable[..., torch.Tensor],
    *,
    channels: int,
    window: Sequence[int] | int,
    overlap: float = 0.25,
    blending: str = "gaussian",
    batch_size: int = 1,
    block_size: Sequence[int] | int = 256,
    context: Sequence[int] | int | None = None,
    device: str = "cpu",
    autocast: torch.dtype | None = None,
    blocks: Collection[int] | None = None,
    views: Sequence[View] = (),
) -> Iterator[tuple[VoxelGrid, NDArray[np.float32]]]:
    """Predict ``grid`` block by block.

    Args:
        read: gives the network's input, float32 (d, h, w), for any grid of ``grid``'s lattice, also beyond it; zeros
            where there is no raw.
        grid: what is predicted, at the network's voxel size.
        network: takes (B, 1, d, h, w) float32 on ``device``, gives (B, channels, d, h, w): one tensor, for instance
            probabilities. It is called without gradients; put it into evaluation mode yourself. With ``views`` it takes
            these too, (B, 1, ...) each.
        channels: channels of the network's output.
        window: shape of a window, voxels z y x.
        overlap: share of a window that its neighbour sees too, [0, 1).
        blending: ``gaussian`` or ``constant`` weights.
        batch_size: windows that go through the network together.
        block_size: shape of a block, voxels z y x; see the module for what it costs.
        context: voxels of raw that windows may see beyond the grid; None: see `WindowLattice.over`.
        device: where the network is, and where the sums are kept.
        autocast: dtype of automatic mixed precision (``torch.bfloat16``), None for none.
        blocks: numbers of the blocks to compute, in the order of ``grid.blocks(block_size)``; None for all.
        views: further inputs of the network, read anew for every window.

    Yields:
        Grid and values (channels, d, h, w), float32, of each block, in order.

    Raises:
        InputError: an argument is out of range, or the network's output has another shape or is not finite.
    """
    lattice = WindowLattice.over(grid, window, overlap, context)
    regions = [(begin, block.shape) for begin, block in grid.blocks(whole_index(block_size, "block_size", 1))]
    if blocks is not None:
        wrong = [b for b in blocks if not 0 <= b < len(regions)]
        if wrong:
            raise InputError(f"block numbers must lie in 0 to {len(regions) - 1}, found {sorted(wrong)[:5]}")
        regions = [regions[b] for b in sorted(set(blocks))]
    values = predict_regions(
        read,
        lattice,
        network,
        regions,
        channels=channels,
        blending=blending,
        batch_size=batch_size,
        device=device,
        autocast=autocast,
        views=views,
    )
    for begin, shape in regions:
        yield grid.crop(begin, shape), next(values)


def predict_regions(
    read: Read,
    lattice: WindowLattice,
    network: Callable[..., torch.Tensor],
    regions: Sequence[Region],
    *,
    channels: int,
    blending: str = "gaussian",
    batch_size: int = 1,
    device: str = "cpu",
    autocast: torch.dtype | None = None,
    views: Sequence[View] = (),
    skip_empty: bool = False,
) -> Iterator[NDArray[np.float32]]:
    """Predict parts of a lattice's grid, which may overlap: the values (channels, d, h, w), float32, of each in turn.

    Consecutive regions with the same extent along z and y and ascending begins along x share their windows. With
    ``skip_empty`` windows of constant raw are left out. The other arguments and the errors are those of
    `predict_blocks`.
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, found {batch_size}")
    weights = importance_map(lattice.window, blending).to(device)
    forward = _Forward(network, channels, batch_size, device, autocast, tuple(views), skip_empty)
    row: _Row | None = None
    for number, (begin, shape) in enumerate(regions):
        if min(begin) < 0 or any(b + s > n for b, s, n in zip(begin, shape, lattice.grid.shape, strict=True)):
            raise InputError(f"a region from {begin} of {shape} voxels does not lie in {lattice.grid}")
        if row is None or not row.goes_on_with(begin, shape):
            row = _Row(read, lattice, forward, weights, begin, shape)
        following = regions[number + 1] if number + 1 < len(regions) else None
        keep = following[0][2] if following is not None and row.goes_on_with(*following, after=begin[2]) else None
        yield row.advance(begin[2], begin[2] + shape[2], keep)


@dataclass(frozen=True)
class _Forward:
    """The network with everything around one call."""

    network: Callable[..., torch.Tensor]
    channels: int
    batch_size: int
    device: str
    autocast: torch.dtype | None
    views: tuple[View, ...]
    skip_empty: bool

    def __call__(self, windows: list[NDArray[np.float32]], grids: list[VoxelGrid]) -> torch.Tensor:
        """(B, channels, d, h, w) float32 of B windows (d, h, w), which lie on ``grids``."""
        import torch

        batch, *views = (
            torch.from_numpy(np.stack(arrays)[:, None]).to(self.device)
            for arrays in (windows, *([view.around(grid) for grid in grids] for view in self.views))
        )
        mixed: Any = contextlib.nullcontext()
        if self.autocast is not None:
            mixed = torch.autocast(torch.device(self.device).type, dtype=self.autocast)
        with torch.inference_mode(), mixed:
            out = self.network(batch, *views)
            wanted = (batch.shape[0], self.channels, *batch.shape[2:])
            found = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
            if found != wanted:
                raise InputError(f"the network must give one tensor of shape {wanted}, found {found}")
            return out.float()


class _Row:
    """Regions with the same z and y extent, in ascending x: windows and raw of one are used by the next."""

    def __init__(
        self,
        read: Read,
        lattice: WindowLattice,
        forward: _Forward,
        weights: torch.Tensor,
        begin: Index,
        shape: Index,
    ) -> None:
        self._read = read
        self._lattice = lattice
        self._forward = forward
        self._weights = weights
        self._begin = begin[:2]
        self._shape = shape[:2]
        z, y = (lattice.touching(a, begin[a], begin[a] + shape[a]) for a in range(2))
        self._zy = [(lattice.starts[0][i], lattice.starts[1][j]) for i in z for j in y]
        self._hull = _hull(lattice, z, y)
        self._x = begin[2]  # first voxel of the latest region
        self._next_column = 0  # window columns before this one are in the sums, or touch nothing that is still wanted
        self._raw: NDArray[np.float32] | None = None
        self._raw_begin = 0
        self._sums: torch.Tensor | None = None  # (channels + 1, dz, dy, x): weighted values, and last the weights
        self._sums_begin = begin[2]

    def goes_on_with(self, begin: Index, shape: Index, after: int | None = None) -> bool:
        """Whether a region can be the next of this row, after the latest or after one that begins at ``after``."""
        least = self._x if after is None else after
        return (begin[:2], shape[:2]) == (self._begin, self._shape) and begin[2] >= least

    def advance(self, x0: int, x1: int, keep: int | None) -> NDArray[np.float32]:
        """Values of voxels ``x0`` to ``x1``; sums from ``keep`` on are kept for the next region (None: none)."""
        lattice, width = self._lattice, self._lattice.window[2]
        touching = lattice.touching(2, x0, x1)
        columns = [lattice.starts[2][c] for c in range(max(touching.start, self._next_column), touching.stop)]
        end = min(lattice.grid.shape[2], max(lattice.starts[2][touching[-1]] + width, x1))
        sums = self._extended(x0, end)
        if columns:
            self._fetch(columns[0], columns[-1] + width)
        for start in columns:
            self._run(start, sums, x0)
        self._x, self._next_column = x0, max(self._next_column, touching.stop)
        self._sums = None
        following = lattice.starts[2][self._next_column :]
        if keep is None or self._raw is None or not following:
            self._raw = None
        else:
            cut = max(0, following[0] - self._raw_begin)
            self._raw, self._raw_begin = self._raw[..., cut:].copy(), self._raw_begin + cut
        if keep is not None:
            self._sums, self._sums_begin = sums[..., min(keep, end) - x0 :].clone(), keep
        return self._normalised(sums, x0, x1)

    def _extended(self, x0: int, end: int) -> torch.Tensor:
        """Sums for voxels ``x0`` to ``end``: what was carried over, and zeros."""
        import torch

        sums = torch.zeros(
            (self._forward.channels + 1, *self._shape, end - x0), dtype=torch.float32, device=self._forward.device
        )
        if self._sums is not None:
            carried = self._sums[..., x0 - self._sums_begin :]
            sums[..., : carried.shape[3]] = carried
        return sums

    def _fetch(self, begin: int, end: int) -> None:
        """Make raw of voxels ``begin`` to ``end`` along x present; only what is not there yet is read."""
        (z0, z1), (y0, y1) = self._hull
        raw = np.empty((z1 - z0, y1 - y0, end - begin), dtype=np.float32)
        have = 0
        if self._raw is not None and begin < self._raw_begin + self._raw.shape[2]:
            kept = self._raw[..., begin - self._raw_begin :]
            have = kept.shape[2]
            raw[..., :have] = kept
        self._raw = None
        z = 0
        for grid in _slabs(self._lattice, self._hull, begin + have, end):
            block = self._read(grid)
            if block.shape != grid.shape:
                raise InputError(f"read must give an array of shape {grid.shape} for {grid}, found {block.shape}")
            raw[z : z + grid.shape[0], :, have:] = block
            z += grid.shape[0]
        self._raw = raw
        self._raw_begin = begin

    def _run(self, start: int, sums: torch.Tensor, x0: int) -> None:
        """Add the windows that begin at ``start`` along x to ``sums``, which begin at ``x0``."""
        raw = cast("NDArray[np.float32]", self._raw)
        size = self._lattice.window
        x = start - self._raw_begin
        wanted = self._zy
        if self._forward.skip_empty:
            corner = self._hull[0][0], self._hull[1][0]
            part = raw[..., x : x + size[2]]
            wanted = [at for at in wanted if not _is_constant(_window(part, at, corner, size))]
        for first in range(0, len(wanted), self._forward.batch_size):
            batch = wanted[first : first + self._forward.batch_size]
            places = [(z - self._hull[0][0], y - self._hull[1][0]) for z, y in batch]
            out = self._forward(
                [raw[z : z + size[0], y : y + size[1], x : x + size[2]] for z, y in places],
                [self._lattice.grid.crop((z, y, start), size) for z, y in batch],
            )
            for values, (z, y) in zip(out, batch, strict=True):
                into, of = zip(
                    _overlap(z, size[0], self._begin[0], self._shape[0]),
                    _overlap(y, size[1], self._begin[1], self._shape[1]),
                    _overlap(start, size[2], x0, sums.shape[3]),
                    strict=True,
                )
                weights = self._weights[of]
                sums[(slice(0, -1), *into)].addcmul_(values[(slice(None), *of)], weights)
                sums[(-1, *into)].add_(weights)

    def _normalised(self, sums: torch.Tensor, x0: int, x1: int) -> NDArray[np.float32]:
        if self._forward.skip_empty:  # no window had anything to say of voxels without weight: 0 / 1
            sums[-1:].masked_fill_(sums[-1:] == 0, 1)
        # an array of its own: a view would keep all sums while the caller holds the block
        values = sums[:-1, ..., : x1 - x0] / sums[-1:, ..., : x1 - x0]
        if not math.isfinite(float(values.sum())):
            begin, shape = (*self._begin, x0), (*self._shape, x1 - x0)
            raise InputError(
                f"the network's output has values that are not finite (NaN or infinite) in the block "
                f"{self._lattice.grid.crop(begin, shape).box}; check the checkpoint, or use full precision"
            )
        return cast("NDArray[np.float32]", values.cpu().numpy())


def _window(raw: NDArray[np.float32], at: tuple[int, int], corner: tuple[int, int], size: Index) -> NDArray[np.float32]:
    """The part of ``raw``, which begins at ``corner`` along z and y, of a window that begins at ``at``."""
    z, y = at[0] - corner[0], at[1] - corner[1]
    return raw[z : z + size[0], y : y + size[1]]


def _is_constant(values: NDArray[np.float32]) -> bool:
    """Whether all values are equal; tissue shows in the first plane already."""
    return all(bool((plane == values[0, 0, 0]).all()) for plane in values)


def _overlap(start: int, width: int, begin: int, length: int) -> tuple[slice, slice]:
    """Slices of a block (from ``begin``, ``length`` long) and of a window (from ``start``) where they meet."""
    lo, hi = max(start, begin), min(start + width, begin + length)
    return slice(lo - begin, hi - begin), slice(lo - start, hi - start)
