"""What a report is made from. Every part may be left out; the page then says so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from connectomics.cellmap.crop_table import CropTable
from connectomics.errors import InputError


@dataclass(frozen=True)
class ReportSources:
    """Where the parts of a report lie.

    Attributes:
        title: heading of the page.
        run: a run's folder with ``config.yaml``, ``metrics.csv``, ``timing.json``.
        stages: seconds by stage (phantom, training, prediction, ...), in order.
        environment: versions and machine by name; None: those of this process.
        data_root: root in CellMap's layout: raw, annotated crops, the data summary.
        truth: the truth as the scorer takes it, a Zarr group ``crop{N}/{class}`` of plain arrays.
        crop_table: the crop table of that truth: a `CropTable`, its path, or "challenge".
        labels, probabilities: folders ``{dataset}.zarr/{crop}/{class}`` as decode and as predict write them. Without
            labels the submission's arrays are shown, without those the probabilities cut at one half.
        submission: the packed zip (or its folder).
        scores: ``scores.json``; baseline_scores: that of something plain, printed beside it.
        baseline_name: what the baseline is, in a few words.
        evaluation: the JSON that evaluate writes for annotated crops. Where no ``truth`` is given, the data root's own
            annotation is shown as truth.
    """

    title: str = "Segmentation report"
    run: Path | None = None
    stages: Mapping[str, float] = field(default_factory=dict)
    environment: Mapping[str, str] | None = None
    data_root: Path | str | None = None
    truth: Path | None = None
    crop_table: CropTable | Path | str | None = None
    labels: Path | None = None
    probabilities: Path | None = None
    submission: Path | None = None
    scores: Path | None = None
    baseline_scores: Path | None = None
    baseline_name: str = "baseline"
    evaluation: Path | None = None


@dataclass(frozen=True)
class ReportOptions:
    """How large a report may become.

    Attributes:
        max_pictures: classes of crops that get pictures (three slices each), the worst of every crop first.
        picture_size: pixels of a picture's longer side, at most.
        viewers: how many crops get a slice viewer.
        max_voxels: voxels of one class of one crop that are looked through to find its slices; beyond, a part is.
        max_arrays: label arrays of the data root whose annotation is read for the data summary.
    """

    max_pictures: int = 48
    picture_size: int = 384
    viewers: int = 4
    max_voxels: int = 1 << 27
    max_arrays: int = 2000

    def __post_init__(self) -> None:
        if self.max_pictures < 0 or self.viewers < 0 or not 16 <= self.picture_size <= 2048:
            raise InputError(
                "ReportOptions needs max_pictures and viewers >= 0 and 16 <= picture_size <= 2048, found "
                f"{self.max_pictures}, {self.viewers} and {self.picture_size}"
            )
