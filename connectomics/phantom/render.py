"""From objects to voxels: which class a point of the world is, whose it is, and how grey it looks.

A point p (nm) is first bent, q = p + w(p) with a smooth hashed w, so that nothing looks computed; all shapes are
evaluated at q, by signed distance. Distances between objects can only shrink by that, never vanish: the bending is
one-to-one, so objects that do not overlap before do not overlap after.

The grey value follows the same distances with soft edges, so it is defined at any voxel size; only the detector's
noise belongs to the voxels of one lattice, that of the data set's finest raw level.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from connectomics.phantom import kinds
from connectomics.phantom.noise import add_value_noise, gaussian, hash3, part, speck, symmetric, value_noise_at
from connectomics.phantom.place import RUFFLES
from connectomics.phantom.shapes import BOWL, cell_distance, distance, nucleus_distance

Floats = NDArray[np.float64]
#: The smooth textures at a point, about -1 to 1: coarse and fine.
Texture = tuple[float, float]

#: Objects are felt up to this distance (nm) from their surface, by the grey value of what is around them; sheets of
#: ER farther, because ribosomes sit on them.
MARGIN = 4.5
BOWL_MARGIN = 26.0
#: A spheroid's distance is of first order only, and may grow faster than the way walked; its reach gets this factor.
SPHEROID_SLACK = 1.5

_FAR = 1e3
_SHELL, _INSIDE, _THICKNESS = kinds.SHELL_ID, kinds.INSIDE_ID, kinds.THICKNESS
_ECS, _PM, _CYTO = kinds.class_id("ecs"), kinds.class_id("pm"), kinds.class_id("cyto")
_NE_MEM, _NE_LUM = kinds.class_id("ne_mem"), kinds.class_id("ne_lum")
_HCHROM, _ECHROM, _NUCPL = kinds.class_id("hchrom"), kinds.class_id("echrom"), kinds.class_id("nucpl")
_NP_OUT, _NP_IN = kinds.class_id("np_out"), kinds.class_id("np_in")
_MITO_MEM, _MITO_LUM, _MITO_RIBO = kinds.class_id("mito_mem"), kinds.class_id("mito_lum"), kinds.class_id("mito_ribo")
_MITO, _ER, _GOLGI, _ENDO, _LYSO, _LD = kinds.MITO, kinds.ER, kinds.GOLGI, kinds.ENDO, kinds.LYSO, kinds.LD
_PEROX, _VES, _MT, _PORE, _PROCESS = kinds.PEROX, kinds.VES, kinds.MT, kinds.PORE, kinds.PROCESS
_PM_THICK, _NE_MEMBRANE, _NE_THICK = kinds.PM_THICKNESS, kinds.NE_MEMBRANE, kinds.NE_THICKNESS
_CHANNEL = kinds.PORE_CHANNEL

# Grey values (0..255, before gain and noise). The ranges of classes overlap on purpose: a threshold cannot tell them.
_MEMBRANE_GREY = 74.0
_CYTO_GREY, _ECS_GREY = 157.0, 194.0
_HCHROM_GREY, _ECHROM_GREY, _NUCPL_GREY = 122.0, 164.0, 184.0
_MATRIX_GREY, _LUMEN_GREY = 126.0, 172.0


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
def _bend(zs: Floats, ys: Floats, xs: Floats, seed: int) -> Floats:
    """The bent positions q of a block, (3, z, y, x) nm."""
    q = np.empty((3, zs.size, ys.size, xs.size), np.float64)
    for a in range(zs.size):
        for b in range(ys.size):
            for c in range(xs.size):
                q[0, a, b, c] = zs[a]
                q[1, a, b, c] = ys[b]
                q[2, a, b, c] = xs[c]
    for axis in range(3):
        add_value_noise(q[axis], zs, ys, xs, 240.0, 20.0, seed + 11 + axis)
        add_value_noise(q[axis], zs, ys, xs, 84.0, 5.5, seed + 21 + axis)
        add_value_noise(q[axis], zs, ys, xs, 37.0, 1.3, seed + 31 + axis)
    return q


@njit(cache=True, nogil=True)
def _frame(zs: Floats, ys: Floats, xs: Floats, q: Floats) -> Floats:
    """What a block's bent positions span, (3 axes, 4) nm: least, largest, least and largest shift by the bending."""
    frame = np.empty((3, 4), np.float64)
    for axis in range(3):
        low, high, back, forth = 1e30, -1e30, 1e30, -1e30
        for a in range(zs.size):
            for b in range(ys.size):
                for c in range(xs.size):
                    value = q[axis, a, b, c]
                    shift = value - (zs[a] if axis == 0 else (ys[b] if axis == 1 else xs[c]))
                    low, high = min(low, value), max(high, value)
                    back, forth = min(back, shift), max(forth, shift)
        frame[axis, 0], frame[axis, 1], frame[axis, 2], frame[axis, 3] = low, high, back, forth
    return frame


@njit(cache=True, nogil=True)
def _half_diagonal(frame: Floats) -> float:
    """Half the diagonal of what a block spans, nm."""
    square = 0.0
    for axis in range(3):
        square += (frame[axis, 1] - frame[axis, 0]) ** 2
    return 0.5 * np.sqrt(square)


@njit(cache=True, nogil=True)
def _apart(frame: Floats, box: Floats) -> bool:
    """Whether a block's bent positions lie outside of a primitive's box (begin, end)."""
    apart = False
    for axis in range(3):
        apart |= box[axis] > frame[axis, 1] or box[axis + 3] < frame[axis, 0]
    return apart


@njit(cache=True, nogil=True)
def _reach(axis: Floats, low: float, high: float) -> tuple[int, int]:
    """The range of indices of increasing positions between two values."""
    first = 0
    while first < axis.size and axis[first] < low:
        first += 1
    last = first
    while last < axis.size and axis[last] <= high:
        last += 1
    return first, last


@njit(cache=True, nogil=True)
def _nearest_objects(
    zs: Floats,
    ys: Floats,
    xs: Floats,
    q: Floats,
    parameters: Floats,
    shape: NDArray[np.int64],
    bounds: Floats,
    nearest: Floats,
    owner: NDArray[np.int32],
) -> Floats:
    """Distance (nm) to the nearest primitive that is felt at a voxel, and its index; returns the block's `_frame`.

    ``bounds`` are the boxes (begin, end) in which primitives are felt, where points are bent already. Leaving out what
    is far from the block changes nothing: what a voxel gets depends on its position alone.
    """
    frame = _frame(zs, ys, xs, q)
    z, y, x = 0.5 * (frame[0, 0] + frame[0, 1]), 0.5 * (frame[1, 0] + frame[1, 1]), 0.5 * (frame[2, 0] + frame[2, 1])
    half = _half_diagonal(frame)
    for i in range(parameters.shape[0]):
        if _apart(frame, bounds[i]):
            continue
        row = parameters[i]
        margin = BOWL_MARGIN if shape[i] == BOWL else MARGIN
        if distance(shape[i], row, z, y, x) > SPHEROID_SLACK * half + margin:
            continue
        a0, a1 = _reach(zs, bounds[i, 0] - frame[0, 3], bounds[i, 3] - frame[0, 2])
        b0, b1 = _reach(ys, bounds[i, 1] - frame[1, 3], bounds[i, 4] - frame[1, 2])
        c0, c1 = _reach(xs, bounds[i, 2] - frame[2, 3], bounds[i, 5] - frame[2, 2])
        for a in range(a0, a1):
            for b in range(b0, b1):
                for c in range(c0, c1):
                    d = distance(shape[i], row, q[0, a, b, c], q[1, a, b, c], q[2, a, b, c])
                    if d < margin and d < nearest[a, b, c]:
                        nearest[a, b, c] = d
                        owner[a, b, c] = i
    return frame


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
    """Class and grey value inside a mitochondrion: envelope, cristae, dense specks of ribosomes, matrix."""
    grey = _MATRIX_GREY + 8.0 * wave + 9.0 * fine
    crista = _crista(row, z, y, x, wave, seed)
    ribosome = speck(z, y, x, 52.0, 8.0, 0.35, seed + 5)
    grey -= 40.0 * _step(5.0, -6.0, ribosome)
    grey += (_MEMBRANE_GREY - 2.0 - grey) * _step(4.5, -3.5, crista)
    grey += (0.35 * 170.0 + 0.65 * grey - grey) * _band(d + 9.0, 5.0)  # the lighter gap between the two membranes
    grey += (_MEMBRANE_GREY - grey) * _band(d + 3.5, 6.0)
    grey += (_MEMBRANE_GREY + 4.0 - grey) * 0.8 * _band(d + 14.0, 5.5)
    if d > -15.0 or crista < 0.0:
        return _MITO_MEM, grey
    return (_MITO_RIBO if ribosome < 0.0 else _MITO_LUM), grey


@njit(cache=True, nogil=True)
def _inside_grey(kind: int, d: float, z: float, y: float, x: float, low: float, fine: float, seed: int) -> float:
    """Grey value inside an organelle other than a mitochondrion, its membrane apart."""
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
    return _LUMEN_GREY + 6.0 * low + 6.0 * fine  # ER and Golgi


@njit(cache=True, nogil=True)
def _cytosol(z: float, y: float, x: float, low: float, fine: float, seed: int) -> float:
    """Grey value of the cytosol: uneven, with ribosomes, which are denser in some places."""
    crowd = 25.0 + 18.0 * low
    grey = _CYTO_GREY + 10.0 * low + 13.0 * fine
    grey -= crowd * _step(6.0, -7.0, speck(z, y, x, 37.0, 11.5, 0.8, seed + 41))
    return grey - crowd * _step(6.0, -7.0, speck(x + 19.0, z + 7.0, y + 31.0, 46.0, 13.0, 0.85, seed + 42))


@njit(cache=True, nogil=True)
def _nucleoplasm(dn: float, z: float, y: float, x: float, fine: float, seed: int) -> tuple[int, float]:
    """Class and grey value inside the nuclear envelope: chromatin is dense along the envelope and in clumps."""
    level = 0.62 * value_noise_at(z, y, x, 135.0, seed + 61) + 0.42 * value_noise_at(z, y, x, 61.0, seed + 62)
    level += 0.26 * value_noise_at(z, y, x, 26.0, seed + 63)
    level += 0.60 * max(0.0, 1.0 + (dn + _NE_THICK) / 85.0)
    grey = _ECHROM_GREY + (_HCHROM_GREY - _ECHROM_GREY) * _step(0.16, 0.56, level)
    grey += (_NUCPL_GREY - grey) * _step(-0.16, -0.44, level) + 12.0 * fine
    if level > 0.36:
        return _HCHROM, grey
    return (_NUCPL if level < -0.30 else _ECHROM), grey


@njit(cache=True, nogil=True)
def _background(
    dn: float, dc: float, z: float, y: float, x: float, texture: Texture, seed: int, textured: bool
) -> tuple[int, float]:
    """Class and grey value where no organelle is: nucleus with envelope, cytosol, plasma membrane, outside."""
    low, fine = texture
    if dn < 6.0:
        atom, inner = _nucleoplasm(dn, z, y, x, fine, seed)
        grey = inner if dn < -_NE_THICK else _LUMEN_GREY + 6.0 * fine
        if dn >= -_NE_THICK:
            atom = _NE_MEM if dn > -_NE_MEMBRANE or dn < _NE_MEMBRANE - _NE_THICK else _NE_LUM
        if dn >= 0.0:
            atom, grey = _CYTO, _cytosol(z, y, x, low, fine, seed) if textured else 0.0
        grey += (_MEMBRANE_GREY - grey) * _band(dn + 0.5 * _NE_MEMBRANE, 7.5)
        return atom, grey + (_MEMBRANE_GREY - grey) * _band(dn + _NE_THICK - 0.5 * _NE_MEMBRANE, 7.5)
    if dc < 0.0:
        grey = _cytosol(z, y, x, low, fine, seed) if textured else 0.0
        atom = _PM if dc > -_PM_THICK else _CYTO
    else:
        grey = _ECS_GREY + 5.0 * low + 5.0 * fine
        atom = _ECS
    return atom, grey + (_MEMBRANE_GREY - 6.0 - grey) * _band(dc + 0.5 * _PM_THICK, 8.0)


@njit(cache=True, nogil=True)
def _point(
    d: float,
    kind: int,
    shape: int,
    row: Floats,
    number: int,
    dn: float,
    dc: float,
    z: float,
    y: float,
    x: float,
    texture: Texture,
    seed: int,
    textured: bool,
) -> tuple[int, float]:
    """Class and grey value of a point near an object: the background, and the object over it."""
    low, fine = texture
    atom, grey = _CYTO, 0.0
    cover = _step(3.0, -4.0, d)
    if cover < 1.0:
        atom, grey = _background(dn, dc, z, y, x, texture, seed, textured)
    if textured and kind == _ER and shape == BOWL and d > 1.0:  # ribosomes sit on the sheets
        bound = _step(4.0, -7.0, speck(z, y, x, 31.0, 10.5, 0.8, seed + 43))
        grey -= 38.0 * bound * _step(24.0, 16.0, d) * _step(1.0, 5.0, d)
    if cover == 0.0:
        return atom, grey
    if kind == _MITO:
        inner_atom, inner = _mitochondrion(row, d, z, y, x, low, fine, seed + 1000 * number)
        grey += (inner - grey) * cover
        return (inner_atom if d < 0.0 else atom), grey
    if kind == _PORE:
        along = (z - row[0]) * row[3] + (y - row[1]) * row[4] + (x - row[2]) * row[5]
        square = (z - row[0]) ** 2 + (y - row[1]) ** 2 + (x - row[2]) ** 2
        across = np.sqrt(max(0.0, square - along * along))
        inner = 138.0 + 10.0 * fine - 34.0 * _band(across - 30.0, 12.0)
        grey += (inner - grey) * cover
        return ((_NP_IN if across < _CHANNEL else _NP_OUT) if d < 0.0 else atom), grey
    thick = _THICKNESS[kind]
    if textured:
        if kind == _PROCESS:
            inner = _cytosol(z, y, x, low, fine, seed)
        else:
            inner = _inside_grey(kind, d, z, y, x, low, fine, seed)
        grey += (inner - grey) * cover
    wall = _MEMBRANE_GREY + (18.0 if kind == _MT else 0.0)
    grey += (wall - grey) * _band(d + 0.5 * thick, 0.5 * thick + 3.5)
    if d >= 0.0:
        return atom, grey
    return (_SHELL[kind] if d > -thick else _INSIDE[kind]), grey


@njit(cache=True, nogil=True)
def _detector(
    grey: Floats, zs: Floats, ys: Floats, xs: Floats, lattice: Floats, tone: Floats, seed: int, out: NDArray[np.uint8]
) -> None:
    """Gain, drift along z, streaks, noise of the nearest voxel of the ``lattice`` (translation, voxel size), 8 bits."""
    drift = np.zeros((zs.size, 1, 1), np.float64)
    origin = np.zeros(1, np.float64)
    add_value_noise(drift, zs, origin, origin, 420.0, 9.0, seed + 51)
    curtain = np.zeros((zs.size, 1, xs.size), np.float64)  # the beam's streaks, constant along y
    add_value_noise(curtain, zs, origin, xs, 34.0, 2.6, seed + 54)
    ky = np.empty(ys.size, np.int64)
    kx = np.empty(xs.size, np.int64)
    for b in range(ys.size):
        ky[b] = np.int64(np.rint((ys[b] - lattice[1]) / lattice[4]))
    for c in range(xs.size):
        kx[c] = np.int64(np.rint((xs[c] - lattice[2]) / lattice[5]))
    for a in range(zs.size):
        kz = np.int64(np.rint((zs[a] - lattice[0]) / lattice[3]))
        shift = tone[1] + drift[a, 0, 0] + 1.3 * gaussian(hash3(kz, 0, 0, seed + 52))
        gain = tone[0] * (1.0 + 0.05 * drift[a, 0, 0] / 9.0)
        for b in range(ys.size):
            for c in range(xs.size):
                value = (grey[a, b, c] - 140.0) * gain + 140.0 + shift + curtain[a, 0, c]
                value += tone[2] * gaussian(hash3(kz, ky[b], kx[c], seed + 53))
                out[a, b, c] = np.uint8(min(255.0, max(0.0, np.rint(value))))


@njit(cache=True, nogil=True)
def render_block(
    zs: Floats,
    ys: Floats,
    xs: Floats,
    cell: Floats,
    nucleus: Floats,
    parameters: Floats,
    shape: NDArray[np.int64],
    kind: NDArray[np.int64],
    number: NDArray[np.int64],
    bounds: Floats,
    lattice: Floats,
    tone: Floats,
    seed: int,
    atoms: NDArray[np.uint8],
    owner: NDArray[np.int32],
    raw: NDArray[np.uint8],
) -> None:
    """Fill ``atoms`` (class ids), ``owner`` (index of the primitive that a voxel is in, -1 for none) and ``raw``.

    ``zs``, ``ys``, ``xs`` are voxel centres (nm, increasing); ``raw`` may be empty, and is then not computed.
    """
    size = (zs.size, ys.size, xs.size)
    q = _bend(zs, ys, xs, seed)
    nearest = np.full(size, _FAR, np.float64)
    owner[:] = -1
    frame = _nearest_objects(zs, ys, xs, q, parameters, shape, bounds, nearest, owner)
    low = np.zeros(size, np.float64)
    add_value_noise(low, zs, ys, xs, 74.0, 0.75, seed + 1)
    add_value_noise(low, zs, ys, xs, 31.0, 0.45, seed + 2)
    fine = np.zeros(size, np.float64)
    if raw.size:
        add_value_noise(fine, zs, ys, xs, 12.0, 0.75, seed + 3)
        add_value_noise(fine, zs, ys, xs, 21.0, 0.55, seed + 4)
    z, y, x = 0.5 * (frame[0, 0] + frame[0, 1]), 0.5 * (frame[1, 0] + frame[1, 1]), 0.5 * (frame[2, 0] + frame[2, 1])
    half = _half_diagonal(frame)
    near_nucleus = nucleus_distance(nucleus, z, y, x) < SPHEROID_SLACK * half + 10.0
    near_surface = cell_distance(cell, z, y, x) > -half - RUFFLES - 20.0
    ruffles = np.zeros(size, np.float64)
    if near_surface:
        add_value_noise(ruffles, zs, ys, xs, 260.0, 26.0, seed + 6)
        add_value_noise(ruffles, zs, ys, xs, 95.0, RUFFLES - 26.0, seed + 7)
    grey = np.empty(size if raw.size else (0, 0, 0), np.float64)
    for a in range(size[0]):
        for b in range(size[1]):
            for c in range(size[2]):
                z, y, x = q[0, a, b, c], q[1, a, b, c], q[2, a, b, c]
                i = owner[a, b, c]
                d = nearest[a, b, c]
                dn = nucleus_distance(nucleus, z, y, x) if near_nucleus else _FAR
                dc = -_FAR
                if near_surface:
                    dc = cell_distance(cell, z, y, x) + ruffles[a, b, c]
                texture = (low[a, b, c], fine[a, b, c])
                if owner[a, b, c] < 0:
                    atom, value = _background(dn, dc, z, y, x, texture, seed, grey.size > 0)
                else:
                    atom, value = _point(
                        d, kind[i], shape[i], parameters[i], number[i], dn, dc, z, y, x, texture, seed, grey.size > 0
                    )
                atoms[a, b, c] = atom
                if d >= 0.0:
                    owner[a, b, c] = -1
                if raw.size:
                    grey[a, b, c] = value
    if raw.size:
        _detector(grey, zs, ys, xs, lattice, tone, seed, raw)
