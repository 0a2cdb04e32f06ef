"""NRRD. Its axes go from the fastest to the slowest, x y z. Raw data is mapped; gzip is unpacked to a temporary file
first, piece by piece, so that memory does not grow with the volume."""

from __future__ import annotations

import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from connectomics.errors import CorruptDataError, InputError
from connectomics.io.formats.source import VolumeSource, array_source, in_nm, optional

_PIECE = 1 << 22  # bytes unpacked at a time
_TYPES = {
    "i1": ("signed char", "int8", "int8_t"),
    "u1": ("uchar", "unsigned char", "uint8", "uint8_t"),
    "i2": ("short", "short int", "signed short", "signed short int", "int16", "int16_t"),
    "u2": ("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"),
    "i4": ("int", "signed int", "int32", "int32_t"),
    "u4": ("uint", "unsigned int", "uint32", "uint32_t"),
    "i8": ("longlong", "long long", "long long int", "signed long long", "int64", "int64_t"),
    "u8": ("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"),
    "f4": ("float",),
    "f8": ("double",),
}


def open_source(path: Path, inner: str | None) -> VolumeSource:
    """A file with its data inside (or, for ``.nhdr``, in the one file that it names)."""
    nrrd = optional("nrrd", "pynrrd")
    try:
        with path.open("rb") as file:
            header: dict[str, Any] = nrrd.read_header(file)
            offset = file.tell()
    except (OSError, ValueError, RuntimeError, nrrd.NRRDError) as error:
        raise CorruptDataError(f"{path} cannot be read as NRRD: {error}") from error
    data_file = path
    if "data file" in header or "datafile" in header:
        data_file, offset = path.parent / str(header.get("data file", header.get("datafile"))), 0
    shape = tuple(int(n) for n in reversed(header["sizes"]))
    dtype = _dtype(header, path)
    encoding = str(header.get("encoding", "raw")).lower()
    expected = int(np.prod(shape)) * dtype.itemsize
    if encoding == "raw":
        if data_file.stat().st_size < offset + expected:
            raise CorruptDataError(f"{data_file} is cut off: expected {expected} bytes of data after its header")
        array = np.memmap(data_file, dtype, "r", offset, shape)
    elif encoding in ("gzip", "gz"):
        array = _unpacked(data_file, offset, expected, dtype, shape)
    else:
        raise InputError(f"{path} has the encoding {encoding!r}; expected raw or gzip: save it again with one of them")
    return array_source(str(path), array, voxel_size=_voxel_size(header))


def _dtype(header: dict[str, Any], path: Path) -> np.dtype[Any]:
    """The type of a voxel: the format has several names for each."""
    name = " ".join(str(header.get("type", "")).lower().split())
    letter = next((letter for letter, names in _TYPES.items() if name in names), None)
    if letter is None:
        raise InputError(f"{path} holds voxels of the type {name!r}; expected whole numbers or floats")
    return np.dtype(letter).newbyteorder(">" if str(header.get("endian", "little")).lower() == "big" else "<")


def _unpacked(path: Path, offset: int, expected: int, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Any:
    unpacker = zlib.decompressobj(wbits=47)  # gzip or zlib, whichever the header says
    with path.open("rb") as packed, tempfile.TemporaryFile() as out:
        packed.seek(offset)
        try:
            while piece := packed.read(_PIECE):
                out.write(unpacker.decompress(piece))
        except zlib.error as error:
            raise CorruptDataError(f"{path}: the packed data is damaged ({error})") from error
        out.write(unpacker.flush())
        if out.tell() < expected:
            raise CorruptDataError(f"{path} is cut off: expected {expected} bytes of data, found {out.tell()}")
        return np.memmap(out, dtype, "r", 0, shape)  # the map keeps the nameless file


def _voxel_size(header: dict[str, Any]) -> tuple[float, float, float] | None:
    """From ``space directions`` or ``spacings``, with ``space units``; where those are not given it is not known."""
    directions = header.get("space directions")
    sizes = header.get("spacings") if directions is None else np.linalg.norm(np.asarray(directions, float), axis=1)
    units = header.get("space units", header.get("units"))
    factor = in_nm(str(units[0]).strip('"')) if units is not None and len(units) else None
    if sizes is None or factor is None or not np.all(np.isfinite(sizes)) or len(sizes) != 3 or min(sizes) <= 0:
        return None
    z, y, x = (float(v) * factor for v in reversed(list(sizes)))
    return z, y, x
