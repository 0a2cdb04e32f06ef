"""Meshes of one object at several levels of detail, in fragments, as neuroglancer streams them.

Level k is the surface of voxels 2^k times as large (`connectomics.morphology.mesh_surface`), so each level has about a
quarter of the triangles of the one before. A level is cut into cubes of `CELLS` of its own voxels, until one cube holds
the object. Marching cubes never leave the cell between eight voxel centers, so cutting moves no vertex, and neighboring
fragments join exactly.

The format is ``neuroglancer_multilod_draco``: ``{id}.index`` says where the fragments are, ``{id}`` holds them, each a
Draco mesh. They are written without Draco's entropy coding: any Draco decoder reads them, and no encoder is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from connectomics.geometry import Index, VoxelGrid
from connectomics.io.multiscale import Multiscale
from connectomics.morphology.mesh_surface import SPAN, StoredObject

CELLS = 64  # voxels of its level that a fragment spans along each axis; even, since neuroglancer halves it
BITS = 16  # of a coordinate in a fragment
INFO = {
    "@type": "neuroglancer_multilod_draco", "lod_scale_multiplier": 1, "vertex_quantization_bits": BITS,
    "transform": [1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0],
}  # fmt: skip


@dataclass(frozen=True)
class SurfaceLevel:
    """One level of detail of an object.

    Attributes:
        stride: edge of its voxels in voxels of the labels.
        corners: (n, 3) int64, z y x: half samples of this stride, from the sample of index 0 of the volume.
        faces: (m, 3) rows of ``corners``, clockwise seen from outside (z y x is a reflection of x y z).
    """

    stride: int
    corners: NDArray[np.int64]
    faces: NDArray[np.uint32]


def surface_levels(
    source: Multiscale, label: int, box: Sequence[int], *, semantic: bool = False, max_vertices: int, span: int = SPAN
) -> list[SurfaceLevel]:
    """Return the levels of detail of an object, finest first; the last one fits into one fragment.

    Arguments, memory and errors are those of `connectomics.morphology.mesh_surface.mesh_object`; as there, the finest
    level may have larger voxels than the labels.
    """
    thing, stride, found = StoredObject.of(source, label, box, semantic), 1, list[SurfaceLevel]()
    while True:
        stride, corners, faces = thing.surface_within(stride, max_vertices, span)
        first = thing.low // stride - 1
        found.append(SurfaceLevel(stride, corners + 2 * first, faces))
        if (thing.high // stride + 1 - first).max() <= CELLS:
            return found
        stride *= 2


def encode_levels(levels: Sequence[SurfaceLevel], grid: VoxelGrid) -> tuple[bytes, bytes]:
    """Return the index and the fragments of an object, as files of ``neuroglancer_multilod_draco``.

    Args:
        levels: of `surface_levels`.
        grid: of the labels, nm.
    """
    strides = [level.stride for level in levels]
    # where the fragments of all levels begin: a multiple of the coarsest voxel, in voxels of the labels
    begins = [level.corners.min(axis=0) // 2 * level.stride for level in levels]
    origin = np.min(begins, axis=0) // strides[-1] * strides[-1]
    size, first = np.asarray(grid.voxel_size), np.asarray(grid.translation)
    placed = [_fragments(level, 2 * origin // level.stride) for level in levels]
    for finer, coarser in pairwise(placed):  # a fragment needs one around it in the next level, which may be empty
        for x, y, z in finer:
            coarser.setdefault((x // 2, y // 2, z // 2), b"")
    head = [size[::-1] * CELLS * strides[0], (first + size * origin)[::-1]]
    offsets = [size[::-1] * (stride - 1) / 2 for stride in strides]
    index = np.concatenate(head).astype("<f4").tobytes() + np.array([len(levels)], "<u4").tobytes()
    index += np.array([stride * size.max() for stride in strides], "<f4").tobytes()
    index += np.concatenate(offsets).astype("<f4").tobytes() + np.array([len(p) for p in placed], "<u4").tobytes()
    data = b""
    for fragments in placed:
        order = sorted(fragments, key=_z_order)
        index += np.array(order, "<u4").T.tobytes() + np.array([len(fragments[at]) for at in order], "<u4").tobytes()
        data += b"".join(fragments[at] for at in order)
    return index, data


def _fragments(level: SurfaceLevel, origin: NDArray[np.int64]) -> dict[Index, bytes]:
    """Return the fragments of a level by their place (x, y, z); ``origin`` in its half samples."""
    corners = (level.corners - origin)[:, ::-1]  # x, y, z
    faces = level.faces[:, ::-1]
    place = corners[faces].sum(axis=1) // 6 // CELLS  # of the cell that holds the triangle
    places, of, counts = np.unique(place, axis=0, return_inverse=True, return_counts=True)
    by_place = np.split(faces[np.argsort(of.ravel(), kind="stable")], np.cumsum(counts)[:-1])
    found: dict[Index, bytes] = {}
    for at, some in zip(places, by_place, strict=True):
        used, renumbered = np.unique(some, return_inverse=True)
        inside = (corners[used] - 2 * CELLS * at) / (2 * CELLS)
        quantized = np.rint(inside * (2**BITS - 1)).astype(np.uint32)
        x, y, z = at.tolist()
        found[x, y, z] = draco(quantized, renumbered.reshape(-1, 3).astype(np.uint32))
    return found


def _z_order(place: Index) -> int:
    """Interleave the bits of x, y and z, z the most significant."""
    return sum((int(n) >> bit & 1) << (3 * bit + axis) for bit in range(32) for axis, n in enumerate(place))


def draco(vertices: NDArray[np.uint32], faces: NDArray[np.uint32]) -> bytes:
    """Return a mesh as a Draco bitstream 2.2: sequential, connectivity and coordinates as they are.

    Args:
        vertices: (n, 3) x y z, of `BITS` bits each.
        faces: (m, 3) rows of ``vertices``.
    """
    out = b"DRACO" + bytes([2, 2, 1, 0, 0, 0])  # version, triangular mesh, sequential, no flags
    out += _varint(len(faces)) + _varint(len(vertices)) + b"\x01"  # 1: indices are not compressed
    if len(vertices) < 1 << 16:
        out += faces.astype(np.uint8 if len(vertices) < 256 else "<u2").tobytes()
    elif len(vertices) < 1 << 21:
        out += _varint(*faces.ravel().tolist())
    else:
        out += faces.astype("<u4").tobytes()
    # one decoder of one attribute: positions, float32, three of them, not normalized, ID 0; quantized
    out += bytes([1, 1, 0, 9, 3, 0, 0, 2])
    out += bytes([0xFE, 0, 3])  # no prediction, not compressed, three bytes a number: positive n as 2 n
    stored = np.ascontiguousarray(vertices * 2, "<u4").view(np.uint8).reshape(-1, 4)[:, :3]
    return out + stored.tobytes() + np.array([0, 0, 0, 1], "<f4").tobytes() + bytes([BITS])  # origin, range


def _varint(*numbers: int) -> bytes:
    """Seven bits a byte, the lowest first; the highest bit says that more follow. Numbers below 2^35."""
    parts = np.array(numbers)[:, None] >> np.arange(0, 42, 7)
    more = parts[:, 1:] > 0
    kept = np.insert(more[:, :-1], 0, True, axis=1)
    return (parts[:, :-1] & 127 | more * 128)[kept].astype(np.uint8).tobytes()
