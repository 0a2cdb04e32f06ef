"""Hashed noise: textures that are functions of a world position and a seed, the same on every grid.

Value noise: a cubic lattice of edge ``pitch`` (nm) is fixed to the world's origin, each node has a hashed value in
[-1, 1], and a point takes the smoothstep-weighted mean of its cell's eight nodes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

Whole = int | np.signedinteger[Any]
Floats = NDArray[np.float64]
#: A position, nm (z, y, x), and the positions along the three axes of a grid.
Point = tuple[float, float, float]
Axes = tuple[Floats, Floats, Floats]

_A, _B, _C = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F), np.uint64(0x165667B19E3779F9)
_M1, _M2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_S16, _S27, _S30, _S31 = np.uint64(16), np.uint64(27), np.uint64(30), np.uint64(31)
_S32, _S40, _S48, _LOW = np.uint64(32), np.uint64(40), np.uint64(48), np.uint64(0xFFFF)


@njit(cache=True, nogil=True)
def hash3(z: Whole, y: Whole, x: Whole, seed: int) -> np.uint64:
    """Return 64 well-mixed bits of a lattice node (splitmix64's finalizer over a linear combination of the indices)."""
    h = np.uint64(z) * _A + np.uint64(y) * _B + np.uint64(x) * _C + np.uint64(seed) * _M1
    h = (h ^ (h >> _S30)) * _M1
    h = (h ^ (h >> _S27)) * _M2
    return h ^ (h >> _S31)


@njit(cache=True, nogil=True)
def symmetric(bits: np.uint64) -> float:
    """Return the upper 24 bits as a number in [-1, 1)."""
    return np.float64(np.int64(bits >> _S40)) * (2.0 / 16777216.0) - 1.0


@njit(cache=True, nogil=True)
def part(bits: np.uint64, which: int) -> float:
    """Return one of the four 16-bit parts of a hash as a number in [0, 1)."""
    return np.float64(np.int64((bits >> (np.uint64(which) * _S16)) & _LOW)) * (1.0 / 65536.0)


@njit(cache=True, nogil=True)
def gaussian(bits: np.uint64) -> float:
    """Return a nearly normal number (mean 0, variance 1): the sum of four uniform ones."""
    total = np.int64(bits & _LOW) + np.int64((bits >> _S16) & _LOW)
    total += np.int64((bits >> _S32) & _LOW) + np.int64(bits >> _S48)
    return (np.float64(total) * (1.0 / 65536.0) - 2.0) * 1.7320508075688772


@njit(cache=True, nogil=True)
def smooth(t: float) -> float:
    """Return the smoothstep of a number in [0, 1]."""
    return t * t * (3.0 - 2.0 * t)


@njit(cache=True, nogil=True)
def _cells(positions: Floats, pitch: float) -> tuple[NDArray[np.int64], Floats]:
    """Lattice cell of every position and the smoothstep weight of the cell's upper node."""
    lower = np.floor(positions / pitch)
    t = positions / pitch - lower
    return lower.astype(np.int64), t * t * (3.0 - 2.0 * t)


@njit(cache=True, nogil=True)
def add_value_noise(out: Floats, axes: Axes, pitch: float, amplitude: float, seed: int) -> None:
    """Add ``amplitude`` times the value noise of ``pitch`` (nm) to ``out`` (z, y, x), at the axes' positions (nm).

    The weights are separable on an axis-aligned grid, so nodes are hashed once per lattice column, not per voxel.
    """
    iz, wz = _cells(axes[0], pitch)
    iy, wy = _cells(axes[1], pitch)
    ix, wx = _cells(axes[2], pitch)
    if ix.size == 0:
        return
    first = ix[0]
    n = ix[-1] - first + 2
    nodes = np.empty((4, n), np.float64)
    row = np.empty(n, np.float64)
    for a in range(iz.size):
        last_y = iy[0] - 1
        for b in range(iy.size):
            if iy[b] != last_y:
                last_y = iy[b]
                for k in range(n):
                    for corner in range(4):
                        bits = hash3(iz[a] + corner // 2, last_y + corner % 2, first + k, seed)
                        nodes[corner, k] = symmetric(bits)
            for k in range(n):
                low = nodes[0, k] + (nodes[1, k] - nodes[0, k]) * wy[b]
                high = nodes[2, k] + (nodes[3, k] - nodes[2, k]) * wy[b]
                row[k] = (low + (high - low) * wz[a]) * amplitude
            for c in range(ix.size):
                k = ix[c] - first
                out[a, b, c] += row[k] + (row[k + 1] - row[k]) * wx[c]


@njit(cache=True, nogil=True)
def _rotated(z: float, y: float, x: float) -> Point:
    """Rotate a point, so that the edges of a lattice do not show along the axes."""
    return 0.8 * z + 0.48 * y + 0.36 * x, -0.6 * z + 0.64 * y + 0.48 * x, -0.6 * y + 0.8 * x


@njit(cache=True, nogil=True)
def speck(point: Point, pitch: float, radius: float, chance: float, seed: int) -> float:
    """Return the signed distance (nm, negative inside) to the speck of a point's lattice cell; 1e3 if it has none.

    Each cell of edge ``pitch`` holds one sphere with probability ``chance``, jittered but wholly inside, with 0.65 to 1
    times ``radius``. The lattice is rotated out of the axes.
    """
    z, y, x = _rotated(point[0], point[1], point[2])
    cz, cy, cx = np.int64(np.floor(z / pitch)), np.int64(np.floor(y / pitch)), np.int64(np.floor(x / pitch))
    bits = hash3(cz, cy, cx, seed)
    draw = part(bits, 3)
    if draw >= chance:
        return 1e3
    room = pitch - 2.0 * radius
    dz = z - cz * pitch - radius - part(bits, 0) * room
    dy = y - cy * pitch - radius - part(bits, 1) * room
    dx = x - cx * pitch - radius - part(bits, 2) * room
    return np.sqrt(dz * dz + dy * dy + dx * dx) - radius * (0.65 + 0.35 * draw / chance)


@njit(cache=True, nogil=True)
def value_noise_at(point: Point, pitch: float, seed: int) -> float:
    """Return value noise in [-1, 1] at one point; the lattice is rotated out of the axes."""
    u, v, w = _rotated(point[0] / pitch, point[1] / pitch, point[2] / pitch)
    fu, fv, fw = np.floor(u), np.floor(v), np.floor(w)
    iu, iv, iw = np.int64(fu), np.int64(fv), np.int64(fw)
    u, v, w = smooth(u - fu), smooth(v - fv), smooth(w - fw)
    total = 0.0
    for i in range(2):
        wi = u if i == 1 else 1.0 - u
        for j in range(2):
            wij = wi * (v if j == 1 else 1.0 - v)
            near = symmetric(hash3(iu + i, iv + j, iw, seed))
            total += wij * (near + (symmetric(hash3(iu + i, iv + j, iw + 1, seed)) - near) * w)
    return total
