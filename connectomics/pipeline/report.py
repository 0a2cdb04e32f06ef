"""Write the report: one self-contained page of a run and its results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from connectomics.cellmap.crop_table import CropTable
from connectomics.errors import InputError, MissingError
from connectomics.pages.report.sources import OtherRun, ReportOptions, ReportSources
from connectomics.pipeline.results import ArrayFolder, Labels, Probabilities, Scores
from connectomics.pipeline.runs import Run, open_run
from connectomics.progress import Progress


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
        results: what `train`, `predict`, `decode`, and with ``out=`` `score` and `evaluate` returned, in any order.
        out: the page.
        sources: further fields of `connectomics.pages.report.sources.ReportSources`, such as ``truth=``.

    Returns:
        The path of the page.

    Raises:
        InputError: nothing to report.
        WriteError: a file that is not a report is in the way.
    """
    from connectomics.pages.report.build import build_report

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


def named_sources(*, runs: Sequence[Path], scores: Sequence[Path], **paths: Path | None) -> dict[str, Any]:
    """Return the fields of `ReportSources` for paths that were given by name, each checked: the page itself would only
    note what is missing.

    Args:
        runs: run folders; all but the first are compared with it.
        scores: ``scores.json`` of each run, in order.
        paths: further fields.

    Raises:
        MissingError: a path does not exist, or a folder holds nothing of its kind.
        InputError: more scores than runs.
    """
    from connectomics.pages.report.scores import Scores as ScoresFile
    from connectomics.pages.report.scores import evaluation_section

    if len(scores) > max(1, len(runs)):
        raise InputError(f"{len(scores)} --scores for {len(runs)} --run; give each run its own scores.json, in order")
    given = {name: path for name, path in paths.items() if path is not None}
    if not (runs or scores or given):
        raise InputError("nothing to report: give --run, --scores, --root, --labels or other results; see --help")
    for path in (*runs, *scores, *given.values()):
        if not path.exists():
            raise MissingError(f"nothing at {path}; give an existing path, or leave that option out")
    for run in runs:
        open_run(run)
    if "crop_table" in given:
        CropTable.load(given["crop_table"])
    for name in ("labels", "probabilities"):
        if name in given and not ArrayFolder.open(given[name]).arrays:
            raise MissingError(f"nothing that predict or decode wrote in {given[name]}; give such a folder")
    for path in (*scores, *([given["baseline_scores"]] if "baseline_scores" in given else [])):
        ScoresFile.load(path)
    if "evaluation" in given:
        evaluation_section(given["evaluation"])
    others = tuple(
        OtherRun(run, scores[number] if number < len(scores) else None) for number, run in enumerate(runs) if number
    )
    return {**given, "run": next(iter(runs), None), "scores": next(iter(scores), None), "others": others}
