"""The surface of one object as triangles, read piece by piece.

Marching cubes (zmesh) run between the centers of neighboring voxels, with vertices halfway between a voxel of the
object and one outside. So the surface lies within half a voxel of the voxel faces, and for a ball with a radius of 8
voxels its volume is right within 1 %. Its area is about 9 % too large on smooth objects (13 % for voxels of 2:1)
because facets have few orientations; `measure_instances` gives better areas. An object that the volume's border cuts
is closed at the volume's face.

Pieces meet at planes of voxel centers and vertices lie at multiples of half a voxel, so pieces join exactly and the
mesh does not depend on them. If a mesh would have more than ``max_vertices`` vertices, it is made from voxels twice as
large, of which at least half must belong to the object.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from connectomics.errors import InputError
from connectomics.geometry import VoxelGrid, slices_of
from connectomics.io.multiscale import Multiscale

#: Voxels to read at a time along each axis.
SPAN = 256
LEAST_VERTICES = 1000
_FARTHEST = 1 << 20  # largest extent of an object, in half voxels (joining) and nm (the simplifier's float32)


@dataclass(frozen=True)
class Mesh:
    """Triangles in world coordinates.

    Attributes:
        vertices: (n, 3) float64 nm in the order **x, y, z** of mesh formats and viewers.
        faces: (m, 3) uint32 rows of ``vertices``, counterclockwise seen from outside.
        stride: edge, in voxels of the labels, of the voxels that the mesh was made from.
    """

    vertices: NDArray[np.float64]
    faces: NDArray[np.uint32]
    stride: int = 1

    @property
    def volume(self) -> float:
        """nm3 enclosed (divergence theorem)."""
        a, b, c = self._corners()
        return float(np.einsum("ij,ij->", a, np.cross(b, c)) / 6)

    @property
    def area(self) -> float:
        """nm2."""
        a, b, c = self._corners()
        return float(np.linalg.norm(np.cross(b - a, c - a), axis=1).sum() / 2)

    def _corners(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        near = self.vertices - (self.vertices[0] if len(self.vertices) else 0)  # keeps digits far from the origin
        return near[self.faces[:, 0]], near[self.faces[:, 1]], near[self.faces[:, 2]]


def mesh_object(
    source: Multiscale,
    label: int,
    box: Sequence[int],
    *,
    semantic: bool = False,
    simplify: int = 1,
    max_error_nm: float | None = None,
    max_vertices: int = 20_000_000,
    span: int = SPAN,
) -> Mesh:
    """Return the closed surface of one object of the finest level of a label volume.

    Memory: about 12 bytes per voxel of a piece (``span`` cubed), and 150 bytes per vertex before simplification.

    Args:
        label: ID of the object.
        box: (6,) voxels that hold it: smallest z y x, largest z y x, both inside.
        semantic: treat everything above 0 as the object.
        simplify: keep one of this many triangles, by collapsing edges, as far as the error allows; 1: keep all.
        max_error_nm: how far simplification may move the surface, nm; None: the longest edge of a voxel.
        max_vertices: use larger voxels for meshes with more vertices, see `Mesh.stride`.
        span: voxels to read at a time along each axis.

    Raises:
        InputError: the object is not in its box, or is too long.
    """
    grid, thing = source.levels[0].grid, StoredObject.of(source, label, box, semantic)
    stride, corners, faces = thing.surface_within(1, max_vertices, span)
    corners += 2 * (thing.low // stride - 1)
    mesh = world_mesh(grid, corners, faces, stride)
    if simplify == 1:
        return mesh
    import zmesh

    limit = max(grid.voxel_size) * stride if max_error_nm is None else max_error_nm
    origin = mesh.vertices.min(axis=0)  # coordinates stay near zero because zmesh works in float32
    given = zmesh.Mesh((mesh.vertices - origin).astype(np.float32), mesh.faces, None)
    made = zmesh.Mesher((1, 1, 1)).simplify(given, reduction_factor=simplify, max_error=limit)
    vertices = made.vertices.astype(np.float64) + origin
    return Mesh(np.ascontiguousarray(vertices), np.ascontiguousarray(made.faces, np.uint32), stride)


def world_mesh(grid: VoxelGrid, corners: NDArray[np.int64], faces: NDArray[np.uint32], stride: int) -> Mesh:
    """Return the mesh of a surface in world coordinates.

    Args:
        grid: of the labels.
        corners: (n, 3) z y x, half samples of ``stride`` voxels from the sample of index 0.
        faces: (m, 3) rows of ``corners``, clockwise seen from outside.
    """
    vertices = grid.to_world(corners / 2 * stride + (stride - 1) / 2)
    # z y x to x y z is a reflection: reversed triangles face outward again
    return Mesh(np.ascontiguousarray(vertices[:, ::-1]), np.ascontiguousarray(faces[:, ::-1]), stride)


@dataclass(frozen=True)
class StoredObject:
    """One object of a label volume, with the voxels that hold it: smallest and largest z y x, both inside."""

    source: Multiscale
    label: int
    low: NDArray[np.int64]
    high: NDArray[np.int64]
    semantic: bool

    @classmethod
    def of(cls, source: Multiscale, label: int, box: Sequence[int], semantic: bool) -> StoredObject:
        """Return the object in a box (6,); `InputError` if it is too long."""
        size = source.levels[0].grid.voxel_size
        low, high = np.asarray(box[:3], np.int64), np.asarray(box[3:], np.int64)
        if (high - low + 2).max() * 2 > _FARTHEST or ((high - low + 2) * size).max() > _FARTHEST:
            extent = (high - low + 1).tolist()
            raise InputError(f"object {label} of {source.location} is too long to mesh: {extent} voxels")
        return cls(source, label, low, high, semantic)

    def surface_within(self, stride: int, most: int, span: int) -> tuple[int, NDArray[np.int64], NDArray[np.uint32]]:
        """Return the `surface` with at most ``most`` vertices, of voxels of at least ``stride``, and their stride.

        Raises `InputError` if the object is not in its box.
        """
        filled = 0.5
        while True:
            found = self.surface(stride, filled, most, span)
            if found is None:
                stride *= 2
            elif len(found[1]):
                return stride, *found
            elif not filled:
                where = f"object {self.label} of {self.source.location}"
                raise InputError(f"{where} is not where its table says; decode or measure again")
            else:
                filled = 0.0  # thinner than these voxels: then count every voxel that the object touches

    def surface(
        self, stride: int, filled: float, most: int, span: int
    ) -> tuple[NDArray[np.int64], NDArray[np.uint32]] | None:
        """Vertices (n, 3) in half samples of ``stride`` voxels, z y x from the sample before the first, and faces.

        None if there are more than ``most`` vertices. ``filled``: share of a sample that must belong to the object.
        """
        import zmesh

        first = self.low // stride - 1
        z, y, x = (self.high // stride + 1 - first).tolist()  # cell c lies between the samples c and c + 1
        mesher = zmesh.Mesher((1, 1, 1))
        keys, faces, n = [np.zeros(0, np.int64)], [np.zeros((0, 3), np.int64)], 0
        most_cells = span if stride == 1 else max(1, span // 2)  # counts of voxels take more than voxels
        for begin, cells in VoxelGrid((1, 1, 1), (0, 0, 0), (z, y, x)).blocks((most_cells,) * 3):
            mask = self._samples(first + begin, np.add(cells.shape, 1), stride, filled, span)
            if mask.all() or not mask.any():
                continue
            mesher.mesh(mask.view(np.uint8))
            piece = mesher.get(1, reduction_factor=0)
            mesher.clear()
            doubled = np.rint(piece.vertices * 2).astype(np.int64) + 2 * np.asarray(begin)
            keys.append((doubled[:, 0] * _FARTHEST + doubled[:, 1]) * _FARTHEST + doubled[:, 2])
            faces.append(piece.faces.astype(np.int64) + n)
            n += len(doubled)
            if n > most:
                return None
        unique, of = np.unique(np.concatenate(keys), return_inverse=True)
        corners = np.column_stack(np.unravel_index(unique, (_FARTHEST,) * 3))
        return corners, of[np.concatenate(faces)].astype(np.uint32)

    def _samples(
        self, begin: NDArray[np.int64], shape: NDArray[np.int64], stride: int, filled: float, span: int
    ) -> NDArray[np.bool_]:
        """Whether the samples from ``begin`` (``stride`` cubed voxels each) belong to it; none outside its box. Reads
        about ``span`` cubed voxels at a time, since a single sample may be larger."""
        counts = np.zeros(tuple(shape), np.int64 if stride > 1 else np.bool_)  # of its voxels
        start, stop = np.maximum(begin * stride, self.low), np.minimum((begin + shape) * stride, self.high + 1)
        if not np.all(start < stop):
            return counts > 0
        d, h, w = (int(n) for n in stop - start)
        for first, part in VoxelGrid((1, 1, 1), (0, 0, 0), (d, h, w)).blocks((span + 1,) * 3):
            low = start + first
            read, _ = self.source.read_level(0, low, part.shape, absent_is_missing=False)
            inside = read > 0 if self.semantic else read == self.label
            if stride > 1:
                for axis, (n, at) in enumerate(zip(part.shape, low.tolist(), strict=True)):
                    cuts = np.arange(-(at % stride), n, stride).clip(0)
                    inside = np.add.reduceat(inside, cuts, axis=axis, dtype=np.int64)
            at = low // stride - begin
            counts[slices_of(at, inside.shape)] += inside
        return counts >= (1 if stride == 1 else max(1, math.ceil(filled * stride**3)))
