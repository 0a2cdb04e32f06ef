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

from collections.abc import Iterable

import numpy as np
from numba import njit
from numpy.typing import NDArray

from connectomics.phantom.textures import Floats

PARAMETERS = 12
BALL, TUBE, BOWL, DISC = 0, 1, 2, 3


def parameters(*parts: float | Floats) -> Floats:
    """One row of parameters from its parts in order; the rest is 0."""
    values = np.hstack(parts)
    row = np.zeros(PARAMETERS)
    row[: len(values)] = values
    return row


@njit(cache=True, nogil=True)
def distance(shape: int, p: Floats, z: float, y: float, x: float) -> float:
    """Signed distance (nm) of the point (z, y, x) to the shape with parameters ``p``."""
    dz, dy, dx = z - p[0], y - p[1], x - p[2]
    if shape == TUBE:
        az, ay, ax = p[3] - p[0], p[4] - p[1], p[5] - p[2]
        t = (dz * az + dy * ay + dx * ax) / (az * az + ay * ay + ax * ax)
        t = min(1.0, max(0.0, t))
        dz, dy, dx = dz - t * az, dy - t * ay, dx - t * ax
        return np.sqrt(dz * dz + dy * dy + dx * dx) - (p[6] + t * (p[7] - p[6]))
    along = dz * p[3] + dy * p[4] + dx * p[5]
    square = dz * dz + dy * dy + dx * dx
    across = np.sqrt(max(0.0, square - along * along))
    if shape == BALL:
        # of first order (I. Quilez, "Ellipsoid SDF"): exact on the surface, and for spheres
        u, v = along / p[6], across / p[7]
        k0 = np.sqrt(u * u + v * v)
        u, v = u / p[6], v / p[7]
        k1 = np.sqrt(u * u + v * v)
        return -min(p[6], p[7]) if k1 < 1e-12 else k0 * (k0 - 1.0) / k1
    if shape == BOWL:
        if along * p[8] > across * p[7]:  # within the aperture
            reach = across * p[7] / max(1e-9, along * p[8])
            half = p[9] + (p[10] - p[9]) * reach * reach * reach * reach
            return abs(np.sqrt(square) - p[6]) - half
        u, v = along - p[6] * p[7], across - p[6] * p[8]
        return np.sqrt(u * u + v * v) - p[10]
    u, v = across - p[6], abs(along) - p[7]
    return np.sqrt(max(u, 0.0) ** 2 + max(v, 0.0) ** 2) + min(0.0, max(u, v))


@njit(cache=True, nogil=True)
def cell_distance(p: Floats, z: float, y: float, x: float) -> float:
    """Signed distance (nm) to the cell's body: a rounded box, begin (0:3), end (3:6), radius of its edges (6)."""
    largest, outside = -1e30, 0.0
    for axis, w in enumerate((z, y, x)):
        q = abs(w - 0.5 * (p[axis] + p[axis + 3])) - 0.5 * (p[axis + 3] - p[axis]) + p[6]
        largest = max(largest, q)
        outside += max(q, 0.0) ** 2
    return np.sqrt(outside) + min(largest, 0.0) - p[6]


@njit(cache=True, nogil=True)
def body_distances(cell: Floats, nucleus: Floats, points: Floats) -> tuple[Floats, Floats]:
    """Distances (nm) of ``points`` (n, 3) to the cell's body and to the nucleus, a ball."""
    to_cell, to_nucleus = np.empty(len(points)), np.empty(len(points))
    for i, p in enumerate(points):
        to_cell[i] = cell_distance(cell, p[0], p[1], p[2])
        to_nucleus[i] = distance(BALL, nucleus, p[0], p[1], p[2])
    return to_cell, to_nucleus


def bounds(table: NDArray[np.int64], parameters: Floats, margin: float, bowl_margin: float) -> Floats:
    """Boxes (begin, end; nm, z y x) that hold each shape and a margin around it, (n, 6)."""
    shape, p = table[:, :1], parameters
    bowl, a, b = shape == BOWL, p[:, 6:7], p[:, 7:8]
    begin = np.where(bowl, p[:, 0:3] + p[:, 3:6] * a * (1 + b) / 2, p[:, 0:3])  # of a bowl the middle of its height
    end = np.where(shape == TUBE, p[:, 3:6], begin)
    wide = np.hypot(a * p[:, 8:9], a * (1 - b) / 2) + np.maximum(p[:, 9:10], p[:, 10:11]) + bowl_margin
    r = np.where(bowl, wide, np.where(shape == DISC, np.hypot(a, b), np.maximum(a, b)) + margin)
    return np.hstack([np.minimum(begin, end) - r, np.maximum(begin, end) + r])


def unit(vector: Floats) -> Floats:
    """Return a vector of length 1."""
    return np.asarray(vector / np.sqrt(vector @ vector))


def across(vector: Floats, guess: Floats) -> Floats:
    """A unit vector at right angles to ``vector``, near ``guess``."""
    flat = guess - vector * float(vector @ guess) / float(vector @ vector)
    if flat @ flat < 1e-12:
        return across(vector, np.roll(guess, 1) + 0.1)
    return unit(flat)


def segments(path: Floats, radii: Floats, guess: Floats) -> list[tuple[int, Floats]]:
    """A path as tube primitives, with arc length and a frame that follows the bends."""
    rows = []
    length = 0.0
    for a, b, ra, rb in zip(path[:-1], path[1:], radii[:-1], radii[1:], strict=True):
        guess = across(b - a, guess)
        rows.append((TUBE, parameters(a, b, ra, rb, length, guess)))
        length += float(np.linalg.norm(b - a))
    return rows


def bowl(center: Floats, axis: Floats, radius: float, aperture: float, half: float, rim: float) -> Floats:
    """Return the parameters of a bowl with half of its aperture, in rad."""
    return parameters(center, axis, radius, np.cos(aperture), np.sin(aperture), half, rim)


def rings(bowl: Floats, circles: Iterable[tuple[float, int]]) -> Floats:
    """Points (n, 3) on the middle of a bowl: rings at an angle from its axis, of a number of points each."""
    axis = bowl[3:6]
    u = across(axis, np.array([0.3, 0.5, 0.8]))
    v = np.cross(axis, u)
    points = []
    for angle, n in circles:
        around = (np.arange(n) * (2 * np.pi / n))[:, None]
        side = np.sin(angle) * (np.cos(around) * u + np.sin(around) * v)
        points.append(bowl[0:3] + bowl[6] * (np.cos(angle) * axis + side))
    return np.concatenate(points)


def bowl_balls(bowl: Floats) -> Floats:
    """Spheres that cover a bowl: rings around its axis, as far apart as the bowl is thick."""
    radius, half = float(bowl[6]), float(bowl[10])
    aperture = float(np.arctan2(bowl[8], bowl[7]))
    angles = np.linspace(0.0, aperture, max(2, int(aperture * radius / half) + 2))
    centers = rings(bowl, ((a, max(1, int(np.ceil(2 * np.pi * radius * np.sin(a) / half)))) for a in angles))
    return np.column_stack([centers, np.full(len(centers), half)])
