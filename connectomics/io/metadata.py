"""The OME-NGFF ``multiscales`` attribute: from JSON to one `VoxelGrid` per level, in nanometres.

Version 0.4 keeps it in the group's attributes, 0.5 (Zarr v3) under ``ome``. The transformations of a dataset and then
those of the whole multiscale are applied in order; only scales and translations, only the space axes z, y, x. Axes t, c
may stand before them, as most writers have them, where the arrays are of length 1 there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.errors import InputError, MetadataError
from connectomics.geometry import triple

# nanometres per unit of length; a missing unit means nanometres, as in all CellMap data
_UNITS = {
    None: 1.0,
    "nanometer": 1.0,
    "nanometre": 1.0,
    "nm": 1.0,
    "micrometer": 1e3,
    "micrometre": 1e3,
    "um": 1e3,
    "µm": 1e3,
    "angstrom": 0.1,
}

# axes that may stand before z, y, x, and their types
_KINDS = {"t": "time", "c": "channel"}


def parse_multiscales(
    attrs: Mapping[str, Any], where: str
) -> list[tuple[str, NDArray[np.float64], NDArray[np.float64]]]:
    """Per listed dataset: its path, voxel size and translation (centre of voxel 0), both nm, z y x.

    Args:
        attrs: attributes of the group. where: its location, for messages.

    Raises:
        MetadataError: the attribute is absent, broken, or says something other than scaled and moved z, y, x axes.
    """
    multiscale = _multiscale(attrs, where)
    leading, unit = _axes(multiscale.get("axes"), where)
    datasets = multiscale.get("datasets")
    if not isinstance(datasets, list) or not datasets:
        raise MetadataError(f"{where}: multiscales[0].datasets must list the levels, found {datasets!r}")
    levels = []
    for number, dataset in enumerate(datasets):
        place = f"{where}: multiscales[0].datasets[{number}]"
        if not isinstance(dataset, dict) or not isinstance(dataset.get("path"), str) or not dataset["path"].strip("/"):
            raise MetadataError(f"{place} needs a path, found {dataset!r}")
        own = dataset.get("coordinateTransformations")
        if not own:
            raise MetadataError(f"{place} needs coordinateTransformations (a scale, a translation), found {own!r}")
        size, first = np.ones(3), np.zeros(3)
        outer = multiscale.get("coordinateTransformations") or []
        for transformation in [*_as_list(own, place), *_as_list(outer, f"{where}: multiscales[0]")]:
            size, first = _transformed(size, first, transformation, leading, place)
        levels.append((dataset["path"].strip("/"), size * unit, first * unit))
    return levels


def leading_axes(attrs: Mapping[str, Any], where: str) -> int:
    """How many axes (t, c) the arrays have before z, y, x. `MetadataError` as `parse_multiscales`."""
    return _axes(_multiscale(attrs, where).get("axes"), where)[0]


def _multiscale(attrs: Mapping[str, Any], where: str) -> dict[str, Any]:
    ome = attrs.get("ome")
    found = ome.get("multiscales") if isinstance(ome, dict) and "multiscales" in ome else attrs.get("multiscales")
    if found is None:
        raise MetadataError(f"{where} has no multiscales attribute; expected an OME-NGFF 0.4 or 0.5 group")
    if not isinstance(found, list) or not found or not isinstance(found[0], dict):
        raise MetadataError(f"{where}: multiscales must be a list with one object, found {str(found)[:80]}")
    return found[0]


def _axes(axes: Any, where: str) -> tuple[int, NDArray[np.float64]]:
    """The number of axes before z, y, x, and nanometres per unit along these."""
    if not isinstance(axes, list) or not all(isinstance(axis, (dict, str)) for axis in axes):
        raise MetadataError(f"{where}: multiscales[0].axes must list the axes z, y, x, found {axes!r}")
    described = [axis if isinstance(axis, dict) else {"name": axis} for axis in axes]
    names = [str(axis.get("name")).lower() for axis in described]
    kinds = [axis.get("type", _KINDS.get(name, "space")) for axis, name in zip(described, names, strict=True)]
    leading = len(names) - 3
    before = all(_KINDS.get(name) == kind for name, kind in zip(names[:-3], kinds[:-3], strict=True))
    if names[-3:] != ["z", "y", "x"] or any(kind != "space" for kind in kinds[-3:]) or not before:
        raise MetadataError(
            f"{where}: expected three space axes z, y, x, and before them at most t (time) and c (channel), "
            f"found {names} of types {kinds}"
        )
    units = [axis.get("unit") for axis in described[leading:]]
    unknown = [unit for unit in units if unit not in _UNITS]
    if unknown:
        raise MetadataError(f"{where}: unit {unknown[0]!r} is not known; expected nanometer, micrometer or angstrom")
    return leading, np.array([_UNITS[unit] for unit in units])


def _transformed(
    size: NDArray[np.float64], first: NDArray[np.float64], transformation: Any, leading: int, place: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    kind = transformation.get("type") if isinstance(transformation, dict) else None
    if kind == "identity":
        return size, first
    if kind not in ("scale", "translation") or kind not in transformation:
        raise MetadataError(f"{place}: expected a scale or a translation with its values, found {transformation!r}")
    given = transformation[kind]
    if leading and (not isinstance(given, list) or len(given) != leading + 3):
        raise MetadataError(f"{place}: {kind} must be {leading + 3} numbers, one an axis, found {given!r}")
    try:
        values = np.array(triple(given[leading:] if leading else given, kind))
    except InputError as error:
        raise MetadataError(f"{place}: {error}") from error
    if kind == "translation":
        return size, first + values
    if values.min() <= 0:
        raise MetadataError(f"{place}: scale must be positive, found {transformation[kind]!r}")
    return size * values, first * values


def _as_list(value: Any, place: str) -> list[Any]:
    if not isinstance(value, list):
        raise MetadataError(f"{place}.coordinateTransformations must be a list, found {value!r}")
    return value
