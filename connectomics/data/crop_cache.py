"""Crops decoded once, at the run's voxel size, into local memory-mapped files.

An entry is a folder named after a hash of everything that decides its content: the crop's locations and metadata, the
times and sizes of its label files, classes, voxel size, context, intensity range and the version of this code. It
holds plain ``.npy`` files that every worker maps, so a patch costs a memory copy. A folder appears under its name only
when it is whole (made under a temporary name, then renamed), so two processes may build the same entry: the first wins.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from connectomics.cellmap.labels import LabelVolume, words_for
from connectomics.errors import CorruptDataError, WriteError
from connectomics.geometry import VoxelGrid

if TYPE_CHECKING:
    from connectomics.data.volumes import CropVolume

_VERSION = 1  # raise it when decoding changes: old entries are then simply not found
_BLOCK = (128, 128, 128)


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

    @cached_property
    def _maps(self) -> dict[str, NDArray[np.generic]]:
        return {name: np.load(self.folder / f"{name}.npy", mmap_mode="r") for name in _FILES}

    def holds(self, grid: VoxelGrid) -> bool:
        """Whether the whole of ``grid`` is among the cached raw."""
        begin = np.round(self.grid.to_index(grid.translation))
        return bool(np.all(begin >= 0) and np.all(begin + grid.shape <= self.grid.shape))

    def read_raw(self, grid: VoxelGrid) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """Raw and the mask of where there is raw; ``grid`` must be held."""
        begin = [int(b) for b in np.round(self.grid.to_index(grid.translation))]
        at = tuple(slice(b, b + n) for b, n in zip(begin, grid.shape, strict=True))
        return np.array(self._maps["raw"][at], np.uint8), np.array(self._maps["inside"][at], bool)

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
            present[target] = self._maps["present"][source]
            known[target] = self._maps["known"][source]
        return LabelVolume(grid, self.classes, present, known)


_FILES = ("raw", "inside", "present", "known")


class CropCache:
    """The entries below one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, volume: CropVolume) -> CachedCrop:
        """The entry of a crop, built first where it is not there."""
        return self._open(self.ensure(volume), volume)

    def ensure(self, volume: CropVolume) -> Path:
        """The folder of the crop's entry, built where it is not there."""
        entry = self.folder / cache_key(volume)
        if not (entry / "entry.json").is_file():
            self._build(volume, entry)
        return entry

    def _open(self, entry: Path, volume: CropVolume) -> CachedCrop:
        try:
            grid = VoxelGrid.from_dict(json.loads((entry / "entry.json").read_text(encoding="utf-8"))["grid"])
        except (json.JSONDecodeError, KeyError) as error:
            raise CorruptDataError(
                f"the crop cache entry {entry} is damaged; delete that folder and run again"
            ) from error
        return CachedCrop(entry, grid, volume.grid, volume.classes)

    def _build(self, volume: CropVolume, entry: Path) -> None:
        grid = volume.grid.grow(volume.context)
        temporary = entry.with_name(f".{entry.name}-{uuid.uuid4().hex[:8]}")
        try:
            temporary.mkdir(parents=True)
            words = words_for(len(volume.classes))
            raw = _new(temporary, "raw", np.uint8, grid.shape)
            inside = _new(temporary, "inside", np.bool_, grid.shape)
            for begin, block in grid.blocks(_BLOCK):
                at = tuple(slice(b, b + n) for b, n in zip(begin, block.shape, strict=True))
                raw[at], inside[at] = volume.decode_raw(block)
            present = _new(temporary, "present", np.uint64, (words, *volume.grid.shape))
            known = _new(temporary, "known", np.uint64, (words, *volume.grid.shape))
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
                    raise
        except OSError as error:
            if isinstance(error, CorruptDataError):
                raise
            raise WriteError(
                f"could not write the crop cache below {self.folder} ({error.strerror or error}); "
                "free some space or set data.cache_dir to another folder"
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _new(folder: Path, name: str, dtype: type[np.generic], shape: tuple[int, ...]) -> np.memmap:
    return np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=dtype, shape=shape)


def cache_key(volume: CropVolume) -> str:
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
        "labels": {name: _fingerprint(label.location, depth=None) for name, label in sorted(crop.labels.items())},
    }
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return f"{crop.dataset}-{crop.name}-{digest[:20]}"


def _fingerprint(location: str, depth: int | None) -> list[object]:
    """Names, sizes and times of the files below a local folder, ``depth`` levels down (None: all); the raw volume's
    chunks are too many to look at, so there only metadata counts. A remote location counts by its name."""
    root = Path(location)
    if not root.is_dir():
        return [location]
    found: list[object] = [str(root.resolve())]
    for path in sorted(root.rglob("*") if depth is None else [p for p in root.glob("*")] + [*root.glob("*/.z*")]):
        if path.is_file():
            stat = path.stat()
            found.append((str(path.relative_to(root)), stat.st_size, stat.st_mtime_ns))
    return found
