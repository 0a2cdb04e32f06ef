"""Decode one array in memory: the probabilities of one class to its labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.decoding.cellmap_postprocess import (
    components,
    fill_holes,
    filter_by_size,
    finished,
    semantic_to_instance,
)
from connectomics.decoding.parameters import DECODERS, DecodeParameters
from connectomics.decoding.probabilities import above, unit_of
from connectomics.decoding.watershed.forest import flood, grow
from connectomics.decoding.watershed.heights import HeadValues, LearnedDistance
from connectomics.errors import InputError


def decode_class(
    probabilities: NDArray[Any], voxel_size: Sequence[float], parameters: DecodeParameters
) -> NDArray[Any]:
    """Decode the probabilities of one class.

    Args:
        probabilities: (D, H, W), see `connectomics.decoding.probabilities.above`.
        voxel_size: nm, z y x.
        parameters: what to do.

    Returns:
        (D, H, W): uint8 0/1 for the method ``threshold``, else ids 1..n in the narrowest unsigned type.
    """
    if parameters.is_registered:
        return _decode_registered(probabilities, voxel_size, parameters)
    return decode_mask(above(probabilities, parameters.threshold), voxel_size, parameters)


def _decode_registered(
    probabilities: NDArray[Any], voxel_size: Sequence[float], parameters: DecodeParameters
) -> NDArray[Any]:
    values = np.asarray(probabilities, np.float32) / np.float32(unit_of(probabilities.dtype))
    ids = np.asarray(DECODERS[parameters.method](values, voxel_size, parameters))
    if ids.shape != values.shape or ids.dtype.kind not in "iu":
        raise InputError(
            f"decoder {parameters.method!r}: expected integer ids of shape {values.shape}, got {ids.dtype} of shape "
            f"{ids.shape}; fix the function given to register_decoder"
        )
    if ids.size == 0:
        return np.zeros(ids.shape, np.uint8)
    min_voxels = parameters.min_voxels(voxel_size)
    return finished(np.ascontiguousarray(ids), min_voxels, parameters.connectivity, parameters.fill_holes)


def decode_mask(
    mask: NDArray[np.bool_], voxel_size: Sequence[float], parameters: DecodeParameters, head: HeadValues | None = None
) -> NDArray[Any]:
    """Decode a mask of foreground as `decode_class` does; ``head``: distances, if ``parameters.height`` needs them."""
    if mask.ndim != 3:
        raise InputError(f"decoding needs a (D, H, W) volume, got shape {mask.shape}")
    min_voxels, connectivity = parameters.min_voxels(voxel_size), parameters.connectivity
    if parameters.height == "distance":
        if head is None or head.values.shape != mask.shape:
            found = "none" if head is None else f"one of {head.values.shape}"
            raise InputError(f"decoding with height distance needs that head of shape {mask.shape}, got {found}")
        if mask.size == 0:
            return np.zeros(mask.shape, np.uint8)
        rule = LearnedDistance.of(head.scale_nm, parameters.max_depth_nm, head.values.dtype)
        heights = rule.heights(mask, head.values)
        pieces = flood(heights, connectivity, voxel_size, parameters.min_distance_nm, rule.floor)
        return finished(pieces, min_voxels, connectivity, parameters.fill_holes)
    if parameters.method != "threshold":
        return semantic_to_instance(
            mask,
            min_voxels,
            parameters.method,
            connectivity=connectivity,
            fill_holes=parameters.fill_holes,
            min_distance=parameters.min_distance_nm,
            max_depth=parameters.max_depth_nm,
            voxel_size=voxel_size,
        )
    if parameters.is_local or mask.size == 0:
        return mask.astype(np.uint8)
    pieces = components(mask, connectivity)
    if parameters.fill_holes:
        pieces = fill_holes(pieces, connectivity)
    return (filter_by_size(pieces, min_voxels) > 0).astype(np.uint8)


def decode_between(
    mask: NDArray[np.bool_], boundary: NDArray[Any], voxel_size: Sequence[float], parameters: DecodeParameters
) -> NDArray[Any]:
    """Decode objects that touch: find them where there is no boundary, then grow them back over it.

    Args:
        mask: (D, H, W), where the class is.
        boundary: (D, H, W) probability of the boundary between objects (another class, or the boundary head of the
            class), see `connectomics.decoding.probabilities.above`.
        voxel_size: nm, z y x.
        parameters: ``threshold`` holds for the boundary too.

    Returns:
        (D, H, W) ids 1..n by their first voxel in z-y-x order. Growing is a watershed on the boundary probability:
        objects meet where it is highest. Foreground that touches no object is dropped.
    """
    cores = decode_mask(mask & ~above(boundary, parameters.threshold), voxel_size, parameters)
    return grow(mask, boundary, cores, parameters.connectivity).astype(cores.dtype)
