"""One entry of the crop cache: a folder of plain ``.npy`` files that every process maps.

``entry.json`` says what they are: grids, classes, which of them have their objects told apart, the crop, counts by
class, and of each file its type, size and checksums. ``raw.npy`` uint8 (D, H, W), raw with context; ``inside.npy``
bool, where there is raw, or one True where there is raw everywhere; ``codes.npy`` (d, h, w) with the narrowest type
that numbers the states, empty where nothing is known; ``states.npy`` uint64 (K, 2, W), or (K, 2 W + I) with ids of
objects, see `LabelStates.to_array`; ``points.npy`` int32 (n, 3), lattice indices of voxels of each class, one class
after the other. ``used`` is touched whenever the entry is opened.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from connectomics.cellmap.label_codes import LabelStates, code_dtype
from connectomics.data.arrays import CropArrays
from connectomics.data.cache.maps import Maps
from connectomics.errors import CorruptDataError
from connectomics.geometry import Index, VoxelGrid

FORMAT = "connectomics crop cache"
DESCRIPTION = "entry.json"
USED = "used"
ARRAYS = ("raw.npy", "inside.npy", "codes.npy", "states.npy", "points.npy")
_SMALL = 256 << 10  # files up to this size are checked whole whenever the entry is opened
_PAGE, _PAGES = 4096, 16  # of larger ones these many pages, evenly spaced
_READ = 1 << 20


_maps = Maps()  # of this process


@dataclass(frozen=True)
class StoredFile:
    """What an ``.npy`` file of an entry must be: ``dtype``, ``shape``, ``offset`` of the data in it, its ``size`` in
    bytes, the CRC-32 of the whole file, and those of some of its pages (none for small files)."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int
    crc: int
    pages: tuple[int, ...]

    @classmethod
    def describe(cls, path: Path) -> StoredFile:
        """The description of a file that has been written."""
        with path.open("rb") as file:
            shape, dtype = _header(file)
            offset = file.tell()
        size = path.stat().st_size
        pages = () if size <= _SMALL else tuple(_page_sums(path, size))
        return cls(dtype.str, shape, offset, size, _checksum(path), pages)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> StoredFile:
        """The inverse of ``dataclasses.asdict``."""
        shape, pages = tuple(int(n) for n in data["shape"]), tuple(int(n) for n in data["pages"])
        return cls(str(data["dtype"]), shape, int(data["offset"]), int(data["size"]), int(data["crc"]), pages)

    def map(self, path: Path) -> NDArray[Any]:
        """The array, read-only, mapped for as long as something refers to it (see `Maps`)."""
        try:
            mapped = _maps.get(path)
        except (FileNotFoundError, ValueError) as error:
            raise damaged(path.parent, f"{path.name} is missing or empty") from error
        if len(mapped) != self.size:
            raise damaged(path.parent, f"{path.name} has {len(mapped)} bytes, expected {self.size}")
        return np.ndarray(self.shape, np.dtype(self.dtype), mapped, self.offset)

    def check(self, path: Path, *, whole: bool) -> None:
        """Raise `CorruptDataError` where the file is not what was written: its size, its header, its checksums."""
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
    """One whole entry, on the crop's lattice.

    Attributes:
        folder: where it is.
        crop: the crop's key.
        raw_grid: what raw is there (the crop with context, as far as the raw volume reaches).
        label_grid: the crop's own grid; lattice index 0 is its first voxel.
        states: what the codes mean.
        counts: by class, voxels of ``label_grid`` that are ``present``, ``absent`` and ``unknown``.
        n_points: by class, how many positions are kept.
        files: what each file must be.
    """

    folder: Path
    crop: str
    raw_grid: VoxelGrid
    label_grid: VoxelGrid
    states: LabelStates
    counts: dict[str, dict[str, int]]
    n_points: dict[str, int]
    files: dict[str, StoredFile]

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes, in order of their bits."""
        return self.states.classes

    @property
    def size(self) -> int:
        """Bytes of all arrays."""
        return sum(file.size for file in self.files.values())

    @cached_property
    def raw_begin(self) -> Index:
        """Lattice index of the first voxel of raw."""
        begin = np.round(self.label_grid.to_index(self.raw_grid.translation)).astype(int)
        return int(begin[0]), int(begin[1]), int(begin[2])

    def _map(self, name: str) -> NDArray[Any]:
        return self.files[name].map(self.folder / name)

    def arrays(self) -> CropArrays:
        """All of it, mapped for this read, read-only."""
        raw = self._map("raw.npy")
        everywhere = self.files["inside.npy"].shape == (1, 1, 1) and raw.size != 1
        inside = None if everywhere else self._map("inside.npy")
        return CropArrays(
            raw=raw,
            raw_begin=self.raw_begin,
            inside=inside,
            codes=self._map("codes.npy"),
            codes_begin=(0, 0, 0),
            states=self.states,
        )

    def points_of(self, name: str) -> NDArray[np.float64]:
        """Positions (n, 3), nm, of voxels where the class is present, in random order: uniform without replacement over
        all such voxels, at most 4096, the same for a crop and a lattice whatever else is asked for."""
        begin = 0
        for other, count in self.n_points.items():
            if other == name:
                return self.label_grid.to_world(self._map("points.npy")[begin : begin + count])
            begin += count
        return np.zeros((0, 3))

    @property
    def points(self) -> dict[str, NDArray[np.float64]]:
        """`points_of` every class."""
        return {name: self.points_of(name) for name in self.classes}


def describe(
    folder: Path,
    crop: str,
    raw_grid: VoxelGrid,
    label_grid: VoxelGrid,
    counts: Mapping[str, Mapping[str, int]],
    n_points: Mapping[str, int],
    states: LabelStates,
    version: int,
) -> None:
    """Write ``entry.json`` beside arrays that are complete."""
    content: dict[str, Any] = {
        "format": FORMAT,
        "version": version,
        "crop": crop,
        "classes": list(states.classes),
        "raw_grid": raw_grid.to_dict(),
        "label_grid": label_grid.to_dict(),
        "counts": counts,
        "points": n_points,
        "files": {name: asdict(StoredFile.describe(folder / name)) for name in ARRAYS},
    }
    if states.instances:
        content["instances"] = list(states.instances)
    (folder / USED).touch()
    (folder / DESCRIPTION).write_text(json.dumps(content), encoding="utf-8")


def open_entry(folder: Path, check: Literal["sizes", "pages", "all"] = "pages") -> CachedCrop:
    """The entry in a folder.

    Args:
        check: "sizes" looks at what is opened only; "pages" compares sizes, headers, and checksums of small files and
            of some pages of the large ones; "all" those of every byte.

    Raises:
        CorruptDataError: something of it is missing or not what was written.
    """
    try:
        data = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        files = {name: StoredFile.from_dict(data["files"][name]) for name in ARRAYS}
        raw_grid, label_grid = VoxelGrid.from_dict(data["raw_grid"]), VoxelGrid.from_dict(data["label_grid"])
        classes = tuple(str(name) for name in data["classes"])
        instances = tuple(str(name) for name in data.get("instances", ()))  # entries of runs without have no such key
        crop, counts, n_points = str(data["crop"]), dict(data["counts"]), dict(data["points"])
    except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
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
    """The error of an entry that cannot be used."""
    return CorruptDataError(f"the crop cache entry {folder} is damaged ({what}); delete that folder and run again")


def _header(file: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype of an ``.npy`` file; ``file`` is left at the begin of the data."""
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
