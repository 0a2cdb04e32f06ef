"""Where things are: boxes and voxel grids in nanometres, z y x, float64."""

from connectomics.geometry.grid import Box, Triple, VoxelGrid, triple

__all__ = ["Box", "Triple", "VoxelGrid", "triple"]
