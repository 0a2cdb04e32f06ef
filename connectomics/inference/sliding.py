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

Windows go through the network in batches that depend on the lattice and the block alone, never on what was done before,
so a run that was killed and resumed repeats the same arithmetic to the bit.
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
from connectomics.inference.views import View

if TYPE_CHECKING:
    import torch

Region = tuple[Index, Index]  # begin and shape, voxels of the lattice's grid
Read = Callable[[VoxelGrid], NDArray[np.float32]]

BLENDINGS = ("gaussian", "constant")
_SIGMA_SCALE = 0.125  # MONAI's default: sigma in window widths
_LEAST_WEIGHT = 1e-3  # MONAI clamps its importance map here
_SLAB = 1 << 24  # voxels of raw that are asked for at once: what `read` needs beside its result stays small


def _index(values: Sequence[int] | int, what: str, least: int) -> Index:
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
        size = _index(window, "window", 1)
        if grid.size == 0:
            raise InputError(f"nothing to predict in an empty grid ({grid})")
        if not 0 <= overlap < 1:
            raise InputError(f"overlap must be at least 0 and below 1, found {overlap}")
        given = None if context is None else _index(context, "context", 0)
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


@dataclass(frozen=True)
class Plan:
    """What a prediction will cost, for dry runs.

    Attributes:
        blocks: blocks that are computed one after the other.
        windows: forward passes in all.
        distinct_windows: windows of the lattice: the forward passes that one block over everything would take.
        voxels: voxels that go through the network (``windows`` times the window).
        bytes: largest working memory of a block: sums, weights, raw, one batch in and out; not the network's own.
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
    regions = [(begin, block.shape) for begin, block in grid.blocks(_index(block_size, "block_size", 1))]
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


def _working_bytes(lattice: WindowLattice, region: Region, channels: int, batch_size: int) -> int:
    """Memory of one region's sums with their carry, of raw (and a slab of it while it is read) and of a batch."""
    begin, shape = region
    hull = []
    for axis, (starts, w) in enumerate(zip(lattice.starts, lattice.window, strict=True)):
        touching = lattice.touching(axis, begin[axis], begin[axis] + shape[axis])
        hull.append((starts[touching[0]], starts[touching[-1]] + w))
    width = min(hull[2][1], lattice.grid.shape[2]) - begin[2]
    sums = (channels + 1) * shape[0] * shape[1] * (2 * width - shape[2])
    batch = batch_size * (1 + channels) * math.prod(lattice.window)
    raw = math.prod(end - start for start, end in hull)
    return 4 * (sums + raw + 2 * min(raw, _SLAB) + batch)


def importance_map(window: Sequence[int], blending: str = "gaussian") -> torch.Tensor:
    """Weight of a window's voxels, float32 (d, h, w).

    ``gaussian``: a product of Gaussians around the middle with sigma 1/8 of the width, never below the larger of 1e-3
    and its own least value, as `monai.data.utils.compute_importance_map` computes it; ``constant``: ones.
    """
    import torch

    if blending not in BLENDINGS:
        raise InputError(f"blending must be one of {', '.join(BLENDINGS)}, found {blending!r}")
    size = _index(window, "window", 1)
    if blending == "constant":
        return torch.ones(size, dtype=torch.float32)
    profiles = []
    for n in size:
        x = torch.arange(n, dtype=torch.float32) - (n - 1) / 2
        profiles.append(torch.exp(x**2 / (-2 * (_SIGMA_SCALE * n) ** 2)))
    weights = profiles[0][:, None, None] * profiles[1][None, :, None] * profiles[2][None, None, :]
    return torch.clamp_(weights, min=max(float(weights.min()), _LEAST_WEIGHT))


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
    regions = [(begin, block.shape) for begin, block in grid.blocks(_index(block_size, "block_size", 1))]
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
) -> Iterator[NDArray[np.float32]]:
    """Predict parts of a lattice's grid, which may overlap: the values (channels, d, h, w), float32, of each in turn.

    Consecutive regions with the same extent along z and y and ascending begins along x share their windows. The
    other arguments and the errors are those of `predict_blocks`.
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, found {batch_size}")
    weights = importance_map(lattice.window, blending).to(device)
    forward = _Forward(network, channels, batch_size, device, autocast, tuple(views))
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
        self._hull = tuple(
            (lattice.starts[a][t[0]], lattice.starts[a][t[-1]] + lattice.window[a]) for a, t in enumerate((z, y))
        )
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
        step = max(1, _SLAB // (raw.shape[1] * max(1, raw.shape[2] - have)))
        for z in range(z0, z1 if begin + have < end else z0, step):
            depth = min(step, z1 - z)
            grid = self._lattice.grid.crop((z, y0, begin + have), (depth, y1 - y0, end - begin - have))
            block = self._read(grid)
            if block.shape != grid.shape:
                raise InputError(f"read must give an array of shape {grid.shape} for {grid}, found {block.shape}")
            raw[z - z0 : z - z0 + depth, :, have:] = block
        self._raw = raw
        self._raw_begin = begin

    def _run(self, start: int, sums: torch.Tensor, x0: int) -> None:
        """Add the windows that begin at ``start`` along x to ``sums``, which begin at ``x0``."""
        raw = cast("NDArray[np.float32]", self._raw)
        size = self._lattice.window
        x = start - self._raw_begin
        for first in range(0, len(self._zy), self._forward.batch_size):
            batch = self._zy[first : first + self._forward.batch_size]
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
        values = sums[:-1, ..., : x1 - x0]
        values /= sums[-1:, ..., : x1 - x0]
        if not math.isfinite(float(values.sum())):
            begin, shape = (*self._begin, x0), (*self._shape, x1 - x0)
            raise InputError(
                f"the network's output has values that are not finite (NaN or infinite) in the block "
                f"{self._lattice.grid.crop(begin, shape).box}; check the checkpoint, or use full precision"
            )
        return cast("NDArray[np.float32]", values.cpu().numpy())


def _overlap(start: int, width: int, begin: int, length: int) -> tuple[slice, slice]:
    """Slices of a block (from ``begin``, ``length`` long) and of a window (from ``start``) where they meet."""
    lo, hi = max(start, begin), min(start + width, begin + length)
    return slice(lo - begin, hi - begin), slice(lo - start, hi - start)
