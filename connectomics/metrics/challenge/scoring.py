"""The score of one class in one crop, from arrays: `score_instance` and `score_semantic`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from connectomics.errors import InputError
from connectomics.geometry import Triple, triple
from connectomics.machine import usable_cores
from connectomics.metrics.cellmap_metrics import Counts
from connectomics.metrics.challenge.instance_distances import Box, Distances
from connectomics.metrics.challenge.results import (
    FAILED,
    MISSING,
    SCORED,
    TOO_MANY,
    InstanceScore,
    InstanceTable,
    Panoptic,
    SemanticScore,
)
from connectomics.metrics.challenge.rules import DEFAULT_RULES, RULES, Rules, get_rules
from connectomics.metrics.overlaps import OverlapCounter, Overlaps, label_array

if TYPE_CHECKING:
    from connectomics.metrics.challenge.blocks import BlockPair

VolumePair: TypeAlias = "InMemoryPair | BlockPair"  # in memory or on disk


# -- the two functions -------------------------------------------------------------------------------------------------
def score_instance(
    pred: ArrayLike,
    truth: ArrayLike,
    voxel_size: ArrayLike,
    rules: str | Rules = DEFAULT_RULES,
    *,
    workers: int | None = None,
    compare: bool = False,
) -> InstanceScore:
    """Return the challenge's score of an instance segmentation of one crop.

    Args:
        pred: predicted instances (D, H, W), bool, integer or float, 0 background. It is first split into
            26-connected components of equal value. NaN counts as background, with a warning.
        truth: true instances (D, H, W), whole numbers >= 0, 0 background, not split.
        voxel_size: nm, z y x.
        rules: version of the rules, or a `Rules` object.
        workers: threads for the distances (default: one per available core).
        compare: also compute the sums by all other rules, which costs more distances if they differ.

    Returns:
        Counts and sums to pool over crops, `Panoptic` counts and an `InstanceTable`. If both volumes are background,
        everything is 0 and the status ``scored``; a crop with too many predicted instances has all counts 0 and the
        status ``skipped_too_many_instances``.

    Raises:
        InputError: the volumes have another rank, different shapes, no voxel, or unusable types.
    """
    rules = get_rules(rules)
    spacing = triple(voxel_size, "voxel_size")
    pair = InMemoryPair(pred, truth)
    if pair.nan_voxels:
        warnings.warn(nan_message(pair.nan_voxels), stacklevel=2)
    others = tuple(RULES.values()) if compare else ()
    return score_pair(pair, spacing, rules, workers or usable_cores(), others)


def score_semantic(pred: ArrayLike, truth: ArrayLike) -> SemanticScore:
    """Return the voxel counts of ``pred > 0`` against ``truth > 0`` (D, H, W of one shape, any number type).

    NaN in the prediction counts as background, with a warning. Raises `InputError` if shapes differ.
    """
    a, b = np.asarray(pred), np.asarray(truth)
    check_shapes(a, b)
    nan_voxels = nan_count(a)
    if nan_voxels:
        warnings.warn(nan_message(nan_voxels), stacklevel=2)
    counts = Counts.of(a, b)
    return SemanticScore(counts.tp, counts.fp, counts.fn, nan_voxels=nan_voxels)


# -- input -------------------------------------------------------------------------------------------------------------
def prediction_array(pred: ArrayLike) -> tuple[NDArray[Any], int]:
    """Return a prediction in native byte order and C order, and the number of its NaN voxels, which become 0."""
    array = np.asarray(pred)
    if array.dtype.kind not in "biuf":
        raise InputError(f"a prediction must be bool, integer or float, got dtype {array.dtype}")
    array = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))
    count = nan_count(array)
    return (np.where(np.isnan(array), array.dtype.type(0), array) if count else array), count


def nan_count(values: NDArray[Any]) -> int:
    """Return the number of values that are NaN."""
    return int(np.count_nonzero(np.isnan(values))) if values.dtype.kind == "f" else 0


def truth_array(truth: ArrayLike) -> NDArray[Any]:
    """Return a ground truth as unsigned labels; `InputError` for negative ones."""
    array = np.asarray(truth)
    if array.dtype.kind in "if" and array.size and array.min() < 0:
        raise InputError(f"ground-truth labels must be 0 (background) or positive, got {array.min()}")
    return np.ascontiguousarray(label_array(array, "the ground truth"))


def check_shapes(pred: NDArray[Any], truth: NDArray[Any]) -> None:
    """Raise `InputError` unless both are three-dimensional, of one shape and not empty."""
    if pred.ndim != 3 or pred.shape != truth.shape:
        raise InputError(
            f"prediction and ground truth must be three-dimensional (z y x) and of one shape, "
            f"got {pred.shape} and {truth.shape}"
        )
    if pred.size == 0:
        raise InputError(f"nothing to score: the volumes are empty, shape {pred.shape}")


def nan_message(voxels: int) -> str:
    """Return the warning about NaN in a prediction."""
    return f"{voxels} voxels of the prediction are NaN and count as background"


# -- volumes -----------------------------------------------------------------------------------------------------------
class InMemoryPair:
    """Two volumes (D, H, W) in memory; the prediction is split into 26-connected components of equal value.

    Raises `InputError` for unusable types or shapes (see `score_instance`).
    """

    def __init__(self, pred: ArrayLike, truth: ArrayLike) -> None:
        import cc3d

        self._pred, self.nan_voxels = prediction_array(pred)
        self._truth = truth_array(truth)
        check_shapes(self._pred, self._truth)
        self.shape = self._truth.shape
        self.scratch_bytes = max(self._pred.nbytes + self._truth.nbytes, 1 << 26)
        self.max_truth = int(self._truth.max())
        if self.max_truth >= 1 << 63:
            raise InputError(f"ground-truth labels must be below 2^63, got {self.max_truth}")
        self._parts, self.n_parts = cc3d.connected_components(self._pred, return_N=True, out_dtype=np.uint32)
        self._rank: dict[int, int] | None = None

    def overlaps(self) -> Overlaps:
        """Return sizes, boxes and overlapping pairs, by the ground truth's own labels."""
        # Tables have an entry for every label up to the largest, so sparse labels are renumbered, in order.
        if self.max_truth > max(1 << 16, self._truth.size // 16):
            import fastremap

            values = fastremap.unique(self._truth)
            values = values[values != 0]
            self._rank = {int(v): i + 1 for i, v in enumerate(values)}
            self._truth = fastremap.remap(self._truth, {0: 0, **self._rank})
            found, labels = self._count(len(values)), values.astype(np.int64)
            return replace(found, truth_ids=labels[found.truth_ids - 1], pair_truth=labels[found.pair_truth - 1])
        return self._count(self.max_truth)

    def count_truth(self) -> int:
        """Return the number of labels other than 0 in the ground truth."""
        import fastremap

        return int(np.count_nonzero(fastremap.unique(self._truth)))

    def _count(self, max_truth: int) -> Overlaps:
        counter = OverlapCounter(max_truth, self.n_parts)
        counter.add(self._truth, self._parts)
        return counter.result()

    def truth_mask(self, truth_id: int, box: Box) -> NDArray[np.bool_]:
        """Return, inside ``box``, where the ground truth is ``truth_id``."""
        label = truth_id if self._rank is None else self._rank[truth_id]
        return np.asarray(self._truth[box] == label)

    def parts_mask(self, parts: tuple[int, int], box: Box) -> NDArray[np.bool_]:
        """Return, inside ``box``, where the component is one of two numbers; the second may be 0 for none."""
        return where_parts(self._parts[box], parts)

    def prediction_values(self, parts: NDArray[np.int64], first: NDArray[np.int32]) -> NDArray[Any]:
        """Return the predicted values (N,) of components (N,) whose first voxels are ``first`` (N, 3), z y x."""
        return self._pred[tuple(first.T)]


def where_parts(components: NDArray[Any], parts: tuple[int, int]) -> NDArray[np.bool_]:
    """Return where components are one of two numbers; the second may be 0 for none."""
    first, second = parts
    mask: NDArray[np.bool_] = components == first
    if second not in (0, first):
        mask |= components == second
    return mask


# -- matching and scoring ----------------------------------------------------------------------------------------------
# Absent ground-truth labels get a node too, since the solver breaks ties by node and arc numbers. Beyond this many, the
# labels are renumbered in order, which can only change a tie.
_MAX_NODES = 2_000_000


class MatchingFailedError(Exception):
    """The solver found no optimum; as in the official scorer, the crop is then dropped from the class."""


def match(overlaps: Overlaps, max_truth: int, rules: Rules) -> NDArray[np.int64]:
    """Return the component matched to each label of ``overlaps.truth_ids``, 0 for none, (T,).

    This is the minimum-cost flow of the official scorer, from a source through ground-truth labels and components to a
    sink. Leaving a label unmatched costs more than any overlap, so as many as possible are matched. The order of the
    arcs is part of the rule, because OR-tools breaks ties by it. ``max_truth`` is the largest ground-truth label.
    """
    matched = np.zeros(overlaps.truth_ids.size, np.int64)
    iou = overlaps.pair_iou().astype(np.float32)
    keep = iou > 0
    if not keep.any():
        return matched
    from ortools.graph.python import min_cost_flow

    compact = max_truth > _MAX_NODES
    pair_row = overlaps.pair_row[keep]
    n_truth = overlaps.truth_ids.size if compact else max_truth
    truth_node = (pair_row + 1) if compact else overlaps.pair_truth[keep]
    part = overlaps.pair_part[keep]
    n_parts = overlaps.n_parts
    sink = n_truth + n_parts + 1

    truths = np.arange(1, n_truth + 1)
    parts = np.arange(n_truth + 1, sink)
    free, sinks = np.zeros(n_truth, np.int64), np.full(max(n_truth, n_parts), sink)
    cost = ((1.0 - iou[keep].astype(np.float64)) * rules.cost_scale).astype(np.int64)
    solver = min_cost_flow.SimpleMinCostFlow()
    arcs = solver.add_arcs_with_capacity_and_unit_cost(
        np.concatenate([free, truths, truth_node, parts]).astype(np.int32),
        np.concatenate([truths, sinks[:n_truth], part + n_truth, sinks[:n_parts]]).astype(np.int32),
        np.ones(2 * n_truth + part.size + n_parts, np.int64),
        np.concatenate([free, free + (rules.cost_scale + 1), cost, np.zeros(n_parts, np.int64)]),
    )
    solver.set_node_supply(0, n_truth)
    solver.set_node_supply(sink, -n_truth)
    if solver.solve() != solver.OPTIMAL:
        raise MatchingFailedError
    flows = np.asarray(solver.flows(arcs[2 * n_truth : 2 * n_truth + part.size]))
    matched[pair_row[flows > 0]] = part[flows > 0]
    return matched


def score_pair(
    pair: VolumePair, voxel_size: Triple, rules: Rules, workers: int, others: Sequence[Rules] = ()
) -> InstanceScore:
    """Return the instance score of two volumes; see `score_instance`. ``others``: further rules for ``sums``."""

    def dropped(status: str, truths: int) -> InstanceScore:
        counted = Panoptic(fp=pair.n_parts, fn=truths)
        return InstanceScore(0, 0, 0, 0.0, 0, status, rules.version, rules.verified, pair.nan_voxels, counted)

    if rules.too_many(pair.max_truth, pair.n_parts):
        return dropped(TOO_MANY, pair.count_truth())
    overlaps = pair.overlaps()
    if overlaps.pair_voxels.size > rules.max_pairs:
        return dropped(TOO_MANY, overlaps.truth_ids.size)
    try:
        matched = match(overlaps, pair.max_truth, rules)
    except MatchingFailedError:
        return dropped(FAILED, overlaps.truth_ids.size)

    tp = int(np.count_nonzero(matched))
    fp = pair.n_parts - tp
    cap = rules.cap(voxel_size, pair.shape)
    found = Distances(pair, overlaps, matched, voxel_size, cap, workers)
    sums = {}
    for version in (rules, *others):
        unmatched = np.full(fp, version.unmatched_distance(cap), np.float32)
        mapped = version.mapped(np.concatenate([found.by(version), unmatched]), voxel_size, cap)
        sums[version.version] = float(np.sum(mapped))
    return InstanceScore(
        tp, fp, overlaps.truth_ids.size - tp, sums[rules.version], overlaps.truth_ids.size + fp, SCORED,
        rules.version, rules.verified, pair.nan_voxels, _panoptic(overlaps),
        _table(pair, overlaps, matched, found.by(rules)), sums,
    )  # fmt: skip


def _panoptic(overlaps: Overlaps) -> Panoptic:
    """Count pairs above IoU 1/2, which are one to one by themselves."""
    iou = overlaps.pair_iou()
    good = iou > 0.5
    tp = int(np.count_nonzero(good))
    return Panoptic(tp, overlaps.n_parts - tp, overlaps.truth_ids.size - tp, float(iou[good].sum()))


def _table(
    pair: VolumePair, overlaps: Overlaps, matched: NDArray[np.int64], distances: NDArray[np.float32]
) -> InstanceTable:
    iou = np.zeros(matched.size)
    row = overlaps.pair_row
    is_match = matched[row] == overlaps.pair_part
    iou[row[is_match]] = overlaps.pair_iou()[is_match]
    values = pair.prediction_values(matched, overlaps.part_first[matched])
    values = np.where(matched > 0, values, np.zeros(1, values.dtype))
    return InstanceTable(overlaps.truth_ids, values, matched, iou, distances, overlaps.truth_sizes)


def missing_score(rules: Rules, is_instance: bool, truth_ids: int, voxels: int) -> InstanceScore | SemanticScore:
    """Return the score of a label that was not submitted: all true instances, or all voxels, are false negatives.

    For a semantic class, ``truth_ids`` is not 0 if the ground truth has a voxel of it.
    """
    if not is_instance:
        return SemanticScore(0, 0, voxels, MISSING, annotated=truth_ids > 0)
    return InstanceScore(
        0, 0, truth_ids, 0.0, truth_ids, MISSING, rules.version, rules.verified, panoptic=Panoptic(fn=truth_ids)
    )
