"""Crops decoded once, at the run's voxel size, into local files that all processes map: a patch costs a memory copy."""

from connectomics.data.cache.entry import cache_key, open_entry
from connectomics.data.cache.folder import CropCache, EntryInfo
from connectomics.data.cache.locks import cache_folder, default_cache_dir, memory_folder
from connectomics.data.cache.prepare import forecast, prepare

__all__ = [
    "CropCache",
    "EntryInfo",
    "cache_folder",
    "cache_key",
    "default_cache_dir",
    "forecast",
    "memory_folder",
    "open_entry",
    "prepare",
]
