"""What a report is made from. Every part may be left out; the page then says so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from connectomics.cellmap.crop_table import CropTable
from connectomics.errors import InputError


@dataclass(frozen=True)
class OtherRun:
    """A run to compare with: its folder, and the ``scores.json`` of its submission where there is one."""

    run: Path
    scores: Path | None = None


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
        others: runs that are set beside ``run``: configuration, curves, scores.
        others: runs that are set beside ``run``: configuration, curves, scores.
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
    others: tuple[OtherRun, ...] = ()


@dataclass(frozen=True)
class ReportOptions:
    """How large a report may become.

    Attributes:
        max_pictures: classes of crops that get pictures (three slices each): a few of the best, and the worst of every
            crop first.
        picture_size: pixels of a picture's longer side, at most.
        viewers: how many crops get a slice viewer: the worst, and the best one.
        viewer_slices: slices of each of a viewer's three planes.
        max_objects: objects listed a crop. max_voxels: voxels of one class of one crop that are looked through to find
            its slices and count its objects; for calibration; and, over all classes of a crop, for confusion. Beyond, a
            part is, evenly spread.
        max_arrays: label arrays of the data root whose annotation is read for the data summary.
        max_bytes: of pictures; once they are reached, further crops and classes get none.
    """

    max_pictures: int = 48
    picture_size: int = 384
    viewers: int = 4
    viewer_slices: int = 16
    max_objects: int = 30
    max_voxels: int = 1 << 27
    max_arrays: int = 2000
    max_bytes: int = 40_000_000

    def __post_init__(self) -> None:
        least = (
            ("max_pictures", self.max_pictures, 0),
            ("viewers", self.viewers, 0),
            ("viewer_slices", self.viewer_slices, 1),
            ("max_objects", self.max_objects, 0),
            ("max_voxels", self.max_voxels, 1),
            ("max_bytes", self.max_bytes, 0),
        )
        wrong = [f"{name} >= {low} (found {value})" for name, value, low in least if value < low]
        if not 16 <= self.picture_size <= 2048:
            wrong.append(f"16 <= picture_size <= 2048 (found {self.picture_size})")
        if wrong:
            raise InputError(f"ReportOptions needs {', '.join(wrong)}")
