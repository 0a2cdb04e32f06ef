"""Looking into a submission, zip or folder, without unpacking it: names and sizes first, then one chunk at a time."""

from __future__ import annotations

import os
import stat
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.errors import CorruptDataError, InputError, MetadataError, MissingError
from connectomics.metrics.challenge.zarr_v2 import MAX_DEPTH, ZIP_ERRORS, ZIP_METHODS, Store, ZarrArray, read_entry

#: The largest file that is ever read, bytes; the official packer's chunks are 64^3.
MAX_CHUNK_BYTES = 1 << 30
_MAX_JSON_BYTES = 8 << 20


@dataclass(frozen=True)
class Entry:
    """One file: its name in the archive, bytes unpacked and as stored, and whether it is a link, encrypted, or packed
    in a way that cannot be unpacked piece by piece."""

    name: str
    size: int
    stored: int
    is_link: bool = False
    is_encrypted: bool = False
    is_strange: bool = False


class Archive(Store):
    """The files of a zip or of a folder, by name, listed whatever they are and read one by one. Use it with ``with``.

    Unlike the scorer's stores it does not refuse what is not safe, so that a check can name all of it.
    """

    def __init__(self, location: str | Path) -> None:
        """Lists the files and reads none. `MissingError` where nothing is there, `InputError` where it is no zip."""
        self.location = str(location)
        self._root = Path(location)
        self._zip: zipfile.ZipFile | None = None
        if self._root.is_dir():
            self.entries = list(_walk(self._root))
        elif self._root.is_file():
            self._zip, self.entries = _listed(self._root)
        else:
            raise MissingError(f"no submission at {location}; give a .zip file or the folder of a Zarr group")
        self.sizes = {entry.name: entry.size for entry in self.entries if not entry.name.endswith("/")}
        self._files: dict[str, list[str]] = {}
        self._inner: dict[str, set[str]] = {}
        for name in self.sizes:
            if name.count("/") > MAX_DEPTH:  # nothing of ours, and its folders' names alone could fill the memory
                continue
            parent, _, base = name.rpartition("/")
            self._files.setdefault(parent, []).append(base)
            while parent and parent not in self._inner.setdefault(parent.rpartition("/")[0], set()):
                self._inner[parent.rpartition("/")[0]].add(parent)
                parent = parent.rpartition("/")[0]

    @property
    def is_zip(self) -> bool:
        """Whether it is a zip (else a folder)."""
        return self._zip is not None

    def __contains__(self, name: str) -> bool:
        return name in self.sizes

    def folders(self, key: str = "") -> list[str]:
        """Names of the folders directly in the folder ``key`` (by default at the top), sorted."""
        return sorted(inner.rpartition("/")[2] for inner in self._inner.get(key, ()))

    def files_below(self, path: str) -> list[str]:
        """Names, relative to ``path``, of all files in that folder and the folders below it."""
        found = list(self._files.get(path, ()))
        for inner in self.folders(path):
            found += [f"{inner}/{name}" for name in self.files_below(f"{path}/{inner}" if path else inner)]
        return found

    def read(self, key: str) -> bytes | None:
        """The bytes of one file, None where there is none; `CorruptDataError` naming it where it cannot be read."""
        if key not in self.sizes:
            return None
        where = f"{self.location}: {key}"
        limit = _MAX_JSON_BYTES if key.rpartition("/")[2].startswith(".z") else MAX_CHUNK_BYTES
        if self.sizes[key] > limit:
            raise CorruptDataError(f"{where} has {self.sizes[key]} bytes, more than the {limit} that are read")
        try:
            if self._zip is None:
                return (self._root / key).read_bytes()
            return read_entry(self._zip, self._zip.getinfo(key))
        except ZIP_ERRORS as error:
            raise CorruptDataError(f"{where} cannot be read ({error}); pack it again") from error

    def close(self) -> None:
        """Close the zip file."""
        if self._zip is not None:
            self._zip.close()

    def __enter__(self) -> Archive:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class ArchivedArray(ZarrArray):
    """One plain Zarr v2 array in an archive, read chunk by chunk.

    Attributes:
        path: in the archive (``crop557/mito``). shape, chunks: voxels. dtype: as stored. attrs: its attributes.
    """

    def __init__(self, archive: Archive, path: str) -> None:
        """Reads the metadata; raises `MetadataError` where it is not a Zarr v2 array that can be decoded here."""
        meta = archive.json(f"{path}/.zarray")
        if meta is not None and meta.get("zarr_format") != 2:
            raise MetadataError(f"{path}/.zarray says zarr_format {meta.get('zarr_format')!r}, expected 2")
        super().__init__(archive, path)
        self.archive, self.path, self.chunks = archive, path, self._chunks

    def chunk_name(self, index: Sequence[int]) -> str:
        """The name of a chunk's file, relative to the array."""
        return self._separator.join(map(str, index))

    def is_chunk(self, name: str) -> bool:
        """Whether a file name, relative to the array, is that of one of its chunks."""
        parts = name.split(self._separator)
        if len(parts) != len(self.shape) or not all(p.isdecimal() for p in parts):
            return False
        return all(int(p) * c < n for p, n, c in zip(parts, self.shape, self.chunks, strict=True))

    def slabs(self) -> Iterator[NDArray[Any] | None]:
        """The array as consecutive slabs along the first axis, one chunk thick; None for a slab with nothing stored.

        Raises `CorruptDataError` with the path of a chunk that cannot be decoded or has the wrong size.
        """
        counts = [-(-n // c) for n, c in zip(self.shape, self.chunks, strict=True)]
        for first in range(counts[0]):
            names = (f"{self.path}/{self.chunk_name((first, *rest))}" for rest in np.ndindex(*counts[1:]))
            if self._fill == 0 and not any(name in self.archive for name in names):
                yield None
                continue
            begin = first * self.chunks[0]
            thick = min(self.chunks[0], self.shape[0] - begin)
            yield self.read((begin, 0, 0), (thick, *self.shape[1:]))


def _walk(root: Path) -> Iterator[Entry]:
    """The files below a folder in sorted order; links are listed, never followed."""
    for folder, subfolders, files in os.walk(root, followlinks=False):
        subfolders.sort()
        base = Path(folder)
        for name in sorted([*files, *(d for d in subfolders if (base / d).is_symlink())]):
            path = base / name
            relative = path.relative_to(root).as_posix()
            size = path.lstat().st_size
            yield Entry(relative, size, size, path.is_symlink())


def _listed(path: Path) -> tuple[zipfile.ZipFile, list[Entry]]:
    """The opened zip and its files."""
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise InputError(f"{path} cannot be opened as a zip ({error}); pack it again") from error
    entries = [
        Entry(
            # zipfile cleans names where it reads them; what counts is what stands in the archive
            info.orig_filename,
            info.file_size,
            info.compress_size,
            stat.S_ISLNK(info.external_attr >> 16),
            bool(info.flag_bits & 1),
            info.compress_type not in ZIP_METHODS,
        )
        for info in archive.infolist()
    ]
    return archive, entries
