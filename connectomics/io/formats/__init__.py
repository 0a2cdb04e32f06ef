"""Volumes in other formats, read block by block. `connectomics.io.formats.source.FORMATS` says how to add one."""

from connectomics.io.formats.source import FORMATS, VolumeSource, open_volume

__all__ = ["FORMATS", "VolumeSource", "open_volume"]
