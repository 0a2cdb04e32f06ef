"""The verb that chooses decoding parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from connectomics.cli import progress, show
from connectomics.cli.paths import InArgument, InOption, OutOption
from connectomics.cli.run_verbs import Overrides


def tune(
    predictions: Annotated[Path, InArgument(help="Folder that predict wrote for annotated crops.")],
    root: Annotated[str, typer.Argument(help="Data root with the truth of those crops.")],
    overrides: Overrides = None,
    config: Annotated[
        Path | None,
        InOption(help="Configuration: decoding.default and decoding.classes to begin with, score.rules."),
    ] = None,
    out: Annotated[Path, OutOption(help="Folder for decoding.yaml, tuning.json, tuning.png and the trials.")] = Path(
        "outputs/tuned"
    ),
    class_name: Annotated[list[str] | None, typer.Option("--class", help="Only this class; may be repeated.")] = None,
    trials: Annotated[int, typer.Option(help="Trials of a class, those of earlier runs counted.")] = 60,
    minutes: Annotated[float | None, typer.Option(help="Begin no trial after so many minutes.")] = None,
    seed: Annotated[int, typer.Option(help="Of the search.")] = 0,
) -> None:
    """Choose thresholds, minimum sizes and seeds of every class on validation crops, for the challenge's score.

    A search that was stopped goes on where it was. Read the result with decode --config OUT/decoding.yaml.

    Examples:

      pytc tune outputs/val data/phantom --config tutorials/phantom.yaml --out outputs/tuned

      pytc tune outputs/val data/phantom --class mito --trials 200 --minutes 30 decoding.classes.mito.connectivity=6
    """
    from connectomics.config import load_config
    from connectomics.decoding.parameters import decode_parameters
    from connectomics.decoding.prediction import find_arrays
    from connectomics.metrics.challenge.rules import get_rules, trust
    from connectomics.pipeline.tune import tune as search

    composed = load_config(config, overrides or ())
    there = sorted({name for _, _, name in find_arrays(predictions)})
    base = decode_parameters(there, composed.decoding.default, composed.decoding.classes)
    seconds = None if minutes is None else 60 * minutes
    with progress.counted("tuning") as advance:
        result = search(
            predictions, root, out, classes=class_name, trials=trials, seconds=seconds, seed=seed, base=base,
            rules=composed.score.rules, progress=advance,
        )  # fmt: skip
    header = ("class", "measure", "crops", "trials", "base", "tuned", "threshold", "method", "min nm^3")
    rows = [
        (
            name, t.measure, str(len(t.crops)), str(len(t.trials) or "-"), f"{t.base_score:.4f}", f"{t.best_score:.4f}",
            f"{t.best.threshold:.4g}", t.best.method, f"{t.best.min_size_nm3:.4g}",
        )
        for name, t in result.items()
    ]  # fmt: skip
    verified = get_rules(composed.score.rules)
    said = f"rules {verified.version}, {trust(verified.verified)}"
    show.table(header, rows, f"Tuned on these crops, known voxels only, {said}; other crops will score lower")
    left_out = sorted(set(class_name or there) - set(result))
    if left_out:
        print(f"no annotated voxel of {', '.join(left_out)}: left as they were")
    for name in ("decoding.yaml", "tuning.json", "tuning.png"):
        print(out / name)
