"""What predict wrote for a class, opened and checked: probabilities, heads, affinities, and its boundary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from connectomics.decoding.label_artifact import clear_unknown, unknown_of
from connectomics.decoding.parameters import DecodeParameters
from connectomics.decoding.probabilities import OnGrid, above, open_probabilities, read_block
from connectomics.decoding.watershed.heights import HeadValues, LearnedDistance
from connectomics.errors import MetadataError, MissingError
from connectomics.geometry import Index, VoxelGrid, index, slices_of
from connectomics.io import store
from connectomics.io.artifacts import require_complete
from connectomics.io.multiscale import Multiscale

_BLOCK = (256, 256, 256)
_OFFSET_ERROR = 0.01  # voxels: how far an offset may be from a whole number of them


def find_arrays(root: str | Path) -> Iterator[tuple[str, str, str]]:
    """Yield (data set, crop, class) of every array in a folder of predictions or labels, sorted."""
    for dataset in store.list_groups(str(root)):
        if not dataset.endswith(".zarr"):
            continue
        for crop in store.list_groups(store.join(str(root), dataset)):
            for name in store.list_groups(store.join(str(root), dataset, crop)):
                yield dataset.removesuffix(".zarr"), crop, name


def open_prediction(root: str | Path, dataset: str, crop: str, name: str) -> Multiscale:
    """Open the probabilities of one class of one crop.

    Raises:
        MetadataError: they are not a prediction. IncompleteError: they are half written.
    """
    return _open(store.join(root, f"{dataset}.zarr", crop, name), "probability")


def networks_of(said: Mapping[str, Any]) -> set[str]:
    """Return the hash of the network, or of the ensemble, that a prediction's attribute names; empty if it does not."""
    network = said.get("model", {}).get("checkpoint")
    return {str(network)} if network else set()


def trained_on(said: Mapping[str, Any]) -> bool:
    """Return whether the attribute of a prediction, or of labels made from it, says that the network was trained on the
    crop."""
    return bool(said.get("source", said).get("model", {}).get("seen_in_training"))


def open_boundary(source: Multiscale, parameters: DecodeParameters) -> Multiscale | None:
    """Open what separates the objects of a class, given its opened probabilities; None if nothing does."""
    if parameters.boundary:
        crop, _, name = source.location.rstrip("/").rpartition("/")
        location = store.join(crop, parameters.boundary)
        if not store.exists(location):
            raise MissingError(
                f"no prediction of {parameters.boundary} at {location}, the boundary that {name} is decoded with: "
                f"predict (merge) it with {name}, or leave decoding.classes.{name}.boundary out"
            )
        return _open(location, "probability")
    return StoredHead.open(source, "boundary").source if parameters.has_boundary else None


def read_on(source: Multiscale, grid: VoxelGrid) -> NDArray[Any]:
    """Return stored values at the voxels of ``grid``, in their stored type, read block by block."""
    other = OnGrid(source, grid)
    values = np.zeros(grid.shape, other.dtype)
    for begin, block in grid.blocks(_BLOCK):
        values[slices_of(begin, block.shape)] = other.read(begin, block.shape)
    return values


@dataclass(frozen=True, eq=False)
class StoredHead:
    """A head of a class, ``{class}/distance`` or ``{class}/boundary``, on the grid of the class."""

    source: Multiscale
    scale_nm: float

    @classmethod
    def open(cls, probabilities: Multiscale, kind: str) -> Self:
        """Open the head of the class with these probabilities.

        Raises:
            MissingError: there is none. IncompleteError: it is half written. MetadataError: it is another kind of
            array, or lies on another grid.
        """
        location = store.join(probabilities.location, kind)
        if kind not in store.list_groups(probabilities.location):
            raise MissingError(
                f"no {kind} head at {location}, which decoding with height: {kind} reads. Train with such a head "
                "for this class (model.heads) and predict again, or leave height out"
            )
        source = _open(location, kind, probabilities.levels[0].grid)
        scale = source.attrs["connectomics"].get("scale_nm")
        if not isinstance(scale, int | float) or not scale > 0:
            raise MetadataError(f"{location}: expected the attribute scale_nm with a positive number, got {scale!r}")
        return cls(source, float(scale))

    def rule(self, max_depth_nm: float) -> LearnedDistance:
        """Return how the values of a distance head become heights."""
        return LearnedDistance.of(self.scale_nm, max_depth_nm, self.source.levels[0].dtype)

    def read(self, begin: Sequence[int], shape: Sequence[int]) -> NDArray[Any]:
        """Read a block, as stored."""
        return read_block(self.source, begin, shape)

    def all(self) -> HeadValues:
        """Read the whole head."""
        return HeadValues(self.read((0, 0, 0), self.source.levels[0].grid.shape), self.scale_nm)


@dataclass(frozen=True)
class StoredAffinities:
    """The affinities of a class, ``{class}/affinities/0``, ``1``, ... on the grid of the class.

    Attributes:
        channels: one array for each offset.
        offsets: (K, 3) int64 voxels, z y x: channel k says whether p and p + offsets[k] belong to one object.
    """

    channels: tuple[Multiscale, ...]
    offsets: NDArray[np.int64]

    @classmethod
    def open(cls, probabilities: Multiscale) -> Self:
        """Open the affinities of the class with these probabilities.

        Raises:
            MissingError: there are none. IncompleteError: one is half written. MetadataError: one is another kind of
            array, has another grid or type, or an offset that is not a whole number of voxels.
        """
        folder = store.join(probabilities.location, "affinities")
        names = sorted((n for n in store.list_groups(folder) if n.isdigit()), key=int)
        if not names:
            raise MissingError(
                f"no affinities in {folder}; train with a head of the kind affinities for this class (model.heads) and "
                "predict again, or decode with another method"
            )
        grid = probabilities.levels[0].grid
        channels = tuple(_open(store.join(folder, name), "affinity", grid) for name in names)
        if len({channel.levels[0].dtype for channel in channels}) > 1:
            raise MetadataError(f"the channels of {folder} are stored in different types; predict again")
        return cls(channels, np.array([_offset(channel, grid) for channel in channels]))

    @property
    def reach(self) -> Index:
        """The longest offset along each axis, voxels."""
        return index(np.abs(self.offsets).max(axis=0))

    def read(self, begin: Sequence[int], shape: Sequence[int]) -> NDArray[Any]:
        """Read a block: (K, *shape), as stored (uint8: value/255; or float16)."""
        values = np.empty((len(self.channels), *shape), self.channels[0].levels[0].dtype)
        for channel, into in zip(self.channels, values, strict=True):
            into[:] = read_block(channel, begin, shape)
        return values


@dataclass(frozen=True, eq=False)
class Foreground:
    """The opened probabilities of a class and of the boundary between its objects, if any, at the same voxels."""

    source: Multiscale
    boundary: OnGrid | None
    parameters: DecodeParameters
    unknown: Mapping[str, Any]

    @classmethod
    def open(cls, location: str, parameters: DecodeParameters) -> Self:
        """Open the class at ``location``, ``.../{crop}/{class}``."""
        source = open_probabilities(location)
        boundary = open_boundary(source, parameters)
        on_grid = None if boundary is None else OnGrid(boundary, source.levels[0].grid)
        return cls(source, on_grid, parameters, unknown_of(source, boundary))

    def mask(self, begin: Sequence[int], shape: Sequence[int]) -> NDArray[np.bool_]:
        """Return where the class is, boundaries included; false where something is unknown."""
        mask = above(read_block(self.source, begin, shape), self.parameters.threshold)
        clear_unknown(mask, self.unknown, self.source.levels[0].grid.crop(begin, shape))
        return mask

    def boundaries(self, begin: Sequence[int], shape: Sequence[int]) -> NDArray[Any]:
        """Return the boundary probability, as stored; only if the parameters name a boundary."""
        assert self.boundary is not None
        return self.boundary.read(begin, shape)

    def cores(self, begin: Sequence[int], shape: Sequence[int]) -> NDArray[np.bool_]:
        """Return where the class is and no boundary."""
        mask = self.mask(begin, shape)
        if self.boundary is not None and mask.any():
            mask &= ~above(self.boundaries(begin, shape), self.parameters.threshold)
        return mask


def _open(location: str, kind: str, grid: VoxelGrid | None = None) -> Multiscale:
    """Open an array that predict wrote; check its kind, its completeness and, if given, its grid."""
    require_complete(location, kind)
    source = open_probabilities(location)
    if grid is not None and source.levels[0].grid != grid:
        raise MetadataError(f"{location} lies on another grid than its class; predict both again")
    return source


def _offset(channel: Multiscale, grid: VoxelGrid) -> list[int]:
    """Return the offset of an affinity channel in voxels of ``grid``."""
    given = channel.attrs["connectomics"].get("offset_nm")
    if not isinstance(given, list) or len(given) != 3:
        raise MetadataError(
            f"{channel.location}: expected the attribute offset_nm with three numbers (z, y, x), got {given}"
        )
    exact = [float(nm) / size for nm, size in zip(given, grid.voxel_size, strict=True)]
    whole = [round(o) for o in exact]
    if max(abs(a - b) for a, b in zip(exact, whole, strict=True)) > _OFFSET_ERROR:
        raise MetadataError(
            f"{channel.location}: the offset {given} nm is no whole number of voxels of {tuple(grid.voxel_size)} nm; "
            "predict at the voxel size of training"
        )
    return whole
