"""The data on the page: data sets, crops, and which classes are annotated how far. No voxel is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from connectomics.cellmap.catalog import Catalog, Crop
from connectomics.errors import ConnectomicsError
from connectomics.report import charts, page
from connectomics.report.training import read_metrics, timing_of

_MOST_ROWS = 60
_MOST_NAMES = 24


@dataclass
class _ClassState:
    """Sums over a class's arrays: how many there are, and voxels by state where the files say."""

    arrays: int = 0
    voxels: int = 0
    absent: int = 0
    unknown: int = 0
    said: int = 0


def section(data_root: Path | str | None, run: Path | None, max_arrays: int) -> page.Section:
    """What was annotated (data sets and classes of a data root), and what the network saw of it (of a run)."""
    title = "Data"
    try:
        parts = [_annotated(data_root, max_arrays)]
    except ConnectomicsError as error:
        parts = [page.note(str(error))]
    if run is not None:
        parts.append(_seen(run))
    return page.Section("data", title, "".join(parts))


def _seen(run: Path) -> str:
    """Crops of training and validation, and how often the training patches held each class."""
    parts = ["<h3>What the network saw</h3>", _split(run)]
    metrics = run / "metrics.csv"
    columns = read_metrics(metrics) if metrics.is_file() else {}
    names = [n.split("/")[1] for n in columns if n.startswith("data/") and n.endswith("/patches") and n.count("/") == 2]
    if not names:
        return "".join([*parts, page.note("The run did not count what it was shown.")])
    timing = timing_of(run) or {}
    patches = timing.get("samples")
    rows = []
    for name in names:
        sums = {what: sum(v for _, _, v in columns.get(f"data/{name}/{what}", ())) for what in _COUNTED}
        share = sums["present"] / sums["known"] if sums["known"] else None
        rows.append(
            [
                f"<th scope=row>{page.text(name)}</th>",
                f'<td class="wide">{charts.bar(share)}</td>',
                f'<td class="num">{"–" if share is None else page.percent(share)}</td>',
                f'<td class="num{"" if sums["patches"] else " bad"}">{page.count(sums["patches"])}</td>',
                f'<td class="num">{page.count(sums["known"])}</td>',
                f'<td class="num">{page.count(sums["present"])}</td>',
            ]
        )
    heads = ["class", "", *(f"<th scope=col class=num>{h}</th>" for h in _SEEN_HEADS)]
    of = f" of {page.count(patches)}" if isinstance(patches, int) else ""
    about = page.hint(
        f"Over all training patches{of} as the network got them, augmented; a patch counts as often as it was drawn. "
        "Known: voxels that the loss counts; present: those of them that have the class."
    )
    return "".join([*parts, about, page.table(heads, rows, kind="bars")])


_COUNTED = ("patches", "known", "present")
_SEEN_HEADS = ("present where known", "patches with it", "voxels known", "voxels present")


def _split(run: Path) -> str:
    path = run / "split.yaml"
    if not path.is_file():
        return ""
    try:
        split = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        return page.note(f"{path} cannot be read: {' '.join(str(error).split())}")
    parts = {k: v for k, v in split.items() if isinstance(v, list)} if isinstance(split, dict) else {}
    names = {"train": "crops for training", "val": "crops for validation", "test": "crops kept apart"}
    facts = {names.get(str(k), str(k)): f"{len(v)}: {_names(v)}" for k, v in parts.items()}
    return page.definitions(facts) if facts else ""


def _names(values: Sequence[Any]) -> str:
    shown = ", ".join(map(str, values[:_MOST_NAMES]))
    return shown + (f" and {len(values) - _MOST_NAMES} more" if len(values) > _MOST_NAMES else "") or "none"


def _annotated(data_root: Path | str | None, max_arrays: int) -> str:
    if data_root is None:
        return page.note("No data summary: no data root was given.")
    catalog = Catalog.open(str(data_root))
    crops = [catalog.crop(d, name) for d in catalog.datasets for name in catalog.crop_names(d)]
    with_labels = [c for c in crops if c.labels]
    arrays = sum(len(c.labels) for c in with_labels)
    lines = [
        page.hint(f"{len(catalog.datasets)} data sets, {len(with_labels)} annotated crops, {arrays} label arrays.")
    ]
    if not with_labels:
        return "".join(lines) + page.note("Nothing in the data root is annotated.")
    classes, problems = _states(with_labels, max_arrays)
    if arrays > max_arrays:
        lines.append(page.note(f"Voxel counts are over the first {max_arrays} label arrays."))
    lines += [page.note(p) for p in problems[:5]]
    if len(problems) > 5:
        lines.append(page.note(f"{len(problems) - 5} more label arrays could not be read."))
    title = "<h3>What was annotated</h3>"
    return title + "".join(lines) + _dataset_table(catalog, with_labels) + _class_table(classes)


def _dataset_table(catalog: Catalog, crops: Sequence[Crop]) -> str:
    rows = []
    for dataset in catalog.datasets:
        mine = [c for c in crops if c.dataset == dataset]
        rows.append([page.text(dataset), page.count(len(mine)), _raw_size(mine), _crop_sizes(mine)])
    heads = ["data set", "crops", "raw voxels (nm)", "label voxels (nm), finest of each crop"]
    shown = rows[:_MOST_ROWS]
    more = page.note(f"{len(rows) - _MOST_ROWS} more data sets.") if len(rows) > _MOST_ROWS else ""
    return page.table(heads, shown) + more


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
