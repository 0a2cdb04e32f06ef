"""Instances from affinities, in memory: mutex watershed, and agglomeration by mean affinity.

An affinity says how likely a voxel p and its neighbor p + o at an offset o belong to one object, 0 to 1. Both methods
are exact and need no compiler at run time: mwatershed gives the same partitions but takes 400 bytes a voxel and float64
affinities; waterz gives the same from the same fragments but takes the three unit steps only. Position decides ties,
so the result depends on the input alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from connectomics.decoding.parameters import DecodeParameters
from connectomics.errors import InputError

_FINE = 65535  # steps in [0, 1] to which affinities that are not uint8 are rounded


@dataclass(frozen=True)
class Segments:
    """Instances, and the pairs of them that are apart.

    Attributes:
        labels: (D, H, W) int32, 0 background, 1..count by their first voxel in z-y-x order.
        count: how many.
        apart: (m, 2) int64 labels of instances that affinities separate: with mutex_watershed those that repel each
            other, with agglomeration those that touch.
    """

    labels: NDArray[np.int32]
    count: int
    apart: NDArray[np.int64]


def segment(
    affinities: ArrayLike,
    offsets: ArrayLike,
    mask: NDArray[np.bool_] | None = None,
    parameters: DecodeParameters | None = None,
) -> Segments:
    """Segment a volume that is in memory.

    ``mutex_watershed``: pairs of voxels attract if their affinity is above a bias and repel if it is below; the
    farthest from its bias decides first. ``agglomeration``: the strongest affinity of each voxel links voxels to
    fragments; touching fragments with the highest mean affinity are merged first, while it is above the threshold.

    Args:
        affinities: (K, D, H, W); uint8 as value/255, or floats in [0, 1], which are rounded to 1/65535.
        offsets: (K, 3) whole voxels, z y x: channel k says whether p and p + offsets[k] belong to one object. Pairs
            that reach out of the volume are ignored. Some must be unit steps; agglomeration uses only these.
        mask: (D, H, W): instances, and both voxels of a pair, lie only where it is true; None: everywhere.
        parameters: the method with its biases or threshold; None: mutex_watershed with its defaults.

    Memory, beside the arguments, for each voxel: 4 bytes and, where the mask is true, mutex_watershed 4 K + 20 and
    what the clusters that repel each other need (measured: 20 to 60 bytes if objects touch everywhere), agglomeration
    about 60 bytes for each fragment and 60 for each pair of touching ones.

    Raises:
        InputError: shapes or types that do not fit, values outside [0, 1], offsets that repeat or are zero.
    """
    chosen = DecodeParameters(method="mutex_watershed") if parameters is None else parameters
    values, steps = _checked(affinities, offsets)
    inside = np.ones(values.shape[1:], np.bool_) if mask is None else np.asarray(mask)
    if inside.shape != values.shape[1:] or inside.dtype != np.bool_:
        raise InputError(
            f"expected a bool mask of the shape of the affinities {values.shape[1:]}, got {inside.dtype} of "
            f"{inside.shape}"
        )
    number = int(np.count_nonzero(inside))
    nodes = np.full(inside.shape, -1, np.int32)
    nodes[inside] = np.arange(number, dtype=np.int32)
    short = _unit_steps(steps)
    if chosen.method == "agglomeration":
        return _agglomerated(values[short], steps[short], nodes, number, chosen.merge_threshold)
    bias = np.where(short, chosen.bias_short, chosen.bias_long)
    return _mutex_watershed(values, steps, nodes, number, bias)


def _unit_steps(offsets: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return (K,) which offsets (K, 3) are one voxel along one axis."""
    return np.asarray(np.abs(offsets).sum(axis=1) == 1)


def _mutex_watershed(
    values: NDArray[Any], offsets: NDArray[np.int64], nodes: NDArray[np.int32], number: int, bias: NDArray[np.float64]
) -> Segments:
    from connectomics.decoding.affinities import mutex_kernels as mutex

    most = _most(values)
    counts = np.zeros((len(values), most + 1), np.int64)
    for channel, offset, into in zip(values, offsets, counts, strict=True):
        mutex.count_edges(channel, nodes, offset, into)
    weights = np.arange(most + 1) / most - bias[:, None]
    # Edges of one channel and one value share their weight: the order of such bins is the order of all edges. Weights
    # that differ by rounding only are equal; of equals, attraction goes first, then channels in their order.
    channel, value = np.nonzero((counts > 0) & (np.abs(weights) > 1e-9))
    weight = weights[channel, value]
    order = np.lexsort((value, channel, weight < 0, -np.abs(weight).round(9)))
    channel, value, weight = channel[order], value[order], weight[order]
    bins = np.concatenate(([0], np.cumsum(counts[channel, value])))
    places = np.full(counts.shape, -1, np.int64)
    places[channel, value] = bins[:-1]
    edges = np.empty(bins[-1], np.uint32)
    for k, offset in enumerate(offsets):
        mutex.place_edges(values[k], nodes, offset, places[k], edges)
    _, height, width = nodes.shape
    steps = offsets @ np.array([height * width, width, 1])
    parent, table = mutex.cluster(edges, bins, steps[channel], weight > 0, nodes.ravel(), number)
    return _segments(parent, nodes, mutex.roots_apart(table, parent))


def _agglomerated(
    values: NDArray[Any], offsets: NDArray[np.int64], nodes: NDArray[np.int32], number: int, threshold: float
) -> Segments:
    from connectomics.decoding.affinities import agglomeration_kernels as kernels

    most = _most(values)
    limit = threshold * most
    parent = kernels.strongest_links(values, nodes, offsets, int(np.floor(limit + 1e-9)), number)
    fragments = _segments(parent, nodes, np.empty((0, 2), np.int64))
    ends, sums, counts = kernels.region_graph(values, fragments.labels, offsets)
    parent, alive = kernels.merge_regions(ends, sums, counts, fragments.count, limit)
    # node 0 is the background, which is united with nothing
    apart = ends[alive].astype(np.int64) - 1
    return _segments(parent[1:] - 1, fragments.labels - 1, apart)


def _segments(parent: NDArray[np.int32], nodes: NDArray[np.int32], apart: NDArray[np.int64]) -> Segments:
    """From a forest over the nodes of voxels; ``apart`` are pairs of nodes."""
    from connectomics.decoding.affinities import mutex_kernels as mutex

    numbers = np.empty(len(parent) + 1, np.int32)
    count = int(mutex.number_trees(parent, numbers[:-1]))
    numbers[-1] = 0  # of -1, where there is no node
    return Segments(numbers[nodes], count, numbers[apart].astype(np.int64))


def _most(values: NDArray[Any]) -> int:
    """The whole number that stands for an affinity of 1."""
    return 255 if values.dtype == np.uint8 else _FINE


def _checked(affinities: ArrayLike, offsets: ArrayLike) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Affinities as uint8 or uint16, and offsets, checked to fit each other."""
    values, steps = np.asarray(affinities), np.asarray(offsets)
    if values.ndim != 4 or steps.shape != (len(values), 3):
        raise InputError(
            f"affinities must be (K, D, H, W) and offsets (K, 3), got shapes {values.shape} and {steps.shape}"
        )
    if steps.dtype.kind not in "iu":
        raise InputError(f"offsets must be whole voxels, got {steps.dtype}")
    steps = steps.astype(np.int64)
    if not _unit_steps(steps).any():
        raise InputError(f"affinities need an offset to a neighbor, such as (1, 0, 0), got {steps.tolist()}")
    if not steps.any(axis=1).all() or len(np.unique(steps, axis=0)) < len(steps):
        raise InputError(f"offsets must differ from each other and from zero, got {steps.tolist()}")
    if values[0].size >= 1 << 31:
        raise InputError(
            f"{values[0].size} voxels are too many for one array, expected fewer than 2^31; segment them block by block"
        )
    if values.dtype == np.uint8:
        return values, steps
    if values.dtype.kind != "f":
        raise InputError(f"affinities must be uint8 (value/255) or floats in [0, 1], got {values.dtype}")
    fine = np.empty(values.shape, np.uint16)
    for channel, into in zip(values, fine, strict=True):
        low, high = float(np.min(channel, initial=0.0)), float(np.max(channel, initial=0.0))
        if not (low >= -1e-6 and high <= 1 + 1e-6):  # also where one is NaN
            raise InputError(f"affinities must lie in [0, 1], got {low:.4g} to {high:.4g}; apply the sigmoid first")
        into[:] = np.rint(np.clip(channel.astype(np.float32), 0, 1) * _FINE)
    return fine, steps
