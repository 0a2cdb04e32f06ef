"""Verbs about results: evaluate, tune, export, validate, score, report."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from connectomics.cli import options as opt
from connectomics.cli import terminal
from connectomics.cli.options import (
    InArgument,
    InOption,
    InPlaceArgument,
    InPlaceOption,
    OutArgument,
    OutOption,
    OutPlaceArgument,
)
from connectomics.errors import InputError, first_of, number_of

if TYPE_CHECKING:
    from connectomics.metrics.challenge.results import SubmissionScore

_MEASURES = ("score", "dice", "iou", "precision", "recall", "rand_error", "voi_split", "voi_merge")
_HEADS = ("score", "dice", "iou", "precision", "recall", "rand error", "split", "merge")
#: Number of crops that are printed, the worst first; files have all of them.
_SHOWN = 20

CropTableOption = Annotated[str, typer.Option("--crops", help="Crop table (.csv, .json), or 'challenge'.")]


def evaluate(
    labels: Annotated[Path, InArgument(help="Folder of labels that decode wrote.")],
    root: Annotated[str, typer.Argument(help="Data root with the ground truth of those crops.")],
    overrides: opt.Overrides = None,
    config: opt.RulesConfig = None,
    out: Annotated[Path | None, OutOption(help="Write the numbers here, as JSON, and CSV tables beside it.")] = None,
    class_name: opt.Classes = None,
    crop: opt.Crops = None,
    dataset: opt.Datasets = None,
    rules: opt.Rules = None,
) -> None:
    """Compare labels with annotated crops, over known voxels only: the challenge's score, Dice, IoU, precision, recall,
    Rand error, VOI; by class, data set and crop, with 95 % intervals over crops.

    Examples:

      pytc evaluate outputs/labels data/phantom

      pytc evaluate outputs/labels data/phantom --class mito --out outputs/evaluation.json score.rules=pq
    """
    from connectomics.pipeline.evaluate import evaluate as run
    from connectomics.pipeline.evaluate import evaluation_files

    chosen = opt.rules_of(config, overrides, rules)
    with terminal.counted("evaluating") as advance:
        result = run(
            labels, root, out=out, classes=class_name, crops=crop, datasets=dataset, rules=chosen, progress=advance
        )
    _print_evaluation(result)
    if out is not None:
        for path in evaluation_files(out).values():
            print(path)


def _print_evaluation(result: Mapping[str, Any]) -> None:
    """Tables by class, data set and crop, and the challenge's totals over these crops."""
    from connectomics.metrics.challenge.rules import trust

    _print_rows("By class", ("class",), [{"class": n, **row} for n, row in result["classes"].items()], intervals=True)
    _print_rows("By data set", ("dataset", "class"), result["datasets"], intervals=True)
    crops = sorted(result["crops"], key=lambda row: float(row["dice"]))
    title = "By crop" + (f", the worst {_SHOWN} of {len(crops)}" if len(crops) > _SHOWN else "")
    _print_rows(title, ("crop", "dataset", "class"), crops[:_SHOWN], intervals=False)
    trusted = f"rules {result['rules']}, {trust(result['verified'])}"
    print(f"\nThe challenge's score over these crops, known voxels only, {trusted}")
    for name in ("instance", "semantic", "overall"):
        interval = _interval(result["totals"], name)
        shown = f"  (95 %: {interval})" if interval != "-" else ""
        print(f"  {name:8} {terminal.number(result['totals'][name])}{shown}")
    for name, share in result["unknown"].items():
        print(f"{name}: {100 * share:.3g} % was not predicted (accepted failed blocks) and counts as predicted absent")
    print_rules(result["by_rules"])
    left_out = result["left_out"]
    if left_out:
        arrays = number_of(len(left_out), "array")
        print(f"{arrays} without annotated ground truth left out: {first_of(left_out, 6)}")


def _print_rows(title: str, names: Sequence[str], rows: Sequence[Mapping[str, Any]], intervals: bool) -> None:
    header = [*names, *(("crops",) if intervals else ()), *_HEADS]
    if intervals:
        header.insert(header.index("score") + 1, "95 %")
        header.insert(header.index("dice") + 1, "95 %")
    cells = []
    for row in rows:
        line = [row[name] for name in (*names, *(("crops",) if intervals else ()))]
        for measure in _MEASURES:
            line.append(terminal.number(row.get(measure)))
            if intervals and measure in ("score", "dice"):
                line.append(_interval(row, measure))
        cells.append(line)
    terminal.table(header, cells, title)


def _interval(row: Mapping[str, Any], name: str) -> str:
    return f"{row[f'{name}_low']:.3f}-{row[f'{name}_high']:.3f}" if f"{name}_low" in row else "-"


def print_rules(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the overall score by each version of the rules, and its difference from the chosen version."""
    if not rows:
        return
    cells = []
    for row in rows:
        by, verified = row["moves"], "verified" if row["verified"] else "not verified"
        moved = None if by is None else f"{by:+.4f}"
        cells.append([row["rules"], terminal.number(row["overall"]), moved, verified, row["summary"]])
    terminal.table(["rules", "overall", "difference", "", "what they are"], cells, "By other rules (score.rules)")


def tune(
    predictions: Annotated[Path, InArgument(help="Folder that predict wrote for annotated crops.")],
    root: Annotated[str, typer.Argument(help="Data root with the ground truth of those crops.")],
    overrides: opt.Overrides = None,
    config: Annotated[
        Path | None, InOption(help="Configuration: decoding.default and decoding.classes to start from, score.rules.")
    ] = None,
    out: Annotated[Path, OutOption(help="Folder for decoding.yaml, tuning.json, tuning.png and the trials.")] = Path(
        "outputs/tuned"
    ),
    class_name: opt.Classes = None,
    trials: Annotated[int, typer.Option(help="Trials per class, including those of earlier runs.")] = 60,
    minutes: Annotated[float | None, typer.Option(help="Minutes in which trials start; default: no limit.")] = None,
    seed: Annotated[int, typer.Option(help="Random seed of the search.")] = 0,
) -> None:
    """Choose thresholds, methods, minimum sizes and seeds of every class on validation crops, by the challenge's score.

    Rerun the same command to resume a search. Use the result with decode --config OUT/decoding.yaml.

    Examples:

      pytc tune outputs/val data/phantom --config tutorials/phantom.yaml --out outputs/tuned

      pytc tune outputs/val data/phantom --class mito --trials 200 --minutes 30 decoding.classes.mito.connectivity=6
    """
    from connectomics.config import import_plugins, load_config
    from connectomics.decoding.parameters import decode_parameters
    from connectomics.metrics.challenge.rules import get_rules, trust
    from connectomics.pipeline.results import Probabilities
    from connectomics.pipeline.tune import tune as run

    composed, there = load_config(config, overrides), Probabilities.open(predictions).classes
    import_plugins(composed.plugins)
    base = decode_parameters(there, composed.decoding.default, composed.decoding.classes)
    seconds = None if minutes is None else 60 * minutes
    with terminal.counted("tuning") as advance:
        result = run(
            predictions, root, out, classes=class_name, trials=trials, seconds=seconds, seed=seed, base=base,
            rules=composed.score.rules, progress=advance,
        )  # fmt: skip
    header = ("class", "measure", "crops", "trials", "base", "tuned", "threshold", "method", "min nm^3")
    rows = [
        (
            name, t.measure, len(t.crops), len(t.trials) or None, f"{t.base_score:.4f}", f"{t.best_score:.4f}",
            t.best.threshold, t.best.method, t.best.min_size_nm3,
        )
        for name, t in result.items()
    ]  # fmt: skip
    rules = get_rules(composed.score.rules)
    trusted = f"rules {rules.version}, {trust(rules.verified)}"
    terminal.table(header, rows, f"Tuned on these crops, known voxels only, {trusted}; other crops will score lower")
    left_out = sorted(set(class_name or there) - set(result))
    if left_out:
        print(f"no annotated voxel of {', '.join(left_out)}: parameters unchanged")
    for name in ("decoding.yaml", "tuning.json", "tuning.png"):
        print(out / name)


def export(
    labels: Annotated[Path, InPlaceArgument(help="Labels (or probabilities) as decode (or predict) wrote them.")],
    out: Annotated[Path, OutPlaceArgument(help="submission.zip, or stack.tif.")] = Path("submission.zip"),
    crops: CropTableOption = "challenge",
    class_name: opt.Classes = None,
    dataset: opt.Datasets = None,
    crop: Annotated[str | None, typer.Option(help="For a TIFF stack: the crop.")] = None,
    box: Annotated[str | None, typer.Option(help="For a TIFF stack: DATASET:z0,y0,x0:z1,y1,x1 (nm).")] = None,
    probabilities: Annotated[
        Path | None, InPlaceOption(help="Folder of predict: borders of semantic classes come from it, finer.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Fail if an array of the table is missing.")] = False,
) -> None:
    """Pack labels into the zip that the portal takes, on each crop's own grid, and check it.

    A name that ends in .tif gives a TIFF stack of one array instead, with its voxel size, for Fiji, Amira and others.

    Examples:

      pytc export outputs/labels submission.zip

      pytc export outputs/labels submission.zip --crops data/phantom/test_crops.csv --class mito

      pytc export outputs/labels cell2.tif --class mito --box cell2:0,0,0:800,1600,1600
    """
    if out.suffix.lower() in (".tif", ".tiff"):
        _export_tiff(labels, out, class_name or [], dataset or [], crop, box, probabilities is not None or strict)
        return
    if crop or box:
        raise InputError(f"--crop and --box are for a TIFF stack, OUT.tif; got {out}")
    from connectomics.pipeline.export import export as run

    with terminal.counted("packing") as advance:
        result = run(
            labels, out, crops=crops, classes=class_name, datasets=dataset, probabilities=probabilities, strict=strict,
            progress=advance,
        )  # fmt: skip
    print(result.summary())
    if result.has_errors:
        raise typer.Exit(1)


def _export_tiff(
    labels: Path, out: Path, classes: list[str], datasets: list[str], crop: str | None, box: str | None, others: bool
) -> None:
    from connectomics.pipeline.export import export_tiff

    if others or len(classes) > 1 or len(datasets) > 1:
        raise InputError("a TIFF stack holds one array: give one --class and --dataset, no --probabilities or --strict")
    names = {"class_name": next(iter(classes), None), "dataset": next(iter(datasets), None), "crop": crop, "box": box}
    with terminal.counted("writing planes") as advance:
        dtype, grid = export_tiff(labels, out, **names, progress=advance)
    print(f"{out}: {dtype}, {grid}")


def validate(
    submission: Annotated[Path, InArgument(help="A zip, or a folder with the Zarr group.")],
    crops: CropTableOption = "challenge",
    truth: Annotated[Path | None, InOption(help="Ground-truth Zarr, if there is one: exact instance limits.")] = None,
    class_name: opt.Classes = None,
    out: Annotated[Path | None, OutOption(help="Also write the findings here, as JSON.")] = None,
) -> None:
    """Check a submission before uploading it: what the portal would refuse or silently ignore. The exit status is 1 if
    there are errors.

    Examples:

      pytc validate submission.zip

      pytc validate submission.zip --crops data/phantom/test_crops.csv --truth data/phantom/truth.zarr
    """
    from connectomics.pipeline.validate import validate as run

    with terminal.counted("checking") as advance:
        findings = run(submission, crops=crops, classes=class_name, truth=truth, out=out, progress=advance)
    for finding in findings:
        print(finding)
    errors = sum(f.severity == "error" for f in findings)
    warnings = sum(f.severity == "warning" for f in findings)
    print(f"{submission}: {number_of(errors, 'error')}, {number_of(warnings, 'warning')}")
    if errors:
        raise typer.Exit(1)


def score(
    submission: Annotated[
        Path, InArgument(help="A zip, a folder with the Zarr group, or a folder of labels that decode wrote.")
    ],
    truth: Annotated[Path, InArgument(help="Ground truth: a Zarr group crop{N}/{class}.")],
    overrides: opt.Overrides = None,
    config: opt.RulesConfig = None,
    crops: Annotated[str | None, typer.Option(help="Crop table; default: what the ground truth holds.")] = None,
    class_name: opt.Classes = None,
    crop: opt.Crops = None,
    rules: opt.Rules = None,
    out: Annotated[Path, OutOption(help="Folder for scores.json and the tables.")] = Path("."),
) -> None:
    """Score a submission exactly as the challenge does, and print how other rules would change the score.

    Examples:

      pytc score submission.zip truth.zarr --crops test_crops.csv

      pytc score submission.zip truth.zarr --class mito --crop 557 --out outputs/scores score.rules=2026-07-affine
    """
    from connectomics.metrics.tables import scores_files
    from connectomics.pipeline.score import score as run

    chosen = opt.rules_of(config, overrides, rules)
    with terminal.counted("scoring") as advance:
        scores = run(
            submission, truth, out=out, crops=crops, crop_names=crop, classes=class_name, rules=chosen, progress=advance
        )
    for warning in scores["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    if scores.result is not None:
        print_score(scores.result)
    print_rules(scores["by_rules"])
    for path in scores_files(out).values():
        print(path)


def print_score(score: SubmissionScore) -> None:
    """Print a submission's score by class, with both totals."""
    from connectomics.metrics.challenge.rules import trust
    from connectomics.metrics.tables import class_rows

    rows: list[list[object]] = []
    for row in class_rows(score):
        ratio = row["f1"] if row["kind"] == "instance" else row["iou"]
        numbers = (row["score"], row["score_submitted_only"], ratio, row["normalized_hausdorff_distance"])
        missing = f"{row['missing']}/{row['crops']}" if row["missing"] else ""
        rows.append([row["class"], *map(terminal.number, (*numbers, row["panoptic_quality"])), missing])
    for name in ("instance", "semantic", "overall"):
        totals = (getattr(score.totals, name), getattr(score.submitted_only, name))
        rows.append([f"all: {name}", *map(terminal.number, totals), "", "", "", ""])
    header = ["class", "score", "submitted only", "F1 or IoU", "distance", "PQ", "missing"]
    terminal.table(header, rows, f"Challenge score, rules {score.rules}, {trust(score.verified)}")


def report(
    out: Annotated[Path, OutArgument(help="The page to write.")] = Path("report.html"),
    run_dir: Annotated[list[Path] | None, InOption("--run", help="Run folder of train; several are compared.")] = None,
    root: Annotated[Path | None, InOption(help="Data root, for raw.")] = None,
    crops: Annotated[Path | None, InOption(help="Crop table of the ground truth.")] = None,
    truth: Annotated[Path | None, InOption(help="Ground-truth Zarr.")] = None,
    labels: Annotated[Path | None, InOption(help="Labels of decode.")] = None,
    predictions: Annotated[Path | None, InOption(help="Probabilities of predict.")] = None,
    submission: Annotated[Path | None, InOption(help="The packed submission.")] = None,
    scores: Annotated[
        list[Path] | None, InOption(help="scores.json of score; the n-th belongs to the n-th --run.")
    ] = None,
    baseline: Annotated[Path | None, InOption(help="Another scores.json to compare with.")] = None,
    evaluation: Annotated[Path | None, InOption(help="JSON of evaluate.")] = None,
    pictures: Annotated[int, typer.Option(help="Pictures at most, each of one class in one crop.")] = 48,
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "Segmentation report",
) -> None:
    """Write one self-contained page: the run, its curves, slices of raw, ground truth and prediction, scores, objects,
    confusion, calibration. Every part is optional. Several runs are compared.

    Examples:

      pytc report report.html --run outputs/demo/run --scores outputs/demo/scores.json

      pytc report report.html --root data/phantom --crops data/phantom/test_crops.csv --truth data/phantom/truth.zarr
      --labels outputs/labels --scores scores.json

      pytc report compared.html --run runs/first --run runs/second
    """
    from connectomics.pages.report.sources import ReportOptions
    from connectomics.pipeline.report import named_sources
    from connectomics.pipeline.report import report as run

    sources = named_sources(
        runs=run_dir or (), scores=scores or (), data_root=root, crop_table=crops, truth=truth, labels=labels,
        probabilities=predictions, submission=submission, baseline_scores=baseline, evaluation=evaluation,
    )  # fmt: skip
    with terminal.counted("drawing") as advance:
        path = run(out=out, title=title, options=ReportOptions(max_pictures=pictures), progress=advance, **sources)
    print(f"{path}  {terminal.size(path.stat().st_size)}")
