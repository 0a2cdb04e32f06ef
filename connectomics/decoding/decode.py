"""Decode one array in memory: the probabilities of one class to its labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from connectomics.decoding.affinities.segment import segment
from connectomics.decoding.cellmap_postprocess import components, finished
from connectomics.decoding.parameters import DECODERS, DecodeParameters
from connectomics.decoding.probabilities import above, unit_of
from connectomics.decoding.watershed.forest import flood, grow, split
from connectomics.decoding.watershed.heights import HeadValues, LearnedDistance
from connectomics.errors import InputError


def decode_class(
    probabilities: NDArray[Any],
    voxel_size: Sequence[float],
    parameters: DecodeParameters,
    *,
    boundary: NDArray[Any] | None = None,
    head: HeadValues | None = None,
    affinities: tuple[NDArray[Any], ArrayLike] | None = None,
) -> NDArray[Any]:
    """Decode the probabilities of one class.

    Objects with a boundary are found outside of the boundary, and then grown back over it: a watershed on the boundary
    probability, so that they meet where it is highest. Foreground that touches no object is dropped.

    Args:
        probabilities: (D, H, W), see `connectomics.decoding.probabilities.above`.
        voxel_size: nm, z y x.
        parameters: what to do.
        boundary: (D, H, W) probability of the boundary between objects (another class, or the boundary head of the
            class), if ``parameters.has_boundary``. ``threshold`` holds for it too.
        head: distances, if ``parameters.height`` is distance.
        affinities: (K, D, H, W) and their offsets (`connectomics.decoding.affinities.segment`), if the method reads
            them.

    Returns:
        (D, H, W): uint8 0/1 for the method ``threshold``, else ids 1..n by their first voxel in z-y-x order, in the
        narrowest unsigned type.
    """
    volume = np.asarray(probabilities)
    if volume.ndim != 3:
        raise InputError(f"decoding needs a (D, H, W) volume, got shape {volume.shape}")
    if volume.size == 0:
        return np.zeros(volume.shape, np.uint8)
    connectivity, min_voxels = parameters.connectivity, parameters.min_voxels(voxel_size)
    if parameters.is_registered:
        values = volume.astype(np.float32) / np.float32(unit_of(volume.dtype))
        ids = np.asarray(DECODERS[parameters.method](values, voxel_size, parameters))
        if ids.shape != values.shape or ids.dtype.kind not in "iu":
            raise InputError(
                f"decoder {parameters.method!r}: expected integer ids of shape {values.shape}, got {ids.dtype} of "
                f"shape {ids.shape}; fix the function given to register_decoder"
            )
        return finished(np.ascontiguousarray(ids), min_voxels, connectivity, parameters.fill_holes)
    mask = above(volume, parameters.threshold)
    if parameters.is_local:
        return mask.astype(np.uint8)
    if affinities is not None:
        pieces: NDArray[Any] = segment(*affinities, mask, parameters).labels
    else:
        cores = mask if boundary is None else mask & ~above(boundary, parameters.threshold)
        pieces = _pieces(cores, voxel_size, parameters, head)
    labels = finished(pieces, min_voxels, connectivity, parameters.fill_holes)
    if boundary is not None:
        labels = grow(mask, boundary, labels, connectivity).astype(labels.dtype)
    return labels if parameters.kind == "instance" else (labels > 0).astype(np.uint8)


def _pieces(
    mask: NDArray[np.bool_], voxel_size: Sequence[float], parameters: DecodeParameters, head: HeadValues | None
) -> NDArray[Any]:
    """Connected components of a mask, or the pieces of a watershed."""
    connectivity, reach = parameters.connectivity, parameters.min_distance_nm
    if parameters.height == "distance":
        if head is None or head.values.shape != mask.shape:
            found = "none" if head is None else f"one of {head.values.shape}"
            raise InputError(f"decoding with height distance needs that head of shape {mask.shape}, got {found}")
        rule = LearnedDistance.of(head.scale_nm, parameters.max_depth_nm, head.values.dtype)
        return flood(rule.heights(mask, head.values), connectivity, voxel_size, reach, rule.floor)
    if parameters.method == "watershed":
        return split(mask, connectivity, voxel_size, reach, parameters.max_depth_nm)
    return components(mask, connectivity)
