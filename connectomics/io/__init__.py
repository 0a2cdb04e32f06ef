"""Read and write volumes on disk and S3: OME-Zarr multiscales, Zarr arrays, other formats, resampling between grids."""

from connectomics.io.levels import level_grids
from connectomics.io.multiscale import Level, Multiscale, PlainArray
from connectomics.io.store import Location, StoreError, StoreOptions, exists, join, list_groups, read_attrs, read_json
from connectomics.io.write import (
    ArrayWriter,
    build_levels,
    create_array,
    create_multiscale,
    ensure_group,
    update_attrs,
    write_multiscale,
)

__all__ = [
    "ArrayWriter",
    "Level",
    "Location",
    "Multiscale",
    "PlainArray",
    "StoreError",
    "StoreOptions",
    "build_levels",
    "create_array",
    "create_multiscale",
    "ensure_group",
    "exists",
    "join",
    "level_grids",
    "list_groups",
    "read_attrs",
    "read_json",
    "update_attrs",
    "write_multiscale",
]
