"""HTML pages from templates: one self-contained document with its style and script, and the formats of its numbers.

The templates are in ``templates/``; what they show is escaped unless it is HTML that a template made.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from importlib import resources
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray

from connectomics import __version__
from connectomics.errors import ConnectomicsError
from connectomics.pages import colors, figures

#: Marks a page as ours; only such a page may be replaced.
GENERATOR = '<meta name="generator" content="connectomics">'
AXES = "zyx"
PLANES = ("xy", "xz", "yz")  #: names of the planes cut across z, y and x


@dataclass(frozen=True)
class Section:
    """A section of the page: ``anchor`` is its ID, ``title`` its heading, ``body`` its HTML."""

    anchor: str
    title: str
    body: Markup


# -- numbers as text ---------------------------------------------------------------------------------------------------
def score(value: float | None, digits: int = 3) -> Markup:
    """Return a score as ``<data>``: rounded as text, exact in its ``value``; a dash for None, NaN and infinity."""
    if value is None or not math.isfinite(value):
        return Markup('<span class="none">–</span>')
    return Markup(f'<data value="{float(value)!r}">{value:.{digits}f}</data>')


def count(value: float | int | None) -> str:
    """Return a whole number with thin spaces between thousands."""
    return "–" if value is None else f"{int(value):,}".replace(",", "\u2009")


def seconds(value: float) -> str:
    """Return a duration: ``0.8 s``, ``42 s``, ``3 min 20 s``, ``2 h 05 min``."""
    if value < 10:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def nm(values: Sequence[float]) -> str:
    """Return lengths in nm, z y x: ``5.24 × 4 × 4``."""
    return " × ".join(number(v) for v in values)


def number(value: float) -> str:
    """Return a length or position with at most two decimals and no trailing zeros."""
    shown = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if shown == "-0" else shown


def size(n_bytes: float) -> str:
    """Return a number of bytes in kB, MB or GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000 or unit == "GB":
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return ""


def percent(share: float | None) -> str:
    """Return a share in percent with two significant digits; a dash for None."""
    if share is None:
        return "–"
    value = 100 * share
    if 0 < value < 0.01:
        return "< 0.01 %"
    return f"{value:.0f} %" if value >= 10 or value == 0 else f"{value:.2g} %"


def now() -> str:
    """Return the current date and time with the time zone."""
    return datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")


def exactly(shown: str, value: float) -> Markup:
    """Return rounded text as ``<data>`` with the exact value."""
    return Markup('<data value="{!r}">{}</data>').format(float(value), shown)


def width(value: float, as_text: bool = True) -> str | float:
    """Return a share of 1, clipped to [0, 1], as a width in percent."""
    found = 100 * min(max(value, 0.0), 1.0)
    return f"{found:.1f}" if as_text else found


def g(value: float, digits: int = 6) -> str:
    """Return a coordinate of a drawing."""
    return f"{value:.{digits}g}"


# -- templates ---------------------------------------------------------------------------------------------------------
@cache
def environment() -> Environment:
    """Return the template environment: HTML is escaped, and a name that is not given is an error."""
    made = Environment(
        loader=PackageLoader("connectomics.pages", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    formats = (score, count, seconds, nm, number, size, percent)
    made.filters |= {function.__name__: function for function in formats}
    made.filters |= {"data_uri": data_uri, "css": colors.css, "width": width, "exactly": exactly, "g": g}
    made.globals |= {"colors": colors, "figures": figures, "AXES": AXES, "PLANES": PLANES}
    return made


def render(template: str, **values: Any) -> Markup:
    """Return the HTML of ``templates/{template}.html.j2``."""
    return Markup(environment().get_template(f"{template}.html.j2").render(values).strip())


def note(*messages: str) -> Markup:
    """Return a line for each message: something is missing or could not be read."""
    return Markup("").join(Markup('<p class="note">{}</p>').format(message) for message in messages)


@contextmanager
def noting(problems: list[str], what: str) -> Iterator[None]:
    """Add a line to ``problems`` instead of raising a `ConnectomicsError`: ``{what}: {error}``."""
    try:
        yield
    except ConnectomicsError as error:
        problems.append(f"{what}: {error}")


def data_uri(picture: NDArray[np.uint8], quality: int = 85) -> str:
    """Return a picture (see `figures.encode`) as a ``data:`` address."""
    mime, data = figures.encode(picture, quality)
    return f"data:{mime};base64,{base64.b64encode(data).decode('ascii')}"


def document(title: str, header: Markup, sections: Sequence[Section], about: str, styles: Sequence[str] = ()) -> str:
    """Return the whole page. Styles and script are part of it, so that it needs no other file.

    Args:
        header: HTML above the sections. about: last words of the footer. styles: further style sheets in ``assets``.
    """
    assets = resources.files("connectomics.pages").joinpath("assets")
    files = ("report.css", *styles, "report.js")
    *styles_text, script = (Markup(assets.joinpath(name).read_text(encoding="utf-8")) for name in files)
    page = environment().get_template("page.html.j2")
    return page.render(
        title=title, header=header, sections=sections, about=about, style=Markup("\n").join(styles_text),
        script=script, generator=Markup(GENERATOR), now=now(), version=__version__,
    )  # fmt: skip
