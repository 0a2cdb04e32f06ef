"""The exact Hausdorff distance of two masks in nanometers, without two whole distance transforms.

Squares are summed in the order z, y, x in float64, as scipy's ``distance_transform_edt`` sums them, so that values
agree to the last bit but for ties between different offsets of (mathematically) equal length. Why so little of a volume
has to be looked at is in ``docs/design-notes.md``.
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


Offset = tuple[int, int, int]


def hausdorff(
    a: NDArray[np.bool_], b: NDArray[np.bool_], voxel_size: Triple, cap: float = np.inf, offset: Offset = (0, 0, 0)
) -> float:
    """Return the Hausdorff distance (nm, voxel centers) of two masks: the larger of both directed distances.

    Args:
        a, b: bool (D, H, W), each a block that holds its whole mask; they may differ in shape.
        voxel_size: nm, z y x.
        cap: largest distance that matters, nm; the search stops there.
        offset: where the first voxel of ``b`` lies, in voxels of ``a`` (z y x).

    Returns:
        The distance, at most ``cap``; the cap if exactly one mask is empty, 0 if both are.

    Raises:
        InputError: the masks are not three-dimensional, or span more than 32,766 voxels on an axis.
    """
    reached = directed(b, a, voxel_size, cap, (-offset[0], -offset[1], -offset[2]))
    return directed(a, b, voxel_size, cap, offset, reached)


def directed(
    a: NDArray[np.bool_],
    b: NDArray[np.bool_],
    voxel_size: Triple,
    cap: float = np.inf,
    offset: Offset = (0, 0, 0),
    reached: float = 0.0,
) -> float:
    """Return the largest distance (nm) from a voxel of ``a`` to ``b``, at least ``reached`` and at most ``cap``.

    It is exactly ``reached`` if no voxel is farther; a higher ``reached`` is cheaper. See `hausdorff` for the rest.
    """
    if a.ndim != 3 or b.ndim != 3:
        raise InputError(f"two three-dimensional masks are needed, found shapes {a.shape} and {b.shape}")
    if max(abs(o) + m + n for o, m, n in zip(offset, a.shape, b.shape, strict=True)) >= _FAR:
        raise InputError(f"masks up to {_FAR} voxels apart can be compared, found {a.shape}, {b.shape} at {offset}")
    if reached >= cap:
        return cap
    start = reached * reached
    squared = _directed(
        np.ascontiguousarray(a), np.ascontiguousarray(b), np.asarray(offset, dtype=np.int64),
        np.asarray(voxel_size, dtype=np.float64), start, cap * cap,
    )  # fmt: skip
    return reached if squared == start else min(float(np.sqrt(squared)), cap)


def scratch_bytes(a: NDArray[np.int32], b: NDArray[np.int32]) -> int:
    """Return the most bytes that comparing masks in two boxes (z0 z1 y0 y1 x0 x1) takes, masks included."""
    (az, ay, ax), (bz, by, bx) = ((int(v) for v in box[1::2] - box[::2]) for box in (a, b))
    return az * ay * ax + bz * by * bx + 2 * max(az * by * bx, bz * ay * ax) + 16 * (ay + by) * (ax + bx)


@njit(cache=True, nogil=True)
def _directed(a, b, offset, spacing, best, enough):  # type: ignore[no-untyped-def]  # pragma: no cover
    """max(best, largest squared distance from a voxel of a to the nearest of b), or anything from ``enough`` up."""
    any_a, floor = _bound_from_box(a, b, offset, spacing)
    if not any_a:
        return best
    if floor >= enough:
        return floor
    best = max(best, floor * _GUARD)
    n_z, n_y, n_x = a.shape
    distance_z = np.empty((n_z, b.shape[1], b.shape[2]), np.int16)
    _distance_along_z(b, offset[0], distance_z)
    bound = np.empty((n_y, n_x), np.float64)
    rows = np.empty(n_y, np.bool_)
    oy, ox = offset[1], offset[2]
    nothing = np.zeros(b.shape[1:], np.bool_)
    for z in range(n_z):
        inside = 0 <= z - offset[0] < b.shape[0]
        plane = b[z - offset[0]] if inside else nothing
        left, cost = _open_voxels(a[z], plane, distance_z[z], oy, ox, spacing, best, bound, rows)
        if left == 0:
            continue
        if cost <= 6.0 * (n_y + b.shape[1]) * b.shape[2]:
            best = _search_plane(distance_z[z], oy, ox, bound, rows, spacing, best)
        else:
            best = _envelope_plane(distance_z[z], oy, ox, bound, rows, spacing, best)
        if best >= enough:
            break
    return best


@njit(cache=True, nogil=True)
def _bound_from_box(a, b, offset, spacing):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Whether a has voxels outside b, and the largest squared distance from one of a to the box of b."""
    z0, z1, y0, y1, x0, x1 = b.shape[0], -1, b.shape[1], -1, b.shape[2], -1
    for z in range(b.shape[0]):
        for y in range(b.shape[1]):
            for x in range(b.shape[2]):
                if b[z, y, x]:
                    z0, z1 = min(z0, z), max(z1, z)
                    y0, y1 = min(y0, y), max(y1, y)
                    x0, x1 = min(x0, x), max(x1, x)
    empty_b = z1 < 0
    any_a = False
    best = 0.0
    for za in range(a.shape[0]):
        z = za - offset[0]
        dz = max(z0 - z, z - z1, 0) * spacing[0]
        for ya in range(a.shape[1]):
            y = ya - offset[1]
            dy = max(y0 - y, y - y1, 0) * spacing[1]
            partial = dz * dz + dy * dy
            near = not empty_b and z0 <= z <= z1 and y0 <= y <= y1
            for xa in range(a.shape[2]):
                if a[za, ya, xa]:
                    x = xa - offset[2]
                    if not (near and x0 <= x <= x1 and b[z, y, x]):
                        any_a = True
                    dx = max(x0 - x, x - x1, 0) * spacing[2]
                    d = partial + dx * dx
                    if d > best:
                        best = d
    if any_a and empty_b:
        return True, np.inf
    return any_a, best


@njit(cache=True, nogil=True)
def _distance_along_z(mask, offset, out):  # type: ignore[no-untyped-def]  # pragma: no cover
    """For every plane of ``out``: voxels along z to the nearest voxel of the mask in the same column, or _FAR.

    Plane 0 of the mask lies at plane ``offset`` of ``out``.
    """
    n_m, n_y, n_x = mask.shape
    n_z = out.shape[0]
    out[:] = _FAR
    nearest = np.full((n_y, n_x), -1, np.int32)  # the last mask voxel passed
    done = 0
    for z in range(n_z):
        upto = min(z - offset + 1, n_m)
        for m in range(done, upto):
            for y in range(n_y):
                for x in range(n_x):
                    if mask[m, y, x]:
                        nearest[y, x] = m
        done = max(done, upto)
        if done > 0:
            for y in range(n_y):
                for x in range(n_x):
                    if nearest[y, x] >= 0:
                        out[z, y, x] = z - offset - nearest[y, x]
    nearest[:] = -1
    done = n_m - 1
    for z in range(n_z - 1, -1, -1):
        downto = max(z - offset, 0)
        for m in range(done, downto - 1, -1):
            for y in range(n_y):
                for x in range(n_x):
                    if mask[m, y, x]:
                        nearest[y, x] = m
        done = min(done, downto - 1)
        if done < n_m - 1:
            for y in range(n_y):
                for x in range(n_x):
                    if nearest[y, x] >= 0:
                        out[z, y, x] = min(out[z, y, x], nearest[y, x] + offset - z)


@njit(cache=True, nogil=True)
def _open_voxels(a, b, distance_z, oy, ox, spacing, best, bound, rows):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Marks the voxels of one plane of a whose distance may exceed ``best``.

    ``b`` and ``distance_z`` are planes of the other mask, shifted by (oy, ox). ``bound`` (as a) gets an upper bound of
    the squared distance of those voxels, -1 elsewhere; ``rows`` tells the rows that hold any. Returns their number and
    the estimated cost of searching around each (visited voxels).
    """
    left, cost = 0, 0.0
    area = np.pi / (spacing[1] * spacing[2])
    for y in range(a.shape[0]):
        rows[y] = False
        yb = y - oy
        in_b = 0 <= yb < b.shape[0]
        last = -_FAR
        for x in range(min(ox, 0), 0):
            if in_b and x - ox < b.shape[1] and b[yb, x - ox]:
                last = x
        for x in range(a.shape[1]):
            bound[y, x] = -1.0
            xb = x - ox
            hit = in_b and 0 <= xb < b.shape[1]
            if hit and b[yb, xb]:
                last = x
            elif a[y, x]:
                u = np.inf
                if hit and distance_z[yb, xb] != _FAR:
                    u = (distance_z[yb, xb] * spacing[0]) * (distance_z[yb, xb] * spacing[0])
                if last != -_FAR:
                    along = (x - last) * spacing[2]
                    u = min(u, along * along)
                if u > best:
                    bound[y, x] = u
                    rows[y] = True
        if not rows[y]:
            continue
        rows[y] = False
        last = -_FAR
        for x in range(max(ox + b.shape[1], a.shape[1]) - 1, -1, -1):
            xb = x - ox
            if in_b and 0 <= xb < b.shape[1] and b[yb, xb]:
                last = x
            elif x < a.shape[1] and bound[y, x] >= 0.0:
                if last != -_FAR:
                    along = (last - x) * spacing[2]
                    bound[y, x] = min(bound[y, x], along * along)
                if bound[y, x] > best and 0 <= xb < b.shape[1]:
                    bound[y, x] = _bound_along_y(b, yb, xb, spacing[1], bound[y, x])
                if bound[y, x] > best:
                    rows[y] = True
                    left += 1
                    cost += min(area * bound[y, x], float(b.size)) + b.shape[0]
                else:
                    bound[y, x] = -1.0
    return left, cost


@njit(cache=True, nogil=True)
def _bound_along_y(b, y, x, spacing, bound):  # type: ignore[no-untyped-def]  # pragma: no cover
    """The smaller of ``bound`` and the squared distance along y to the nearest voxel of b."""
    n_y = b.shape[0]
    step = max(1, -y, y - n_y + 1)
    while (step * spacing) * (step * spacing) < bound and (y >= step or y + step < n_y):
        if (0 <= y - step < n_y and b[y - step, x]) or (0 <= y + step < n_y and b[y + step, x]):
            return (step * spacing) * (step * spacing)
        step += 1
    return bound


@njit(cache=True, nogil=True)
def _search_plane(distance_z, oy, ox, bound, rows, spacing, best):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Exact distances of the open voxels of a plane, each by looking around it as far as its bound reaches."""
    n_y, n_x = distance_z.shape
    for ya in range(bound.shape[0]):
        if not rows[ya]:
            continue
        y = ya - oy
        for xa in range(bound.shape[1]):
            u = bound[ya, xa]
            if u <= best:
                continue
            x = xa - ox
            for step_y in range(max(0, -y, y - n_y + 1), max(y + 1, n_y - y)):
                square_y = (step_y * spacing[1]) * (step_y * spacing[1])
                if square_y >= u or u <= best:
                    break
                for side in range(1 if step_y == 0 else 2):
                    row = y - step_y if side == 0 else y + step_y
                    if row < 0 or row >= n_y:
                        continue
                    for step_x in range(max(0, -x, x - n_x + 1), max(x + 1, n_x - x)):
                        square_x = (step_x * spacing[2]) * (step_x * spacing[2])
                        if square_y + square_x >= u:
                            break
                        d = _FAR
                        if 0 <= x - step_x < n_x:
                            d = distance_z[row, x - step_x]
                        if 0 <= x + step_x < n_x:
                            d = min(d, distance_z[row, x + step_x])
                        if d != _FAR:
                            u = min(u, (d * spacing[0]) * (d * spacing[0]) + square_y + square_x)
            if u > best:
                best = u
    return best


@njit(cache=True, nogil=True)
def _envelope_plane(distance_z, oy, ox, bound, rows, spacing, best):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Exact distances of the open voxels of a plane by lower envelopes along y, then along x."""
    m_y, m_x = distance_z.shape
    n_y, n_x = bound.shape
    height = np.full((n_y, m_x), np.inf)
    n = max(m_y, m_x)
    values = np.empty(n, np.float64)
    at = np.empty(n, np.int64)
    edge = np.empty(n, np.float64)
    for x in range(m_x):
        for y in range(m_y):
            d = distance_z[y, x]
            values[y] = np.inf if d == _FAR else (d * spacing[0]) * (d * spacing[0])
        k = _lower_envelope(values, m_y, spacing[1], at, edge)
        if k < 0:
            continue
        j = 0
        for ya in range(n_y):
            y = ya - oy
            while j < k and edge[j + 1] < y:
                j += 1
            if rows[ya]:
                along = (y - at[j]) * spacing[1]
                height[ya, x] = values[at[j]] + along * along
    for ya in range(n_y):
        if not rows[ya]:
            continue
        k = _lower_envelope(height[ya], m_x, spacing[2], at, edge)
        j = 0
        for xa in range(n_x):
            x = xa - ox
            while j < k and edge[j + 1] < x:
                j += 1
            if bound[ya, xa] > best:
                along = (x - at[j]) * spacing[2]
                best = max(best, height[ya, at[j]] + along * along)
    return best


@njit(cache=True, nogil=True)
def _lower_envelope(values, n, spacing, at, edge):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Parabolas of the lower envelope of ``values[q] + ((x - q) * spacing)**2``: their places and left edges.

    Returns the index of the last one, -1 where every value is infinite.
    """
    k = -1
    square = spacing * spacing
    crossing = -np.inf
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
