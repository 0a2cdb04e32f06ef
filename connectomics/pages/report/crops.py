"""Crop by crop, worst first: which pictures to show, and showing them within a limit.

Slices are SVG: raw once, transparent layers over it, a scale bar. The coordinates of a picture are nm, so that oblong
voxels keep their proportions and a scale bar is a rectangle of its own length.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from connectomics.errors import ConnectomicsError
from connectomics.geometry import other_axes
from connectomics.pages import colors, figures, page
from connectomics.pages.report import objects, scores, slice_viewer
from connectomics.pages.report.library import Library, Wanted
from connectomics.pages.report.scores import Scores
from connectomics.pages.report.sources import ReportOptions
from connectomics.pages.report.volumes import Findings, Item, Plane, examine, read_plane

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
    rows, columns = other_axes(plane.axis)
    height, width = plane.extent
    y = (position[rows] + 0.5) * item.grid.voxel_size[rows]
    x = (position[columns] + 0.5) * item.grid.voxel_size[columns]
    tick = 0.04 * min(width, height)
    return [(0, y, tick, y), (width - tick, y, width, y), (x, 0, x, tick), (x, height - tick, x, height)]


_MOST_EXTREMES = 4  # of the worst and of the best

CropKey = tuple[str, str]  # data set and crop


# -- choosing ----------------------------------------------------------------------------------------------------------
def ranked(wanted: Sequence[Wanted], table: Scores | None) -> dict[CropKey, list[Wanted]]:
    """Return the classes by crop, the worst crop and its worst class first; without scores, by name."""
    groups: dict[CropKey, list[Wanted]] = {}
    for one in sorted(wanted, key=lambda w: (w.dataset, w.crop, w.class_name)):
        groups.setdefault((one.dataset, one.crop), []).append(one)
    if table is None:
        return groups
    by_crop = table.by_crop()
    crops = {crop: k for k, crop in enumerate(by_crop)}
    places = {(r.crop, r.class_name): k for results in by_crop.values() for k, r in enumerate(results)}
    last = len(places) + len(crops)
    order = sorted(groups, key=lambda key: crops.get(key[1], last))
    return {key: sorted(groups[key], key=lambda w: places.get((w.crop, w.class_name), last)) for key in order}


def extremes(wanted: Iterable[Wanted], table: Scores | None) -> tuple[list[Wanted], list[Wanted]]:
    """Return at most four each of the scored classes: the worst, worst first, and the best, best first, without
    overlap."""
    if table is None:
        return [], []
    values = {(r.crop, r.class_name): scores.shown_value(r) for r in table.results}
    found = [(v, w.crop, w.class_name, w) for w in wanted if (v := values.get((w.crop, w.class_name))) is not None]
    found.sort(key=lambda entry: entry[:3])
    n = min(_MOST_EXTREMES, len(found) // 2)
    return [entry[3] for entry in found[:n]], [entry[3] for entry in reversed(found[len(found) - n :])]


def choose(crops: Mapping[CropKey, Sequence[Wanted]], most: int, best: Sequence[Wanted] = ()) -> set[Wanted]:
    """Return at most ``most`` classes: the worst of every crop, then the second worst of every crop, and so on.

    A quarter of them is reserved for the ``best``.
    """
    order = [one for row in itertools.zip_longest(*crops.values()) for one in row if one is not None]
    reserved = best[: max(0, most) // 4]
    return set(list(dict.fromkeys([*reserved, *order]))[: max(0, most)])


# -- the section -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Drawn:
    """A class of a crop on the page: its ID and HTML; ``item`` and ``found`` are None if it has no pictures."""

    wanted: Wanted
    anchor: str
    body: Markup
    item: Item | None = None
    found: Findings | None = None
    thumbnail: str = ""


def section(library: Library, table: Scores | None, options: ReportOptions, step: Callable[[str], None]) -> Markup:
    """Return all crops with their pictures; ``step`` is called after each class with pictures."""
    try:
        crops = ranked(library.wanted(), table)
        others = library.other_sources()
    except ConnectomicsError as error:
        return page.note(f"No pictures: {error}")
    if not crops:
        return page.note("No pictures: neither truth nor predictions were given.")
    everything = [one for wanted in crops.values() for one in wanted]
    worst, best = extremes(everything, table)
    chosen = choose(crops, options.max_pictures, best)
    names: dict[CropKey, str] = {}  # IDs on the page; the data set is part of it if two crops share a name
    for dataset, crop in crops:
        plain = scores.crop_anchor(crop)
        names[dataset, crop] = f"{plain}-{scores.plain_id(dataset)}" if plain in names.values() else plain
    ids = itertools.count()
    parts: list[Markup] = []
    drawn_by: dict[Wanted, Drawn] = {}
    spent = 0
    for number, (key, wanted) in enumerate(crops.items()):
        drawn = []
        for one in wanted:
            anchor = f"{names[key]}-{scores.plain_id(one.class_name)}"
            room = spent < options.max_bytes
            drawn.append(draw(library, one, anchor, options, ids if one in chosen and room else None, room))
            spent += len(drawn[-1].body)
            drawn_by[one] = drawn[-1]
            if one in chosen:
                step(f"{one.crop}/{one.class_name}")
        is_best = table is not None and number == len(crops) - 1 and options.viewers > 0
        with_viewer = (number < options.viewers or is_best) and spent < options.max_bytes
        parts.append(_crop(names[key], drawn, table, options, with_viewer, unfolded=3 if number == 0 else number < 3))
        spent += len(parts[-1]) - sum(len(d.body) for d in drawn)
    problems = list(library.problems)
    if library.catalog is None and not library.problems:
        problems.append("No raw: no data root was given, so labels are shown on flat gray.")
    problems += others
    if len(chosen) < len(everything):
        problems.append(
            f"Pictures of {len(chosen)} of {len(everything)} crops and classes, the worst of each crop first."
        )
    rows = [("Worst", [drawn_by[w] for w in worst]), ("Best", [drawn_by[w] for w in best])]
    with_probability = library.sources.probabilities is not None
    return page.render(
        "report/crops", problems=problems, with_probability=with_probability, crops=parts, table=table,
        extremes=[(name, [d for d in drawn if d.thumbnail]) for name, drawn in rows], shown_value=scores.shown_value,
    )  # fmt: skip


def draw(
    library: Library, wanted: Wanted, anchor: str, options: ReportOptions, ids: Iterator[int] | None, room: bool = True
) -> Drawn:
    """Return the pictures of one class of a crop; without ``ids`` a line that says which limit is reached."""
    if ids is None:
        most = f"{options.max_pictures} crops and classes" if room else f"{page.size(options.max_bytes)} of pictures"
        return Drawn(wanted, anchor, page.note(f"No pictures: the page is limited to {most}."))
    try:
        item = library.item(wanted)
        found = examine(item, options.max_voxels)
        planes = [
            draw_plane(item, read_plane(item, axis, found.position[axis], options.picture_size), found, ids)
            for axis in range(3)
        ]
    except ConnectomicsError as error:
        return Drawn(wanted, anchor, page.note(f"No pictures: {error}"))
    place = item.grid.to_world(found.position).tolist()
    body = page.render("report/crop_class", item=item, found=found, place=place, planes=planes)
    return Drawn(wanted, anchor, body, item, found, planes[0].thumbnail)


def _crop(
    anchor: str, drawn: Sequence[Drawn], table: Scores | None, options: ReportOptions, with_viewer: bool, unfolded: int
) -> Markup:
    """Return a crop: its slice viewer, objects and scores, then every class, the first ``unfolded`` of them open."""
    dataset, crop = drawn[0].wanted.dataset, drawn[0].wanted.crop
    shown = [(d.item, d.found, d.anchor) for d in drawn if d.item is not None and d.found is not None]
    pairs = [(item, found) for item, found, _ in shown]
    wrong = objects.listed(pairs, options.max_objects)
    viewer, clickable = Markup(""), 0
    if with_viewer and pairs:
        try:
            # opened at the worst predicted class and its slices
            first = next((k for k, (item, _) in enumerate(pairs) if item.prediction is not None), 0)
            z, y, x = (float(v) for v in pairs[first][0].grid.to_world(pairs[first][1].position))
            places = [one.mistake.place for one in wrong]
            viewer = slice_viewer.viewer([i for i, _ in pairs], first, (z, y, x), places, options.viewer_slices)
            clickable = min(len(pairs), slice_viewer.MOST_CLASSES) if viewer else 0
        except ConnectomicsError as error:
            viewer = page.note(f"No slice viewer: {error}")
    results = {r.class_name: r for r in table.by_crop().get(crop, ())} if table is not None else {}
    return page.render(
        "report/crop", anchor=anchor, crop=crop, dataset=dataset, drawn=drawn, results=results, viewer=viewer,
        with_table=table is not None, with_overview=table is not None and with_viewer, unfolded=int(unfolded),
        objects=objects.tables(pairs, wrong, clickable, [name for *_, name in shown]),
        mean=scores.mean_score(list(results.values())) if results else None,
        shown_value=scores.shown_value, crop_class=scores.crop_class, DROPPED=scores.DROPPED,
    )  # fmt: skip
