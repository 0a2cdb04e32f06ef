"""Read plain Zarr v2 arrays from a folder or directly from a zip, which is never unpacked.

zarr-python and numcodecs trust what they read: they run any codec and allocate what a chunk claims to hold. This reader
accepts common codecs only, reads no more of a file than the zip states, and decodes no chunk beyond its expected size.
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from connectomics.errors import CorruptDataError, InputError, MetadataError, MissingError

#: The portal's limit for the unpacked content of a zip, bytes.
MAX_UNPACKED_BYTES = 50 * 1024**3
#: The largest array and the largest file that are read, bytes.
MAX_ARRAY_BYTES = 16 * 1024**3
_MAX_CHUNK_BYTES = 2**31 - 1
_MAX_JSON_BYTES = 1 << 24
#: The most chunks of an array; 1000^3 voxels in chunks of 8^3 are two million.
MAX_CHUNKS = 10_000_000
#: The most nested folders; a submission needs six.
MAX_DEPTH = 64
# Zip methods that unpack as a stream and that every zip reader supports.
_ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_READ_ERRORS = (zipfile.BadZipFile, KeyError, NotImplementedError, RuntimeError, EOFError, OSError, zlib.error)


def _inflate(data: bytes, size: int) -> bytes:
    return zlib.decompressobj(47).decompress(data, size)


def _zstd(data: bytes, size: int) -> bytes:
    import pyarrow as pa

    with pa.CompressedInputStream(pa.py_buffer(data), "zstd") as stream:
        return bytes(stream.read(size))


# Stream formats are decoded to one byte more than expected, so that a bomb costs nothing.
_STREAMS: dict[str, Callable[[bytes, int], bytes]] = {
    "zlib": _inflate,
    "gzip": _inflate,
    "zstd": _zstd,
    "bz2": lambda data, size: bz2.BZ2Decompressor().decompress(data, size),
    "lzma": lambda data, size: lzma.LZMADecompressor().decompress(data, size),
}
# Formats that must be decoded whole, and where their header states the decoded size.
_STATED_SIZE = {"blosc": slice(4, 8), "lz4": slice(0, 4)}


# -- stores ------------------------------------------------------------------------------------------------------------
class Store:
    """Read-only files of a Zarr group by key (``crop1/mito/.zarray``)."""

    location: str

    def read(self, key: str) -> bytes | None:
        """Return the bytes of a file, None if it does not exist."""
        raise NotImplementedError

    def folders(self, key: str = "") -> list[str]:
        """Return the sorted names of the folders directly under ``key``, without hidden ones."""
        raise NotImplementedError

    def close(self) -> None:
        """Close open files."""

    def where(self, key: str) -> str:
        """Return how messages name a key."""
        return f"{self.location}/{key}" if key else self.location

    def json(self, key: str) -> dict[str, Any] | None:
        """Return a JSON object, None if the file does not exist; `MetadataError` if it holds anything else."""
        data = self.read(key)
        if data is None:
            return None
        try:
            value = json.loads(data)
        except ValueError as error:
            raise MetadataError(f"{self.where(key)} is not JSON ({error})") from error
        if not isinstance(value, dict):
            raise MetadataError(f"{self.where(key)}: expected a JSON object, got {type(value).__name__}")
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


@dataclass(frozen=True)
class Entry:
    """One file of an archive: its name, bytes unpacked and as stored, and what makes it unsafe to read."""

    name: str
    size: int
    stored: int
    is_link: bool = False
    is_encrypted: bool = False
    is_unsupported_method: bool = False

    @property
    def problems(self) -> list[tuple[str, str, str]]:
        """Return the rule, what is there and what is expected, of all that makes the file unsafe to read."""
        parts = self.name.replace("\\", "/").split("/")
        leads_out = self.name.startswith(("/", "\\")) or ":" in parts[0] or ".." in parts or "\x00" in self.name
        checks = (
            (leads_out, "outside-path", "a path out of the archive", "relative names without .."),
            ("\\" in self.name and not leads_out, "backslash", "a backslash in a name", "names with /"),
            (len(parts) > MAX_DEPTH, "deep-path", f"{len(parts)} nested folders", f"at most {MAX_DEPTH}"),
            (self.is_link, "link", "a link", "files and folders only"),
            (self.is_encrypted, "encrypted", "an encrypted file", "no password"),
            (self.is_unsupported_method, "zip-method", "a file packed by another method", "stored or deflated files"),
        )
        return [(rule, found, expected) for is_wrong, rule, found, expected in checks if is_wrong]


class Archive(Store):
    """The files of a zip or a folder, listed whatever they are and read one at a time. Use it in a ``with`` block.

    It refuses nothing unsafe, so that a check can name all of it; `ZipStore` refuses.
    """

    def __init__(self, location: str | Path) -> None:
        """List the files. `MissingError` if nothing is there, `InputError` if it is not a zip."""
        self.location = str(location)
        self._root = Path(location)
        self._prefix = ""
        self._zip: zipfile.ZipFile | None = None
        if self._root.is_dir():
            self.entries = list(_folder_entries(self._root))
        elif self._root.is_file():
            try:
                self._zip = zipfile.ZipFile(location)
            except (zipfile.BadZipFile, OSError, ValueError) as error:
                raise InputError(f"{location} is not a zip file ({error}); pack it again") from error
            self.entries = [_zip_entry(info) for info in self._zip.infolist()]
        else:
            raise MissingError(f"no submission at {location}; give a .zip file or the folder of a Zarr group")
        self.sizes = {entry.name: entry.size for entry in self.entries if not entry.name.endswith("/")}
        self._files: dict[str, list[str]] = {}
        self._inner: dict[str, set[str]] = {}
        for name in self.sizes:
            if name.count("/") > MAX_DEPTH:  # the names of its folders alone could fill the memory
                continue
            parent, _, base = name.rpartition("/")
            self._files.setdefault(parent, []).append(base)
            while parent and parent not in self._inner.setdefault(parent.rpartition("/")[0], set()):
                self._inner[parent.rpartition("/")[0]].add(parent)
                parent = parent.rpartition("/")[0]

    @property
    def is_zip(self) -> bool:
        """Whether it is a zip (otherwise a folder)."""
        return self._zip is not None

    def __contains__(self, name: str) -> bool:
        return name in self.sizes

    def folders(self, key: str = "") -> list[str]:
        names = (inner.rpartition("/")[2] for inner in self._inner.get((self._prefix + key).rstrip("/"), ()))
        return sorted(name for name in names if not name.startswith("."))

    def files_below(self, path: str) -> list[str]:
        """Return the names, relative to ``path``, of all files in that folder and the folders below it."""
        found = list(self._files.get(path, ()))
        for inner in self._inner.get(path, ()):
            found += [f"{inner[len(path) :].lstrip('/')}/{name}" for name in self.files_below(inner)]
        return found

    def read(self, key: str) -> bytes | None:
        """Return the bytes of one file, None if it does not exist; `CorruptDataError` if it cannot be read."""
        name = self._prefix + key
        if name not in self.sizes:
            return None
        limit = _MAX_JSON_BYTES if PurePosixPath(key).name.startswith(".z") else _MAX_CHUNK_BYTES
        if self.sizes[name] > limit:
            raise CorruptDataError(f"{self.where(key)}: expected at most {limit} bytes, got {self.sizes[name]}")
        try:
            if self._zip is None:
                return (self._root / name).read_bytes()
            entry = self._zip.getinfo(name)
            if entry.compress_type not in _ZIP_METHODS:
                raise zipfile.BadZipFile(f"zip method {entry.compress_type}, expected stored or deflated")
            # ZipFile.read would inflate up to 2 GB before it looks at the stated size.
            with self._zip.open(entry) as file:
                return file.read(entry.file_size + 1)
        except _READ_ERRORS as error:
            raise CorruptDataError(f"{self.where(key)} cannot be read ({error}); pack it again") from error

    def close(self) -> None:
        if self._zip is not None:
            self._zip.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class ZipStore(Archive):
    """A zip that is safe to read, judged by its directory before anything is read.

    Like the official scorer, a single ``*.zarr`` folder inside counts as the root. Raises `InputError` for a file that
    is not a zip, links, encrypted files, paths out of the archive, other zip methods than stored and deflated, more
    than ``max_bytes`` unpacked, or several ``*.zarr`` folders.
    """

    def __init__(self, location: str | Path, max_bytes: int = MAX_UNPACKED_BYTES) -> None:
        super().__init__(location)
        try:
            self._refuse_unsafe(max_bytes)
            roots = sorted(path for inner in self._inner.values() for path in inner if path.endswith(".zarr"))
            if len(roots) > 1:
                raise InputError(f"{location} holds {len(roots)} .zarr folders ({roots[:3]}...); pack only one")
        except InputError:
            self.close()
            raise
        self._prefix = roots[0] + "/" if roots else ""

    def _refuse_unsafe(self, max_bytes: int) -> None:
        for entry in self.entries:
            for _, found, expected in entry.problems:
                raise InputError(f"{self.location}: {entry.name[:80]!r} is {found}, expected {expected}; pack it again")
        total = sum(entry.size for entry in self.entries)
        if total > max_bytes:
            raise InputError(
                f"{self.location} holds {total / 1024**3:.1f} GB unpacked, more than the accepted "
                f"{max_bytes / 1024**3:.1f} GB; submit labels, not probabilities, in the smallest type that holds them"
            )


def _folder_entries(root: Path) -> Iterator[Entry]:
    """List the files below a folder in sorted order; links are listed, never followed."""
    for folder, subfolders, files in os.walk(root, followlinks=False):
        subfolders.sort()
        base = Path(folder)
        for name in sorted([*files, *(d for d in subfolders if (base / d).is_symlink())]):
            path = base / name
            size = path.lstat().st_size
            yield Entry(path.relative_to(root).as_posix(), size, size, path.is_symlink())


def _zip_entry(info: zipfile.ZipInfo) -> Entry:
    return Entry(
        info.orig_filename,  # zipfile cleans ``filename``
        info.file_size,
        info.compress_size,
        stat.S_ISLNK(info.external_attr >> 16),
        bool(info.flag_bits & 1),
        info.compress_type not in _ZIP_METHODS,
    )


# -- arrays ------------------------------------------------------------------------------------------------------------
class ZarrArray:
    """One plain Zarr v2 array of numbers.

    Attributes:
        store, path: where its files are. shape, chunks: voxels, of any rank. dtype: as stored.
        fill: value of absent chunks. attrs: ``.zattrs``. where: name in messages.

    Raises `MetadataError` if the metadata is invalid or names a codec that is not accepted.
    """

    def __init__(self, store: Store, path: str) -> None:
        meta = store.json(f"{path}/.zarray")
        self.store, self.path, self.where = store, path, store.where(path)
        if meta is None:
            raise MissingError(f"no Zarr v2 array at {self.where}")
        try:
            self.shape = tuple(map(int, meta["shape"]))
            self.chunks = tuple(map(int, meta["chunks"]))
            self.dtype = np.dtype(meta["dtype"])
            fill = meta.get("fill_value")
            self.fill = np.zeros((), self.dtype) if fill is None else np.asarray(fill).astype(self.dtype).reshape(())
            self._order = {"C": "C", "F": "F"}[meta.get("order", "C")]
            self._separator = {".": ".", "/": "/"}[meta.get("dimension_separator", ".")]
            compressor = meta.get("compressor")
            filters = meta.get("filters")
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise MetadataError(f"{self.where}/.zarray is invalid ({type(error).__name__}: {error})") from error
        if self.dtype.kind not in "biuf" or min((*self.shape, 1)) < 0 or min((*self.chunks, 1)) < 1:
            raise MetadataError(f"{self.where}: expected an array of numbers, got {self.dtype} of shape {self.shape}")
        if len(self.chunks) != len(self.shape) or filters:
            raise MetadataError(f"{self.where}: filters and chunks of another rank are not read: {filters}, {meta}")
        count = math.prod(-(-n // c) for n, c in zip(self.shape, self.chunks, strict=True))
        if count > MAX_CHUNKS:
            raise MetadataError(f"{self.where}/.zarray makes {count} chunks, expected at most {MAX_CHUNKS}")
        codec = compressor.get("id") if isinstance(compressor, dict) else compressor
        if codec is not None and codec not in (*_STREAMS, *_STATED_SIZE):
            raise MetadataError(f"{self.where}: compressor {codec!r} is not read; use blosc, zstd or gzip")
        self._codec: str | None = codec
        self.attrs: dict[str, Any] = store.json(f"{path}/.zattrs") or {}
        self._chunk_bytes = math.prod(self.chunks) * self.dtype.itemsize

    def chunk_name(self, index: Sequence[int]) -> str:
        """Return the name of a chunk's file, relative to the array."""
        return self._separator.join(map(str, index))

    def is_chunk(self, name: str) -> bool:
        """Return whether a file name, relative to the array, is that of one of its chunks."""
        parts = name.split(self._separator)
        if len(parts) != len(self.shape) or not all(p.isdecimal() for p in parts):
            return False
        return all(int(p) * c < n for p, n, c in zip(parts, self.shape, self.chunks, strict=True))

    def read(self, begin: Sequence[int] | None = None, shape: Sequence[int] | None = None) -> NDArray[Any]:
        """Return a block inside the array (all of it by default), native byte order, C order.

        Raises `CorruptDataError` naming the chunk that cannot be decoded, `InputError` for more than 16 GB.
        """
        lo = [0] * len(self.shape) if begin is None else [int(b) for b in begin]
        size = list(self.shape) if shape is None else [int(n) for n in shape]
        if math.prod(size) * self.dtype.itemsize > MAX_ARRAY_BYTES:
            raise InputError(f"{self.where}: {size} voxels of {self.dtype} are more than 16 GB; use larger voxels")
        out = np.full(size, self.fill, self.dtype.newbyteorder("="))
        hi = [b + n for b, n in zip(lo, size, strict=True)]
        ranges = [range(b // c, -(-e // c)) for b, e, c in zip(lo, hi, self.chunks, strict=True)]
        for index in np.ndindex(*(len(r) for r in ranges)):
            chunk = [r[i] for r, i in zip(ranges, index, strict=True)]
            values = self._chunk(chunk)
            if values is None:
                continue
            source, target = [], []
            for b, e, c, i in zip(lo, hi, self.chunks, chunk, strict=True):
                first, last = max(b, i * c), min(e, (i + 1) * c)
                source.append(slice(first - i * c, last - i * c))
                target.append(slice(first - b, last - b))
            out[tuple(target)] = values[tuple(source)]
        return out

    def _chunk(self, index: Sequence[int]) -> NDArray[Any] | None:
        key = f"{self.path}/{self.chunk_name(index)}"
        data = self.store.read(key)
        if data is None:
            return None
        where = self.store.where(key)
        if self._chunk_bytes > _MAX_CHUNK_BYTES:
            raise CorruptDataError(f"{where}: chunks of {self._chunk_bytes} bytes are not read; write smaller ones")
        try:
            decoded = self._decode(data)
            if len(decoded) != self._chunk_bytes:
                raise ValueError(f"expected {self._chunk_bytes} bytes, got {len(decoded)}, perhaps more")
        except (RuntimeError, ValueError, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise CorruptDataError(f"{where} cannot be decoded ({error}); write it again") from error
        return np.frombuffer(decoded, self.dtype).reshape(self.chunks, order=self._order)  # type: ignore[call-overload]

    def _decode(self, data: bytes) -> bytes | memoryview:
        if self._codec is None:
            return data
        if self._codec in _STREAMS:
            return _STREAMS[self._codec](data, self._chunk_bytes + 1)
        import numcodecs

        if (stated := int.from_bytes(data[_STATED_SIZE[self._codec]], "little")) != self._chunk_bytes:
            raise ValueError(f"expected {self._chunk_bytes} bytes, its header states {stated}")
        return memoryview(numcodecs.get_codec({"id": self._codec}).decode(data)).cast("B")


def is_array(store: Store, path: str) -> bool:
    """Return whether a plain Zarr v2 array is at ``path``."""
    return store.read(f"{path}/.zarray") is not None
