"""A network over a volume: overlapping windows, blended, block by block, in bounded memory.

The windows lie on one lattice that is fixed for the whole grid, whatever the blocks (`WindowLattice`). With blending
``crop`` a voxel is taken from the window whose core holds it, and blocks of whole cores run each window once
(`connectomics.inference.cropping`). The rest is about weights: a voxel's value is the mean over its windows, weighted
by MONAI's Gaussian importance map; so over the same extent the result equals ``monai.inferers.SlidingWindowInferer`` on
the whole array.

A block runs the windows that touch it; its values do not depend on which other blocks are computed. With windows of w
voxels and blocks of B that would be about (1 + w/B)^3 times the forward passes. Blocks that follow each other along x
share: common windows are run once and their weighted sums carried over, which leaves (1 + w/B)^2. Batches depend on the
lattice, the block and the raw alone, so a resumed run with the same batch size repeats the same arithmetic to the bit.

Windows can be left out: those of constant raw, those outside a mask, and those without any raw. A voxel is then the
weighted mean over its other windows, and 0 if there are none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from connectomics.errors import InputError
from connectomics.geometry import VoxelGrid
from connectomics.inference.background_io import MAX_VOXELS_AHEAD
from connectomics.inference.blending import (
    LEAST_WIDTH,
    SLAB_VOXELS,
    SLAB_WIDTH,
    BlockRow,
    Buffers,
    Forward,
    Into,
    Read,
    Region,
    Row,
    hull,
    slabs_of,
)
from connectomics.inference.cropping import CoreRow
from connectomics.inference.raw import FurtherInput
from connectomics.inference.windows import Cores, WindowFit, WindowLattice, importance_map, whole_index

if TYPE_CHECKING:
    import torch

    from connectomics.io.mirror import Extent


@dataclass(frozen=True)
class Plan:
    """What a prediction will cost, for dry runs.

    Attributes:
        blocks: number of blocks, computed one after the other.
        windows: forward passes in all; an upper bound if empty windows are left out.
        distinct_windows: windows of the lattice: the forward passes of one block over everything.
        voxels: voxels that go through the network (``windows`` times the window).
        bytes: largest working memory of a block: sums, weights, its values and those of the block before (which are
            being written), raw and what is read ahead, one batch in and out; not the network's own.
    """

    blocks: int
    windows: int
    distinct_windows: int
    voxels: int
    bytes: int

    def times(self, passes: int) -> Plan:
        """Return the plan if every window goes through the network ``passes`` times, one pass after the other."""
        windows, distinct = self.windows * passes, self.distinct_windows * passes
        return replace(self, windows=windows, distinct_windows=distinct, voxels=self.voxels * passes)

    def with_windows_of(self, other: Plan) -> Plan:
        """Return the plan if the same blocks also go through the windows of another lattice."""
        return Plan(
            self.blocks,
            self.windows + other.windows,
            self.distinct_windows + other.distinct_windows,
            self.voxels + other.voxels,
            self.bytes + other.bytes,
        )


def plan(
    grid: VoxelGrid,
    *,
    channels: int,
    window: Sequence[int] | int,
    overlap: Sequence[float] | float = 0.25,
    batch_size: int = 1,
    block_size: Sequence[int] | int = 256,
    context: Sequence[int] | int | None = None,
    fit: WindowFit | None = None,
    blending: str = "gaussian",
) -> Plan:
    """Return what `predict_blocks` with these arguments will cost."""
    cores = Cores() if blending == "crop" else None
    lattice = WindowLattice.over(grid, window, overlap, context, None, fit, cores)
    return plan_regions(lattice, _block_regions(lattice, block_size), channels=channels, batch_size=batch_size)


def plan_regions(
    lattice: WindowLattice, regions: Sequence[Region], channels: int, batch_size: int = 1, value_bytes: int = 2 * 4
) -> Plan:
    """Return what `predict_regions` over ``regions`` will cost, with so many bytes for each value (all its results)."""
    windows, most, row, ran = 0, 0, None, 0
    for begin, shape in regions:
        z, y, x = lattice.touched(begin, shape)
        key = (begin[:2], shape[:2])
        ran = ran if key == row and lattice.faces is None else 0
        row = key
        windows += len(z) * len(y) * len(range(max(x.start, ran), x.stop))
        ran = x.stop
        most = max(most, _working_bytes(lattice, (begin, shape), channels, batch_size, value_bytes))
    return Plan(len(regions), windows, lattice.count, windows * math.prod(lattice.window), most)


def _block_regions(lattice: WindowLattice, block_size: Sequence[int] | int) -> list[Region]:
    """Blocks of this size, or of as many whole cores as it holds, at least one."""
    size = list(whole_index(block_size, "block_size", 1))
    for axis, faces in enumerate(lattice.faces or ()):
        size[axis] = max(1, size[axis] // faces[1]) * faces[1]
    return [(begin, block.shape) for begin, block in lattice.grid.blocks(size)]


def _working_bytes(lattice: WindowLattice, region: Region, channels: int, batch_size: int, value_bytes: int) -> int:
    """Sums, results, raw (with a slab while it is read, and what is read ahead) and a batch."""
    begin, shape = region
    z, y, _ = lattice.touched(begin, shape)
    sums = 0
    if lattice.faces is None:
        sums = (channels + 1) * shape[0] * shape[1] * slabs_of(lattice, region) * SLAB_WIDTH
    batch = batch_size * (1 + channels) * math.prod(lattice.window)
    raw = math.prod(end - start for start, end in hull(lattice, z, y)) * max(lattice.window[2], LEAST_WIDTH)
    results = value_bytes * channels * math.prod(shape)
    return results + 4 * (sums + raw + 2 * min(raw, SLAB_VOXELS) + min(raw, MAX_VOXELS_AHEAD) + batch)


def predict_blocks(
    read: Read,
    grid: VoxelGrid,
    network: Callable[..., torch.Tensor],
    *,
    channels: int,
    window: Sequence[int] | int,
    overlap: Sequence[float] | float = 0.25,
    blending: str = "gaussian",
    batch_size: int = 1,
    block_size: Sequence[int] | int = 256,
    context: Sequence[int] | int | None = None,
    device: str = "cpu",
    autocast: torch.dtype | None = None,
    blocks: Collection[int] | None = None,
    inputs: Sequence[FurtherInput] = (),
    extent: Extent | None = None,
    fit: WindowFit | None = None,
) -> Iterator[tuple[VoxelGrid, NDArray[np.float32]]]:
    """Predict ``grid`` block by block.

    Args:
        read: returns the network's input, float32 (d, h, w), for any grid of ``grid``'s lattice, also beyond it, and
            something like tissue where there is no raw (see `connectomics.io.mirror`).
        grid: what to predict, at the network's voxel size.
        network: takes (B, 1, d, h, w) float32 on ``device`` and, with ``inputs``, one (B, 1, ...) for each of them;
            returns one tensor (B, channels, d, h, w). It is called without gradients and must be in evaluation mode.
        channels: number of output channels.
        window: window shape, voxels z y x.
        overlap: share of a window that its neighbor sees too, [0, 1), one for all axes or z y x.
        blending: ``gaussian`` or ``constant`` weights, or ``crop``: each voxel from one window.
        batch_size: windows that go through the network together.
        block_size: block shape, voxels z y x; see the module for what it costs. With ``crop`` a whole number of cores.
        context: voxels of raw that windows may see beyond the grid; None: see `WindowLattice.over`.
        device: of the network and of the sums.
        autocast: dtype of automatic mixed precision (``torch.bfloat16``), None for none.
        blocks: numbers of the blocks to compute, in the order of ``grid.blocks(block_size)``; None for all.
        inputs: further inputs of the network, read for every window.
        extent: where there is raw, in voxels of ``grid``: windows stay inside if it is large enough, and values
            beyond it are 0. None: there is raw everywhere.
        fit: how windows may shrink if fewer voxels are wanted; None: they have one size everywhere.

    Yields:
        Grid and values (channels, d, h, w), float32, of each block, in order.

    Raises:
        InputError: an argument is out of range, or the network's output has another shape or is not finite.
    """
    cores = Cores() if blending == "crop" else None
    lattice = WindowLattice.over(grid, window, overlap, context, extent, fit, cores)
    regions = _block_regions(lattice, block_size)
    if blocks is not None:
        wrong = [b for b in blocks if not 0 <= b < len(regions)]
        if wrong:
            raise InputError(f"block numbers must lie in 0 to {len(regions) - 1}, got {sorted(wrong)[:5]}")
        regions = [regions[b] for b in sorted(set(blocks))]
    forward = Forward(network, channels, batch_size, device, autocast, tuple(inputs))
    values = predict_regions(read, lattice, forward, regions, blending)
    for begin, shape in regions:
        yield grid.crop(begin, shape), next(values)


def new_values(shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return new memory for values: whoever gets them may keep them."""
    import torch

    return torch.empty(shape, dtype=torch.float32).numpy()


def predict_regions(
    read: Read,
    lattice: WindowLattice,
    forward: Forward,
    regions: Sequence[Region],
    blending: str = "gaussian",
    into: Into = new_values,
) -> Generator[NDArray[Any], None, None]:
    """Predict parts of a lattice's grid, which may overlap: yields (channels, d, h, w) of each in turn.

    ``into`` gives the memory for a shape, and the dtype: float32, or uint8 for probabilities, as round(255 p).

    Consecutive regions with the same extent along z and y and ascending begins along x share their windows. Raw that no
    window sees is not read. ``read``, ``blending`` and the errors are those of `predict_blocks`; a lattice with cores
    (`WindowLattice.faces`) means ``crop``.
    """
    if forward.batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {forward.batch_size}")
    weights = None if lattice.faces else importance_map(lattice.window, blending).to(forward.device)
    for begin, shape in regions:
        if min(begin) < 0 or any(b + s > n for b, s, n in zip(begin, shape, lattice.grid.shape, strict=True)):
            raise InputError(f"a region from {begin} of {shape} voxels does not lie in {lattice.grid}")
    buffers, slabs = Buffers(), max((slabs_of(lattice, region) for region in regions), default=0)
    row: Row | None = None
    for number, (begin, shape) in enumerate(regions):
        if row is None or not row.continues_with(begin, shape):
            begun = read, lattice, forward, (begin, shape), buffers
            row = CoreRow(*begun) if weights is None else BlockRow(*begun, weights, slabs)
        following = regions[number + 1] if number + 1 < len(regions) else None
        keep = following[0][2] if following is not None and row.continues_with(*following, after=begin[2]) else None
        yield row.advance(begin[2], begin[2] + shape[2], keep, into)
