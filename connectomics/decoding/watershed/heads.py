"""Objects as a network has learned to see them: heads of distances and of boundaries (`model.heads`) in a watershed.

A distance takes the place of the distance to the background: seeds and flooding are those of every watershed here
(`connectomics.decoding.watershed.forest`). A boundary is a wall between objects, as another class may be
(`connectomics.decoding.decode.decode_between`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from connectomics.decoding.probabilities import open_probabilities, read_block, unit_of
from connectomics.decoding.watershed.distance import OUTSIDE
from connectomics.errors import IncompleteError, MetadataError, MissingError
from connectomics.io import store
from connectomics.io.multiscale import Multiscale


@dataclass(frozen=True, eq=False)
class LearnedDistance:
    """How stored values of 1/2 + tanh(d / scale) / 2, d the signed distance to an object's border, become heights.

    Attributes:
        floor: no height is lower; pieces that meet at it are one.
    """

    floor: int

    @classmethod
    def of(cls, scale_nm: float, max_depth_nm: float, dtype: np.dtype[Any]) -> LearnedDistance:
        """The rule for values of ``dtype`` (uint8: value/255; or float16): cut off where they stand for
        ``max_depth_nm``, or already where so large a distance cannot be told from larger ones."""
        deepest = np.array([(0.5 + math.tanh(max_depth_nm / scale_nm) / 2) * unit_of(dtype)])
        stored = np.rint(deepest) if dtype == np.uint8 else deepest
        return cls(-int(_rank(stored.astype(dtype))[0]))

    def heights(self, mask: NDArray[np.bool_], values: NDArray[Any]) -> NDArray[np.int32]:
        """Heights for `fragments`.

        Args:
            mask: (D, H, W). values: (D, H, W) uint8 or float16, not negative.

        Returns:
            (D + 2, H + 2, W + 2) int32: minus the rank of the value; `OUTSIDE` where the mask is not, and in a rim
            around all.
        """
        out = np.full([n + 2 for n in mask.shape], OUTSIDE, np.int32)
        out[1:-1, 1:-1, 1:-1][mask] = np.maximum(-_rank(values[mask]).astype(np.int32), self.floor)
        return out


@dataclass(frozen=True, eq=False)
class HeadValues:
    """A head of one class in memory: (D, H, W) uint8 or float16, and its scale."""

    values: NDArray[Any]
    scale_nm: float


@dataclass(frozen=True, eq=False)
class StoredHead:
    """A head beside a class's probabilities, ``{class}/distance`` or ``{class}/boundary``, on the grid of the class."""

    kind: str
    source: Multiscale
    scale_nm: float

    @classmethod
    def open(cls, probabilities: Multiscale, kind: str) -> Self:
        """The one of the class whose opened probabilities are given.

        Raises:
            MissingError: there is none. IncompleteError: it is only half written. MetadataError: it is no such head, or
            lies on another grid.
        """
        where = store.join(probabilities.location, kind)
        if kind not in store.list_groups(probabilities.location):
            raise MissingError(
                f"no {kind} head at {where}, which decoding with height: {kind} reads; train with a head of that kind "
                f"for this class (model.heads) and predict again, or leave height out"
            )
        source = open_probabilities(where)
        about = source.attrs.get("connectomics")
        if not isinstance(about, dict) or about.get("artefact") != kind:
            found = about.get("artefact") if isinstance(about, dict) else "no 'connectomics' attribute"
            raise MetadataError(f"{where}: expected a {kind} head written by predict, found {found}")
        if about.get("complete") is not True:
            raise IncompleteError(f"{where} is only half written; run predict to its end first")
        if source.levels[0].grid != probabilities.levels[0].grid:
            raise MetadataError(f"{where} lies on another grid than its class; predict both again")
        scale = about.get("scale_nm")
        if not isinstance(scale, int | float) or not scale > 0:
            raise MetadataError(f"{where}: expected the attribute scale_nm with a positive number, found {scale!r}")
        return cls(kind, source, float(scale))

    def rule(self, max_depth_nm: float) -> LearnedDistance:
        """How its values become heights, of a distance."""
        return LearnedDistance.of(self.scale_nm, max_depth_nm, self.source.levels[0].dtype)

    def read(self, begin: Sequence[int], shape: Sequence[int]) -> NDArray[Any]:
        """A block of it, as stored."""
        return read_block(self.source, begin, shape)

    def all(self) -> HeadValues:
        """All of it in memory."""
        return HeadValues(self.read((0, 0, 0), self.source.levels[0].grid.shape), self.scale_nm)


def _rank(values: NDArray[Any]) -> NDArray[Any]:
    """Whole numbers in the order of stored values: floats that are not negative rank as their bits do."""
    return values.view(np.int16) if values.dtype == np.float16 else values
