"""Charts as inline SVG and plain HTML: they take their colours from the page, so light, dark and print all work."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from connectomics.report import page

_WIDTH, _HEIGHT = 520, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 108, 14, 40
_MOST_POINTS = 300
_COLORS = 8  # the style sheet's series colours; further series repeat them with dashes
_LINE = 13  # height of a label, SVG units
_LETTERS = 17  # of a name at a line's end


@dataclass(frozen=True)
class Series:
    """One line: ``x`` and ``y`` (N,), finite; ``strong`` draws it thicker and in the text's colour."""

    name: str
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    strong: bool = False


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers from ``low`` to ``high`` in steps of 1, 2 or 5 x 10^k."""
    span = high - low
    if not span > 0 or not math.isfinite(span):
        return [low]
    power = 10.0 ** math.floor(math.log10(span / wanted))
    step = next(s * power for s in (1, 2, 5, 10) if span / (s * power) <= wanted)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def thin(x: NDArray[np.float64], y: NDArray[np.float64], most: int = _MOST_POINTS) -> tuple[NDArray, NDArray]:
    """At most about ``most`` points, each the mean of a run of neighbours."""
    if len(x) <= most:
        return x, y
    starts = np.unique(np.linspace(0, len(x), most, endpoint=False).astype(int))
    counts = np.diff([*starts, len(x)])
    return np.add.reduceat(x, starts) / counts, np.add.reduceat(y, starts) / counts


def line_chart(
    series: Sequence[Series],
    title: str,
    x_label: str,
    y_range: tuple[float, float] | None = None,
    *,
    x_range: tuple[float, float] | None = None,
    y_label: str = "",
    diagonal: bool = False,
) -> str:
    """Lines with their names at their ends.

    Args:
        y_range, x_range: fix an axis (default: y from 0 or the least value, x from the least, to the most).
        y_label: written above the y axis. diagonal: draw y = x, dashed.
    """
    xs = np.concatenate([s.x for s in series])
    ys = np.concatenate([s.y for s in series])
    low, high = y_range or (min(0.0, float(ys.min())), float(ys.max()))
    high = high if high > low else low + 1.0
    left, right = x_range or (float(xs.min()), float(xs.max()))
    right = right if right > left else left + 1.0

    def px(x: float) -> float:
        return _LEFT + (min(max(x, left), right) - left) / (right - left) * (_WIDTH - _LEFT - _RIGHT)

    def py(y: float) -> float:
        return _TOP + (high - min(max(y, low), high)) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [_axes(px, py, (left, right), (low, high), x_label, y_label)]
    if diagonal:
        ends = max(low, left), min(high, right)
        parts.append(
            f'<line class="ideal" x1="{px(ends[0]):.1f}" y1="{py(ends[0]):.1f}" '
            f'x2="{px(ends[1]):.1f}" y2="{py(ends[1]):.1f}"/>'
        )
    labels: list[tuple[float, str, str]] = []
    for k, line in enumerate(series):
        kind = "strong" if line.strong else f"s{k % _COLORS}" + (" dash" if k >= _COLORS else "")
        x, y = thin(line.x, line.y)
        points = " ".join(f"{px(a):.1f},{py(b):.1f}" for a, b in zip(x, y, strict=True))
        parts.append(f'<polyline class="line {kind}" points="{points}"/>')
        if len(x) <= 40:
            parts.extend(
                f'<circle class="dot {kind}" cx="{px(a):.1f}" cy="{py(b):.1f}" r="3">'
                f"<title>{page.text(line.name)}: {b:.4g} at {page.text(x_label)} {a:.4g}</title></circle>"
                for a, b in zip(x, y, strict=True)
            )
        labels.append((py(float(y[-1])), _short(line.name), kind))
    parts.extend(_end_labels(labels))
    name, box = page.text(title), f"0 0 {_WIDTH} {_HEIGHT}"
    drawing = f'<svg viewBox="{box}" role="img" aria-label="{name}">{"".join(parts)}</svg>'
    return f'<figure class="chart"><figcaption>{name}</figcaption>{drawing}</figure>'


def _short(name: str) -> str:
    """A name that has room beside a chart; its end tells runs apart better than its beginning."""
    return name if len(name) <= _LETTERS else "…" + name[1 - _LETTERS :]


def _axes(  # type: ignore[no-untyped-def]
    px, py, xs: tuple[float, float], ys: tuple[float, float], x_label: str, y_label: str
) -> str:
    parts = []
    for value in ticks(*ys):
        y = py(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    bottom = _HEIGHT - _BOTTOM
    whole = x_label in ("epoch", "step")  # there is no half of them
    for value in (v for v in ticks(*xs) if not whole or float(v).is_integer()):
        parts.append(f'<text class="tick" x="{px(value):.1f}" y="{bottom + 17}" text-anchor="middle">{value:g}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text class="tick" x="{middle}" y="{_HEIGHT - 5}" text-anchor="middle">{page.text(x_label)}</text>')
    if y_label:
        parts.append(
            f'<text class="tick" transform="translate(13 {(_TOP + bottom) / 2:.0f}) rotate(-90)" '
            f'text-anchor="middle">{page.text(y_label)}</text>'
        )
    return "".join(parts)


def _end_labels(ends: Sequence[tuple[float, str, str]]) -> list[str]:
    """The names beside the lines' ends, pushed apart where they would cover each other."""
    placed: list[tuple[float, str, str]] = []
    for y, name, kind in sorted(ends):
        placed.append((max(y, placed[-1][0] + _LINE) if placed else y, name, kind))
    over = max(0.0, placed[-1][0] - (_HEIGHT - _BOTTOM)) if placed else 0.0
    return [
        f'<text class="end {kind}" x="{_WIDTH - _RIGHT + 6}" y="{max(_TOP, y - over) + 4:.1f}">{page.text(name)}</text>'
        for y, name, kind in placed
    ]


def bar(
    value: float | None,
    other: float | None = None,
    interval: tuple[float, float] | None = None,
    kind: str = "",
) -> str:
    """A bar from 0 to 1, with a mark at ``other`` (the baseline's value) and a whisker over ``interval``.

    ``kind``: ``s0`` to ``s7``, a series' colour.
    """
    width = 0.0 if value is None else _percent(value)
    mark = "" if other is None else f'<i style="left:{_percent(other):.1f}%"></i>'
    whisker = ""
    if interval is not None:
        low, high = map(_percent, interval)
        whisker = f'<u style="left:{low:.1f}%;width:{max(0.0, high - low):.1f}%"></u>'
    return (
        f'<span class="{f"bar own {kind}" if kind else "bar"}"><b style="width:{width:.1f}%"></b>{whisker}{mark}</span>'
    )


def _percent(value: float) -> float:
    return 100 * min(max(value, 0.0), 1.0)


def time_bars(stages: Mapping[str, float]) -> str:
    """One bar per stage, as long as its share of the longest, with its seconds and its share of the whole."""
    total = sum(stages.values())
    longest = max(stages.values(), default=0.0) or 1.0
    rows = [
        [
            f"<th scope=row>{page.text(name)}</th>",
            f'<td class="wide"><span class="bar"><b style="width:{100 * value / longest:.1f}%"></b></span></td>',
            f'<td class="num"><data value="{float(value)!r}">{page.seconds(value)}</data></td>',
            f'<td class="num">{page.percent(value / total if total else 0.0)}</td>',
        ]
        for name, value in stages.items()
    ]
    rows.append(
        [
            "<th scope=row>in all</th>",
            "<td></td>",
            f'<td class="num"><data value="{float(total)!r}">{page.seconds(total)}</data></td>',
            "<td></td>",
        ]
    )
    return page.table(
        ["stage", "", "<th scope=col class=num>time</th>", "<th scope=col class=num>share</th>"], rows, kind="bars"
    )
