"""The data on the page: data sets, crops, and which classes are annotated how far. No voxel is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from connectomics.cellmap.catalog import Catalog, Crop
from connectomics.errors import ConnectomicsError
from connectomics.report import charts, page

_MOST_ROWS = 60


@dataclass
class _ClassState:
    """Sums over a class's arrays: how many there are, and voxels by state where the files say."""

    arrays: int = 0
    voxels: int = 0
    absent: int = 0
    unknown: int = 0
    said: int = 0


def section(data_root: Path | str | None, max_arrays: int) -> page.Section:
    """Tables of data sets and classes of a data root."""
    title = "Data"
    if data_root is None:
        return page.Section("data", title, page.note("No data summary: no data root was given."))
    catalog = Catalog.open(str(data_root))
    crops = [catalog.crop(d, name) for d in catalog.datasets for name in catalog.crop_names(d)]
    with_labels = [c for c in crops if c.labels]
    arrays = sum(len(c.labels) for c in with_labels)
    lines = [
        page.hint(f"{len(catalog.datasets)} data sets, {len(with_labels)} annotated crops, {arrays} label arrays.")
    ]
    if not with_labels:
        return page.Section("data", title, "".join(lines) + page.note("Nothing in the data root is annotated."))
    classes, problems = _states(with_labels, max_arrays)
    if arrays > max_arrays:
        lines.append(page.note(f"Voxel counts are over the first {max_arrays} label arrays."))
    lines += [page.note(p) for p in problems[:5]]
    if len(problems) > 5:
        lines.append(page.note(f"{len(problems) - 5} more label arrays could not be read."))
    return page.Section("data", title, "".join(lines) + _dataset_table(catalog, with_labels) + _class_table(classes))


def _dataset_table(catalog: Catalog, crops: Sequence[Crop]) -> str:
    rows = []
    for dataset in catalog.datasets:
        mine = [c for c in crops if c.dataset == dataset]
        rows.append([page.text(dataset), page.count(len(mine)), _raw_size(mine), _crop_sizes(mine)])
    heads = ["data set", "crops", "raw voxels (nm)", "label voxels (nm), finest of each crop"]
    shown = rows[:_MOST_ROWS]
    more = page.note(f"{len(rows) - _MOST_ROWS} more data sets.") if len(rows) > _MOST_ROWS else ""
    return "<h3>Data sets</h3>" + page.table(heads, shown) + more


def _raw_size(crops: Sequence[Crop]) -> str:
    if not crops:
        return "–"
    try:
        return page.nm(crops[0].raw_source.grid.voxel_size)
    except ConnectomicsError as error:
        return f'<span class="none">{page.text(error)}</span>'


def _crop_sizes(crops: Sequence[Crop]) -> str:
    sizes: Counter[str] = Counter()
    for crop in crops:
        try:
            sizes[page.nm(crop.grid.voxel_size)] += 1
        except ConnectomicsError:
            sizes["cannot be read"] += 1
    return "; ".join(f"{n} at {size}" for size, n in sizes.most_common(4)) or "–"


def _states(crops: Sequence[Crop], max_arrays: int) -> tuple[dict[str, _ClassState], list[str]]:
    states: dict[str, _ClassState] = {}
    problems: list[str] = []
    read = 0
    for crop in crops:
        for name, label in crop.labels.items():
            state = states.setdefault(name, _ClassState())
            state.arrays += 1
            read += 1
            if read > max_arrays:
                continue
            try:
                annotation, n = label.annotation, label.grid.size
            except ConnectomicsError as error:
                problems.append(str(error))
                continue
            # what the files say in complement_counts; without "absent" there nothing can be said
            if "absent" in annotation.counts:
                state.said += 1
                state.voxels += n
                state.absent += annotation.counts["absent"]
                state.unknown += 0 if annotation.fully_known else annotation.counts.get("unknown", 0)
    return states, problems


def _class_table(states: dict[str, _ClassState]) -> str:
    rows = []
    for name, state in sorted(states.items(), key=lambda item: (-item[1].arrays, item[0])):
        cells = ['<td class="wide"></td>', *['<td class="num">–</td>'] * 3]
        if state.voxels:
            present = max(0, state.voxels - state.absent - state.unknown)
            shares = [part / state.voxels for part in (present, state.absent, state.unknown)]
            cells = [f'<td class="wide">{charts.bar(shares[0])}</td>']
            cells += [f'<td class="num">{page.percent(s)}</td>' for s in shares]
        rows.append([f"<th scope=row>{page.text(name)}</th>", f'<td class="num">{state.arrays}</td>', *cells])
    heads = ["class", "<th scope=col class=num>crops</th>", ""]
    heads += [f"<th scope=col class=num>{h}</th>" for h in ("present", "absent", "unknown")]
    said = page.hint("Crops that have an array of the class; shares of their voxels, as their attributes count them.")
    return page.details(f"Classes ({len(rows)})", said + page.table(heads, rows, kind="bars"), is_open=len(rows) <= 12)
