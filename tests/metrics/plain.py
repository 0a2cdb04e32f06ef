"""The rules, plainly and slowly: what `connectomics.metrics.challenge` is held against.

Everything is looked at voxel set by voxel set over the whole volume; nothing is shared with the code under test but
cc3d (its numbering is part of the rule) and OR-tools (its ties are).
"""

from __future__ import annotations

import math
from typing import Any

import cc3d
import numpy as np
from numpy.typing import NDArray
from ortools.graph.python import min_cost_flow
from scipy.ndimage import distance_transform_edt
from skimage.transform import rescale


def score_instance(pred: NDArray[Any], truth: NDArray[Any], voxel_size: tuple[float, ...]) -> dict[str, Any]:
    """Rules 2026-06, instance classes, points 1 to 7."""
    parts, n_parts = cc3d.connected_components(pred, connectivity=26, return_N=True)
    n_truth = int(truth.max())
    if n_truth and n_parts and n_parts / n_truth > 10 + 50 * math.exp(-n_truth / 5):
        zeros = {"tp": 0, "fp": 0, "fn": 0, "hausdorff_norm_sum": 0.0, "n_hausdorff": 0}
        return {**zeros, "status": "skipped_too_many_instances"}
    pairs = []
    for t in range(1, n_truth + 1):
        for p in range(1, n_parts + 1):
            both = np.count_nonzero((truth == t) & (parts == p))
            if both:
                iou = np.float32(both / np.count_nonzero((truth == t) | (parts == p)))
                pairs.append((t, p, int((1.0 - float(iou)) * 1_000_000)))
    match = _match(pairs, n_truth, n_parts)  # component -> truth
    renamed = np.zeros(parts.shape, np.int64)
    for p in range(1, n_parts + 1):
        renamed[parts == p] = match.get(p, p)
    cap = min(v * n / 2 for v, n in zip(voxel_size, truth.shape, strict=True))
    distances = [_distance(truth == t, renamed == t, voxel_size, cap) for t in np.unique(truth) if t != 0]
    n_ids = len(distances)
    distances += [cap] * (n_parts - len(match))
    mapped = 1.01 ** (-np.array(distances, np.float32) / np.linalg.norm(np.array(voxel_size, dtype=np.float64)))
    return {
        "tp": len(match),
        "fp": n_parts - len(match),
        "fn": n_ids - len(match),
        "hausdorff_norm_sum": float(np.sum(mapped)),
        "n_hausdorff": len(distances),
        "status": "scored",
    }


def _match(pairs: list[tuple[int, int, int]], n_truth: int, n_parts: int) -> dict[int, int]:
    if not pairs:
        return {}
    flow = min_cost_flow.SimpleMinCostFlow()
    sink = n_truth + n_parts + 1
    for t in range(1, n_truth + 1):
        flow.add_arc_with_capacity_and_unit_cost(0, t, 1, 0)
    for t in range(1, n_truth + 1):
        flow.add_arc_with_capacity_and_unit_cost(t, sink, 1, 1_000_001)
    arcs = [flow.add_arc_with_capacity_and_unit_cost(t, n_truth + p, 1, cost) for t, p, cost in pairs]
    for p in range(1, n_parts + 1):
        flow.add_arc_with_capacity_and_unit_cost(n_truth + p, sink, 1, 0)
    flow.set_node_supply(0, n_truth)
    flow.set_node_supply(sink, -n_truth)
    assert flow.solve() == flow.OPTIMAL
    return {p: t for arc, (t, p, _) in zip(arcs, pairs, strict=True) if flow.flow(arc)}


def _distance(a: NDArray[np.bool_], b: NDArray[np.bool_], voxel_size: tuple[float, ...], cap: float) -> float:
    return min(hausdorff(a, b, voxel_size), cap)


def hausdorff(a: NDArray[np.bool_], b: NDArray[np.bool_], voxel_size: tuple[float, ...]) -> float:
    """Two whole distance transforms; infinite where one mask is empty, 0 where both are."""
    if not a.any() or not b.any():
        return math.inf if a.any() or b.any() else 0.0
    to_a = distance_transform_edt(~a, sampling=voxel_size)
    to_b = distance_transform_edt(~b, sampling=voxel_size)
    return float(max(to_b[a].max(), to_a[b].max()))


def align(
    image: NDArray[Any],
    own: tuple[float, ...] | None,
    own_translation: tuple[float, ...] | None,
    voxel_size: tuple[float, ...],
    translation: tuple[float, ...],
    shape: tuple[int, int, int],
    is_instance: bool,
) -> NDArray[Any]:
    """The rules' section "Onto the truth's grid", by building every intermediate volume."""
    target = np.array(voxel_size)
    if own is not None and not np.allclose(own, target):
        scale = np.array(own) / target
        options = {"mode": "constant", "preserve_range": True}
        if is_instance:
            image = rescale(image, scale, order=0, **options).astype(image.dtype)
        else:
            image = rescale(image.astype(np.float32) if image.dtype == bool else image, scale, order=1, **options) > 0.5
    elif own is None:
        for axis, n in enumerate(shape):
            have = image.shape[axis]
            if have < n:
                before = (n - have) // 2
                widths = [(0, 0)] * 3
                widths[axis] = (before, n - have - before)
                image = np.pad(image, widths)
            else:
                start = (have - n) // 2
                image = np.take(image, range(start, start + n), axis=axis)
    shift = [0, 0, 0]
    if own_translation is not None:
        difference = np.array(own_translation) // target * target - np.array(translation)
        shift = [int(v) for v in np.abs(difference) // target * np.sign(difference)]
    out = np.zeros(shape, image.dtype)
    for z, y, x in np.ndindex(*shape):
        at = (z - shift[0], y - shift[1], x - shift[2])
        if all(0 <= i < n for i, n in zip(at, image.shape, strict=True)):
            out[z, y, x] = image[at]
    return out
