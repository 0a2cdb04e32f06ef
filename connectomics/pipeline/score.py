"""Score a submission exactly as the challenge does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from connectomics.cellmap.crop_table import CropTable
from connectomics.metrics.challenge import score_submission
from connectomics.metrics.challenge.rules import DEFAULT_RULES
from connectomics.metrics.tables import scores_files, write_scores
from connectomics.pipeline.results import Scores
from connectomics.progress import Progress


def score(
    submission: str | Path,
    truth: str | Path,
    *,
    out: str | Path | None = None,
    crops: CropTable | str | Path | None = None,
    crop_names: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
    rules: str = DEFAULT_RULES,
    progress: Progress | None = None,
) -> Scores:
    """Return the challenge's scores of a submission, from 0 to 1, and write them to a folder.

    Args:
        submission: a zip, a folder with the Zarr group, or a folder of labels that `decode` wrote.
        truth: ground truth, a Zarr group ``crop{N}/{class}``.
        out: folder for ``scores.json`` and the tables ``scores_per_{class,crop,instance}.csv``; None writes nothing.
        crops: crop table; default: what the truth holds.
        crop_names, classes: only these.
        rules: version of the challenge's rules (``score.rules``).

    Raises:
        MissingError, InputError, CorruptDataError: see `connectomics.metrics.challenge.score_submission`.
        WriteError: ``out`` holds files of something else.
    """
    if out is not None:
        scores_files(out)  # before the work
    result = score_submission(
        submission, truth, crops, classes=classes, crop_names=crop_names, rules=rules, progress=progress
    )
    return Scores(result.to_dict(), None if out is None else write_scores(result, out)["json"], result)
