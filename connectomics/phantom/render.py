"""From objects to voxels: which class a point of the world is, which object it belongs to, and its gray value.

A point p (nm) is first bent, q = p + w(p) with a smooth hashed w, so that nothing looks computed; all shapes are
evaluated at q, by signed distance. Bending is one-to-one, so objects that do not overlap before do not overlap after.

Gray values follow the same distances with soft edges, so they are defined at any voxel size; only the detector's noise
belongs to the voxels of one lattice, that of the data set's finest raw level.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from connectomics.cellmap.classes import CLASSES
from connectomics.phantom import kinds
from connectomics.phantom.place import BOWL_MARGIN, MARGIN, Objects
from connectomics.phantom.shapes import BALL, BOWL, cell_distance, distance
from connectomics.phantom.textures import (
    Axes,
    Floats,
    Point,
    add_value_noise,
    gaussian,
    hash3,
    part,
    smooth,
    speck,
    symmetric,
    value_noise_at,
)

#: The smooth textures at a point, about -1 to 1: coarse and fine.
Texture = tuple[float, float]
#: Shape, kind and number of all primitives (n, 3), and their parameters.
Things = tuple[NDArray[np.int64], Floats]

# A spheroid's distance is of first order only and may grow faster than the distance walked.
_SPHEROID_SLACK = 1.5
_FAR = 1e3
_NAMES = ("ecs", "pm", "cyto", "ne_mem", "ne_lum", "hchrom", "echrom", "nucpl", "np_out", "np_in")
_ECS, _PM, _CYTO, _NE_MEM, _NE_LUM, _HCHROM, _ECHROM, _NUCPL, _NP_OUT, _NP_IN = (CLASSES[n].id for n in _NAMES)
_MITO_MEM, _MITO_LUM, _MITO_RIBO = (CLASSES[n].id for n in ("mito_mem", "mito_lum", "mito_ribo"))

# Gray values (0..255, before gain and noise). The classes overlap on purpose: a threshold cannot separate them.
_MEMBRANE_GRAY, _CYTO_GRAY, _ECS_GRAY, _LUMEN_GRAY = 74.0, 157.0, 194.0, 172.0
_HCHROM_GRAY, _ECHROM_GRAY, _NUCPL_GRAY = 122.0, 164.0, 184.0


@njit(cache=True, nogil=True)
def _step(low: float, high: float, value: float) -> float:
    """Smoothstep: 0 at ``low``, 1 at ``high``."""
    return smooth(min(1.0, max(0.0, (value - low) / (high - low))))


@njit(cache=True, nogil=True)
def _band(x: float, width: float) -> float:
    """A soft bump: 1 at 0, 0 from ``width`` (nm) on."""
    u = 1.0 - (x / width) ** 2
    return u * u if u > 0.0 else 0.0


@njit(cache=True, nogil=True)
def _crista(row: Floats, point: Point, wave: float, seed: int) -> float:
    """Distance (nm) to the nearest crista: sheets across the tube, each grown from one side of it to a random depth."""
    dz, dy, dx = point[0] - row[0], point[1] - row[1], point[2] - row[2]
    az, ay, ax = row[3] - row[0], row[4] - row[1], row[5] - row[2]
    square = az * az + ay * ay + ax * ax
    length = np.sqrt(square)
    t = (dz * az + dy * ay + dx * ax) / square
    u = dz * row[9] + dy * row[10] + dx * row[11]
    vz = (ay * row[11] - ax * row[10]) / length
    vy = (ax * row[9] - az * row[11]) / length
    vx = (az * row[10] - ay * row[9]) / length
    v = dz * vz + dy * vy + dx * vx
    period = 38.0 + 14.0 * part(hash3(1, 2, 3, seed), 0)
    s = row[8] + t * length + 11.0 * wave + symmetric(hash3(3, 2, 1, seed)) * 0.45 * u
    k = np.int64(np.floor(s / period))
    bits = hash3(k, 7, 7, seed)
    angle = 6.283185307179586 * part(bits, 0)
    offset = s - (k + 0.5 + 0.3 * (part(bits, 2) - 0.5)) * period
    beyond = -(u * np.cos(angle) + v * np.sin(angle)) - row[6] * (0.85 - 1.0 * part(bits, 1))
    if beyond > 0.0:
        return np.sqrt(offset * offset + beyond * beyond) - 6.5
    return abs(offset) - 6.5


@njit(cache=True, nogil=True)
def _mitochondrion(gray: float, row: Floats, d: float, point: Point, wave: float, seed: int) -> tuple[int, float]:
    """Class and gray value inside a mitochondrion: envelope, cristae, dense specks of ribosomes, matrix."""
    crista = _crista(row, point, wave, seed)
    ribosome = speck(point, 52.0, 8.0, 0.35, seed + 5)
    gray -= 40.0 * _step(5.0, -6.0, ribosome)
    gray += (_MEMBRANE_GRAY - 2.0 - gray) * _step(4.5, -3.5, crista)
    gray += (0.35 * 170.0 + 0.65 * gray - gray) * _band(d + 9.0, 5.0)  # the lighter gap between the two membranes
    gray += (_MEMBRANE_GRAY - gray) * _band(d + 3.5, 6.0)
    gray += (_MEMBRANE_GRAY + 4.0 - gray) * 0.8 * _band(d + 14.0, 5.5)
    if d > -15.0 or crista < 0.0:
        return _MITO_MEM, gray
    return (_MITO_RIBO if ribosome < 0.0 else _MITO_LUM), gray


@njit(cache=True, nogil=True)
def _cytosol(point: Point, texture: Texture, seed: int) -> float:
    """Gray value of the cytosol: uneven, with ribosomes, which are denser in some places."""
    z, y, x = point
    crowd = 25.0 + 18.0 * texture[0]
    gray = _CYTO_GRAY + 10.0 * texture[0] + 13.0 * texture[1]
    gray -= crowd * _step(6.0, -7.0, speck(point, 37.0, 11.5, 0.8, seed + 41))
    return gray - crowd * _step(6.0, -7.0, speck((x + 19.0, z + 7.0, y + 31.0), 46.0, 13.0, 0.85, seed + 42))


@njit(cache=True, nogil=True)
def _nucleoplasm(dn: float, point: Point, fine: float, seed: int) -> tuple[int, float]:
    """Class and gray value inside the nuclear envelope: chromatin is dense along the envelope and in clumps."""
    level = 0.62 * value_noise_at(point, 135.0, seed + 61) + 0.42 * value_noise_at(point, 61.0, seed + 62)
    level += 0.26 * value_noise_at(point, 26.0, seed + 63)
    level += 0.60 * max(0.0, 1.0 + (dn + kinds.NE_THICKNESS) / 85.0)
    gray = _ECHROM_GRAY + (_HCHROM_GRAY - _ECHROM_GRAY) * _step(0.16, 0.56, level)
    gray += (_NUCPL_GRAY - gray) * _step(-0.16, -0.44, level) + 12.0 * fine
    if level > 0.36:
        return _HCHROM, gray
    return (_NUCPL if level < -0.30 else _ECHROM), gray


@njit(cache=True, nogil=True)
def _background(dn: float, dc: float, point: Point, texture: Texture, seed: int, textured: bool) -> tuple[int, float]:
    """Class and gray value where no organelle is: nucleus with envelope, cytosol, plasma membrane, outside."""
    low, fine = texture
    if dn < 6.0:
        atom, inner = _nucleoplasm(dn, point, fine, seed)
        gray = inner if dn < -kinds.NE_THICKNESS else _LUMEN_GRAY + 6.0 * fine
        if dn >= -kinds.NE_THICKNESS:
            atom = _NE_MEM if dn > -kinds.NE_MEMBRANE or dn < kinds.NE_MEMBRANE - kinds.NE_THICKNESS else _NE_LUM
        if dn >= 0.0:
            atom, gray = _CYTO, _cytosol(point, texture, seed) if textured else 0.0
        gray += (_MEMBRANE_GRAY - gray) * _band(dn + 0.5 * kinds.NE_MEMBRANE, 7.5)
        return atom, gray + (_MEMBRANE_GRAY - gray) * _band(dn + kinds.NE_THICKNESS - 0.5 * kinds.NE_MEMBRANE, 7.5)
    if dc < 0.0:
        gray = _cytosol(point, texture, seed) if textured else 0.0
        atom = _PM if dc > -kinds.PM_THICKNESS else _CYTO
    else:
        gray = _ECS_GRAY + 5.0 * low + 5.0 * fine
        atom = _ECS
    return atom, gray + (_MEMBRANE_GRAY - 6.0 - gray) * _band(dc + 0.5 * kinds.PM_THICKNESS, 8.0)


@njit(cache=True, nogil=True)
def _inside(
    kind: int, number: int, row: Floats, d: float, point: Point, texture: Texture, seed: int, textured: bool
) -> tuple[int, float]:
    """Class and gray value inside an object; its membrane, if it is a simple one, is not yet in the gray value."""
    gray = kinds.GRAY[kind, 0] + kinds.GRAY[kind, 1] * texture[0] + kinds.GRAY[kind, 2] * texture[1]
    if kind == kinds.MITO:
        return _mitochondrion(gray, row, d, point, texture[0], seed + 1000 * number)
    if kind == kinds.PORE:
        dz, dy, dx = point[0] - row[0], point[1] - row[1], point[2] - row[2]
        along = dz * row[3] + dy * row[4] + dx * row[5]
        across = np.sqrt(max(0.0, dz**2 + dy**2 + dx**2 - along * along))
        return (_NP_IN if across < kinds.PORE_CHANNEL else _NP_OUT), gray - 34.0 * _band(across - 30.0, 12.0)
    if textured and kind == kinds.PROCESS:
        gray = _cytosol(point, texture, seed)
    if textured and kind == kinds.LYSO:  # granules
        gray -= 44.0 * _step(5.0, -8.0, speck(point, 38.0, 13.0, 0.75, seed + 31))
    if textured and kind == kinds.ENDO:  # vesicles with a thin wall
        gray -= 70.0 * _band(speck(point, 52.0, 19.0, 0.85, seed + 32) + 3.0, 7.0)
    return (kinds.SHELL_ID[kind] if d > -kinds.THICKNESS[kind] else kinds.INSIDE_ID[kind]), gray


@njit(cache=True, nogil=True)
def _near_object(
    things: Things, i: int, d: float, dn: float, dc: float, point: Point, texture: Texture, seed: int, textured: bool
) -> tuple[int, float]:
    """Class and gray value of a point near an object: the background, and the object over it."""
    table, parameters = things
    shape, kind, number, row = table[i, 0], table[i, 1], table[i, 2], parameters[i]
    atom, gray = _CYTO, 0.0
    cover = _step(3.0, -4.0, d)
    if cover < 1.0:
        atom, gray = _background(dn, dc, point, texture, seed, textured)
    if textured and kind == kinds.ER and shape == BOWL and d > 1.0:  # ribosomes sit on the sheets
        bound = _step(4.0, -7.0, speck(point, 31.0, 10.5, 0.8, seed + 43))
        gray -= 38.0 * bound * _step(24.0, 16.0, d) * _step(1.0, 5.0, d)
    if cover == 0.0:
        return atom, gray
    inner_atom, inner = _inside(kind, number, row, d, point, texture, seed, textured)
    gray += (inner - gray) * cover
    if kind != kinds.MITO and kind != kinds.PORE:
        wall = _MEMBRANE_GRAY + (18.0 if kind == kinds.MT else 0.0)
        gray += (wall - gray) * _band(d + 0.5 * kinds.THICKNESS[kind], 0.5 * kinds.THICKNESS[kind] + 3.5)
    return (inner_atom if d < 0.0 else atom), gray


@njit(cache=True, nogil=True)
def _bend(axes: Axes, seed: int) -> tuple[Floats, Floats]:
    """The bent positions q, (3, z, y, x) nm, and their span, (3, 4) nm: least, largest, least and largest shift."""
    zs, ys, xs = axes
    q, span = np.empty((3, zs.size, ys.size, xs.size), np.float64), np.empty((3, 4), np.float64)
    for a in range(zs.size):
        for b in range(ys.size):
            for c in range(xs.size):
                q[0, a, b, c], q[1, a, b, c], q[2, a, b, c] = zs[a], ys[b], xs[c]
    for axis in range(3):
        add_value_noise(q[axis], axes, 240.0, 20.0, seed + 11 + axis)
        add_value_noise(q[axis], axes, 84.0, 5.5, seed + 21 + axis)
        add_value_noise(q[axis], axes, 37.0, 1.3, seed + 31 + axis)
        low, high, back, forth = 1e30, -1e30, 1e30, -1e30
        for a in range(zs.size):
            for b in range(ys.size):
                for c in range(xs.size):
                    value = q[axis, a, b, c]
                    shift = value - (zs[a] if axis == 0 else (ys[b] if axis == 1 else xs[c]))
                    low, high, back, forth = min(low, value), max(high, value), min(back, shift), max(forth, shift)
        span[axis, 0], span[axis, 1], span[axis, 2], span[axis, 3] = low, high, back, forth
    return q, span


@njit(cache=True, nogil=True)
def _nearest_objects(
    window: NDArray[np.int64], q: Floats, span: Floats, things: Things, nearest: Floats, owner: NDArray[np.int32]
) -> None:
    """Set the distance (nm) to the nearest primitive within its margin of a voxel, and the primitive's index.

    ``span`` is that of `_bend`; ``window`` (2, 3, n): begin and end of the voxels that a primitive may be near.
    Skipping primitives far from the block changes nothing: the result at a voxel depends on its position alone.
    """
    table, parameters = things
    z, y, x = 0.5 * (span[0, 0] + span[0, 1]), 0.5 * (span[1, 0] + span[1, 1]), 0.5 * (span[2, 0] + span[2, 1])
    reach = _SPHEROID_SLACK * _half_diagonal(span)
    for i in range(len(table)):
        row, form = parameters[i], table[i, 0]
        margin = BOWL_MARGIN if form == BOWL else MARGIN
        apart = False
        for axis in range(3):
            apart |= window[0, axis, i] >= window[1, axis, i]
        if apart or distance(form, row, z, y, x) > reach + margin:
            continue
        for a in range(window[0, 0, i], window[1, 0, i]):
            for b in range(window[0, 1, i], window[1, 1, i]):
                for c in range(window[0, 2, i], window[1, 2, i]):
                    d = distance(form, row, q[0, a, b, c], q[1, a, b, c], q[2, a, b, c])
                    if d < margin and d < nearest[a, b, c]:
                        nearest[a, b, c] = d
                        owner[a, b, c] = i


@njit(cache=True, nogil=True)
def _half_diagonal(span: Floats) -> float:
    square = 0.0
    for axis in range(3):
        square += (span[axis, 1] - span[axis, 0]) * (span[axis, 1] - span[axis, 0])
    return 0.5 * np.sqrt(square)


@njit(cache=True, nogil=True)
def _shade(
    q: Floats,
    nearest: Floats,
    bodies: tuple[Floats, Floats, bool, bool],
    things: Things,
    textures: tuple[Floats, Floats, Floats],
    seed: int,
    out: tuple[NDArray[np.uint8], NDArray[np.int32], Floats],
) -> None:
    """Set class and gray value (unless empty) of every voxel; the owner becomes -1 outside of objects."""
    cell, nucleus, near_nucleus, near_surface = bodies
    low, fine, ruffles = textures
    atoms, owner, gray = out
    for a in range(nearest.shape[0]):
        for b in range(nearest.shape[1]):
            for c in range(nearest.shape[2]):
                z, y, x = q[0, a, b, c], q[1, a, b, c], q[2, a, b, c]
                d, i = nearest[a, b, c], owner[a, b, c]
                dn = distance(BALL, nucleus, z, y, x) if near_nucleus else _FAR
                dc = cell_distance(cell, z, y, x) + ruffles[a, b, c] if near_surface else -_FAR
                texture = (low[a, b, c], fine[a, b, c])
                if i < 0:
                    atom, value = _background(dn, dc, (z, y, x), texture, seed, gray.size > 0)
                else:
                    atom, value = _near_object(things, i, d, dn, dc, (z, y, x), texture, seed, gray.size > 0)
                atoms[a, b, c] = atom
                if d >= 0.0:
                    owner[a, b, c] = -1
                if gray.size:
                    gray[a, b, c] = value


@njit(cache=True, nogil=True)
def _detect(gray: Floats, axes: Axes, lattice: Floats, tone: Floats, seed: int, out: NDArray[np.uint8]) -> None:
    """Gain, drift along z, streaks, noise of the nearest voxel of the ``lattice`` (translation, voxel size), 8 bits."""
    zs, ys, xs = axes
    drift, origin = np.zeros((zs.size, 1, 1), np.float64), np.zeros(1, np.float64)
    add_value_noise(drift, (zs, origin, origin), 420.0, 9.0, seed + 51)
    curtain = np.zeros((zs.size, 1, xs.size), np.float64)  # the beam's streaks, constant along y
    add_value_noise(curtain, (zs, origin, xs), 34.0, 2.6, seed + 54)
    kx = np.rint((xs - lattice[2]) / lattice[5]).astype(np.int64)
    for a in range(zs.size):
        kz = np.int64(np.rint((zs[a] - lattice[0]) / lattice[3]))
        shift = tone[1] + drift[a, 0, 0] + 1.3 * gaussian(hash3(kz, 0, 0, seed + 52))
        gain = tone[0] * (1.0 + 0.05 * drift[a, 0, 0] / 9.0)
        for b in range(ys.size):
            ky = np.int64(np.rint((ys[b] - lattice[1]) / lattice[4]))
            for c in range(xs.size):
                value = (gray[a, b, c] - 140.0) * gain + 140.0 + shift + curtain[a, 0, c]
                value += tone[2] * gaussian(hash3(kz, ky, kx[c], seed + 53))
                out[a, b, c] = np.uint8(min(255.0, max(0.0, np.rint(value))))


def _noise(size: tuple[int, ...], axes: Axes, seed: int, *octaves: tuple[float, float, int]) -> Floats:
    """The sum of value noises of (pitch in nm, amplitude, seed offset)."""
    out = np.zeros(size)
    for pitch, amplitude, offset in octaves:
        add_value_noise(out, axes, pitch, amplitude, seed + offset)
    return out


def render_block(
    axes: Axes, objects: Objects, lattice: Floats, tone: Floats, seed: int, with_raw: bool
) -> tuple[NDArray[np.uint8], NDArray[np.int32], NDArray[np.uint8]]:
    """Render one block, fast enough in a thread because the kernels release the lock.

    Args:
        axes: positions of the voxel centers, nm, increasing. objects: what is where.
        lattice: translation and voxel size of the detector's voxels. tone: gain, shift and noise.

    Returns:
        Class IDs, index of the primitive that a voxel lies in (-1: none), and gray values (empty without ``with_raw``).
    """
    size = tuple(axis.size for axis in axes)
    q, span = _bend(axes, seed)
    nearest, owner = np.full(size, _FAR), np.full(size, -1, np.int32)
    things = (objects.table, objects.parameters)
    first = np.stack([np.searchsorted(at, objects.bounds[:, a] - span[a, 3]) for a, at in enumerate(axes)])
    last = np.stack([np.searchsorted(at, objects.bounds[:, a + 3] - span[a, 2], "right") for a, at in enumerate(axes)])
    _nearest_objects(np.stack([first, last]), q, span, things, nearest, owner)
    z, y, x = 0.5 * (span[:, 0] + span[:, 1])
    half = _half_diagonal(span)
    near_nucleus = bool(distance(BALL, objects.nucleus, z, y, x) < _SPHEROID_SLACK * half + 10.0)
    near_surface = bool(cell_distance(objects.cell, z, y, x) > -half - kinds.RUFFLES - 20.0)
    low = _noise(size, axes, seed, (74.0, 0.75, 1), (31.0, 0.45, 2))
    fine = _noise(size, axes, seed, *(((12.0, 0.75, 3), (21.0, 0.55, 4)) if with_raw else ()))
    ruffles = _noise(size, axes, seed, *(((260.0, 26.0, 6), (95.0, kinds.RUFFLES - 26.0, 7)) if near_surface else ()))
    raw_size = size if with_raw else (0, 0, 0)
    atoms, gray, raw = np.empty(size, np.uint8), np.empty(raw_size), np.empty(raw_size, np.uint8)
    bodies = (objects.cell, objects.nucleus, near_nucleus, near_surface)
    _shade(q, nearest, bodies, things, (low, fine, ruffles), seed, (atoms, owner, gray))
    if with_raw:
        _detect(gray, axes, lattice, tone, seed, raw)
    return atoms, owner, raw
