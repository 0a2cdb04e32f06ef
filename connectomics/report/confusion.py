"""Confusion between classes: where a voxel of one class was called another that the truth says is not there.

Classes of the challenge overlap (a mitochondrion's membrane is part of the mitochondrion), so this is no matrix of one
label a voxel: each entry has its own voxels to be counted over, those where the truth knows both classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from connectomics.report import page
from connectomics.report.volumes import Item, spread_blocks

_BLOCK = (32, 128, 128)
_PIECE = 1 << 17  # voxels at a time: what is made of them on the way takes 48 classes 40 MB


@dataclass
class Confusion:
    """Counts of voxels, added up over crops.

    Attributes:
        classes: (C,) names. right: (C,) voxels of a class that were called it, of ``there`` (C,) known ones.
        wrong: (C, C) voxels of the class of the row that were called the class of the column where the truth says that
            this one is absent, of ``known`` (C, C) voxels of the row's class where the truth knows the column's too.
        lost: (C,) voxels of a class that were called none of the classes.
        empty: (C,) voxels called a class where all classes are known and absent, of ``empty_known`` such voxels.
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
        """Nothing counted yet."""
        n = len(classes)
        right, there, lost, empty = (np.zeros(n, np.int64) for _ in range(4))
        return cls(tuple(classes), right, there, np.zeros((n, n), np.int64), np.zeros((n, n), np.int64), lost, empty)

    def __iadd__(self, other: Confusion) -> Confusion:
        """Add the counts of other crops, of the same classes."""
        for mine, theirs in zip(self._counts(), other._counts(), strict=True):
            mine += theirs
        self.empty_known += other.empty_known
        return self

    def _counts(self) -> tuple[NDArray[np.int64], ...]:
        return self.right, self.there, self.wrong, self.known, self.lost, self.empty

    def add(self, truth: NDArray[np.bool_], known: NDArray[np.bool_], found: NDArray[np.bool_]) -> None:
        """Count voxels, each array (C, N): where a class is present, where that is known, where it was predicted."""
        for begin in range(0, truth.shape[1], _PIECE):
            t, k, p = (v[:, begin : begin + _PIECE] for v in (truth, known, found))
            t = t & k
            background = np.asarray(k.all(axis=0, keepdims=True) & ~t.any(axis=0, keepdims=True))
            nothing = np.asarray(~p.any(axis=0, keepdims=True))
            self.empty_known += int(np.count_nonzero(background))
            there, called, none, empty = (_bits(v) for v in (t, p, nothing, background))
            unsaid, knows = _bits(p & k & ~t), _bits(k)
            self.right += _ones(there & called)
            self.there += _ones(there)
            self.lost += _ones(there & none)
            self.empty += _ones(called & empty)
            for row, mine in enumerate(there):
                self.wrong[row] += _ones(mine & unsaid)
                self.known[row] += _ones(mine & knows)

    def add_crop(self, items: Sequence[Item], most_voxels: int) -> float:
        """Count the items of one crop (those with truth and prediction), on the grid of the finest of them.

        At most about ``most_voxels`` are looked at, over all classes. Returns the share of the crop that was.
        """
        shown = [i for i in items if i.truth is not None and i.prediction is not None and i.class_name in self.classes]
        if not shown:
            return 1.0
        # a coarser one would sample, and see a prediction with a pattern of every other voxel or not, by chance
        grid = max((item.grid for item in shown), key=lambda g: g.size)
        looked = 0
        n = len(self.classes)
        for _, block in spread_blocks(grid, most_voxels // len(shown), _BLOCK):
            truth, known, found = (np.zeros((n, block.size), bool) for _ in range(3))
            for item in shown:
                assert item.truth is not None
                assert item.prediction is not None
                row = self.classes.index(item.class_name)
                values, there = item.truth.read(block)
                predicted, inside = item.prediction.read(block)
                truth[row], found[row] = (values != 0).ravel(), (predicted != 0).ravel()
                known[row] = (there & inside).ravel()
            self.add(truth, known, found)
            looked += block.size
        return looked / grid.size if grid.size else 1.0


def _bits(masks: NDArray[np.bool_]) -> NDArray[np.uint64]:
    """Masks (C, N) as bits in words (C, ceil(N / 64)); pairs of classes are counted 64 voxels at a time."""
    packed = np.packbits(masks, axis=1)
    words = np.zeros((len(packed), -(-packed.shape[1] // 8) * 8), np.uint8)
    words[:, : packed.shape[1]] = packed
    return words.view(np.uint64)


def _ones(words: NDArray[np.uint64]) -> NDArray[np.int64]:
    """The bits that are set, by row."""
    counts: NDArray[np.int64] = np.bitwise_count(words).sum(axis=1, dtype=np.int64)
    return counts


def section(confusion: Confusion, problems: Sequence[str], share: float) -> page.Section:
    """The table; ``share``: the part of the voxels that was looked at."""
    title = "Confusion between classes"
    notes = "".join(page.note(p) for p in problems)
    rows = [k for k, n in enumerate(confusion.there) if n or confusion.empty[k]]
    if not rows:
        text = "No confusion table: it needs truth and predictions of the same classes."
        return page.Section("confusion", title, notes + page.note(text))
    names = [confusion.classes[k] for k in rows]
    heads = ["truth", *(f"<th scope=col class=num>{page.text(n)}</th>" for n in names)]
    heads += ["<th scope=col class=num>nothing</th>", "<th scope=col class=num>voxels</th>"]
    body = [
        [
            f"<th scope=row>{page.text(confusion.classes[k])}</th>",
            *(
                _cell(confusion.right[k], confusion.there[k], "right")
                if k == other
                else _cell(confusion.wrong[k, other], confusion.known[k, other], "wrong")
                for other in rows
            ),
            _cell(confusion.lost[k], confusion.there[k], "wrong"),
            f'<td class="num">{page.count(confusion.there[k])}</td>',
        ]
        for k in rows
    ]
    body.append(
        [
            "<th scope=row>none of these</th>",
            *(_cell(confusion.empty[k], confusion.empty_known, "wrong") for k in rows),
            "<td></td>",
            f'<td class="num">{page.count(confusion.empty_known)}</td>',
        ]
    )
    partly = f" Evenly spread slabs with {page.percent(share)} of the voxels were looked at." if share < 0.995 else ""
    about = page.hint(
        "Of the voxels of a row's class, the share that was called the column's class. On the diagonal (blue) that is "
        "right; elsewhere (orange) only voxels count where the truth says that the column's class is absent, so a part "
        "inside its whole is no confusion. Classes may overlap, so rows need not add up to 100 %. What is not known "
        "counts nowhere." + partly
    )
    return page.Section("confusion", title, notes + about + page.table(heads, body, kind="matrix"))


def _cell(part: int, whole: int, kind: str) -> str:
    if not whole:
        return '<td class="none">·</td>'
    share = float(part) / float(whole)
    return f'<td class="num {kind}" style="--v:{share:.3f}"><data value="{share!r}">{page.percent(share)}</data></td>'
