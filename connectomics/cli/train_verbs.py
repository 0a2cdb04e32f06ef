"""Verbs around training: doctor, plan, train, study, runs, package."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from connectomics.cli import terminal
from connectomics.cli.options import AsJson, Datasets, InArgument, InOption, OutOption, Overrides, Overwrite

if TYPE_CHECKING:
    from connectomics.pipeline.plan import Plans
    from connectomics.pipeline.runs import Run

# text, because an override, which may hold a URL, can take its place
Config = Annotated[
    str | None, typer.Argument(help="Configuration file, such as tutorials/cellmap_cos7.yaml.", show_default=False)
]


def doctor(
    at: Annotated[Path, OutOption("--at", help="Folder for runs and the crop cache; its disk is measured.")] = Path(),
    s3: Annotated[
        str | None, typer.Option("--s3", help="Also check this bucket, s3://...; 'public' for the CellMap data.")
    ] = None,
    as_json: AsJson = False,
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
        print(json.dumps([f.to_dict() for f in findings], indent=1))
    else:
        notes = sum(f.level == "note" for f in findings)
        print(f"{problems} problems, {notes} things that may cost time")
    return 1 if problems else 0


def plan(
    root: Annotated[str, typer.Argument(help="Data root: a folder or s3:// URL.")],
    class_name: Annotated[
        list[str] | None, typer.Option("--class", help="Class to segment; may be repeated.", show_default=False)
    ] = None,
    dataset: Datasets = None,
    out: Annotated[Path, OutOption(help="Folder for plan_{N}nm.yaml.")] = Path(),
    minutes: Annotated[
        float | None,
        typer.Option(help="Time of a training; without a GPU of all cores together. Default: 120 without a GPU."),
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
        from connectomics.cli.challenge_verbs import plan_all

        plan_all(
            root, out=out, classes=class_name, datasets=dataset, crops=crops, data_root=data_root, minutes=minutes,
            from_atoms=from_atoms, gpu=(gpu_memory, gpu_tflops), trial=trial, overwrite=overwrite,
        )  # fmt: skip
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
            facts.name, str(facts.crops), f"{facts.present_um3:.3g}", f"{100 * facts.share:.2g} %",
            "-" if facts.chord_nm is None else f"{facts.chord_nm:.0f}",
            "-" if facts.test_nm is None else f"{facts.test_nm:g}",
        ]
        for facts in data.classes
    ]  # fmt: skip
    terminal.table(["class", "crops", "present um^3", "of known", "mean chord nm", "asked at nm"], rows)
    low, middle, high = data.gray
    print(
        f"{data.crops} crops, {data.volume_um3:.3g} um^3; raw {data.raw_dtype}, {low:.0f} / {middle:.0f} / {high:.0f}"
    )
    gpu = machine.gpu or "no GPU"
    print(f"{machine.cores} cores, {machine.memory / 1e9:.0f} GB, {gpu}, {machine.disk / 1e9:.0f} GB of disk free")
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


def train(
    config: Config = None,
    overrides: Overrides = None,
    checkpoint: Annotated[Path | None, InOption(help="Resume from this checkpoint.")] = None,
    run_dir: Annotated[Path | None, OutOption(help="Run folder; default {output_dir}/{name}/version_N.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume from the run folder's last checkpoint; start if there is none.")
    ] = False,
    fast_dev_run: Annotated[bool, typer.Option("--fast-dev-run", help="Run one batch of everything.")] = False,
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
            import_plugins(load_config(config, overrides or []).plugins)
        for name, text in models().items():
            print(f"{name:16} {text}")
        return
    if config is None:
        raise typer.BadParameter("give a configuration file (or --list-models)")
    from connectomics.errors import ConfigError

    if resume and run_dir is None:
        raise ConfigError("--resume needs the run folder; give --run-dir")
    composed = load_config(config, overrides or [])
    from connectomics.pipeline.train import choose_run_dir
    from connectomics.pipeline.train import train as run

    folder = run_dir or choose_run_dir(composed, checkpoint)
    command = ["pytc", "train", str(config), *(overrides or [])]
    decoding = terminal.stages("decoding crops into the cache")
    with explaining_how_to_resume(command, folder, resume), decoding as advance:
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


@contextmanager
def explaining_how_to_resume(command: Sequence[str], folder: Path, resume: bool) -> Iterator[None]:
    """After Ctrl-C, print the command that resumes this very run."""
    from connectomics.cli import InterruptError
    from connectomics.lightning.devices import is_first_process
    from connectomics.lightning.run_state import latest_checkpoint

    try:
        yield
    except KeyboardInterrupt:
        if not is_first_process():  # the first one says it
            raise InterruptError("") from None
        last = latest_checkpoint(folder)
        if last is None:
            raise InterruptError("interrupted before the first checkpoint: rerun the same command") from None
        if resume:
            raise InterruptError(f"interrupted; rerun the same command to resume from {last}") from None
        again = shlex.join([*command, "--run-dir", str(folder), "--checkpoint", str(last)])
        raise InterruptError(f"interrupted; to resume: {again}") from None


def study(
    file: Annotated[Path, InArgument(help="Study file, such as tutorials/studies/phantom.yaml.")],
    overrides: Overrides = None,
    out: Annotated[Path | None, OutOption(help="Folder; default {output_dir}/studies/{name of the file}.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Rows to train at the same time, each in a process.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the rows and their states; train nothing.")] = False,
    as_json: AsJson = False,
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
        rows = [[r["arm"], str(r["seed"]), r["fold"] or "-", r["state"], r["folder"]] for r in found.rows]
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
    as_json: AsJson = False,
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
            str(run.folder), run.state.name, f"{run.started:%Y-%m-%d %H:%M}", str(run.epochs), run.monitor,
            terminal.number(run.best), str(run.config.get("model", {}).get("architecture", "-")),
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
        print(f"{name} {run.folder} ({run.state.name}, {run.epochs} epochs, code {_code(run)})")
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
    git = run.environment.get("git")
    if not git:
        return str(run.environment.get("connectomics", "-"))
    return git["commit"][:8] + ("+" if git["changed"] else "")


def _described(run: Run) -> dict[str, Any]:
    return {
        "folder": str(run.folder),
        "state": run.state.name,
        "note": run.state.note,
        "started": run.started.isoformat(),
        "epochs": run.epochs,
        "monitor": run.monitor,
        "best": run.best,
        "metrics": dict(run.metrics),
        "checkpoint": None if run.checkpoint is None else str(run.checkpoint),
        "environment": dict(run.environment),
    }
