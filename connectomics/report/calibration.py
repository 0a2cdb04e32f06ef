"""Calibration: whether what the network calls 80 % sure is there in 80 % of the voxels.

Probabilities are counted in steps of 1/255, as they are stored (float16 is rounded to them), so any number of voxels
takes the memory of one block. The expected calibration error is that of Guo et al., "On calibration of modern neural
networks" (ICML 2017): bins of equal width, each weighted by its voxels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from connectomics.decoding.probabilities import as_bytes
from connectomics.report import charts, page
from connectomics.report.volumes import Item, spread_blocks

BINS = 15
_LEVELS = 256
_LEAST = 30  # voxels of a bin that is drawn
_MOST_LINES = 8
_UNSURE = (0.05, 0.95)


def _zeros() -> NDArray[np.int64]:
    return np.zeros(_LEVELS, np.int64)


@dataclass
class Reliability:
    """Known voxels by stored probability k/255: ``voxels`` and those where the class is ``present``, int64 (256,)."""

    voxels: NDArray[np.int64] = field(default_factory=_zeros)
    present: NDArray[np.int64] = field(default_factory=_zeros)

    def __add__(self, other: Reliability) -> Reliability:
        return Reliability(self.voxels + other.voxels, self.present + other.present)

    def add(self, probability: NDArray[np.uint8], present: NDArray[np.bool_], known: NDArray[np.bool_]) -> None:
        """Count a block; all of one shape."""
        self.voxels += np.bincount(probability[known], minlength=_LEVELS)
        self.present += np.bincount(probability[known & present], minlength=_LEVELS)

    def add_item(self, item: Item, most_voxels: int) -> float:
        """Count an item that has truth and probabilities, on these' own grid; the share that was looked at.

        Beyond ``most_voxels`` only evenly spread slabs are looked at.
        """
        if item.truth is None or item.probability is None:
            return 1.0
        grid, looked = item.probability.grid, 0
        for begin, block in spread_blocks(grid, most_voxels):
            values, stored = item.probability.read_level(0, begin, block.shape)
            truth, known = item.truth.read(block)
            self.add(as_bytes(values), truth != 0, known & stored)
            looked += block.size
        return looked / grid.size if grid.size else 1.0

    def bins(self, bins: int = BINS) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
        """Voxels, mean probability and share present of equal bins, (bins,); NaN in a bin without voxels."""
        values = np.arange(_LEVELS) / (_LEVELS - 1)
        place = np.minimum((values * bins).astype(int), bins - 1)
        n = np.bincount(place, self.voxels, bins)
        with np.errstate(invalid="ignore"):
            mean = np.bincount(place, self.voxels * values, bins) / n
            share = np.bincount(place, self.present, bins) / n
        return n.astype(np.int64), mean, share

    def error(self, bins: int = BINS) -> float:
        """The expected calibration error: the mean over voxels of |share present - mean probability| of their bin."""
        n, mean, share = self.bins(bins)
        total = n.sum()
        return float(np.nansum(n * np.abs(share - mean)) / total) if total else float("nan")

    def brier(self) -> float:
        """The mean squared difference of probability and truth (0 or 1); Brier, Mon. Weather Rev. 78 (1950)."""
        values = np.arange(_LEVELS) / (_LEVELS - 1)
        absent = self.voxels - self.present
        total = self.voxels.sum()
        return float((self.present @ (1 - values) ** 2 + absent @ values**2) / total) if total else float("nan")

    def unsure(self) -> Reliability:
        """The same of the voxels between 5 and 95 % alone; the background, of which all are sure, outweighs them."""
        values = np.arange(_LEVELS) / (_LEVELS - 1)
        inside = (values > _UNSURE[0]) & (values < _UNSURE[1])
        return Reliability(np.where(inside, self.voxels, 0), np.where(inside, self.present, 0))


def section(found: Mapping[str, Reliability], problems: Sequence[str], share: float) -> page.Section:
    """The reliability diagram and a table by class; ``share``: the part of the voxels that was looked at."""
    title = "Calibration"
    notes = "".join(page.note(p) for p in problems)
    counted = {name: r for name, r in found.items() if r.voxels.any()}
    if not counted:
        text = "No calibration: it needs probabilities and truth of the same classes."
        return page.Section("calibration", title, notes + page.note(text))
    order = sorted(counted, key=lambda name: -counted[name].unsure().error() if _any_unsure(counted[name]) else 0.0)
    rows = [_row(name, counted[name]) for name in order]
    heads = ["class", *(f"<th scope=col class=num>{h}</th>" for h in _HEADS)]
    partly = f" Evenly spread slabs with {page.percent(share)} of the voxels were looked at." if share < 0.995 else ""
    about = page.hint(
        "Of the voxels to which the network gives a probability, the share where the class is there: on the dashed "
        "line where probabilities can be taken at their word, below it where the network is too sure. Known voxels "
        f"only, {BINS} bins; bins with fewer than {_LEAST} voxels are not drawn. Expected calibration error (ECE): the "
        "mean distance from the line over voxels; unsure: only voxels between 5 and 95 %. Mean p: mean probability."
        + partly
    )
    body = f'<div class="beside">{_chart(counted, order)}{page.table(heads, rows)}</div>'
    return page.Section("calibration", title, notes + about + body)


_HEADS = ("ECE", "unsure ECE", "unsure", "Brier", "mean p", "present")


def _any_unsure(reliability: Reliability) -> bool:
    return bool(reliability.unsure().voxels.any())


def _chart(counted: Mapping[str, Reliability], order: Sequence[str]) -> str:
    lines = []
    for name in order[:_MOST_LINES]:
        n, mean, share = counted[name].bins()
        drawn = n >= _LEAST
        if drawn.any():
            lines.append(charts.Series(name, mean[drawn], share[drawn]))
    if not lines:
        return page.note("No bin holds enough voxels to be drawn.")
    more = f", the {_MOST_LINES} worst of {len(order)} classes" if len(order) > _MOST_LINES else ""
    return charts.line_chart(
        lines,
        f"Reliability{more}",
        "probability",
        (0.0, 1.0),
        x_range=(0.0, 1.0),
        diagonal=True,
        y_label="share present",
    )


def _row(name: str, reliability: Reliability) -> list[str]:
    unsure = reliability.unsure()
    total = int(reliability.voxels.sum())
    values = np.arange(_LEVELS) / (_LEVELS - 1)
    cells = [
        page.score(reliability.error()),
        page.score(unsure.error()),
        page.percent(float(unsure.voxels.sum()) / total),
        page.score(reliability.brier()),
        page.percent(float(reliability.voxels @ values) / total),
        page.percent(float(reliability.present.sum()) / total),
    ]
    return [f"<th scope=row>{page.text(name)}</th>", *(f'<td class="num">{c}</td>' for c in cells)]
