"""Pack labels into the zip that the challenge's portal takes."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from connectomics.cellmap.crop_table import CropTable
from connectomics.pipeline.results import Labels, Probabilities
from connectomics.progress import Progress
from connectomics.submission import ExportResult, export_submission


def export(
    labels: Labels | str | Path,
    out: str | Path,
    *,
    crops: CropTable | str | Path | None = None,
    classes: Collection[str] | None = None,
    datasets: Collection[str] | None = None,
    probabilities: Probabilities | str | Path | None = None,
    strict: bool = False,
    progress: Progress | None = None,
) -> ExportResult:
    """Pack labels for the rows of a crop table, on each crop's own grid, check the result, and return the findings.

    Args:
        labels: what `decode` returned, or a folder of labels (or probabilities).
        out: the submission, ``submission.zip``; a name without ``.zip`` gives a folder.
        crops: crop table, its path, or "challenge"; default: the table that was predicted, else the challenge's.
        classes, datasets: only these.
        probabilities: what `predict` returned: borders of semantic classes then come from it, finer than from labels.
        strict: refuse if a row of the table has no prediction.

    Raises:
        MissingError, UnknownNameError, InputError, WriteError: see `connectomics.submission.export_submission`.
    """
    source = Labels.open(labels)
    chosen = crops if crops is not None else source.crops
    table = CropTable.resolve(chosen if chosen is not None else "challenge").select(None, classes, datasets)
    finer = None if probabilities is None else Probabilities.open(probabilities).folder
    return export_submission(source.folder, out, crops=table, probabilities_dir=finer, strict=strict, progress=progress)
