"""Readers for single-file image formats that are memory-mapped: MRC, NRRD, NumPy."""

from __future__ import annotations

import logging
import re
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from connectomics.errors import CorruptDataError, InputError
from connectomics.geometry import Triple, triple
from connectomics.io.formats.source import VolumeSource, optional
from connectomics.io.metadata import in_nm

log = logging.getLogger(__name__)

_IMOD = 1146047817  # in the header of files that IMOD wrote
_PIECE = 1 << 22  # bytes decompressed at a time
_NRRD_TYPES = {  # without "signed", a further "int", "_t" and spaces, and with u for "unsigned"
    "char": "i1", "short": "i2", "int": "i4", "longlong": "i8", "float": "f4", "double": "f8",
    "int8": "i1", "int16": "i2", "int32": "i4", "int64": "i8",
}  # fmt: skip


def open_mrc(path: Path, inner: str | None) -> VolumeSource:
    """Open an MRC or CCP4 file (any order of axes; angstrom, 0 if not given); its position is not read."""
    mrcfile = optional("mrcfile", "mrcfile")
    try:
        file = mrcfile.mmap(path, mode="r", permissive=False)
    except (ValueError, OSError) as error:
        raise CorruptDataError(f"{path} cannot be read as MRC: {error}; decompress a compressed file first") from error
    size, data, header = [float(file.voxel_size[axis]) / 10 for axis in "zyx"], file.data, file.header
    axes = [int(header[name]) for name in ("maps", "mapr", "mapc")]  # 1 x, 2 y, 3 z
    if any(axes) and sorted(axes) != [1, 2, 3]:
        raise CorruptDataError(f"{path} names its axes {axes} (maps, mapr, mapc), expected 3, 2, 1; save it again")
    if any(axes) and data.ndim == 3:
        data = data.transpose([axes.index(axis) for axis in (3, 2, 1)])
    stamp, flags = np.frombuffer(header.extra2.tobytes(), header.mode.dtype)[10:12]
    if data.dtype == np.int8 and stamp == _IMOD and not flags & 1:  # as IMOD stored bytes until version 4.2.23
        data = data.view(np.uint8)
    if any(float(values[axis]) for values in (header.origin, file.nstart) for axis in "xyz"):
        log.warning("%s: its origin is not used, since programs differ in its sign and in what it means", path)
    return VolumeSource.of(str(path), data, voxel_size=tuple(size) if min(size) > 0 else None, close=file.close)


def open_npy(path: Path, inner: str | None) -> VolumeSource:
    """Open ``a.npy``, or ``a.npz:name`` (read whole; the name is optional if there is only one array)."""
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise CorruptDataError(f"{path} cannot be read as a NumPy file: {error}") from error
    if isinstance(found, np.ndarray):
        return VolumeSource.of(str(path), found)
    with found:
        name = found.files[0] if inner is None and len(found.files) == 1 else inner
        if name not in found.files:
            raise InputError(f"{path} holds {', '.join(found.files) or 'nothing'}; name one: {path}:NAME")
        return VolumeSource.of(str(path), found[name])


def open_nrrd(path: Path, inner: str | None) -> VolumeSource:
    """Open a NRRD file (axes stored x y z) with its data inside or, for ``.nhdr``, in the file that it names.

    gzip data is decompressed to a temporary file first, piece by piece, so memory does not grow with the volume.
    """
    nrrd = optional("nrrd", "pynrrd")
    try:
        with path.open("rb") as file:
            header: dict[str, Any] = nrrd.read_header(file)
            offset = file.tell()
    except (OSError, ValueError, RuntimeError, nrrd.NRRDError) as error:
        raise CorruptDataError(f"{path} cannot be read as NRRD: {error}") from error
    data_file, detached = path, header.get("data file", header.get("datafile"))
    if detached is not None:
        data_file, offset = path.parent / str(detached), 0
    for skip in ("byte skip", "line skip"):
        if int(header.get(skip, 0)) != 0:
            raise InputError(f"{path} has a {skip}, which is not read; save it again without")
    shape = tuple(map(int, reversed(header["sizes"])))
    dtype = _nrrd_dtype(header, path)
    encoding = str(header.get("encoding", "raw")).lower()
    expected = int(np.prod(shape)) * dtype.itemsize
    if encoding == "raw":
        if data_file.stat().st_size < offset + expected:
            raise CorruptDataError(f"{data_file} is truncated: expected {expected} bytes of data after its header")
        array = np.memmap(data_file, dtype, "r", offset, shape)
    elif encoding in ("gzip", "gz"):
        array = _decompressed(data_file, offset, expected, dtype, shape)
    else:
        raise InputError(f"{path} has encoding {encoding!r}; expected raw or gzip: save it again with one of them")
    size = _nrrd_voxel_size(header)
    return VolumeSource.of(str(path), array, voxel_size=size, begin=_nrrd_begin(path, header, size))


def _nrrd_dtype(header: dict[str, Any], path: Path) -> np.dtype[Any]:
    name = str(header.get("type", "")).lower()
    short = re.sub(r"^signed |(?<=t|g) int$|_t$|\s", "", name.replace("unsigned ", "u"))
    letter = _NRRD_TYPES.get(short.removeprefix("u"))
    if letter is None:
        raise InputError(f"{path} holds voxels of type {name!r}; expected whole numbers or floats")
    return np.dtype(letter.replace("i", "u") if short[0] == "u" else letter).newbyteorder(
        ">" if str(header.get("endian", "little")).lower() == "big" else "<"
    )


def _decompressed(path: Path, offset: int, expected: int, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Any:
    decompressor = zlib.decompressobj(wbits=47)  # detects gzip or zlib from the header
    with path.open("rb") as packed, tempfile.TemporaryFile() as out:
        packed.seek(offset)
        try:
            while piece := packed.read(_PIECE):
                out.write(decompressor.decompress(piece))
        except zlib.error as error:
            raise CorruptDataError(f"{path}: the compressed data is damaged ({error})") from error
        out.write(decompressor.flush())
        if out.tell() < expected:
            raise CorruptDataError(f"{path} is truncated: expected {expected} bytes of data, got {out.tell()}")
        return np.memmap(out, dtype, "r", 0, shape)  # the map keeps the unnamed file


def _nrrd_voxel_size(header: dict[str, Any]) -> Triple | None:
    """From ``space directions`` or ``spacings`` with ``space units``; None if one of them is missing."""
    directions = header.get("space directions")
    sizes = header.get("spacings") if directions is None else np.linalg.norm(np.asarray(directions, float), axis=1)
    units = header.get("space units", header.get("units"))
    factor = in_nm(str(units[0]).strip('"')) if units is not None and len(units) else None
    if sizes is None or factor is None or not np.all(np.isfinite(sizes)) or len(sizes) != 3 or min(sizes) <= 0:
        return None
    return triple([float(v) * factor for v in sizes[::-1]])


def _nrrd_begin(path: Path, header: dict[str, Any], size: Triple | None) -> Triple | None:
    """From ``space origin``, the center of the first voxel; None if the axes are not those of the space."""
    origin, directions = header.get("space origin"), header.get("space directions")
    if origin is None or directions is None or size is None or not np.all(np.isfinite(origin)):
        return None
    turned = np.asarray(directions, float)
    if np.any(turned != np.diag(np.abs(np.diag(turned)))):
        if np.any(origin):
            log.warning("%s: its origin is not used, since its axes are turned or flipped in their space", path)
        return None
    return triple(origin[::-1] / np.diag(turned)[::-1] * size - np.asarray(size) / 2)
