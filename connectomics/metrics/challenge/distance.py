"""The Hausdorff distance of two masks in nanometres, exactly, without two whole distance transforms.

The official scorer pads the union of the two bounding boxes by half the crop and computes two Euclidean distance
transforms there for every instance. Four observations make the same number cheap:

1. outside the union of the boxes there is no voxel whose distance is asked for, and none that is nearest to one;
2. only voxels of one mask that are not in the other have a distance other than 0;
3. a voxel whose distance cannot exceed the largest found so far need not be looked at further: the distances along
   z, y and x alone bound it from above, and cost a scan each;
4. for what is left, a search in the plane of distances along z (or, where many are left in a plane, the lower
   envelope of parabolas of Felzenszwalb and Huttenlocher, Theory of Computing 8, 2012) gives the exact minimum.

Squares are summed in the order z, y, x in float64, as scipy's ``distance_transform_edt`` sums them, so that values
agree to the last bit but for ties between different offsets of (mathematically) equal length.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from connectomics.errors import InputError
from connectomics.geometry import Triple

_FAR = 32767  # "no voxel of the mask on this line"; lines are shorter
# The bound from the bounding box is a lower bound; shrunk by this it never hides the voxel that attains it.
_GUARD = 1.0 - 1e-9


def hausdorff(a: NDArray[np.bool_], b: NDArray[np.bool_], voxel_size: Triple) -> float:
    """The larger of the two directed maxima of the Euclidean distance between two masks, nm, voxel centres.

    ``a`` and ``b`` are bool (D, H, W) of one shape, the union of the masks' bounding boxes or anything larger;
    ``voxel_size`` is nm, z y x. Not capped. Infinite where exactly one mask is empty, 0 where both are. Scratch memory
    is 2 bytes a voxel. Raises `InputError` for shapes that differ or exceed 32,766 voxels on an axis.
    """
    if a.shape != b.shape or a.ndim != 3:
        raise InputError(f"two masks of one three-dimensional shape are needed, found {a.shape} and {b.shape}")
    if max(a.shape) >= _FAR:
        raise InputError(f"masks up to {_FAR - 1} voxels on an axis can be compared, found {a.shape}")
    squared = _hausdorff_squared(
        np.ascontiguousarray(a), np.ascontiguousarray(b), np.asarray(voxel_size, dtype=np.float64)
    )
    return float(np.sqrt(squared))


@njit(cache=True, nogil=True)
def _hausdorff_squared(a, b, spacing):  # type: ignore[no-untyped-def]  # pragma: no cover
    distance_z = np.empty(a.shape, np.int16)
    best = _directed(a, b, spacing, distance_z, 0.0)
    if best == np.inf:
        return best
    return _directed(b, a, spacing, distance_z, best)


@njit(cache=True, nogil=True)
def _directed(a, b, spacing, distance_z, best):  # type: ignore[no-untyped-def]  # pragma: no cover
    """max(best, largest squared distance from a voxel of a to the nearest voxel of b)."""
    any_a, floor = _bound_from_box(a, b, spacing)
    if not any_a:
        return best
    if floor == np.inf:
        return floor
    best = max(best, floor * _GUARD)
    _distance_along_z(b, distance_z)
    n_z, n_y, n_x = a.shape
    bound = np.empty((n_y, n_x), np.float64)
    rows = np.empty(n_y, np.bool_)
    for z in range(n_z):
        left, cost = _open_voxels(a[z], b[z], distance_z[z], spacing, best, bound, rows)
        if left == 0:
            continue
        if cost <= 6.0 * n_y * n_x:
            best = _search_plane(distance_z[z], bound, rows, spacing, best)
        else:
            best = _envelope_plane(distance_z[z], bound, rows, spacing, best)
    return best


@njit(cache=True, nogil=True)
def _bound_from_box(a, b, spacing):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Whether a has voxels outside b, and the largest squared distance from one of them to the box of b."""
    n_z, n_y, n_x = a.shape
    z0, z1, y0, y1, x0, x1 = n_z, -1, n_y, -1, n_x, -1
    any_a = False
    for z in range(n_z):
        for y in range(n_y):
            for x in range(n_x):
                if b[z, y, x]:
                    z0, z1 = min(z0, z), max(z1, z)
                    y0, y1 = min(y0, y), max(y1, y)
                    x0, x1 = min(x0, x), max(x1, x)
                elif a[z, y, x]:
                    any_a = True
    if not any_a:
        return False, 0.0
    if z1 < 0:
        return True, np.inf
    best = 0.0
    for z in range(n_z):
        dz = max(z0 - z, z - z1, 0) * spacing[0]
        for y in range(n_y):
            dy = max(y0 - y, y - y1, 0) * spacing[1]
            partial = dz * dz + dy * dy
            for x in range(n_x):
                if a[z, y, x]:
                    dx = max(x0 - x, x - x1, 0) * spacing[2]
                    d = partial + dx * dx
                    if d > best:
                        best = d
    return True, best


@njit(cache=True, nogil=True)
def _distance_along_z(mask, out):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Voxels along z to the nearest voxel of the mask in the same column, _FAR where there is none."""
    n_z, n_y, n_x = mask.shape
    for z in range(n_z):
        for y in range(n_y):
            for x in range(n_x):
                if mask[z, y, x]:
                    out[z, y, x] = 0
                elif z == 0 or out[z - 1, y, x] == _FAR:
                    out[z, y, x] = _FAR
                else:
                    out[z, y, x] = out[z - 1, y, x] + 1
    for z in range(n_z - 2, -1, -1):
        for y in range(n_y):
            for x in range(n_x):
                below = out[z + 1, y, x]
                if below < out[z, y, x] - 1:
                    out[z, y, x] = below + 1


@njit(cache=True, nogil=True)
def _open_voxels(a, b, distance_z, spacing, best, bound, rows):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Marks the voxels of one plane whose distance may exceed ``best``.

    ``bound`` (H, W) gets an upper bound of the squared distance of those, -1 elsewhere; ``rows`` tells the rows that
    hold any. Returns their number and the estimated cost of searching around each (visited voxels).
    """
    n_y, n_x = a.shape
    left = 0
    for y in range(n_y):
        rows[y] = False
        last = -_FAR
        for x in range(n_x):
            bound[y, x] = -1.0
            if b[y, x]:
                last = x
            elif a[y, x]:
                d = distance_z[y, x]
                u = np.inf if d == _FAR else (d * spacing[0]) * (d * spacing[0])
                if last >= 0:
                    along = (x - last) * spacing[2]
                    u = min(u, along * along)
                if u > best:
                    bound[y, x] = u
                    rows[y] = True
                    left += 1
        if not rows[y]:
            continue
        last = -1
        rows[y] = False
        for x in range(n_x - 1, -1, -1):
            if b[y, x]:
                last = x
            elif bound[y, x] >= 0.0:
                if last >= 0:
                    along = (last - x) * spacing[2]
                    bound[y, x] = min(bound[y, x], along * along)
                if bound[y, x] > best:
                    rows[y] = True
                else:
                    bound[y, x] = -1.0
                    left -= 1
    if left == 0:
        return 0, 0.0
    left, cost = 0, 0.0
    area = np.pi / (spacing[1] * spacing[2])
    for y in range(n_y):
        if not rows[y]:
            continue
        rows[y] = False
        for x in range(n_x):
            u = bound[y, x]
            if u < 0.0:
                continue
            step = 1
            while step < n_y and (step * spacing[1]) * (step * spacing[1]) < u:
                if (y >= step and b[y - step, x]) or (y + step < n_y and b[y + step, x]):
                    u = (step * spacing[1]) * (step * spacing[1])
                    break
                if y < step and y + step >= n_y:
                    break
                step += 1
            if u > best:
                bound[y, x] = u
                rows[y] = True
                left += 1
                cost += step + min(area * u, float(n_y * n_x))
            else:
                bound[y, x] = -1.0
    return left, cost


@njit(cache=True, nogil=True)
def _search_plane(distance_z, bound, rows, spacing, best):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Exact distances of the open voxels of a plane, each by looking around it as far as its bound reaches."""
    n_y, n_x = distance_z.shape
    for y in range(n_y):
        if not rows[y]:
            continue
        for x in range(n_x):
            u = bound[y, x]
            if u <= best:
                continue
            for step_y in range(n_y):
                square_y = (step_y * spacing[1]) * (step_y * spacing[1])
                if square_y >= u or u <= best or (y < step_y and y + step_y >= n_y):
                    break
                for side_y in range(2):
                    row = y - step_y if side_y == 0 else y + step_y
                    if row < 0 or row >= n_y or (side_y == 1 and step_y == 0):
                        continue
                    for step_x in range(n_x):
                        square_x = (step_x * spacing[2]) * (step_x * spacing[2])
                        if square_y + square_x >= u or (x < step_x and x + step_x >= n_x):
                            break
                        d = _FAR
                        if x >= step_x:
                            d = distance_z[row, x - step_x]
                        if x + step_x < n_x:
                            d = min(d, distance_z[row, x + step_x])
                        if d != _FAR:
                            u = min(u, (d * spacing[0]) * (d * spacing[0]) + square_y + square_x)
            if u > best:
                best = u
    return best


@njit(cache=True, nogil=True)
def _envelope_plane(distance_z, bound, rows, spacing, best):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Exact distances of the open voxels of a plane by lower envelopes along y, then along x."""
    n_y, n_x = distance_z.shape
    height = np.full((n_y, n_x), np.inf)
    n = max(n_y, n_x)
    values = np.empty(n, np.float64)
    at = np.empty(n, np.int64)
    edge = np.empty(n, np.float64)
    for x in range(n_x):
        for y in range(n_y):
            d = distance_z[y, x]
            values[y] = np.inf if d == _FAR else (d * spacing[0]) * (d * spacing[0])
        k = _lower_envelope(values, n_y, spacing[1], at, edge)
        if k < 0:
            continue
        j = 0
        for y in range(n_y):
            while j < k and edge[j + 1] < y:
                j += 1
            if rows[y]:
                along = (y - at[j]) * spacing[1]
                height[y, x] = values[at[j]] + along * along
    for y in range(n_y):
        if not rows[y]:
            continue
        k = _lower_envelope(height[y], n_x, spacing[2], at, edge)
        j = 0
        for x in range(n_x):
            while j < k and edge[j + 1] < x:
                j += 1
            if bound[y, x] > best:
                along = (x - at[j]) * spacing[2]
                best = max(best, height[y, at[j]] + along * along)
    return best


@njit(cache=True, nogil=True)
def _lower_envelope(values, n, spacing, at, edge):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Parabolas of the lower envelope of ``values[q] + ((x - q) * spacing)**2``: their places and left edges.

    Returns the index of the last one, -1 where every value is infinite.
    """
    k = -1
    square = spacing * spacing
    for q in range(n):
        if values[q] == np.inf:
            continue
        while k >= 0:
            p = at[k]
            crossing = ((values[q] - values[p]) / (square * (q - p)) + (q + p)) / 2.0
            if crossing > edge[k]:
                break
            k -= 1
        k += 1
        at[k] = q
        edge[k] = crossing if k > 0 else -np.inf
    return k
