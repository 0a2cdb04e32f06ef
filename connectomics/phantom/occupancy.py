"""Which part of a phantom's world is taken: a set of spheres with a fast test for overlap."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from connectomics.geometry import Box


@njit(cache=True, nogil=True)
def _hits(
    head: NDArray[np.int64],
    following: NDArray[np.int64],
    spheres: NDArray[np.float64],
    group: NDArray[np.int64],
    origin: NDArray[np.float64],
    edge: float,
    largest: float,
    candidate: NDArray[np.float64],
    gap: float,
    ignored: int,
) -> bool:
    for i in range(len(candidate)):
        reach = candidate[i, 3] + largest + gap
        low = np.empty(3, np.int64)
        high = np.empty(3, np.int64)
        for axis in range(3):
            u = candidate[i, axis] - origin[axis]
            low[axis] = min(max(np.int64(np.floor((u - reach) / edge)), 0), head.shape[axis] - 1)
            high[axis] = min(max(np.int64(np.floor((u + reach) / edge)), 0), head.shape[axis] - 1)
        for z in range(low[0], high[0] + 1):
            for y in range(low[1], high[1] + 1):
                for x in range(low[2], high[2] + 1):
                    j = head[z, y, x]
                    while j >= 0:
                        room = candidate[i, 3] + spheres[j, 3] + gap
                        square = 0.0
                        for axis in range(3):
                            square += (candidate[i, axis] - spheres[j, axis]) ** 2
                        if group[j] != ignored and square < room * room:
                            return True
                        j = following[j]
    return False


class Occupancy:
    """A growing set of spheres in a box of the world, hashed by place.

    A sphere is a row (z, y, x, radius), nm. Spheres outside ``box`` are kept in its border cells, which is only slower.
    """

    def __init__(self, box: Box, edge: float) -> None:
        self._origin = np.asarray(box.begin, np.float64)
        cells = np.maximum(1, np.ceil(np.asarray(box.extent) / edge)).astype(int)
        self._head = np.full(tuple(int(n) for n in cells), -1, np.int64)
        self._edge = edge
        self._count = 0
        self._spheres = np.empty((1024, 4), np.float64)
        self._group = np.empty(1024, np.int64)
        self._next = np.empty(1024, np.int64)
        self._largest = 0.0

    def free(self, spheres: NDArray[np.float64], gap: float, ignored: int = -1) -> bool:
        """Whether ``spheres`` keep ``gap`` nm from all that is there, spheres of the group ``ignored`` apart."""
        arrays = (self._head, self._next, self._spheres, self._group, self._origin)
        return not _hits(*arrays, self._edge, self._largest, spheres, gap, ignored)

    def add(self, spheres: NDArray[np.float64], group: int = 0) -> None:
        """Take the place of ``spheres``."""
        need = self._count + len(spheres)
        while need > len(self._spheres):
            self._spheres = np.concatenate([self._spheres, np.empty_like(self._spheres)])
            self._group = np.concatenate([self._group, np.empty_like(self._group)])
            self._next = np.concatenate([self._next, np.empty_like(self._next)])
        cells = np.floor((spheres[:, :3] - self._origin) / self._edge).astype(int)
        cells = np.clip(cells, 0, np.array(self._head.shape) - 1)
        for sphere, cell in zip(spheres, cells, strict=True):
            where = (int(cell[0]), int(cell[1]), int(cell[2]))
            self._spheres[self._count] = sphere
            self._group[self._count] = group
            self._next[self._count] = self._head[where]
            self._head[where] = self._count
            self._count += 1
        self._largest = max(self._largest, float(spheres[:, 3].max(initial=0.0)))
