"""Confusion between classes: voxels of one class predicted as another class that is absent there.

Classes of the challenge overlap (a mitochondrion's membrane is part of the mitochondrion), so this is no matrix of one
label per voxel: each entry is counted over its own voxels, those where both classes are annotated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from connectomics.pages import page
from connectomics.pages.report.volumes import Item, spread_blocks

_BLOCK = (32, 128, 128)
_PIECE = 1 << 17  # voxels at a time; with 48 classes their temporary arrays take 40 MB


@dataclass
class Confusion:
    """Voxel counts of C classes, summed over crops.

    Attributes:
        right: (C,) voxels of a class predicted as it, of ``there`` known ones. lost: those predicted as no class.
        wrong: (C, C) voxels of the row's class predicted as the column's class where that one is absent, of ``known``
            voxels of the row's class where the column's class is known too.
        empty: (C,) voxels predicted as a class where all classes are known and absent, of ``empty_known`` such voxels.
    """

    classes: tuple[str, ...]
    right: NDArray[np.int64]
    there: NDArray[np.int64]
    wrong: NDArray[np.int64]
    known: NDArray[np.int64]
    lost: NDArray[np.int64]
    empty: NDArray[np.int64]
    empty_known: int = 0

    @classmethod
    def none(cls, classes: Sequence[str]) -> Confusion:
        """Return zero counts."""
        n = len(classes)
        right, there, wrong, known, lost, empty = (np.zeros(s, np.int64) for s in (n, n, (n, n), (n, n), n, n))
        return cls(tuple(classes), right, there, wrong, known, lost, empty)

    def __iadd__(self, other: Confusion) -> Confusion:
        """Add the counts of other crops, of the same classes."""
        for name in ("right", "there", "wrong", "known", "lost", "empty", "empty_known"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        return self

    def add(self, truth: NDArray[np.bool_], known: NDArray[np.bool_], found: NDArray[np.bool_]) -> None:
        """Count voxels. All arrays are (C, N): where a class is present, where it is known, where it is predicted."""
        for begin in range(0, truth.shape[1], _PIECE):
            t, k, p = (v[:, begin : begin + _PIECE] for v in (truth, known, found))
            t = t & k
            background = np.asarray(k.all(axis=0, keepdims=True) & ~t.any(axis=0, keepdims=True))
            nothing = np.asarray(~p.any(axis=0, keepdims=True))
            self.empty_known += int(np.count_nonzero(background))
            there, called, none, empty = (_bits(v) for v in (t, p, nothing, background))
            wrongly, annotated = _bits(p & k & ~t), _bits(k)
            self.right += _ones(there & called)
            self.there += _ones(there)
            self.lost += _ones(there & none)
            self.empty += _ones(called & empty)
            for row, mine in enumerate(there):
                self.wrong[row] += _ones(mine & wrongly)
                self.known[row] += _ones(mine & annotated)

    def add_crop(self, items: Sequence[Item], most_voxels: int) -> float:
        """Count the items of one crop that have truth and prediction, on the finest of their grids.

        At most about ``most_voxels`` are read, over all classes. Return the share of the crop that was read.
        """
        shown = [i for i in items if i.truth is not None and i.prediction is not None and i.class_name in self.classes]
        if not shown:
            return 1.0
        # on a coarser grid, a prediction that alternates between voxels would be sampled by chance
        grid = max((item.grid for item in shown), key=lambda g: g.size)
        blocks, share = spread_blocks(grid, most_voxels // len(shown), _BLOCK)
        for _, block in blocks:
            truth, known, found = (np.zeros((len(self.classes), block.size), bool) for _ in range(3))
            for item in shown:
                assert item.truth is not None
                assert item.prediction is not None
                row = self.classes.index(item.class_name)
                values, there = item.truth.read(block)
                predicted, inside = item.prediction.read(block)
                truth[row], found[row] = (values != 0).ravel(), (predicted != 0).ravel()
                known[row] = (there & inside).ravel()
            self.add(truth, known, found)
        return share


def _bits(masks: NDArray[np.bool_]) -> NDArray[np.uint64]:
    """Return masks (C, N) as words (C, ceil(N / 64)) of bits: pairs of classes are counted 64 voxels at once."""
    packed = np.packbits(masks, axis=1)
    return np.pad(packed, ((0, 0), (0, -packed.shape[1] % 8))).view(np.uint64)


def _ones(words: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return the number of set bits of each row."""
    counts: NDArray[np.int64] = np.bitwise_count(words).sum(axis=1, dtype=np.int64)
    return counts


def section(confusion: Confusion, problems: Sequence[str], share: float) -> Markup:
    """Return the table; ``share``: the part of the voxels that was read."""
    rows = [k for k, n in enumerate(confusion.there) if n or confusion.empty[k]]
    return page.render("report/confusion", c=confusion, rows=rows, problems=problems, share=share)
