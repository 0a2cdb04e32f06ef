"""Crops decoded once, at the run's voxel size, into local memory-mapped files.

An entry is a folder named after a hash of everything that decides its content: the crop's locations and metadata, the
times and sizes of its label files, which raw chunks are stored, classes, voxel size, context, intensity range and the
version of this code. It holds plain ``.npy`` files that every worker maps, so a patch costs a memory copy. A folder
appears under its name only when it is whole (made under a temporary name, then renamed), so two processes may build the
same entry: the first wins. A file that is missing or cut short afterwards is an error that names the entry.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from connectomics.cellmap.catalog import Crop
from connectomics.cellmap.labels import LabelVolume, words_for
from connectomics.errors import ConnectomicsError, CorruptDataError, WriteError
from connectomics.geometry import VoxelGrid
from connectomics.io.store import is_s3

_VERSION = 1  # raise it when decoding changes: old entries are then simply not found
_BLOCK = (128, 128, 128)


class Decodable(Protocol):
    """What the cache needs of a crop: what decides its content, and the plain way to decode it (a `CropVolume`)."""

    @property
    def crop(self) -> Crop: ...
    @property
    def classes(self) -> tuple[str, ...]: ...
    @property
    def context(self) -> tuple[int, int, int]: ...
    @property
    def intensity_range(self) -> tuple[float, float] | None: ...
    @property
    def grid(self) -> VoxelGrid: ...
    def decode_raw(self, grid: VoxelGrid) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]: ...
    def decode_labels(self, grid: VoxelGrid) -> LabelVolume: ...


def default_cache_dir() -> Path:
    """The user's cache folder for this program (``XDG_CACHE_HOME`` is honoured)."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "connectomics" / "crops"


@dataclass(frozen=True)
class CachedCrop:
    """One whole entry: raw with context, and labels, on the crop's lattice."""

    folder: Path
    grid: VoxelGrid
    label_grid: VoxelGrid
    classes: tuple[str, ...]

    def _map(self, name: str) -> NDArray[np.generic]:
        """One of the entry's arrays, mapped for this read only: a map kept open holds a file descriptor, and four for
        each of the challenge's crops are more than a process may have (1024 as a rule)."""
        dtype = _DTYPES[name]
        shape: tuple[int, ...] = self.grid.shape
        if name in ("present", "known"):
            shape = (words_for(len(self.classes)), *self.label_grid.shape)
        try:
            mapped = np.load(self.folder / f"{name}.npy", mmap_mode="r")
        except (FileNotFoundError, ValueError, EOFError) as error:
            raise _damaged(self.folder, f"{name}.npy is missing or cut short") from error
        if mapped.shape != shape or mapped.dtype != dtype:
            found = f"{mapped.dtype} of shape {mapped.shape}"
            raise _damaged(self.folder, f"{name}.npy holds {found}, expected {np.dtype(dtype)} of shape {shape}")
        return mapped

    def holds(self, grid: VoxelGrid) -> bool:
        """Whether the whole of ``grid`` is among the cached raw."""
        begin = np.round(self.grid.to_index(grid.translation))
        return bool(np.all(begin >= 0) and np.all(begin + grid.shape <= self.grid.shape))

    def read_raw(self, grid: VoxelGrid) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """Raw and the mask of where there is raw; ``grid`` must be held."""
        begin = [int(b) for b in np.round(self.grid.to_index(grid.translation))]
        at = tuple(slice(b, b + n) for b, n in zip(begin, grid.shape, strict=True))
        return np.array(self._map("raw")[at], np.uint8), np.array(self._map("inside")[at], bool)

    def read_labels(self, grid: VoxelGrid) -> LabelVolume:
        """Labels on any grid of the lattice; unknown beyond the crop."""
        shape = (words_for(len(self.classes)), *grid.shape)
        present, known = np.zeros(shape, np.uint64), np.zeros(shape, np.uint64)
        begin = np.round(self.label_grid.to_index(grid.translation)).astype(int)
        lo = np.maximum(begin, 0)
        hi = np.minimum(begin + grid.shape, self.label_grid.shape)
        if np.all(hi > lo):
            source = (slice(None), *(slice(int(a), int(b)) for a, b in zip(lo, hi, strict=True)))
            target = (slice(None), *(slice(int(a), int(b)) for a, b in zip(lo - begin, hi - begin, strict=True)))
            present[target] = self._map("present")[source]
            known[target] = self._map("known")[source]
        return LabelVolume(grid, self.classes, present, known)


_DTYPES: dict[str, type[np.generic]] = {"raw": np.uint8, "inside": np.bool_, "present": np.uint64, "known": np.uint64}


def _damaged(entry: Path, what: str) -> CorruptDataError:
    return CorruptDataError(f"the crop cache entry {entry} is damaged ({what}); delete that folder and run again")


class CropCache:
    """The entries below one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, volume: Decodable) -> CachedCrop:
        """The entry of a crop, built first where it is not there."""
        return self.open(self.ensure(volume), volume)

    def ensure(self, volume: Decodable) -> Path:
        """The folder of the crop's entry, built where it is not there."""
        entry = self.folder / cache_key(volume)
        if not (entry / "entry.json").is_file():
            self._build(volume, entry)
        return entry

    @staticmethod
    def open(entry: Path, volume: Decodable) -> CachedCrop:
        """An entry that `ensure` made; `CorruptDataError` where it cannot be read."""
        try:
            grid = VoxelGrid.from_dict(json.loads((entry / "entry.json").read_text(encoding="utf-8"))["grid"])
        except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
            raise _damaged(entry, "entry.json cannot be read") from error
        return CachedCrop(entry, grid, volume.grid, volume.classes)

    def _build(self, volume: Decodable, entry: Path) -> None:
        grid = volume.grid.grow(volume.context)
        temporary = entry.with_name(f".{entry.name}-{uuid.uuid4().hex[:8]}")
        try:
            temporary.mkdir(parents=True)
            words = words_for(len(volume.classes))
            raw = _new(temporary, "raw", grid.shape)
            inside = _new(temporary, "inside", grid.shape)
            for begin, block in grid.blocks(_BLOCK):
                at = tuple(slice(b, b + n) for b, n in zip(begin, block.shape, strict=True))
                raw[at], inside[at] = volume.decode_raw(block)
            present = _new(temporary, "present", (words, *volume.grid.shape))
            known = _new(temporary, "known", (words, *volume.grid.shape))
            for begin, block in volume.grid.blocks(_BLOCK):
                at = (slice(None), *(slice(b, b + n) for b, n in zip(begin, block.shape, strict=True)))
                labels = volume.decode_labels(block)
                present[at], known[at] = labels.present, labels.known
            for array in (raw, inside, present, known):
                array.flush()
            content = {"grid": grid.to_dict(), "crop": volume.crop.key, "classes": list(volume.classes)}
            (temporary / "entry.json").write_text(json.dumps(content), encoding="utf-8")
            try:
                temporary.rename(entry)
            except OSError:
                if not (entry / "entry.json").is_file():  # else another process was first, with the same content
                    entry.rename(temporary / "damaged")  # in one step, and gone with the temporary folder
                    temporary.rename(entry)
        except OSError as error:
            if isinstance(error, ConnectomicsError):
                raise  # what was read was at fault, not the cache
            raise WriteError(
                f"could not write the crop cache below {self.folder} ({error.strerror or error}); "
                "free some space or set data.cache_dir to another folder"
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _new(folder: Path, name: str, shape: tuple[int, ...]) -> np.memmap:
    path = folder / f"{name}.npy"
    array = np.lib.format.open_memmap(path, mode="w+", dtype=_DTYPES[name], shape=shape)
    if hasattr(os, "posix_fallocate"):
        # a mapped file is sparse: on a full disk, writing to it would kill the process (SIGBUS) without a word
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def cache_key(volume: Decodable) -> str:
    """A hash of everything that decides the decoded content of a crop."""
    crop = volume.crop
    content = {
        "version": _VERSION,
        "crop": crop.key,
        "classes": volume.classes,
        "grid": volume.grid.to_dict(),
        "context": volume.context,
        "intensity": volume.intensity_range,
        "raw": _fingerprint(crop.raw, depth=2),
        "raw chunks": _raw_chunks(volume),
        "labels": {name: _fingerprint(label.location, depth=None) for name, label in sorted(crop.labels.items())},
    }
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return f"{crop.dataset}-{crop.name}-{digest[:20]}"


def _raw_chunks(volume: Decodable) -> str:
    """Which raw chunks behind the entry are stored, as a bitmap in hexadecimal: raw fetched later must count. Remote
    raw is taken for whole."""
    if is_s3(volume.crop.raw):
        return ""
    present = volume.crop.raw_source.stored_chunks(volume.grid.grow(volume.context))
    return f"{present.shape} {np.packbits(present).tobytes().hex()}"


def _fingerprint(location: str, depth: int | None) -> list[object]:
    """Names, sizes and times of the files below a local folder, ``depth`` levels down (None: all); the raw volume's
    chunks are too many to look at, so there only metadata counts. A remote location counts by its name."""
    root = Path(location)
    if not root.is_dir():
        return [location]
    found: list[object] = [str(root.resolve())]
    metadata = (".z*", "*/.z*", "zarr.json", "*/zarr.json")
    for path in sorted(root.rglob("*") if depth is None else {p for m in metadata for p in root.glob(m)}):
        if path.is_file():
            stat = path.stat()
            found.append((str(path.relative_to(root)), stat.st_size, stat.st_mtime_ns))
    return found
