"""Charts as inline SVG. They take their colors from the page, so that light mode, dark mode and print all work.

Bars are macros of ``templates/parts.html.j2``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from connectomics.pages import page

WIDTH, HEIGHT = 520, 300
LINE = 13  # height of a label, SVG units
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 108, 14, 40
_MOST_POINTS = 300
_COLORS = 8  # series colors of the style sheet; further series repeat them with dashes
_LETTERS = 17  # of a name at the end of a line


@dataclass(frozen=True)
class Series:
    """One line: ``x`` and ``y`` (N,), finite; ``strong`` draws it thicker and in the text's color."""

    name: str
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    strong: bool = False


def series(name: str, points: Iterable[tuple[float, float]], strong: bool = False) -> list[Series]:
    """Return the line through (x, y) points, without those of unknown x; nothing if no point is left."""
    x, y = np.array([p for p in points if math.isfinite(p[0])], np.float64).reshape(-1, 2).T
    return [Series(name, x, y, strong)] if len(x) else []


def ticks(low: float, high: float) -> list[float]:
    """Return at most six round numbers from ``low`` to ``high`` in steps of 1, 2 or 5 x 10^k."""
    span = high - low
    if not span > 0 or not math.isfinite(span):
        return [low]
    power = 10.0 ** math.floor(math.log10(span / 5))
    step = next(s * power for s in (1, 2, 5, 10) if span / (s * power) <= 5)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def thin(x: NDArray[np.float64], y: NDArray[np.float64], most: int = _MOST_POINTS) -> tuple[NDArray, NDArray]:
    """Return at most about ``most`` points, each the mean of neighboring points."""
    if len(x) <= most:
        return x, y
    starts = np.unique(np.linspace(0, len(x), most, endpoint=False).astype(int))
    counts = np.diff([*starts, len(x)])
    return np.add.reduceat(x, starts) / counts, np.add.reduceat(y, starts) / counts


def line_chart(
    lines: Sequence[Series],
    title: str,
    x_label: str,
    y_range: tuple[float, float] | None = None,
    *,
    x_range: tuple[float, float] | None = None,
    y_label: str = "",
    diagonal: bool = False,
) -> Markup:
    """Return a chart of lines with their names at their ends, and with y = x if ``diagonal``; empty without lines.

    Limits of the axes: y from 0 or the lowest value, x from the lowest, to the highest, if they are not given.
    """
    if not lines:
        return Markup("")
    xs, ys = (np.concatenate([getattr(line, axis) for line in lines]) for axis in "xy")
    low, high = y_range or (min(0.0, float(ys.min())), float(ys.max()))
    high = high if high > low else low + 1.0
    left, right = x_range or (float(xs.min()), float(xs.max()))
    right = right if right > left else left + 1.0

    def px(x: float) -> float:
        return _LEFT + (min(max(x, left), right) - left) / (right - left) * (WIDTH - _LEFT - _RIGHT)

    def py(y: float) -> float:
        return _TOP + (high - min(max(y, low), high)) / (high - low) * (HEIGHT - _TOP - _BOTTOM)

    whole = x_label in ("epoch", "step")  # there is no half of them
    drawn = []
    for k, line in enumerate(lines):
        kind = "strong" if line.strong else f"s{k % _COLORS}" + (" dash" if k >= _COLORS else "")
        x, y = thin(line.x, line.y)
        points = [(px(a), py(b), a, b) for a, b in zip(x, y, strict=True)]
        drawn.append({"name": line.name, "kind": kind, "points": points, "end": py(float(y[-1]))})
    return page.render(
        "chart", title=title, x_label=x_label, y_label=y_label, lines=drawn, names=_end_labels(drawn),
        x_ticks=[(px(v), v) for v in ticks(left, right) if not whole or float(v).is_integer()],
        y_ticks=[(py(v), v) for v in ticks(low, high)],
        diagonal=[(px(v), py(v)) for v in (max(low, left), min(high, right))] if diagonal else [],
        width=WIDTH, height=HEIGHT, left=_LEFT, right=WIDTH - _RIGHT, bottom=HEIGHT - _BOTTOM, top=_TOP,
    )  # fmt: skip


def curves(
    named: Iterable[tuple[str, Iterable[tuple[float, float]]]],
    title: str,
    x_label: str,
    y_range: tuple[float, float] | None = None,
) -> Markup:
    """Return a chart of (name, points) each; lines without points are left out."""
    lines = [line for name, points in named for line in series(name, points)]
    return line_chart(lines, title, x_label, y_range)


def _end_labels(lines: Sequence[dict]) -> list[tuple[float, str, str]]:
    """Return (y, name, kind) of the names at the ends of the lines, moved apart if they would cover each other."""
    placed: list[tuple[float, str, str]] = []
    for y, name, kind in sorted((line["end"], line["name"], line["kind"]) for line in lines):
        shown = name if len(name) <= _LETTERS else "…" + name[1 - _LETTERS :]  # ends of run names differ most
        placed.append((max(y, placed[-1][0] + LINE) if placed else y, shown, kind))
    over = max(0.0, placed[-1][0] - (HEIGHT - _BOTTOM)) if placed else 0.0
    return [(max(_TOP, y - over) + 4, name, kind) for y, name, kind in placed]
