"""Objects of truth and prediction, counted block by block: which were missed, split, merged or invented, and where.

`Objects` counts; `listed` and `tables` put the mistakes of a crop on the page.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from connectomics.geometry import Triple, VoxelGrid
from connectomics.metrics.overlaps import pair_counts
from connectomics.pages import page

if TYPE_CHECKING:
    from connectomics.pages.report.volumes import Findings, Item

SHARE = 0.1  #: an overlap counts if it is at least this share of an object
POOR = 0.5  #: a matched pair with an intersection over union below this is poor
#: Kinds of mistakes, worst first, with their symbols.
SYMBOLS = {"missed": "○", "invented": "✕", "merged": "⋃", "split": "∥", "poor": "≈"}
KINDS = tuple(SYMBOLS)
_SLAB = 1 << 20  # voxels at a time
_MOST_OBJECTS = 200_000  # objects and pairs, which bounds the memory


@dataclass(frozen=True)
class Mistake:
    """One object that was not segmented well: the predicted one if it is merged or invented, else the true one.

    Attributes:
        truth, found: IDs of the true and predicted objects involved, the largest overlap first.
        voxels: known voxels of the object. iou: of the best pair. place: mean position, nm, z y x.
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
        truth, found: by ID: number of voxels, then the sums of their indices z, y, x, float64 (4,).
        pairs: voxels that a true and a predicted object share. whole: False if a limit left objects out.
    """

    truth: dict[int, NDArray[np.float64]] = field(default_factory=dict)
    found: dict[int, NDArray[np.float64]] = field(default_factory=dict)
    pairs: dict[tuple[int, int], int] = field(default_factory=dict)
    whole: bool = True

    def add(self, begin: Iterable[int], true: NDArray[Any], found: NDArray[Any], known: NDArray[np.bool_]) -> None:
        """Count a block (D, H, W) whose first voxel is ``begin``; unknown voxels do not count."""
        if max(len(self.truth), len(self.found), len(self.pairs)) >= _MOST_OBJECTS:
            self.whole = False
            return
        start = np.asarray(tuple(begin), np.float64)
        layers = max(1, _SLAB // max(1, known[0].size))
        for first in range(0, len(known), layers):  # the indices of a whole block would take 60 bytes per voxel
            part = slice(first, first + layers)
            for labels, sums in ((true, self.truth), (found, self.found)):
                _add_places(np.where(known[part], labels[part], 0), start + np.array((first, 0, 0)), sums)
        for t, p, n in zip(*(v.tolist() for v in pair_counts(true, found, known)), strict=True):
            if t and p:
                self.pairs[t, p] = self.pairs.get((t, p), 0) + n

    def match(self) -> tuple[dict[int, int], dict[int, int]]:
        """Return the true object that each predicted one overlaps most, and the pairs (truth, found) that match."""
        largest, partner = {}, {}
        # the last one wins: of pairs with equal overlap, that with the smallest IDs
        for (t, p), _ in sorted(self.pairs.items(), key=lambda item: (item[1], -item[0][0], -item[0][1])):
            largest[t], partner[p] = p, t
        return partner, {t: p for t, p in largest.items() if partner[p] == t}

    def mistakes(self, grid: VoxelGrid) -> list[Mistake]:
        """Return the mistakes by kind, the largest object of each kind first.

        A true object is missed if no predicted one covers `SHARE` of it, and split if two or more do. A predicted
        object is merged if it covers `SHARE` of two or more true ones, and invented if less than `SHARE` of it lies in
        true ones. Any other pair of objects that are each other's largest overlap is poor if its intersection over
        union is below `POOR`.

        Args:
            grid: of the whole volume, for positions in nm.
        """
        of_truth: dict[int, list[tuple[int, int]]] = defaultdict(list)
        of_found: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for (t, p), n in sorted(self.pairs.items(), key=lambda item: (item[1], item[0]), reverse=True):
            of_truth[t].append((p, n))
            of_found[p].append((t, n))
        made: list[Mistake] = []
        wrong: set[tuple[str, int]] = set()

        def add(kind: str, truth: tuple[int, ...], found: tuple[int, ...], sums: NDArray[np.float64]) -> None:
            iou = max((self._iou(t, p) for t in truth for p in found), default=0.0)
            z, y, x = (float(v) for v in grid.to_world(sums[1:] / sums[0]))
            made.append(Mistake(kind, truth, found, int(sums[0]), float(iou), (z, y, x)))

        for t, sums in self.truth.items():
            parts = tuple(p for p, n in of_truth[t] if n >= SHARE * sums[0])
            if len(parts) != 1:
                wrong.add(("truth", t))
                add("split" if parts else "missed", (t,), parts, sums)
        for p, sums in self.found.items():
            swallowed = tuple(t for t, n in of_found[p] if n >= SHARE * self.truth[t][0])
            if len(swallowed) > 1 or sum(n for _, n in of_found[p]) < SHARE * sums[0]:
                wrong.add(("found", p))
                add("merged" if len(swallowed) > 1 else "invented", swallowed, (p,), sums)
        for t, p in self.match()[1].items():
            if ("truth", t) not in wrong and ("found", p) not in wrong and self._iou(t, p) < POOR:
                add("poor", (t,), (p,), self.truth[t])
        return sorted(made, key=lambda m: (KINDS.index(m.kind), -m.voxels, m.truth, m.found))

    def _iou(self, t: int, p: int) -> float:
        both = self.pairs.get((t, p), 0)
        return both / (self.truth[t][0] + self.found[p][0] - both)


def _add_places(labels: NDArray[Any], start: NDArray[np.float64], sums: dict[int, NDArray[np.float64]]) -> None:
    """Add the voxels and indices of every object of a block to ``sums``."""
    where = np.flatnonzero(labels)
    ids, index = np.unique(labels.ravel()[where], return_inverse=True)
    counts = np.bincount(index)
    places = [np.bincount(index, weights=axis) for axis in np.unravel_index(where, labels.shape)]
    rows = np.column_stack([counts, *(p + counts * s for p, s in zip(places, start, strict=True))])
    for number, row in zip(ids.tolist(), rows, strict=True):
        sums[number] = sums[number] + row if number in sums else row


# -- on the page -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Listed:
    """A mistake of the class of item ``number`` of its crop."""

    number: int
    class_name: str
    mistake: Mistake


def listed(drawn: Sequence[tuple[Item, Findings]], most: int) -> list[Listed]:
    """Return at most ``most`` mistakes of a crop: the first of every class, then the second of every class, ..."""
    by_class = [
        [Listed(k, item.class_name, mistake) for mistake in found.mistakes] for k, (item, found) in enumerate(drawn)
    ]
    return [one for row in zip_longest(*by_class) for one in row if one is not None][:most]


def tables(
    drawn: Sequence[tuple[Item, Findings]], shown: Sequence[Listed], clickable: int, anchors: Sequence[str]
) -> Markup:
    """Return the number of objects of each kind by class, and the mistakes that are ``shown``; empty without instances.

    Items with a number below ``clickable`` are in the slice viewer, which a click moves; others link to ``anchors``.
    """
    rows, partly = [], []
    for item, found in drawn:
        objects = found.objects
        if objects is None:
            continue
        kinds = Counter(mistake.kind for mistake in found.mistakes)
        numbers = (len(objects.truth), len(objects.found), len(found.matched), *(kinds[kind] for kind in KINDS))
        rows.append((item.class_name, numbers, kinds.total()))
        if found.share < 1 or not objects.whole:
            partly.append(item.class_name)
    if not rows:
        return Markup("")
    order = sorted(shown, key=lambda one: (KINDS.index(one.mistake.kind), -one.mistake.voxels))
    return page.render(
        "report/objects", rows=rows, partly=partly, total=sum(total for *_, total in rows), shown=order,
        symbols=SYMBOLS, clickable=clickable, anchors=anchors, share=SHARE, poor=POOR,
    )  # fmt: skip
