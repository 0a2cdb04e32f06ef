"""One stored Zarr array, v2 or v3, local or on S3: its metadata, and reading blocks of it with a mask of what is there.

Bulk reading goes through tensorstore, which is opened on first use in each process (a `StoredArray` pickles as its
location and metadata). tensorstore aborts a process that was forked after its parent had used it; in such a process,
and for codecs that tensorstore lacks, local arrays are read by zarr-python, more slowly, with the same result.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.errors import CorruptDataError, InputError, MetadataError, MissingError
from connectomics.io.store import (
    DEFAULT_OPTIONS,
    Location,
    StoreError,
    StoreOptions,
    exists,
    is_s3,
    join,
    normalize,
    object_exists,
    read_attrs,
    read_json,
    split_s3,
)

# What tensorstore knows of each numcodecs compressor; it refuses metadata with any further key ("checksum").
_COMPRESSOR_KEYS = {
    "zstd": ("id", "level"),
    "blosc": ("id", "cname", "clevel", "shuffle", "blocksize"),
    "zlib": ("id", "level"),
    "gzip": ("id", "level"),
    "bz2": ("id", "level"),
}

# The process that first used tensorstore. Its children by fork must not use it: see the module's docstring.
_tensorstore_process: int | None = None


class StoredArray:
    """A Zarr array that is there, opened for reading.

    Attributes:
        location: path or URL. options: how it is read.
        zarr_format: 2 or 3. shape: voxels. dtype: native numpy dtype (bool, integer or float).
        chunks: voxels of one stored file (for a sharded array: of a shard). fill_value: value of absent chunks.

    Raises:
        MissingError: there is no array. MetadataError: its metadata is broken or of a kind that cannot be read.
    """

    def __init__(self, location: Location, options: StoreOptions = DEFAULT_OPTIONS) -> None:
        self.location = normalize(location)
        self.options = options
        self._opened: tuple[int, Any, Any] | None = None
        meta = read_json(join(self.location, ".zarray"), options)
        self.zarr_format = 2
        if meta is None:
            meta = read_json(join(self.location, "zarr.json"), options)
            self.zarr_format = 3
            if meta is None or meta.get("node_type") != "array":
                raise _no_array(self.location, meta, options)
        self._meta = meta
        try:
            self._parse(meta)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            name = ".zarray" if self.zarr_format == 2 else "zarr.json"
            reason = f"{type(error).__name__}: {error}"
            raise MetadataError(f"cannot read {join(self.location, name)} ({reason}); restore the file") from error
        if self.dtype.kind not in "biuf":
            raise MetadataError(f"{self.location} holds {self.dtype}; expected bool, integers or floats")

    def _parse(self, meta: dict[str, Any]) -> None:
        self.shape: tuple[int, ...] = tuple(int(n) for n in meta["shape"])
        if self.zarr_format == 2:
            self.chunks: tuple[int, ...] = tuple(int(n) for n in meta["chunks"])
            self.dtype = np.dtype(meta["dtype"]).newbyteorder("=")
            self._key_prefix, self._separator = "", str(meta.get("dimension_separator", "."))
            self._is_blosc = (meta.get("compressor") or {}).get("id") == "blosc"
        else:
            self.chunks = tuple(int(n) for n in meta["chunk_grid"]["configuration"]["chunk_shape"])
            self.dtype = np.dtype(str(meta["data_type"]))
            encoding = meta["chunk_key_encoding"]
            default = encoding["name"] == "default"
            self._separator = str(encoding.get("configuration", {}).get("separator", "/" if default else "."))
            self._key_prefix = f"c{self._separator}" if default else ""
            self._is_blosc = meta["codecs"][-1].get("name") == "blosc"
        if len(self.chunks) != len(self.shape) or min(self.chunks, default=1) < 1 or min(self.shape, default=0) < 0:
            raise ValueError(f"shape {self.shape} and chunks {self.chunks} do not fit")
        fill = meta.get("fill_value")
        self.fill_value = np.asarray(0 if fill is None else fill).astype(self.dtype)[()]

    @property
    def attrs(self) -> dict[str, Any]:
        """The array's attributes (read anew)."""
        if self.zarr_format == 3:
            return dict(self._meta.get("attributes", {}))
        return read_attrs(self.location, self.options)

    def read(
        self, begin: Sequence[int], shape: Sequence[int], *, absent_is_missing: bool = True
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """A block of ``shape`` voxels from index ``begin``; it may lie partly or wholly outside the array.

        Args:
            absent_is_missing: True (raw): a voxel of an absent chunk is 0 and not inside. False (labels, whose writers
                leave out chunks of fill value): it is the fill value and inside.

        Returns:
            The values (array's dtype; 0 outside) and a bool mask of the same shape, True where there is data.

        Raises:
            CorruptDataError: a chunk cannot be decoded. StoreError: the store cannot be reached.
        """
        if len(begin) != len(self.shape) or len(shape) != len(self.shape):
            raise InputError(f"{self.location} has shape {self.shape}; cannot read {tuple(shape)} at {tuple(begin)}")
        low = [min(max(0, int(b)), n) for b, n in zip(begin, self.shape, strict=True)]
        high = [min(max(0, int(b) + int(s)), n) for b, s, n in zip(begin, shape, self.shape, strict=True)]
        if any(h <= lo for lo, h in zip(low, high, strict=True)):
            return np.zeros(tuple(shape), self.dtype), np.zeros(tuple(shape), bool)
        part, present = self._read_inside(low, high, absent_is_missing)
        if part.shape == tuple(shape):
            return part, present
        where = tuple(slice(lo - int(b), h - int(b)) for lo, h, b in zip(low, high, begin, strict=True))
        values, inside = np.zeros(tuple(shape), self.dtype), np.zeros(tuple(shape), bool)
        values[where] = part
        inside[where] = present
        return values, inside

    def present_chunks(self, begin: Sequence[int], end: Sequence[int]) -> NDArray[np.bool_]:
        """Whether the chunks with indices ``begin`` to ``end`` (exclusive, one per axis) are stored; bool."""
        shape = [int(e) - int(b) for b, e in zip(begin, end, strict=True)]
        locations = [self.chunk_location([b + o for b, o in zip(begin, i, strict=True)]) for i in np.ndindex(*shape)]
        if is_s3(self.location):
            with ThreadPoolExecutor(max_workers=16) as pool:
                found = list(pool.map(lambda location: object_exists(location, self.options), locations))
        else:
            found = [os.path.isfile(location) for location in locations]
        return np.array(found, dtype=bool).reshape(shape)

    def chunk_location(self, index: Sequence[int]) -> str:
        """Path or URL of the file that holds chunk ``index``."""
        return f"{self.location}/{self._key_prefix}{self._separator.join(str(int(i)) for i in index)}"

    def chunk_range(self, low: Sequence[int], high: Sequence[int]) -> tuple[list[int], list[int]]:
        """Begin and end (exclusive) of the chunks that hold voxels ``low`` to ``high`` (exclusive)."""
        first = [int(lo) // c for lo, c in zip(low, self.chunks, strict=True)]
        last = [(int(h) - 1) // c + 1 for h, c in zip(high, self.chunks, strict=True)]
        return first, last

    def _read_inside(
        self, low: list[int], high: list[int], absent_is_missing: bool
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        shape = [h - lo for lo, h in zip(low, high, strict=True)]
        if not absent_is_missing:
            return self._decode(low, high), np.ones(shape, bool)
        if is_s3(self.location):  # asking for every chunk would double the requests; read, and ask where that fails
            values = self._decode_if_whole(low, high)
            if values is not None:
                return values, np.ones(shape, bool)
        first, last = self.chunk_range(low, high)
        present = self.present_chunks(first, last)
        if not present.any():
            return np.zeros(shape, self.dtype), np.zeros(shape, bool)
        values = self._decode(low, high)
        if present.all():
            return values, np.ones(shape, bool)
        chunk_of = [np.arange(lo, h) // c - f for lo, h, c, f in zip(low, high, self.chunks, first, strict=True)]
        inside = present[np.ix_(*chunk_of)]
        values[~inside] = 0
        return values, inside

    def _decode(self, low: list[int], high: list[int]) -> NDArray[Any]:
        """Voxels ``low`` to ``high``, which are inside the array; absent chunks give the fill value."""
        handles = self._handles()
        window = tuple(slice(lo, h) for lo, h in zip(low, high, strict=True))
        if handles is None:
            return self._decode_plain(low, high)
        try:
            return np.asarray(handles[0][window].read(order="C").result())
        except (ValueError, OSError) as error:
            raise self._read_error(error) from error

    def _decode_if_whole(self, low: list[int], high: list[int]) -> NDArray[Any] | None:
        """The same, but None where a chunk is absent."""
        handles = self._handles()
        if handles is None:
            return None
        window = tuple(slice(lo, h) for lo, h in zip(low, high, strict=True))
        try:
            return np.asarray(handles[1][window].read(order="C").result())
        except (ValueError, OSError) as error:
            if str(error).startswith("NOT_FOUND"):
                return None
            raise self._read_error(error) from error

    def _decode_plain(self, low: list[int], high: list[int]) -> NDArray[Any]:
        """By zarr-python, for local arrays."""
        import zarr

        window = tuple(slice(lo, h) for lo, h in zip(low, high, strict=True))
        try:
            array = zarr.open_array(self.location, mode="r", zarr_format=2 if self.zarr_format == 2 else 3)
        except Exception as error:  # whatever a codec's constructor raises
            raise MetadataError(f"cannot open {self.location}: {_one_line(error)}") from error
        first, last = self.chunk_range(low, high)
        chunks = [
            tuple(f + o for f, o in zip(first, offset, strict=True))
            for offset in np.ndindex(*[b - a for a, b in zip(first, last, strict=True)])
        ]
        if self._is_blosc:
            for index in chunks:
                _check_blosc(self.chunk_location(index))
        try:
            return np.asarray(array[window]).astype(self.dtype, copy=False)
        except Exception as error:  # codecs raise what they like; find out which chunk it is
            for index in chunks:
                try:
                    array[tuple(slice(i * c, (i + 1) * c) for i, c in zip(index, self.chunks, strict=True))]
                except Exception as cause:
                    raise _corrupt(self.chunk_location(index), _one_line(cause)) from error
            raise

    def _handles(self) -> tuple[Any, Any] | None:
        """The array in tensorstore, tolerant of absent chunks and strict, for this process; None: use zarr-python."""
        global _tensorstore_process
        pid = os.getpid()
        if self._opened is not None and self._opened[0] == pid:
            return self._opened[1], self._opened[2]
        if _tensorstore_process not in (None, pid):
            if is_s3(self.location):
                raise InputError(
                    f"cannot read {self.location} in a process forked after its parent had read volumes; "
                    "start worker processes with 'forkserver' or 'spawn'"
                )
            return None
        import tensorstore

        _tensorstore_process = pid
        spec = self._spec()
        context = _context(pid, self.options.cache_bytes, self.options.threads)
        try:
            opened = [
                tensorstore.open(
                    {**spec, "fill_missing_data_reads": fill},
                    context=context,
                    open=True,
                    read=True,
                    assume_metadata=True,
                ).result()
                for fill in (True, False)
            ]
        except ValueError as error:
            if is_s3(self.location):
                raise MetadataError(f"cannot open {self.location}: {_one_line(error)}") from error
            return None
        self._opened = (pid, opened[0], opened[1])
        return opened[0], opened[1]

    def _spec(self) -> dict[str, Any]:
        kvstore: dict[str, Any]
        if is_s3(self.location):
            bucket, key = split_s3(self.location)
            kvstore = {
                "driver": "s3",
                "bucket": bucket,
                "path": f"{key}/",
                "aws_region": self.options.s3_region,
                "aws_credentials": {"type": "anonymous"},
            }
            if self.options.s3_endpoint:
                kvstore["endpoint"] = self.options.s3_endpoint
        else:
            kvstore = {"driver": "file", "path": f"{self.location}/"}
        meta = dict(self._meta)
        if self.zarr_format == 2 and meta.get("compressor"):
            compressor = meta["compressor"]
            keys = _COMPRESSOR_KEYS.get(compressor["id"], tuple(compressor))
            meta["compressor"] = {key: compressor[key] for key in keys if key in compressor}
        return {
            "driver": "zarr" if self.zarr_format == 2 else "zarr3",
            "kvstore": kvstore,
            "metadata": meta,
            "recheck_cached_metadata": False,
            "recheck_cached_data": True,
        }

    def _read_error(self, error: Exception) -> Exception:
        text = _one_line(error)
        if re.match(r"FAILED_PRECONDITION|DATA_LOSS|INVALID_ARGUMENT|OUT_OF_RANGE", text):
            return _corrupt(self.location, text)
        return StoreError(f"cannot read {self.location}: {text}; check the address, the endpoint and permissions")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def __repr__(self) -> str:
        return f"StoredArray({self.location!r}, shape={self.shape}, dtype={self.dtype}, chunks={self.chunks})"


@lru_cache(maxsize=16)
def _context(pid: int, cache_bytes: int, threads: int) -> Any:
    """The tensorstore context (thread pool, cache of decoded chunks) of a process."""
    import tensorstore

    return tensorstore.Context(
        {
            "cache_pool": {"total_bytes_limit": cache_bytes},
            "data_copy_concurrency": {"limit": threads},
            "file_io_concurrency": {"limit": max(1, threads)},
            "s3_request_concurrency": {"limit": 16},
            "s3_request_retries": {"max_retries": 5, "initial_delay": "200ms", "max_delay": "5s"},
        }
    )


def _no_array(location: str, meta: dict[str, Any] | None, options: StoreOptions) -> Exception:
    if meta is not None or exists(join(location, ".zgroup"), options):
        return MetadataError(f"{location} is a Zarr group, expected an array; name one of its arrays (s0, ...)")
    return MissingError(f"no Zarr array at {location}: neither .zarray nor zarr.json is there")


def _check_blosc(path: str) -> None:
    """Refuse a truncated Blosc chunk: numcodecs trusts the length in the header and would read beyond the bytes."""
    try:
        with open(path, "rb") as handle:
            header = handle.read(16)
    except FileNotFoundError:
        return
    stored = os.path.getsize(path)
    if len(header) < 16 or int.from_bytes(header[12:16], "little") != stored:
        raise _corrupt(path, f"{stored} bytes are not a whole Blosc chunk")


def _corrupt(where: str, reason: str) -> CorruptDataError:
    return CorruptDataError(f"cannot decode a chunk of {where}: {reason}; fetch or write that chunk again")


def _one_line(error: BaseException) -> str:
    """The message without tensorstore's appended spec and source lines, in one line."""
    text = str(error).split(" [tensorstore_spec=")[0].split(" [source locations=")[0]
    return " ".join(text.split())[:500]
