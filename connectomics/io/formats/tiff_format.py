"""TIFF: a file of many pages, or a folder of sections (sorted by the numbers in their names)."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.errors import CorruptDataError, InputError, MissingError
from connectomics.geometry import Triple
from connectomics.io.formats.source import VolumeSource, array_source, in_nm, optional

_ENDINGS = (".tif", ".tiff")


def open_source(path: Path, inner: str | None) -> VolumeSource:
    """A multi-page file (pages are z) or a folder of files of one section each."""
    tifffile = optional("tifffile", "tifffile")
    return _folder(path, tifffile) if path.is_dir() else _file(path, tifffile)


def _file(path: Path, tifffile: Any) -> VolumeSource:
    file = _opened(path, tifffile)
    series = file.series[0]
    shape = _volume_shape(series.axes, series.shape, path)
    size = _imagej_size(file) or _ome_size(file)
    known: dict[str, Any] = {"voxel_size": size, "close": file.close}
    if series.dataoffset is not None and not series.keyframe.is_tiled:
        mapped = np.memmap(path, series.dtype.newbyteorder(file.byteorder), "r", series.dataoffset, shape)
        return array_source(str(path), mapped, **known)
    pages = series.pages

    def read(begin: Sequence[int], wanted: Sequence[int]) -> NDArray[Any]:
        out = np.empty(tuple(wanted), series.dtype)
        for k in range(wanted[0]):
            page = pages[begin[0] + k]
            plane = _decoded(page, path, begin[0] + k)
            out[k] = plane[begin[1] : begin[1] + wanted[1], begin[2] : begin[2] + wanted[2]]
        return out

    return VolumeSource(str(path), (shape[0], shape[1], shape[2]), np.dtype(series.dtype), read, by_plane=True, **known)


def _folder(path: Path, tifffile: Any) -> VolumeSource:
    files = sorted((p for p in path.iterdir() if p.suffix.lower() in _ENDINGS), key=_natural)
    if not files:
        raise MissingError(f"{path} holds no TIFF files (.tif, .tiff)")
    first = _opened(files[0], tifffile)
    with first:
        page = first.pages[0]
        plane, dtype, size = tuple(page.shape), np.dtype(page.dtype), _imagej_size(first)
    if len(plane) != 2:
        raise InputError(f"{files[0]} has shape {plane}, expected one grey section (y, x)")

    def read(begin: Sequence[int], wanted: Sequence[int]) -> NDArray[Any]:
        out = np.empty(tuple(wanted), dtype)
        for k in range(wanted[0]):
            place = files[begin[0] + k]
            with _opened(place, tifffile) as file:
                found = file.pages[0]
                if tuple(found.shape) != plane or np.dtype(found.dtype) != dtype:
                    raise InputError(
                        f"{place} holds {found.dtype} of shape {tuple(found.shape)}, {files[0].name} {dtype} of shape "
                        f"{plane}; sections of a stack must be alike"
                    )
                section = _decoded(found, place, 0)
            out[k] = section[begin[1] : begin[1] + wanted[1], begin[2] : begin[2] + wanted[2]]
        return out

    return VolumeSource(str(path), (len(files), plane[0], plane[1]), dtype, read, voxel_size=size, by_plane=True)


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
    """The axes that are longer than 1 must be pages, rows and columns."""
    kept = [(a, n) for a, n in zip(axes, shape, strict=True) if n > 1 or a in "YX"]
    if len(kept) == 2:
        kept.insert(0, ("Z", 1))
    names = "".join(a for a, _ in kept)
    if len(kept) != 3 or names[1:] != "YX" or names[0] in "SC":
        raise InputError(f"{path} has the axes {axes} of {tuple(shape)}; expected one grey volume (z, y, x)")
    return tuple(n for _, n in kept)


def _imagej_size(file: Any) -> Triple | None:
    """Fiji: pixels per unit in x and y, ``spacing`` and ``unit`` in its own text."""
    about = file.imagej_metadata
    if not about:
        return None
    factor = in_nm(about.get("unit"))
    tags = file.pages[0].tags
    if factor is None or "XResolution" not in tags or "YResolution" not in tags:
        return None
    steps = []
    for name in ("YResolution", "XResolution"):
        above, below = tags[name].value
        if above == 0:
            return None
        steps.append(below / above * factor)
    return float(about.get("spacing", steps[0] / factor)) * factor, steps[0], steps[1]


def _ome_size(file: Any) -> Triple | None:
    """OME-XML: PhysicalSizeX and its unit (µm where none is given), likewise y and z."""
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
    """Numbers in a name count as numbers: section 2 stands before section 10."""
    parts = re.split(r"(\d+)", path.name)
    return [(0, int(p)) if p.isdigit() else (1, p) for p in parts]
