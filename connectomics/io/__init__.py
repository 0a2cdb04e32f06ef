"""Read and write volumes on disk and S3: OME-Zarr multiscales, Zarr arrays, other formats, resampling between grids."""
