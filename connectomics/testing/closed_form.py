"""Spheres in closed form, and a tiny data root of them, for tests of registration.

Raw and label are functions of world position (nm, z y x), evaluated at voxel centers: the raw is soft and symmetric
about the label's face, so the label ends where the gray value is halfway. Any disagreement of the two after reading,
whatever the voxel sizes and offsets, is an error of the reader.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from connectomics.cellmap.annotation import Annotation
from connectomics.cellmap.classes import is_instance_class
from connectomics.geometry import Box, Triple, VoxelGrid, triple
from connectomics.io.write import ensure_group, update_attrs, write_multiscale

#: Gray values inside and outside of a sphere.
INSIDE, OUTSIDE = 220.0, 40.0
_SOFTNESS = 48.0  # width of the edge in the raw of a registration root, nm
_LEVELS = 3


@dataclass(frozen=True)
class Sphere:
    """Center (nm, z y x) and radius (nm)."""

    center: Triple
    radius: float


@dataclass(frozen=True)
class RegistrationRoot:
    """What `write_registration_root` wrote: the finest grids of raw and label, and the spheres."""

    raw: VoxelGrid
    label: VoxelGrid
    spheres: tuple[Sphere, ...]


def sphere_distance(grid: VoxelGrid, center: ArrayLike, radius: float) -> NDArray[np.float64]:
    """Return the signed distance (nm, negative inside) of every voxel center of ``grid`` to a sphere, (z, y, x)."""
    z, y, x = (axis - c for axis, c in zip(grid.axes(), triple(center, "center"), strict=True))
    square = z[:, None, None] ** 2 + y[None, :, None] ** 2 + x[None, None, :] ** 2
    return np.asarray(np.sqrt(square) - radius)


def sphere_label(grid: VoxelGrid, center: ArrayLike, radius: float) -> NDArray[np.uint8]:
    """Return 1 where a voxel's center is inside the sphere, else 0; uint8 (z, y, x)."""
    return (sphere_distance(grid, center, radius) < 0).astype(np.uint8)


def sphere_raw(grid: VoxelGrid, center: ArrayLike, radius: float, softness: float) -> NDArray[np.float32]:
    """Return a bright sphere on dark ground, float32 (z, y, x) from `OUTSIDE` to `INSIDE`, halfway at its surface.

    ``softness`` (nm) is the width of the edge: a smoothstep from half of it outside to half of it inside.
    """
    return _gray(sphere_distance(grid, center, radius), softness)


def write_registration_root(
    out: str | Path,
    raw_voxel: ArrayLike,
    raw_translation: ArrayLike,
    label_voxel: ArrayLike,
    label_translation: ArrayLike,
    *,
    label_shape: Sequence[int] = (64, 64, 64),
    class_name: str = "cyto",
) -> RegistrationRoot:
    """Write a data root with one data set (``registration``) and one crop (``crop1``) of one class, made of spheres.

    Args:
        out: folder of the root.
        raw_voxel, raw_translation: finest raw level, nm, z y x (center of the first voxel); it reaches 120 nm beyond
            the crop.
        label_voxel, label_translation, label_shape: the crop's finest grid.
        class_name: semantic (0/1) or instance (ids), as the challenge says.
    """
    label = VoxelGrid(triple(label_voxel), triple(label_translation), _index(label_shape))
    size, first = np.asarray(triple(raw_voxel)), np.asarray(triple(raw_translation))
    raw_shape = np.ceil((np.asarray(label.box.end) + 120.0 - (first - size / 2)) / size)
    raw = VoxelGrid(triple(size), triple(first), _index(raw_shape))
    spheres = default_spheres(label.box)
    recon = Path(out) / "registration" / "registration.zarr" / "recon-1"
    nearest = np.minimum.reduce([sphere_distance(raw, s.center, s.radius) for s in spheres])
    gray = np.rint(_gray(nearest, _SOFTNESS)).astype(np.uint8)
    write_multiscale(recon / "em" / "fibsem-uint8", gray, raw, levels=_LEVELS, kind="raw", overwrite=True)
    crop = recon / "labels" / "groundtruth" / "crop1"
    ensure_group(crop)
    values: NDArray[Any] = np.zeros(label.shape, np.uint16)
    for number, sphere in enumerate(spheres, start=1):
        values[sphere_distance(label, sphere.center, sphere.radius) < 0] = number
    if is_instance_class(class_name):
        annotation = Annotation(class_name, "instance", 0, None, {"absent": int((values == 0).sum())})
    else:
        values = (values > 0).astype(np.uint8)
        annotation = Annotation(class_name, "semantic", 0, 255, {"absent": int((values == 0).sum()), "unknown": 0})
    attrs = annotation.to_attrs(with_counts=False)
    write_multiscale(crop / class_name, values, label, levels=_LEVELS, kind="label", attrs=attrs, overwrite=True)
    update_attrs(crop / class_name / "s0", annotation.to_attrs())
    return RegistrationRoot(raw, label, spheres)


def default_spheres(box: Box) -> tuple[Sphere, ...]:
    """Return three spheres of different sizes inside ``box`` that no flip or rotation maps onto each other."""
    begin, extent = np.asarray(box.begin), np.asarray(box.extent)
    edge = float(extent.min())
    places = (((0.34, 0.38, 0.36), 0.2), ((0.68, 0.62, 0.30), 0.12), ((0.42, 0.70, 0.72), 0.15))
    return tuple(Sphere(triple(begin + extent * np.asarray(at)), share * edge) for at, share in places)


def _gray(distance: NDArray[np.float64], softness: float) -> NDArray[np.float32]:
    t = np.clip(0.5 - distance / softness, 0.0, 1.0)
    return (OUTSIDE + (INSIDE - OUTSIDE) * t * t * (3.0 - 2.0 * t)).astype(np.float32)


def _index(shape: Sequence[int] | NDArray[Any]) -> tuple[int, int, int]:
    return int(shape[0]), int(shape[1]), int(shape[2])
