"""Numbers over all crops that need voxels of truth and prediction together: confusion and calibration."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from connectomics.errors import ConnectomicsError
from connectomics.pages import page
from connectomics.pages.report import calibration, confusion
from connectomics.pages.report.calibration import Reliability
from connectomics.pages.report.confusion import Confusion
from connectomics.pages.report.library import Library
from connectomics.pages.report.sources import ReportOptions
from connectomics.pages.report.volumes import Item

_MOST_LINES = 5


def sections(library: Library, options: ReportOptions, step: Callable[[str], None]) -> list[page.Section]:
    """Return both sections; crops and classes that cannot be read are left out and listed."""
    problems: list[str] = []

    @contextmanager
    def noted(what: str) -> Iterator[None]:
        try:
            yield
        except ConnectomicsError as error:
            problems.append(f"Left out: {what}: {error}")

    crops: dict[tuple[str, str], list[Item]] = {}
    with suppress(ConnectomicsError):  # the section on crops reports it
        for one in library.wanted():
            found = crops.setdefault((one.dataset, one.crop), [])
            with noted(f"{one.crop}/{one.class_name}"):
                found.append(library.item(one))
    classes = sorted({i.class_name for items in crops.values() for i in items if i.truth and i.prediction})
    table, reliabilities = Confusion.none(classes), {name: Reliability() for name in classes}
    shares: dict[str, list[float]] = {"confusion": [], "calibration": []}
    for (_, crop), items in crops.items():
        with noted(crop):
            part = Confusion.none(classes)  # counted separately: a crop that fails half-way adds nothing
            if items:
                shares["confusion"].append(part.add_crop(items, options.max_voxels))
                table += part
        for item in items:
            if item.truth is not None and item.probability is not None:
                with noted(f"{crop}/{item.class_name}"):
                    counted = Reliability()
                    shares["calibration"].append(counted.add_item(item, options.max_voxels))
                    reliabilities[item.class_name] = reliabilities.get(item.class_name, Reliability()) + counted
        step(f"voxels of {crop}")
    lines = list(dict.fromkeys(problems))
    if len(lines) > _MOST_LINES:
        lines = [*lines[:_MOST_LINES], f"{len(lines) - _MOST_LINES} more were left out."]
    means = {name: sum(found) / len(found) if found else 1.0 for name, found in shares.items()}
    return [
        page.Section("confusion", "Confusion between classes", confusion.section(table, lines, means["confusion"])),
        page.Section("calibration", "Calibration", calibration.section(reliabilities, means["calibration"])),
    ]
