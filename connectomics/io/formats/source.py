"""`open_volume`: a volume in any known format as a three-dimensional array that is read by blocks.

To add a format, call `register_format`, or add a line to `FORMATS` and write its ``open_{name}(path, inner)`` in the
module named there.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.errors import InputError, MissingError, nearest
from connectomics.geometry import Triple, slices_of

#: Reads ``shape`` voxels from index ``begin`` (z y x); the block must lie inside the volume.
Reader = Callable[[Sequence[int], Sequence[int]], NDArray[Any]]

#: Opens a file, or the array of that name within it (None: the only one).
Opener = Callable[[Path, str | None], "VolumeSource"]

#: Name of a format -> module of this package with ``open_{name}(path, inner)``, or a function; and the file endings.
FORMATS: dict[str, tuple[str | Opener, tuple[str, ...]]] = {
    "tiff": ("tiff", (".tif", ".tiff")),
    "mrc": ("image_files", (".mrc", ".rec", ".map")),
    "nrrd": ("image_files", (".nrrd", ".nhdr")),
    "npy": ("image_files", (".npy", ".npz")),
    "hdf5": ("chunked", (".h5", ".hdf5", ".hdf")),
    "n5": ("chunked", (".n5",)),
    "zarr": ("chunked", (".zarr",)),
    "precomputed": ("chunked", (".precomputed",)),
}


@dataclass(frozen=True)
class VolumeSource:
    """A volume that is open for reading.

    Attributes:
        location: path, for messages.
        shape: voxels, z y x.
        dtype: as stored.
        read: reads a block inside the volume; see `Reader`.
        voxel_size: nm, z y x; None if the file does not give it, or gives it in pixels.
        begin: nm, z y x: outer face of the first voxel; None if the file does not give it.
        by_plane: reading a block costs as much as reading all of its planes, so callers should read few planes at once.
        close: closes the file.
    """

    location: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Reader = field(compare=False, repr=False)
    voxel_size: Triple | None = None
    begin: Triple | None = None
    by_plane: bool = False
    close: Callable[[], None] = field(default=lambda: None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if min(self.shape, default=1) < 1:
            raise InputError(f"{self.location} has no voxels (its shape is {tuple(self.shape)}); write it again")
        if len(self.shape) != 3:
            raise InputError(
                f"{self.location} has shape {tuple(self.shape)}, expected three axes (z, y, x); "
                f"give a single-channel volume without time points"
            )
        if self.dtype.kind not in "biuf":
            raise InputError(f"{self.location} holds {self.dtype}, expected bool, integers or floats")

    @classmethod
    def of(cls, location: str, array: Any, **known: Any) -> VolumeSource:
        """Return a source for anything that slices like a numpy array (memory maps, HDF5 data sets)."""

        def read(begin: Sequence[int], shape: Sequence[int]) -> NDArray[Any]:
            return np.asarray(array[slices_of(begin, shape)])

        return cls(location, tuple(map(int, array.shape)), np.dtype(array.dtype), read, **known)

    def __enter__(self) -> VolumeSource:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def open_volume(location: str | Path, format_name: str | None = None) -> VolumeSource:
    """Open a volume of any known format.

    Args:
        location: a file, or a folder (a stack of TIFF sections, N5, Zarr, precomputed). Name an array within a
            container after a colon: ``labels.h5:/volumes/mito``, ``raw.n5:/s0`` (or as a path: ``raw.n5/s0``).
        format_name: one of `FORMATS`; needed if the name does not tell.

    Raises:
        MissingError: nothing exists there, or an optional library is not installed.
        InputError: unknown format, or not three axes.
        MetadataError, CorruptDataError: raised by the format's reader.
    """
    path, inner = _split(str(location))
    if format_name is not None and format_name not in FORMATS:
        close = nearest(format_name, FORMATS)
        hint = f"; did you mean {close!r}?" if close else ""
        raise InputError(f"unknown format {format_name!r}{hint} Known: {', '.join(FORMATS)}")
    if not path.exists():
        raise MissingError(f"nothing at {path}; give the file or folder that holds the volume")
    name = format_name or _guess(path)
    opener = FORMATS[name][0]
    if isinstance(opener, str):
        opener = getattr(importlib.import_module(f"connectomics.io.formats.{opener}"), f"open_{name}")
    return opener(path, inner)


def register_format(name: str, opener: Opener, endings: Sequence[str]) -> None:
    """Register a file format, which `ingest` and `open_volume` then read; one registered before is replaced.

    Args:
        name: of the format, for ``--format``.
        opener: takes the path and the name of an array within the file (None if none was given), and returns a
            `VolumeSource`; `VolumeSource.of` makes one of anything that slices like a numpy array.
        endings: of file names, such as ``(".raw",)``; lower case.

    Raises:
        InputError: the name or an ending belongs to a format of this package.
    """
    for known, (there, taken) in FORMATS.items():
        if isinstance(there, str) and (known == name or set(taken) & set(endings)):
            raise InputError(f"format {known} of this package reads {' '.join(taken)}; choose another name and ending")
    FORMATS[name] = (opener, tuple(endings))


def optional(module: str, package: str) -> Any:
    """Import an optional library; raise a `MissingError` with the install command if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingError(
            f"reading this format needs {package}, which is not installed: pip install 'connectomics-cellmap[formats]'"
        ) from error


def _split(location: str) -> tuple[Path, str | None]:
    """A container and the array named after a colon, ``a.h5:/raw``; a colon in a file's own name stays."""
    head, _, inner = location.rpartition(":")
    if not head or Path(location).exists():
        return Path(location).expanduser(), None
    return Path(head).expanduser(), inner.strip("/")


def _guess(path: Path) -> str:
    if path.is_dir():
        if (path / "info").is_file():
            return "precomputed"
        if any((path / name).is_file() for name in (".zattrs", ".zgroup", ".zarray", "zarr.json")):
            return "zarr"
        if any((p / "attributes.json").is_file() for p in (path, *path.parents)):
            return "n5"
        if any(p.suffix.lower() in FORMATS["tiff"][1] for p in path.iterdir()):
            return "tiff"
    for name, (_, endings) in FORMATS.items():
        if path.suffix.lower() in endings:
            return name
    known = " ".join(ending for _, endings in FORMATS.values() for ending in endings)
    raise InputError(f"{path}: unknown format; expected one of {known} or a folder of TIFF sections (or give --format)")
