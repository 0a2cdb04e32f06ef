"""Resample a prediction onto the crop table's grid, block by block.

How a value gets onto the grid depends on what it is:

- probabilities: linear interpolation, the mean over the voxel where the grid is coarser, then the threshold. An
  instance class gets its ids from the connected components (26) of the mask on the grid, the one case that needs a
  whole array in memory (about 6 bytes a voxel);
- labels of a semantic class: present where they fill at least half of the voxel;
- labels of an instance class: the id at the voxel's center.

Beyond the source there is background.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics import __version__
from connectomics.cellmap.classes import is_instance_class
from connectomics.cellmap.crop_table import TableEntry
from connectomics.decoding.probabilities import largest_below
from connectomics.errors import CorruptDataError, InputError
from connectomics.geometry import Index, VoxelGrid, slices_of
from connectomics.io import resample
from connectomics.io.artifacts import portable
from connectomics.submission.pack import CHUNK
from connectomics.submission.sources import Source, digest

_LARGEST_ID = np.iinfo(np.uint32).max
# Half filled is present; what is missing by rounding (float32 sums of decimal voxel sizes) does not count.
_HALF = 0.5 - 1e-5
_NOISE = 1e-3  # float32 rounding of interpolated values, in steps of a stored probability


@dataclass(frozen=True)
class Job:
    """One array to write: from where, onto which grid, with which threshold (probabilities only)."""

    entry: TableEntry
    source: Source
    threshold: float

    @property
    def name(self) -> str:
        return f"{self.entry.crop_name}/{self.entry.class_name}"

    @property
    def is_instance(self) -> bool:
        """Whether ids are kept. What the labels say they are goes before what the class is."""
        kind = self.source.about.get("kind")
        return kind == "instance" if kind is not None else is_instance_class(self.entry.class_name)

    def coverage(self) -> float:
        """The share of the grid's box that the source's box covers."""
        ours = self.entry.grid.box
        shared = math.prod(ours.intersect(self.source.grid.box).extent) / max(math.prod(ours.extent), 1e-300)
        return 1.0 if shared > 1 - 1e-6 else shared

    def about(self) -> dict[str, Any]:
        """The array's ``connectomics`` attribute: where it came from, without paths of this machine."""
        made: dict[str, Any] = {
            key: self.source.about[key] for key in ("decode", "source", "model", "edited") if key in self.source.about
        }
        if self.source.form == "probability":
            made["threshold"] = self.threshold
        return {"artefact": "submission", "from": self.source.form, "version": __version__, **portable(made)}

    def fingerprint(self) -> str:
        """Changes when anything that decides the array's bytes does."""
        value = [self.source.fingerprint(), self.entry.grid.to_dict(), self.is_instance, self.about(), list(CHUNK)]
        return digest(value)


def blocks_of(job: Job) -> tuple[np.dtype[Any], Callable[[Index, VoxelGrid], NDArray[Any]]]:
    """The type of a job's array, and what gives its block at (first voxel, grid of the block)."""
    source, threshold = job.source, job.threshold * job.source.scale
    if source.form == "probability" and not job.is_instance:
        return np.dtype(np.uint8), lambda _, grid: _mask_of_probability(source, grid, threshold)
    if source.form == "probability":
        ids = _components(job)
        return ids.dtype, lambda begin, grid: ids[slices_of(begin, grid.shape)]
    if not job.is_instance:
        return np.dtype(np.uint8), lambda _, grid: _mask_of_labels(source, grid)
    numbers = None
    largest = _largest(source) if source.largest_id is None else source.largest_id
    if largest > _LARGEST_ID:
        numbers = _all_ids(source)
        largest = len(numbers)
    dtype = np.min_scalar_type(largest)
    return dtype, lambda _, grid: _ids(source, grid, numbers, int(np.iinfo(dtype).max))


def _read(source: Source, grid: VoxelGrid) -> tuple[NDArray[Any], VoxelGrid]:
    """The part of the source that decides the values on ``grid``, one voxel more on each side, and where it lies; empty
    if there is none."""
    box = grid.box
    if not source.grid.same_lattice(grid):
        box = box.grow(source.grid.voxel_size)
    begin, part = source.grid.part(box)
    return source.read(begin, part.shape) if part.size else np.zeros(part.shape, np.uint8), part


def _mask_of_probability(source: Source, grid: VoxelGrid, threshold: float) -> NDArray[np.uint8]:
    block, part = _read(source, grid)
    # A threshold that was itself a stored value (128/255 of 255) must not fall below it.
    cut = math.floor(threshold + 1e-9) if block.dtype == np.uint8 else largest_below(block.dtype, threshold)
    noisy = threshold + _NOISE * source.scale / 255.0
    # Interpolation and averages never leave the range of the values: most blocks need neither.
    if float(block.max(initial=0)) <= cut:
        return np.zeros(grid.shape, np.uint8)
    if part.same_lattice(grid) and part.shape == grid.shape:
        return (block > cut).view(np.uint8)
    mask = np.ones(grid.shape, np.bool_) if float(block.min()) > noisy else resample.linear(block, part, grid) > noisy
    return _inside_only(mask, source, grid).view(np.uint8)


def _mask_of_labels(source: Source, grid: VoxelGrid) -> NDArray[np.uint8]:
    block, part = _read(source, grid)
    mask: NDArray[np.bool_] = block > 0
    if not mask.any():
        return np.zeros(grid.shape, np.uint8)
    if not (part.same_lattice(grid) and part.shape == grid.shape):
        mask = _inside_only(resample.area_fraction(mask, part, grid) >= _HALF, source, grid)
    return mask.view(np.uint8)


def _inside_only(mask: NDArray[np.bool_], source: Source, grid: VoxelGrid) -> NDArray[np.bool_]:
    """``mask`` where the centers of ``grid`` lie in the source's box, False beyond."""
    z, y, x = resample.inside_axes(source.grid, grid)
    if not (z.all() and y.all() and x.all()):
        mask &= z[:, None, None] & y[:, None] & x
    return mask


def _ids(source: Source, grid: VoxelGrid, numbers: NDArray[Any] | None, limit: int) -> NDArray[Any]:
    block, part = _read(source, grid)
    if block.dtype == np.bool_:
        block = block.view(np.uint8)
    if numbers is not None:
        block = np.where(block > 0, np.searchsorted(numbers, block.astype(np.uint64)) + 1, 0)
    if not block.any():
        return np.zeros(grid.shape, np.uint8)
    low, high = int(block.min()), int(block.max())
    if low < 0 or high > limit:
        raise CorruptDataError(
            f"{source.location} holds the id {low if low < 0 else high}, expected 0 to {limit}; decode it again"
        )
    return resample.nearest(block, part, grid)


def _components(job: Job) -> NDArray[Any]:
    """Ids of a probability's mask on the table's grid: its 26-connected components."""
    import cc3d

    threshold = job.threshold * job.source.scale
    mask = np.zeros(job.entry.grid.shape, np.uint8)
    for begin, grid in job.entry.grid.blocks(CHUNK):
        mask[slices_of(begin, grid.shape)] = _mask_of_probability(job.source, grid, threshold)
    ids, number = cc3d.connected_components(mask, connectivity=26, return_N=True, binary_image=True)
    return ids.astype(np.min_scalar_type(number), copy=False)


def _read_all(source: Source) -> Iterator[NDArray[Any]]:
    for begin, grid in source.grid.blocks((256, 256, 256)):
        yield source.read(begin, grid.shape)


def _largest(source: Source) -> int:
    low, high = 0, 0
    for block in _read_all(source):
        low, high = min(low, int(block.min(initial=0))), max(high, int(block.max(initial=0)))
    if low < 0:
        raise InputError(f"{source.location} holds the id {low}; ids are at least 0, 0 being background")
    return high


def _all_ids(source: Source) -> NDArray[Any]:
    """All ids above 0, sorted; for renumbering them if they do not fit in 32 bits."""
    found = np.zeros(0, np.uint64)
    for block in _read_all(source):
        found = np.union1d(found, np.unique(block).astype(np.uint64))
    return found[found > 0]
