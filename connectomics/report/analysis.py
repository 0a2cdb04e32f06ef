"""Numbers over all crops that need voxels of truth and prediction together: confusion and calibration."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

from connectomics.errors import ConnectomicsError
from connectomics.report import calibration, confusion, page
from connectomics.report.calibration import Reliability
from connectomics.report.confusion import Confusion
from connectomics.report.library import Library
from connectomics.report.sources import ReportOptions
from connectomics.report.steps import Steps
from connectomics.report.volumes import Item

_MOST_LINES = 5
T = TypeVar("T")


def crops_of(library: Library) -> int:
    """How many crops `sections` looks at, a step each."""
    try:
        return len({(one.dataset, one.crop) for one in library.wanted()})
    except ConnectomicsError:
        return 0


def sections(library: Library, options: ReportOptions, steps: Steps | None = None) -> list[page.Section]:
    """Both sections. What cannot be read is left out of the numbers and said; the crops' section says it in full."""
    steps = steps or Steps()
    problems: list[str] = []
    crops = _opened(library, problems)
    classes = sorted({i.class_name for items in crops.values() for i in items if i.truth and i.prediction})
    table, reliabilities = Confusion.none(classes), {name: Reliability() for name in classes}
    shares: tuple[list[float], list[float]] = ([], [])
    for (_, crop), items in crops.items():
        part = Confusion.none(classes)  # counted apart: what fails half-way leaves nothing behind
        share = _try(f"{crop}: ", partial(part.add_crop, items, options.max_voxels), problems) if items else None
        if share is not None:
            table += part
            shares[0].append(share)
        for item in items:
            if item.truth is None or item.probability is None:
                continue
            counted = Reliability()
            share = _try(f"{crop}/{item.class_name}: ", partial(counted.add_item, item, options.max_voxels), problems)
            if share is not None:
                reliabilities[item.class_name] = reliabilities.get(item.class_name, Reliability()) + counted
                shares[1].append(share)
        steps.step(f"voxels of {crop}")
    lines = [f"Left out: {p}" for p in dict.fromkeys(problems)]
    if len(lines) > _MOST_LINES:
        lines = [*lines[:_MOST_LINES], f"{len(lines) - _MOST_LINES} more were left out."]
    return [
        confusion.section(table, lines, _mean(shares[0])),
        calibration.section(reliabilities, [], _mean(shares[1])),
    ]


def _opened(library: Library, problems: list[str]) -> dict[tuple[str, str], list[Item]]:
    """The items of every crop, as far as they can be opened; where nothing is wanted at all, the crops' section says
    why."""
    try:
        wanted = library.wanted()
    except ConnectomicsError:
        return {}
    crops: dict[tuple[str, str], list[Item]] = {}
    for one in wanted:
        found = crops.setdefault((one.dataset, one.crop), [])
        item = _try(f"{one.crop}/{one.class_name}: ", partial(library.item, one), problems)
        if item is not None:
            found.append(item)
    return crops


def _try(name: str, make: Callable[[], T], problems: list[str]) -> T | None:
    try:
        return make()
    except ConnectomicsError as error:
        problems.append(f"{name}{error}")
        return None


def _mean(shares: list[float]) -> float:
    return sum(shares) / len(shares) if shares else 1.0
