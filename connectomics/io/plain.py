"""Reading blocks of an array by zarr-python: where tensorstore cannot be used, with the same result.

That is in a process forked after its parent used tensorstore, and for codecs that tensorstore lacks. Objects of S3 are
fetched first (see `connectomics.io.s3`) and decoded from memory; their bytes are kept up to `StoreOptions.cache_bytes`.
"""

from __future__ import annotations

import json
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from connectomics.errors import CorruptDataError, MetadataError
from connectomics.io import s3
from connectomics.io.location import StoreError, StoreOptions, split_s3

_FETCHES = 8  # objects fetched at a time
_ENTRY_BYTES = 200  # what keeping an object costs beside its content


class ChunkedArray(Protocol):
    """What is needed of an array: see `connectomics.io.array.StoredArray`."""

    location: str
    options: StoreOptions
    zarr_format: int
    dtype: np.dtype[Any]
    chunks: tuple[int, ...]
    is_blosc: bool
    metadata: dict[str, Any]

    def chunk_location(self, index: Sequence[int]) -> str: ...
    def chunk_range(self, low: Sequence[int], high: Sequence[int]) -> tuple[list[int], list[int]]: ...
    def window(self, low: Sequence[int], high: Sequence[int]) -> tuple[int | slice, ...]: ...
    def check_still_there(self) -> None: ...


def read(array: ChunkedArray, low: Sequence[int], high: Sequence[int]) -> NDArray[Any]:
    """Voxels ``low`` to ``high`` of a local array, which are inside it; absent chunks give the fill value."""
    chunks = _chunks(array, low, high)
    if array.is_blosc:
        for index in chunks:
            path = array.chunk_location(index)
            try:
                with open(path, "rb") as handle:
                    _check_blosc(path, handle.read(16), os.path.getsize(path))
            except (FileNotFoundError, NotADirectoryError):
                continue
            except CorruptDataError:
                raise
            except OSError as error:
                raise _unreadable(path, error) from error
    return _decode(array, array.location, low, high, chunks)


def fetch(array: ChunkedArray, low: Sequence[int], high: Sequence[int]) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """The same of an array on S3, and which of its chunks, one value each, are stored."""
    from zarr.core.buffer import default_buffer_prototype
    from zarr.storage import MemoryStore

    chunks = _chunks(array, low, high)
    kept = _kept(os.getpid(), array.options.cache_bytes)
    locations = [array.chunk_location(index) for index in chunks]
    contents = s3.in_parallel(lambda location: kept.get(location, array.options), locations, _FETCHES)
    found = {at: content for at, content in zip(locations, contents, strict=True) if content is not None}
    if len(found) < len(chunks):
        array.check_still_there()
    if array.is_blosc:
        for at, content in found.items():
            _check_blosc(at, content[:16], len(content))
    buffer = default_buffer_prototype().buffer
    files = {at.removeprefix(f"{array.location}/"): content for at, content in found.items()}
    files[".zarray" if array.zarr_format == 2 else "zarr.json"] = json.dumps(array.metadata).encode()
    store = MemoryStore({name: buffer.from_bytes(content) for name, content in files.items()}, read_only=True)
    first, last = array.chunk_range(low, high)
    present = np.array([content is not None for content in contents], dtype=bool)
    shape = [b - a for a, b in zip(first, last, strict=True)]
    return _decode(array, store, low, high, chunks), present.reshape(shape)


def _decode(
    array: ChunkedArray, store: Any, low: Sequence[int], high: Sequence[int], chunks: Sequence[tuple[int, ...]]
) -> NDArray[Any]:
    import zarr

    try:
        opened = zarr.open_array(store, mode="r", zarr_format=2 if array.zarr_format == 2 else 3)
    except Exception as error:  # whatever a codec's constructor raises
        array.check_still_there()
        raise MetadataError(f"cannot open {array.location}: {one_line(error)}") from error
    try:
        return np.asarray(opened[array.window(low, high)]).astype(array.dtype, copy=False)
    except Exception as error:  # codecs raise what they like; find out which chunk it is
        for index in chunks:
            try:
                begin = [i * c for i, c in zip(index, array.chunks, strict=True)]
                opened[array.window(begin, [b + c for b, c in zip(begin, array.chunks, strict=True)])]
            except Exception as cause:
                if isinstance(cause, OSError) and cause.errno is not None:  # of the system, not of a codec
                    raise _unreadable(array.chunk_location(index), cause) from error
                raise corrupt(array.chunk_location(index), one_line(cause)) from error
        raise


def _chunks(array: ChunkedArray, low: Sequence[int], high: Sequence[int]) -> list[tuple[int, ...]]:
    """Indices of the chunks that hold these voxels, in C order."""
    first, last = array.chunk_range(low, high)
    shape = [b - a for a, b in zip(first, last, strict=True)]
    return [tuple(f + o for f, o in zip(first, offset, strict=True)) for offset in np.ndindex(*shape)]


class _Kept:
    """Objects of S3 as they are stored, the least recently used going first once they exceed ``limit`` bytes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._bytes = 0
        self._content: OrderedDict[str, bytes | None] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, location: str, options: StoreOptions) -> bytes | None:
        """The object's content, None where it is not there."""
        with self._lock:
            if location in self._content:
                self._content.move_to_end(location)
                return self._content[location]
        content = s3.get(*split_s3(location), options)
        with self._lock:
            if location not in self._content:
                self._content[location] = content
                self._bytes += _ENTRY_BYTES + len(content or b"")
            while self._bytes > self._limit:
                self._bytes -= _ENTRY_BYTES + len(self._content.popitem(last=False)[1] or b"")
        return content


@lru_cache(maxsize=4)
def _kept(pid: int, limit: int) -> _Kept:
    """One for each process: the parent's lock may have been held when it was forked."""
    return _Kept(limit)


def _check_blosc(where: str, header: bytes, stored: int) -> None:
    """Refuse a truncated Blosc chunk: numcodecs trusts the length in the header and would read beyond the bytes."""
    if len(header) < 16 or int.from_bytes(header[12:16], "little") != stored:
        raise corrupt(where, f"{stored} bytes are not a whole Blosc chunk")


def corrupt(where: str, reason: str) -> CorruptDataError:
    """The error for a chunk that is there and cannot be decoded."""
    return CorruptDataError(f"cannot decode a chunk of {where}: {reason}; fetch or write that chunk again")


def _unreadable(where: str, error: OSError) -> StoreError:
    reason = error.strerror or one_line(error)
    return StoreError(f"cannot read {where}: {reason}; check the file, its permissions and that its disk is mounted")


def one_line(error: BaseException) -> str:
    """The message without tensorstore's appended spec and source lines, in one line."""
    text = str(error).split(" [tensorstore_spec=")[0].split(" [source locations=")[0]
    return " ".join(text.split())[:500]
