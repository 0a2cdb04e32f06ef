"""Where things are: boxes and voxel grids in nanometers, z y x, float64."""

from connectomics.geometry.grid import (
    Box,
    Index,
    Triple,
    VoxelGrid,
    index,
    other_axes,
    overlapping,
    shape_between,
    slices_of,
    triple,
)

__all__ = [
    "Box",
    "Index",
    "Triple",
    "VoxelGrid",
    "index",
    "other_axes",
    "overlapping",
    "shape_between",
    "slices_of",
    "triple",
]
