"""Surface area of voxel objects by the Cauchy-Crofton formula over 13 directions, for voxels of any edge lengths.

The area of a surface is four times the mean, over all directions, of the area of its projection, with every pass of a
line through the object counted. In a lattice the lines run along the 13 directions to the 26 neighbours of a voxel:
along direction d (nm) one line stands for ``volume of a voxel / |d|`` of the plane across it, and every pass is two
steps out of the object. Each direction weighs as much as the part of the sphere that is nearest to it (its Voronoi
cell), which depends on the voxel's edge lengths. Sources: J. Ohser and F. Muecklich, Statistical Analysis of
Microstructures in Materials Science, Wiley 2000; D. Legland, K. Kieu and M.-F. Devaux, Computation of Minkowski
measures on 2D and 3D binary images, Image Anal. Stereol. 26 (2007) 83-92, whose weights for cubic voxels these are.

Error (measured, digitised balls at 12 places in the lattice): cubic voxels within 3 % at a radius of 5 voxels, 2 % at
8, 0.3 % at 20; voxels of 2:1 and 4:1 within 6 % where the radius is 3 of the longest edges, 2 % at 5. Counting faces
gives 1.5 times the area. A single plane depends on its orientation, the mean over all being right: -7 % (along an axis)
to +2 % for cubic voxels, -12 % to +9 % for 2:1, -20 % to +10 % for 4:1. So a cube along the axes of cubic voxels comes
out at 0.91 of its area (30 voxels wide).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: One step of each kind, in the order of the kernels' counts: 4 z + 2 y + x - 1.
_STEPS = np.array([(0, 0, 1), (0, 1, 0), (0, 1, 1), (1, 0, 0), (1, 0, 1), (1, 1, 0), (1, 1, 1)])


def direction_shares(voxel_size: Sequence[float]) -> NDArray[np.float64]:
    """(7,) the part of the sphere that is nearest to one of the 26 directions, by kind; ``voxel_size`` nm, z y x."""
    from scipy.spatial import SphericalVoronoi

    steps = np.argwhere(np.ones((3, 3, 3), np.bool_)) - 1
    steps = steps[np.any(steps != 0, axis=1)]
    lengths = steps * np.asarray(voxel_size, np.float64)
    cells = SphericalVoronoi(lengths / np.linalg.norm(lengths, axis=1)[:, None])
    areas = cells.calculate_areas() / (4 * np.pi)
    # those of one kind are mirror images of each other: the mean only takes rounding away
    return np.array([areas[np.all(np.abs(steps) == kind, axis=1)].mean() for kind in _STEPS])


def step_areas(voxel_size: Sequence[float]) -> NDArray[np.float64]:
    """(7,) nm2 of surface for which one step out of the object stands, by kind; ``voxel_size`` nm, z y x."""
    size = np.asarray(voxel_size, np.float64)
    areas: NDArray[np.float64] = (
        4 * np.prod(size) * direction_shares(voxel_size) / np.linalg.norm(_STEPS * size, axis=1)
    )
    return areas


def sphericity(volume: NDArray[Any], surface: NDArray[Any]) -> NDArray[np.float64]:
    """pi^(1/3) (6 V)^(2/3) / A: the area of a ball of that volume over the object's (H. Wadell, J. Geol. 1935).

    1 for a ball, 0.81 for a true cube; NaN where there is no surface. Objects of a few voxels may come out above 1.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.pi ** (1 / 3) * (6 * np.asarray(volume, np.float64)) ** (2 / 3) / surface
    return np.where(np.asarray(surface) > 0, found, np.nan)
