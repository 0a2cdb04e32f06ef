"""Slices as SVG: raw once, transparent layers over it, a scale bar in true nanometres.

A picture's coordinate system is nm, so that oblong voxels come out in their true proportions and a scale bar is a
rectangle of its own length. The raw image is embedded once per slice and shown again by reference.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count

import numpy as np
from numpy.typing import NDArray

from connectomics.report import figures, page
from connectomics.report.volumes import Findings, Item, Plane

_NAMES = ("xy", "xz", "yz")
_AXES = "zyx"
#: The two axes of a slice: down and to the right.
DIRECTIONS = ("y down, x right", "z down, x right", "z down, y right")


@dataclass
class Ids:
    """Names for pictures within one page."""

    _next: count[int]

    @classmethod
    def fresh(cls) -> Ids:
        """Numbers from 0."""
        return cls(count())

    def new(self) -> str:
        """A name that the page has not used."""
        return f"p{next(self._next)}"


def wrong_objects(plane: Plane, found: Findings) -> NDArray[np.bool_]:
    """Where truth and prediction are both there, but their objects are not each other's largest overlap, (H, W)."""
    both = (plane.truth != 0) & (plane.prediction != 0)
    wrong = np.zeros(both.shape, bool)
    if both.any():
        ids, index = np.unique(plane.truth[both], return_inverse=True)
        partner = np.array([found.matched.get(int(t), -1) for t in ids], np.int64)
        wrong[both] = partner[index.ravel()] != plane.prediction[both].astype(np.int64)
    return wrong


def layers(item: Item, plane: Plane, found: Findings) -> dict[str, NDArray[np.uint8]]:
    """The transparent pictures of a slice by name: ``truth``, ``prediction``, ``errors``, ``probability``.

    Objects take a colour by their true id, predicted ones that of the true object they overlap most, so that a split
    shows as one colour with an edge through it and a merge as one colour over several.
    """
    made: dict[str, NDArray[np.uint8]] = {}
    truth_by_id = item.truth is not None and item.truth.instance
    if item.truth is not None:
        shown = np.where(plane.known, plane.truth, 0)
        colors = figures.object_colors(shown) if truth_by_id else figures.TRUTH
        made["truth"] = figures.label_layer(shown, colors)
        made["truth"][~plane.known] = figures.ERROR_COLORS[figures.NOT_KNOWN]
    if item.prediction is not None:
        made["prediction"] = figures.label_layer(plane.prediction, _prediction_colors(item, plane, found, truth_by_id))
    if item.truth is not None and item.prediction is not None:
        by_id = truth_by_id and item.prediction.instance
        wrong = wrong_objects(plane, found) if by_id else None
        made["errors"] = figures.error_layer(figures.error_map(plane.truth, plane.prediction, plane.known, wrong))
    if plane.probability is not None:
        made["probability"] = figures.heat_layer(plane.probability)
    return made


def _prediction_colors(item: Item, plane: Plane, found: Findings, truth_by_id: bool) -> figures.Picture | figures.Rgb:
    assert item.prediction is not None
    if not item.prediction.instance:
        return figures.PREDICTION
    if not truth_by_id:
        return figures.object_colors(plane.prediction)
    ids, index = np.unique(plane.prediction, return_inverse=True)
    partners = np.array([found.partner.get(int(i), 0) for i in ids], np.int64)
    colors = figures.object_colors(partners)
    colors[(partners == 0) & (ids != 0)] = figures.NO_PARTNER
    return colors[index.reshape(plane.prediction.shape)]


def gray_layer(plane: Plane, limits: tuple[float, float]) -> NDArray[np.uint8]:
    """Raw as grey (H, W); transparent (H, W, 4) where some of it is not there; flat grey where there is no raw."""
    if plane.raw is None or plane.inside is None:
        return np.full(plane.truth.shape, 70, np.uint8)
    gray = figures.to_gray(plane.raw, limits)
    if plane.inside.all():
        return gray
    alpha = np.where(plane.inside, 255, 0).astype(np.uint8)
    return np.dstack([gray, gray, gray, alpha])


@dataclass(frozen=True)
class Row:
    """One slice on the page: ``html``, and a ``thumbnail`` of it (SVG) that shows the same images by reference."""

    html: str
    thumbnail: str


def plane_row(item: Item, plane: Plane, found: Findings, ids: Ids) -> Row:
    """One slice: raw alone, then raw with each layer, side by side."""
    height, width = plane.extent
    limits = figures.contrast_limits(plane.raw, plane.inside) if plane.raw is not None else (0.0, 1.0)
    name = ids.new()
    where = f"{_NAMES[plane.axis]} at {_AXES[plane.axis]} = {page.number(plane.at)} nm"
    about = f"{item.crop} {item.class_name}, {where}"
    raw = _image(page.data_uri(gray_layer(plane, limits)), width, height, f'id="{name}"')
    marks = _cut_marks(item, plane, found.position)
    cells = [_picture("raw", about, width, height, raw + marks + scale_bar(width, height))]
    made = layers(item, plane, found)
    small = next((kind for kind in ("errors", "prediction", "truth") if kind in made), "")
    for kind, layer in made.items():
        mark = f' id="{name}o"' if kind == small else ""
        over = _image(page.data_uri(layer), width, height, f'class="over"{mark}')
        cells.append(_picture(kind, about, width, height, f'<use href="#{name}"/>{over}'))
    of = item.grid.shape[plane.axis]
    caption = (
        f"<b>{_NAMES[plane.axis]}</b> at {_AXES[plane.axis]} = {page.number(plane.at)} nm"
        f" <span>slice {plane.index + 1} of {of}; {DIRECTIONS[plane.axis]}</span>"
    )
    flat = " flat" if width > 2.2 * height else ""  # a long flat slice needs more of the page's width
    row = f'<div class="row">{"".join(cells)}</div>'
    style = f'style="--n:{max(4, len(cells))}"'
    html = f'<figure class="plane{flat}" {style}><figcaption>{caption}</figcaption>{row}</figure>'
    content = f'<use href="#{name}"/>' + (f'<use href="#{name}o"/>' if small else "")
    return Row(html, _drawing(f"small picture of {small or 'raw'}, ", about, width, height, content))


def _picture(kind: str, about: str, width: float, height: float, content: str) -> str:
    return f'<div class="pic">{_drawing(f"{kind}: ", about, width, height, content)}<span>{kind}</span></div>'


def _drawing(before: str, about: str, width: float, height: float, content: str) -> str:
    label = f'role="img" aria-label="{before}{page.text(about)}"'
    return f'<svg viewBox="0 0 {width:.6g} {height:.6g}" {label}>{content}</svg>'


def _image(uri: str, width: float, height: float, attributes: str) -> str:
    return f'<image {attributes} width="{width:.6g}" height="{height:.6g}" preserveAspectRatio="none" href="{uri}"/>'


def scale_bar(width: float, height: float, lettering: float = 1.0) -> str:
    """A scale bar with its length, in a picture of ``width`` x ``height`` nm; ``lettering`` scales its thickness."""
    length = figures.scale_bar_length(width)
    unit = lettering * min(width, 3 * height) / 100  # lettering in flat slices must still fit
    x, y = 4 * unit, height - 4 * unit
    return (
        f'<g class="scale"><rect x="{x:.6g}" y="{y - 1.5 * unit:.6g}" width="{length:g}" height="{1.5 * unit:.6g}" '
        f'stroke-width="{0.5 * unit:.4g}"/><text x="{x:.6g}" y="{y - 3.5 * unit:.6g}" font-size="{7 * unit:.4g}" '
        f'stroke-width="{1.2 * unit:.4g}">{figures.length_text(length)}</text></g>'
    )


def _cut_marks(item: Item, plane: Plane, position: tuple[int, int, int]) -> str:
    """Ticks at the borders where the two other slices cut this one."""
    rows, columns = (a for a in range(3) if a != plane.axis)
    height, width = plane.extent
    y = (position[rows] + 0.5) * item.grid.voxel_size[rows]
    x = (position[columns] + 0.5) * item.grid.voxel_size[columns]
    tick = 0.04 * min(width, height)
    lines = [(0, y, tick, y), (width - tick, y, width, y), (x, 0, x, tick), (x, height - tick, x, height)]
    return "".join(f'<line class="cut" x1="{a:.6g}" y1="{b:.6g}" x2="{c:.6g}" y2="{d:.6g}"/>' for a, b, c, d in lines)


def legend(with_probability: bool) -> str:
    """What the colours mean."""
    entries = [
        (figures.TRUTH, "truth; in errors: truth only (missed)"),
        (figures.PREDICTION, "prediction; in errors: predicted only (invented)"),
        (figures.AGREEMENT, "agreement"),
        (figures.WRONG_OBJECT, "both, but split or merged objects"),
        (figures.UNKNOWN, "not annotated"),
        (figures.NO_PARTNER, "predicted object that meets no true one"),
    ]
    items = "".join(f'<li><i style="background:rgb{color}"></i>{page.text(name)}</li>' for color, name in entries)
    more = " Probability: orange, as strong as the network is sure." if with_probability else ""
    return f'<ul class="legend">{items}</ul>' + page.hint(
        "Classes scored as instances show every true object in its own colour, and a predicted object in the "
        "colour of the true one it overlaps most. Ticks at the borders of raw mark where the other two slices cut. "
        "Grey values are stretched per slice (0.5 to 99.5 %). Click a picture to enlarge it." + more
    )
