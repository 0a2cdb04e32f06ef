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

from connectomics.phantom import kinds
from connectomics.phantom.shapes import BOWL, cell_distance, distance, nucleus_distance
from connectomics.phantom.textures import (
    Floats,
    add_value_noise,
    gaussian,
    hash3,
    part,
    speck,
    symmetric,
    value_noise_at,
)

#: The smooth textures at a point, about -1 to 1: coarse and fine.
Texture = tuple[float, float]
#: Kind, shape, number and parameters of a primitive.
Thing = tuple[int, int, int, Floats]
Axes = tuple[Floats, Floats, Floats]

#: Objects affect the gray value up to this distance (nm) from their surface; ER sheets farther, because of ribosomes.
MARGIN, BOWL_MARGIN = 4.5, 26.0
# A spheroid's distance is of first order only and may grow faster than the distance walked.
_SPHEROID_SLACK = 1.5
_FAR = 1e3
_SHELL, _INSIDE, _THICKNESS = kinds.SHELL_ID, kinds.INSIDE_ID, kinds.THICKNESS
_ECS, _PM, _CYTO, _NE_MEM, _NE_LUM = map(kinds.class_id, ("ecs", "pm", "cyto", "ne_mem", "ne_lum"))
_HCHROM, _ECHROM, _NUCPL = map(kinds.class_id, ("hchrom", "echrom", "nucpl"))
_NP_OUT, _NP_IN = map(kinds.class_id, ("np_out", "np_in"))
_MITO_MEM, _MITO_LUM, _MITO_RIBO = map(kinds.class_id, ("mito_mem", "mito_lum", "mito_ribo"))
_MITO, _ER, _GOLGI, _ENDO, _LYSO, _LD, _PEROX, _VES, _MT, _PORE, _PROCESS = range(len(kinds.KINDS))
_PM_THICK, _NE_MEMBRANE, _NE_THICK = kinds.PM_THICKNESS, kinds.NE_MEMBRANE, kinds.NE_THICKNESS
_CHANNEL, _RUFFLES = kinds.PORE_CHANNEL, kinds.RUFFLES

# Gray values (0..255, before gain and noise). The classes overlap on purpose: a threshold cannot separate them.
_MEMBRANE_GRAY = 74.0
_CYTO_GRAY, _ECS_GRAY = 157.0, 194.0
_HCHROM_GRAY, _ECHROM_GRAY, _NUCPL_GRAY = 122.0, 164.0, 184.0
_MATRIX_GRAY, _LUMEN_GRAY = 126.0, 172.0


@njit(cache=True, nogil=True)
def _step(low: float, high: float, value: float) -> float:
    """Smoothstep: 0 at ``low``, 1 at ``high``."""
    t = (value - low) / (high - low)
    t = min(1.0, max(0.0, t))
    return t * t * (3.0 - 2.0 * t)


@njit(cache=True, nogil=True)
def _band(x: float, width: float) -> float:
    """A soft bump: 1 at 0, 0 from ``width`` (nm) on."""
    u = 1.0 - (x / width) ** 2
    return u * u if u > 0.0 else 0.0


@njit(cache=True, nogil=True)
def _crista(row: Floats, z: float, y: float, x: float, wave: float, seed: int) -> float:
    """Distance (nm) to the nearest crista: sheets across the tube, each grown from one side of it to a random depth."""
    dz, dy, dx = z - row[0], y - row[1], x - row[2]
    az, ay, ax = row[3] - row[0], row[4] - row[1], row[5] - row[2]
    square = az * az + ay * ay + ax * ax
    length = np.sqrt(square)
    t = (dz * az + dy * ay + dx * ax) / square
    radius = row[6]
    u = dz * row[9] + dy * row[10] + dx * row[11]
    vz = (ay * row[11] - ax * row[10]) / length
    vy = (ax * row[9] - az * row[11]) / length
    vx = (az * row[10] - ay * row[9]) / length
    v = dz * vz + dy * vy + dx * vx
    period = 38.0 + 14.0 * part(hash3(1, 2, 3, seed), 0)
    slope = symmetric(hash3(3, 2, 1, seed)) * 0.45
    s = row[8] + t * length + 11.0 * wave + slope * u
    k = np.int64(np.floor(s / period))
    bits = hash3(k, 7, 7, seed)
    turn = 6.283185307179586 * part(bits, 0)
    depth = radius * (0.85 - 1.0 * part(bits, 1))
    offset = s - (k + 0.5 + 0.3 * (part(bits, 2) - 0.5)) * period
    beyond = -(u * np.cos(turn) + v * np.sin(turn)) - depth
    if beyond > 0.0:
        return np.sqrt(offset * offset + beyond * beyond) - 6.5
    return abs(offset) - 6.5


@njit(cache=True, nogil=True)
def _mitochondrion(
    row: Floats, d: float, z: float, y: float, x: float, wave: float, fine: float, seed: int
) -> tuple[int, float]:
    """Class and gray value inside a mitochondrion: envelope, cristae, dense specks of ribosomes, matrix."""
    gray = _MATRIX_GRAY + 8.0 * wave + 9.0 * fine
    crista = _crista(row, z, y, x, wave, seed)
    ribosome = speck(z, y, x, 52.0, 8.0, 0.35, seed + 5)
    gray -= 40.0 * _step(5.0, -6.0, ribosome)
    gray += (_MEMBRANE_GRAY - 2.0 - gray) * _step(4.5, -3.5, crista)
    gray += (0.35 * 170.0 + 0.65 * gray - gray) * _band(d + 9.0, 5.0)  # the lighter gap between the two membranes
    gray += (_MEMBRANE_GRAY - gray) * _band(d + 3.5, 6.0)
    gray += (_MEMBRANE_GRAY + 4.0 - gray) * 0.8 * _band(d + 14.0, 5.5)
    if d > -15.0 or crista < 0.0:
        return _MITO_MEM, gray
    return (_MITO_RIBO if ribosome < 0.0 else _MITO_LUM), gray


@njit(cache=True, nogil=True)
def _inside_gray(kind: int, d: float, z: float, y: float, x: float, low: float, fine: float, seed: int) -> float:
    """Gray value inside an organelle other than a mitochondrion, its membrane apart."""
    if kind == _LD:
        return 202.0 + 1.5 * low
    if kind == _LYSO:
        granule = speck(z, y, x, 38.0, 13.0, 0.75, seed + 31)
        return 118.0 + 22.0 * low + 14.0 * fine - 44.0 * _step(5.0, -8.0, granule)
    if kind == _ENDO:
        bleb = speck(z, y, x, 52.0, 19.0, 0.85, seed + 32)  # vesicles within: a thin wall
        return 168.0 + 7.0 * low + 9.0 * fine - 70.0 * _band(bleb + 3.0, 7.0)
    if kind == _PEROX:
        return 116.0 + 5.0 * low + 5.0 * fine
    if kind == _MT:
        return 150.0
    if kind == _VES:
        return 168.0 + 8.0 * fine
    return _LUMEN_GRAY + 6.0 * low + 6.0 * fine  # ER and Golgi


@njit(cache=True, nogil=True)
def _cytosol(z: float, y: float, x: float, low: float, fine: float, seed: int) -> float:
    """Gray value of the cytosol: uneven, with ribosomes, which are denser in some places."""
    crowd = 25.0 + 18.0 * low
    gray = _CYTO_GRAY + 10.0 * low + 13.0 * fine
    gray -= crowd * _step(6.0, -7.0, speck(z, y, x, 37.0, 11.5, 0.8, seed + 41))
    return gray - crowd * _step(6.0, -7.0, speck(x + 19.0, z + 7.0, y + 31.0, 46.0, 13.0, 0.85, seed + 42))


@njit(cache=True, nogil=True)
def _nucleoplasm(dn: float, z: float, y: float, x: float, fine: float, seed: int) -> tuple[int, float]:
    """Class and gray value inside the nuclear envelope: chromatin is dense along the envelope and in clumps."""
    level = 0.62 * value_noise_at(z, y, x, 135.0, seed + 61) + 0.42 * value_noise_at(z, y, x, 61.0, seed + 62)
    level += 0.26 * value_noise_at(z, y, x, 26.0, seed + 63)
    level += 0.60 * max(0.0, 1.0 + (dn + _NE_THICK) / 85.0)
    gray = _ECHROM_GRAY + (_HCHROM_GRAY - _ECHROM_GRAY) * _step(0.16, 0.56, level)
    gray += (_NUCPL_GRAY - gray) * _step(-0.16, -0.44, level) + 12.0 * fine
    if level > 0.36:
        return _HCHROM, gray
    return (_NUCPL if level < -0.30 else _ECHROM), gray


@njit(cache=True, nogil=True)
def _background(
    dn: float, dc: float, z: float, y: float, x: float, texture: Texture, seed: int, textured: bool
) -> tuple[int, float]:
    """Class and gray value where no organelle is: nucleus with envelope, cytosol, plasma membrane, outside."""
    low, fine = texture
    if dn < 6.0:
        atom, inner = _nucleoplasm(dn, z, y, x, fine, seed)
        gray = inner if dn < -_NE_THICK else _LUMEN_GRAY + 6.0 * fine
        if dn >= -_NE_THICK:
            atom = _NE_MEM if dn > -_NE_MEMBRANE or dn < _NE_MEMBRANE - _NE_THICK else _NE_LUM
        if dn >= 0.0:
            atom, gray = _CYTO, _cytosol(z, y, x, low, fine, seed) if textured else 0.0
        gray += (_MEMBRANE_GRAY - gray) * _band(dn + 0.5 * _NE_MEMBRANE, 7.5)
        return atom, gray + (_MEMBRANE_GRAY - gray) * _band(dn + _NE_THICK - 0.5 * _NE_MEMBRANE, 7.5)
    if dc < 0.0:
        gray = _cytosol(z, y, x, low, fine, seed) if textured else 0.0
        atom = _PM if dc > -_PM_THICK else _CYTO
    else:
        gray = _ECS_GRAY + 5.0 * low + 5.0 * fine
        atom = _ECS
    return atom, gray + (_MEMBRANE_GRAY - 6.0 - gray) * _band(dc + 0.5 * _PM_THICK, 8.0)


@njit(cache=True, nogil=True)
def _point(
    d: float,
    thing: Thing,
    dn: float,
    dc: float,
    z: float,
    y: float,
    x: float,
    texture: Texture,
    seed: int,
    textured: bool,
) -> tuple[int, float]:
    """Class and gray value of a point near an object: the background, and the object over it."""
    kind, shape, number, row = thing
    low, fine = texture
    atom, gray = _CYTO, 0.0
    cover = _step(3.0, -4.0, d)
    if cover < 1.0:
        atom, gray = _background(dn, dc, z, y, x, texture, seed, textured)
    if textured and kind == _ER and shape == BOWL and d > 1.0:  # ribosomes sit on the sheets
        bound = _step(4.0, -7.0, speck(z, y, x, 31.0, 10.5, 0.8, seed + 43))
        gray -= 38.0 * bound * _step(24.0, 16.0, d) * _step(1.0, 5.0, d)
    if cover == 0.0:
        return atom, gray
    if kind == _MITO:
        inner_atom, inner = _mitochondrion(row, d, z, y, x, low, fine, seed + 1000 * number)
        gray += (inner - gray) * cover
        return (inner_atom if d < 0.0 else atom), gray
    if kind == _PORE:
        along = (z - row[0]) * row[3] + (y - row[1]) * row[4] + (x - row[2]) * row[5]
        square = (z - row[0]) ** 2 + (y - row[1]) ** 2 + (x - row[2]) ** 2
        across = np.sqrt(max(0.0, square - along * along))
        inner = 138.0 + 10.0 * fine - 34.0 * _band(across - 30.0, 12.0)
        gray += (inner - gray) * cover
        return ((_NP_IN if across < _CHANNEL else _NP_OUT) if d < 0.0 else atom), gray
    thick = _THICKNESS[kind]
    if textured:
        if kind == _PROCESS:
            inner = _cytosol(z, y, x, low, fine, seed)
        else:
            inner = _inside_gray(kind, d, z, y, x, low, fine, seed)
        gray += (inner - gray) * cover
    wall = _MEMBRANE_GRAY + (18.0 if kind == _MT else 0.0)
    gray += (wall - gray) * _band(d + 0.5 * thick, 0.5 * thick + 3.5)
    if d >= 0.0:
        return atom, gray
    return (_SHELL[kind] if d > -thick else _INSIDE[kind]), gray


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
    axes: Axes,
    q: Floats,
    span: Floats,
    things: tuple[Floats, NDArray[np.int64], Floats],
    nearest: Floats,
    owner: NDArray[np.int32],
) -> None:
    """Set the distance (nm) to the nearest primitive within its margin of a voxel, and the primitive's index.

    ``span`` is that of `_bend`; ``things`` are parameters, shapes and boxes (begin, end) of primitives with margin.
    Skipping primitives far from the block changes nothing: the result at a voxel depends on its position alone.
    """
    parameters, shape, bounds = things
    z, y, x = 0.5 * (span[0, 0] + span[0, 1]), 0.5 * (span[1, 0] + span[1, 1]), 0.5 * (span[2, 0] + span[2, 1])
    reach = _SPHEROID_SLACK * _half_diagonal(span)
    begin, end = np.empty(3, np.int64), np.empty(3, np.int64)
    for i in range(parameters.shape[0]):
        row, form = parameters[i], shape[i]
        margin = BOWL_MARGIN if form == BOWL else MARGIN
        apart = False
        for axis in range(3):
            apart |= bounds[i, axis] > span[axis, 1] or bounds[i, axis + 3] < span[axis, 0]
        if apart or distance(form, row, z, y, x) > reach + margin:
            continue
        for axis in range(3):
            begin[axis] = np.searchsorted(axes[axis], bounds[i, axis] - span[axis, 3], side="left")
            end[axis] = np.searchsorted(axes[axis], bounds[i, axis + 3] - span[axis, 2], side="right")
        for a in range(begin[0], end[0]):
            for b in range(begin[1], end[1]):
                for c in range(begin[2], end[2]):
                    d = distance(form, row, q[0, a, b, c], q[1, a, b, c], q[2, a, b, c])
                    if d < margin and d < nearest[a, b, c]:
                        nearest[a, b, c] = d
                        owner[a, b, c] = i


@njit(cache=True, nogil=True)
def _half_diagonal(span: Floats) -> float:
    square = 0.0
    for axis in range(3):
        square += (span[axis, 1] - span[axis, 0]) ** 2
    return 0.5 * np.sqrt(square)


@njit(cache=True, nogil=True)
def _shade(
    q: Floats,
    nearest: Floats,
    bodies: tuple[Floats, Floats, bool, bool],
    things: tuple[Floats, NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]],
    textures: tuple[Floats, Floats, Floats],
    seed: int,
    atoms: NDArray[np.uint8],
    owner: NDArray[np.int32],
    gray: Floats,
) -> None:
    """Set class and gray value (unless empty) of every voxel; ``owner`` becomes -1 outside of objects."""
    cell, nucleus, near_nucleus, near_surface = bodies
    parameters, shape, kind, number = things
    low, fine, ruffles = textures
    for a in range(nearest.shape[0]):
        for b in range(nearest.shape[1]):
            for c in range(nearest.shape[2]):
                z, y, x = q[0, a, b, c], q[1, a, b, c], q[2, a, b, c]
                d, i = nearest[a, b, c], owner[a, b, c]
                dn = nucleus_distance(nucleus, z, y, x) if near_nucleus else _FAR
                dc = cell_distance(cell, z, y, x) + ruffles[a, b, c] if near_surface else -_FAR
                texture = (low[a, b, c], fine[a, b, c])
                if i < 0:
                    atom, value = _background(dn, dc, z, y, x, texture, seed, gray.size > 0)
                else:
                    thing = (kind[i], shape[i], number[i], parameters[i])
                    atom, value = _point(d, thing, dn, dc, z, y, x, texture, seed, gray.size > 0)
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
    axes: Axes,
    bodies: tuple[Floats, Floats],
    things: tuple[Floats, NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]],
    bounds: Floats,
    lattice: Floats,
    tone: Floats,
    seed: int,
    with_raw: bool,
) -> tuple[NDArray[np.uint8], NDArray[np.int32], NDArray[np.uint8]]:
    """Render one block, fast enough in a thread because the kernels release the lock.

    Args:
        axes: positions of the voxel centers, nm, increasing. bodies: parameters of cell and nucleus.
        things: parameters, shape, kind and number of the primitives. bounds: their boxes (begin, end) with margin.
        lattice: translation and voxel size of the detector's voxels. tone: gain, shift and noise.

    Returns:
        Class IDs, index of the primitive that a voxel lies in (-1: none), and gray values (empty without ``with_raw``).
    """
    size = tuple(axis.size for axis in axes)
    q, span = _bend(axes, seed)
    nearest, owner = np.full(size, _FAR), np.full(size, -1, np.int32)
    _nearest_objects(axes, q, span, (things[0], things[1], bounds), nearest, owner)
    z, y, x = 0.5 * (span[:, 0] + span[:, 1])
    half = _half_diagonal(span)
    near_nucleus = bool(nucleus_distance(bodies[1], z, y, x) < _SPHEROID_SLACK * half + 10.0)
    near_surface = bool(cell_distance(bodies[0], z, y, x) > -half - _RUFFLES - 20.0)
    low = _noise(size, axes, seed, (74.0, 0.75, 1), (31.0, 0.45, 2))
    fine = _noise(size, axes, seed, *(((12.0, 0.75, 3), (21.0, 0.55, 4)) if with_raw else ()))
    ruffles = _noise(size, axes, seed, *(((260.0, 26.0, 6), (95.0, _RUFFLES - 26.0, 7)) if near_surface else ()))
    atoms, raw_size = np.empty(size, np.uint8), size if with_raw else (0, 0, 0)
    gray, raw = np.empty(raw_size), np.empty(raw_size, np.uint8)
    _shade(q, nearest, (*bodies, near_nucleus, near_surface), things, (low, fine, ruffles), seed, atoms, owner, gray)
    if with_raw:
        _detect(gray, axes, lattice, tone, seed, raw)
    return atoms, owner, raw
