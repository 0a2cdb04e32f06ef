"""Reading stored affinities: the channels that lie beside a class's probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.decoding.probabilities import open_probabilities, read_block
from connectomics.errors import IncompleteError, MetadataError, MissingError
from connectomics.geometry import Index, VoxelGrid
from connectomics.io import store
from connectomics.io.multiscale import Multiscale

FOLDER = "affinities"
_WHOLE = 0.01  # voxels: how far an offset may be from a whole number of them


@dataclass(frozen=True)
class StoredAffinities:
    """The affinities of a class, ``{class}/affinities/0``, ``1``, ... on the grid of the class.

    Attributes:
        channels: one a pair of voxels.
        offsets: (K, 3) int64 voxels of the grid, z y x: channel k says whether p and p + offsets[k] are of one object.
    """

    channels: tuple[Multiscale, ...]
    offsets: NDArray[np.int64]

    @classmethod
    def open(cls, probabilities: Multiscale) -> StoredAffinities:
        """Those of the class whose opened probabilities are given.

        Raises:
            MissingError: there are none. IncompleteError: one is only half written. MetadataError: one is no affinity,
            has another grid or type than the others, or an offset that is no whole number of voxels.
        """
        place = store.join(probabilities.location, FOLDER)
        names = sorted((n for n in store.list_groups(place) if n.isdigit()), key=int)
        if not names:
            raise MissingError(
                f"no affinities in {place}; train with a head of the kind affinities for this class (model.heads) and "
                f"predict again, or decode with another method"
            )
        grid = probabilities.levels[0].grid
        channels = tuple(open_probabilities(store.join(place, name)) for name in names)
        offsets = np.array([_offset(channel, grid) for channel in channels])
        if len({channel.levels[0].dtype for channel in channels}) > 1:
            raise MetadataError(f"the channels of {place} are stored in different types; predict again")
        return cls(channels, offsets)

    @property
    def reach(self) -> Index:
        """How far the longest offset along each axis is, voxels."""
        z, y, x = (int(n) for n in np.abs(self.offsets).max(axis=0))
        return z, y, x

    def read(self, begin: Sequence[int], shape: Sequence[int]) -> NDArray[Any]:
        """(K, *shape) of a block that begins at voxel ``begin``, as stored (uint8: value/255; or float16)."""
        values = np.empty((len(self.channels), *shape), self.channels[0].levels[0].dtype)
        for channel, into in zip(self.channels, values, strict=True):
            into[:] = read_block(channel, begin, shape)
        return values


def _offset(channel: Multiscale, grid: VoxelGrid) -> list[int]:
    """The offset of one channel in voxels of ``grid``; checked to be an affinity that is whole and on that grid."""
    where, about = channel.location, channel.attrs.get("connectomics")
    if not isinstance(about, dict) or about.get("artefact") != "affinity":
        kind = about.get("artefact") if isinstance(about, dict) else "no 'connectomics' attribute"
        raise MetadataError(f"{where}: expected affinities written by predict, found {kind}")
    if about.get("complete") is not True:
        raise IncompleteError(f"{where} is only half written; run predict to its end first")
    if channel.levels[0].grid != grid:
        raise MetadataError(f"{where} lies on another grid than its class; predict both again")
    given = about.get("offset_nm")
    if not isinstance(given, list) or len(given) != 3:
        raise MetadataError(f"{where}: expected the attribute offset_nm with three numbers (z, y, x), found {given}")
    exact = [float(nm) / size for nm, size in zip(given, grid.voxel_size, strict=True)]
    whole = [round(o) for o in exact]
    if max(abs(a - b) for a, b in zip(exact, whole, strict=True)) > _WHOLE:
        raise MetadataError(
            f"{where}: an offset of {given} nm is no whole number of voxels of {tuple(grid.voxel_size)} nm; predict at "
            f"the voxel size of training"
        )
    return whole
