"""Calibration: whether a class is present in 80 % of the voxels to which the network gives a probability of 80 %.

Probabilities are counted in steps of 1/255, as they are stored (float16 is rounded to them), so the memory does not
depend on the number of voxels. The expected calibration error is that of Guo et al., "On calibration of modern neural
networks" (ICML 2017): bins of equal width, each weighted by its voxels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from connectomics.decoding.probabilities import as_bytes
from connectomics.metrics.cellmap_metrics import Pooled
from connectomics.pages import charts, page
from connectomics.pages.report.volumes import Item, spread_blocks

BINS = 15
_LEVELS = 256
_VALUES = np.arange(_LEVELS) / (_LEVELS - 1)  # probability by stored value
_LEAST = 30  # voxels of a bin that is drawn
_MOST_LINES = 8
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


def section(found: Mapping[str, Reliability], share: float) -> Markup:
    """Return the reliability diagram and a table by class; ``share``: the part of the voxels that was read."""
    counted = {name: r for name, r in found.items() if r.voxels.any()}
    errors = {name: r.unsure().error() for name, r in counted.items()}
    order = sorted(counted, key=lambda name: 0.0 if np.isnan(errors[name]) else -errors[name])
    lines = []
    for name in order[:_MOST_LINES]:
        n, mean, present = counted[name].bins()
        if (drawn := n >= _LEAST).any():
            lines.append(charts.Series(name, mean[drawn], present[drawn]))
    more = f", the {_MOST_LINES} worst of {len(order)} classes" if len(order) > _MOST_LINES else ""
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
