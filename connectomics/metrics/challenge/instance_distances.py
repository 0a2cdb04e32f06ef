"""Distances between ground-truth instances and their matches, in threads, within a memory limit."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from connectomics.geometry import Triple, index
from connectomics.metrics.challenge.distance import directed, hausdorff, scratch_bytes
from connectomics.metrics.challenge.rules import Rules
from connectomics.metrics.overlaps import Overlaps

if TYPE_CHECKING:
    from connectomics.metrics.challenge.scoring import VolumePair

Box = tuple[slice, slice, slice]


@dataclass
class Distances:
    """The capped distance (nm) of every ground-truth label to its match, by rules; each is computed once."""

    pair: VolumePair
    overlaps: Overlaps
    matched: NDArray[np.int64]
    voxel_size: Triple
    cap: float
    workers: int
    #: Second components, and the distances with them.
    _known: list[tuple[NDArray[np.int64], NDArray[np.float32]]] = field(default_factory=list)

    def by(self, rules: Rules) -> NDArray[np.float32]:
        """Return the distances by these rules, (T,)."""
        part_is_matched = np.zeros(self.overlaps.n_parts + 1, bool)
        part_is_matched[self.matched] = True
        second = rules.second_part(self.overlaps.truth_ids, part_is_matched)
        compared = (self.matched > 0) | (second > 0)
        distances = np.full(self.matched.size, rules.unmatched_distance(self.cap), np.float32)
        distances[compared] = self._compared(second, compared)[compared]
        return distances

    def _compared(self, second: NDArray[np.int64], compared: NDArray[np.bool_]) -> NDArray[np.float32]:
        overlaps, matched, voxel_size, cap = self.overlaps, self.matched, self.voxel_size, self.cap
        distances = np.full(matched.size, np.nan, np.float32)
        for other, known in self._known:
            same = compared & (other == second)
            distances[same] = known[same]
        # Row 0 of the components' boxes is the empty box, which leaves a union as it is.
        one_box, other_box = overlaps.part_boxes[matched], overlaps.part_boxes[second]
        found = np.maximum(one_box, other_box)
        found[:, ::2] = np.minimum(one_box[:, ::2], other_box[:, ::2])
        identical = _identical(overlaps, matched) & (second == 0)
        distances[identical] = 0.0
        # A face of one box that lies beyond the other's is a voxel at least that far from the other mask.
        apart = np.abs(overlaps.truth_boxes.astype(np.int64) - found) * np.repeat(np.asarray(voxel_size), 2)
        distances[compared & (apart >= cap).any(axis=1)] = cap
        budget = MemoryBudget(self.pair.scratch_bytes)

        def one(row: int) -> None:
            parts = [int(p) for p in (matched[row], second[row]) if p]
            with budget.held(scratch_bytes(overlaps.truth_boxes[row], found[row])):
                distances[row] = _distance(self.pair, overlaps, row, parts, found[row], voxel_size, cap)

        todo = np.flatnonzero(compared & np.isnan(distances))
        volume = _volume(overlaps.truth_boxes[todo]) + _volume(found[todo])
        with ThreadPoolExecutor(max(1, self.workers)) as threads:
            list(threads.map(one, todo[np.argsort(-volume, kind="stable")].tolist()))
        self._known.append((second, distances))
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
    """Return the capped distance (nm) of one ground-truth label to one component or two."""
    box = _slices(overlaps.truth_boxes[row])
    truth = pair.truth_mask(int(overlaps.truth_ids[row]), box)
    if len(parts) == 2:
        # Two components often lie far apart; their common box is not needed if one of them alone decides.
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
    """Return where a box begins, relative to the beginning of another."""
    return index(b.start - o.start for b, o in zip(box, origin, strict=True))


def _slices(box: NDArray[np.int32]) -> Box:
    z, y, x = (slice(*ends) for ends in box.reshape(3, 2).tolist())
    return z, y, x


def _volume(boxes: NDArray[np.int32]) -> NDArray[np.int64]:
    return np.prod(boxes[:, 1::2] - boxes[:, ::2], axis=1, dtype=np.int64)


def _identical(overlaps: Overlaps, matched: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which ground-truth labels have the same voxels as their matched component, (T,)."""
    row = overlaps.pair_row
    same = (overlaps.pair_voxels == overlaps.truth_sizes[row]) & (
        overlaps.pair_voxels == overlaps.part_sizes[overlaps.pair_part]
    )
    result = np.zeros(matched.size, bool)
    result[row[same]] = matched[row[same]] == overlaps.pair_part[same]
    return result


class MemoryBudget:
    """Lets threads hold memory up to a limit; a thread that needs more than the limit waits to run alone."""

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
