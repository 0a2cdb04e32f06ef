"""`CoordinateMap`: where in the source each voxel of a patch comes from.

Offsets are voxels from the patch center, z y x: voxel i of an axis with n voxels is at ``i - (n - 1) / 2``. A map takes
an offset in the patch to an offset in the source, so it is the *inverse* of the transform that a viewer sees.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from dataclasses import field as made_by
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import map_coordinates

from connectomics.errors import InputError
from connectomics.geometry import Triple, triple

Parameters = tuple[tuple[str, Mapping[str, Any]], ...]
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Displacement:
    """A displacement field on a control grid centered on offset 0: trilinear, and constant beyond the grid.

    Control point k of an axis with n points is at ``(k - (n - 1) / 2) * spacing``.
    """

    vectors: NDArray[np.float32]  # (3, nz, ny, nx), voxels, added to the z, y, x of an offset at each control point
    spacing: Triple  # voxels between control points, z y x

    def __post_init__(self) -> None:
        if self.vectors.ndim != 4 or self.vectors.shape[0] != 3 or 0 in self.vectors.shape:
            raise InputError(f"displacement vectors must be (3, nz, ny, nx), got {self.vectors.shape}")
        if min(triple(self.spacing, "spacing")) <= 0:
            raise InputError(f"displacement spacing must be positive, got {self.spacing}")

    def at(self, offsets: ArrayLike) -> Floats:
        """Return the displacement (..., 3) at offsets (..., 3), in float64."""
        count = np.array(self.vectors.shape[1:])
        place = np.moveaxis(np.asarray(offsets, np.float64) / np.array(self.spacing) + (count - 1) / 2, -1, 0)
        # [..., None]: scipy takes no single position
        found = [map_coordinates(v, place[..., None], np.float64, order=1, mode="nearest") for v in self.vectors]
        return np.concatenate(found, axis=-1)


@dataclass(frozen=True, eq=False)
class CoordinateMap:
    """``source = outer @ (q + field(q)) + outer_shift`` with ``q = inner @ offset + inner_shift``.

    Matrices are (3, 3), shifts (3,) in voxels. An affine map has no ``field``, and the identity as its inner part.
    """

    outer: Floats = made_by(default_factory=lambda: np.eye(3))
    outer_shift: Floats = made_by(default_factory=lambda: np.zeros(3))
    field: Displacement | None = None
    inner: Floats = made_by(default_factory=lambda: np.eye(3))
    inner_shift: Floats = made_by(default_factory=lambda: np.zeros(3))
    parameters: Parameters = ()  # (transform name, drawn values) in the order of application; for reports only

    @classmethod
    def identity(cls) -> CoordinateMap:
        """Return the map that changes nothing."""
        return cls()

    @classmethod
    def affine(
        cls, matrix: ArrayLike, shift: ArrayLike = (0.0, 0.0, 0.0), parameters: Parameters = ()
    ) -> CoordinateMap:
        """Return the map ``source = matrix @ offset + shift``."""
        matrix = np.array(matrix, np.float64)
        if matrix.shape != (3, 3) or not np.isfinite(matrix).all():
            raise InputError(f"an affine map needs a finite matrix (3, 3), got {matrix.tolist()}")
        return cls(matrix, np.array(triple(shift, "shift")), parameters=parameters)

    def then(self, following: CoordinateMap) -> CoordinateMap:
        """Return the map that applies this transform to the patch first and then ``following``.

        The look-up runs in the reverse order: an offset goes through ``following``, then through this map into the
        source. Raises `InputError` if both have a displacement field.
        """
        if self.field is not None and following.field is not None:
            raise InputError("a coordinate map holds one displacement field: two elastic transforms cannot be combined")
        parameters = self.parameters + following.parameters
        if self.field is None:
            shift = self.outer @ following.outer_shift + self.outer_shift
            return replace(following, outer=self.outer @ following.outer, outer_shift=shift, parameters=parameters)
        shift = self.inner @ following.outer_shift + self.inner_shift
        return replace(self, inner=self.inner @ following.outer, inner_shift=shift, parameters=parameters)

    def scaled(self, ratio: ArrayLike, patch: ArrayLike | None = None) -> CoordinateMap:
        """Return the same map for offsets in voxels that are ``ratio`` (z, y, x) times as large; ``patch``: those of
        the patch, if they are not as large as those of the source."""
        size, own = (
            np.broadcast_to(np.asarray(r, np.float64), (3,)) for r in (ratio, ratio if patch is None else patch)
        )
        shift = self.outer_shift / size
        if self.field is None:
            return replace(self, outer=self.outer * own / size[:, None], outer_shift=shift)
        return replace(self, outer=self.outer / size[:, None], outer_shift=shift, inner=self.inner * own)

    def __call__(self, offsets: ArrayLike) -> Floats:
        """Return the source offsets (..., 3) of offsets (..., 3), in float64."""
        place = np.asarray(offsets, np.float64) @ self.inner.T + self.inner_shift
        if self.field is not None:
            place = place + self.field.at(place)
        return place @ self.outer.T + self.outer_shift

    @cached_property
    def right_angles(self) -> bool:
        """Whether the map only permutes, flips and shifts axes, so that voxels keep their size and orientation."""
        size = np.abs(self.outer)
        permutes = (size.sum(0) == 1).all() and (size.sum(1) == 1).all() and (size.max(0) == 1).all()
        return self.field is None and bool(permutes)

    def bounds(self, shape: Sequence[float]) -> tuple[Floats, Floats]:
        """Return the smallest and largest source offset (3,) of the voxel centers of a patch of ``shape``.

        Tight for affine maps; may be too large with a displacement field.
        """
        half = (np.asarray(shape, np.float64) - 1) / 2
        reach = np.abs(self.inner) @ half
        low, high = self.inner_shift - reach, self.inner_shift + reach
        if self.field is not None:
            vectors = self.field.vectors.reshape(3, -1).astype(np.float64)
            low, high = low + vectors.min(1), high + vectors.max(1)
        middle = self.outer @ ((low + high) / 2) + self.outer_shift
        reach = np.abs(self.outer) @ ((high - low) / 2)
        return middle - reach, middle + reach
