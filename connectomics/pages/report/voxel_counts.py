"""Numbers over all crops that need voxels of truth and prediction together: confusion and calibration.

Confusion: voxels of one class predicted as another class that is absent there. Classes of the challenge overlap (a
mitochondrion's membrane is part of the mitochondrion), so this is no matrix of one label per voxel: each entry is
counted over its own voxels, those where both classes are annotated.

Calibration: whether a class is present in 80 % of the voxels to which the network gives a probability of 80 %.
Probabilities are counted in steps of 1/255, as they are stored (float16 is rounded to them), so the memory does not
depend on the number of voxels. The expected calibration error is that of Guo et al., "On calibration of modern neural
networks" (ICML 2017): bins of equal width, each weighted by its voxels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from connectomics.decoding.probabilities import as_bytes
from connectomics.errors import ConnectomicsError
from connectomics.metrics.cellmap_metrics import Pooled
from connectomics.pages import charts, page
from connectomics.pages.report.library import Library
from connectomics.pages.report.sources import ReportOptions
from connectomics.pages.report.volumes import Item, spread_blocks

BINS = 15
_LEVELS = 256
_VALUES = np.arange(_LEVELS) / (_LEVELS - 1)  # probability by stored value
_LEAST = 30  # voxels of a bin that is drawn
_MOST_CURVES = 8
_UNSURE = (0.05, 0.95)


@dataclass
class Reliability(Pooled):
    """Known voxels by stored probability k/255: ``voxels`` and those where the class is ``present``, int64 (256,)."""

    voxels: NDArray[np.int64] = field(default_factory=lambda: np.zeros(_LEVELS, np.int64))
    present: NDArray[np.int64] = field(default_factory=lambda: np.zeros(_LEVELS, np.int64))

    def add(self, probability: NDArray[np.uint8], present: NDArray[np.bool_], known: NDArray[np.bool_]) -> None:
        """Count a block; all arrays of one shape."""
        self.voxels += np.bincount(probability[known], minlength=_LEVELS)
        self.present += np.bincount(probability[known & present], minlength=_LEVELS)

    def add_item(self, item: Item, most_voxels: int) -> float:
        """Count an item with truth and probabilities, on the probabilities' grid; return the share that was read."""
        assert item.truth is not None
        assert item.probability is not None
        blocks, share = spread_blocks(item.probability.grid, most_voxels)
        for begin, block in blocks:
            values, stored = item.probability.read_level(0, begin, block.shape)
            truth, known = item.truth.read(block)
            self.add(as_bytes(values), truth != 0, known & stored)
        return share

    def bins(self) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
        """Return voxels, mean probability and share present of `BINS` equal bins; NaN in a bin without voxels."""
        place = np.minimum((_VALUES * BINS).astype(int), BINS - 1)
        n = np.bincount(place, self.voxels, BINS)
        with np.errstate(invalid="ignore"):
            mean = np.bincount(place, self.voxels * _VALUES, BINS) / n
            share = np.bincount(place, self.present, BINS) / n
        return n.astype(np.int64), mean, share

    def error(self) -> float:
        """Return the expected calibration error: the mean over voxels of |share - mean| of their bin."""
        n, mean, share = self.bins()
        total = n.sum()
        return float(np.nansum(n * np.abs(share - mean)) / total) if total else float("nan")

    def brier(self) -> float:
        """Return the mean squared difference of probability and truth (0 or 1); Brier, Mon. Weather Rev. 78 (1950)."""
        absent = self.voxels - self.present
        total = self.voxels.sum()
        return float((self.present @ (1 - _VALUES) ** 2 + absent @ _VALUES**2) / total) if total else float("nan")

    def unsure(self) -> Reliability:
        """Return the counts of voxels between 5 and 95 %, which the certain background outweighs otherwise."""
        inside = (_UNSURE[0] < _VALUES) & (_UNSURE[1] > _VALUES)
        return Reliability(np.where(inside, self.voxels, 0), np.where(inside, self.present, 0))


def calibration_section(found: Mapping[str, Reliability], share: float) -> Markup:
    """Return the reliability diagram and a table by class; ``share``: the part of the voxels that was read."""
    counted = {name: r for name, r in found.items() if r.voxels.any()}
    errors = {name: r.unsure().error() for name, r in counted.items()}
    order = sorted(counted, key=lambda name: 0.0 if np.isnan(errors[name]) else -errors[name])
    lines = []
    for name in order[:_MOST_CURVES]:
        n, mean, present = counted[name].bins()
        if (drawn := n >= _LEAST).any():
            lines.append(charts.Series(name, mean[drawn], present[drawn]))
    more = f", the {_MOST_CURVES} worst of {len(order)} classes" if len(order) > _MOST_CURVES else ""
    chart = charts.line_chart(
        lines, f"Reliability{more}", "probability", (0, 1), x_range=(0, 1), diagonal=True, y_label="share present"
    )
    return page.render(
        "report/calibration", rows=[_row(name, counted[name]) for name in order],
        chart=chart, share=share, bins=BINS, least=_LEAST,
    )  # fmt: skip


def _row(name: str, reliability: Reliability) -> tuple[str, list[str]]:
    unsure, total = reliability.unsure(), int(reliability.voxels.sum())
    errors = [page.score(value) for value in (reliability.error(), unsure.error(), reliability.brier())]
    sums = (unsure.voxels.sum(), reliability.voxels @ _VALUES, reliability.present.sum())
    shares = [page.percent(float(n) / total) for n in sums]
    return name, [*errors[:2], shares[0], errors[2], *shares[1:]]


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


def confusion_section(confusion: Confusion, problems: Sequence[str], share: float) -> Markup:
    """Return the table; ``share``: the part of the voxels that was read."""
    rows = [k for k, n in enumerate(confusion.there) if n or confusion.empty[k]]
    return page.render("report/confusion", c=confusion, rows=rows, problems=problems, share=share)


# -- both sections -----------------------------------------------------------------------------------------------------
_MOST_LINES = 5


def sections(library: Library, options: ReportOptions, step: Callable[[str], None]) -> list[page.Section]:
    """Return both sections; crops and classes that cannot be read are left out and listed."""
    problems: list[str] = []
    crops: dict[tuple[str, str], list[Item]] = {}
    with suppress(ConnectomicsError):  # the section on crops reports it
        for one in library.wanted():
            found = crops.setdefault((one.dataset, one.crop), [])
            with page.noting(problems, f"Left out: {one.crop}/{one.class_name}"):
                found.append(library.item(one))
    classes = sorted({i.class_name for items in crops.values() for i in items if i.truth and i.prediction})
    table, reliabilities = Confusion.none(classes), {name: Reliability() for name in classes}
    shares: dict[str, list[float]] = {"confusion": [], "calibration": []}
    for (_, crop), items in crops.items():
        with page.noting(problems, f"Left out: {crop}"):
            part = Confusion.none(classes)  # counted separately: a crop that fails half-way adds nothing
            if items:
                shares["confusion"].append(part.add_crop(items, options.max_voxels))
                table += part
        for item in items:
            if item.truth is not None and item.probability is not None:
                with page.noting(problems, f"Left out: {crop}/{item.class_name}"):
                    counted = Reliability()
                    shares["calibration"].append(counted.add_item(item, options.max_voxels))
                    reliabilities[item.class_name] = reliabilities.get(item.class_name, Reliability()) + counted
        step(f"voxels of {crop}")
    lines = list(dict.fromkeys(problems))
    if len(lines) > _MOST_LINES:
        lines = [*lines[:_MOST_LINES], f"{len(lines) - _MOST_LINES} more were left out."]
    means = {name: sum(found) / len(found) if found else 1.0 for name, found in shares.items()}
    return [
        page.Section("confusion", "Confusion between classes", confusion_section(table, lines, means["confusion"])),
        page.Section("calibration", "Calibration", calibration_section(reliabilities, means["calibration"])),
    ]
