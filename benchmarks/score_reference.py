"""The official way of scoring one instance volume, plainly, to measure against.

Written from the published rules, not from the toolbox's code: one region per truth instance, which is
the union of the two bounding boxes padded by half the crop and two voxels, and two whole Euclidean distance transforms
in it. The result is the same as `connectomics.metrics.challenge.score_instance`; the cost is not.
"""

from __future__ import annotations

import math
from typing import Any

import cc3d
import numpy as np
from numpy.typing import NDArray
from ortools.graph.python import min_cost_flow
from scipy.ndimage import distance_transform_edt, find_objects

COST = 1_000_000


class OfficialWay:
    """Matching once, then distances instance by instance, so that a benchmark can stop after a few of them."""

    def __init__(self, pred: NDArray[Any], truth: NDArray[Any], voxel_size: tuple[float, float, float]) -> None:
        self.voxel_size = np.asarray(voxel_size, dtype=np.float64)
        self.truth = truth
        self.cap = float(min(v * n / 2 for v, n in zip(voxel_size, truth.shape, strict=True)))
        components, self.n_pred = cc3d.connected_components(pred, return_N=True)
        self.truth_ids = np.unique(truth)[1:] if (truth == 0).any() else np.unique(truth)
        n_truth = int(truth.max())
        self.skipped = bool(n_truth and self.n_pred) and self.n_pred / n_truth > 10 + 50 * math.exp(-n_truth / 5)
        self.matches = {} if self.skipped else self._match(components, n_truth)
        # Unmatched components keep their numbers, whatever truth has that number (the rule's quirk).
        table = np.arange(self.n_pred + 1, dtype=np.int64)
        for part, truth_id in self.matches.items():
            table[part] = truth_id
        self.pred = table[components]
        self._truth_boxes = find_objects(truth)
        self._pred_boxes = find_objects(self.pred)

    def _match(self, components: NDArray[Any], n_truth: int) -> dict[int, int]:
        both = (self.truth > 0) & (components > 0)
        if n_truth == 0 or self.n_pred == 0 or not both.any():
            return {}
        sizes_t = np.bincount(self.truth.ravel(), minlength=n_truth + 1)
        sizes_p = np.bincount(components.ravel(), minlength=self.n_pred + 1)
        pairs, counts = np.unique(
            np.stack([self.truth[both], components[both].astype(self.truth.dtype)]), axis=1, return_counts=True
        )
        iou = (counts / (sizes_t[pairs[0]] + sizes_p[pairs[1]] - counts)).astype(np.float32)
        flow = min_cost_flow.SimpleMinCostFlow()
        sink = n_truth + self.n_pred + 1
        for t in range(1, n_truth + 1):
            flow.add_arc_with_capacity_and_unit_cost(0, t, 1, 0)
        for t in range(1, n_truth + 1):
            flow.add_arc_with_capacity_and_unit_cost(t, sink, 1, COST + 1)
        arcs = {}
        for (t, p), value in zip(pairs.T.tolist(), iou, strict=True):
            arc = flow.add_arc_with_capacity_and_unit_cost(t, n_truth + p, 1, int((1.0 - float(value)) * COST))
            arcs[arc] = (p, t)
        for p in range(1, self.n_pred + 1):
            flow.add_arc_with_capacity_and_unit_cost(n_truth + p, sink, 1, 0)
        flow.set_node_supply(0, n_truth)
        flow.set_node_supply(sink, -n_truth)
        assert flow.solve() == flow.OPTIMAL
        return {p: t for arc, (p, t) in arcs.items() if flow.flow(arc)}

    def distance(self, truth_id: int) -> float:
        """The capped Hausdorff distance of one truth instance, nm, with the official padding."""
        boxes = [b for b in (self._truth_boxes[truth_id - 1], self._pred_box(truth_id)) if b is not None]
        pad = np.ceil(self.cap / self.voxel_size).astype(int) + 2
        region = tuple(
            slice(max(0, min(b[k].start for b in boxes) - pad[k]), min(n, max(b[k].stop for b in boxes) + pad[k]))
            for k, n in enumerate(self.truth.shape)
        )
        a, b = self.truth[region] == truth_id, self.pred[region] == truth_id
        if not b.any():
            return self.cap
        to_b = distance_transform_edt(~b, sampling=self.voxel_size)
        to_a = distance_transform_edt(~a, sampling=self.voxel_size)
        return min(max(float(to_b[a].max()), float(to_a[b].max())), self.cap)

    def _pred_box(self, truth_id: int) -> tuple[slice, ...] | None:
        return self._pred_boxes[truth_id - 1] if truth_id <= len(self._pred_boxes) else None

    def score(self) -> dict[str, Any]:
        """Everything, as the official result has it."""
        if self.skipped:
            counts = {"tp": 0, "fp": 0, "fn": 0, "hausdorff_norm_sum": 0.0, "n_hausdorff": 0}
            return {**counts, "status": "skipped_too_many_instances"}
        tp = len(self.matches)
        fp = self.n_pred - tp
        distances = np.array([self.distance(int(t)) for t in self.truth_ids] + [self.cap] * fp, dtype=np.float32)
        mapped = 1.01 ** (-distances / np.linalg.norm(self.voxel_size))
        return {
            "tp": tp,
            "fp": fp,
            "fn": int(self.truth_ids.size) - tp,
            "hausdorff_norm_sum": float(np.sum(mapped)),
            "n_hausdorff": int(mapped.size),
            "status": "scored",
        }
