"""Verbs for several runs at once: plan --challenge, merge."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from connectomics.cli import terminal
from connectomics.cli.options import Classes, InOption, OutArgument, Overwrite


def plan_all(root: str, *, out: Path, gpu: tuple[float | None, float | None], **options: Any) -> None:
    """Run ``pytc plan --challenge`` and print what was planned; ``options`` are those of `plan_challenge`."""
    from connectomics.pipeline.challenge_plan import gpu_of, plan_challenge

    with terminal.counted("measuring") as advance:
        found = plan_challenge(root, out=out, gpu=gpu_of(*gpu), progress=advance, **options)
    rows = []
    for name, plan in found.plans.plans.items():
        cost, unions = found.costs[name], found.unions.get(name, ())
        rows.append([
            name, str(len(plan.classes)), str(len(unions)), f"{cost.flops / 1e12:.3g}",
            terminal.number(cost.train_hours, 2), terminal.number(cost.predict_hours, 2), cost.by,
        ])  # fmt: skip
    header = ["configuration", "classes", "unions", "TFLOP a step", "train h", "predict h", "hours from"]
    terminal.table(header, rows)
    for name, unions in found.unions.items():
        print(f"{name} predicts as unions of atoms: {', '.join(unions)}")
    if found.absent:
        print(f"left out, because they are not present anywhere: {', '.join(found.absent)}")
    print(f"run book: make -C {out}  ({found.run_book})")


def merge(
    out: Annotated[Path, OutArgument(help="submission.zip, or a folder for merged probabilities only.")],
    sources: Annotated[
        list[str],
        typer.Argument(help="Folders that predict wrote, or run folders (predicted first); then key=value ..."),
    ],
    tuned: Annotated[
        list[Path] | None, InOption(help="Folder of tune, one for each source: validation scores and parameters.")
    ] = None,
    crops: Annotated[
        str | None, typer.Option(help="Crop table (.csv, .json), or 'challenge' (default for a submission).")
    ] = None,
    class_name: Classes = None,
    average: Annotated[int, typer.Option(help="Predictions to average for each class, the best by score.")] = 1,
    config: Annotated[
        Path | None, InOption(help="Configuration whose decoding replaces the tuned parameters; engine.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Make one submission of several runs: for each class the best prediction by validation score, or the mean of the
    best, also across voxel sizes; decoded, packed and checked. Rerun the same command to resume.

    Examples:

      pytc merge submission.zip test/plan_32nm test/plan_8nm --tuned tuned/plan_32nm --tuned tuned/plan_8nm

      pytc merge submission.zip runs/first runs/second --crops data/phantom/test_crops.csv

      pytc merge merged/val val/a val/b --tuned tuned/a --tuned tuned/b --average 2
    """
    from connectomics.config import import_plugins, load_config
    from connectomics.pipeline.merge import merge as run

    folders = [word for word in sources if "=" not in word or Path(word).exists()]
    composed = load_config(config, [word for word in sources if word not in folders])
    import_plugins(composed.plugins)
    with terminal.stage("merging"), terminal.stages() as advance:
        made = run(
            folders, out=out, tuned=tuned or (), crops=crops, classes=class_name, average=average, config=composed,
            overwrite=overwrite, progress=advance,
        )  # fmt: skip
    rows = [
        [
            name,
            " + ".join(map(str, choice.used)),
            choice.measure or "-",
            terminal.number(max(choice.scores.values(), default=None)),
        ]
        for name, choice in made.choices.items()
    ]
    terminal.table(["class", "from", "validation", "best"], rows)
    if made.submission is None:
        print(made.probabilities.folder)
        return
    print(made.submission.summary())
    if made.submission.has_errors:
        raise typer.Exit(1)
