"""The data that a run has seen, kept in its checkpoints: if they change, the run cannot resume."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from connectomics.config.values import plain, read
from connectomics.data.splits import entry_of
from connectomics.data.volumes import CropVolume
from connectomics.geometry import VoxelGrid
from connectomics.io.fingerprint import content_identity, fingerprint, same_content
from connectomics.io.store import is_s3


@dataclass(frozen=True)
class SeenData:
    """What a run has seen of one crop.

    Attributes:
        crop: ``dataset/crop``.
        grid: the grid that raw was read on, as `VoxelGrid.to_dict` gives it.
        raw: fingerprint of the raw behind the grid (metadata, and size and time, or ETag, of each chunk), without the
            location; for raw without labels, which may be a whole volume, the identity of some chunks.
        labels: hash of the label arrays' fingerprints; "" without labels.
        content: of raw and labels, whatever their place and time: checksums of what is decoded into the cache, or,
            without a cache, of the stored chunks. None for raw without labels, and on S3 (ETags).
    """

    crop: str
    grid: dict[str, list[float] | list[int]]
    raw: str
    labels: str
    content: tuple[str, str] | None

    @classmethod
    def of(cls, volume: CropVolume) -> SeenData:
        """Return what a run sees of a crop, after it was decoded."""
        crop = volume.crop
        if not crop.labels:
            return cls(crop.key, volume.grid.to_dict(), content_identity(crop.raw_source, volume.grid), "", None)
        raw, grid = volume.source_prints[0][1], volume.cached_raw_grid
        return cls(crop.key, grid.to_dict(), raw, _labels(volume), volume.checksums or _content(volume, grid))


def seen_data(volumes: Sequence[CropVolume]) -> dict[str, dict[str, Any]]:
    """Return `SeenData` of each volume, as plain values, by split entry and voxel size."""
    return {_name(volume): plain(SeenData.of(volume)) for volume in volumes}


def changes(before: Mapping[str, Mapping[str, Any]], volumes: Sequence[CropVolume], where: str) -> list[str]:
    """Return what of `seen_data` has changed, such as ``raw of dataset/crop1``; crops that are not used now are left
    out.

    What has another time or place is the same if its content is.
    """
    now = {_name(volume): volume for volume in reversed(volumes)}
    crops = {volume.crop.key: volume for volume in reversed(volumes)}
    found: dict[str, None] = {}
    for name, stored in before.items():
        was = read(SeenData, stored, where)
        if was.crop not in crops:
            continue
        volume = now.get(name, crops[was.crop])
        there = SeenData.of(volume)
        if there.grid != was.grid:  # other settings, or another crop: look where the run has looked
            look = partial(fingerprint, with_location=False) if volume.crop.labels else content_identity
            grid = VoxelGrid.from_dict(was.grid)
            there = replace(there, grid=was.grid, raw=look(volume.crop.raw_source, grid))
            if volume.crop.labels and volume.checksums is None:
                there = replace(there, content=_content(volume, grid))
        raw, labels = zip(was.content or "??", there.content or "!!", strict=True)
        if not (same_content(was.raw, there.raw) or raw[0] == raw[1]):
            found[f"raw of {was.crop}"] = None
        if was.labels and was.labels != there.labels and labels[0] != labels[1]:
            found[f"labels of {was.crop}"] = None
    return list(found)


def _name(volume: CropVolume) -> str:
    return f"{entry_of(volume.crop)} at {'x'.join(f'{size:g}' for size in volume.voxel_size)} nm"


def _content(volume: CropVolume, grid: VoxelGrid) -> tuple[str, str] | None:
    """Checksums of the stored raw of a grid and of the labels; None on S3."""
    crop, names = volume.crop, list(volume.source_prints[1])
    if is_s3(crop.raw):
        return None
    labels = [(content_identity(crop.labels[name].source, whole=True), crop.labels[name].annotation) for name in names]
    return _hash(content_identity(crop.raw_source, grid, whole=True)), _hash((names, labels))


def _labels(volume: CropVolume) -> str:
    """Hash of the label arrays' fingerprints without their locations, and of what their values mean; "" for none."""
    labels = volume.crop.labels
    marks = [(name, mark[1], labels[name].annotation) for name, mark in volume.source_prints[1].items()]
    return _hash(marks) if marks else ""


def _hash(values: object) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()[:20]
