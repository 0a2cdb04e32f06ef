"""Short hashes of stored volumes, without decoding anything.

`fingerprint` changes when the metadata or any chunk behind a read is written, fetched or removed: a local chunk counts
by its size and modification time, an S3 object by its size and ETag. `content_identity` looks at a few chunks and tells
whether two volumes hold the same data, wherever and whenever they were written.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from functools import partial
from itertools import product
from math import prod
from typing import Any

from connectomics.geometry import VoxelGrid
from connectomics.io import s3
from connectomics.io.array import StoredArray
from connectomics.io.multiscale import Multiscale
from connectomics.io.store import Location, if_there, is_s3, split_s3

_SAMPLES_PER_AXIS = 3  # chunks per axis in `content_identity`: 27 in all
_SAMPLE_BYTES = 1 << 16  # of each: a whole chunk of a Zarr v2 array, the beginning of a shard
_CONTENT, _ABSENT = "content", "...."


def content_identity(source: Multiscale, grid: VoxelGrid | None = None, *, whole: bool = False) -> str:
    """Return an identity of a volume's content: ``content-{metadata}-{samples}``, hexadecimal.

    ``metadata`` is a hash of the levels' grids, types and chunks. ``samples`` has four digits for each of 27 chunks
    spread evenly over what is read: a hash of the stored bytes (of an S3 object: size and ETag), or dots for an absent
    chunk. Location and time do not enter, so a copy is the same volume; compare two identities with `same_content`.

    Args:
        grid: what is read (`Multiscale.read_raw`); None: all of the finest level.
        whole: all bytes of all chunks, instead of samples.

    Raises:
        StoreError: the store cannot be reached.
    """
    array, begin, end = source.chunks_behind(source.grid if grid is None else grid)
    levels = [
        (level.grid.to_dict(), str(level.dtype), list(level.chunks), stored.metadata.get("compressor"))
        for level, stored in zip(source.levels, source.arrays, strict=True)
    ]
    spans = list(zip(begin, end, strict=True))
    axes = [sorted({low + (high - 1 - low) * n // 2 for n in range(_SAMPLES_PER_AXIS)}) for low, high in spans]
    if whole:
        axes = [list(range(low, high)) for low, high in spans]
    is_empty = any(high <= low for low, high in spans)
    places = [] if is_empty else [array.chunk_location(index) for index in product(*axes)]
    remote = is_s3(array.location)
    local = partial(_local_sample, most=-1 if whole else _SAMPLE_BYTES)
    sample = partial(_remote_sample, array) if remote else partial(if_there, read=local)
    marks = "".join(s3.in_parallel(lambda place: _mark(sample(place)), places))
    metadata = hashlib.sha256(json.dumps([levels, spans], sort_keys=True, default=str).encode()).hexdigest()[:16]
    return f"{_CONTENT}-{metadata}-{marks}"


def same_content(one: str, other: str) -> bool:
    """Return whether two identities stand for the same volume.

    For `content_identity`, the metadata must be equal, and more than half of the samples: repairing a corrupt or
    missing chunk does not make another volume.
    """
    if one == other:
        return True
    (kind, *meta), (other_kind, *other_meta) = one.split("-"), other.split("-")
    if {kind, other_kind} != {_CONTENT} or meta[:1] != other_meta[:1] or meta[2:] != other_meta[2:]:
        return False
    mine, theirs = (re.findall("....", marks[1]) for marks in (meta, other_meta))
    equal = sum(a == b or _ABSENT in (a, b) for a, b in zip(mine, theirs, strict=False))
    return len(mine) == len(theirs) and 2 * equal > len(mine)


def fingerprint(source: Multiscale, grid: VoxelGrid | None = None, *, with_location: bool = True) -> str:
    """Return a hash (hexadecimal) of the volume's location, its metadata, and the chunks behind a read.

    Args:
        grid: what would be read (`Multiscale.read_raw`): the chunks of the level used, and their neighbors; None: all
            chunks of the finest level.
        with_location: False: a volume that was moved (with its times) has the same fingerprint.

    Raises:
        StoreError: the store cannot be reached.
    """
    return fingerprints(source, grid)[0 if with_location else 1]


def fingerprints(source: Multiscale, grid: VoxelGrid | None = None) -> tuple[str, str]:
    """Return `fingerprint` with and without the location, from one look at the chunks."""
    level = 0 if grid is None else source.level_for(grid.voxel_size)
    array = source.arrays[level]
    low, high = [0, 0, 0], list(array.shape)
    if grid is not None:
        own = source.levels[level].grid
        spans = own.slices(grid.box.grow(own.voxel_size))  # linear interpolation uses the next center, too
        low, high = [s.start for s in spans], [s.stop for s in spans]
    levels = [(kept.path, stored.metadata) for kept, stored in zip(source.levels, source.arrays, strict=True)]
    begun = [json.dumps([place, source.attrs, levels], sort_keys=True, default=str) for place in (source.location, "")]
    both = [hashlib.sha256(text.encode()) for text in begun]
    if all(h > lo for lo, h in zip(low, high, strict=True)):
        first, last = array.chunk_range(low, high)
        chunks = map(array.chunk_location, product(*map(range, first, last)))
        remote = is_s3(array.location)
        prefix = split_s3(array.location)[1] if remote else ""
        for digest in both:
            digest.update(repr((level, first, last)).encode())
        local = partial(if_there, read=_local_mark)
        marks: Iterable[Any] = _remote_marks(array, chunks) if remote else map(local, chunks)
        for mark in marks:
            both[0].update(repr(mark).encode())
            both[1].update(repr((mark[0].removeprefix(prefix), *mark[1:]) if remote else mark).encode())
    return both[0].hexdigest(), both[1].hexdigest()


def _mark(sample: Any) -> str:
    return _ABSENT if sample is None else hashlib.sha256(repr(sample).encode()).hexdigest()[:4]


def _local_sample(path: Location, most: int) -> Any:
    """Size and first bytes of a chunk (-1: all)."""
    with open(path, "rb") as file:
        return os.fstat(file.fileno()).st_size, file.read(most)


def _remote_sample(array: StoredArray, location: str) -> Any:
    """Size and ETag of a chunk, None if it is absent."""
    bucket, key = split_s3(location)
    listed = s3.files(bucket, key.rpartition("/")[0], array.options)
    return next((mark[1:] for mark in listed if mark[0] == key), None)


def _local_mark(path: Location) -> Any:
    """Size and time of a chunk."""
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns


def _remote_marks(array: StoredArray, chunks: Iterable[str]) -> Iterable[Any]:
    """(key, size, ETag) of each stored chunk, in order. A small array is listed whole, a large one row by row."""
    bucket, _ = split_s3(array.location)
    wanted = {split_s3(location)[1] for location in chunks}
    if prod(-(-n // c) for n, c in zip(array.shape, array.chunks, strict=True)) <= 4 * len(wanted):
        prefixes = [split_s3(array.location)[1]]
    else:
        prefixes = sorted({key.rpartition("/")[0] for key in wanted})
    listed = s3.in_parallel(lambda prefix: s3.objects(bucket, prefix, array.options), prefixes)
    return sorted(mark for marks in listed for mark in marks if mark[0] in wanted)
