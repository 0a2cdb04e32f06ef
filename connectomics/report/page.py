"""The page itself: escaped HTML, small building blocks, and one self-contained document with its style and script."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from html import escape
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.report.figures import encode


@dataclass(frozen=True)
class Section:
    """One part of the page: ``anchor`` names it in links, ``title`` heads it, ``body`` is HTML (escaped already)."""

    anchor: str
    title: str
    body: str


def text(value: Any) -> str:
    """Any value as text that is safe in HTML and in attributes."""
    return escape(str(value), quote=True)


def note(message: str) -> str:
    """One line that says that something is missing or could not be read."""
    return f'<p class="note">{text(message)}</p>'


def hint(message: str) -> str:
    """A line that explains how to read what follows."""
    return f'<p class="hint">{text(message)}</p>'


def score(value: float | None, digits: int = 3) -> str:
    """A score as ``<data>``: rounded for the eye, exact in its ``value``; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return '<span class="none">–</span>'
    return f'<data value="{float(value)!r}">{value:.{digits}f}</data>'


def count(value: float | int | None) -> str:
    """A whole number with thin spaces between thousands."""
    return "–" if value is None else f"{int(value):,}".replace(",", "\u2009")


def seconds(value: float) -> str:
    """``0.8 s``, ``42 s``, ``3 min 20 s``, ``2 h 05 min``."""
    if value < 10:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def nm(values: Sequence[float]) -> str:
    """Lengths in nm, z y x, as short as they are exact: ``5.24 × 4 × 4``."""
    return " × ".join(number(v) for v in values)


def number(value: float) -> str:
    """A length or position: at most two decimals, no trailing zeros."""
    shown = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if shown == "-0" else shown


def size(n_bytes: float) -> str:
    """Bytes in kB, MB or GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000 or unit == "GB":
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return ""


def percent(share: float) -> str:
    """A share of 1 in percent: two digits, more only where they are before the point."""
    value = 100 * share
    if 0 < value < 0.01:
        return "< 0.01 %"
    return f"{value:.0f} %" if value >= 10 or value == 0 else f"{value:.2g} %"


def definitions(items: Mapping[str, Any]) -> str:
    """A list of terms and values (escaped here); long values get a line of their own."""
    rows = "".join(
        f"<div{' class=long' * (len(str(v)) > 44)}><dt>{text(k)}</dt><dd>{text(v)}</dd></div>" for k, v in items.items()
    )
    return f'<dl class="facts">{rows}</dl>'


def table(headers: Sequence[str], rows: Iterable[Sequence[str]], *, kind: str = "", caption: str = "") -> str:
    """A table that scrolls sideways where it is too wide. Cells and headers are HTML (escaped already).

    A cell that begins with ``<td`` or ``<th`` is taken as it is; other cells are put into ``<td>``.
    """
    head = "".join(h if h.startswith("<th") else f"<th scope=col>{h}</th>" for h in headers)
    body = "".join(
        f"<tr>{''.join(c if c.startswith(('<td', '<th')) else f'<td>{c}</td>' for c in row)}</tr>" for row in rows
    )
    label = f"<caption>{text(caption)}</caption>" if caption else ""
    parts = f"{label}<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="scroll"><table class="{kind}">{parts}</table></div>'


def details(summary: str, body: str, *, is_open: bool = False, kind: str = "", anchor: str = "") -> str:
    """A part that can be folded; ``summary`` and ``body`` are HTML, ``anchor`` its id."""
    state = (f' id="{text(anchor)}"' if anchor else "") + (" open" if is_open else "")
    return f'<details class="{kind}"{state}><summary>{summary}</summary>{body}</details>'


def data_uri(picture: NDArray[np.uint8], quality: int = 85) -> str:
    """A picture (see `figures.encode`) as a ``data:`` address."""
    mime, data = encode(picture, quality)
    return f"data:{mime};base64,{base64.b64encode(data).decode('ascii')}"


#: What pages of ours are known by.
GENERATOR = '<meta name="generator" content="connectomics">'


def document(title: str, header: str, sections: Sequence[Section], footer: str) -> str:
    """The whole page. Style and script are written into it, so that it needs nothing beside itself."""
    assets = resources.files("connectomics.report").joinpath("assets")
    style = assets.joinpath("report.css").read_text(encoding="utf-8")
    script = assets.joinpath("report.js").read_text(encoding="utf-8")
    links = "".join(f'<a href="#{s.anchor}">{text(s.title)}</a>' for s in sections)
    body = "".join(f'<section id="{s.anchor}"><h2>{text(s.title)}</h2>{s.body}</section>' for s in sections)
    return (
        "<!doctype html>\n"
        '<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"{GENERATOR}"
        # nothing may be fetched: the page is whole, and what it shows comes from files that others wrote
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
        f"<title>{text(title)}</title><style>{style}</style></head><body>"
        f'<header>{header}</header><nav aria-label="Sections">{links}</nav><main>{body}</main>'
        f"<footer>{footer}</footer><dialog id=large><form method=dialog><button>close</button></form></dialog>"
        f"<script>{script}</script></body></html>\n"
    )


def now() -> str:
    """Date and time of writing, with the time zone."""
    return datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
