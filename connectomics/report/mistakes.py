"""Tables of objects that did not come out well: missed, invented, merged, split; a click shows their slices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from connectomics.report import page
from connectomics.report.objects import KINDS, POOR, SHARE, Mistake
from connectomics.report.volumes import Findings, Item

_SYMBOLS = {"missed": "○", "invented": "✕", "merged": "⋃", "split": "∥", "poor": "≈"}
_MOST_IDS = 4


@dataclass(frozen=True)
class Listed:
    """A mistake and whose it is: the class of item ``number`` of its crop."""

    number: int
    class_name: str
    mistake: Mistake


def listed(drawn: Sequence[tuple[Item, Findings]], most: int) -> list[Listed]:
    """The mistakes of a crop's classes, at most ``most``: the first of every class, then the second, and so on."""
    by_class = [
        [Listed(k, item.class_name, m) for m in found.objects.mistakes(item.grid)]
        for k, (item, found) in enumerate(drawn)
        if _compared(item, found) and found.objects is not None
    ]
    rounds = max(map(len, by_class), default=0)
    return [rows[k] for k in range(rounds) for rows in by_class if k < len(rows)][:most]


def tables(
    drawn: Sequence[tuple[Item, Findings]], shown: Sequence[Listed], clickable: int, anchors: Sequence[str]
) -> str:
    """How many objects of each class came out how, and the mistakes one by one.

    Args:
        shown: what `listed` gave. clickable: items with a lower number are in the crop's viewer, where a click shows
            them; the others link to their pictures, whose ids are ``anchors``, one an item.

    Empty where no class is told apart by objects.
    """
    compared = [(item, found) for item, found in drawn if _compared(item, found)]
    if not compared:
        return ""
    rows = [_counts(item, found) for item, found in compared]
    partly = [item.class_name for item, found in compared if found.share < 1 or not _whole(found)]
    heads = ["class", *(f"<th scope=col class=num>{h}</th>" for h in ("true", "predicted", "matched", *KINDS))]
    body = page.table(heads, rows)
    if partly:
        body += page.note(f"Not the whole of {', '.join(partly)} was looked at; objects in the rest are not counted.")
    if shown:
        body += _list(shown, clickable, anchors)
    body += page.hint(
        f"Missed: no predicted object covers {SHARE:.0%} of it. Split: two or more do. Merged: a predicted object that "
        f"covers {SHARE:.0%} of two or more true ones. Invented: less than {SHARE:.0%} of it lies in true ones. Poor: "
        f"matched, with an intersection over union below {POOR}. Matched: each other's largest overlap. Known voxels "
        "only."
    )
    total = sum(n for item, found in compared for n in _kinds(item, found).values())
    summary = f"Objects: <b>{page.count(total)}</b> that did not come out well"
    return page.details(summary, body, is_open=bool(shown), kind="objects")


def _list(shown: Sequence[Listed], clickable: int, anchors: Sequence[str]) -> str:
    heads = ["", "class", "true", "predicted", "<th scope=col class=num>voxels</th>"]
    heads += ["<th scope=col class=num>IoU</th>", "<th scope=col class=num>z, y, x (nm)</th>"]
    rows = []
    for one in sorted(shown, key=lambda x: (KINDS.index(x.mistake.kind), -x.mistake.voxels)):
        m = one.mistake
        name = f"{_SYMBOLS[m.kind]} {m.kind}"
        at = ",".join(page.number(v) for v in m.place)
        if one.number < clickable:
            first = f'<button type="button" class="go" data-class="{one.number}" data-at="{at}">{name}</button>'
        else:
            first = f'<a href="#{anchors[one.number]}">{name}</a>'
        rows.append(
            [
                first,
                page.text(one.class_name),
                _ids(m.truth),
                _ids(m.found),
                f'<td class="num">{page.count(m.voxels)}</td>',
                f'<td class="num">{page.score(m.iou, 2)}</td>',
                f'<td class="num">{", ".join(f"{v:.0f}" for v in m.place)}</td>',
            ]
        )
    return page.table(heads, rows, kind="list")


def _ids(ids: Sequence[int]) -> str:
    more = f" and {len(ids) - _MOST_IDS} more" if len(ids) > _MOST_IDS else ""
    return (", ".join(map(str, ids[:_MOST_IDS])) or "–") + more


def _counts(item: Item, found: Findings) -> list[str]:
    assert found.objects is not None
    kinds = _kinds(item, found)
    numbers = [len(found.objects.truth), len(found.objects.found), len(found.matched), *(kinds[k] for k in KINDS)]
    return [
        f"<th scope=row>{page.text(item.class_name)}</th>",
        *(f'<td class="num">{page.count(n)}</td>' for n in numbers),
    ]


def _kinds(item: Item, found: Findings) -> Counter[str]:
    assert found.objects is not None
    return Counter(m.kind for m in found.objects.mistakes(item.grid))


def _whole(found: Findings) -> bool:
    return found.objects is None or found.objects.whole


def _compared(item: Item, found: Findings) -> bool:
    """Whether objects of truth and prediction were set against each other."""
    parts = (item.truth, item.prediction)
    return found.objects is not None and all(part is not None and part.instance for part in parts)
