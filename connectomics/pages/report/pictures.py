"""Slices as SVG: raw once, transparent layers over it, a scale bar.

The coordinates of a picture are nm, so that oblong voxels keep their proportions and a scale bar is a rectangle of its
own length. The raw image is embedded once per slice and reused by reference.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from connectomics.pages import colors, figures, page
from connectomics.pages.report.volumes import Findings, Item, Plane

#: The axes of a slice in the picture, for planes across z, y and x.
_DIRECTIONS = ("y down, x right", "z down, x right", "z down, y right")
_FLAT_GRAY = 70  # instead of raw


@dataclass(frozen=True)
class DrawnPlane:
    """One slice on the page: ``html``, and a ``thumbnail`` (SVG) that shows the same images by reference."""

    html: Markup
    thumbnail: Markup


def draw_plane(item: Item, plane: Plane, found: Findings, ids: Iterator[int]) -> DrawnPlane:
    """Return one slice: raw alone, then raw with each layer, side by side; ``ids`` gives a number new to the page."""
    height, width = plane.extent
    limits = figures.contrast_limits(plane.raw, plane.inside) if plane.raw is not None else (0.0, 1.0)
    made = layers(item, plane, found)
    small = next((kind for kind in ("errors", "prediction", "truth") if kind in made), "")
    values = {"item": item, "plane": plane, "height": height, "width": width, "small": small, "name": f"p{next(ids)}"}
    html = page.render(
        "report/plane", raw=gray_layer(plane, limits), layers=made, ticks=_cut_marks(item, plane, found.position),
        directions=_DIRECTIONS[plane.axis], **values,
    )  # fmt: skip
    return DrawnPlane(html, page.render("report/thumbnail", **values))


def layers(item: Item, plane: Plane, found: Findings) -> dict[str, NDArray[np.uint8]]:
    """Return the transparent pictures of a slice by name: ``truth``, ``prediction``, ``errors``, ``probability``.

    True objects have a color by ID, and predicted ones the color of the true object that they overlap most, so that a
    split shows as one color with an edge through it and a merge as one color over several objects.
    """
    made: dict[str, NDArray[np.uint8]] = {}
    truth_has_ids = item.truth is not None and item.truth.instance
    if item.truth is not None:
        shown = np.where(plane.known, plane.truth, 0)
        made["truth"] = figures.label_layer(shown, figures.object_colors(shown) if truth_has_ids else colors.TRUTH)
        made["truth"][~plane.known] = colors.ERROR_COLORS[colors.NOT_KNOWN]
    if item.prediction is not None:
        color = _prediction_colors(plane, found, item.prediction.instance, truth_has_ids)
        made["prediction"] = figures.label_layer(plane.prediction, color)
    if item.truth is not None and item.prediction is not None:
        wrong = wrong_objects(plane, found) if truth_has_ids and item.prediction.instance else None
        made["errors"] = figures.error_layer(figures.error_map(plane.truth, plane.prediction, plane.known, wrong))
    if plane.probability is not None:
        made["probability"] = figures.heat_layer(plane.probability)
    return made


def wrong_objects(plane: Plane, found: Findings) -> NDArray[np.bool_]:
    """Return where both truth and prediction are foreground, but of objects that do not match, (H, W)."""
    both = (plane.truth != 0) & (plane.prediction != 0)
    wrong = np.zeros(both.shape, bool)
    if both.any():
        ids, index = np.unique(plane.truth[both], return_inverse=True)
        partner = np.array([found.matched.get(int(t), -1) for t in ids], np.int64)
        wrong[both] = partner[index.ravel()] != plane.prediction[both].astype(np.int64)
    return wrong


def _prediction_colors(
    plane: Plane, found: Findings, has_ids: bool, truth_has_ids: bool
) -> figures.Picture | colors.Rgb:
    if not has_ids:
        return colors.PREDICTION
    if not truth_has_ids:
        return figures.object_colors(plane.prediction)
    ids, index = np.unique(plane.prediction, return_inverse=True)
    partners = np.array([found.partner.get(int(i), 0) for i in ids], np.int64)
    table = figures.object_colors(partners)
    table[(partners == 0) & (ids != 0)] = colors.NO_PARTNER
    return table[index.reshape(plane.prediction.shape)]


def gray_layer(plane: Plane, limits: tuple[float, float]) -> NDArray[np.uint8]:
    """Return raw as gray (H, W), or (H, W, 4) if some of it is missing (transparent); flat gray without raw."""
    if plane.raw is None or plane.inside is None:
        return np.full(plane.truth.shape, _FLAT_GRAY, np.uint8)
    gray = figures.to_gray(plane.raw, limits)
    if plane.inside.all():
        return gray
    return np.dstack([gray, gray, gray, np.where(plane.inside, 255, 0).astype(np.uint8)])


def _cut_marks(item: Item, plane: Plane, position: tuple[int, int, int]) -> list[tuple[float, float, float, float]]:
    """Return ticks (x1, y1, x2, y2) at the borders, where the two other slices cut this one."""
    rows, columns = (a for a in range(3) if a != plane.axis)
    height, width = plane.extent
    y = (position[rows] + 0.5) * item.grid.voxel_size[rows]
    x = (position[columns] + 0.5) * item.grid.voxel_size[columns]
    tick = 0.04 * min(width, height)
    return [(0, y, tick, y), (width - tick, y, width, y), (x, 0, x, tick), (x, height - tick, x, height)]
