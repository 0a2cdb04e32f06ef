"""Binary masks to instances: connected components or watershed, hole filling, size filter.

Every function takes and gives plain arrays (z y x), leaves its input as it is, and costs a few passes over the volume
plus the sum of the objects' boxes, never the number of objects times the volume.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.errors import InputError
from connectomics.geometry import triple

METHODS = ("cc3d", "watershed")
#: Connectivity of the background: the complement of a 26-connected object is 6-connected and the other way round
#: (Kong & Rosenfeld 1989, "Digital topology").
DUAL = {6: 26, 18: 6, 26: 6}
_DEFAULT_MIN_DISTANCE = 10  # edges of the smallest voxel axis


def semantic_to_instance(
    mask: NDArray[Any],
    min_size: int = 100,
    method: str = "cc3d",
    *,
    connectivity: int = 26,
    fill_holes: bool = False,
    min_distance: float | None = None,
    max_depth: float | None = None,
    voxel_size: Sequence[float] | None = None,
) -> NDArray[Any]:
    """Separate the objects of a binary mask.

    ``cc3d`` takes every connected component as an object. ``watershed`` splits components further: the distance to the
    nearest voxel outside the component is flooded from its peaks (`connectomics.decoding.watershed`). A voxel is a peak
    if no voxel connected to it within ``min_distance`` along each axis (a box) is deeper. Of equally deep voxels the
    first in z-y-x order counts as the deepest, so the result depends on the mask only.

    Args:
        mask: (D, H, W), foreground where above 0 (bool, integer or float; NaN is background).
        min_size: objects of fewer voxels are removed, after splitting and filling.
        method: ``"cc3d"`` or ``"watershed"``.
        connectivity: 6 (faces), 18 (edges) or 26 (corners; what the challenge uses) neighbors are connected.
        fill_holes: give cavities to the object that encloses them (`fill_holes`).
        min_distance: watershed only: reach of a seed, in the unit of ``voxel_size``; None is ten voxels of the
            smallest edge.
        max_depth: watershed only: depths are cut off here, in the same unit; None: no limit.
        voxel_size: nm, z y x; None measures distances in voxels.

    Returns:
        (D, H, W) ids 1..n by their first voxel in z-y-x order, 0 background, in the narrowest of uint8, uint16,
        uint32, uint64 that holds n.

    Raises:
        InputError: wrong rank, unknown method or connectivity, a negative size or distance.
    """
    volume = np.asarray(mask)
    if volume.ndim != 3:
        raise InputError(f"semantic_to_instance needs a (D, H, W) mask, got shape {volume.shape}")
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}; use one of {', '.join(METHODS)}")
    if connectivity not in DUAL:
        raise InputError(f"connectivity must be 6, 18 or 26, got {connectivity!r}")
    if min_size < 0:
        raise InputError(f"min_size must be at least 0 voxels, got {min_size}")
    spacing = triple((1.0, 1.0, 1.0) if voxel_size is None else voxel_size, "voxel_size")
    deepest = math.inf if max_depth is None else float(max_depth)
    reach = _DEFAULT_MIN_DISTANCE * min(spacing) if min_distance is None else float(min_distance)
    if reach <= 0 or min(spacing) <= 0:
        raise InputError(f"min_distance and voxel_size must be positive, got {min_distance} and {voxel_size}")
    if not deepest > 0:
        raise InputError(f"max_depth must be positive, got {max_depth}")
    if volume.size == 0:
        return np.zeros(volume.shape, np.uint8)

    foreground = volume if volume.dtype == np.bool_ else volume > 0
    if method == "watershed":
        from connectomics.decoding.watershed.forest import split

        instances = split(foreground, connectivity, spacing, reach, deepest)
    else:
        instances = components(foreground, connectivity)
    return finished(instances, min_size, connectivity, fill_holes)


def finished(instances: NDArray[Any], min_size: int, connectivity: int, fill_holes: bool) -> NDArray[Any]:
    """The last steps of `semantic_to_instance`, on ids (D, H, W) by their first voxel."""
    import fastremap

    if fill_holes:
        instances = _filled(instances, connectivity)
    if min_size > 1:
        instances = filter_by_size(instances, min_size)
    numbered, _ = fastremap.renumber(np.ascontiguousarray(instances), preserve_zero=True, in_place=False)
    return np.asarray(numbered.astype(np.min_scalar_type(int(numbered.max())), copy=False))


def filter_by_size(instances: NDArray[Any], min_size: int) -> NDArray[Any]:
    """Remove objects of fewer than ``min_size`` voxels, in two passes whatever their number.

    Args:
        instances: (D, H, W) ids, 0 background; any integer type or bool.
        min_size: voxels.

    Returns:
        A new array of the same type; the ids that are left keep their numbers.
    """
    import fastremap

    volume = np.asarray(instances)
    if volume.dtype.kind not in "biu":
        raise InputError(f"filter_by_size needs integer ids, got {volume.dtype}; round them first")
    if min_size <= 1 or volume.size == 0:
        return volume.copy()
    ids = volume.view(np.uint8) if volume.dtype == np.bool_ else volume
    found, counts = fastremap.unique(ids, return_counts=True)
    small = found[(counts < min_size) & (found != 0)]
    if small.size == 0:
        return volume.copy()
    kept = fastremap.mask(np.ascontiguousarray(ids), small.tolist())
    return kept.view(np.bool_) if volume.dtype == np.bool_ else kept


def fill_holes(instances: NDArray[Any], connectivity: int = 26) -> NDArray[Any]:
    """Give every background cavity to the object that encloses it.

    A hole of an object is a piece of its complement that reaches neither the object's box nor the volume's border
    (3D: a tunnel is no hole). Only background is filled: an object inside another one stays, and a cavity enclosed by
    both belongs to the inner one. Background holds together by faces where objects do by corners, and the other
    way round.

    Args:
        instances: (D, H, W) ids, 0 background.
        connectivity: of the objects: 6, 18 or 26.

    Returns:
        A new array of the same type.
    """
    if connectivity not in DUAL:
        raise InputError(f"connectivity must be 6, 18 or 26, got {connectivity!r}")
    volume = np.asarray(instances)
    if volume.ndim != 3 or volume.dtype.kind not in "biu":
        raise InputError(f"fill_holes needs (D, H, W) integer ids, got {volume.dtype} of shape {volume.shape}")
    if volume.size == 0:
        return volume.copy()
    ids = volume.view(np.uint8) if volume.dtype == np.bool_ else volume
    filled = _filled(np.ascontiguousarray(ids), connectivity)
    return filled.view(np.bool_) if volume.dtype == np.bool_ else filled


def components(mask: NDArray[np.bool_], connectivity: int) -> NDArray[Any]:
    """Connected components 1..n of a mask by their first voxel in z-y-x order, in an unsigned type, uint16 or wider."""
    import cc3d

    # checked by the callers; cc3d's stubs ask for literal numbers
    neighbours: Any = connectivity
    if sum(n > 1 for n in mask.shape) < 2:
        neighbours = 6  # the same along a line, where cc3d 4.1 fails with 26
    found: NDArray[Any] = cc3d.connected_components(np.ascontiguousarray(mask), connectivity=neighbours)
    return found


def _filled(instances: NDArray[Any], connectivity: int) -> NDArray[Any]:
    """`fill_holes` of checked input; always a new array."""
    import cc3d
    import fastremap

    out = instances.copy()
    background = components(instances == 0, DUAL[connectivity])
    # Whatever an object encloses is a piece of background that does not reach the border of the volume.
    closed = _closed(background)
    if not closed.any():
        return out
    enclosed = closed[background]
    del background
    compact, numbering = fastremap.renumber(instances, in_place=False, preserve_zero=True)  # ids may have gaps
    boxes = cc3d.statistics(compact)["bounding_boxes"]
    objects = [(boxes[int(new)], int(old)) for old, new in numbering.items() if old != 0]
    # Inner objects first: what they enclose is no longer background when an outer object's turn comes.
    for box, identifier in sorted(objects, key=lambda item: (math.prod(s.stop - s.start for s in item[0]), item[1])):
        candidate = enclosed[box] & (out[box] == 0)
        if not candidate.any():
            continue
        outside = components(instances[box] != identifier, DUAL[connectivity])
        out[box][_closed(outside)[outside] & candidate] = identifier
    return out


def _closed(labels: NDArray[Any]) -> NDArray[np.bool_]:
    """Return for each label 0..n whether it is above 0 and reaches no face of the volume."""
    closed = np.ones(int(labels.max(initial=0)) + 1, np.bool_)
    closed[0] = False
    for axis in range(3):
        closed[np.unique(np.take(labels, [0, -1], axis=axis))] = False
    return closed
