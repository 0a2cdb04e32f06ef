"""Numbers over all crops that need voxels of truth and prediction together: confusion and calibration."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

from connectomics.errors import ConnectomicsError
from connectomics.pages import page
from connectomics.pages.report import calibration, confusion
from connectomics.pages.report.calibration import Reliability
from connectomics.pages.report.confusion import Confusion
from connectomics.pages.report.library import Library
from connectomics.pages.report.sources import ReportOptions
from connectomics.pages.report.volumes import Item

_MOST_LINES = 5
T = TypeVar("T")


def crops_of(library: Library) -> int:
    """Return the number of crops that `sections` reads, one step each."""
    try:
        return len({(wanted.dataset, wanted.crop) for wanted in library.wanted()})
    except ConnectomicsError:
        return 0


def sections(library: Library, options: ReportOptions, step: Callable[[str], None]) -> list[page.Section]:
    """Return both sections; crops and classes that cannot be read are left out and listed."""
    problems: list[str] = []
    crops = _opened(library, problems)
    classes = sorted({i.class_name for items in crops.values() for i in items if i.truth and i.prediction})
    table, reliabilities = Confusion.none(classes), {name: Reliability() for name in classes}
    confusion_shares: list[float] = []
    calibration_shares: list[float] = []
    for (_, crop), items in crops.items():
        part = Confusion.none(classes)  # counted separately: a crop that fails half-way adds nothing
        share = _try(f"{crop}: ", partial(part.add_crop, items, options.max_voxels), problems) if items else None
        if share is not None:
            table += part
            confusion_shares.append(share)
        for item in items:
            if item.truth is None or item.probability is None:
                continue
            counted = Reliability()
            share = _try(f"{crop}/{item.class_name}: ", partial(counted.add_item, item, options.max_voxels), problems)
            if share is not None:
                reliabilities[item.class_name] = reliabilities.get(item.class_name, Reliability()) + counted
                calibration_shares.append(share)
        step(f"voxels of {crop}")
    lines = [f"Left out: {p}" for p in dict.fromkeys(problems)]
    if len(lines) > _MOST_LINES:
        lines = [*lines[:_MOST_LINES], f"{len(lines) - _MOST_LINES} more were left out."]
    return [
        confusion.section(table, lines, _mean(confusion_shares)),
        calibration.section(reliabilities, _mean(calibration_shares)),
    ]


def _opened(library: Library, problems: list[str]) -> dict[tuple[str, str], list[Item]]:
    """Return the items of every crop that can be opened."""
    try:
        wanted = library.wanted()
    except ConnectomicsError:  # the section on crops reports it
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
