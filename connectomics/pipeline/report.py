"""Write the report: one self-contained page of a run and its results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from connectomics.errors import InputError
from connectomics.pipeline.results import Labels, Probabilities, Scores
from connectomics.pipeline.runs import Run
from connectomics.progress import Progress
from connectomics.report import ReportOptions, ReportSources, build_report


def report(
    *results: Run | Probabilities | Labels | Scores,
    out: str | Path = "report.html",
    title: str = "Segmentation report",
    progress: Progress | None = None,
    options: ReportOptions | None = None,
    **sources: Any,
) -> Path:
    """Write one page of what there is: run, curves, slices, scores, objects, confusion, calibration.

    Args:
        results: what `train`, `predict`, `decode`, `score` and `evaluate` returned, in any order.
        out: the page.
        sources: further fields of `connectomics.report.ReportSources`, such as ``truth=`` or ``data_root=``.

    Returns:
        The path of the page.

    Raises:
        InputError: nothing to report. WriteError: a file that is not a report is in the way.
    """
    given: dict[str, Any] = {"title": title}
    for result in results:
        if isinstance(result, Run):
            given["run"] = result.folder
            given.setdefault("data_root", result.config.get("dataset", {}).get("data_root"))
        elif isinstance(result, Probabilities):
            given["probabilities"] = result.folder
        elif isinstance(result, Labels):
            given["labels"] = result.folder
        elif isinstance(result, Scores) and result.file is not None:
            given["scores" if "label_scores" in result else "evaluation"] = result.file
        else:
            raise InputError(f"expected a Run, Probabilities, Labels, or Scores that were written, got {result!r}")
    given |= {name: value for name, value in sources.items() if value is not None}
    if set(given) == {"title"}:
        raise InputError("nothing to report; give a run, labels, probabilities or scores")
    return build_report(out, ReportSources(**given), options, progress)
