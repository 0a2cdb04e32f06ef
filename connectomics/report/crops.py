"""Crop by crop, worst first: which pictures there are to show, and showing them within a bound."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from connectomics.errors import ConnectomicsError
from connectomics.report import charts, gallery, mistakes, page, pictures, scores, viewer
from connectomics.report.library import Library, Wanted
from connectomics.report.scores import Scores
from connectomics.report.sources import ReportOptions
from connectomics.report.steps import Steps
from connectomics.report.volumes import Findings, Item, examine, read_plane

Key = tuple[str, str]  # data set and crop


# -- the section -------------------------------------------------------------------------------------------------------
def section(library: Library, table: Scores | None, options: ReportOptions, steps: Steps | None = None) -> page.Section:
    """All crops with their pictures, a step for each class that gets some. What cannot be shown is said, crop by
    crop."""
    steps = steps or Steps()
    title = "Crops, worst first" if table is not None else "Crops"
    try:
        crops = ranked(library.wanted(), table)
    except ConnectomicsError as error:
        return page.Section("crops", title, page.note(f"No pictures: {error}"))
    if not crops:
        return page.Section("crops", title, page.note("No pictures: neither truth nor predictions were given."))
    worst, best = gallery.extremes([one for wanted in crops.values() for one in wanted], table)
    chosen = choose(crops, options.max_pictures, best)
    n_all, n_drawn = sum(map(len, crops.values())), len(chosen)
    steps.expect(n_drawn)
    parts, spent, ids = [], 0, pictures.Ids.fresh()
    thumbnails: dict[Wanted, str] = {}
    names = anchors(crops)
    best_crop = next(reversed(crops)) if table is not None else None
    for number, (key, wanted) in enumerate(crops.items()):
        drawn = []
        for one in wanted:
            room = spent < options.max_bytes
            drawn.append(draw(library, one, options, ids if one in chosen and room else None, room))
            spent += len(drawn[-1].body)
            if drawn[-1].thumbnail:
                thumbnails[one] = drawn[-1].thumbnail
            if one in chosen:
                steps.step(f"{one.crop}/{one.class_name}")
        unfolded = 3 if number == 0 else 1 if number < 3 else 0
        last = key == best_crop and options.viewers > 0
        with_viewer = (number < options.viewers or last) and spent < options.max_bytes
        part = _crop(names[key], drawn, table, options, with_viewer, unfolded)
        spent += len(part) - sum(len(d.body) for d in drawn)
        parts.append(part)
    lines = [page.note(p) for p in library.problems]
    if library.catalog is None and not library.problems:
        lines.append(page.note("No raw: no data root was given, so labels are shown on flat grey."))
    if n_drawn < n_all:
        lines.append(page.note(f"Pictures of {n_drawn} of {n_all} crops and classes, the worst of each crop first."))
    if table is not None:
        lines.append(
            gallery.cards(worst, best, thumbnails, table, lambda w: _class_anchor(names[w.dataset, w.crop], w))
        )
    tools = (
        '<div class="tools"><label>overlay <input type="range" id="opacity" min="0" max="100" value="85" '
        'aria-label="overlay opacity"></label><button type="button" data-fold="open">open all</button>'
        '<button type="button" data-fold="close">close all</button></div>'
    )
    legend = pictures.legend(library.sources.probabilities is not None)
    return page.Section("crops", title, "".join(lines) + legend + tools + "".join(parts))


def ranked(wanted: Sequence[Wanted], table: Scores | None) -> dict[Key, list[Wanted]]:
    """Grouped by crop; worst crop first and within it the worst class, as far as there are scores, then by name."""
    groups: dict[Key, list[Wanted]] = {}
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


def anchors(crops: Iterable[Key]) -> dict[Key, str]:
    """The id of each crop's part of the page: by its name, and by its data set too where another has the name."""
    found: dict[Key, str] = {}
    for dataset, crop in crops:
        plain = scores.crop_anchor(crop)
        taken = plain in found.values()
        found[dataset, crop] = f"{plain}-{scores.plain_id(dataset)}" if taken else plain
    return found


def choose(crops: Mapping[Key, Sequence[Wanted]], most: int, best: Sequence[Wanted] = ()) -> set[Wanted]:
    """At most ``most``: the worst class of every crop, then the second worst of every crop, and so on.

    A quarter of them is kept for the ``best``.
    """
    rounds = max((len(w) for w in crops.values()), default=0)
    order = [wanted[k] for k in range(rounds) for wanted in crops.values() if k < len(wanted)]
    kept = list(best[: max(0, most) // 4])
    return set(list(dict.fromkeys([*kept, *order]))[: max(0, most)])


@dataclass(frozen=True)
class Drawn:
    """A class of a crop on the page: its HTML, and what it was read from (None where there are no pictures)."""

    wanted: Wanted
    body: str
    item: Item | None = None
    found: Findings | None = None
    thumbnail: str = ""


def draw(
    library: Library, wanted: Wanted, options: ReportOptions, ids: pictures.Ids | None, room: bool = True
) -> Drawn:
    """The pictures of one class of a crop; without ``ids`` one line instead, which says where there was no ``room``."""
    if ids is None:
        most = f"{options.max_pictures} crops and classes" if room else f"{page.size(options.max_bytes)} of pictures"
        return Drawn(wanted, page.note(f"No pictures: the page is limited to {most}."))
    try:
        item = library.item(wanted)
        found = examine(item, options.max_voxels)
        rows = [
            pictures.plane_row(item, read_plane(item, axis, found.position[axis], options.picture_size), found, ids)
            for axis in range(3)
        ]
    except ConnectomicsError as error:
        return Drawn(wanted, page.note(f"No pictures: {error}"))
    lines = "".join(page.note(p) for p in item.problems)
    body = lines + page.hint(_where(item, found)) + "".join(row.html for row in rows)
    return Drawn(wanted, body, item, found, rows[0].thumbnail)


def _where(item: Item, found: Findings) -> str:
    world = item.grid.to_world(found.position)
    place = ", ".join(page.number(float(v)) for v in world)
    errors = bool(found.fp + found.fn) and item.truth is not None
    what = "most truth and most errors" if errors else "most labels"
    partly = f" among the {100 * found.share:.0f} % looked at" if found.share < 1 else ""
    unknown = f" {page.count(found.unknown)} voxels are not annotated." if found.unknown else ""
    return (
        f"Slices with {what}{partly}, through z, y, x = {place} nm. Voxels {page.nm(item.grid.voxel_size)} nm, "
        f"crop {page.nm(item.grid.box.extent)} nm (z, y, x).{unknown}"
    )


def _class_summary(wanted: Wanted, table: Scores | None) -> str:
    name = f"<b>{page.text(wanted.class_name)}</b>"
    result = table.of(wanted.crop, wanted.class_name) if table is not None else None
    if result is None:
        return name + (' <span class="none">not scored</span>' if table is not None else "")
    value = scores.shown_value(result)
    return (
        f'{name} <span class="chip">{page.score(value)}</span> <span class="more">{scores.result_text(result)}</span>'
    )


def _crop(
    anchor: str,
    drawn: Sequence[Drawn],
    table: Scores | None,
    options: ReportOptions,
    with_viewer: bool,
    unfolded: int,
) -> str:
    """A crop: its slice viewer, its objects and its classes' scores, then every class, the first ``unfolded`` open."""
    dataset, crop = drawn[0].wanted.dataset, drawn[0].wanted.crop
    results = table.by_crop().get(crop, []) if table is not None else []
    mean = f'<span class="chip">{page.score(scores.mean_score(results))}</span>' if results else ""
    shown = [(d.wanted, d.item, d.found) for d in drawn if d.item is not None and d.found is not None]
    pairs = [(item, found) for _, item, found in shown]
    wrong = mistakes.listed(pairs, options.max_objects)
    top, clickable = "", 0
    if with_viewer and pairs:
        try:
            top = _viewer(pairs, wrong, options.viewer_slices)
            clickable = min(len(pairs), viewer.MOST_CLASSES) if top else 0
        except ConnectomicsError as error:
            top = page.note(f"No slice viewer: {error}")
    links = [_class_anchor(anchor, wanted) for wanted, _, _ in shown]
    objects = mistakes.tables(pairs, wrong, clickable, links)
    bars = _overview(anchor, drawn, table) if with_viewer else ""
    kind = "beside wide-right" if bars and objects else "alone"
    top += f'<div class="{kind}">{bars}{objects}</div>' if bars or objects else ""
    classes = "".join(
        page.details(
            _class_summary(d.wanted, table),
            d.body,
            is_open=k < unfolded and d.item is not None,
            kind="class",
            anchor=_class_anchor(anchor, d.wanted),
        )
        for k, d in enumerate(drawn)
    )
    about = f"<small>{page.text(dataset or 'data set not known')}, {len(drawn)} classes</small>"
    return f'<article class="crop" id="{anchor}"><h3>{page.text(crop)} {mean}{about}</h3>{top}{classes}</article>'


def _class_anchor(anchor: str, wanted: Wanted) -> str:
    return f"{anchor}-{scores.plain_id(wanted.class_name)}"


def _viewer(pairs: Sequence[tuple[Item, Findings]], wrong: Sequence[mistakes.Listed], slices: int) -> str:
    """Of the classes that were drawn; opened at the worst predicted class and where its slices were taken."""
    first = next((k for k, (item, _) in enumerate(pairs) if item.prediction is not None), 0)
    item, found = pairs[first]
    z, y, x = (float(v) for v in item.grid.to_world(found.position))
    places = [one.mistake.place for one in wrong]
    return viewer.viewer([item for item, _ in pairs], first, (z, y, x), places, slices)


def _overview(anchor: str, drawn: Sequence[Drawn], table: Scores | None) -> str:
    """The crop's classes with a bar each, linked to their pictures."""
    if table is None:
        return ""
    rows = []
    for d in drawn:
        result = table.of(d.wanted.crop, d.wanted.class_name)
        value = None if result is None else scores.shown_value(result)
        missing = "*" if result is not None and result.is_missing else ""
        link = f'<a href="#{_class_anchor(anchor, d.wanted)}">{page.text(d.wanted.class_name)}</a>'
        cells = [f"<th scope=row>{link}</th>", f'<td class="wide">{charts.bar(value)}</td>']
        rows.append([*cells, f'<td class="num">{page.score(value)}{missing}</td>'])
    return page.table(["class", "", "<th scope=col class=num>score</th>"], rows, kind="bars")


def datasets_of(wanted: Sequence[Wanted]) -> dict[str, str]:
    """The data set of each crop."""
    return {w.crop: w.dataset for w in wanted if w.dataset}
