"""A phantom's world: what is where, on any grid."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from connectomics.cellmap.classes import CLASSES, get_class
from connectomics.errors import InputError
from connectomics.geometry import Box, VoxelGrid, slices_of
from connectomics.geometry.grid import Index
from connectomics.phantom.kinds import KINDS
from connectomics.phantom.place import Objects, place
from connectomics.phantom.render import render_block

_BLOCK = (32, 32, 32)


@dataclass(frozen=True)
class Tone:
    """How a data set's detector sees: contrast about gray 140, shift and noise (deviation) in gray values."""

    gain: float = 1.0
    shift: float = 0.0
    noise: float = 10.0


@dataclass(frozen=True)
class Part:
    """A rendered grid.

    Attributes:
        atoms: uint8 (z, y, x), the challenge's id of the atomic class of every voxel.
        owner: int32 (z, y, x), index of the primitive that the voxel is in, -1 where it is in none.
        raw: uint8 (z, y, x) gray values, or an empty array where they were not asked for.
    """

    atoms: NDArray[np.uint8]
    owner: NDArray[np.int32]
    raw: NDArray[np.uint8]


@dataclass(frozen=True)
class Scene:
    """A cell in a box of the world, as functions of world position (nm, z y x), evaluated at voxel centers.

    ``lattice`` is the grid whose voxels the detector's noise belongs to: the data set's finest raw level.
    """

    seed: int
    box: Box
    objects: Objects
    tone: Tone
    lattice: VoxelGrid

    @classmethod
    def build(cls, seed: int, box: Box, *, tone: Tone | None = None, lattice: VoxelGrid | None = None) -> Scene:
        """Place a cell in ``box``; without a ``lattice`` the noise has one of 4 nm that starts at the box's face.

        Raises `InputError` for a box too small to hold anything (below 200 nm on some axis).
        """
        if min(box.extent) < 200:
            raise InputError(f"a phantom needs at least 200 nm on every axis, found {box}")
        grid = lattice if lattice is not None else VoxelGrid.covering(box, (4.0, 4.0, 4.0))
        return cls(seed, box, place(seed, box), tone or Tone(), grid)

    def render(self, grid: VoxelGrid, *, raw: bool = True) -> Part:
        """Everything about ``grid``'s voxels; memory grows with the grid, so cut large ones into blocks."""
        atoms, owner = np.empty(grid.shape, np.uint8), np.empty(grid.shape, np.int32)
        gray = np.empty(grid.shape if raw else (0, 0, 0), np.uint8)
        lattice = np.array([*self.lattice.translation, *self.lattice.voxel_size])
        tone = np.array([self.tone.gain, self.tone.shift, self.tone.noise])
        axes = grid.axes()

        def render(block: tuple[Index, VoxelGrid]) -> None:
            where = slices_of(block[0], block[1].shape)
            z, y, x = (axis[some] for axis, some in zip(axes, where, strict=True))
            out = render_block((z, y, x), self.objects, lattice, tone, (self.seed + 1) * 1_000_003, raw)
            atoms[where], owner[where] = out[:2]
            if raw:
                gray[where] = out[2]

        with ThreadPoolExecutor(2) as pool:  # the kernels release the lock
            list(pool.map(render, grid.blocks(_BLOCK)))
        return Part(atoms, owner, gray)

    def atoms(self, grid: VoxelGrid) -> NDArray[np.uint8]:
        """The challenge's id of the atomic class at every voxel center, uint8 (z, y, x); every voxel has one."""
        return self.render(grid, raw=False).atoms

    def instances_of(self, part: Part, class_name: str) -> NDArray[np.uint32]:
        """Ids of the objects of an instance class, uint32 (z, y, x), 0 where there is none; the same in all grids.

        Raises `InputError` for a class without instances.
        """
        if not get_class(class_name).instance:
            raise InputError(f"class {class_name!r} has no instances; ask for its voxels instead")
        inside = class_mask(part.atoms, class_name)
        if class_name == "nuc":
            return inside.astype(np.uint32)
        _, kind, number = self.objects.table.T
        ours = np.array([k.instances == class_name for k in KINDS])[kind]
        numbers = np.append(np.where(ours, number, 0), 0).astype(np.uint32)  # the last one is for owner -1
        if class_name == "cell":  # processes are other cells; all the rest is the first
            numbers += 1
        return np.where(inside, numbers[part.owner], np.uint32(0))


def class_mask(atoms: NDArray[np.uint8], class_name: str) -> NDArray[np.bool_]:
    """Where a class is, group classes by the challenge's table: bool, of the shape of ``atoms`` (class ids)."""
    found = get_class(class_name)
    members = np.zeros(256, bool)
    members[[CLASSES[a].id for a in found.atoms] or [found.id]] = True
    return members[atoms]
