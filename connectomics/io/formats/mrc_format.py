"""MRC and CCP4 files (axes z y x, voxel size in ångström), mapped."""

from __future__ import annotations

from pathlib import Path

from connectomics.errors import CorruptDataError
from connectomics.io.formats.source import VolumeSource, array_source, optional


def open_source(path: Path, inner: str | None) -> VolumeSource:
    """The file's one volume; a voxel size of 0 means that the file does not say."""
    mrcfile = optional("mrcfile", "mrcfile")
    try:
        file = mrcfile.mmap(path, mode="r", permissive=False)
    except (ValueError, OSError) as error:
        raise CorruptDataError(f"{path} cannot be read as MRC: {error}; a compressed file must be unpacked") from error
    size = [float(file.voxel_size[axis]) / 10 for axis in "zyx"]
    return array_source(str(path), file.data, voxel_size=tuple(size) if min(size) > 0 else None, close=file.close)
