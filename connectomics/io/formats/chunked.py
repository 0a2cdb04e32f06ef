"""Readers for HDF5, N5, Zarr and neuroglancer precomputed."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.errors import CorruptDataError, InputError, MetadataError, MissingError
from connectomics.geometry import Triple, slices_of, triple
from connectomics.io.array import one_line
from connectomics.io.formats.source import VolumeSource, optional
from connectomics.io.metadata import in_nm, names_levels
from connectomics.io.multiscale import Multiscale, PlainArray
from connectomics.io.store import read_attrs, read_json

log = logging.getLogger(__name__)


def open_hdf5(path: Path, inner: str | None) -> VolumeSource:
    """Open ``a.h5:/name``; the name is optional if there is only one three-dimensional data set.

    Voxel sizes are read as ilastik, Fiji, CREMI and MorphoGraphX write them.
    """
    h5py = optional("h5py", "h5py")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise CorruptDataError(f"{path} cannot be read as HDF5: {error}") from error
    volumes: list[str] = []
    file.visititems(lambda name, node: volumes.append(name) if getattr(node, "ndim", 0) == 3 else None)
    name = volumes[0] if inner is None and len(volumes) == 1 else inner
    if name not in volumes:
        file.close()
        raise InputError(f"{path} holds {', '.join(volumes) or 'no volume of three axes'}; name one: {path}:/NAME")
    data = file[name]
    axes = "".join(re.findall(r'"key":\s*"(\w)"', str(data.attrs.get("axistags"))))
    if not re.fullmatch("([zt]yx)?", axes):
        file.close()
        raise InputError(f"{path}:/{name} has the axes {axes} (axistags of ilastik), expected zyx; export it so")
    size, begin = _hdf5_place(data.attrs)
    return VolumeSource.of(f"{path}:/{name}", data, voxel_size=size, begin=begin, close=file.close)


def open_n5(path: Path, inner: str | None) -> VolumeSource:
    """Open an N5 data set, or the finest level ``s0`` of a group; the axes are stored x y z.

    COSEM's ``transform`` (axes, scale, and translate to the center of the first voxel) says where it lies.
    """
    place = path / inner if inner else path
    attrs = read_json(place / "attributes.json") or {}
    group: dict[str, Any] = {}
    if "dimensions" not in attrs and (place / "s0").is_dir():
        group, place = attrs, place / "s0"
        attrs = read_json(place / "attributes.json") or {}
    if "dimensions" not in attrs:
        there = sorted(p.name for p in place.iterdir() if p.is_dir()) if place.is_dir() else []
        raise InputError(f"{place} is no N5 data set; name one: {path}:/NAME (found {', '.join(there) or 'none'})")
    spec = {"driver": "n5", "kvstore": {"driver": "file", "path": f"{place}/"}}
    said = {**group, **attrs}
    size, begin = _n5_transform(attrs.get("transform"))
    if begin is None and any(np.any(said.get(name, 0)) for name in ("offset", "translate", "translation")):
        log.warning("%s: its offset is not used, since programs differ in its unit and its axes; give --begin", place)
    return _tensorstore_source(spec, str(place), voxel_size=size or _n5_voxel_size(said), begin=begin)


def open_precomputed(path: Path, inner: str | None) -> VolumeSource:
    """Open the finest scale of a local precomputed folder, or the scale with the key ``inner``."""
    try:
        scales = json.loads((path / "info").read_text(encoding="utf-8"))["scales"]
        names = [scale["key"] for scale in scales]
        index = names.index(inner) if inner else 0
        x, y, z = (float(v) for v in scales[index]["resolution"])
        bx, by, bz = (float(v) for v in scales[index].get("voxel_offset", (0, 0, 0)))
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise CorruptDataError(f"{path}/info does not describe a precomputed volume: {error!r}") from error
    kvstore = {"driver": "file", "path": f"{path}/"}
    spec = {"driver": "neuroglancer_precomputed", "kvstore": kvstore, "scale_index": index}
    return _tensorstore_source(spec, str(path), voxel_size=(z, y, x), begin=(bz * z, by * y, bx * x))


def open_zarr(path: Path, inner: str | None) -> VolumeSource:
    """Open the finest level of an OME-NGFF group, or an array; a level named by its path lies where its group says."""
    place = str(path / inner) if inner else str(path)
    try:
        return _level(Multiscale.open(place), 0, place)
    except MetadataError:
        if names_levels(read_attrs(place)):
            raise
    array = PlainArray.open(place)
    if array.grid is None:
        return _level_of_group(Path(place)) or VolumeSource(place, array.shape, array.dtype, array.read)
    size, begin = array.grid.voxel_size, array.grid.box.begin
    return VolumeSource(place, array.shape, array.dtype, array.read, voxel_size=size, begin=begin)


def _level(group: Multiscale, number: int, place: str) -> VolumeSource:
    def read(begin: Sequence[int], shape: Sequence[int]) -> NDArray[Any]:
        return group.read_level(number, begin, shape, absent_is_missing=False)[0]

    level, grid = group.levels[number], group.levels[number].grid
    return VolumeSource(place, grid.shape, level.dtype, read, voxel_size=grid.voxel_size, begin=grid.box.begin)


def _level_of_group(place: Path) -> VolumeSource | None:
    """An array as the level that it is of the group around it, without axes t and c; None if it is none."""
    try:
        if not names_levels(read_attrs(str(place.parent))):
            return None
        group = Multiscale.open(str(place.parent))
    except MissingError:
        return None
    except MetadataError as error:
        log.warning("%s takes no voxel size and position from its group: %s", place, error)
        return None
    names = [level.path for level in group.levels]
    return _level(group, names.index(place.name), str(place)) if place.name in names else None


def _tensorstore_source(spec: dict[str, Any], location: str, **known: Any) -> VolumeSource:
    """A tensorstore array with axes x y z, and at most one channel."""
    import tensorstore

    try:
        array = tensorstore.open(spec, read=True, open=True).result()
    except (ValueError, OSError) as error:
        raise CorruptDataError(f"{location} cannot be opened: {one_line(error)[:300]}") from error
    if array.ndim == 4 and array.shape[3] == 1:
        array = array[..., 0]
    if array.ndim != 3:
        raise InputError(f"{location} has {array.ndim} axes, expected three (x, y, z) and one channel at most")
    array = array[tensorstore.d[:].translate_to[0]].T  # to z y x

    def read(begin: Sequence[int], shape: Sequence[int]) -> NDArray[Any]:
        try:
            return np.asarray(array[slices_of(begin, shape)].read().result())
        except (ValueError, OSError) as error:
            raise CorruptDataError(f"{location} cannot be read: {one_line(error)[:300]}") from error

    return VolumeSource(location, tuple(array.shape), np.dtype(array.dtype.numpy_dtype), read, **known)


def _hdf5_place(attrs: Any) -> tuple[Triple | None, Triple | None]:
    """Voxel size, ``element_size_um`` (µm), else ``resolution`` or ``voxel_size``, and ``offset``, in nm unless a unit
    says otherwise; all z y x."""
    unit = np.ravel(attrs.get("unit", attrs.get("units", "nm")))[0]
    factor = in_nm(unit.decode() if isinstance(unit, bytes) else str(unit))
    micron, *others = (attrs.get(name) for name in ("element_size_um", "resolution", "voxel_size"))
    sizes = (_three(micron, 1e3), *(_three(value, factor) for value in others))
    return next(filter(None, sizes), None), _three(attrs.get("offset"), factor)


def _three(value: Any, factor: float | None) -> Triple | None:
    if value is None or factor is None or np.size(value) != 3:
        return None
    z, y, x = (float(v) * factor for v in np.ravel(value))
    return z, y, x


def _n5_transform(transform: Any) -> tuple[Triple | None, Triple | None]:
    """Voxel size and outer face of the first voxel, nm, z y x, of {axes, scale, translate, units}."""
    try:
        order = [list(transform["axes"]).index(axis) for axis in "zyx"]
        factors = np.array([in_nm(str(transform["units"][i])) for i in order], float)  # unknown: NaN
        scale, center = (np.array(transform[name], float)[order] * factors for name in ("scale", "translate"))
    except (KeyError, ValueError, TypeError, IndexError):
        return None, None
    return (triple(scale), triple(center - scale / 2)) if np.isfinite(scale).all() else (None, None)


def _n5_voxel_size(attrs: dict[str, Any]) -> Triple | None:
    """``pixelResolution`` {dimensions, unit}, or ``resolution`` with ``units`` (default nm); x y z."""
    about = attrs.get("pixelResolution")
    if isinstance(about, dict):
        sizes, factor = about.get("dimensions"), in_nm(str(about.get("unit", "nm")))
    else:
        units = attrs.get("units", ["nm"])
        sizes, factor = about or attrs.get("resolution"), in_nm(str(units[0] if isinstance(units, list) else units))
    return _three(sizes[::-1], factor) if isinstance(sizes, list) else None
