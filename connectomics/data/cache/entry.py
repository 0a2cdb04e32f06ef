"""One entry of the crop cache: its name, and a folder of plain ``.npy`` files that every process maps.

``entry.json`` describes the files: grids, classes, classes with object IDs, the crop, counts by class, and type, size
and checksums of each file. ``raw.npy`` uint8 (D, H, W): raw with context. ``inside.npy`` bool: where there is raw, or
one True if there is raw everywhere. ``codes.npy`` (d, h, w): rows of ``states.npy`` in the narrowest type, empty if
nothing is known. ``states.npy`` uint64 (K, 2, W), or (K, 2 W + I + F) with object IDs or soft labels, see
`LabelStates.to_array`. ``points.npy`` int32 (n, 3): lattice indices of voxels of each class, one class after the other.
``used`` is touched whenever the entry is opened.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from connectomics.cellmap.label_codes import LabelStates, code_dtype
from connectomics.cellmap.labels import arrays_needed
from connectomics.config.values import read
from connectomics.data.arrays import CropArrays
from connectomics.errors import ConnectomicsError, CorruptDataError
from connectomics.geometry import Index, VoxelGrid, index
from connectomics.io.fingerprint import fingerprints
from connectomics.io.s3 import in_parallel
from connectomics.io.store import is_s3

if TYPE_CHECKING:
    from connectomics.data.volumes import CropVolume

Prints = tuple[str, str]  # with and without the location

FORMAT = "connectomics crop cache"
VERSION = 3  # raise it when decoding or the format changes: old entries are then not found
DESCRIPTION = "entry.json"
USED = "used"
ARRAYS = ("raw.npy", "inside.npy", "codes.npy", "states.npy", "points.npy")
POINTS = 4096  # positions kept of each class: enough that patches differ, small for any crop
_NAME = re.compile(r"[^.].*-[0-9a-f]{20}")
_SMALL = 256 << 10  # files up to this size are checked completely whenever the entry is opened
_PAGE, _PAGES = 4096, 16  # of larger files so many pages, evenly spaced
_READ = 1 << 20
_MAPPED_BYTES, _MAPPED_FILES = 64 << 20, 64  # that a process keeps mapped


# -- the name ----------------------------------------------------------------------------------------------------------
def cache_key(volume: CropVolume) -> str:
    """Return the name of a crop's entry: data set, crop, and a hash of everything that decides the decoded content.

    That is: locations, metadata and chunks (times and sizes, or ETags) of the labels that are read and of the raw
    behind the region, classes, classes with object IDs, lattice, context, intensity range, and `VERSION`.
    """
    crop, (raw, labels) = volume.crop, volume.source_prints
    # the annotation (which values mean unknown) is read from the attributes of the finest level too
    notes = {name: repr(crop.labels[name].annotation) for name in labels}
    content: dict[str, Any] = {
        "version": VERSION,
        "crop": crop.key,
        "classes": volume.classes,
        "grid": volume.grid.to_dict(),
        "raw grid": volume.cached_raw_grid.to_dict(),
        "intensity": None if volume.normalization is None else volume.normalization.range,
        "raw": raw[0],
        "labels": [(name, mark[0], notes[name]) for name, mark in labels.items()],
    }
    if volume.instances:  # entries without object IDs keep the names of earlier versions
        content["instances"] = volume.instances
    if volume.alternate_ties or volume.soft:
        content["ties, soft"] = (volume.alternate_ties, volume.soft)
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return f"{crop.dataset}-{crop.name}-{digest[:20]}"


def source_prints(volume: CropVolume) -> tuple[Prints, dict[str, Prints]]:
    """Return `fingerprints` of the raw behind `CropVolume.cached_raw_grid`, and of each label array that is read."""
    crop = volume.crop
    needed = arrays_needed(crop, volume.classes) if volume.classes else {}
    names = sorted(needed)
    sources = [needed[name].source for name in names]
    labels = in_parallel(fingerprints, sources) if is_s3(crop.raw) else [fingerprints(source) for source in sources]
    return fingerprints(crop.raw_source, volume.cached_raw_grid), dict(zip(names, labels, strict=True))


def is_name(text: str) -> bool:
    """Whether `cache_key` could give this folder name."""
    return _NAME.fullmatch(text) is not None


# -- mapped files ------------------------------------------------------------------------------------------------------
class Maps:
    """Read-only maps of whole files; the most recently used are kept.

    The first touch of every page of a map costs a fault, for a patch half as much as the copy itself. ``limit``: bytes
    kept in all, which count as a process's own memory. A map is used again only while its file is unchanged: reading
    beyond the end of a truncated file would kill the process.
    """

    def __init__(self, limit: int = _MAPPED_BYTES) -> None:
        self._limit = limit
        self._kept: OrderedDict[str, tuple[tuple[int, int, int], mmap.mmap]] = OrderedDict()

    def get(self, path: Path) -> mmap.mmap:
        """Return the file's map. Raises `FileNotFoundError`, or `ValueError` for an empty file."""
        name = str(path)
        found = os.stat(name)
        state = (found.st_ino, found.st_size, found.st_mtime_ns)
        kept = self._kept.pop(name, None)
        if kept is None or kept[0] != state:
            with open(name, "rb") as file:
                kept = state, mmap.mmap(file.fileno(), os.fstat(file.fileno()).st_size, access=mmap.ACCESS_READ)
        if len(kept[1]) <= self._limit:
            self._kept[name] = kept
            total = sum(len(mapped) for _, mapped in self._kept.values())
            while total > self._limit or len(self._kept) > _MAPPED_FILES:
                total -= len(self._kept.popitem(last=False)[1][1])
        return kept[1]

    def __len__(self) -> int:
        return len(self._kept)


_maps = Maps()  # of this process


# -- files and entries -------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class StoredFile:
    """What an ``.npy`` file of an entry must be: ``dtype``, ``shape``, ``offset`` of the data, ``size`` in bytes, and
    CRC-32 of the whole file and of some of its pages (none for small files)."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int
    crc: int
    pages: tuple[int, ...]

    @classmethod
    def describe(cls, path: Path) -> StoredFile:
        """Return the description of a finished file."""
        with path.open("rb") as file:
            shape, dtype = _header(file)
            offset = file.tell()
        size = path.stat().st_size
        pages = () if size <= _SMALL else tuple(_page_sums(path, size))
        return cls(dtype.str, shape, offset, size, _checksum(path), pages)

    def map(self, path: Path) -> NDArray[Any]:
        """Return the array, mapped read-only (see `Maps`)."""
        try:
            mapped = _maps.get(path)
        except (FileNotFoundError, ValueError) as error:
            raise damaged(path.parent, f"{path.name} is missing or empty") from error
        if len(mapped) != self.size:
            raise damaged(path.parent, f"{path.name} has {len(mapped)} bytes, expected {self.size}")
        return np.ndarray(self.shape, np.dtype(self.dtype), mapped, self.offset)

    def check(self, path: Path, *, whole: bool) -> None:
        """Raise `CorruptDataError` if size, header or checksums of the file differ from what was written."""
        try:
            size = path.stat().st_size
            if size != self.size:
                raise damaged(path.parent, f"{path.name} has {size} bytes, expected {self.size}")
            with path.open("rb") as file:
                found = _header(file)
            if found != (self.shape, np.dtype(self.dtype)):
                raise damaged(
                    path.parent,
                    f"{path.name} holds {found[1]} of shape {found[0]}, expected {self.dtype} of shape {self.shape}",
                )
            same = _checksum(path) == self.crc if whole or not self.pages else _page_sums(path, size) == [*self.pages]
        except (FileNotFoundError, ValueError, EOFError) as error:
            raise damaged(path.parent, f"{path.name} is missing or cut short") from error
        if not same:
            raise damaged(path.parent, f"{path.name} does not hold what was written: its checksum differs")


@dataclass(frozen=True)
class CachedCrop:
    """One complete entry, on the crop's lattice."""

    folder: Path
    crop: str  # its key
    raw_grid: VoxelGrid  # the crop with context, as far as the raw volume reaches
    label_grid: VoxelGrid  # the crop's own; lattice index 0 is its first voxel
    states: LabelStates  # what the codes mean
    counts: dict[str, dict[str, int]]  # by class, voxels of label_grid that are present, absent and unknown
    n_points: dict[str, int]  # by class, how many positions are kept
    files: dict[str, StoredFile]

    @property
    def size(self) -> int:
        """Bytes of all arrays."""
        return sum(file.size for file in self.files.values())

    @cached_property
    def raw_begin(self) -> Index:
        """Lattice index of the first voxel of raw."""
        return index(np.round(self.label_grid.to_index(self.raw_grid.translation)).astype(int))

    @property
    def checksums(self) -> tuple[str, str]:
        """Hashes of the decoded raw and labels, with their grids; the place and time of the source do not enter."""
        parts = ((self.raw_grid, "raw.npy", "inside.npy"), (self.label_grid, "codes.npy", "states.npy"))
        texts = [repr((grid.to_dict(), *(self.files[name].crc for name in names))) for grid, *names in parts]
        return hashlib.sha256(texts[0].encode()).hexdigest()[:20], hashlib.sha256(texts[1].encode()).hexdigest()[:20]

    def _map(self, name: str) -> NDArray[Any]:
        return self.files[name].map(self.folder / name)

    def arrays(self) -> CropArrays:
        """Return all arrays, mapped read-only."""
        raw = self._map("raw.npy")
        everywhere = self.files["inside.npy"].shape == (1, 1, 1) and raw.size != 1
        return CropArrays(
            raw=raw, raw_begin=self.raw_begin, inside=None if everywhere else self._map("inside.npy"),
            codes=self._map("codes.npy"), codes_begin=(0, 0, 0), states=self.states,
        )  # fmt: skip

    def points_of(self, name: str) -> NDArray[np.float64]:
        """Return positions (n, 3), nm, of voxels where the class is present, in random order: uniform without
        replacement over all such voxels, at most `POINTS`, the same for a crop and a lattice."""
        begin = 0
        for other, count in self.n_points.items():
            if other == name:
                return self.label_grid.to_world(self._map("points.npy")[begin : begin + count])
            begin += count
        return np.zeros((0, 3))


def describe(
    folder: Path,
    volume: CropVolume,
    counts: Mapping[str, Mapping[str, int]],
    n_points: Mapping[str, int],
    states: LabelStates,
) -> None:
    """Write ``entry.json`` beside complete arrays."""
    content: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "crop": volume.crop.key,
        "classes": list(states.classes),
        "raw_grid": volume.cached_raw_grid.to_dict(),
        "label_grid": volume.grid.to_dict(),
        "counts": counts,
        "points": n_points,
        "files": {name: asdict(StoredFile.describe(folder / name)) for name in ARRAYS},
    }
    if states.instances:
        content["instances"] = list(states.instances)
    (folder / USED).touch()
    (folder / DESCRIPTION).write_text(json.dumps(content), encoding="utf-8")


def open_entry(folder: Path, check: Literal["sizes", "pages", "all"] = "pages") -> CachedCrop:
    """Return the entry in a folder.

    Args:
        check: "sizes" compares sizes when a file is mapped; "pages" compares sizes, headers, and checksums of small
            files and of some pages of large ones; "all" compares every byte's checksum.

    Raises:
        CorruptDataError: a file is missing or differs from what was written.
    """
    try:
        data = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        files = {name: read(StoredFile, data["files"][name], f"{folder / DESCRIPTION}: {name}") for name in ARRAYS}
        raw_grid, label_grid = VoxelGrid.from_dict(data["raw_grid"]), VoxelGrid.from_dict(data["label_grid"])
        classes, instances = (tuple(map(str, names)) for names in (data["classes"], data.get("instances", ())))
        crop, counts, n_points = str(data["crop"]), dict(data["counts"]), dict(data["points"])
    except (ValueError, KeyError, TypeError, FileNotFoundError, ConnectomicsError) as error:
        raise damaged(folder, f"{DESCRIPTION} cannot be read") from error
    for name, file in files.items():
        if check != "sizes":
            file.check(folder / name, whole=check == "all")
    try:
        states = LabelStates.from_array(classes, np.array(files["states.npy"].map(folder / "states.npy")), instances)
    except (ValueError, IndexError) as error:
        if isinstance(error, CorruptDataError):
            raise
        raise damaged(folder, "states.npy cannot be read") from error
    if np.dtype(files["codes.npy"].dtype) != code_dtype(len(states)):
        raise damaged(folder, "codes.npy and states.npy do not fit")
    return CachedCrop(folder, crop, raw_grid, label_grid, states, counts, n_points, files)


def damaged(folder: Path, what: str) -> CorruptDataError:
    """Return the error for an entry that cannot be used."""
    return CorruptDataError(f"the crop cache entry {folder} is damaged ({what}); delete that folder and run again")


def _header(file: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype of an ``.npy`` file; leaves ``file`` at the start of the data."""
    np.lib.format.read_magic(file)
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if fortran:
        raise ValueError("Fortran order")
    return shape, dtype


def _checksum(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(_READ):
            crc = zlib.crc32(block, crc)
    return crc


def _page_sums(path: Path, size: int) -> list[int]:
    sums = []
    with path.open("rb") as file:
        for place in np.linspace(0, size - _PAGE, _PAGES).astype(int):
            file.seek(int(place))
            sums.append(zlib.crc32(file.read(_PAGE)))
    return sums
