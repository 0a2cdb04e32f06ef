"""Verbs about results: export, validate, score, report."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from connectomics.cli import progress
from connectomics.cli.evaluation_tables import show_rules
from connectomics.cli.paths import InArgument, InOption, OutArgument, OutOption
from connectomics.cli.run_verbs import Overrides, rules_of


def export(
    labels: Annotated[Path, InArgument(help="Labels (or probabilities) as decode (or predict) wrote them.")],
    out: Annotated[Path, OutArgument(help="The submission, submission.zip.")] = Path("submission.zip"),
    crops: Annotated[str, typer.Option(help="Crop table (.csv, .json), or 'challenge'.")] = "challenge",
    class_name: Annotated[list[str] | None, typer.Option("--class", help="Only this class; may be repeated.")] = None,
    dataset: Annotated[list[str] | None, typer.Option(help="Only this data set; may be repeated.")] = None,
    probabilities: Annotated[
        Path | None, InOption(help="Folder of predict: semantic borders come from it, finer than from labels.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse where an array of the table is missing.")] = False,
) -> None:
    """Pack labels into the zip that the portal takes, on each crop's own grid, and check it.

    Examples:

      pytc export outputs/labels submission.zip

      pytc export outputs/labels submission.zip --crops data/phantom/test_crops.csv --class mito
    """
    from connectomics.cellmap.crop_table import CropTable
    from connectomics.submission import export_submission

    table = CropTable.resolve(crops).select(None, class_name, dataset)
    with progress.counted("packing") as advance:
        result = export_submission(
            labels, out, crops=table, probabilities_dir=probabilities, strict=strict, progress=advance
        )
    print(result.summary())
    if result.has_errors:
        raise typer.Exit(1)


def validate(
    submission: Annotated[Path, InArgument(help="A zip, or a folder with the Zarr group.")],
    crops: Annotated[str, typer.Option(help="Crop table (.csv, .json), or 'challenge'.")] = "challenge",
    truth: Annotated[Path | None, InOption(help="Truth Zarr, where there is one: exact instance limits.")] = None,
    class_name: Annotated[list[str] | None, typer.Option("--class", help="Only this class; may be repeated.")] = None,
    out: Annotated[Path | None, OutOption(help="Write the findings here too, as JSON.")] = None,
) -> None:
    """Say beforehand what the portal would refuse or silently count as nothing. Exit status 1 where there are errors.

    Examples:

      pytc validate submission.zip

      pytc validate submission.zip --crops data/phantom/test_crops.csv --truth data/phantom/truth.zarr
    """
    from connectomics.cellmap.crop_table import CropTable
    from connectomics.io.replacing import has_keys, require_own
    from connectomics.metrics.tables import write_json
    from connectomics.submission import validate_submission

    if out is not None:  # before the work
        require_own(out, has_keys("submission", "findings"), "validate")
    table = CropTable.resolve(crops).select(classes=class_name)
    with progress.counted("checking") as advance:
        findings = validate_submission(submission, table, truth=truth, progress=advance)
    if out is not None:
        write_json(out, {"submission": str(submission), "findings": [finding.to_dict() for finding in findings]})
    for finding in findings:
        print(finding)
    errors = sum(f.severity == "error" for f in findings)
    warnings = sum(f.severity == "warning" for f in findings)
    print(f"{submission}: {errors} errors, {warnings} warnings")
    if errors:
        raise typer.Exit(1)


def score(
    submission: Annotated[
        Path, InArgument(help="A zip, a folder with the Zarr group, or a folder of labels that decode wrote.")
    ],
    truth: Annotated[Path, InArgument(help="The truth: a Zarr group crop{N}/{class}.")],
    overrides: Overrides = None,
    config: Annotated[Path | None, InOption(help="Configuration whose score.rules to use.")] = None,
    crops: Annotated[str | None, typer.Option(help="Crop table; default: what the truth holds.")] = None,
    class_name: Annotated[list[str] | None, typer.Option("--class", help="Only this class; may be repeated.")] = None,
    crop: Annotated[list[str] | None, typer.Option(help="Only this crop; may be repeated.")] = None,
    rules: Annotated[str | None, typer.Option(help="Short for score.rules=...")] = None,
    out: Annotated[Path, OutOption(help="Folder for scores.json and the tables.")] = Path("."),
) -> None:
    """Score a submission exactly as the challenge does, and say how far other rules would move the score.

    Examples:

      pytc score submission.zip truth.zarr --crops test_crops.csv

      pytc score submission.zip truth.zarr --class mito --crop 557 --out outputs/scores score.rules=2026-07-affine
    """
    from connectomics.metrics.challenge import score_submission
    from connectomics.metrics.tables import print_table, score_table, scores_files, write_scores

    chosen = rules_of(config, overrides, rules)
    scores_files(out)  # before the work
    with progress.counted("scoring") as advance:
        result = score_submission(
            submission,
            truth,
            crops,
            classes=class_name,
            crop_names=crop,
            rules=chosen,
            progress=lambda done, number, crop, name: advance(done, number, f"{crop}/{name}"),
        )
    for warning in result.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print_table(score_table(result))
    show_rules([row.to_dict() for row in result.moves])
    for path in write_scores(result, out).values():
        print(path)


def report(
    out: Annotated[Path, OutArgument(help="The page to write.")] = Path("report.html"),
    run_dir: Annotated[
        list[Path] | None, InOption("--run", help="Run folder of train; several are set side by side.")
    ] = None,
    root: Annotated[Path | None, InOption(help="Data root, for raw.")] = None,
    crops: Annotated[Path | None, InOption(help="Crop table of the truth.")] = None,
    truth: Annotated[Path | None, InOption(help="Truth Zarr.")] = None,
    labels: Annotated[Path | None, InOption(help="Labels of decode.")] = None,
    predictions: Annotated[Path | None, InOption(help="Probabilities of predict.")] = None,
    submission: Annotated[Path | None, InOption(help="The packed submission.")] = None,
    scores: Annotated[
        list[Path] | None, InOption(help="scores.json of score; the n-th belongs to the n-th --run.")
    ] = None,
    baseline: Annotated[Path | None, InOption(help="Another scores.json to compare with.")] = None,
    evaluation: Annotated[Path | None, InOption(help="JSON of evaluate.")] = None,
    pictures: Annotated[int, typer.Option(help="Classes of crops that get pictures, at most.")] = 48,
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "Segmentation report",
) -> None:
    """Write one self-contained page: the run, its curves, slices of raw, truth and prediction, scores, objects,
    confusion, calibration. Every part is optional. With several runs: what differs between them, too.

    Examples:

      pytc report report.html --run outputs/demo/run --scores outputs/demo/scores.json

      pytc report report.html --root data/phantom --crops data/phantom/test_crops.csv --truth data/phantom/truth.zarr
      --labels outputs/labels --scores scores.json

      pytc report compared.html --run runs/first --run runs/second
    """
    from connectomics.errors import InputError, MissingError
    from connectomics.report import OtherRun, ReportOptions, ReportSources, build_report
    from connectomics.report.page import size
    from connectomics.report.scores import Scores, evaluation_section

    runs, tables = run_dir or [], scores or []
    if len(tables) > max(1, len(runs)):
        raise InputError(f"{len(tables)} --scores for {len(runs)} --run; give each run its own scores.json, in order")
    for path in (*runs, root, crops, truth, labels, predictions, submission, *tables, baseline, evaluation):
        if path is not None and not path.exists():
            raise MissingError(f"nothing at {path}; give what is there, or leave that option out")
    if not any((*runs, root, crops, truth, labels, predictions, submission, *tables, baseline, evaluation)):
        raise InputError("nothing to report: give --run, --scores, --root, --labels or others of what was made; see -h")
    _check_places(runs, crops, [labels, predictions])
    for path in (*tables, baseline):
        if path is not None:
            Scores.load(path)  # what was asked for by name must be readable; the page itself would only note it
    if evaluation is not None:
        evaluation_section(evaluation)
    others = tuple(
        OtherRun(run, tables[number] if number < len(tables) else None) for number, run in enumerate(runs) if number
    )
    sources = ReportSources(
        title=title,
        run=runs[0] if runs else None,
        data_root=None if root is None else str(root),
        crop_table=crops,
        truth=truth,
        labels=labels,
        probabilities=predictions,
        submission=submission,
        scores=tables[0] if tables else None,
        baseline_scores=baseline,
        evaluation=evaluation,
        others=others,
    )
    with progress.counted("drawing") as advance:
        path = build_report(out, sources, ReportOptions(max_pictures=pictures), advance)
    print(f"{path}  {size(path.stat().st_size)}")


def _check_places(runs: Sequence[Path], crops: Path | None, folders: Sequence[Path | None]) -> None:
    """What was asked for by name must be that; the page itself would only note that there is nothing."""
    from connectomics.cellmap.crop_table import CropTable
    from connectomics.decoding.prediction import find_arrays
    from connectomics.errors import MissingError
    from connectomics.pipeline.runs import open_run

    for run in runs:
        open_run(run)
    if crops is not None:
        CropTable.load(crops)
    for folder in folders:
        if folder is not None and not any(find_arrays(folder)):
            raise MissingError(f"nothing that predict or decode wrote in {folder}; give such a folder, or leave it out")
