"""The worst and the best classes of crops side by side, each with its score and a link to its pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from connectomics.report import page, scores
from connectomics.report.library import Wanted
from connectomics.report.scores import Scores

_MOST = 4


def extremes(wanted: Sequence[Wanted], table: Scores | None) -> tuple[list[Wanted], list[Wanted]]:
    """At most four each: the worst, worst first, and the best, best first; none is in both. Only what has a score."""
    if table is None:
        return [], []
    values = {(r.crop, r.class_name): scores.shown_value(r) for r in table.results}
    found = []
    for one in wanted:
        value = values.get((one.crop, one.class_name))
        if value is not None:
            found.append((value, one.crop, one.class_name, one))
    found.sort(key=lambda entry: entry[:3])
    n = min(_MOST, len(found) // 2)
    return [entry[3] for entry in found[:n]], [entry[3] for entry in reversed(found[len(found) - n :])]


def cards(
    worst: Sequence[Wanted],
    best: Sequence[Wanted],
    thumbnails: Mapping[Wanted, str],
    table: Scores,
    link: Callable[[Wanted], str],
) -> str:
    """Both rows; what has no picture is left out. ``thumbnails``: HTML; ``link``: id of a class's part of the page."""
    parts = []
    for title, chosen in (("Worst", worst), ("Best", best)):
        shown = [_card(one, thumbnails[one], table, link(one)) for one in chosen if one in thumbnails]
        if shown:
            parts.append(f'<h3>{title}</h3><div class="gallery">{"".join(shown)}</div>')
    return "".join(parts)


def _card(wanted: Wanted, thumbnail: str, table: Scores, anchor: str) -> str:
    result = table.of(wanted.crop, wanted.class_name)
    value = None if result is None else scores.shown_value(result)
    chip = f'<span class="chip">{page.score(value)}</span>'
    name = f"{page.text(wanted.class_name)} <small>{page.text(wanted.crop)}</small>"
    return (
        f'<figure class="thumb"><div class="pic">{thumbnail}</div>'
        f'<figcaption><a href="#{anchor}">{name}</a> {chip}</figcaption></figure>'
    )
