"""Spheres in closed form, and a tiny data root of them, for tests of registration.

Raw and label are functions of world position (nm, z y x), evaluated at voxel centers: the raw is soft and symmetric
about the label's face, so where gray is half way is where the label ends. Any disagreement of the two after reading,
whatever the voxel sizes and offsets, is an error of the reader.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from connectomics.cellmap.classes import get_class
from connectomics.geometry import Box, Triple, VoxelGrid, triple
from connectomics.io.write import ensure_group, update_attrs, write_multiscale

#: Gray values inside and outside of a sphere.
INSIDE, OUTSIDE = 220.0, 40.0


@dataclass(frozen=True)
class Sphere:
    """Center (nm, z y x) and radius (nm)."""

    center: Triple
    radius: float


@dataclass(frozen=True)
class RegistrationRoot:
    """What `write_registration_root` wrote: the data root, its data set, crop and class, the grids, the spheres."""

    root: Path
    dataset: str
    crop: str
    class_name: str
    raw: VoxelGrid
    label: VoxelGrid
    spheres: tuple[Sphere, ...]
    softness: float


def sphere_distance(grid: VoxelGrid, center: ArrayLike, radius: float) -> NDArray[np.float64]:
    """Signed distance (nm, negative inside) of every voxel center of ``grid`` to a sphere, (z, y, x)."""
    z, y, x = (axis - c for axis, c in zip(grid.axes(), triple(center, "center"), strict=True))
    square = z[:, None, None] ** 2 + y[None, :, None] ** 2 + x[None, None, :] ** 2
    return np.asarray(np.sqrt(square) - radius)


def sphere_label(grid: VoxelGrid, center: ArrayLike, radius: float) -> NDArray[np.uint8]:
    """1 where a voxel's center is inside the sphere, else 0; uint8 (z, y, x)."""
    return (sphere_distance(grid, center, radius) < 0).astype(np.uint8)


def sphere_raw(grid: VoxelGrid, center: ArrayLike, radius: float, softness: float) -> NDArray[np.float32]:
    """A bright sphere on dark ground, float32 (z, y, x) from `OUTSIDE` to `INSIDE`, half way at the sphere's surface.

    ``softness`` (nm) is the width of the edge: a smoothstep from half of it outside to half of it inside.
    """
    return _gray(sphere_distance(grid, center, radius), softness)


def spheres_raw(grid: VoxelGrid, spheres: Sequence[Sphere], softness: float) -> NDArray[np.float32]:
    """As `sphere_raw` for several spheres, which must not touch."""
    return _gray(np.minimum.reduce([sphere_distance(grid, s.center, s.radius) for s in spheres]), softness)


def spheres_label(grid: VoxelGrid, spheres: Sequence[Sphere]) -> NDArray[np.uint16]:
    """The number of the sphere (from 1) that a voxel's center is in, else 0; uint16 (z, y, x)."""
    out = np.zeros(grid.shape, np.uint16)
    for number, sphere in enumerate(spheres, start=1):
        out[sphere_distance(grid, sphere.center, sphere.radius) < 0] = number
    return out


def write_registration_root(
    out: str | Path,
    raw_voxel: ArrayLike,
    raw_translation: ArrayLike,
    label_voxel: ArrayLike,
    label_translation: ArrayLike,
    *,
    raw_shape: Sequence[int] | None = None,
    label_shape: Sequence[int] = (64, 64, 64),
    spheres: Sequence[Sphere] | None = None,
    softness: float = 48.0,
    class_name: str = "cyto",
    dataset: str = "registration",
    levels: int = 3,
) -> RegistrationRoot:
    """A CellMap data root with one data set and one crop (``crop1``) of one class, made of spheres.

    Args:
        out: folder of the root. raw_voxel, raw_translation: finest raw level, nm, z y x (center of the first voxel).
        label_voxel, label_translation, label_shape: the crop's finest grid.
        raw_shape: voxels; by default enough to reach 120 nm beyond the crop.
        spheres: by default three of different sizes, not symmetric about anything, wholly inside the crop.
        softness: width of the raw's edge, nm. class_name: semantic (0/1) or instance (ids), as the challenge says.
        levels: of both pyramids.
    """
    label = VoxelGrid(triple(label_voxel), triple(label_translation), _index(label_shape))
    if raw_shape is None:
        begin = np.asarray(triple(raw_translation)) - np.asarray(triple(raw_voxel)) / 2
        raw_shape = [
            math.ceil((e + 120.0 - b) / v) for b, e, v in zip(begin, label.box.end, triple(raw_voxel), strict=True)
        ]
    raw = VoxelGrid(triple(raw_voxel), triple(raw_translation), _index(raw_shape))
    chosen = tuple(spheres) if spheres is not None else default_spheres(label.box)
    recon = Path(out) / dataset / f"{dataset}.zarr" / "recon-1"
    gray = np.rint(spheres_raw(raw, chosen, softness)).astype(np.uint8)
    write_multiscale(recon / "em" / "fibsem-uint8", gray, raw, levels=levels, kind="raw", overwrite=True)
    crop = recon / "labels" / "groundtruth" / "crop1"
    ensure_group(crop)
    instance = get_class(class_name).instance
    ids = spheres_label(label, chosen)
    values: NDArray[Any] = ids if instance else (ids > 0).astype(np.uint8)
    annotation = {
        "annotation_type": {
            "encoding": {"absent": 0} if instance else {"absent": 0, "present": 1, "unknown": 255},
            "type": "instance_segmentation" if instance else "semantic_segmentation",
        },
        "class_name": class_name,
    }
    where = crop / class_name
    attrs = {"cellmap": {"annotation": annotation}}
    write_multiscale(where, values, label, levels=levels, kind="label", attrs=attrs, overwrite=True)
    counts = {"absent": int((values == 0).sum())} | ({} if instance else {"unknown": 0})
    update_attrs(where / "s0", {"cellmap": {"annotation": {**annotation, "complement_counts": counts}}})
    return RegistrationRoot(Path(out), dataset, "crop1", class_name, raw, label, chosen, softness)


def default_spheres(box: Box) -> tuple[Sphere, ...]:
    """Three spheres of different sizes inside ``box`` that no flip or turn maps onto each other."""
    begin, extent = np.asarray(box.begin), np.asarray(box.extent)
    edge = float(extent.min())
    places = (((0.34, 0.38, 0.36), 0.2), ((0.68, 0.62, 0.30), 0.12), ((0.42, 0.70, 0.72), 0.15))
    return tuple(Sphere(triple(begin + extent * np.asarray(at)), share * edge) for at, share in places)


def _gray(distance: NDArray[np.float64], softness: float) -> NDArray[np.float32]:
    t = np.clip(0.5 - distance / softness, 0.0, 1.0)
    return (OUTSIDE + (INSIDE - OUTSIDE) * t * t * (3.0 - 2.0 * t)).astype(np.float32)


def _index(shape: Sequence[int]) -> tuple[int, int, int]:
    return int(shape[0]), int(shape[1]), int(shape[2])
