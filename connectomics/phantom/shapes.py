"""Signed distances (nm, negative inside) of the shapes that a phantom is built of, in closed form.

Every shape is one row of parameters, so that a block's shapes can be evaluated by one compiled loop:

- ball: center (0:3), axis (3:6), semi-axis along it (6) and across it (7): a spheroid;
- tube: a segment from (0:3) to (3:6) with radius (6) at its begin and (7) at its end, arc length at the begin (8),
  a unit vector across the tube (9:12), which cristae are oriented by;
- bowl: a piece of a spherical shell: center of the sphere (0:3), axis (3:6), radius (6), cosine (7) and sine (8) of
  the half aperture, half thickness in the middle (9) and at the rim (10);
- disc: a cylinder: center (0:3), axis (3:6), radius (6), half height (7).
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

PARAMETERS = 12
BALL, TUBE, BOWL, DISC = 0, 1, 2, 3


@njit(cache=True, nogil=True)
def spheroid(along: float, across: float, semi_along: float, semi_across: float) -> float:
    """Signed distance to a spheroid, of first order (I. Quilez, "Ellipsoid SDF"): exact on it, and for spheres."""
    u = along / semi_along
    v = across / semi_across
    k0 = np.sqrt(u * u + v * v)
    u /= semi_along
    v /= semi_across
    k1 = np.sqrt(u * u + v * v)
    if k1 < 1e-12:
        return -min(semi_along, semi_across)
    return k0 * (k0 - 1.0) / k1


@njit(cache=True, nogil=True)
def distance(shape: int, p: NDArray[np.float64], z: float, y: float, x: float) -> float:
    """Signed distance (nm) of the point (z, y, x) to the shape with parameters ``p``."""
    dz = z - p[0]
    dy = y - p[1]
    dx = x - p[2]
    if shape == TUBE:
        az = p[3] - p[0]
        ay = p[4] - p[1]
        ax = p[5] - p[2]
        t = (dz * az + dy * ay + dx * ax) / (az * az + ay * ay + ax * ax)
        t = min(1.0, max(0.0, t))
        dz -= t * az
        dy -= t * ay
        dx -= t * ax
        return np.sqrt(dz * dz + dy * dy + dx * dx) - (p[6] + t * (p[7] - p[6]))
    along = dz * p[3] + dy * p[4] + dx * p[5]
    square = dz * dz + dy * dy + dx * dx
    across = np.sqrt(max(0.0, square - along * along))
    if shape == BALL:
        return spheroid(along, across, p[6], p[7])
    if shape == BOWL:
        if along * p[8] > across * p[7]:  # within the aperture
            reach = across * p[7] / max(1e-9, along * p[8])
            half = p[9] + (p[10] - p[9]) * reach * reach * reach * reach
            return abs(np.sqrt(square) - p[6]) - half
        u = along - p[6] * p[7]
        v = across - p[6] * p[8]
        return np.sqrt(u * u + v * v) - p[10]
    u = across - p[6]
    v = abs(along) - p[7]
    outside = np.sqrt(max(u, 0.0) ** 2 + max(v, 0.0) ** 2)
    return outside + min(0.0, max(u, v))


@njit(cache=True, nogil=True)
def cell_distance(p: NDArray[np.float64], z: float, y: float, x: float) -> float:
    """Signed distance (nm) to the cell's body: a rounded box, begin (0:3), end (3:6), radius of its edges (6)."""
    largest = -1e30
    outside = 0.0
    for axis in range(3):
        w = z if axis == 0 else (y if axis == 1 else x)
        q = abs(w - 0.5 * (p[axis] + p[axis + 3])) - 0.5 * (p[axis + 3] - p[axis]) + p[6]
        largest = max(largest, q)
        outside += max(q, 0.0) ** 2
    return np.sqrt(outside) + min(largest, 0.0) - p[6]


@njit(cache=True, nogil=True)
def nucleus_distance(p: NDArray[np.float64], z: float, y: float, x: float) -> float:
    """Signed distance (nm) to the nucleus, a spheroid with the parameters of a ball."""
    return distance(BALL, p, z, y, x)


@njit(cache=True, nogil=True)
def body_distances(
    cell: NDArray[np.float64], nucleus: NDArray[np.float64], points: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Distances (nm) of ``points`` (n, 3) to the cell's body and to the nucleus."""
    to_cell = np.empty(len(points), np.float64)
    to_nucleus = np.empty(len(points), np.float64)
    for i in range(len(points)):
        to_cell[i] = cell_distance(cell, points[i, 0], points[i, 1], points[i, 2])
        to_nucleus[i] = nucleus_distance(nucleus, points[i, 0], points[i, 1], points[i, 2])
    return to_cell, to_nucleus


def bounds(shape: int, p: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Begin and end (nm, z y x) of a box that holds the shape."""
    if shape == TUBE:
        r = max(p[6], p[7])
        return np.minimum(p[0:3], p[3:6]) - r, np.maximum(p[0:3], p[3:6]) + r
    if shape == BALL:
        r = max(p[6], p[7])
        return p[0:3] - r, p[0:3] + r
    if shape == BOWL:
        middle = p[0:3] + p[3:6] * p[6] * (1 + p[7]) / 2  # of the cap's height along the axis
        r = float(np.hypot(p[6] * p[8], p[6] * (1 - p[7]) / 2)) + max(p[9], p[10])
        return middle - r, middle + r
    r = float(np.hypot(p[6], p[7]))
    return p[0:3] - r, p[0:3] + r
