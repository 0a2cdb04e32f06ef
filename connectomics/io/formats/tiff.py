"""TIFF: read a multi-page file, or a folder of sections sorted by the numbers in their names; write a stack."""

from __future__ import annotations

import logging
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from connectomics.errors import CorruptDataError, InputError, MissingError, as_write_error
from connectomics.geometry import Triple, VoxelGrid
from connectomics.io.formats.source import FORMATS, Reader, VolumeSource, optional
from connectomics.io.metadata import in_nm
from connectomics.io.replacing import part_of

log = logging.getLogger(__name__)

_LARGEST_IMAGEJ = (1 << 32) - (64 << 20)  # bytes: its offsets have 32 bits


def open_tiff(path: Path, inner: str | None) -> VolumeSource:
    """Open a multi-page file (pages are z), or a folder of files with one section each."""
    tifffile = optional("tifffile", "tifffile")
    return _folder(path, tifffile) if path.is_dir() else _file(path, tifffile)


def _file(path: Path, tifffile: Any) -> VolumeSource:
    """One series of pages, or several equal ones in order: a volume written page by page has one series per page."""
    file = _opened(path, tifffile)
    parts = list(file.series)
    kinds = {(tuple(part.shape), np.dtype(part.dtype)) for part in parts}
    volumes_apart = len(parts) > 1 and file.is_ome and _volume_shape(parts[0].axes, parts[0].shape, path)[0] > 1
    if len(kinds) > 1 or volumes_apart:
        found = ", ".join(f"{dtype} {shape}" for shape, dtype in sorted(kinds, key=str)[:4])
        file.close()
        raise InputError(
            f"{path} holds {len(parts)} images ({found}), expected one volume, or sections of one shape and type; "
            "save the volume in a separate file"
        )
    shape = _volume_shape(parts[0].axes, parts[0].shape, path)
    _warn_of_white(file.pages[0], path)
    readers = [_reader(part, shape, path, file.byteorder) for part in parts]

    def read(begin: Sequence[int], wanted: Sequence[int]) -> NDArray[Any]:
        out = np.empty(tuple(wanted), parts[0].dtype)
        done = 0
        while done < wanted[0]:
            part, first = divmod(begin[0] + done, shape[0])
            planes = min(shape[0] - first, wanted[0] - done)
            out[done : done + planes] = readers[part]((first, begin[1], begin[2]), (planes, wanted[1], wanted[2]))
            done += planes
        return out

    size = _imagej_size(file) or _ome_size(file)
    by_plane = any(_mapped_from(part) is None for part in parts)
    whole, dtype = (len(parts) * shape[0], shape[1], shape[2]), np.dtype(parts[0].dtype)
    return VolumeSource(str(path), whole, dtype, read, voxel_size=size, by_plane=by_plane, close=file.close)


def write_tiff(path: Path, planes: Iterable[NDArray[Any]], dtype: DTypeLike, grid: VoxelGrid) -> None:
    """Write planes (y, x) as a stack with the voxel size, one page a section, compressed; it appears in one step.

    Up to 16 bits, and float32, are ImageJ's format; other types, and stacks from 4 GB on, are OME-TIFF. `WriteError`.
    """
    tifffile, dtype = optional("tifffile", "tifffile"), np.dtype(dtype)
    z, y, x = (size / 1000 for size in grid.voxel_size)
    imagej = dtype in (np.uint8, np.uint16, np.float32) and grid.size * dtype.itemsize < _LARGEST_IMAGEJ
    about: dict[str, Any] = {"axes": "ZYX", "spacing": z, "unit": "um"}
    if not imagej:
        about = {"axes": "ZYX", "PhysicalSizeZ": z, "PhysicalSizeY": y, "PhysicalSizeX": x}  # um by default
    part = part_of(path)
    try:
        with as_write_error(f"cannot write {path}", "free space or choose another path"):
            path.parent.mkdir(parents=True, exist_ok=True)
            with tifffile.TiffWriter(part, imagej=imagej, ome=not imagej, bigtiff=not imagej) as file:
                file.write(
                    iter(planes), shape=grid.shape, dtype=dtype, compression="zlib", photometric="minisblack",
                    resolution=(1 / x, 1 / y), metadata=about,
                )  # fmt: skip
            part.replace(path)
    finally:
        with suppress(OSError):  # if its folder is no folder
            part.unlink(missing_ok=True)


def _mapped_from(series: Any) -> int | None:
    """Offset of the series in the file if it is stored as a plain array, None if it must be decoded."""
    offset: int | None = None if series.keyframe.is_tiled else series.dataoffset
    return offset


def _reader(series: Any, shape: Sequence[int], path: Path, byteorder: str) -> Reader:
    offset = _mapped_from(series)
    if offset is not None:
        mapped = np.memmap(path, series.dtype.newbyteorder(byteorder), "r", offset, tuple(shape))
        return VolumeSource.of(str(path), mapped).read
    return _by_plane(lambda z: _decoded(series.pages[z], path, z), series.dtype)


def _by_plane(plane: Callable[[int], NDArray[Any]], dtype: np.dtype[Any]) -> Reader:
    """A reader that decodes whole planes (y, x)."""

    def read(begin: Sequence[int], wanted: Sequence[int]) -> NDArray[Any]:
        out = np.empty(tuple(wanted), dtype)
        for k in range(wanted[0]):
            out[k] = plane(begin[0] + k)[begin[1] : begin[1] + wanted[1], begin[2] : begin[2] + wanted[2]]
        return out

    return read


def _folder(path: Path, tifffile: Any) -> VolumeSource:
    there = (p for p in path.iterdir() if not p.name.startswith("."))  # macOS leaves ._section.tif
    files = sorted((p for p in there if p.suffix.lower() in FORMATS["tiff"][1]), key=_natural)
    if not files:
        raise MissingError(f"{path} holds no TIFF files (.tif, .tiff)")
    _warn_of_names(files)
    first = _opened(files[0], tifffile)
    with first:
        page = first.pages[0]
        plane, dtype, size = tuple(page.shape), np.dtype(page.dtype), _imagej_size(first)
        _check_single(first, files[0])
        _warn_of_white(page, path)
    if len(plane) != 2:
        raise InputError(f"{files[0]} has shape {plane}, expected one gray section (y, x)")

    def section(z: int) -> NDArray[Any]:
        with _opened(files[z], tifffile) as file:
            found = file.pages[0]
            if tuple(found.shape) != plane or np.dtype(found.dtype) != dtype:
                raise InputError(
                    f"{files[z]} holds {found.dtype} of shape {tuple(found.shape)}, {files[0].name} {dtype} of shape "
                    f"{plane}; the sections of a stack must be alike"
                )
            _check_single(file, files[z])
            return _decoded(found, files[z], 0)

    shape, read = (len(files), plane[0], plane[1]), _by_plane(section, dtype)
    return VolumeSource(str(path), shape, dtype, read, voxel_size=size, by_plane=True)


def _warn_of_names(files: Sequence[Path]) -> None:
    """Log names that differ by more than numbers (a copy, an overview), or numbers that jump: a section that is not
    there, or is none, moves all after it."""
    others = [file.name for file in files if re.sub(r"\d+", "", file.stem) != re.sub(r"\d+", "", files[0].stem)]
    if others:
        log.warning(
            "%s: the names of %s and %s differ by more than numbers; all TIFF files in a folder are sections, so move "
            "away what is none", files[0].parent, files[0].name, others[0],
        )  # fmt: skip
        return
    numbers = [map(int, re.findall(r"\d+", file.stem)) for file in files]
    columns = [column for column in zip(*numbers, strict=True) if len(set(column)) > 1]
    steps = np.diff(columns[0]) if len(columns) == 1 else np.zeros(0)
    jumps = np.flatnonzero(steps != steps.min(initial=1 << 62))
    if len(jumps) and steps.min() > 0:
        log.warning(
            "%s: %s is followed by %s (%d gaps in the numbers): if sections are missing, all after them lie too low in "
            "z; put empty sections of the same size and type there",
            files[0].parent, files[jumps[0]].name, files[jumps[0] + 1].name, len(jumps),
        )  # fmt: skip


def _warn_of_white(page: Any, path: Path) -> None:
    """Log that 0 is white: viewers invert such an image, but masks of ImageJ are also stored like that."""
    if page.photometric == 0:
        remedy = "if the contrast of raw is then the opposite, give data.intensity_range with the high value first"
        log.warning("%s has 0 as white (MINISWHITE), and is stored without inversion; %s", path, remedy)


def _check_single(file: Any, path: Path) -> None:
    """Refuse a stack's file with several sections; a smaller second page is a preview and does not count."""
    pages = file.pages
    if len(pages) > 1 and pages[1].shape == pages[0].shape:
        raise InputError(
            f"{path} holds {len(pages)} sections, expected one per file in a folder of sections; open that file alone"
        )


def _opened(path: Path, tifffile: Any) -> Any:
    try:
        file = tifffile.TiffFile(path)
    except (tifffile.TiffFileError, OSError, ValueError) as error:
        raise CorruptDataError(f"{path} cannot be read as TIFF: {error}") from error
    if not file.series:
        raise CorruptDataError(f"{path} holds no image")
    return file


def _decoded(page: Any, path: Path, number: int) -> NDArray[Any]:
    try:
        found: NDArray[Any] = page.asarray()
    except (ValueError, RuntimeError, OSError, IndexError) as error:
        raise CorruptDataError(f"{path}: page {number} cannot be decoded: {error}") from error
    return found


def _volume_shape(axes: str, shape: Sequence[int], path: Path) -> tuple[int, ...]:
    """(z, y, x); axes longer than 1 must be pages, rows and columns."""
    kept = [(a, n) for a, n in zip(axes, shape, strict=True) if n > 1 or a in "YX"]
    if len(kept) == 2:
        kept.insert(0, ("Z", 1))
    names = "".join(a for a, _ in kept)
    if len(kept) != 3 or names[1:] != "YX" or names[0] in "SC":
        raise InputError(f"{path} has the axes {axes} of {tuple(shape)}; expected a gray volume (z, y, x): save it so")
    return tuple(n for _, n in kept)


def _imagej_size(file: Any) -> Triple | None:
    """From Fiji's pixels per unit in x and y, and ``spacing`` and ``unit`` in its own metadata.

    None without ``spacing``: Fiji leaves it out for a single section, and if nobody has set the thickness."""
    about = file.imagej_metadata or {}
    factor, spacing = in_nm(about.get("unit")), about.get("spacing")
    ratios = [file.pages[0].tags.valueof(name, (0, 1)) for name in ("YResolution", "XResolution")]
    if factor is None or spacing is None or not all(above for above, _ in ratios):
        return None
    y, x = (below / above * factor for above, below in ratios)
    return float(spacing) * factor, y, x


def _ome_size(file: Any) -> Triple | None:
    """From OME-XML: PhysicalSizeX and its unit (default µm), likewise y and z."""
    if not file.ome_metadata:
        return None
    try:
        pixels = ElementTree.fromstring(file.ome_metadata).find(".//{*}Pixels")
    except ElementTree.ParseError:
        return None
    if pixels is None:
        return None
    sizes = []
    for axis in "ZYX":
        value, factor = pixels.get(f"PhysicalSize{axis}"), in_nm(pixels.get(f"PhysicalSize{axis}Unit", "µm"))
        if value is None or factor is None:
            return None
        sizes.append(float(value) * factor)
    return sizes[0], sizes[1], sizes[2]


def _natural(path: Path) -> list[tuple[int, int | str]]:
    """Sort key that compares numbers by value: section 2 comes before section 10."""
    parts = re.split(r"(\d+)", path.name)
    return [(0, int(p)) if p.isdigit() else (1, p) for p in parts]
