"""One class of one crop as the pages show it: truth, prediction, probability and raw, read slice by slice.

Everything is read on a grid in nm, so that all parts of a picture are registered. Whole volumes are never in memory:
`examine` reads them in blocks to choose the slices to show.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.cellmap.catalog import Catalog
from connectomics.cellmap.classes import is_instance_class
from connectomics.cellmap.labels import read_instances, read_labels
from connectomics.decoding.probabilities import unit_of
from connectomics.errors import MetadataError
from connectomics.geometry import Index, VoxelGrid, other_axes
from connectomics.io import resample, store
from connectomics.io.artifacts import require_complete
from connectomics.io.multiscale import Multiscale, PlainArray
from connectomics.metrics.cellmap_metrics import Counts
from connectomics.metrics.challenge.zarr_v2 import Store, ZarrArray, is_array
from connectomics.pages.report.objects import Mistake, Objects

_BLOCK = (64, 256, 512)
_THRESHOLD = 0.5  # of a probability that stands in for missing labels

Labels = tuple[NDArray[Any], NDArray[np.bool_]]


@dataclass(frozen=True)
class LabelReader:
    """Labels that can be read on any grid: values (0 background; IDs if ``instance``), and where they are known."""

    grid: VoxelGrid
    instance: bool
    read: Callable[[VoxelGrid], Labels]


def plain_labels(location: str, class_name: str, grid: VoxelGrid | None = None) -> LabelReader:
    """Open a plain array, as in the scorer's ground truth; what the mask beside it leaves out is unknown.

    ``grid`` (from a crop table) is used if the attributes of the array have none.
    """
    array = PlainArray.open(location)
    found = array.grid or grid
    if found is None or found.shape != array.shape:
        raise MetadataError(
            f"{location}: expected voxel_size and translation for shape {array.shape}; add them to its attributes"
        )
    mask = PlainArray.open(f"{location}_mask") if store.exists(f"{location}_mask") else None
    return LabelReader(found, is_instance_class(class_name), partial(_read_nearest, array, found, mask=mask))


def annotated_labels(catalog: Catalog, dataset: str, crop: str, class_name: str, grid: VoxelGrid) -> LabelReader | None:
    """Return the data root's own labels of a class, in three states; None if the root has no such crop.

    An instance array gives the IDs at the voxel centers, other classes are combined as `read_labels` does.
    """
    if dataset not in catalog.datasets or crop not in catalog.crop_names(dataset):
        return None
    found = catalog.crop(dataset, crop)

    if is_instance_class(class_name) and class_name in found.labels:
        return LabelReader(grid, True, partial(read_instances, found, class_name))

    def read(part: VoxelGrid) -> Labels:
        volume = read_labels(found, [class_name], part)
        return volume.present_of(class_name).view(np.uint8), volume.known_of(class_name)

    return LabelReader(grid, False, read)


def stored_labels(source: Multiscale, class_name: str) -> LabelReader:
    """Return decoded labels, or probabilities cut at one half, depending on what the array says about itself."""
    about = source.attrs.get("connectomics", {})
    cut = about.get("artefact") == "probability"

    def read(grid: VoxelGrid) -> Labels:
        values, inside = source.read_nearest(grid, level=0)
        if cut:
            values = (values.astype(np.float32) > _THRESHOLD * unit_of(values.dtype)).view(np.uint8)
        return values, inside

    kind = about.get("kind") or ("instance" if is_instance_class(class_name) else "semantic")
    return LabelReader(source.grid, kind == "instance" and not cut, read)


def submitted_labels(archive: Store, crop: str, class_name: str, grid: VoxelGrid) -> LabelReader | None:
    """Return an array of a submission, None if it is missing; ``grid`` fills in for missing attributes."""
    path = f"{crop}/{class_name}"
    if not is_array(archive, path):
        return None
    array = ZarrArray(archive, path)
    size = array.attrs.get("voxel_size", list(grid.voxel_size))
    first = array.attrs.get("translation", list(grid.translation))
    if len(array.shape) != 3:
        raise MetadataError(f"{archive.location}: {path}: expected three axes, got shape {array.shape}")
    place = VoxelGrid(size, first, (array.shape[0], array.shape[1], array.shape[2]))
    return LabelReader(place, is_instance_class(class_name), partial(_read_nearest, array, place))


def _read_nearest(
    array: PlainArray | ZarrArray, place: VoxelGrid, grid: VoxelGrid, mask: PlainArray | None = None
) -> Labels:
    """Return the values of an array on the grid ``place`` nearest to the voxels of ``grid``; unknown outside, and where
    a mask is 0."""
    begin, part = place.part(grid.box)
    z, y, x = resample.inside_axes(place, grid)
    known = z[:, None, None] & y[:, None] & x
    if mask is not None:
        known &= resample.nearest(mask.read(begin, part.shape), part, grid) != 0
    return resample.nearest(array.read(begin, part.shape), part, grid), known


# -- one class of one crop ---------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Item:
    """One class of one crop with the parts that can be shown; a missing part is None, and ``problems`` says why.

    ``grid`` (nm) is that of the truth, or of the prediction if there is no truth.
    """

    dataset: str
    crop: str
    class_name: str
    grid: VoxelGrid
    truth: LabelReader | None = None
    prediction: LabelReader | None = None
    probability: Multiscale | None = None
    raw: Multiscale | None = None
    problems: tuple[str, ...] = ()

    @property
    def instance(self) -> bool:
        """Whether truth and prediction have object IDs."""
        return all(part is not None and part.instance for part in (self.truth, self.prediction))


def open_prediction(folder: Path, dataset: str, crop: str, class_name: str) -> Multiscale | None:
    """Open a class of a predictions or labels folder; None if it is missing, `IncompleteError` if it is incomplete."""
    location = store.join(str(folder), f"{dataset}.zarr", crop, class_name)
    if not store.exists(location):
        return None
    require_complete(location, "labels", "probability", foreign=True)
    return Multiscale.open(location)


# -- choosing slices ---------------------------------------------------------------------------------------------------
@dataclass
class Findings:
    """Counts of voxels from one pass over truth and prediction.

    Attributes:
        position: voxel (z, y, x) whose planes hold most errors and most truth; the middle if there is nothing.
        share: the part of the volume that was read. objects: None without instances.
        partner, matched: see `Objects.match`.
    """

    position: tuple[int, int, int] = (0, 0, 0)
    counts: Counts = field(default_factory=Counts)
    unknown: int = 0
    share: float = 1.0
    partner: dict[int, int] = field(default_factory=dict)
    matched: dict[int, int] = field(default_factory=dict)
    objects: Objects | None = None
    mistakes: list[Mistake] = field(default_factory=list)


def examine(item: Item, most_voxels: int = 1 << 27) -> Findings:
    """Read an item in blocks; beyond ``most_voxels`` only evenly spread slabs along z."""
    found = Findings(objects=Objects() if item.instance else None)
    errors, truths = ([np.zeros(n) for n in item.grid.shape] for _ in range(2))  # voxels by plane of each axis
    blocks, found.share = spread_blocks(item.grid, most_voxels)
    for begin, block in blocks:
        true, predicted, known = read_pair(item, block)
        t, p = (true != 0) & known, (predicted != 0) & known
        counts = Counts.of(p, t, known)
        found.counts += counts
        found.unknown += block.size - counts.known
        for mask, profiles in ((t != p, errors), (t, truths)):
            for axis, profile in enumerate(profiles):
                profile[begin[axis] : begin[axis] + block.shape[axis]] += mask.sum(axis=other_axes(axis))
        if found.objects is not None:
            found.objects.add(begin, true, predicted, known)
    z, y, x = (
        _peak(e / max(e.max(initial=0), 1) + t / max(t.max(initial=0), 1)) for e, t in zip(errors, truths, strict=True)
    )
    found.position = (z, y, x)
    if found.objects is not None:
        found.partner, found.matched = found.objects.match()
        found.mistakes = found.objects.mistakes(item.grid)
    return found


def read_pair(item: Item, grid: VoxelGrid) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.bool_]]:
    """Return truth and prediction on any grid (0 if there is none), and where the truth is known."""
    nothing = np.zeros(grid.shape, np.uint8)
    found = nothing if item.prediction is None else item.prediction.read(grid)[0]
    if item.truth is None:
        return nothing, found, np.ones(grid.shape, bool)
    true, known = item.truth.read(grid)
    return true, found, known


def spread_blocks(
    grid: VoxelGrid, most_voxels: int, shape: Index = _BLOCK
) -> tuple[list[tuple[Index, VoxelGrid]], float]:
    """Return blocks of a grid with their first voxels, and the share of the grid that they are.

    They are all blocks, or beyond ``most_voxels`` those of evenly spread slabs.
    """
    layers = math.ceil(grid.shape[0] / shape[0])
    wanted = max(1, int(layers * min(1.0, most_voxels / max(1, grid.size))))
    chosen = set(np.linspace(0, layers - 1, min(wanted, layers)).round().astype(int).tolist())
    blocks = [(begin, block) for begin, block in grid.blocks(shape) if begin[0] // shape[0] in chosen]
    return blocks, sum(block.size for _, block in blocks) / grid.size if grid.size else 1.0


def _peak(profile: NDArray[np.float64]) -> int:
    """Return the index of the maximum; of several, the one nearest to the middle."""
    best = np.flatnonzero(profile == profile.max(initial=0.0))
    middle = len(profile) / 2
    return int(best[np.argmin(np.abs(best - middle))]) if len(best) else 0


# -- one slice ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Plane:
    """Layer ``index`` of an item across ``axis``, at ``at`` nm: every part on one grid, (H, W); raw is known inside."""

    axis: int
    index: int
    at: float
    grid: VoxelGrid
    raw: NDArray[np.float32] | None
    inside: NDArray[np.bool_] | None
    truth: NDArray[Any]
    prediction: NDArray[Any]
    known: NDArray[np.bool_]
    probability: NDArray[np.float32] | None

    @property
    def extent(self) -> tuple[float, float]:
        """Height and width, nm."""
        rows, columns = other_axes(self.axis)
        extent = self.grid.box.extent
        return extent[rows], extent[columns]


def plane_grid(grid: VoxelGrid, axis: int, index: int, longest: int) -> VoxelGrid:
    """Return layer ``index`` of ``grid`` along ``axis``, reduced by integer factors to ``longest`` pixels a side."""
    begin, shape = [0, 0, 0], list(grid.shape)
    begin[axis], shape[axis] = index, 1
    layer = grid.crop(begin, shape)
    factors = [1 if a == axis else math.ceil(n / longest) for a, n in enumerate(grid.shape)]
    if max(factors) == 1:
        return layer
    return layer.at_voxel_size([s * f for s, f in zip(grid.voxel_size, factors, strict=True)])


def read_plane(item: Item, axis: int, index: int, longest: int) -> Plane:
    """Read one slice of every part; raw is resampled onto the pixels (linear, averaged when reduced)."""
    grid = plane_grid(item.grid, axis, index, longest)
    true, found, known = (v.squeeze(axis) for v in read_pair(item, grid))
    raw = inside = probability = None
    if item.raw is not None:
        values, there = item.raw.read_raw(grid)
        raw, inside = values.squeeze(axis), there.squeeze(axis)
    if item.probability is not None:
        scale = np.float32(unit_of(item.probability.levels[0].dtype))
        probability = item.probability.read_raw(grid)[0].squeeze(axis) / scale
    at = float(item.grid.to_world((index, index, index))[axis])
    return Plane(axis, index, at, grid, raw, inside, true, found, known, probability)
