"""Volumes on disk and on S3: OME-Zarr multiscales, plain Zarr arrays, resampling between voxel grids."""
