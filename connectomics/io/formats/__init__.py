"""Volumes in other people's formats, read block by block: TIFF, HDF5, MRC, NRRD, npy, N5, precomputed, Zarr."""

from connectomics.io.formats.source import FORMATS, VolumeSource, open_volume

__all__ = ["FORMATS", "VolumeSource", "open_volume"]
