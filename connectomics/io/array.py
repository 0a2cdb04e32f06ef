"""`StoredArray`: one Zarr array, v2 or v3, local or on S3. Reads its metadata, and blocks with a mask of stored chunks.

tensorstore reads the chunks, and is opened on first use in each process; only location and metadata are pickled.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.errors import CorruptDataError, InputError, MetadataError, MissingError
from connectomics.geometry import slices_of
from connectomics.io import s3
from connectomics.io.location import (
    DEFAULT_OPTIONS,
    Location,
    StoreError,
    StoreOptions,
    is_s3,
    join,
    normalize,
    refuse_forked_process,
    split_s3,
    was_forked,
)
from connectomics.io.sharded import ABSENT
from connectomics.io.store import exists, list_objects, object_exists, read_attrs, read_json
from connectomics.io.tensorstore_context import context_of, http_timeouts

# The keys of each numcodecs compressor that tensorstore accepts; it refuses any other ("checksum").
_COMPRESSOR_KEYS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("zstd", "zlib", "gzip", "bz2"), ("id", "level")),
    "blosc": ("id", "cname", "clevel", "shuffle", "blocksize"),
}

# A row of at least so many chunks is listed, not asked for one by one; on S3 if the whole row fits one listing page.
_LISTED, _LISTED_S3, _PAGE = 16, 4, 1000
#: What tensorstore writes before a reason, with the file.
_FAILED = re.compile(
    r'(?:[A-Z_]+: )?Error reading (?:shard (?:entry .{0,80}?|index) in )?(?:local file )?"([^"]+)"(?:: )?'
)


class StoredArray:
    """An existing Zarr array, open for reading.

    Attributes:
        location: path or URL. options: how it is read.
        zarr_format: 2 or 3. shape: voxels. dtype: native numpy dtype (bool, integer or float).
        leading: number of stored axes of length 1 (t, c) before those of ``shape``, which leaves them out.
        chunks: voxels of what may be absent: of a file, or in shards of other programs of a chunk. fill_value: of such.
        absent_is_fill: whether absent chunks are data (`connectomics.io.sharded`).

    Raises:
        MissingError: there is no array. MetadataError: its metadata is broken or not supported.
    """

    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: np.dtype[Any]

    def __init__(self, location: Location, options: StoreOptions = DEFAULT_OPTIONS, leading: int = 0) -> None:
        self.location, self.leading, self.options = normalize(location), leading, options.resolved()
        self._opened: tuple[Any, Any] | None = None
        self._in_child: Any = None  # how a forked process reads it
        self.zarr_format, self._metadata_name = 2, ".zarray"
        meta = read_json(join(self.location, ".zarray"), options)
        if meta is None:
            self.zarr_format, self._metadata_name = 3, "zarr.json"
            meta = read_json(join(self.location, "zarr.json"), options)
            if meta is None or meta.get("node_type") != "array":
                if meta is not None or exists(join(self.location, ".zgroup"), options):
                    raise MetadataError(
                        f"{self.location} is a Zarr group, expected an array; name one: {self.location}/NAME"
                    )
                raise MissingError(f"no Zarr array at {self.location}: neither .zarray nor zarr.json exists")
        self.metadata = meta
        self._signed = is_s3(self.location) and s3.is_signed(split_s3(self.location)[0], self.options)
        self.absent_is_fill: bool = self.zarr_format == 3 and ABSENT.items() <= meta.get("attributes", {}).items()
        try:
            self._parse(meta)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            file, reason = join(self.location, self._metadata_name), f"{type(error).__name__}: {error}"
            raise MetadataError(f"cannot read {file} ({reason}); restore the file") from error
        if any(n != 1 for n in self.shape[:leading]):
            raise MetadataError(
                f"{self.location} has shape {self.shape}, expected 1 on the {leading} axes before z, y, x; "
                "write one time point and channel as a separate volume"
            )
        self.shape, self.chunks = self.shape[leading:], self.chunks[leading:]
        if self.dtype.kind not in "biuf":
            raise MetadataError(f"{self.location} holds {self.dtype}; expected bool, integers or floats")

    def _parse(self, meta: dict[str, Any]) -> None:
        self.shape = tuple(map(int, meta["shape"]))
        self._sharding: dict[str, Any] | None = None
        if self.zarr_format == 2:
            self.chunks = files = tuple(map(int, meta["chunks"]))
            self.dtype = np.dtype(meta["dtype"]).newbyteorder("=")
            self._key_prefix, self._separator = "", str(meta.get("dimension_separator", "."))
        else:
            self.chunks = files = tuple(map(int, meta["chunk_grid"]["configuration"]["chunk_shape"]))
            first, *others = meta["codecs"]
            if first["name"] == "sharding_indexed" and not others and not self.absent_is_fill:
                inner = first["configuration"]
                self.chunks = tuple(inner["chunk_shape"])
                self._sharding = {
                    "driver": "zarr3_sharding_indexed", "grid_shape": np.floor_divide(files, self.chunks).tolist(),
                    "index_codecs": inner["index_codecs"], "index_location": inner.get("index_location", "end"),
                }  # fmt: skip
            self.dtype = np.dtype(str(meta["data_type"]))
            encoding = meta["chunk_key_encoding"]
            default = encoding["name"] == "default"
            self._separator = str(encoding.get("configuration", {}).get("separator", "/" if default else "."))
            self._key_prefix = f"c{self._separator}" if default else ""
        if len(self.chunks) != len(self.shape) or min(self.chunks, default=1) < 1 or min(self.shape, default=0) < 0:
            raise ValueError(f"shape {self.shape} and chunks {self.chunks} do not fit")
        self._per_file = np.floor_divide(files, self.chunks)
        fill = meta.get("fill_value")
        self.fill_value = np.asarray(0 if fill is None else fill).astype(self.dtype)[()]

    @property
    def attrs(self) -> dict[str, Any]:
        """The array's attributes (v2: read at every access)."""
        if self.zarr_format == 3:
            return dict(self.metadata.get("attributes", {}))
        return read_attrs(self.location, self.options)

    def read(
        self, begin: Sequence[int], shape: Sequence[int], *, absent_is_missing: bool = True
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Read a block of ``shape`` voxels from index ``begin``; it may lie partly or wholly outside the array.

        Args:
            absent_is_missing: True (raw): a voxel of an absent chunk is 0 and not inside. False (labels, whose writers
                leave out chunks of the fill value): it has the fill value and is inside.

        Returns:
            The values (array's dtype; 0 outside) and a bool mask of the same shape, True where there is data.

        Raises:
            CorruptDataError: a chunk cannot be decoded. StoreError: the store cannot be reached.
        """
        if len(begin) != len(self.shape) or len(shape) != len(self.shape):
            raise InputError(f"{self.location} has shape {self.shape}; cannot read {tuple(shape)} at {tuple(begin)}")
        low = [min(max(0, int(b)), n) for b, n in zip(begin, self.shape, strict=True)]
        high = [min(max(0, int(b) + int(s)), n) for b, s, n in zip(begin, shape, self.shape, strict=True)]
        if low == list(begin) and all(h - lo == n > 0 for lo, h, n in zip(low, high, shape, strict=True)):
            return self._read_inside(low, high, absent_is_missing)
        values, inside = np.zeros(tuple(shape), self.dtype), np.zeros(tuple(shape), bool)
        if all(h > lo for lo, h in zip(low, high, strict=True)):
            where = slices_of(np.subtract(low, begin), np.subtract(high, low))
            values[where], inside[where] = self._read_inside(low, high, absent_is_missing)
        return values, inside

    def present_chunks(self, begin: Sequence[int], end: Sequence[int]) -> NDArray[np.bool_]:
        """Return whether the chunks ``begin`` to ``end`` (exclusive indices) are stored, or `absent_is_fill`; bool.

        A long row of chunks is listed. A short one is asked for chunk by chunk, on S3 16 at a time.

        Raises `StoreError` if that is unknown: a chunk cannot be looked up, or the whole array is gone.
        """
        shape = [int(e) - int(b) for b, e in zip(begin, end, strict=True)]
        if self.absent_is_fill:
            return np.ones(shape, bool)
        indexes = list(product(*map(range, map(int, begin), map(int, end))))
        locations = [self.chunk_location(i) for i in indexes]
        row = -(-self.shape[-1] // self.chunks[-1])
        least, most = (_LISTED_S3, _PAGE) if is_s3(self.location) else (_LISTED, 4 * shape[-1])
        if self._sharding is not None:
            refuse_forked_process("shards of other programs")
            files = set(locations)
            if not is_s3(self.location):  # there tensorstore takes a folder for an absent shard
                files = {file for file in files if object_exists(file)}
            held = self._held(self._sharding, files)
            places = ([*[0] * self.leading, *index] % self._per_file for index in indexes)
            keys = [at.astype(">u4").tobytes() for at in places]
            found = [key in held.get(file, ()) for key, file in zip(keys, locations, strict=True)]
        elif self._separator == "/" and shape[-1] >= least and row <= most:
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

    def _held(self, index: dict[str, Any], files: Iterable[str]) -> dict[str, set[bytes]]:
        """Return the places of the chunks that each shard holds; none of a shard that is absent."""
        import tensorstore

        base, context = self._spec()["kvstore"], context_of(self.options)
        listed = {}
        try:
            for file in files:
                shard = {**base, "path": base["path"] + file[len(self.location) + 1 :]}
                listed[file] = tensorstore.KvStore.open({**index, "base": shard}, context=context).result().list()
            return {file: set(keys.result()) for file, keys in listed.items()}
        except (ValueError, OSError) as error:
            raise self._read_error(error) from error

    def chunk_location(self, index: Sequence[int]) -> str:
        """Return the path or URL of the file that holds chunk ``index``."""
        whole = [*[0] * self.leading, *index] // self._per_file
        return f"{self.location}/{self._key_prefix}{self._separator.join(str(int(i)) for i in whole)}"

    def chunk_range(self, low: Sequence[int], high: Sequence[int]) -> tuple[list[int], list[int]]:
        """Return begin and end (exclusive) of the chunks that hold voxels ``low`` to ``high`` (exclusive)."""
        first = [int(lo) // c for lo, c in zip(low, self.chunks, strict=True)]
        last = [(int(h) - 1) // c + 1 for h, c in zip(high, self.chunks, strict=True)]
        return first, last

    def check_still_there(self) -> None:
        """Raise `StoreError` if the array's metadata is gone.

        Below an unmounted folder nothing exists, and a deleted bucket answers 404 to everything.
        """
        if not object_exists(join(self.location, self._metadata_name), self.options):
            remedy = "check the bucket and the endpoint" if is_s3(self.location) else "check that its disk is mounted"
            raise StoreError(f"{self.location} was there and is no longer ({self._metadata_name} is gone); {remedy}")

    def _read_inside(
        self, low: list[int], high: list[int], absent_is_missing: bool
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        shape = [h - lo for lo, h in zip(low, high, strict=True)]
        first, last = self.chunk_range(low, high)
        if is_s3(self.location):  # asking for every chunk would double the requests: read, and ask only if that fails
            values = self._decode(low, high, absent_is_error=True)
            if values is not None:
                return values, np.ones(shape, bool)
        present = self.present_chunks(first, last)  # for labels, too: it refuses what is no file, or cannot be read
        if absent_is_missing and not present.any():
            return np.zeros(shape, self.dtype), np.zeros(shape, bool)
        values = self._decode(low, high)
        assert values is not None
        self.check_still_there()  # else chunks that vanished meanwhile would count as absent
        if present.all() or not absent_is_missing:
            return values, np.ones(shape, bool)
        chunk_of = [np.arange(lo, h) // c - f for lo, h, c, f in zip(low, high, self.chunks, first, strict=True)]
        inside = present[np.ix_(*chunk_of)]
        values[~inside] = 0
        return values, inside

    def _decode(self, low: list[int], high: list[int], absent_is_error: bool = False) -> NDArray[Any] | None:
        """Voxels ``low`` to ``high``; absent chunks give the fill value, or (``absent_is_error``) None for all."""
        tolerant, strict = self._handles()
        if strict is None:
            return self._decode_with_zarr(tolerant, low, high)
        window = *[0] * self.leading, *map(slice, low, high)
        try:
            return np.asarray((strict if absent_is_error else tolerant)[window].read(order="C").result())
        except (ValueError, OSError) as error:
            if absent_is_error and re.match(r"NOT_FOUND: chunk .* is missing", str(error)):
                return None
            raise self._read_error(error) from error

    def _handles(self) -> tuple[Any, Any]:
        """The array in tensorstore, tolerant of absent chunks and strict. The zarr-python array and None for a codec
        that tensorstore lacks (LZ4, filters), and in a forked process, where tensorstore would abort."""
        if was_forked():
            if is_s3(self.location):
                refuse_forked_process("S3")
            if self._in_child is None:
                self._in_child = self._zarr_array(ValueError("this process was forked"))
            return self._in_child, None
        if self._opened is not None:
            return self._opened
        import tensorstore

        settings = {"context": context_of(self.options)}
        settings |= {"open": True, "read": True, "assume_metadata": True}
        spec = self._spec()
        try:
            with http_timeouts(self.options):
                tolerant, strict = (
                    tensorstore.open({**spec, "fill_missing_data_reads": fill}, **settings).result()
                    for fill in (True, False)
                )
        except ValueError as error:
            tolerant, strict = self._zarr_array(error), None
        self._opened = tolerant, strict
        return self._opened

    def _zarr_array(self, reason: ValueError) -> Any:
        """The array in zarr-python; `MetadataError` with tensorstore's ``reason`` if that cannot open it either."""
        import zarr

        try:
            if not is_s3(self.location):
                return zarr.open_array(self.location, mode="r", zarr_format=2 if self.zarr_format == 2 else 3)
        except Exception as error:  # whatever a codec's constructor raises
            self.check_still_there()
            raise MetadataError(f"cannot open {self.location}: {one_line(error)}") from error
        raise MetadataError(f"cannot open {self.location}: {one_line(reason)}") from reason

    def _decode_with_zarr(self, array: Any, low: list[int], high: list[int]) -> NDArray[Any]:
        out = np.empty([h - lo for lo, h in zip(low, high, strict=True)], self.dtype)
        for index in product(*map(range, *self.chunk_range(low, high))):
            where = self.chunk_location(index)
            begin = [max(lo, i * c) for lo, i, c in zip(low, index, self.chunks, strict=True)]
            end = [min(h, (i + 1) * c) for h, i, c in zip(high, index, self.chunks, strict=True)]
            try:
                if os.path.exists(where):
                    _check_blosc(where, self.metadata)
                values = array[(*[0] * self.leading, *map(slice, begin, end))]
            except CorruptDataError:
                raise
            except Exception as error:  # codecs raise anything
                if isinstance(error, OSError) and error.errno is not None:  # of the system, not of a codec
                    raise _unreadable(where, error.strerror or one_line(error)) from error
                raise _corrupt(where, one_line(error)) from error
            out[slices_of(np.subtract(begin, low), values.shape)] = values
        return out

    def _spec(self) -> dict[str, Any]:
        kvstore: dict[str, Any]
        if is_s3(self.location):
            bucket, key = split_s3(self.location)
            kvstore = {"driver": "s3", "bucket": bucket, "path": f"{key}/", "aws_region": self.options.s3_region}
            signed = self._signed and s3.has_credentials()  # which puts them into the environment
            kvstore["aws_credentials"] = {"type": "environment" if signed else "anonymous"}
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
            # asking S3 whether a cached chunk has changed takes as long as fetching it; for a local file it is cheap
            "recheck_cached_data": "open" if is_s3(self.location) else True,
        }

    def _read_error(self, error: Exception) -> Exception:
        text = one_line(error)
        named = _FAILED.search(text)
        bucket, key = split_s3(self.location) if is_s3(self.location) else ("", self.location)
        key = named.group(1) if named else key
        found = f"s3://{bucket}/{key}" if bucket else key
        of_transfer = any(code in text for code in ("http_response_code", "curl_code", "os_error_code"))
        if not of_transfer and re.match(r"FAILED_PRECONDITION|DATA_LOSS|INVALID_ARGUMENT|OUT_OF_RANGE", text):
            return _corrupt(found, text)
        if bucket:
            reason = re.sub(r" \[(http_response_body|x-amzn)[^]]*\]", "", text)  # the code says as much
            return StoreError(s3.message(bucket, key, reason, denied=text.startswith("PERMISSION_DENIED")))
        return _unreadable(found, re.sub(r"^.*: | \[os_error_code=.*", "", text) if "os_error_code" in text else text)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None, "_in_child": None}

    def __repr__(self) -> str:
        return f"StoredArray({self.location!r}, shape={self.shape}, dtype={self.dtype}, chunks={self.chunks})"


def _check_blosc(path: str, metadata: dict[str, Any]) -> None:
    """Raise `CorruptDataError` for a truncated Blosc chunk (Zarr v2), beyond whose bytes numcodecs would read."""
    with open(path, "rb") as handle:
        header = handle.read(16)
        stored = os.fstat(handle.fileno()).st_size
    if (metadata.get("compressor") or {}).get("id") != "blosc":
        return
    if len(header) < 16 or int.from_bytes(header[12:16], "little") != stored:
        raise _corrupt(path, f"{stored} bytes are not a whole Blosc chunk")


def _corrupt(where: str, reason: str) -> CorruptDataError:
    reason = _FAILED.sub("", reason).split("; ")[0][:100]
    what = f"it is truncated or damaged ({reason}); remove it, then fetch or write it again"
    return CorruptDataError(f"cannot decode a chunk of {where}: {what}")


def _unreadable(where: str, reason: str) -> StoreError:
    return StoreError(f"cannot read {where}: {reason}; check the file, its permissions and that its disk is mounted")


def one_line(error: BaseException) -> str:
    """Return the message in one line, without the spec and source lines that tensorstore appends."""
    text = str(error).split(" [tensorstore_spec=")[0].split(" [source locations=")[0]
    return " ".join(text.split())[:500]
