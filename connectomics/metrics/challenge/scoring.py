"""The score of one class in one crop: `score_instance` and `score_semantic` on arrays."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from connectomics.errors import InputError
from connectomics.geometry import Triple, triple
from connectomics.metrics.challenge.distance import directed, hausdorff, scratch_bytes
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
from connectomics.metrics.challenge.rules import DEFAULT_RULES, Rules, get_rules
from connectomics.metrics.overlaps import OverlapCounter, Overlaps, label_array

Box = tuple[slice, slice, slice]


# -- the two functions -------------------------------------------------------------------------------------------------
def score_instance(
    pred: ArrayLike,
    truth: ArrayLike,
    voxel_size: ArrayLike,
    rules: str | Rules = DEFAULT_RULES,
    *,
    workers: int | None = None,
) -> InstanceScore:
    """The challenge's score of an instance segmentation of one crop (RULES: instance classes 1 to 7).

    Args:
        pred: predicted instances (D, H, W), bool, integer or float, 0 background. Split into 26-connected components of
            equal value first. NaN is background, counted and warned of (cc3d itself would make an instance of each).
        truth: true instances (D, H, W), whole numbers >= 0, 0 background, taken as they are.
        voxel_size: nm, z y x.
        rules: version of the rules, or a `Rules` object.
        workers: threads for the distances (default: one per available core).

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
    return score_pair(pair, spacing, rules, workers or available_cores(), nan_voxels)


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


def score_pair(pair: VolumePair, voxel_size: Triple, rules: Rules, workers: int, nan_voxels: int = 0) -> InstanceScore:
    """The instance score of a `VolumePair`; see `score_instance`."""

    def dropped(status: str) -> InstanceScore:
        return InstanceScore(0, 0, 0, 0.0, 0, status, rules.version, rules.verified, nan_voxels)

    if rules.too_many(pair.max_truth, pair.n_parts):
        return dropped(TOO_MANY)
    overlaps = pair.overlaps()
    if overlaps.pair_voxels.size > rules.max_pairs:
        return dropped(TOO_MANY)
    try:
        matched = match(overlaps, pair.max_truth, rules)
    except MatchingFailedError:
        return dropped(FAILED)

    tp = int(np.count_nonzero(matched))
    fp = pair.n_parts - tp
    cap = rules.cap(voxel_size, pair.shape)
    distances = _distances(pair, overlaps, matched, voxel_size, cap, rules, workers)
    unmatched = np.full(fp, rules.unmatched_distance(cap), np.float32)
    mapped = rules.mapped(np.concatenate([distances, unmatched]), voxel_size, cap)
    return InstanceScore(
        tp,
        fp,
        int(overlaps.truth_ids.size) - tp,
        float(np.sum(mapped)),
        int(mapped.size),
        SCORED,
        rules.version,
        rules.verified,
        nan_voxels,
        _panoptic(overlaps),
        _table(pair, overlaps, matched, distances),
    )


def _distances(
    pair: VolumePair,
    overlaps: Overlaps,
    matched: NDArray[np.int64],
    voxel_size: Triple,
    cap: float,
    rules: Rules,
    workers: int,
) -> NDArray[np.float32]:
    """The distance of every truth label to what it is compared with, nm, capped, (T,)."""
    part_is_matched = np.zeros(overlaps.n_parts + 1, bool)
    part_is_matched[matched] = True
    second = rules.second_part(overlaps.truth_ids, part_is_matched)
    distances = np.full(matched.size, rules.unmatched_distance(cap), np.float32)
    # Row 0 of the components' boxes is the empty box, which leaves a union as it is.
    found = _union(overlaps.part_boxes[matched], overlaps.part_boxes[second])
    compared = (matched > 0) | (second > 0)
    identical = _identical(overlaps, matched) & (second == 0)
    distances[identical] = 0.0
    # A face of one box that lies beyond the other's is a voxel at least that far from the other mask.
    far = compared & _beyond(overlaps.truth_boxes, found, voxel_size, cap)
    distances[far] = cap
    budget = MemoryBudget(pair.scratch_bytes)

    def one(row: int) -> None:
        parts = [int(p) for p in (matched[row], second[row]) if p]
        with budget.held(scratch_bytes(overlaps.truth_boxes[row], found[row])):
            distances[row] = _distance(pair, overlaps, row, parts, found[row], voxel_size, cap)

    todo = np.flatnonzero(compared & ~identical & ~far)
    volume = _volume(overlaps.truth_boxes[todo]) + _volume(found[todo])
    _run(one, todo[np.argsort(-volume, kind="stable")], workers)
    return distances


def _distance(
    pair: VolumePair,
    overlaps: Overlaps,
    row: int,
    parts: list[int],
    found: NDArray[np.int32],
    voxel_size: Triple,
    cap: float,
) -> float:
    """The distance of one truth to one component or two, nm, capped."""
    box = _slices(overlaps.truth_boxes[row])
    truth = pair.truth_mask(int(overlaps.truth_ids[row]), box)
    if len(parts) == 2:
        # Two components often lie far apart; their common box need not be looked at if each alone settles the matter.
        reached = 0.0
        single = []
        for part in parts:
            where = _slices(overlaps.part_boxes[part])
            single.append((pair.parts_mask((part, 0), where), _offset(where, box)))
            back = _offset(box, where)
            reached = directed(single[-1][0], truth, voxel_size, cap, back, reached)
        for mask, offset in single:
            if reached >= cap or directed(truth, mask, voxel_size, cap, offset, reached) == reached:
                return reached
    where = _slices(found)
    mask = pair.parts_mask((parts[0], parts[-1]), where)
    return hausdorff(truth, mask, voxel_size, cap, _offset(where, box))


def _offset(box: Box, origin: Box) -> tuple[int, int, int]:
    """Where a box begins, counted from the beginning of another."""
    z, y, x = (b.start - o.start for b, o in zip(box, origin, strict=True))
    return z, y, x


def _slices(box: NDArray[np.int32]) -> Box:
    z0, z1, y0, y1, x0, x1 = (int(v) for v in box)
    return slice(z0, z1), slice(y0, y1), slice(x0, x1)


def _volume(boxes: NDArray[np.int32]) -> NDArray[np.int64]:
    return np.prod(boxes[:, 1::2] - boxes[:, ::2], axis=1, dtype=np.int64)


def _union(a: NDArray[np.int32], b: NDArray[np.int32]) -> NDArray[np.int32]:
    """The union of boxes (N, 6), row by row."""
    union = np.maximum(a, b)
    union[:, ::2] = np.minimum(a[:, ::2], b[:, ::2])
    return union


def _beyond(truth: NDArray[np.int32], found: NDArray[np.int32], voxel_size: Triple, cap: float) -> NDArray[np.bool_]:
    """Whether some faces of two boxes (N, 6) lie at least ``cap`` nm apart."""
    apart = np.abs(truth.astype(np.int64) - found) * np.repeat(np.asarray(voxel_size), 2)
    return np.asarray((apart >= cap).any(axis=1))


def _identical(overlaps: Overlaps, matched: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Truth labels whose matched component is the same set of voxels, (T,)."""
    row = np.searchsorted(overlaps.truth_ids, overlaps.pair_truth)
    same = (overlaps.pair_voxels == overlaps.truth_sizes[row]) & (
        overlaps.pair_voxels == overlaps.part_sizes[overlaps.pair_part]
    )
    result = np.zeros(matched.size, bool)
    result[row[same]] = matched[row[same]] == overlaps.pair_part[same]
    return result


def _run(task: Callable[[int], None], items: NDArray[np.int64], workers: int) -> None:
    if workers <= 1 or items.size <= 1:
        for item in items:
            task(int(item))
        return
    with ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(task, items.tolist()):
            pass


class MemoryBudget:
    """Lets threads hold memory up to a limit; whoever needs more than the whole limit waits to be alone."""

    def __init__(self, limit: int) -> None:
        self._limit, self._held, self._free = limit, 0, threading.Condition()

    @contextmanager
    def held(self, amount: int) -> Iterator[None]:
        with self._free:
            self._free.wait_for(lambda: self._held == 0 or self._held + amount <= self._limit)
            self._held += amount
        try:
            yield
        finally:
            with self._free:
                self._held -= amount
                self._free.notify_all()


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
    """The score of a label that was not submitted: all truth instances, or all voxels, are false negatives."""
    if not is_instance:
        return SemanticScore(0, 0, voxels, MISSING)
    return InstanceScore(
        0, 0, truth_ids, 0.0, truth_ids, MISSING, rules.version, rules.verified, panoptic=Panoptic(fn=truth_ids)
    )
