"""Numba kernels of `warp` and `elastic_field`, in a module that is imported only when they run.

Arrays are flat and C-contiguous, so that an index is one unsigned number, which numba does not check for negative
values. Positions are raw-array indices, z y x. All kernels run on one core without the interpreter lock.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

CHUNK = 64
TILE = 8
"""``TILE`` by ``TILE`` rows of ``CHUNK`` voxels are processed one after another: neighbors share most of their source,
which then stays in the first-level cache."""

_NEAR = 1e-3  # voxels: nearer to a border, `_careful` decides; float32 positions in a chunk are far more exact


@numba.njit(inline="always")
def _value(value, divisor):  # type: ignore[no-untyped-def]
    return value if divisor is None else np.float32(value) / divisor


@numba.njit(cache=True, nogil=True)
def copy_strided(source, base, strides, low, high, tiles, divisor, target):  # type: ignore[no-untyped-def]
    """``target[i] = source[base + i . strides] / divisor`` for low <= i < high, tile by tile.

    source: flat; strides: int64 (3,), elements per voxel of each target axis; tiles: int64 (3,), voxels; divisor:
    float32, or None for exact copies (numba then compiles the kernel without the division).
    """
    for z0 in range(low[0], high[0], tiles[0]):
        for y0 in range(low[1], high[1], tiles[1]):
            for x0 in range(low[2], high[2], tiles[2]):
                x1 = min(x0 + tiles[2], high[2])
                for z in range(z0, min(z0 + tiles[0], high[0])):
                    for y in range(y0, min(y0 + tiles[1], high[1])):
                        row = base + z * strides[0] + y * strides[1]
                        into = target[np.uint64(z), np.uint64(y)]
                        if strides[2] == 1:
                            for x in range(x0, x1):
                                into[np.uint64(x)] = _value(source[np.uint64(row + x)], divisor)
                        elif strides[2] == -1:
                            for x in range(x0, x1):
                                into[np.uint64(x)] = _value(source[np.uint64(row - x)], divisor)
                        else:
                            for x in range(x0, x1):
                                into[np.uint64(x)] = _value(source[np.uint64(row + x * strides[2])], divisor)


@numba.njit(cache=True, nogil=True)
def clear_outside(
    inside: Array, base: int, strides: Array, low: Array, high: Array, fill: float, image: Array, codes: Array
) -> None:
    """Set image to ``fill`` and codes to 0 where ``inside[base + i . strides]`` is False, for low <= i < high."""
    for z in range(low[0], high[0]):
        for y in range(low[1], high[1]):
            row = base + z * strides[0] + y * strides[1]
            for x in range(low[2], high[2]):
                if not inside[np.uint64(row + x * strides[2])]:
                    image[np.uint64(z), np.uint64(y), np.uint64(x)] = fill
                    codes[np.uint64(z), np.uint64(y), np.uint64(x)] = 0


@numba.njit(cache=True, nogil=True, inline="always")
def _careful(raw, shape, inside, codes, codes_shape, shift, fill, z, y, x):  # type: ignore[no-untyped-def]
    """Value (0..1) and code at one position with every check: only neighbors with raw, weights normalized."""
    near_z, near_y, near_x = math.floor(z + 0.5), math.floor(y + 0.5), math.floor(x + 0.5)
    if near_z < 0 or near_y < 0 or near_x < 0 or near_z >= shape[0] or near_y >= shape[1] or near_x >= shape[2]:
        return fill, np.uint32(0)
    if inside.size > 0 and not inside[np.uint64((near_z * shape[1] + near_y) * shape[2] + near_x)]:
        return fill, np.uint32(0)
    low_z, low_y, low_x = math.floor(z), math.floor(y), math.floor(x)
    total = np.float32(0.0)
    weights = np.float32(0.0)
    for dz in range(2):
        at_z = low_z + dz
        if at_z < 0 or at_z >= shape[0]:
            continue
        weight_z = np.float32(z - low_z) if dz else np.float32(1.0 - (z - low_z))
        for dy in range(2):
            at_y = low_y + dy
            if at_y < 0 or at_y >= shape[1]:
                continue
            weight_y = weight_z * (np.float32(y - low_y) if dy else np.float32(1.0 - (y - low_y)))
            for dx in range(2):
                at_x = low_x + dx
                if at_x < 0 or at_x >= shape[2]:
                    continue
                index = np.uint64((at_z * shape[1] + at_y) * shape[2] + at_x)
                if inside.size == 0 or inside[index]:
                    weight = weight_y * (np.float32(x - low_x) if dx else np.float32(1.0 - (x - low_x)))
                    total += weight * np.float32(raw[index])
                    weights += weight
    code = np.uint32(0)
    near_z, near_y, near_x = near_z + shift[0], near_y + shift[1], near_x + shift[2]
    if 0 <= near_z < codes_shape[0] and 0 <= near_y < codes_shape[1] and 0 <= near_x < codes_shape[2]:
        code = np.uint32(codes[np.uint64((near_z * codes_shape[1] + near_y) * codes_shape[2] + near_x)])
    return min(total / (weights * np.float32(255.0)), np.float32(1.0)), code


@numba.njit(cache=True, nogil=True, fastmath=True)
def _blend_row(control: Array, count: Array, limit: Array, z: float, y: float, line: Array) -> None:
    """Write the field along x at control row (z, y) to ``line`` (3, nx); ``control`` (3, nz, ny, nx), float32."""
    z, y = min(max(z, 0.0), limit[0]), min(max(y, 0.0), limit[1])
    low_z, low_y = min(int(z), count[0] - 2), min(int(y), count[1] - 2)
    up_z, up_y = np.float32(z - low_z), np.float32(y - low_y)
    a, b = (np.float32(1) - up_z) * (np.float32(1) - up_y), (np.float32(1) - up_z) * up_y
    c, d = up_z * (np.float32(1) - up_y), up_z * up_y
    z0, y0 = np.uint64(low_z), np.uint64(low_y)
    z1, y1 = np.uint64(low_z + 1), np.uint64(low_y + 1)
    for k in range(3):
        for x in range(count[2]):
            line[k, x] = (
                a * control[k, z0, y0, x] + b * control[k, z0, y1, x]
                + c * control[k, z1, y0, x] + d * control[k, z1, y1, x]
            )  # fmt: skip


@numba.njit(cache=True, nogil=True, fastmath=True)
def _displace_line(line: Array, last: int, limit: float, start: float, rise: float, n: int, at: Array) -> None:
    """Add the field of `_blend_row` to positions ``at`` float32 (3, n); control x of voxel i is start + i * rise."""
    first, slope, top = np.float32(start), np.float32(rise), np.float32(limit)
    for i in range(n):
        place = min(max(first + np.float32(i) * slope, np.float32(0)), top)
        low = min(np.int32(place), np.int32(last))
        share = place - np.float32(low)
        j = np.uint64(low)
        for k in range(3):
            at[k, i] += line[k, j] + share * (line[k, j + np.uint64(1)] - line[k, j])


@numba.njit(cache=True, nogil=True, fastmath=True)
def _displace(control: Array, count: Array, limit: Array, start: Array, rise: Array, n: int, at: Array) -> None:
    """As `_displace_line`, for a row of the patch in any direction through the control grid."""
    one = np.float32(1)
    step_z, step_y, step_x = np.float32(rise[0]), np.float32(rise[1]), np.float32(rise[2])
    for i in range(n):
        z = min(max(np.float32(start[0]) + np.float32(i) * step_z, np.float32(0)), np.float32(limit[0]))
        y = min(max(np.float32(start[1]) + np.float32(i) * step_y, np.float32(0)), np.float32(limit[1]))
        x = min(max(np.float32(start[2]) + np.float32(i) * step_x, np.float32(0)), np.float32(limit[2]))
        low_z, low_y, low_x = min(int(z), count[0] - 2), min(int(y), count[1] - 2), min(int(x), count[2] - 2)
        z, y, x = z - np.float32(low_z), y - np.float32(low_y), x - np.float32(low_x)
        z0, y0, x0 = np.uint64(low_z), np.uint64(low_y), np.uint64(low_x)
        z1, y1, x1 = np.uint64(low_z + 1), np.uint64(low_y + 1), np.uint64(low_x + 1)
        for k in range(3):
            c = control[k]
            a = (one - x) * c[z0, y0, x0] + x * c[z0, y0, x1]
            b = (one - x) * c[z0, y1, x0] + x * c[z0, y1, x1]
            d = (one - x) * c[z1, y0, x0] + x * c[z1, y0, x1]
            e = (one - x) * c[z1, y1, x0] + x * c[z1, y1, x1]
            at[k, i] += (one - z) * ((one - y) * a + y * b) + z * ((one - y) * d + y * e)


@numba.njit(inline="always")
def _four(a, b, c, d):  # type: ignore[no-untyped-def]
    return np.uint32(a) | np.uint32(b) << np.uint32(8) | np.uint32(c) << np.uint32(16) | np.uint32(d) << np.uint32(24)


@numba.njit(inline="always")
def _byte(packed, shift):  # type: ignore[no-untyped-def]
    return np.float32(np.int32((packed >> np.uint32(shift)) & np.uint32(255)))


@numba.njit(cache=True, nogil=True, fastmath=True)
def _image_inside(raw, plane, width, first, at, n, index, share, four, image):  # type: ignore[no-untyped-def]
    """Trilinear values of a chunk whose neighbors all hold raw; ``first`` is the index of position 0."""
    for i in range(n):  # separate from the loads, so that it is vectorized
        low_z, low_y, low_x = np.int32(at[0, i]), np.int32(at[1, i]), np.int32(at[2, i])
        share[0, i] = at[0, i] - np.float32(low_z)
        share[1, i] = at[1, i] - np.float32(low_y)
        share[2, i] = at[2, i] - np.float32(low_x)
        index[i] = np.int64(low_z) * plane + np.int64(low_y) * width + np.int64(low_x)
    # four neighbors in one number: converting bytes to floats one by one would cost more than the rest
    following, right, down = np.uint64(1), np.uint64(width), np.uint64(plane)
    for i in range(n):
        j = np.uint64(first + index[i])
        k = j + right
        four[0, i] = _four(raw[j], raw[j + following], raw[k], raw[k + following])
        j, k = j + down, k + down
        four[1, i] = _four(raw[j], raw[j + following], raw[k], raw[k + following])
    unit, one = np.float32(1.0 / 255.0), np.float32(1.0)
    for i in range(n):
        z, y, x = share[0, i], share[1, i], share[2, i]
        near, far = four[0, i], four[1, i]
        a, b, c, d = _byte(near, 0), _byte(near, 8), _byte(near, 16), _byte(near, 24)
        e, f, g, h = _byte(far, 0), _byte(far, 8), _byte(far, 16), _byte(far, 24)
        a += x * (b - a)
        c += x * (d - c)
        e += x * (f - e)
        g += x * (h - g)
        a += y * (c - a)
        e += y * (g - e)
        image[i] = min((a + z * (e - a)) * unit, one)  # rounding may exceed 1


@numba.njit(cache=True, nogil=True, fastmath=True)
def _codes_inside(source, plane, width, first, at, n, index, codes):  # type: ignore[no-untyped-def]
    """Nearest codes of a chunk inside the block of codes."""
    half = np.float32(0.5)
    for i in range(n):
        z, y, x = np.int32(at[0, i] + half), np.int32(at[1, i] + half), np.int32(at[2, i] + half)
        index[i] = np.int64(z) * plane + np.int64(y) * width + np.int64(x)
    for i in range(n):
        codes[i] = source[np.uint64(first + index[i])]


@numba.njit(cache=True, nogil=True, fastmath=True)
def _rebase(at: Array, n: int, base: Array, low: Array, high: Array) -> None:
    """Find the range of displaced positions, and move ``base`` so that none is negative."""
    for k in range(3):
        least, most = at[k, 0], at[k, 0]
        for i in range(n):
            least, most = min(least, at[k, i]), max(most, at[k, i])
        down = np.float32(math.floor(least))
        for i in range(n):
            at[k, i] -= down
        base[k] += int(down)
        low[k], high[k] = least - down, most - down


@numba.njit(cache=True, nogil=True, fastmath=True)
def _whole(inside: Array, plane: int, width: int, first: int, at: Array, n: int) -> bool:
    """Whether all neighbors of a chunk in the block hold raw."""
    following, right, down = np.uint64(1), np.uint64(width), np.uint64(plane)
    missing = 0
    for i in range(n):
        j = np.uint64(first + np.int64(at[0, i]) * plane + np.int64(at[1, i]) * width + np.int64(at[2, i]))
        k = j + right
        missing += not (inside[j] & inside[j + following] & inside[k] & inside[k + following])
        j, k = j + down, k + down
        missing += not (inside[j] & inside[j + following] & inside[k] & inside[k + following])
    return missing == 0


@numba.njit(cache=True, nogil=True, fastmath=True)
def _codes_anywhere(source, shape, base, at, n, codes):  # type: ignore[no-untyped-def]
    """Nearest codes of a chunk, 0 beyond the block of codes; ``base`` is an index of this block."""
    half = np.float32(0.5)
    for i in range(n):
        z, y, x = base[0] + int(at[0, i] + half), base[1] + int(at[1, i] + half), base[2] + int(at[2, i] + half)
        there = 0 <= z < shape[0] and 0 <= y < shape[1] and 0 <= x < shape[2]
        codes[i] = source[np.uint64((z * shape[1] + y) * shape[2] + x)] if there else 0


@numba.njit(cache=True, nogil=True)
def _fill(  # type: ignore[no-untyped-def]
    raw, shape, inside, source, codes_shape, shift, fill, at, n, base, low, high, index, share, four, pixels, labels
):
    """Image and codes of a chunk: ``at`` float32 (3, n), positions off the raw index ``base``, from low to high."""
    clear, void, coded, unknown = True, False, True, False
    for k in range(3):
        first, last = base[k] + low[k], base[k] + high[k] + _NEAR
        clear &= first >= _NEAR and math.floor(last) + 1 < shape[k]
        void |= last < -0.5 or first - _NEAR > shape[k] - 0.5
        coded &= base[k] + shift[k] >= 0 and math.floor(last + 0.5) + shift[k] < codes_shape[k]
        unknown |= last + shift[k] < -0.5 or first - _NEAR + shift[k] > codes_shape[k] - 0.5
    if void:
        pixels[:] = fill
        labels[:] = 0
        return
    plane, width = shape[1] * shape[2], shape[2]
    first_raw = base[0] * plane + base[1] * width + base[2]
    if clear and (inside.size == 0 or _whole(inside, plane, width, first_raw, at, n)):
        _image_inside(raw, plane, width, first_raw, at, n, index, share, four, pixels)
        plane, width = codes_shape[1] * codes_shape[2], codes_shape[2]
        if coded:
            first_code = (base[0] + shift[0]) * plane + (base[1] + shift[1]) * width + base[2] + shift[2]
            _codes_inside(source, plane, width, first_code, at, n, index, labels)
        elif unknown:
            labels[:] = 0
        else:
            _codes_anywhere(source, codes_shape, base + shift, at, n, labels)
        return
    for i in range(n):
        z, y, x = base[0] + float(at[0, i]), base[1] + float(at[1, i]), base[2] + float(at[2, i])
        value, code = _careful(raw, shape, inside, source, codes_shape, shift, fill, z, y, x)
        pixels[i] = value
        labels[i] = code


@numba.njit(cache=True, nogil=True)
def interpolate(
    raw: Array, shape: Array, inside: Array, source: Array, codes_shape: Array, shift: Array, start: Array, rise: Array,
    control: Array, limit: Array, field_start: Array, field_rise: Array, fill: float, image: Array, codes: Array,
) -> None:  # fmt: skip
    """Write trilinear raw to image float32 (``fill`` where there is no raw) and nearest codes to codes, (D, H, W).

    raw uint8 and inside bool (or of size 0: raw everywhere), flat, of ``shape``; source: codes, flat, of
    ``codes_shape``; shift: added to a raw index, gives an index of source. Voxel (i, j, k) of the patch lies at
    ``start + rise @ (i, j, k)`` in raw, plus the field at ``field_start + field_rise @ (i, j, k)`` in control
    points: ``control`` float32 (3, nz, ny, nx), or of size 0. ``limit``: float64 (3,), the last control points.
    """
    moved = control.size > 0
    straight = moved and field_rise[0, 2] == 0 and field_rise[1, 2] == 0
    count = np.array(control.shape[1:])
    lines = np.empty((TILE * TILE, 3, max(count[2], 1)), np.float32)
    at, share = np.empty((3, CHUNK), np.float32), np.empty((3, CHUNK), np.float32)
    index, base, four = np.empty(CHUNK, np.int64), np.empty(3, np.int64), np.empty((2, CHUNK), np.uint32)
    low, high, control_at = np.empty(3), np.empty(3), np.empty(3)
    depth, height, length = image.shape
    for tile in range(((depth + TILE - 1) // TILE) * ((height + TILE - 1) // TILE)):
        z0, y0 = tile // ((height + TILE - 1) // TILE) * TILE, tile % ((height + TILE - 1) // TILE) * TILE
        z1, y1 = min(z0 + TILE, depth), min(y0 + TILE, height)
        if straight:
            for z in range(z0, z1):
                for y in range(y0, y1):
                    row_z = field_start[0] + field_rise[0, 0] * z + field_rise[0, 1] * y
                    row_y = field_start[1] + field_rise[1, 0] * z + field_rise[1, 1] * y
                    _blend_row(control, count, limit, row_z, row_y, lines[(z - z0) * TILE + y - y0])
        for x in range(0, length, CHUNK):
            n = min(CHUNK, length - x)
            for z in range(z0, z1):
                for y in range(y0, y1):
                    for k in range(3):
                        begin = start[k] + rise[k, 0] * z + rise[k, 1] * y + rise[k, 2] * x
                        end = begin + rise[k, 2] * (n - 1)
                        base[k] = math.floor(min(begin, end))
                        low[k], high[k] = min(begin, end) - base[k], max(begin, end) - base[k]
                        offset, slope = np.float32(begin - base[k]), np.float32(rise[k, 2])
                        for i in range(n):
                            at[k, i] = offset + np.float32(i) * slope
                    if moved:
                        for k in range(3):
                            control_at[k] = (
                                field_start[k] + field_rise[k, 0] * z + field_rise[k, 1] * y + field_rise[k, 2] * x
                            )
                        if straight:
                            line = lines[(z - z0) * TILE + y - y0]
                            _displace_line(line, count[2] - 2, limit[2], control_at[2], field_rise[2, 2], n, at)
                        else:
                            _displace(control, count, limit, control_at, field_rise[:, 2], n, at)
                        _rebase(at, n, base, low, high)
                    pixels, labels = image[z, y, x : x + n], codes[z, y, x : x + n]
                    _fill(
                        raw, shape, inside, source, codes_shape, shift, fill, at, n, base, low, high, index, share,
                        four, pixels, labels,
                    )  # fmt: skip


@numba.njit(cache=True, nogil=True, fastmath=True)
def smooth(values: Array, kernel: Array, stride: int, out: Array) -> None:
    """``out[b, i] = sum_t kernel[t] * values[b, i + t * stride]``: a filter along one axis of rows laid flat."""
    for b in range(out.shape[0]):
        row, into = values[b], out[b]
        into[:] = 0
        for t in range(len(kernel)):
            weight, ahead = kernel[t], t * stride
            for i in range(out.shape[1]):
                into[np.uint64(i)] += weight * row[np.uint64(i + ahead)]
