"""Check a submission before it is uploaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from connectomics.cellmap.crop_table import CropTable
from connectomics.io.replacing import has_keys, require_own
from connectomics.metrics.tables import write_json
from connectomics.progress import Progress
from connectomics.submission import Finding, validate_submission


def validate(
    submission: str | Path,
    *,
    crops: CropTable | str | Path = "challenge",
    classes: Sequence[str] | None = None,
    truth: str | Path | None = None,
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> list[Finding]:
    """Return what the portal would refuse, or silently count as nothing.

    Args:
        submission: a zip, or a folder with the Zarr group.
        crops: crop table, its path, or "challenge".
        classes: only these.
        truth: ground-truth Zarr, if there is one: instance limits are then exact.
        out: also write the findings to this JSON file.

    Raises:
        MissingError: no such submission or table.
        WriteError: ``out`` holds something else.
    """
    target = None if out is None else require_own(Path(out), has_keys("submission", "findings"), "validate")
    table = CropTable.resolve(crops).select(classes=classes)
    findings = list(validate_submission(submission, table, truth=truth, progress=progress))
    if target is not None:
        write_json(target, {"submission": str(submission), "findings": [finding.to_dict() for finding in findings]})
    return findings
