"""Volumes in other formats, read block by block. `register_format` adds one."""

from connectomics.io.formats.source import FORMATS, VolumeSource, open_volume, register_format

__all__ = ["FORMATS", "VolumeSource", "open_volume", "register_format"]
