"""Crops decoded once, at the run's voxel size, into local files that all processes map: a patch costs a memory copy."""

from connectomics.data.cache.entry import CachedCrop, open_entry
from connectomics.data.cache.folder import CropCache, EntryInfo
from connectomics.data.cache.key import Decodable, cache_key
from connectomics.data.cache.memory import cache_folder, default_cache_dir, memory_folder
from connectomics.data.cache.prepare import Progress, forecast, prepare

__all__ = [
    "CachedCrop",
    "CropCache",
    "Decodable",
    "EntryInfo",
    "Progress",
    "cache_folder",
    "cache_key",
    "default_cache_dir",
    "forecast",
    "memory_folder",
    "open_entry",
    "prepare",
]
