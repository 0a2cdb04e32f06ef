"""Crop by crop, worst first: which pictures there are to show, and showing them within a bound."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from connectomics.cellmap.catalog import Catalog
from connectomics.cellmap.crop_table import CropTable
from connectomics.decoding.decode import find_arrays
from connectomics.errors import ConnectomicsError, MetadataError
from connectomics.geometry import VoxelGrid
from connectomics.io import store
from connectomics.io.multiscale import Multiscale, PlainArray
from connectomics.metrics.challenge.zarr_v2 import FolderStore, Store, ZipStore
from connectomics.report import charts, page, pictures, scores, viewer
from connectomics.report.scores import Scores
from connectomics.report.sources import ReportOptions, ReportSources
from connectomics.report.volumes import (
    Findings,
    Item,
    LabelReader,
    PlainLabels,
    annotated_labels,
    examine,
    open_prediction,
    read_plane,
    stored_labels,
    submitted_labels,
)

#: Told after each class of a crop that was drawn: how many are done, of how many, and which.
Progress = Callable[[int, int, str], None]

Key = tuple[str, str]  # data set and crop


@dataclass(frozen=True)
class Wanted:
    """A class of a crop that can be shown; ``grid`` is None where only the prediction knows it."""

    dataset: str
    crop: str
    class_name: str
    grid: VoxelGrid | None


@dataclass
class Library:
    """Opens what is behind the pictures, each raw volume once. `close` it."""

    sources: ReportSources
    catalog: Catalog | None = None
    archive: Store | None = None
    problems: list[str] = field(default_factory=list)
    _raw: dict[str, Multiscale | None] = field(default_factory=dict)

    @classmethod
    def open(cls, sources: ReportSources) -> Library:
        """Open the data root and the submission; what is not there becomes a line in ``problems``."""
        library = cls(sources)
        try:
            library.catalog = Catalog.open(str(sources.data_root)) if sources.data_root else None
        except ConnectomicsError as error:
            library.problems.append(f"No raw: {error}")
        try:
            if sources.submission is not None and sources.labels is None:
                is_folder = sources.submission.is_dir()
                library.archive = FolderStore(sources.submission) if is_folder else ZipStore(sources.submission)
        except ConnectomicsError as error:
            library.problems.append(f"No predictions from the submission: {error}")
        for name, folder in (("labels", sources.labels), ("probabilities", sources.probabilities)):
            if folder is not None and not folder.is_dir():
                library.problems.append(f"No {name}: there is no folder {folder}.")
        return library

    def close(self) -> None:
        """Close the submission."""
        if self.archive is not None:
            self.archive.close()

    def wanted(self) -> list[Wanted]:
        """Every class of every crop that there is truth for; without truth, every one that was predicted."""
        if self.sources.truth is not None and self.sources.crop_table is not None:
            table = CropTable.resolve(self.sources.crop_table)
            return [Wanted(e.dataset, e.crop_name, e.class_name, e.grid) for e in table]
        predicted = self.predicted()
        if self.sources.truth is None:
            return [Wanted(d, c, n, None) for d, c, n in predicted]
        datasets = {crop: dataset for dataset, crop, _ in predicted}
        root = str(self.sources.truth)
        if not store.exists(root):
            raise MetadataError(f"there is no truth at {root}; give the truth.zarr that was scored against")
        return [
            Wanted(datasets.get(crop, ""), crop, name, PlainArray.open(store.join(root, crop, name)).grid)
            for crop in store.list_groups(root)
            for name in store.list_groups(store.join(root, crop))
        ]

    def predicted(self) -> list[tuple[str, str, str]]:
        """(data set, crop, class) of the labels, or of the probabilities where there are no labels."""
        for folder in (self.sources.labels, self.sources.probabilities):
            if folder is not None and folder.is_dir():
                return list(find_arrays(folder))
        return []

    def item(self, wanted: Wanted) -> Item:
        """Open one; raises a `ConnectomicsError` where nothing of it can be shown."""
        dataset, crop, name = wanted.dataset, wanted.crop, wanted.class_name
        problems: list[str] = []
        prediction, probability = self._prediction(wanted, problems)
        grid = wanted.grid or (prediction.grid if prediction is not None else None)
        if grid is None:
            raise MetadataError(f"{crop}/{name}: neither truth nor prediction says where it lies")
        truth: LabelReader | None = None
        try:
            if self.sources.truth is not None:
                truth = PlainLabels.open(store.join(str(self.sources.truth), crop, name), name, grid)
                grid = truth.grid
            elif self.catalog is not None:
                truth = annotated_labels(self.catalog, dataset, crop, name, grid)
        except ConnectomicsError as error:
            problems.append(f"No truth: {error}")
        if truth is None and not problems:
            problems.append("No truth for this crop and class.")
        return Item(dataset, crop, name, grid, truth, prediction, probability, self._raw_of(dataset), tuple(problems))

    def _prediction(self, wanted: Wanted, problems: list[str]) -> tuple[LabelReader | None, Multiscale | None]:
        place = (wanted.dataset, wanted.crop, wanted.class_name)
        probability: Multiscale | None = None
        prediction: LabelReader | None = None
        try:
            if self.sources.probabilities is not None:
                probability = open_prediction(self.sources.probabilities, *place)
            if self.sources.labels is not None:
                found = open_prediction(self.sources.labels, *place)
                prediction = None if found is None else stored_labels(found, wanted.class_name)
            elif self.archive is not None and wanted.grid is not None:
                prediction = submitted_labels(self.archive, wanted.crop, wanted.class_name, wanted.grid)
            elif probability is not None:
                prediction = stored_labels(probability, wanted.class_name)
        except ConnectomicsError as error:
            problems.append(f"No prediction: {error}")
        if prediction is None and not problems:
            problems.append("No prediction for this crop and class.")
        return prediction, probability

    def _raw_of(self, dataset: str) -> Multiscale | None:
        if self.catalog is None:
            return None
        if dataset not in self._raw:
            try:
                self._raw[dataset] = Multiscale.open(self.catalog.raw_location(dataset))
            except ConnectomicsError as error:
                self._raw[dataset] = None
                self.problems.append(f"No raw for {dataset or 'a crop of no known data set'}: {error}")
        return self._raw[dataset]


# -- the section -------------------------------------------------------------------------------------------------------
def section(
    library: Library, table: Scores | None, options: ReportOptions, progress: Progress | None = None
) -> page.Section:
    """All crops with their pictures. What cannot be shown is said, crop by crop."""
    title = "Crops, worst first" if table is not None else "Crops"
    try:
        crops = ranked(library.wanted(), table)
    except ConnectomicsError as error:
        return page.Section("crops", title, page.note(f"No pictures: {error}"))
    if not crops:
        return page.Section("crops", title, page.note("No pictures: neither truth nor predictions were given."))
    chosen = choose(crops, options.max_pictures)
    n_all, n_drawn = sum(map(len, crops.values())), len(chosen)
    parts, done, ids = [], 0, pictures.Ids.fresh()
    names = anchors(crops)
    for number, (key, wanted) in enumerate(crops.items()):
        drawn = []
        for one in wanted:
            drawn.append(draw(library, one, options, ids if one in chosen else None))
            if one in chosen and progress is not None:
                done += 1
                progress(done, n_drawn, f"{one.crop}/{one.class_name}")
        unfolded = 3 if number == 0 else 1 if number < 3 else 0
        parts.append(_crop(names[key], drawn, table, number < options.viewers, unfolded))
    lines = [page.note(p) for p in library.problems]
    if library.catalog is None and not library.problems:
        lines.append(page.note("No raw: no data root was given, so labels are shown on flat grey."))
    if n_drawn < n_all:
        lines.append(page.note(f"Pictures of {n_drawn} of {n_all} crops and classes, the worst of each crop first."))
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


def choose(crops: Mapping[Key, Sequence[Wanted]], most: int) -> set[Wanted]:
    """At most ``most``: the worst class of every crop, then the second worst of every crop, and so on."""
    rounds = max((len(w) for w in crops.values()), default=0)
    order = [wanted[k] for k in range(rounds) for wanted in crops.values() if k < len(wanted)]
    return set(order[: max(0, most)])


@dataclass(frozen=True)
class Drawn:
    """A class of a crop on the page: its HTML, and what it was read from (None where there are no pictures)."""

    wanted: Wanted
    body: str
    item: Item | None = None
    found: Findings | None = None


def draw(library: Library, wanted: Wanted, options: ReportOptions, ids: pictures.Ids | None) -> Drawn:
    """The pictures of one class of a crop; without ``ids`` one line instead."""
    if ids is None:
        return Drawn(
            wanted, page.note(f"No pictures: the page is limited to {options.max_pictures} crops and classes.")
        )
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
    return Drawn(wanted, lines + page.hint(_where(item, found)) + "".join(rows), item, found)


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


def _crop(anchor: str, drawn: Sequence[Drawn], table: Scores | None, with_viewer: bool, unfolded: int) -> str:
    """A crop: its slice viewer beside its classes' scores, then every class, the first ``unfolded`` of them open."""
    dataset, crop = drawn[0].wanted.dataset, drawn[0].wanted.crop
    results = table.by_crop().get(crop, []) if table is not None else []
    mean = f'<span class="chip">{page.score(scores.mean_score(results))}</span>' if results else ""
    top = ""
    if with_viewer:
        try:
            top = f'<div class="top">{_viewer(drawn)}{_overview(anchor, drawn, table)}</div>'
        except ConnectomicsError as error:
            top = page.note(f"No slice viewer: {error}")
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


def _viewer(drawn: Sequence[Drawn]) -> str:
    """Of the classes that were drawn; opened at the worst predicted class and where its slices were taken."""
    shown = [(d.item, d.found) for d in drawn if d.item is not None and d.found is not None]
    if not shown:
        return ""
    first = next((k for k, (item, _) in enumerate(shown) if item.prediction is not None), 0)
    item, found = shown[first]
    start = float(item.grid.to_world(found.position)[0])
    return viewer.viewer([item for item, _ in shown], first, start)


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


def attributes_by_class(folder: Path | None) -> dict[str, dict[str, Any]]:
    """The ``connectomics`` attribute of the first array of every class of a predictions or labels folder."""
    found: dict[str, dict[str, Any]] = {}
    if folder is None or not folder.is_dir():
        return found
    for dataset, crop, name in find_arrays(folder):
        if name not in found:
            about = store.read_attrs(store.join(str(folder), f"{dataset}.zarr", crop, name)).get("connectomics")
            if isinstance(about, dict):
                found[name] = about
    return found
