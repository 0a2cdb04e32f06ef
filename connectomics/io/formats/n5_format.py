"""N5: axes are stored x y z; voxel sizes as Saalfeld's tools and CellMap write them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.errors import CorruptDataError, InputError
from connectomics.geometry import Triple
from connectomics.io.formats.source import VolumeSource, in_nm


def open_source(path: Path, inner: str | None) -> VolumeSource:
    """A data set, or a group of levels: then its finest, ``s0``."""
    place = path / inner if inner else path
    attrs = _attributes(place)
    group: dict[str, Any] = {}
    if "dimensions" not in attrs and (place / "s0").is_dir():
        group, place = attrs, place / "s0"
        attrs = _attributes(place)
    if "dimensions" not in attrs:
        there = sorted(p.name for p in place.iterdir() if p.is_dir()) if place.is_dir() else []
        raise InputError(f"{place} is no N5 data set; name one: {path}:/NAME (there are {', '.join(there) or 'none'})")
    return tensorstore_source({"driver": "n5", "kvstore": {"driver": "file", "path": f"{place}/"}}, str(place),
                              voxel_size=_voxel_size({**group, **attrs}))  # fmt: skip


def tensorstore_source(spec: dict[str, Any], location: str, **known: Any) -> VolumeSource:
    """A tensorstore array whose axes are x y z (and channels, of which there must be one)."""
    import tensorstore

    try:
        array = tensorstore.open(spec, read=True, open=True).result()
    except (ValueError, OSError) as error:
        raise CorruptDataError(f"{location} cannot be opened: {' '.join(str(error).split())[:300]}") from error
    if array.ndim == 4 and array.shape[3] == 1:
        array = array[..., 0]
    if array.ndim != 3:
        raise InputError(f"{location} has {array.ndim} axes, expected three (x, y, z) and one channel at most")
    array = array[tensorstore.d[:].translate_to[0]].T  # to z y x

    def read(begin: Sequence[int], shape: Sequence[int]) -> NDArray[Any]:
        part = tuple(slice(b, b + n) for b, n in zip(begin, shape, strict=True))
        try:
            return np.asarray(array[part].read().result())
        except (ValueError, OSError) as error:
            raise CorruptDataError(f"{location} cannot be read: {' '.join(str(error).split())[:300]}") from error

    return VolumeSource(location, tuple(array.shape), np.dtype(array.dtype.numpy_dtype), read, **known)


def _attributes(place: Path) -> dict[str, Any]:
    file = place / "attributes.json"
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorruptDataError(f"{file} is not valid JSON ({error})") from error
    return dict(found)


def _voxel_size(attrs: dict[str, Any]) -> Triple | None:
    """``pixelResolution`` {dimensions, unit} or ``resolution`` with ``units`` (nm where none): x y z."""
    about = attrs.get("pixelResolution")
    if isinstance(about, dict):
        sizes, factor = about.get("dimensions"), in_nm(str(about.get("unit", "nm")))
    else:
        units = attrs.get("units", ["nm"])
        sizes, factor = about or attrs.get("resolution"), in_nm(str(units[0] if isinstance(units, list) else units))
    if not isinstance(sizes, list) or len(sizes) != 3 or factor is None:
        return None
    x, y, z = (float(v) * factor for v in sizes)
    return z, y, x
