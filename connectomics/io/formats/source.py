"""What every format gives: a three-dimensional array that is read by blocks, and where it lies, as far as it says."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.errors import InputError, MissingError, nearest
from connectomics.geometry import Triple

#: Reads ``shape`` voxels from index ``begin`` (z y x), which lie inside.
Reader = Callable[[Sequence[int], Sequence[int]], NDArray[Any]]


@dataclass(frozen=True)
class VolumeSource:
    """A volume that is open for reading.

    Attributes:
        location: path, for people. shape: voxels, z y x. dtype: as stored.
        read: reads a block that lies inside; see `Reader`.
        voxel_size: nm, z y x; None where the file does not say, or says it in pixels.
        begin: nm, z y x: where the first voxel's outer face lies; None where the file does not say.
        by_plane: whether a block costs as much as all of its planes, so that reading few planes at a time is cheap.
        close: ends it.
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
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise InputError(
                f"{self.location} has shape {tuple(self.shape)}, expected three axes (z, y, x); "
                f"give a single-channel volume without time points"
            )
        if self.dtype.kind not in "biuf":
            raise InputError(f"{self.location} holds {self.dtype}, expected bool, integers or floats")

    def __enter__(self) -> VolumeSource:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


#: How formats are recognised, by name; the module of the same name in this package has ``open(path, inner)``.
FORMATS: dict[str, tuple[str, ...]] = {
    "tiff": (".tif", ".tiff"),
    "hdf5": (".h5", ".hdf5", ".hdf"),
    "mrc": (".mrc", ".rec", ".map"),
    "nrrd": (".nrrd", ".nhdr"),
    "npy": (".npy", ".npz"),
    "n5": (".n5",),
    "zarr": (".zarr",),
    "precomputed": (".precomputed",),
}


def open_volume(location: str | Path, format_name: str | None = None) -> VolumeSource:
    """Open a volume of any known format.

    Args:
        location: a file, or a folder (a stack of TIFF sections, N5, Zarr, precomputed); an array within a container is
            named behind it: ``labels.h5:/volumes/mito``, ``raw.n5:/s0`` (or as a path: ``raw.n5/s0``).
        format_name: one of `FORMATS`, where the name does not say it.

    Raises:
        MissingError: nothing is there, or an optional library is not installed. InputError: no known format, or not
            three axes. MetadataError, CorruptDataError: what the format's reader finds.
    """
    path, inner = _split(str(location))
    if format_name is not None and format_name not in FORMATS:
        close = nearest(format_name, FORMATS)
        hint = f"; did you mean {close!r}?" if close else ""
        raise InputError(f"unknown format {format_name!r}{hint} Known: {', '.join(FORMATS)}")
    if not path.exists():
        raise MissingError(f"nothing at {path}; give the file or folder that holds the volume")
    name = format_name or _guess(path)
    module = importlib.import_module(f"connectomics.io.formats.{name}_format")
    opened: VolumeSource = module.open_source(path, inner)
    return opened


def _split(location: str) -> tuple[Path, str | None]:
    """A container and what is named behind a colon, ``a.h5:/raw``; a colon in a file's own name stays."""
    if Path(location).exists():
        return Path(location).expanduser(), None
    head, colon, inner = location.rpartition(":")
    return (Path(head).expanduser(), inner.strip("/")) if colon and head else (Path(location).expanduser(), None)


def _guess(path: Path) -> str:
    if path.is_dir():
        if (path / "info").is_file():
            return "precomputed"
        if any((path / name).is_file() for name in (".zattrs", ".zgroup", ".zarray", "zarr.json")):
            return "zarr"
        if any((p / "attributes.json").is_file() for p in (path, *path.parents)):
            return "n5"
        if any(p.suffix.lower() in FORMATS["tiff"] for p in path.iterdir()):
            return "tiff"
    for name, endings in FORMATS.items():
        if path.suffix.lower() in endings:
            return name
    known = " ".join(ending for endings in FORMATS.values() for ending in endings)
    raise InputError(
        f"{path}: no known format; expected one of {known} or a folder of TIFF sections (or give --format)"
    )


def in_nm(unit: str | None) -> float | None:
    """Nanometres in a unit of length; None for pixels and for what is not known."""
    if unit is None:
        return None
    factors = {
        "nm": 1.0, "nanometer": 1.0, "nanometers": 1.0, "nanometre": 1.0,
        "um": 1e3, "µm": 1e3, "μm": 1e3, "micron": 1e3, "microns": 1e3, "micrometer": 1e3, "micrometers": 1e3,
        "mm": 1e6, "millimeter": 1e6, "m": 1e9, "meter": 1e9, "cm": 1e7, "inch": 2.54e7,
        "å": 0.1, "a": 0.1, "angstrom": 0.1, "angstroms": 0.1, "pm": 1e-3,
    }  # fmt: skip
    return factors.get(unit.strip().replace("\\u00B5m", "µm").lower())


def optional(module: str, package: str) -> Any:
    """An optional library; `MissingError` that says how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingError(
            f"reading this format needs {package}, which is not installed: pip install 'connectomics-cellmap[formats]'"
        ) from error


def array_source(location: str, array: Any, **known: Any) -> VolumeSource:
    """A source over anything that is sliced like a numpy array (memory maps, HDF5 data sets)."""

    def read(begin: Sequence[int], shape: Sequence[int]) -> NDArray[Any]:
        return np.asarray(array[tuple(slice(b, b + n) for b, n in zip(begin, shape, strict=True))])

    return VolumeSource(location, tuple(int(n) for n in array.shape), np.dtype(array.dtype), read, **known)
