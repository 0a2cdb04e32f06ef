"""The verb demo: everything in one command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from connectomics.cli import terminal
from connectomics.cli.options import InOption, OutOption, Overwrite


def demo(
    out: Annotated[Path, OutOption(help="Folder for everything.")] = Path("outputs/demo"),
    data: Annotated[
        Path | None,
        InOption(help="A labeled data set of yours ({name}/{name}.zarr); default: the phantom.", show_default=False),
    ] = None,
    config: Annotated[
        Path | None, InOption(help="Configuration; default: tutorials/phantom.yaml, or the data set's own.")
    ] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value ...", show_default=False)] = None,
    preset: Annotated[str, typer.Option(help="Size of the phantom: tiny, small or large.")] = "small",
    overwrite: Overwrite = False,
) -> None:
    """Run everything: data, a short training, prediction, decoding, score, submission, report.

    With --data, each labeled crop is cut into a training, a validation and a test part.

    Examples:

      pytc demo --out outputs/demo

      pytc demo --data data/fib25-medulla --out outputs/fib25 training.max_epochs=20
    """
    from connectomics.pipeline.demo import prepare_demo

    with terminal.stages() as advance:
        made = prepare_demo(
            out, data=data, config=config, overrides=overrides or [], preset=preset, overwrite=overwrite,
            stage=terminal.stage, progress=advance,
        )  # fmt: skip
        scores, baseline = made.run()
    rows = [
        [name, terminal.number(getattr(scores.totals, key), 3), terminal.number(getattr(baseline.totals, key), 3)]
        for name, key in (("overall", "overall"), ("instances", "instance"), ("semantic", "semantic"))
    ]
    for name, found in scores.label_scores.items():
        rows.append([name, terminal.number(found.score, 3), terminal.number(baseline.label_scores[name].score, 3)])
    terminal.table([f"score (rules {scores.rules})", "network", "intensity threshold"], rows)
    print()
    for name in ("scores.json", "submission.zip", "report.html"):
        print(f"  {out / name}")
