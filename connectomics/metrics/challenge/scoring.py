"""The score of one class in one crop: `score_instance` and `score_semantic` on arrays."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from connectomics.errors import InputError
from connectomics.geometry import Triple, triple
from connectomics.metrics.challenge.instance_distances import Box, Distances
from connectomics.metrics.challenge.matching import MatchingFailedError, match
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
    """The challenge's score of an instance segmentation of one crop (RULES: instance classes 1 to 7).

    Args:
        pred: predicted instances (D, H, W), bool, integer or float, 0 background. Split into 26-connected components of
            equal value first. NaN is background, counted and warned of (cc3d itself would make an instance of each).
        truth: true instances (D, H, W), whole numbers >= 0, 0 background, taken as they are.
        voxel_size: nm, z y x.
        rules: version of the rules, or a `Rules` object.
        workers: threads for the distances (default: one per available core).
        compare: also the sums by all other rules, which costs further distances where they differ.

    Returns:
        Counts and sums to be pooled over crops, with `Panoptic` counts and an `InstanceTable` besides. With nothing in
        either volume everything is 0 and the status ``scored``; a crop with too many predicted instances has all
        counts 0 and the status ``skipped_too_many_instances``.

    Raises `InputError` for volumes of another rank, of different shapes, empty, or of unusable types.
    """
    rules = get_rules(rules)
    spacing = triple(voxel_size, "voxel_size")
    parts_input, nan_voxels = prediction_array(pred)
    if nan_voxels:
        warnings.warn(nan_message(nan_voxels), stacklevel=2)
    labels = truth_array(truth)
    check_shapes(parts_input, labels)
    pair = InMemoryPair(parts_input, labels)
    others = tuple(RULES.values()) if compare else ()
    return score_pair(pair, spacing, rules, workers or available_cores(), nan_voxels, others)


def score_semantic(pred: ArrayLike, truth: ArrayLike) -> SemanticScore:
    """Voxel counts of ``pred > 0`` against ``truth > 0`` (D, H, W of one shape, any number type).

    NaN in the prediction is background, counted and warned of. Raises `InputError` where shapes differ.
    """
    a, b = np.asarray(pred), np.asarray(truth)
    check_shapes(a, b)
    nan_voxels = int(np.count_nonzero(np.isnan(a))) if a.dtype.kind == "f" else 0
    if nan_voxels:
        warnings.warn(nan_message(nan_voxels), stacklevel=2)
    positive, true = a > 0, b > 0
    tp = int(np.count_nonzero(positive & true))
    return SemanticScore(
        tp, int(np.count_nonzero(positive)) - tp, int(np.count_nonzero(true)) - tp, nan_voxels=nan_voxels
    )


# -- input -------------------------------------------------------------------------------------------------------------
def prediction_array(pred: ArrayLike) -> tuple[NDArray[Any], int]:
    """A prediction as cc3d takes it (native, C order) and the number of its NaN voxels, which are set to 0."""
    array = np.asarray(pred)
    if array.dtype.kind not in "biuf":
        raise InputError(f"a prediction must be bool, integer or float, found dtype {array.dtype}")
    array = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))
    if array.dtype.kind != "f":
        return array, 0
    nan = np.isnan(array)
    count = int(np.count_nonzero(nan))
    return (np.where(nan, array.dtype.type(0), array) if count else array), count


def truth_array(truth: ArrayLike) -> NDArray[Any]:
    """A truth as unsigned labels; raises `InputError` for negative ones."""
    array = np.asarray(truth)
    if array.dtype.kind in "if" and array.size and array.min() < 0:
        raise InputError(f"truth labels must be 0 (background) or positive, found {array.min()}")
    return np.ascontiguousarray(label_array(array, "the truth"))


def check_shapes(pred: NDArray[Any], truth: NDArray[Any]) -> None:
    """Both must be three-dimensional, of one shape and not empty."""
    if pred.ndim != 3 or pred.shape != truth.shape:
        raise InputError(
            f"prediction and truth must be three-dimensional (z y x) and of one shape, "
            f"found {pred.shape} and {truth.shape}"
        )
    if pred.size == 0:
        raise InputError(f"nothing to score: the volumes are empty, shape {pred.shape}")


def nan_message(voxels: int) -> str:
    """What is said about NaN in a prediction."""
    return f"{voxels} voxels of the prediction are NaN and count as background"


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


# -- the common way ----------------------------------------------------------------------------------------------------
class VolumePair:
    """A truth and the components of a prediction, wherever they are kept.

    A subclass says how many components there are, counts the overlaps, and cuts masks out of them.
    """

    shape: tuple[int, int, int]
    max_truth: int
    n_parts: int
    scratch_bytes: int

    def overlaps(self) -> Overlaps:
        """Sizes, boxes and overlapping pairs, by the truth's own labels."""
        raise NotImplementedError

    def count_truth(self) -> int:
        """Number of labels other than 0 in the truth."""
        raise NotImplementedError

    def truth_mask(self, truth_id: int, box: Box) -> NDArray[np.bool_]:
        """Inside ``box``, where the truth is ``truth_id``."""
        raise NotImplementedError

    def parts_mask(self, parts: tuple[int, int], box: Box) -> NDArray[np.bool_]:
        """Inside ``box``, where the components are one of two numbers, of which the second may be 0 for none."""
        raise NotImplementedError

    def prediction_values(self, parts: NDArray[np.int64], first: NDArray[np.int32]) -> NDArray[Any]:
        """The prediction's own values (N,) under components (N,) whose first voxels are ``first`` (N, 3), z y x."""
        raise NotImplementedError


class InMemoryPair(VolumePair):
    """Two whole volumes (D, H, W) in memory, the prediction cut into 26-connected components of one value."""

    def __init__(self, pred: NDArray[Any], truth: NDArray[Any]) -> None:
        import cc3d

        self._pred, self._truth = pred, truth
        self.shape = (truth.shape[0], truth.shape[1], truth.shape[2])
        self.scratch_bytes = max(pred.nbytes + truth.nbytes, 1 << 26)
        self.max_truth = int(truth.max())
        if self.max_truth >= 1 << 63:
            raise InputError(f"truth labels must be below 2^63, found {self.max_truth}")
        self._parts, self.n_parts = cc3d.connected_components(pred, return_N=True, out_dtype=np.uint32)
        self._rank: dict[int, int] | None = None

    def overlaps(self) -> Overlaps:
        # Tables are kept for every label up to the largest, so labels that are sparse are renumbered, in order.
        if self.max_truth > max(1 << 16, self._truth.size // 16):
            import fastremap

            values = fastremap.unique(self._truth)
            values = values[values != 0]
            self._rank = {int(v): i + 1 for i, v in enumerate(values)}
            self._truth = fastremap.remap(self._truth, {0: 0, **self._rank})
            return _with_labels(self._count(len(values)), values.astype(np.int64))
        return self._count(self.max_truth)

    def count_truth(self) -> int:
        import fastremap

        return int(np.count_nonzero(fastremap.unique(self._truth)))

    def _count(self, max_truth: int) -> Overlaps:
        counter = OverlapCounter(max_truth, self.n_parts)
        counter.add(self._truth, self._parts)
        return counter.result()

    def truth_mask(self, truth_id: int, box: Box) -> NDArray[np.bool_]:
        label = truth_id if self._rank is None else self._rank[truth_id]
        return np.asarray(self._truth[box] == label)

    def parts_mask(self, parts: tuple[int, int], box: Box) -> NDArray[np.bool_]:
        return where_parts(self._parts[box], parts)

    def prediction_values(self, parts: NDArray[np.int64], first: NDArray[np.int32]) -> NDArray[Any]:
        return self._pred[tuple(first.T)]


def _with_labels(overlaps: Overlaps, values: NDArray[np.int64]) -> Overlaps:
    """Ranks 1..N put back to the labels they stand for."""
    return replace(overlaps, truth_ids=values[overlaps.truth_ids - 1], pair_truth=values[overlaps.pair_truth - 1])


def where_parts(components: NDArray[Any], parts: tuple[int, int]) -> NDArray[np.bool_]:
    """Where components are one of two numbers, of which the second may be 0 for none."""
    first, second = parts
    mask: NDArray[np.bool_] = components == first
    if second not in (0, first):
        mask |= components == second
    return mask


def score_pair(
    pair: VolumePair,
    voxel_size: Triple,
    rules: Rules,
    workers: int,
    nan_voxels: int = 0,
    others: Sequence[Rules] = (),
) -> InstanceScore:
    """The instance score of a `VolumePair`; see `score_instance`. ``others``: rules that are in ``sums`` too."""

    def dropped(status: str, truths: int) -> InstanceScore:
        counted = Panoptic(fp=pair.n_parts, fn=truths)
        return InstanceScore(0, 0, 0, 0.0, 0, status, rules.version, rules.verified, nan_voxels, counted)

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
        tp,
        fp,
        int(overlaps.truth_ids.size) - tp,
        sums[rules.version],
        int(overlaps.truth_ids.size) + fp,
        SCORED,
        rules.version,
        rules.verified,
        nan_voxels,
        _panoptic(overlaps),
        _table(pair, overlaps, matched, found.by(rules)),
        sums,
    )


def _panoptic(overlaps: Overlaps) -> Panoptic:
    """Pairs above IoU 1/2 are one to one by themselves."""
    iou = overlaps.pair_iou()
    good = iou > 0.5
    tp = int(np.count_nonzero(good))
    return Panoptic(tp, overlaps.n_parts - tp, int(overlaps.truth_ids.size) - tp, float(iou[good].sum()))


def _table(
    pair: VolumePair, overlaps: Overlaps, matched: NDArray[np.int64], distances: NDArray[np.float32]
) -> InstanceTable:
    iou = np.zeros(matched.size)
    row = np.searchsorted(overlaps.truth_ids, overlaps.pair_truth)
    is_match = matched[row] == overlaps.pair_part
    iou[row[is_match]] = overlaps.pair_iou()[is_match]
    values = pair.prediction_values(matched, overlaps.part_first[matched])
    values = np.where(matched > 0, values, np.zeros(1, values.dtype))
    return InstanceTable(overlaps.truth_ids, values, matched, iou, distances, overlaps.truth_sizes)


def missing_score(rules: Rules, is_instance: bool, truth_ids: int, voxels: int) -> InstanceScore | SemanticScore:
    """The score of a label that was not submitted: all truth instances, or all voxels, are false negatives. Of a
    semantic class ``truth_ids`` says whether the truth has a voxel of it (not 0)."""
    if not is_instance:
        return SemanticScore(0, 0, voxels, MISSING, annotated=truth_ids > 0)
    return InstanceScore(
        0, 0, truth_ids, 0.0, truth_ids, MISSING, rules.version, rules.verified, panoptic=Panoptic(fn=truth_ids)
    )
