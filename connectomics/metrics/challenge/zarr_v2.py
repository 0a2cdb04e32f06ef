"""Reading plain Zarr v2 arrays out of a folder or straight out of a zip, which is never unpacked.

A submission comes from somebody else, so a zip is judged by its table of contents before anything is read: links, paths
that lead out of the archive and more than 50 GB unpacked are refused, no file gives more than that table
says, and no chunk may decode to more than it should.
"""

from __future__ import annotations

import bz2
import json
import lzma
import math
import os
import stat
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.errors import CorruptDataError, InputError, MetadataError, MissingError

#: The most that a zip may hold unpacked, bytes: the portal's limit.
MAX_UNPACKED_BYTES = 50 * 1024**3
#: The most that one array may take in memory, and one chunk.
MAX_ARRAY_BYTES = 16 * 1024**3
_MAX_CHUNK_BYTES = 2**31 - 1
_MAX_JSON_BYTES = 1 << 24
#: The most chunks that an array may have; 1000^3 in chunks of 8^3 are two million.
MAX_CHUNKS = 10_000_000
#: How deep folders may lie in each other; a submission needs six.
MAX_DEPTH = 64
#: How the files of a zip may be packed: these are unpacked piece by piece, and everything that reads zips reads them.
ZIP_METHODS = frozenset({zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED})
#: What can go wrong when a file of a zip is read.
ZIP_ERRORS = (
    zipfile.BadZipFile,
    KeyError,
    NotImplementedError,
    RuntimeError,
    EOFError,
    OSError,
    zlib.error,
)

Decoder = Callable[[bytes, int], bytes]
# Stream formats are decoded up to one byte more than is expected, so that a bomb costs nothing.
_STREAMS: dict[str, Decoder] = {
    "zlib": lambda data, size: zlib.decompressobj(47).decompress(data, size + 1),
    "gzip": lambda data, size: zlib.decompressobj(47).decompress(data, size + 1),
    "bz2": lambda data, size: bz2.BZ2Decompressor().decompress(data, size + 1),
    "lzma": lambda data, size: lzma.LZMADecompressor().decompress(data, max_length=size + 1),
}
_FRAMES = ("blosc", "zstd", "lz4")


def read_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    """One file of a zip, never more memory than the table of contents says it takes.

    ``ZipFile.read`` inflates up to 2 GB before it looks at the stated size. Raises `BadZipFile` where the checksum does
    not agree, and for a method of packing that does not come piece by piece.
    """
    if entry.compress_type not in ZIP_METHODS:
        raise zipfile.BadZipFile(f"method of packing {entry.compress_type}, expected stored or deflated")
    with archive.open(entry) as file:
        return file.read(entry.file_size + 1)


class Store:
    """Files by key (``crop1/mito/.zarray``), read only."""

    location: str

    def read(self, key: str) -> bytes | None:
        """The bytes of a file, None where there is none."""
        raise NotImplementedError

    def folders(self, key: str = "") -> list[str]:
        """Names of the folders directly under ``key``, sorted."""
        raise NotImplementedError

    def close(self) -> None:
        """Lets go of open files."""

    def where(self, key: str) -> str:
        """How a key is named in messages."""
        return f"{self.location}/{key}" if key else self.location

    def attrs(self, key: str) -> dict[str, Any]:
        """The attributes of an array or group, empty where there are none."""
        return self.json(f"{key}/.zattrs" if key else ".zattrs") or {}

    def json(self, key: str) -> dict[str, Any] | None:
        """A JSON object, None where there is no such file; `MetadataError` where it is something else."""
        data = self.read(key)
        if data is None:
            return None
        try:
            value = json.loads(data)
        except ValueError as error:
            raise MetadataError(f"{self.where(key)} is not JSON ({error})") from error
        if not isinstance(value, dict):
            raise MetadataError(f"{self.where(key)} must hold a JSON object, found {type(value).__name__}")
        return value


class FolderStore(Store):
    """A folder on disk."""

    def __init__(self, location: str | Path) -> None:
        self._root = Path(location)
        self.location = str(location)
        if not self._root.is_dir():
            raise MissingError(f"no folder at {location}")

    def read(self, key: str) -> bytes | None:
        try:
            return (self._root / key).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise CorruptDataError(f"{self.where(key)} cannot be read: {error}") from error

    def folders(self, key: str = "") -> list[str]:
        try:
            with os.scandir(self._root / key) as entries:
                return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
        except (FileNotFoundError, NotADirectoryError):
            return []


class ZipStore(Store):
    """A zip, checked by its table of contents and read in place.

    Like the official scorer, a single ``*.zarr`` folder inside is taken for the root. Raises `InputError` for what is
    no zip, for links, encrypted entries, paths out of the archive, more than ``max_bytes`` unpacked, or several
    ``*.zarr`` folders.
    """

    def __init__(self, location: str | Path, max_bytes: int = MAX_UNPACKED_BYTES) -> None:
        self.location = str(location)
        if not Path(location).is_file():
            raise MissingError(f"no submission at {location}")
        try:
            self._zip = zipfile.ZipFile(location)
        except (zipfile.BadZipFile, OSError) as error:
            raise InputError(f"{location} is not a zip file ({error}); pack it again") from error
        try:
            names = self._checked(max_bytes)
        except InputError:
            self._zip.close()
            raise
        self._folders: dict[str, set[str]] = {}
        for name in names:
            parts = PurePosixPath(name).parts
            for depth in range(len(parts) if name.endswith("/") else len(parts) - 1):
                self._folders.setdefault("/".join(parts[:depth]), set()).add(parts[depth])
        self._prefix = self._zarr_root()

    def _checked(self, max_bytes: int) -> list[str]:
        total = 0
        self._entries: dict[str, zipfile.ZipInfo] = {}
        for entry in self._zip.infolist():
            name = entry.filename
            path = PurePosixPath(name)
            if stat.S_ISLNK(entry.external_attr >> 16):
                raise InputError(f"{self.location}: {name!r} is a link; a submission must hold files only")
            if path.is_absolute() or ".." in path.parts or "\\" in entry.orig_filename or ":" in name.partition("/")[0]:
                raise InputError(f"{self.location}: {name!r} leads out of the archive; pack it with relative paths")
            if len(path.parts) > MAX_DEPTH:
                raise InputError(f"{self.location}: {name[:40]!r}... has {len(path.parts)} folders; pack it again")
            if entry.flag_bits & 1:
                raise InputError(f"{self.location}: {name!r} is encrypted; pack it without a password")
            if entry.compress_type not in ZIP_METHODS:
                raise InputError(
                    f"{self.location}: {name!r} is packed by method {entry.compress_type}; expected stored or deflated "
                    f"files (zip -r0)"
                )
            total += entry.file_size
            self._entries[name] = entry
        if total > max_bytes:
            raise InputError(
                f"{self.location} holds {total / 1024**3:.1f} GB unpacked, more than the {max_bytes / 1024**3:.1f} GB "
                f"that are accepted; submit labels, not probabilities, in the smallest type that holds them"
            )
        return list(self._entries)

    def _zarr_root(self) -> str:
        roots = [
            f"{parent}/{name}".lstrip("/")
            for parent, names in self._folders.items()
            for name in names
            if name.endswith(".zarr")
        ]
        if len(roots) > 1:
            raise InputError(
                f"{self.location} holds {len(roots)} .zarr folders ({sorted(roots)[:3]}...); pack only one"
            )
        return roots[0] + "/" if roots else ""

    def read(self, key: str) -> bytes | None:
        entry = self._entries.get(self._prefix + key)
        if entry is None:
            return None
        limit = _MAX_JSON_BYTES if PurePosixPath(key).name.startswith(".z") else _MAX_CHUNK_BYTES
        if entry.file_size > limit:
            raise CorruptDataError(f"{self.where(key)} claims {entry.file_size} bytes, more than {limit} are not read")
        try:
            return read_entry(self._zip, entry)
        except ZIP_ERRORS as error:
            raise CorruptDataError(f"{self.where(key)} cannot be unpacked ({error}); pack it again") from error

    def folders(self, key: str = "") -> list[str]:
        names = self._folders.get((self._prefix + key).rstrip("/"), ())
        return sorted(n for n in names if not n.startswith("."))

    def close(self) -> None:
        self._zip.close()


class ZarrArray:
    """One plain Zarr v2 array of numbers.

    Attributes:
        shape: of any rank. dtype: as stored. attrs: ``.zattrs``. where: for messages.

    Raises `MetadataError` where the metadata cannot be understood or ask for a codec that is not accepted.
    """

    def __init__(self, store: Store, path: str) -> None:
        meta = store.json(f"{path}/.zarray")
        self._store, self._path, self.where = store, path, store.where(path)
        if meta is None:
            raise MissingError(f"no Zarr v2 array at {self.where}")
        try:
            self.shape = tuple(int(n) for n in meta["shape"])
            self._chunks = tuple(int(n) for n in meta["chunks"])
            self.dtype = np.dtype(meta["dtype"])
            fill = meta.get("fill_value")
            self._fill = np.zeros((), self.dtype) if fill is None else np.asarray(fill).astype(self.dtype).reshape(())
            self._order = {"C": "C", "F": "F"}[meta.get("order", "C")]
            self._separator = {".": ".", "/": "/"}[meta.get("dimension_separator", ".")]
            compressor = meta.get("compressor")
            filters = meta.get("filters")
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise MetadataError(
                f"{self.where}/.zarray cannot be understood ({type(error).__name__}: {error})"
            ) from error
        if self.dtype.kind not in "biuf" or min((*self.shape, 1)) < 0 or min((*self._chunks, 1)) < 1:
            raise MetadataError(f"{self.where}: expected an array of numbers, found {self.dtype} of shape {self.shape}")
        if len(self._chunks) != len(self.shape) or filters:
            raise MetadataError(f"{self.where}: filters and chunks of another rank are not read: {filters}, {meta}")
        count = math.prod(-(-n // c) for n, c in zip(self.shape, self._chunks, strict=True))
        if count > MAX_CHUNKS:
            raise MetadataError(f"{self.where}/.zarray makes {count} chunks, expected at most {MAX_CHUNKS}")
        codec = compressor.get("id") if isinstance(compressor, dict) else compressor
        if codec is not None and codec not in (*_STREAMS, *_FRAMES):
            raise MetadataError(f"{self.where}: compressor {codec!r} is not read; use blosc, zstd or gzip")
        self._codec: str | None = codec
        self.attrs = store.attrs(path)
        self._chunk_bytes = math.prod(self._chunks) * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array in memory."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, begin: Sequence[int] | None = None, shape: Sequence[int] | None = None) -> NDArray[Any]:
        """A block inside the array (all of it by default), native byte order, C order.

        Raises `CorruptDataError` naming the chunk that cannot be decoded, `InputError` for more than 16 GB.
        """
        lo = [0] * len(self.shape) if begin is None else [int(b) for b in begin]
        size = list(self.shape) if shape is None else [int(n) for n in shape]
        if math.prod(size) * self.dtype.itemsize > MAX_ARRAY_BYTES:
            raise InputError(f"{self.where}: {size} voxels of {self.dtype} are more than 16 GB; write it coarser")
        out = np.full(size, self._fill, self.dtype.newbyteorder("="))
        hi = [b + n for b, n in zip(lo, size, strict=True)]
        ranges = [range(b // c, -(-e // c)) for b, e, c in zip(lo, hi, self._chunks, strict=True)]
        for index in np.ndindex(*(len(r) for r in ranges)):
            chunk = [r[i] for r, i in zip(ranges, index, strict=True)]
            values = self._chunk(chunk)
            if values is None:
                continue
            source, target = [], []
            for b, e, c, i in zip(lo, hi, self._chunks, chunk, strict=True):
                first, last = max(b, i * c), min(e, (i + 1) * c)
                source.append(slice(first - i * c, last - i * c))
                target.append(slice(first - b, last - b))
            out[tuple(target)] = values[tuple(source)]
        return out

    def _chunk(self, index: Sequence[int]) -> NDArray[Any] | None:
        key = f"{self._path}/{self._separator.join(str(i) for i in index)}"
        data = self._store.read(key)
        if data is None:
            return None
        where = self._store.where(key)
        if self._chunk_bytes > _MAX_CHUNK_BYTES:
            raise CorruptDataError(f"{where}: chunks of {self._chunk_bytes} bytes are not read; write smaller ones")
        try:
            decoded = self._decode(data)
        except (RuntimeError, ValueError, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise CorruptDataError(f"{where} cannot be decoded ({error}); write it again") from error
        if len(decoded) != self._chunk_bytes:
            raise CorruptDataError(
                f"{where} holds {len(decoded)} bytes, expected {self._chunk_bytes} for chunks {self._chunks} of "
                f"{self.dtype}; write it again"
            )
        return np.frombuffer(decoded, self.dtype).reshape(self._chunks, order=self._order)  # type: ignore[call-overload]

    def _decode(self, data: bytes) -> Any:
        codec = self._codec
        if codec is None:
            return data
        if codec in _STREAMS:
            return _STREAMS[codec](data, self._chunk_bytes)
        import numcodecs

        # Blosc's and LZ4's headers say how much they hold; a lie is refused before it costs memory.
        claimed = {"blosc": data[4:8], "lz4": data[:4]}.get(codec)
        if isinstance(claimed, bytes) and int.from_bytes(claimed, "little") != self._chunk_bytes:
            raise ValueError(f"it claims {int.from_bytes(claimed, 'little')} bytes, expected {self._chunk_bytes}")
        if codec == "zstd":
            check_zstd(data, self._chunk_bytes)
        return memoryview(numcodecs.get_codec({"id": codec}).decode(data)).cast("B")


def is_array(store: Store, path: str) -> bool:
    """Whether a plain Zarr v2 array is there."""
    return store.read(f"{path}/.zarray") is not None


def check_zstd(data: bytes, expected: int) -> None:
    """Refuses Zstandard data that would decode to more than ``expected`` bytes, without decoding it.

    All frames are walked (RFC 8878, 3.1.1): a frame whose header states a size is held to it by the decoder; of one
    that states none, as streaming writers make, each block says how much it gives at most. Blocks may be short, so up
    to four times the expected size, or 64 MB, pass here. Raises `ValueError`.
    """
    if len(data) > 2 * expected + (1 << 16):
        raise ValueError(f"{len(data)} bytes are stored for {expected}")
    at = stated = at_most = 0
    limit = max(4 * expected, 1 << 26)
    while at < len(data):
        magic = int.from_bytes(data[at : at + 4], "little")
        if 0x184D2A50 <= magic <= 0x184D2A5F:  # a skippable frame, which gives nothing
            at += 8 + int.from_bytes(data[at + 4 : at + 8], "little")
            continue
        if magic != 0xFD2FB528:
            raise ValueError("it is no Zstandard frame")
        descriptor = data[at + 4] if at + 4 < len(data) else 0
        single, flag = bool(descriptor & 0x20), descriptor >> 6
        width = (1 if single else 0, 2, 4, 8)[flag]
        at += 5 + (0 if single else 1) + (0, 1, 2, 4)[descriptor & 3]
        if width:
            stated += int.from_bytes(data[at : at + width], "little") + (256 if width == 2 else 0)
            if stated > expected:
                raise ValueError(f"it claims {stated} bytes, expected {expected}")
        at, given = _zstd_blocks(data, at + width, limit)
        at += 4 if descriptor & 4 else 0
        at_most += 0 if width else given
        if stated + at_most > limit:
            raise ValueError(f"it may hold more than {limit} bytes, expected {expected}")


def _zstd_blocks(data: bytes, at: int, limit: int) -> tuple[int, int]:
    """Behind the blocks of a frame, and the most bytes that they give (it stops early where that passes ``limit``)."""
    given, last = 0, False
    while not last and at < len(data) and given <= limit:
        header = int.from_bytes(data[at : at + 3], "little")
        last, kind, size = bool(header & 1), header >> 1 & 3, header >> 3
        given += 1 << 17 if kind == 2 else size  # 2: compressed, to at most 128 KB
        at += 3 + (1 if kind == 1 else size)  # 1: one byte repeated
    return at, given
