"""Verbs for several configurations or runs at once: plan, merge."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from connectomics.cli import terminal
from connectomics.cli.options import Classes, Datasets, InOption, OutArgument, OutOption, Overwrite
from connectomics.errors import number_of

if TYPE_CHECKING:
    from connectomics.pipeline.challenge_plan import ChallengePlan
    from connectomics.pipeline.plan import Plans


def plan(
    root: Annotated[str, typer.Argument(help="Data root: a folder or s3:// URL.")],
    class_name: Annotated[
        list[str] | None, typer.Option("--class", help="Class to segment; may be repeated.", show_default=False)
    ] = None,
    dataset: Datasets = None,
    out: Annotated[Path, OutOption(help="Folder for plan_{N}nm.yaml.")] = Path(),
    minutes: Annotated[
        float | None,
        typer.Option(help="Minutes of a training (without a GPU: of all cores). Default: 120; on a GPU 300 epochs."),
    ] = None,
    trial: Annotated[
        bool, typer.Option("--trial/--no-trial", help="Run a training step: measures batch size, memory and hours.")
    ] = True,
    challenge: Annotated[
        bool, typer.Option("--challenge", help="Plan all 48 scored classes, with a Makefile from data to submission.")
    ] = False,
    crops: Annotated[str | None, typer.Option(help="--challenge: crop table; default: the root's own.")] = None,
    data_root: Annotated[Path | None, OutOption(help="--challenge: data root to fetch into if ROOT is remote.")] = None,
    from_atoms: Annotated[
        bool, typer.Option("--from-atoms", help="--challenge: predict groups as unions of their atoms where possible.")
    ] = False,
    gpu_memory: Annotated[
        float | None, typer.Option(help="--challenge: memory of the GPU to plan for, GB, if it is not in this machine.")
    ] = None,
    gpu_tflops: Annotated[float | None, typer.Option(help="--challenge: its sustained TFLOP/s in training.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Measure data and machine, and write configurations that train: one for each voxel size that classes need.

    Examples:

      pytc plan data --class mito --class er --class mt

      pytc plan data --class nuc --out plans --minutes 30 --no-trial

      pytc plan data --challenge --out plans --gpu-memory 80 --gpu-tflops 40
    """
    if challenge:
        from connectomics.pipeline.challenge_plan import gpu_of, plan_challenge

        gpu = gpu_of(gpu_memory, gpu_tflops)
        with terminal.counted("measuring") as advance:
            everything = plan_challenge(
                root, out=out, classes=class_name, datasets=dataset, crops=crops, data_root=data_root, minutes=minutes,
                from_atoms=from_atoms, gpu=gpu, trial=trial, overwrite=overwrite, progress=advance,
            )  # fmt: skip
        _print_challenge(everything, out)
        return
    if not class_name:
        raise typer.BadParameter("give --class, once or several times, or --challenge for all scored classes")
    if crops or data_root or from_atoms or gpu_memory or gpu_tflops:
        raise typer.BadParameter("--crops, --data-root, --from-atoms and --gpu-... belong to --challenge")
    from connectomics.pipeline.plan import plan as make_plan

    with terminal.counted("measuring") as advance:
        found = make_plan(
            root, class_name, out=out, datasets=dataset, minutes=minutes, trial=trial, overwrite=overwrite,
            progress=advance,
        )  # fmt: skip
    _print_plans(found)


def _print_plans(found: Plans) -> None:
    from connectomics.pipeline.plan import hours

    data, machine = found.data, found.machine
    rows = [
        [
            facts.name, facts.crops, f"{facts.present_um3:.3g}", f"{100 * facts.share:.3g} %",
            None if facts.chord_nm is None else f"{facts.chord_nm:.0f}",
            None if facts.test_nm is None else f"{facts.test_nm:g}",
        ]
        for facts in data.classes
    ]  # fmt: skip
    terminal.table(["class", "crops", "present um^3", "of known", "mean chord nm", "asked at nm"], rows)
    print(f"{number_of(data.crops, 'crop')}, {data.volume_um3:.3g} um^3; raw {data.raw_dtype}")
    gpu = machine.gpu or "no GPU"
    cores = number_of(machine.cores, "core")
    print(f"{cores}, {machine.memory / 1e9:.0f} GB, {gpu}, {machine.disk / 1e9:.0f} GB of disk free")
    for item, file in found.files.items():
        print(f"\n{item}: {', '.join(found.plans[item].classes)}")
        for reason in found.plans[item].reasons:
            print(f"  {reason}")
        step = found.plans[item]
        if step.step_seconds is not None and step.step_memory is not None:
            print(f"  a step takes {step.step_seconds:.2f} s and {step.step_memory / 1e9:.1f} GB")
        if (length := hours(step, machine.cores)) is not None:
            print(f"  about {length:.1f} h of training, without start-up")
        print(f"  pytc train {file}")
    absent = [facts.name for facts in data.classes if facts.chord_nm is None]
    if absent:
        print(f"\nleft out, because they are not present anywhere: {', '.join(absent)}")


def _print_challenge(found: ChallengePlan, out: Path) -> None:
    rows: list[list[object]] = []
    for name, plan in found.plans.plans.items():
        cost, unions = found.costs[name], found.unions.get(name, ())
        rows.append([
            name, len(plan.classes), len(unions), f"{cost.flops / 1e12:.3g}",
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
