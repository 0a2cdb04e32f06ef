"""From a patch request to a patch: place it, draw its augmentation, and sample raw and labels in one pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from connectomics.data.arrays import CropArrays
from connectomics.data.augmentation import CoordinateMap, PatchAugmentor, sample
from connectomics.data.patches import PackedPatch
from connectomics.data.sampling import PatchRequest, place_known, place_patch, tilings
from connectomics.data.volumes import CropVolume
from connectomics.geometry import Index, Triple, VoxelGrid

_SEED = 2**63 - 1


@dataclass(frozen=True)
class PatchShape:
    """A view of a place: voxels (z y x) of a voxel size (nm)."""

    voxels: Index
    voxel_size: Triple


def context_needed(crop: Sequence[int], patch: Sequence[int], reach: Sequence[float], scale: Sequence[float]) -> Index:
    """Voxels of raw around a crop that patches can look at.

    Args:
        crop: the crop's shape in voxels of the run. patch: the patch's, which decides where its middle can lie.
        reach: how far from its middle a view looks, in voxels of the view. scale: voxels of the view in one of the run.
    """
    needed = []
    for n, p, r, s in zip(crop, patch, reach, scale, strict=True):
        nearest = (p / 2 - tilings(n, p)[2]) * s  # of a patch's middle to the crop's face; negative: outside
        needed.append(max(0, math.ceil(r - nearest)) + 1)  # one more for the neighbour that interpolation looks at
    return needed[0], needed[1], needed[2]


class PatchReader:
    """Reads patches of some crops: the run's view with labels, and further views of the same places.

    Where objects are told apart, the codes of a crop say state and object in one number, so that the one spatial pass
    moves both; they are taken apart afterwards.
    """

    def __init__(
        self,
        volumes: Sequence[CropVolume],
        shape: PatchShape,
        views: Sequence[tuple[PatchShape, Sequence[CropVolume]]] = (),
        augmentor: PatchAugmentor | None = None,
        min_known: float = 0.0,
    ) -> None:
        """``volumes``: the crops at the run's voxel size. ``views``: for each further view the same crops at its own.
        ``min_known``: least share of a patch's voxels at which something is known, where a crop allows it."""
        self.volumes = list(volumes)
        self.shape = shape
        self.views = [(view, list(at)) for view, at in views]
        self.augmentor = augmentor
        self.min_known = min_known

    def read(self, request: PatchRequest) -> PackedPatch:
        """The patch of a request: a function of the request alone."""
        volume = self.volumes[request.index]
        rng = np.random.default_rng(request.seed)
        grid = self._place(volume, request, rng)
        spatial = None if self.augmentor is None else self.augmentor.spatial
        moved = CoordinateMap.identity() if spatial is None else spatial.draw(rng)
        middle = np.asarray(grid.box.center)
        image, codes, arrays = _sample(volume, middle, moved, self.shape.voxels)
        images = [image[None]]
        for view, at in self.views:
            ratio = np.divide(view.voxel_size, self.shape.voxel_size)
            images.append(_sample(at[request.index], middle, moved.scaled(ratio), view.voxels)[0][None])
        states, ids = arrays.states, None
        if states.instances:
            codes, ids = states.split(codes)
            states = states.plain
        patch = PackedPatch(
            images=tuple(images),
            codes=codes,
            states=states,
            grid=grid,
            crop=request.index,
            seed=int(rng.integers(_SEED)),
            drawn_by=request.drawn_by,
            normalization=volume.normalized,
            augmentation=moved.parameters,
            instances=arrays.states.instances,
            ids=ids,
        )
        return patch if self.augmentor is None else self.augmentor.finish(patch, int(rng.integers(2**31)))

    def _place(self, volume: CropVolume, request: PatchRequest, rng: np.random.Generator) -> VoxelGrid:
        """Where the patch is: as the sampler has it, and shifted inside the raw."""

        def inside(grid: VoxelGrid) -> VoxelGrid:
            begin = volume.grid.index_range(grid.box)[0]
            return volume.grid.crop(volume.raw_extent.inside(begin, grid.shape), grid.shape)

        if self.min_known <= 0:
            return inside(place_patch(volume.grid, self.shape.voxels, request.point, rng))

        def known_share(grid: VoxelGrid) -> float:
            codes = volume.label_codes(grid)
            known = codes.states.known.any(axis=1)
            return float(np.take(known, codes.codes).mean())

        return inside(place_known(volume.grid, self.shape.voxels, request.point, rng, known_share, self.min_known))


def _sample(
    volume: CropVolume, middle: NDArray[np.float64], moved: CoordinateMap, shape: Index
) -> tuple[NDArray[np.float32], NDArray[np.unsignedinteger], CropArrays]:
    """Image and codes of a view of ``shape`` voxels about ``middle`` (nm), and what they were sampled from."""
    center = volume.grid.to_index(middle)
    low, high = moved.bounds(shape)
    # one more voxel to either side: interpolation looks at the next, and positions are rounded
    begin = np.floor(center + low).astype(int) - 1
    end = np.ceil(center + high).astype(int) + 2
    arrays = volume.arrays(tuple(begin.tolist()), tuple(end.tolist()))
    image, codes = sample(arrays, center, moved, shape)
    return image, codes, arrays
