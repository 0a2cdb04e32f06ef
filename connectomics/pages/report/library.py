"""Opening what the pictures show: truth, predictions, probabilities and raw of every class of every crop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from connectomics.cellmap.catalog import Catalog
from connectomics.cellmap.crop_table import CropTable
from connectomics.decoding.label_artifact import unknown_share
from connectomics.decoding.prediction import find_arrays
from connectomics.errors import MetadataError, first_of, number_of
from connectomics.geometry import VoxelGrid
from connectomics.io import store
from connectomics.io.artifacts import identity, marks
from connectomics.io.fingerprint import same_content
from connectomics.io.multiscale import Multiscale, PlainArray
from connectomics.metrics.challenge.zarr_v2 import FolderStore, Store, ZipStore
from connectomics.pages.page import noting
from connectomics.pages.report.sources import ReportSources
from connectomics.pages.report.volumes import (
    Item,
    LabelReader,
    annotated_labels,
    open_prediction,
    plain_labels,
    stored_labels,
    submitted_labels,
)


@dataclass(frozen=True)
class Wanted:
    """A class of a crop to show; ``grid`` is None if only the prediction knows it."""

    dataset: str
    crop: str
    class_name: str
    grid: VoxelGrid | None


@dataclass
class Library:
    """Opens what the pictures show, each raw volume once. Close it with `close`."""

    sources: ReportSources
    catalog: Catalog | None = None
    archive: Store | None = None
    problems: list[str] = field(default_factory=list)
    _raw: dict[str, Multiscale | None] = field(default_factory=dict)

    @classmethod
    def open(cls, sources: ReportSources) -> Library:
        """Open the data root and the submission; what is missing becomes a line in ``problems``."""
        library = cls(sources)
        with noting(library.problems, "No raw"):
            library.catalog = Catalog.open(str(sources.data_root)) if sources.data_root else None
        with noting(library.problems, "No predictions from the submission"):
            if sources.submission is not None and sources.labels is None:
                library.archive = _open_submission(sources.submission)
        for name, folder in (("labels", sources.labels), ("probabilities", sources.probabilities)):
            if folder is not None and not folder.is_dir():
                library.problems.append(f"No {name}: there is no folder {folder}.")
        return library

    def close(self) -> None:
        """Close the submission."""
        if self.archive is not None:
            self.archive.close()

    def wanted(self) -> list[Wanted]:
        """Return every class of every crop with ground truth; without ground truth, every class that was predicted."""
        if self.sources.truth is not None and self.sources.crop_table is not None:
            table = CropTable.resolve(self.sources.crop_table)
            return [Wanted(e.dataset, e.crop_name, e.class_name, e.grid) for e in table]
        predicted = self.predicted()
        if self.sources.truth is None:
            return [Wanted(d, c, n, None) for d, c, n in predicted]
        datasets = {crop: dataset for dataset, crop, _ in predicted}
        root = str(self.sources.truth)
        if not store.exists(root):
            raise MetadataError(f"no ground truth at {root}; give the truth.zarr that was used for scoring")
        return [
            Wanted(datasets.get(crop, ""), crop, name, PlainArray.open(store.join(root, crop, name)).grid)
            for crop in store.list_groups(root)
            for name in store.list_groups(store.join(root, crop))
            if not name.endswith("_mask")
        ]

    def predicted(self) -> list[tuple[str, str, str]]:
        """Return (data set, crop, class) of the labels, or of the probabilities if there are no labels."""
        for folder in (self.sources.labels, self.sources.probabilities):
            if folder is not None and folder.is_dir():
                return list(find_arrays(folder))
        return []

    def marks(self) -> dict[tuple[str, str], dict[str, str]]:
        """Return what identifies each array of the labels, or of the submission, by crop and class."""
        if self.archive is None:
            return {(crop, name): marks(about) for _, crop, name, about in _attributes(self.sources.labels)}
        return _submitted(self.archive)

    def other_sources(self) -> list[str]:
        """Return lines that say if labels, probabilities and submission do not belong together."""
        shown, submission, place = self.marks(), self.sources.submission, self.sources.labels
        lines = self._other_predictions(shown)
        if place is not None and submission is not None and submission.exists():
            archive = _open_submission(submission)
            try:
                packed = {key: found for key, found in _submitted(archive).items() if key in shown}
            finally:
                archive.close()
            others = [
                "/".join(key) for key, found in packed.items()
                if any(shown[key].get(name, mark) != mark for name, mark in found.items())
            ]  # fmt: skip
            said = f"The submission {submission} is of other labels than {place} holds now, for "
            lines += [f"{said}{number_of(len(others), 'array')} ({first_of(others, 3)})."] if others else []
        return lines

    def _other_predictions(self, shown: Mapping[tuple[str, str], Mapping[str, str]]) -> list[str]:
        folder, others = self.sources.probabilities, list[str]()
        labels = {(d, c, n): about for d, c, n, about in _attributes(self.sources.labels)}
        for dataset, crop, name, about in _attributes(folder):
            source = labels.get((dataset, crop, name), {}).get("made_from", {}).get("probabilities")
            if source:
                now = Multiscale.open(store.join(str(folder), f"{dataset}.zarr", crop, name))
                same = same_content(source, identity(now))
            else:  # edited labels and submissions only name the network
                model = marks(about).get("model")
                same = shown.get((crop, name), {}).get("model", model) == model
            others += [] if same else [f"{crop}/{name}"]
        place = self.sources.labels or self.sources.submission
        made = f"The labels in {place} were not made from the probabilities that {folder} holds now, for "
        return [f"{made}{number_of(len(others), 'array')} ({first_of(others, 3)})."] if others else []

    def item(self, wanted: Wanted) -> Item:
        """Open one class of a crop; raise a `ConnectomicsError` if nothing of it can be shown."""
        dataset, crop, name, grid = wanted.dataset, wanted.crop, wanted.class_name, wanted.grid
        sources, problems = self.sources, list[str]()
        truth: LabelReader | None = None
        prediction: LabelReader | None = None
        probability: Multiscale | None = None
        with noting(problems, "No prediction"):
            if sources.probabilities is not None:
                probability = open_prediction(sources.probabilities, dataset, crop, name)
            if sources.labels is not None:
                found = open_prediction(sources.labels, dataset, crop, name)
                prediction = None if found is None else stored_labels(found, name)
            elif self.archive is not None and grid is not None:
                prediction = submitted_labels(self.archive, crop, name, grid)
            elif probability is not None:
                prediction = stored_labels(probability, name)
        if prediction is None and not problems:
            problems.append("No prediction for this crop and class.")
        grid = grid or (prediction.grid if prediction is not None else None)
        if grid is None:
            raise MetadataError(f"{crop}/{name}: neither truth nor prediction says where it is; give a crop table")
        with noting(problems, "No truth"):
            if sources.truth is not None:
                truth = plain_labels(store.join(str(sources.truth), crop, name), name, grid)
                grid = truth.grid
            elif self.catalog is not None:
                truth = annotated_labels(self.catalog, dataset, crop, name, grid)
        if truth is None and not problems:
            problems.append("No truth for this crop and class.")
        return Item(dataset, crop, name, grid, truth, prediction, probability, self._raw_of(dataset), tuple(problems))

    def _raw_of(self, dataset: str) -> Multiscale | None:
        if self.catalog is None:
            return None
        if dataset not in self._raw:
            self._raw[dataset] = None
            with noting(self.problems, f"No raw for {dataset or 'a crop whose data set is not known'}"):
                self._raw[dataset] = Multiscale.open(self.catalog.raw_location(dataset))
        return self._raw[dataset]


def _open_submission(place: Path) -> Store:
    return FolderStore(place) if place.is_dir() else ZipStore(place)


def _submitted(archive: Store) -> dict[tuple[str, str], dict[str, str]]:
    names = [(crop, name) for crop in archive.folders() for name in archive.folders(crop)]
    attrs = {key: archive.json(f"{'/'.join(key)}/.zattrs") or {} for key in names}
    return {key: marks(found.get("connectomics")) for key, found in attrs.items()}


def unknown_lines(folder: Path | None) -> list[str]:
    """Return a line for each array of a predictions or labels folder that was only partly predicted."""
    return [
        f"{dataset}/{crop}/{name}: {100 * share:.3g} % was not predicted (accepted failed blocks); it is "
        "unknown and counts as predicted absent."
        for dataset, crop, name, about in _attributes(folder)
        if (share := unknown_share(about))
    ]


def attributes_by_class(folder: Path | None) -> dict[str, dict[str, Any]]:
    """Return the ``connectomics`` attribute of the first array of every class of a predictions or labels folder."""
    found: dict[str, dict[str, Any]] = {}
    for _, _, name, about in _attributes(folder):
        found.setdefault(name, about)
    return found


def _attributes(folder: Path | None) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """Yield (data set, crop, class, attribute) of every array of a folder that has the attribute."""
    for dataset, crop, name in find_arrays(folder) if folder is not None and folder.is_dir() else ():
        about = store.read_attrs(store.join(str(folder), f"{dataset}.zarr", crop, name)).get("connectomics")
        if isinstance(about, dict):
            yield dataset, crop, name, about
