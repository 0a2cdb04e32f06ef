"""From a patch request to a patch: place it, draw its augmentation, and sample raw and labels in one pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from connectomics.data.arrays import CropArrays
from connectomics.data.augmentation import CoordinateMap, PatchAugmentor, SpatialAugmentor, sample
from connectomics.data.patches import PackedPatch
from connectomics.data.regions import Regions
from connectomics.data.sampling import PatchRequest, place_known, tilings
from connectomics.data.volumes import CropVolume
from connectomics.geometry import Index, Triple, VoxelGrid, index

#: a rotated patch should have at least this share of the known voxels of a straight one: a plane across a thin crop, or
#: across single annotated planes, would have few; it is drawn again, at most so often
_LEAST_KNOWN, _DRAWS = 0.75, 16


class PatchShape(NamedTuple):
    """One input of the network: voxel size (nm) and shape (voxels), z y x."""

    voxel_size: Triple
    voxels: Index


def context_needed(crop: Sequence[int], patch: Sequence[int], reach: Sequence[float], scale: Sequence[float]) -> Index:
    """Return how many voxels of raw around a crop an input can look at.

    ``crop``, ``patch``: shapes in voxels of the run. ``reach``: how far from its center an input looks, in its own
    voxels. ``scale``: voxels of the input per voxel of the run.
    """
    needed = []
    for n, p, r, s in zip(crop, patch, reach, scale, strict=True):
        nearest = (p / 2 - tilings(n, p)[2]) * s  # from a patch's center to the crop's face; negative: outside
        needed.append(max(0, math.ceil(r - nearest)) + 1)  # one more for the neighbor that interpolation looks at
    return index(needed)


class PatchReader:
    """Reads patches of some crops: the main input with labels, and further inputs at the same places.

    With object IDs, the codes of a crop stand for state and object together, so that one spatial pass moves both; they
    are split afterwards.
    """

    def __init__(
        self,
        volumes: Sequence[CropVolume],
        shape: PatchShape,
        inputs: Sequence[tuple[PatchShape, Sequence[CropVolume]]] = (),
        augmentor: PatchAugmentor | None = None,
        min_known: float = 0.0,
        regions: Regions | None = None,
    ) -> None:
        """``volumes``: the crops at the run's voxel size. ``inputs``: each further input with the same crops on the
        voxels of their raw. ``min_known``: smallest share of known voxels in a patch, where a crop allows it.
        ``regions``: of the crops, if patches should say theirs."""
        self.volumes = list(volumes)
        self.shape = shape
        self.inputs = [(given, list(at)) for given, at in inputs]
        self.augmentor = augmentor
        self.min_known = min_known
        self.regions = regions

    def read(self, request: PatchRequest) -> PackedPatch:
        """Return the patch of a request: a function of the request alone."""
        volume = self.volumes[request.index]
        grid, moved, rng = self.draw(request)
        center = np.asarray(grid.box.center)
        image, codes, arrays = _sample(volume, center, moved, self.shape.voxels)
        images = [image[None]]
        for given, at in self.inputs:
            images.append(_sample_further(at[request.index], center, moved, given, self.shape.voxel_size)[None])
        states, ids = arrays.states, None
        if states.instances:
            codes, ids = states.split(codes)
            states = states.plain
        patch = PackedPatch(
            images=tuple(images), codes=codes, states=states, grid=grid, crop=request.index,
            region=None if self.regions is None else self.regions.number(request.index, center),
            seed=int(rng.integers(2**63 - 1)), drawn_by=request.drawn_by, normalization=volume.normalized,
            augmentation=moved.parameters, instances=arrays.states.instances, ids=ids,
        )  # fmt: skip
        return patch if self.augmentor is None else self.augmentor.finish(patch, int(rng.integers(2**31)))

    def draw(self, request: PatchRequest) -> tuple[VoxelGrid, CoordinateMap, np.random.Generator]:
        """Return where the patch of a request is, its spatial augmentation, and its random stream after both."""
        volume, rng = self.volumes[request.index], np.random.default_rng(request.seed)

        def known_share(grid: VoxelGrid) -> float:
            codes = volume.label_codes(grid)
            return float(np.take(codes.states.known.any(axis=1), codes.codes).mean())

        grid = place_known(volume.grid, self.shape.voxels, request.point, rng, known_share, self.min_known)
        begin = volume.grid.index_range(grid.box)[0]
        grid = volume.grid.crop(volume.raw_extent.inside(begin, grid.shape), grid.shape)  # shifted inside the raw
        if self.augmentor is None or self.augmentor.spatial is None:
            return grid, CoordinateMap.identity(), rng
        center = volume.grid.to_index(np.asarray(grid.box.center))
        moved = self._draw_map(self.augmentor.spatial, center, volume, rng)
        if moved.right_angles:  # of a patch with even and odd sides, it may point between voxels: half a voxel aside
            start = center + moved.outer_shift - moved.outer @ ((np.array(grid.shape) - 1) / 2)
            moved = replace(moved, outer_shift=moved.outer_shift + np.rint(start) - start)
        return grid, moved, rng

    def _draw_map(
        self, spatial: SpatialAugmentor, center: NDArray[np.float64], volume: CropVolume, rng: np.random.Generator
    ) -> CoordinateMap:
        """Draw a map; repeat the draw, at most 16 times, if labels of much of the patch would be unknown."""
        if not spatial.may_leave:
            return spatial.draw(rng)
        straight = CoordinateMap.identity()
        enough = _LEAST_KNOWN * volume.known_share(places(straight, center, self.shape.voxels))
        drawn: list[tuple[float, CoordinateMap]] = []
        while len(drawn) < _DRAWS and (not drawn or drawn[-1][0] < enough):
            moved = spatial.draw(rng)
            drawn.append((volume.known_share(places(moved, center, self.shape.voxels)), moved))
        return max(drawn, key=lambda found: found[0])[1]


def places(moved: CoordinateMap, center: NDArray[np.float64], shape: Index) -> NDArray[np.float64]:
    """Return where a map takes voxels of a patch from, up to 8 along each axis: lattice indices (n, 3) of the crop.

    ``center``: of the patch, lattice index of the crop; ``shape``: voxels.
    """
    axes = [np.linspace(-(n - 1) / 2, (n - 1) / 2, min(n, 8)) for n in shape]
    offsets = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    return center + moved(offsets)


def _sample(
    volume: CropVolume, center: NDArray[np.float64], moved: CoordinateMap, shape: Index
) -> tuple[NDArray[np.float32], NDArray[np.unsignedinteger], CropArrays]:
    """Image and codes of an input of ``shape`` voxels about ``center`` (nm), and what they were sampled from."""
    middle = volume.grid.to_index(center)
    low, high = moved.bounds(shape)
    # one more voxel on either side: interpolation looks at the next, and positions are rounded
    begin = np.floor(middle + low).astype(int) - 1
    end = np.ceil(middle + high).astype(int) + 2
    arrays = volume.arrays(tuple(begin.tolist()), tuple(end.tolist()))
    image, codes = sample(arrays, middle, moved, shape)
    return image, codes, arrays


def samples_of(size: Triple, stored: Triple) -> Index:
    """Return how many samples (z, y, x) of stored voxels give a voxel of ``size``, less than a stored voxel apart."""
    return index(np.maximum(1, np.ceil(np.divide(size, stored) - 1e-3)).astype(int).tolist())


def _sample_further(
    volume: CropVolume, center: NDArray[np.float64], moved: CoordinateMap, given: PatchShape, own: Triple
) -> NDArray[np.float32]:
    """Image of a further input from the voxels of raw; ``own``: voxel size of the run, for which ``moved`` is.

    Larger voxels than those of raw are means of samples less than a voxel of raw apart: nearly what prediction reads,
    the mean over the box of each voxel (`connectomics.io.resample`).
    """
    size, stored = np.asarray(given.voxel_size), np.asarray(volume.grid.voxel_size)
    if np.allclose(size, stored):
        return _sample(volume, center, moved.scaled(size / own), given.voxels)[0]
    parts = samples_of(given.voxel_size, volume.grid.voxel_size)
    shape = index(np.multiply(given.voxels, parts).tolist())
    image, _, _ = _sample(volume, center, moved.scaled(stored / own, size / parts / own), shape)
    (d, h, w), (z, y, x) = given.voxels, parts
    means: NDArray[np.float32] = image.reshape(d, z, h, y, w, x).mean(axis=(1, 3, 5))
    return means
