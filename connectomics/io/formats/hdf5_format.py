"""HDF5: one data set of a file. Voxel sizes as ilastik, Fiji, CREMI and MorphoGraphX write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from connectomics.errors import CorruptDataError, InputError
from connectomics.geometry import Triple
from connectomics.io.formats.source import VolumeSource, array_source, in_nm, optional


def open_source(path: Path, inner: str | None) -> VolumeSource:
    """``a.h5:/name`` (the name may be left out where there is one three-dimensional data set)."""
    h5py = optional("h5py", "h5py")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise CorruptDataError(f"{path} cannot be read as HDF5: {error}") from error
    volumes: list[str] = []
    file.visititems(lambda name, node: volumes.append(name) if getattr(node, "ndim", 0) == 3 else None)
    if (inner is None and len(volumes) != 1) or (inner is not None and inner not in volumes):
        file.close()
        raise InputError(f"{path} holds {', '.join(volumes) or 'no volume of three axes'}; name one: {path}:/NAME")
    data = file[inner or volumes[0]]
    return array_source(
        f"{path}:/{inner or volumes[0]}",
        data,
        voxel_size=_voxel_size(data.attrs),
        begin=_three(data.attrs.get("offset")),
        close=file.close,
    )


def _voxel_size(attrs: Any) -> Triple | None:
    """``resolution`` and ``voxel_size`` are nm unless a unit says else, ``element_size_um`` is µm; all z y x."""
    if (size := _three(attrs.get("element_size_um"))) is not None:
        return size[0] * 1e3, size[1] * 1e3, size[2] * 1e3
    for name in ("resolution", "voxel_size"):
        if (size := _three(attrs.get(name))) is not None:
            unit = attrs.get("unit", attrs.get("units", "nm"))
            factor = in_nm(unit.decode() if isinstance(unit, bytes) else str(np.ravel(unit)[0]))
            return None if factor is None else (size[0] * factor, size[1] * factor, size[2] * factor)
    return None


def _three(value: Any) -> Triple | None:
    if value is None or np.size(value) != 3:
        return None
    z, y, x = (float(v) for v in np.ravel(value))
    return z, y, x
