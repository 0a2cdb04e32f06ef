"""Verbs around training: doctor, plan, train, study, runs, package."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from connectomics.cli import options as opt
from connectomics.cli import terminal
from connectomics.cli.options import InArgument, InOption, OutOption
from connectomics.errors import number_of, require_known

if TYPE_CHECKING:
    from connectomics.config import RunConfig
    from connectomics.pipeline.runs import Run
    from connectomics.progress import Progress

# text, because an override, which may hold a URL, can take its place
Config = Annotated[
    str | None, typer.Argument(help="Configuration file, such as tutorials/cellmap_cos7.yaml.", show_default=False)
]


def doctor(
    at: Annotated[Path, OutOption("--at", help="Folder for runs and the crop cache; its disk is measured.")] = Path(),
    s3: Annotated[
        str | None, typer.Option("--s3", help="Also check this bucket, s3://...; 'public' for the CellMap data.")
    ] = None,
    as_json: opt.AsJson = False,
) -> int:
    """Check versions, GPU, memory, limits, disk speed and S3, and advise. The exit status is 1 if a run would fail.

    Examples:

      pytc doctor

      pytc doctor --at /scratch --s3 public
    """
    from connectomics.pipeline.doctor import examine

    findings = []
    for finding in examine(at, s3=s3):
        findings.append(finding)
        if not as_json:
            mark = {"ok": " ", "note": "!", "problem": "X"}[finding.level]
            print(f"{mark} {finding.what}: {finding.found}" + (f"\n    -> {finding.advice}" if finding.advice else ""))
    problems = sum(f.level == "problem" for f in findings)
    if as_json:
        print(json.dumps([asdict(f) for f in findings], indent=1))
    else:
        notes = sum(f.level == "note" for f in findings)
        print(f"{number_of(problems, 'problem')}, {number_of(notes, 'thing')} that may cost time")
    return 1 if problems else 0


def train(
    config: Config = None,
    overrides: opt.Overrides = None,
    checkpoint: opt.Checkpoint = None,
    run_dir: Annotated[Path | None, OutOption(help="Run folder; default {output_dir}/{name}/version_N.")] = None,
    resume: opt.ResumeRun = False,
    fast_dev_run: opt.FastDevRun = False,
    list_models: Annotated[
        bool, typer.Option("--list-models", help="Print the architectures (with FILE also its plugins'), and stop.")
    ] = False,
) -> None:
    """Train a network.

    Examples:

      pytc train tutorials/cellmap_cos7.yaml data.batch_size=4 system.num_gpus=4

      pytc train tutorials/cellmap_cos7.yaml --checkpoint outputs/cellmap_cos7/version_0/checkpoints/last.ckpt

      pytc train tutorials/cellmap_cos7.yaml --run-dir runs/cos7 --resume
    """
    from connectomics.config import import_plugins, load_config

    if list_models:
        from connectomics.models.registry import list_models as models

        if config is not None:
            import_plugins(load_config(config, overrides).plugins)
        for name, text in models().items():
            print(f"{name:16} {text}")
        return
    if config is None:
        raise typer.BadParameter("give a configuration file (or --list-models)")
    composed, words = load_config(config, overrides), ["train", config, *(overrides or [])]
    with _running(composed, words, checkpoint, run_dir, resume) as (folder, advance):
        from connectomics.pipeline.train import train as run

        result = run(
            composed, folder, checkpoint=checkpoint, resume=resume, fast_dev_run=fast_dev_run, progress=advance
        )
    if fast_dev_run:
        print("the run works: one batch and one validation crop passed")
        return
    print(f"run folder: {folder}")
    if result.best_checkpoint is not None:
        print(f"best checkpoint: {result.best_checkpoint} ({result.monitor} {result.best})")
    if result.last_checkpoint is not None:
        print(f"last checkpoint: {result.last_checkpoint}")


def pretrain(
    config: Annotated[str, typer.Argument(help="Configuration file of the training to prepare.")],
    overrides: opt.Overrides = None,
    checkpoint: opt.Checkpoint = None,
    run_dir: Annotated[
        Path | None, OutOption(help="Run folder; default {output_dir}/{name}_pretrained/version_N.")
    ] = None,
    resume: opt.ResumeRun = False,
    fast_dev_run: opt.FastDevRun = False,
) -> None:
    """Pre-train the network of a configuration on raw, without labels: it reconstructs hidden voxels.

    Examples:

      pytc pretrain tutorials/lucchi.yaml --run-dir runs/raw training.max_cpu_minutes=30

      pytc pretrain tutorials/cellmap_mito.yaml --run-dir runs/raw pretraining.block_nm=[64,64,64] --resume

      pytc pretrain tutorials/lucchi.yaml pretraining.objective=denoise
    """
    from connectomics.config import load_config
    from connectomics.config.few_labels import pretraining_config

    composed = pretraining_config(load_config(config, overrides))
    words = ["pretrain", config, *(overrides or [])]
    with _running(composed, words, checkpoint, run_dir, resume) as (folder, advance):
        from connectomics.pipeline.pretrain import pretrain as run

        run(composed, folder, checkpoint=checkpoint, resume=resume, fast_dev_run=fast_dev_run, progress=advance)
    if fast_dev_run:
        print("the run works: one batch of training and one of validation passed")
        return
    print(f"run folder: {folder}\nto start with it: pytc train FILE.yaml model.weights={folder}")


@contextmanager
def _running(
    config: RunConfig, words: Sequence[str], checkpoint: Path | None, run_dir: Path | None, resume: bool
) -> Iterator[tuple[Path, Progress]]:
    """Yield the run folder and a progress; after Ctrl-C, print the command that resumes this very run."""
    from connectomics.cli import InterruptError
    from connectomics.errors import ConfigError
    from connectomics.lightning.run_state import latest_checkpoint
    from connectomics.machine import is_first_process
    from connectomics.pipeline.train import choose_run_dir

    if resume and run_dir is None:
        raise ConfigError("--resume needs the run folder; give --run-dir")
    folder = run_dir or choose_run_dir(config, checkpoint)
    try:
        with terminal.stages("decoding crops into the cache") as advance:
            yield folder, advance
    except KeyboardInterrupt:
        if not is_first_process():  # the first one says it
            raise InterruptError("") from None
        last = latest_checkpoint(folder)
        if last is None:
            raise InterruptError("interrupted before the first checkpoint: rerun the same command") from None
        if resume:
            raise InterruptError(f"interrupted; rerun the same command to resume from {last}") from None
        again = shlex.join(["pytc", *words, "--run-dir", str(folder), "--checkpoint", str(last)])
        raise InterruptError(f"interrupted; to resume: {again}") from None


def study(
    file: Annotated[Path, InArgument(help="Study file, such as tutorials/studies/phantom.yaml.")],
    overrides: opt.Overrides = None,
    out: Annotated[Path | None, OutOption(help="Folder; default {output_dir}/studies/{name of the file}.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Rows to train at the same time, each in a process.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the rows and their states; train nothing.")] = False,
    as_json: opt.AsJson = False,
) -> int:
    """Train each arm of a study file with each seed on each fold, and write one table and a page.

    Rerun the same command to resume: only missing rows are trained. The exit status is 1 if a row failed.

    Examples:

      pytc study tutorials/studies/phantom.yaml --dry-run

      pytc study tutorials/studies/lucchi_ablation.yaml --workers 2 dataset.data_root=data
    """
    from connectomics.pipeline.study import study as run_study

    with terminal.counted("training rows") if not dry_run else nullcontext(None) as advance:
        found = run_study(file, out, overrides=overrides or [], workers=workers, dry_run=dry_run, progress=advance)
    if as_json:
        print(json.dumps({"folder": str(found.folder), "arms": found.arms, "rows": found.rows}, indent=1))
        return 0 if dry_run else int(bool(found.unfinished))
    if dry_run:
        rows = [[r["arm"], r["seed"], r["fold"] or "-", r["state"], r["folder"]] for r in found.rows]
        terminal.table(["arm", "seed", "fold", "state", "folder"], rows)
        return 0
    first, *others = found.scores
    columns = ["arm", "state", "rows", first, "95 %", "- base", "95 %", *others, "last", "steps", "CPU s", "device s"]
    terminal.table(columns, [
        [
            arm["arm"], arm["state"], f"{arm['complete']}/{arm['rows']}", arm[first], _range(arm, first),
            arm.get(f"{first} - base"), _range(arm, f"{first} - base"), *[arm[name] for name in (*others, "last")],
            *[None if arm[name] is None else round(arm[name]) for name in ("steps", "cpu_s", "device_s")],
        ]
        for arm in found.arms
    ])  # fmt: skip
    for row in found.unfinished:
        print(f"{row['arm']}, seed {row['seed']} {row['fold']}: {row['state']} {row['error']}".rstrip())
    print(f"table: {found.folder / 'study.csv'}\npage: {found.folder / 'study.html'}")
    return int(bool(found.unfinished))


def _range(arm: Mapping[str, Any], name: str) -> str:
    low, high = arm.get(f"{name} low"), arm.get(f"{name} high")
    return "-" if low is None or high is None else f"{low:.4f} to {high:.4f}"


def runs(
    folders: Annotated[list[Path] | None, InArgument(help="Folders to search; default outputs.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Print the differences of these run folders.")] = False,
    as_json: opt.AsJson = False,
) -> None:
    """List runs with their state and best score, or compare some: configuration, scores, code.

    A run is finished, running, interrupted, failed or empty; unknown if it was started on another machine.

    Examples:

      pytc runs outputs

      pytc runs --compare outputs/cellmap_mito/version_0 outputs/cellmap_mito/version_1
    """
    from connectomics.pipeline.runs import differences, find_runs, open_run

    places = folders or [Path("outputs")]
    found = [open_run(place) for place in places] if compare else [run for p in places for run in find_runs(p)]
    apart = differences(found) if compare else {}
    if as_json:
        print(json.dumps({"runs": [_described(run) for run in found], "differences": apart}, indent=1))
        return
    if not found:
        print(f"no run below {', '.join(map(str, places))}")
        return
    if compare:
        _print_comparison(found, apart)
        return
    rows = [
        [
            run.folder, run.state.name, f"{run.started:%Y-%m-%d %H:%M}", run.epochs, run.monitor,
            terminal.number(run.best), run.config.get("model", {}).get("architecture"),
            ",".join(run.classes)[:30], _code(run),
        ]
        for run in found
    ]  # fmt: skip
    terminal.table(["run", "state", "started (UTC)", "epochs", "monitor", "best", "network", "classes", "code"], rows)
    for run in found:
        if run.state.note:
            print(f"{run.folder}: {run.state.name}: {run.state.note}")


def _print_comparison(found: list[Run], apart: dict[str, list[Any]]) -> None:
    names = [f"[{n}]" for n in range(1, len(found) + 1)]
    for name, run in zip(names, found, strict=True):
        print(f"{name} {run.folder} ({run.state.name}, {number_of(run.epochs, 'epoch')}, code {_code(run)})")
    settings = [[key, *[_short(value) for value in values]] for key, values in apart.items()]
    if settings:
        terminal.table(["setting", *names], settings, title="configuration")
    else:
        print("the configurations are the same")
    metrics = dict.fromkeys(name for run in found for name in run.metrics)
    rows = [
        [name, *["-" if name not in run.metrics else f"{run.metrics[name]:.4g}" for run in found]] for name in metrics
    ]
    rows.insert(0, ["best", *["-" if run.best is None else f"{run.best:.4g} {run.monitor}" for run in found]])
    terminal.table(["last value of", *names], rows, title="metrics")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _code(run: Run) -> str:
    return run.commit or str(run.environment.get("connectomics", "-"))


def _described(run: Run) -> dict[str, Any]:
    return {
        "folder": str(run.folder), "state": run.state.name, "note": run.state.note, "started": run.started.isoformat(),
        "epochs": run.epochs, "monitor": run.monitor, "best": run.best, "metrics": dict(run.metrics),
        "checkpoint": None if run.checkpoint is None else str(run.checkpoint), "environment": dict(run.environment),
    }  # fmt: skip


def package(
    source: Annotated[Path, InArgument(help="Checkpoint, or run folder (then its best checkpoint).")],
    out: Annotated[Path | None, OutOption(help="The file; default {run}.pytc.")] = None,
    scores: Annotated[Path | None, InOption(help="scores.json of score, to store its quality.")] = None,
    license_name: Annotated[str, typer.Option("--license", help="License of the weights, such as CC-BY-4.0.")] = "",
    description: Annotated[str, typer.Option(help="What it is for, in a sentence.")] = "",
    file_format: Annotated[str, typer.Option("--format", help="pytc, or bioimageio (BioImage Model Zoo).")] = "pytc",
    dataset: Annotated[str | None, typer.Option(help="bioimageio: training data set whose gray range to use.")] = None,
    author: Annotated[list[str] | None, typer.Option(help="bioimageio: name of an author; may be repeated.")] = None,
    overwrite: opt.Overwrite = False,
) -> None:
    """Pack a trained network into one file: weights, configuration, classes, voxel size, scores, and a test input with
    its output. `pytc predict --checkpoint FILE` and connectomics.load_model(FILE) verify it and use it.

    Examples:

      pytc package outputs/cellmap_mito/version_0 --license CC-BY-4.0

      pytc package outputs/cellmap_mito/version_0/checkpoints/best.ckpt --out mito.pytc --scores outputs/scores.json

      pytc package outputs/cellmap_mito/version_0 --format bioimageio --license CC-BY-4.0 --author "A. Name"
    """
    from connectomics.pipeline.package import write_package

    require_known("format", [file_format], ("pytc", "bioimageio"), "--format")
    if file_format == "bioimageio":
        from connectomics.pipeline.bioimageio import write_bioimageio

        path = write_bioimageio(
            source, out, dataset=dataset, authors=author or (), license_name=license_name, description=description,
            overwrite=overwrite,
        )  # fmt: skip
        print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")
        return
    made = write_package(
        source, out, scores=scores, license_name=license_name, description=description, overwrite=overwrite
    )
    shown = ("architecture", "parameters", "classes", "voxel_size", "validation", "license")
    print(json.dumps({key: made.about.get(key) for key in shown}))
    print(f"{made.path} ({made.path.stat().st_size / 1e6:.1f} MB)")
