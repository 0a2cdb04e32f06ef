"""What a report is made from. Every part is optional; the page says which parts are missing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from connectomics.errors import InputError

if TYPE_CHECKING:
    from connectomics.cellmap.crop_table import CropTable


@dataclass(frozen=True)
class OtherRun:
    """A run to compare with: its folder, and the ``scores.json`` of its submission if there is one."""

    run: Path
    scores: Path | None = None


@dataclass(frozen=True)
class ReportSources:
    """Paths and facts that a report shows.

    Attributes:
        title: heading of the page.
        run: run folder with ``config.yaml``, ``metrics.csv``, ``timing.json``.
        stages: seconds by stage (phantom, training, prediction, ...), in order.
        environment: versions and machine by name; None: those of this process.
        data_root: root in CellMap's layout: raw, annotated crops, the data summary.
        truth: ground truth as the scorer takes it, a Zarr group ``crop{N}/{class}`` of plain arrays. Without it the
            annotation of the data root is shown as ground truth.
        crop_table: crop table of that ground truth: a `CropTable`, its path, or "challenge".
        labels, probabilities: folders ``{dataset}.zarr/{crop}/{class}`` as decode and predict write them. Without
            labels the arrays of the submission are shown, without a submission the probabilities cut at one half.
        submission: the packed zip (or its folder).
        scores: ``scores.json``.
        baseline_scores: another one, shown beside it.
        baseline_name: its name on the page.
        evaluation: the JSON that evaluate writes for annotated crops.
        others: runs that are compared with ``run``: configuration, curves, scores.
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
    """Limits on the size of a report.

    Attributes:
        max_pictures: classes of crops that get pictures (three slices each): a few of the best, and the worst of every
            crop first.
        picture_size: pixels of a picture's longer side, at most.
        viewers: number of crops with a slice viewer: the worst, and the best one.
        viewer_slices: slices in each of a viewer's three planes.
        max_objects: objects listed per crop.
        max_voxels: voxels that are read of one class of one crop to choose its slices, count its objects and measure
            its calibration, and of one crop, over all its classes, for confusion. Larger crops are sampled in slabs.
        max_arrays: label arrays of the data root whose annotation is read for the data summary.
        max_bytes: bytes of pictures; further crops and classes get none.
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
        lowest = {"viewer_slices": 1, "max_voxels": 1, "picture_size": 16}
        for name, value in vars(self).items():
            low, high = lowest.get(name, 0), 2048 if name == "picture_size" else math.inf
            if not low <= value <= high:
                raise InputError(f"ReportOptions: expected {low} <= {name} <= {high}, got {value}")
