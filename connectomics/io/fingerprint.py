"""Short hashes of what is stored, without decoding anything.

`fingerprint` changes when the metadata or any chunk behind a read is written, fetched or removed: a local chunk counts
by its size and time of change, an S3 object by its size and ETag. `content_identity` looks at few chunks and says
whether two volumes hold the same, wherever they lie and whenever they were written.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any

from connectomics.geometry import VoxelGrid
from connectomics.io import s3
from connectomics.io.array import StoredArray
from connectomics.io.multiscale import Multiscale
from connectomics.io.store import StoreError, is_s3, split_s3

_SAMPLES_PER_AXIS = 3  # chunks that stand for a volume in `content_identity`: 27
_SAMPLE_BYTES = 1 << 16  # of each: a whole chunk of a Zarr v2 array, the beginning of a shard
_CONTENT, _ABSENT = "content", "...."


def content_identity(source: Multiscale, grid: VoxelGrid | None = None) -> str:
    """What stands for the content of a volume: ``content-{metadata}-{samples}``, hexadecimal.

    ``metadata`` is a hash of the levels' grids, types and chunks; ``samples`` are four digits for each of 27 chunks,
    spread evenly over what is read: a hash of the stored bytes (of an S3 object: size and ETag), dots for a chunk that
    is not stored. It contains neither the location nor any time, so a copy is the same volume; compare two of them with
    `same_content`.

    Args:
        grid: what is read (`Multiscale.read_raw`); None: all of the finest level.

    Raises:
        StoreError: the store cannot be reached.
    """
    array, begin, end = source._chunks_behind(source.levels[0].grid if grid is None else grid)
    levels = [
        (level.grid.to_dict(), str(level.dtype), list(level.chunks), stored.metadata.get("compressor"))
        for level, stored in zip(source.levels, source._arrays, strict=True)
    ]
    spans = list(zip(begin, end, strict=True))
    axes = [sorted({low + (high - 1 - low) * n // 2 for n in range(_SAMPLES_PER_AXIS)}) for low, high in spans]
    is_empty = any(high <= low for low, high in spans)
    places = [] if is_empty else [array.chunk_location(index) for index in product(*axes)]
    remote = is_s3(array.location)
    samples = s3.in_parallel(lambda at: _remote_sample(array, at), places) if remote else map(_local_sample, places)
    marks = "".join(_ABSENT if s is None else hashlib.sha256(repr(s).encode()).hexdigest()[:4] for s in samples)
    return f"{_CONTENT}-{_digest([levels, spans])}-{marks}"


def same_content(one: str, other: str) -> bool:
    """Whether two of `content_identity` (or any two identities) stand for the same volume.

    The metadata must be equal, and more than half of the samples: a chunk that was corrupt or missing and has been
    repaired does not make another volume.
    """
    if one == other:
        return True
    (kind, *meta), (other_kind, *other_meta) = one.split("-"), other.split("-")
    if {kind, other_kind} != {_CONTENT} or meta[:1] != other_meta[:1] or meta[2:] != other_meta[2:]:
        return False
    mine, theirs = (re.findall("....", marks[1]) for marks in (meta, other_meta))
    equal = sum(a == b or _ABSENT in (a, b) for a, b in zip(mine, theirs, strict=False))
    return len(mine) == len(theirs) and 2 * equal > len(mine)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _local_sample(path: str) -> Any:
    """Size and first bytes of a chunk, None if it is not stored."""
    try:
        with open(path, "rb") as file:
            return os.fstat(file.fileno()).st_size, file.read(_SAMPLE_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}; check the file and its permissions") from error


def _remote_sample(array: StoredArray, location: str) -> Any:
    """Size and ETag of a chunk, None if it is not stored."""
    bucket, key = split_s3(location)
    beside = s3.files(bucket, key.rpartition("/")[0], array.options)
    return next((mark[1:] for mark in beside if mark[0] == key), None)


def fingerprint(source: Multiscale, grid: VoxelGrid | None = None, *, with_location: bool = True) -> str:
    """A hash (hexadecimal) of the volume's location, its metadata, and of the chunks that a read would look at.

    Args:
        grid: what would be read (`Multiscale.read_raw`): the chunks of the level that serves it, and those that touch
            it; None: all chunks of the finest level.
        with_location: False: a volume that was moved (with its times) has the same fingerprint.

    Raises:
        StoreError: the store cannot be reached.
    """
    level = 0 if grid is None else source.level_for(grid.voxel_size)
    array = source._arrays[level]
    low, high = [0, 0, 0], list(array.shape)
    if grid is not None:
        own = source.levels[level].grid
        spans = own.slices(grid.box.grow(own.voxel_size))  # linear interpolation looks at the next centre
        low, high = [s.start for s in spans], [s.stop for s in spans]
    digest = hashlib.sha256()
    levels = [(kept.path, stored.metadata) for kept, stored in zip(source.levels, source._arrays, strict=True)]
    digest.update(
        json.dumps(
            [source.location if with_location else "", source.attrs, levels], sort_keys=True, default=str
        ).encode()
    )
    if all(h > lo for lo, h in zip(low, high, strict=True)):
        first, last = array.chunk_range(low, high)
        digest.update(repr((level, first, last)).encode())
        marks = _remote_marks(array, first, last) if is_s3(array.location) else _local_marks(array, first, last)
        for mark in marks:
            digest.update(repr(mark).encode())
    return digest.hexdigest()


def _local_marks(array: StoredArray, first: Sequence[int], last: Sequence[int]) -> Iterable[Any]:
    """(size, time) of each chunk in order, None where it is not stored."""
    for index in product(*(range(a, b) for a, b in zip(first, last, strict=True))):
        try:
            stat = os.stat(array.chunk_location(index))
        except (FileNotFoundError, NotADirectoryError):
            yield None
            continue
        except OSError as error:
            raise StoreError(
                f"cannot look at {array.chunk_location(index)}: {error.strerror}; check its permissions"
            ) from error
        yield stat.st_size, stat.st_mtime_ns


def _remote_marks(array: StoredArray, first: Sequence[int], last: Sequence[int]) -> Iterable[Any]:
    """(key, size, ETag) of each chunk that is stored, in order. A small array is listed at once, of a large one only
    the rows that are needed."""
    bucket, _ = split_s3(array.location)
    wanted = {
        split_s3(array.chunk_location(index))[1]
        for index in product(*(range(a, b) for a, b in zip(first, last, strict=True)))
    }
    chunks = 1
    for n, c in zip(array.shape, array.chunks, strict=True):
        chunks *= -(-n // c)
    if chunks <= 4 * len(wanted):
        prefixes = [split_s3(array.location)[1]]
    else:
        prefixes = sorted({key.rpartition("/")[0] for key in wanted})
    listed = s3.in_parallel(lambda prefix: s3.objects(bucket, prefix, array.options), prefixes)
    return sorted(mark for marks in listed for mark in marks if mark[0] in wanted)


__all__ = ["content_identity", "fingerprint", "same_content"]
