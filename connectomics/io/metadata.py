"""The OME-NGFF ``multiscales`` attribute: from JSON to voxel size and translation of each level, in nanometers.

Version 0.4 stores it in the group's attributes, 0.5 (Zarr v3) under ``ome``. Supported are scales and translations of
the space axes z, y, x; axes t and c may precede them if the arrays have length 1 there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.errors import InputError, MetadataError
from connectomics.geometry import VoxelGrid, index, triple

# Axes that may precede z, y, x, and their types.
_KINDS = {"t": "time", "c": "channel"}


def in_nm(unit: str | None) -> float | None:
    """Return the nanometers in a unit of length; None for pixels and unknown units."""
    factors = {
        "nm": 1.0, "nanometer": 1.0, "um": 1e3, "µm": 1e3, "μm": 1e3, "micron": 1e3, "micrometer": 1e3,
        "mm": 1e6, "millimeter": 1e6, "m": 1e9, "meter": 1e9, "cm": 1e7, "inch": 2.54e7,
        "å": 0.1, "a": 0.1, "angstrom": 0.1, "pm": 1e-3,
    }  # fmt: skip
    name = (unit or "").strip().replace("\\u00B5m", "µm").lower()
    return factors.get(name.removesuffix("s").replace("metre", "meter"))


def parse_multiscales(
    attrs: Mapping[str, Any], where: str
) -> list[tuple[str, NDArray[np.float64], NDArray[np.float64]]]:
    """Return, for each listed dataset, its path, voxel size and translation (center of voxel 0), both nm, z y x.

    Args:
        attrs: attributes of the group. where: its location, for messages.

    Raises:
        MetadataError: the attribute is missing, broken, or describes more than scaled and translated z, y, x axes.
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


def names_levels(attrs: Mapping[str, Any]) -> bool:
    """Return whether these are the attributes of a multiscale group."""
    return "multiscales" in attrs or "multiscales" in (attrs.get("ome") or {})


def multiscales_attrs(grids: Sequence[VoxelGrid], name: str, zarr_format: int = 2) -> dict[str, Any]:
    """Return the OME-NGFF attributes for levels s0, s1, ... on ``grids`` (z y x, nanometers): ``multiscales`` of
    version 0.4 for Zarr v2, ``ome`` of version 0.5 for Zarr v3."""
    datasets = []
    for k, grid in enumerate(grids):
        scale = {"type": "scale", "scale": list(grid.voxel_size)}
        translation = {"type": "translation", "translation": list(grid.translation)}
        datasets.append({"path": f"s{k}", "coordinateTransformations": [scale, translation]})
    axes = [{"name": axis, "type": "space", "unit": "nanometer"} for axis in "zyx"]
    multiscale = {
        "name": name,
        "axes": axes,
        "datasets": datasets,
        "coordinateTransformations": [{"type": "scale", "scale": [1.0, 1.0, 1.0]}],
    }
    if zarr_format == 3:
        return {"ome": {"version": "0.5", "multiscales": [multiscale]}}
    return {"multiscales": [{"version": "0.4", **multiscale}]}


def leading_axes(attrs: Mapping[str, Any], where: str) -> int:
    """Return the number of axes (t, c) before z, y, x; raises as `parse_multiscales`."""
    return _axes(_multiscale(attrs, where).get("axes"), where)[0]


def grid_of_attrs(attrs: Mapping[str, Any], shape: Sequence[int], where: str) -> VoxelGrid | None:
    """Return the grid in an array's own attributes, nm z y x; `MetadataError` if it is broken.

    They are ``voxel_size`` (or ``resolution``, ``scale``) and ``translation`` (or ``offset``), which is the center of
    voxel 0 (default: origin). None if there is no voxel size or the array does not have three axes.
    """
    size = next((attrs[key] for key in ("voxel_size", "resolution", "scale") if key in attrs), None)
    first = next((attrs[key] for key in ("translation", "offset") if key in attrs), (0.0, 0.0, 0.0))
    if size is None or len(shape) != 3:
        return None
    try:
        return VoxelGrid(size, first, index(shape))
    except InputError as error:
        raise MetadataError(f"attributes of {where}: {error}") from error


def _multiscale(attrs: Mapping[str, Any], where: str) -> dict[str, Any]:
    ome = attrs.get("ome")
    found = ome.get("multiscales") if isinstance(ome, dict) and "multiscales" in ome else attrs.get("multiscales")
    if found is None:
        raise MetadataError(f"{where} has no multiscales attribute; expected an OME-NGFF 0.4 or 0.5 group")
    if not isinstance(found, list) or not found or not isinstance(found[0], dict):
        raise MetadataError(f"{where}: multiscales must be a list with one object, found {str(found)[:80]}")
    return found[0]


def _axes(axes: Any, where: str) -> tuple[int, NDArray[np.float64]]:
    """The number of axes before z, y, x, and nanometers per unit along these (CellMap data may omit the unit: nm)."""
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
    factors = []
    for unit in (axis.get("unit", "nanometer") for axis in described[leading:]):
        factor = 1.0 if unit is None else in_nm(str(unit))
        if factor is None:
            raise MetadataError(f"{where}: unknown unit {unit!r}; expected nanometer, micrometer or angstrom")
        factors.append(factor)
    return leading, np.array(factors)


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
