"""Objects of truth and prediction, counted block by block: which were missed, split, merged or invented, and where."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.geometry import Triple, VoxelGrid
from connectomics.metrics.overlaps import pair_counts

#: An overlap counts where it is at least this share of an object.
SHARE = 0.1
#: A matched pair below this intersection over union is a poor one.
POOR = 0.5
#: What can have become of objects that are not simply matched, worst first.
KINDS = ("missed", "invented", "merged", "split", "poor")
_SLAB = 1 << 20  # voxels at a time
_MOST = 200_000  # objects and pairs that are kept, which bounds memory


@dataclass(frozen=True)
class Mistake:
    """One object that did not come out well.

    Attributes:
        kind: one of `KINDS`. truth, found: ids of the true and predicted objects that take part, the largest overlap
            first. voxels: known voxels of the object: the predicted one where it was merged or invented, else the true
            one. iou: of the best pair, 0 where there is none. place: mean position of the object's voxels, nm, z y x.
    """

    kind: str
    truth: tuple[int, ...]
    found: tuple[int, ...]
    voxels: int
    iou: float
    place: Triple


@dataclass
class Objects:
    """Sums over known voxels of two label volumes; `add` blocks in any order.

    Attributes:
        truth, found: by id: number of voxels, then the sums of their indices z, y, x, float64 (4,).
        pairs: voxels that a true and a predicted object share. whole: False where a bound left something out.
    """

    truth: dict[int, NDArray[np.float64]] = field(default_factory=dict)
    found: dict[int, NDArray[np.float64]] = field(default_factory=dict)
    pairs: dict[tuple[int, int], int] = field(default_factory=dict)
    whole: bool = True

    def add(self, begin: Iterable[int], true: NDArray[Any], found: NDArray[Any], known: NDArray[np.bool_]) -> None:
        """Count a block (D, H, W) whose first voxel is ``begin``; what is not known counts nowhere."""
        if max(len(self.truth), len(self.found), len(self.pairs)) >= _MOST:
            self.whole = False
            return
        start = np.asarray(tuple(begin), np.float64)
        layers = max(1, _SLAB // max(1, known[0].size))
        for first in range(0, len(known), layers):  # the indices of all voxels of a block would take 60 bytes a voxel
            part = slice(first, first + layers)
            for labels, sums in ((true, self.truth), (found, self.found)):
                _add_places(np.where(known[part], labels[part], 0), start + np.array((first, 0, 0)), sums)
        for t, p, n in zip(*(v.tolist() for v in pair_counts(true, found, known)), strict=True):
            if t and p:
                self.pairs[t, p] = self.pairs.get((t, p), 0) + n

    def match(self) -> tuple[dict[int, int], dict[int, int]]:
        """The largest true partner of each predicted object, and the pairs (truth, found) that are each other's."""
        of_truth: dict[int, tuple[int, int]] = {}
        of_found: dict[int, tuple[int, int]] = {}
        for (t, p), n in sorted(self.pairs.items()):
            if n > of_truth.get(t, (0, 0))[1]:
                of_truth[t] = (p, n)
            if n > of_found.get(p, (0, 0))[1]:
                of_found[p] = (t, n)
        partner = {p: t for p, (t, _) in of_found.items()}
        return partner, {t: p for t, (p, _) in of_truth.items() if partner[p] == t}

    def mistakes(self, grid: VoxelGrid) -> list[Mistake]:
        """What did not come out well, by kind and then the largest first.

        A true object is missed where no predicted one covers `SHARE` of it, and split where two or more do. A predicted
        object is merged where it covers `SHARE` of two or more true ones, and invented where less than `SHARE` of it
        lies in true ones. A pair that is each other's largest overlap, and is none of these, is poor below an
        intersection over union of `POOR`.

        Args:
            grid: of the whole volume, for places in nm.
        """
        of_truth: dict[int, list[tuple[int, int]]] = {}
        of_found: dict[int, list[tuple[int, int]]] = {}
        for (t, p), n in self.pairs.items():
            of_truth.setdefault(t, []).append((n, p))
            of_found.setdefault(p, []).append((n, t))
        made: list[Mistake] = []
        split: set[int] = set()
        merged: set[int] = set()
        for t, sums in self.truth.items():
            parts = sorted(((n, p) for n, p in of_truth.get(t, ()) if n >= SHARE * sums[0]), reverse=True)
            if len(parts) != 1:
                split.add(t)
                kind = "split" if parts else "missed"
                made.append(self._mistake(kind, (t,), tuple(p for _, p in parts), sums, grid))
        for p, sums in self.found.items():
            overlaps = of_found.get(p, [])
            inside = sum(n for n, _ in overlaps)
            swallowed = sorted(((n, t) for n, t in overlaps if n >= SHARE * self.truth[t][0]), reverse=True)
            if len(swallowed) > 1 or inside < SHARE * sums[0]:
                merged.add(p)
                kind = "merged" if len(swallowed) > 1 else "invented"
                made.append(self._mistake(kind, tuple(t for _, t in swallowed), (p,), sums, grid))
        for t, p in self.match()[1].items():
            if t not in split and p not in merged and self._iou(t, p) < POOR:
                made.append(self._mistake("poor", (t,), (p,), self.truth[t], grid))
        return sorted(made, key=lambda m: (KINDS.index(m.kind), -m.voxels, m.truth, m.found))

    def _iou(self, t: int, p: int) -> float:
        both = self.pairs.get((t, p), 0)
        return both / (self.truth[t][0] + self.found[p][0] - both)

    def _mistake(
        self, kind: str, truth: tuple[int, ...], found: tuple[int, ...], sums: NDArray[np.float64], grid: VoxelGrid
    ) -> Mistake:
        iou = max((self._iou(t, p) for t in truth for p in found), default=0.0)
        z, y, x = (float(v) for v in grid.to_world(sums[1:] / sums[0]))
        return Mistake(kind, truth, found, int(sums[0]), float(iou), (z, y, x))


def _add_places(labels: NDArray[Any], start: NDArray[np.float64], sums: dict[int, NDArray[np.float64]]) -> None:
    """Add voxels and indices of every object of a block to ``sums``."""
    where = np.flatnonzero(labels)
    if not len(where):
        return
    ids, index = np.unique(labels.ravel()[where], return_inverse=True)
    counts = np.bincount(index)
    places = [np.bincount(index, weights=axis) for axis in np.unravel_index(where, labels.shape)]
    rows = np.column_stack([counts, *(p + counts * s for p, s in zip(places, start, strict=True))])
    for number, row in zip(ids.tolist(), rows, strict=True):
        sums[number] = sums[number] + row if number in sums else row
