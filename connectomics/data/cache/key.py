"""What decides the content of a cache entry, and the name that follows from it."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from connectomics.cellmap.catalog import Crop
from connectomics.cellmap.labels import LabelVolume, arrays_needed
from connectomics.geometry import Index, VoxelGrid
from connectomics.io.fingerprint import fingerprint
from connectomics.io.s3 import in_parallel
from connectomics.io.store import is_s3

VERSION = 3  # raise it when decoding or the format changes: old entries are then simply not found
_NAME = re.compile(r".+-[0-9a-f]{20}")


class Decodable(Protocol):
    """What the cache needs of a crop: what decides its content, and the plain way to decode it (a `CropVolume`)."""

    @property
    def crop(self) -> Crop: ...
    @property
    def classes(self) -> tuple[str, ...]: ...
    @property
    def instances(self) -> tuple[str, ...]: ...
    @property
    def context(self) -> Index: ...
    @property
    def intensity_range(self) -> tuple[float, float] | None: ...
    @property
    def cache(self) -> Path | None: ...
    @property
    def grid(self) -> VoxelGrid: ...
    @property
    def cached_raw_grid(self) -> VoxelGrid: ...
    def adopt(self, entry: Path | None) -> None: ...
    def decode_raw(self, grid: VoxelGrid) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]: ...
    def decode_labels(self, grid: VoxelGrid) -> LabelVolume: ...


def cache_key(volume: Decodable) -> str:
    """The name of a crop's entry: data set, crop, and a hash of everything that decides the decoded content.

    That is: locations, metadata and chunks (times and sizes, or ETags) of the labels that are read and of the raw
    behind the region, classes, those whose objects are told apart, lattice, context, intensity range, and the version
    of the code that decodes.
    """
    crop = volume.crop
    read = arrays_needed(crop, volume.classes) if volume.classes else {}
    labels = [(name, read[name].source) for name in sorted(read)]
    if is_s3(crop.raw):
        prints = in_parallel(lambda item: fingerprint(item[1]), labels)
    else:
        prints = [fingerprint(source) for _, source in labels]
    # the annotation (what stands for unknown) is read from the attributes of the finest level too
    notes = [repr(crop.labels[name].annotation) for name, _ in labels]
    content: dict[str, Any] = {
        "version": VERSION,
        "crop": crop.key,
        "classes": volume.classes,
        "grid": volume.grid.to_dict(),
        "raw grid": volume.cached_raw_grid.to_dict(),
        "intensity": volume.intensity_range,
        "raw": fingerprint(crop.raw_source, volume.cached_raw_grid),
        "labels": [(name, mark, note) for (name, _), mark, note in zip(labels, prints, notes, strict=True)],
    }
    if volume.instances:  # only then: entries of runs without them keep their names
        content["instances"] = volume.instances
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return f"{crop.dataset}-{crop.name}-{digest[:20]}"


def is_name(text: str) -> bool:
    """Whether a folder's name could be one that `cache_key` gives."""
    return _NAME.fullmatch(text) is not None and not text.startswith(".")
