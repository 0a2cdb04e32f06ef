"""One stored Zarr array, v2 or v3, local or on S3: its metadata, and reading blocks of it with a mask of what is there.

Bulk reading goes through tensorstore, which is opened on first use in each process (a `StoredArray` pickles as its
location and metadata). tensorstore aborts a process that was forked after its parent had used it; in such a process,
and for codecs that tensorstore lacks, arrays are read by `connectomics.io.plain`, more slowly, with the same result.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.errors import InputError, MetadataError, MissingError
from connectomics.io import plain, s3
from connectomics.io.plain import corrupt, one_line
from connectomics.io.store import (
    DEFAULT_OPTIONS,
    Location,
    StoreError,
    StoreOptions,
    exists,
    is_s3,
    join,
    list_objects,
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

# A row of so many chunks is listed rather than asked for one by one: on S3 if the whole row fits one page of a listing.
_LISTED, _LISTED_S3, _PAGE = 16, 4, 1000

# The process that first used tensorstore. Its children by fork must not use it: see the module's docstring.
_tensorstore_process: int | None = None


class StoredArray:
    """A Zarr array that is there, opened for reading.

    Attributes:
        location: path or URL. options: how it is read.
        zarr_format: 2 or 3. shape: voxels. dtype: native numpy dtype (bool, integer or float).
        leading: how many axes of length 1 (t, c) are stored before those of ``shape``, and left away.
        chunks: voxels of one stored file (for a sharded array: of a shard). fill_value: value of absent chunks.

    Raises:
        MissingError: there is no array. MetadataError: its metadata is broken or of a kind that cannot be read.
    """

    def __init__(self, location: Location, options: StoreOptions = DEFAULT_OPTIONS, leading: int = 0) -> None:
        self.location = normalize(location)
        self.leading = leading
        self.options = options.resolved()
        self._opened: tuple[int, Any, Any] | None = None
        meta = read_json(join(self.location, ".zarray"), options)
        self.zarr_format = 2
        if meta is None:
            meta = read_json(join(self.location, "zarr.json"), options)
            self.zarr_format = 3
            if meta is None or meta.get("node_type") != "array":
                raise _no_array(self.location, meta, options)
        self.metadata = meta
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
            self.is_blosc = (meta.get("compressor") or {}).get("id") == "blosc"
        else:
            self.chunks = tuple(int(n) for n in meta["chunk_grid"]["configuration"]["chunk_shape"])
            self.dtype = np.dtype(str(meta["data_type"]))
            encoding = meta["chunk_key_encoding"]
            default = encoding["name"] == "default"
            self._separator = str(encoding.get("configuration", {}).get("separator", "/" if default else "."))
            self._key_prefix = f"c{self._separator}" if default else ""
            self.is_blosc = meta["codecs"][-1].get("name") == "blosc"
        if len(self.chunks) != len(self.shape) or min(self.chunks, default=1) < 1 or min(self.shape, default=0) < 0:
            raise ValueError(f"shape {self.shape} and chunks {self.chunks} do not fit")
        if any(n != 1 for n in self.shape[: self.leading]):
            raise MetadataError(
                f"{self.location} has shape {self.shape}, expected 1 on the {self.leading} axes before z, y, x; "
                "write one time point and channel as a volume of its own"
            )
        self.shape, self.chunks = self.shape[self.leading :], self.chunks[self.leading :]
        fill = meta.get("fill_value")
        self.fill_value = np.asarray(0 if fill is None else fill).astype(self.dtype)[()]

    @property
    def attrs(self) -> dict[str, Any]:
        """The array's attributes (read anew)."""
        if self.zarr_format == 3:
            return dict(self.metadata.get("attributes", {}))
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
        """Whether the chunks with indices ``begin`` to ``end`` (exclusive, one per axis) are stored; bool.

        A long row of chunks is listed. A short one is asked for chunk by chunk, on S3 16 at a time.

        Raises `StoreError` if that cannot be said: a chunk that cannot be looked at, or an array that is gone.
        """
        shape = [int(e) - int(b) for b, e in zip(begin, end, strict=True)]
        locations = [self.chunk_location([b + o for b, o in zip(begin, i, strict=True)]) for i in np.ndindex(*shape)]
        row = -(-self.shape[-1] // self.chunks[-1])
        least, most = (_LISTED_S3, _PAGE) if is_s3(self.location) else (_LISTED, 4 * shape[-1])
        if self._separator == "/" and shape[-1] >= least and row <= most:
            rows = list(dict.fromkeys(location.rpartition("/")[0] for location in locations))
            listed = s3.in_parallel(lambda at: list_objects(at, self.options), rows)
            there = {f"{at}/{name}" for at, names in zip(rows, listed, strict=True) for name in names}
            found = [location in there for location in locations]
        elif is_s3(self.location):
            found = s3.in_parallel(lambda location: object_exists(location, self.options), locations)
        else:
            found = [object_exists(location) for location in locations]
        if not all(found):
            self.check_still_there()
        return np.array(found, dtype=bool).reshape(shape)

    def chunk_location(self, index: Sequence[int]) -> str:
        """Path or URL of the file that holds chunk ``index``."""
        whole = [*[0] * self.leading, *index]
        return f"{self.location}/{self._key_prefix}{self._separator.join(str(int(i)) for i in whole)}"

    def chunk_range(self, low: Sequence[int], high: Sequence[int]) -> tuple[list[int], list[int]]:
        """Begin and end (exclusive) of the chunks that hold voxels ``low`` to ``high`` (exclusive)."""
        first = [int(lo) // c for lo, c in zip(low, self.chunks, strict=True)]
        last = [(int(h) - 1) // c + 1 for h, c in zip(high, self.chunks, strict=True)]
        return first, last

    def window(self, low: Sequence[int], high: Sequence[int]) -> tuple[int | slice, ...]:
        """What to index the array as it is stored with, for voxels ``low`` to ``high`` (exclusive)."""
        return *[0] * self.leading, *[slice(lo, h) for lo, h in zip(low, high, strict=True)]

    def _read_inside(
        self, low: list[int], high: list[int], absent_is_missing: bool
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        shape = [h - lo for lo, h in zip(low, high, strict=True)]
        first, last = self.chunk_range(low, high)
        values = None
        if not is_s3(self.location):
            present = self.present_chunks(first, last)
        elif self._handles() is None:
            values, present = plain.fetch(self, low, high)
        else:  # asking for every chunk would double the requests; read, and ask if that fails
            values = self._decode_if_whole(low, high)
            if values is not None:
                return values, np.ones(shape, bool)
            present = self.present_chunks(first, last)
        if absent_is_missing and not present.any():
            return np.zeros(shape, self.dtype), np.zeros(shape, bool)
        if values is None:
            values = self._decode(low, high)
            self.check_still_there()  # or what vanished meanwhile was read as absent chunks
        if present.all() or not absent_is_missing:
            return values, np.ones(shape, bool)
        chunk_of = [np.arange(lo, h) // c - f for lo, h, c, f in zip(low, high, self.chunks, first, strict=True)]
        inside = present[np.ix_(*chunk_of)]
        values[~inside] = 0
        return values, inside

    def _decode(self, low: list[int], high: list[int]) -> NDArray[Any]:
        """Voxels ``low`` to ``high``, which are inside the array; absent chunks give the fill value."""
        handles = self._handles()
        if handles is None:
            return plain.fetch(self, low, high)[0] if is_s3(self.location) else plain.read(self, low, high)
        try:
            return np.asarray(handles[0][self.window(low, high)].read(order="C").result())
        except (ValueError, OSError) as error:
            raise self._read_error(error) from error

    def _decode_if_whole(self, low: list[int], high: list[int]) -> NDArray[Any] | None:
        """The same by tensorstore, but None where a chunk is absent."""
        handles = self._handles()
        assert handles is not None
        try:
            return np.asarray(handles[1][self.window(low, high)].read(order="C").result())
        except (ValueError, OSError) as error:
            if re.match(r"NOT_FOUND: chunk .* is missing", str(error)):
                return None
            raise self._read_error(error) from error

    def check_still_there(self) -> None:
        """Raise `StoreError` if the array's own metadata is gone. A chunk is absent only while that is there: below an
        unmounted folder nothing exists, and a bucket that is gone or another endpoint answers 404 to everything."""
        name = ".zarray" if self.zarr_format == 2 else "zarr.json"
        if not object_exists(join(self.location, name), self.options):
            remedy = "check the bucket and the endpoint" if is_s3(self.location) else "check that its disk is mounted"
            raise StoreError(f"{self.location} was there and is no longer ({name} is gone); {remedy}")

    def _handles(self) -> tuple[Any, Any] | None:
        """The array in tensorstore, tolerant of absent chunks and strict, for this process; None: read it plainly."""
        global _tensorstore_process
        pid = os.getpid()
        if self._opened is not None and self._opened[0] == pid:
            return self._opened[1], self._opened[2]
        if _tensorstore_process not in (None, pid):
            return None
        import tensorstore

        _tensorstore_process = pid
        spec = self._spec()
        context = _context(pid, self.options.cache_bytes, self.options.threads, self.options.retries)
        try:
            with _http_timeouts(self.options):
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
                raise MetadataError(f"cannot open {self.location}: {one_line(error)}") from error
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
        meta = dict(self.metadata)
        if self.zarr_format == 2 and meta.get("compressor"):
            compressor = meta["compressor"]
            keys = _COMPRESSOR_KEYS.get(compressor["id"], tuple(compressor))
            meta["compressor"] = {key: compressor[key] for key in keys if key in compressor}
        return {
            "driver": "zarr" if self.zarr_format == 2 else "zarr3",
            "kvstore": kvstore,
            "metadata": meta,
            "recheck_cached_metadata": False,
            # asking S3 whether a kept chunk is still the same takes as long as fetching it; a local file costs nothing
            "recheck_cached_data": "open" if is_s3(self.location) else True,
        }

    def _read_error(self, error: Exception) -> Exception:
        text = one_line(error)
        named = re.search(r'Error reading (?:local file )?"([^"]+)"', text)
        if not is_s3(self.location):
            key, found = "", named.group(1) if named else self.location
        else:
            bucket, key = split_s3(self.location)
            key = named.group(1) if named else key
            found = f"s3://{bucket}/{key}"
        of_transfer = any(code in text for code in ("http_response_code", "curl_code", "os_error_code"))
        if not of_transfer and re.match(r"FAILED_PRECONDITION|DATA_LOSS|INVALID_ARGUMENT|OUT_OF_RANGE", text):
            return corrupt(found, text)
        if is_s3(self.location):
            # the answer's XML says nothing that its code does not
            reason = re.sub(r" \[(http_response_body|x-amzn)[^]]*\]", "", text)
            return StoreError(s3.message(bucket, key, reason, denied=text.startswith("PERMISSION_DENIED")))
        reason = re.sub(r"^.*: | \[os_error_code=.*", "", text) if "os_error_code" in text else text
        return StoreError(
            f"cannot read {found}: {reason}; check the file, its permissions and that its disk is mounted"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def __repr__(self) -> str:
        return f"StoredArray({self.location!r}, shape={self.shape}, dtype={self.dtype}, chunks={self.chunks})"


@lru_cache(maxsize=16)
def _context(pid: int, cache_bytes: int, threads: int, retries: int) -> Any:
    """The tensorstore context (thread pool, cache of decoded chunks) of a process."""
    import tensorstore

    delays = {"initial_delay": f"{s3.FIRST_DELAY:g}s", "max_delay": f"{s3.LONGEST_DELAY:g}s"}
    return tensorstore.Context(
        {
            "cache_pool": {"total_bytes_limit": cache_bytes},
            "data_copy_concurrency": {"limit": threads},
            "file_io_concurrency": {"limit": max(1, threads)},
            "s3_request_concurrency": {"limit": 16},
            "s3_request_retries": {"max_retries": retries, **delays},
        }
    )


@contextlib.contextmanager
def _http_timeouts(options: StoreOptions) -> Iterator[None]:
    """Make tensorstore give up on a silent server, which it else waits for without end.

    It takes these limits from the environment only, when it opens its first S3 array; what the user set stays.
    """
    seconds = str(max(1, int(options.attempt_timeout)))
    wanted = {
        "TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS": seconds,
        "TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": seconds,
        "TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES": "100",
    }
    ours = [name for name in wanted if name not in os.environ]
    os.environ.update({name: wanted[name] for name in ours})
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


def _no_array(location: str, meta: dict[str, Any] | None, options: StoreOptions) -> Exception:
    if meta is not None or exists(join(location, ".zgroup"), options):
        return MetadataError(f"{location} is a Zarr group, expected an array; name one of its arrays (s0, ...)")
    return MissingError(f"no Zarr array at {location}: neither .zarray nor zarr.json is there")
