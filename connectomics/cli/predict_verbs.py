"""Verbs of work in blocks: predict, run-task, and status and array of such work."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from connectomics.cli import options as opt
from connectomics.cli import terminal
from connectomics.cli.options import InOption, InPlaceArgument, OutOption, OutPlaceOption
from connectomics.cli.train_verbs import Config

if TYPE_CHECKING:
    from connectomics.config.schema import EngineConfig
    from connectomics.tasks import BlockTask
    from connectomics.tasks.estimate import Estimate, StageEstimate


def predict(
    config: Config = None,
    overrides: opt.Overrides = None,
    checkpoint: Annotated[
        list[Path] | None,
        InOption(help="Checkpoint, model package or run folder; if given several times, predictions are averaged."),
    ] = None,
    out: Annotated[Path, OutPlaceOption(help="Place of {dataset}.zarr/{crop}/{class}.")] = Path("outputs/predictions"),
    crops: Annotated[
        str | None,
        typer.Option(
            help="Crop table (.csv, .json), 'challenge', 'test' (the data root's own table), or 'val': crops that the "
            "checkpoint was not trained on; default: all annotated crops of the data root."
        ),
    ] = None,
    box: Annotated[
        str | None, typer.Option(help="DATASET:z0,y0,x0:z1,y1,x1 in nm, or DATASET for all of it; instead of crops.")
    ] = None,
    device: opt.Device = None,
    overwrite: opt.Overwrite = False,
    resume: opt.Resume = False,
    accept_failed: Annotated[
        list[str] | None,
        typer.Option(
            help="Blocks that may fail: CROP:12,40, or 12,40 of a single crop; stored as unknown. May be repeated.",
            show_default=False,
        ),
    ] = None,
    dry_run: opt.DryRun = False,
) -> None:
    """Predict crops, boxes or whole volumes by sliding window, block by block. Rerun the same command to resume.

    Without a configuration, the one of the checkpoint's run (or of the package) is used.

    Examples:

      pytc predict tutorials/cellmap_cos7.yaml --checkpoint best.ckpt --crops challenge --out outputs/predictions

      pytc predict tutorials/cellmap_cos7.yaml --checkpoint best.ckpt --box jrc_cos7-1a:0,0,0:800,800,800

      pytc predict tutorials/cellmap_cos7.yaml --checkpoint a.ckpt --checkpoint b.ckpt inference.tta=flips

      pytc predict --checkpoint runs/first --crops val --out outputs/val

      pytc predict tutorials/cellmap_cos7.yaml --checkpoint best.ckpt engine.workers=0 --dry-run

      pytc predict --checkpoint mito.pytc dataset.data_root=data --box my-cell
    """
    words = list(overrides or [])
    if config is not None and "=" in config:  # without a configuration the first override takes its place
        words = [config, *words]
        config = None
    if not checkpoint:
        raise typer.BadParameter("give --checkpoint: a checkpoint, a model package or a run folder")
    from connectomics.pipeline.predict import predict as run
    from connectomics.pipeline.predict import predict_tasks
    from connectomics.tasks.failures import parse_accepted

    accepted = parse_accepted(accept_failed or ())
    if dry_run:
        tasks, engine, where = predict_tasks(
            checkpoint, out=out, config=config, overrides=words, crops=crops, box=box, device=device
        )
        try_once(tasks, engine, overwrite, resume, where)
        return
    with terminal.stage("predicting"), terminal.stages() as advance:
        made = run(
            checkpoint, out=out, config=config, overrides=words, crops=crops, box=box, device=device,
            overwrite=overwrite, resume=resume, accept_failed=accepted, progress=advance,
        )  # fmt: skip
    for folder in made.written:
        print(folder)


def run_task(
    file: Annotated[Path, InPlaceArgument(help="A task.json (or .yaml) that predict, decode, measure or mesh wrote.")],
    overrides: opt.EngineOverrides = None,
    device: opt.Device = None,
    overwrite: opt.Overwrite = False,
    resume: opt.Resume = False,
    accept_failed: Annotated[
        list[str] | None,
        typer.Option(help="Blocks that may fail, such as 12,20-35; stored as unknown.", show_default=False),
    ] = None,
    dry_run: opt.DryRun = False,
) -> None:
    """Run a stored task on any engine: the blocks that are missing are done.

    Examples:

      pytc run-task outputs/labels/jrc_cos7-1a.zarr/crop234/mito/task.json --dry-run

      pytc run-task task.json engine.name=dask engine.address=tcp://10.0.0.1:8786 --device cuda

      pytc run-task task.json engine.share=true
    """
    from connectomics.pipeline.run_task import load_task, run_stored_task, task_device
    from connectomics.tasks.failures import parse_accepted

    engine, accepted = opt.engine_config(overrides), parse_accepted(accept_failed or ())
    task, place = load_task(file), task_device(device)
    if dry_run:
        try_once([task], engine, overwrite, resume, place)
        return
    with terminal.stages() as advance:
        said = run_stored_task(
            task, engine, device=place, overwrite=overwrite, resume=resume, accept=accepted, progress=advance
        )
    print(said)


def status(
    out: Annotated[Path, InPlaceArgument(help="Folder that predict, decode, measure or mesh writes, or one above it.")],
    as_json: opt.AsJson = False,
) -> None:
    """Print how far an output is: blocks done and failed, rate and time left. Only reads, and works on any machine that
    sees the disk, while others write. Arrays that decode decodes whole have no blocks and are not listed.

    Examples:

      pytc status outputs/predictions

      pytc status outputs/labels --json
    """
    from connectomics.pipeline.status import status as run

    found = run(out)
    if as_json:
        print(json.dumps([{**asdict(s), "state": s.state, "left_s": s.left_s} for s in found], indent=1))
        return
    rows = []
    for stage in found:
        rate = None if stage.rate is None else f"{stage.rate:.3g}"
        left = None if stage.left_s is None or stage.state == "complete" else terminal.duration(stage.left_s)
        rows.append([stage.output, stage.stage, stage.state, stage.blocks, stage.done, stage.failed, rate, left])
    terminal.table(["output", "stage", "state", "blocks", "done", "failed", "blocks/s", "time left"], rows)


def array(
    words: Annotated[list[str], typer.Argument(help="After --: predict, decode, measure, mesh or run-task ...")],
    jobs: Annotated[int, typer.Option(help="Number of jobs.")],
    queue: Annotated[str, typer.Option(help="slurm or lsf.")] = "slurm",
    time: Annotated[str, typer.Option(help="Time limit of a job, hours:minutes.")] = "4:00",
    option: Annotated[
        list[str] | None, typer.Option(help="Further directive, such as --gres=gpu:1; may be repeated.")
    ] = None,
    logs: Annotated[Path, OutOption(help="Folder for the script and a log of each job.")] = Path("jobs"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the script; submit nothing.")] = False,
) -> None:
    """Run a command as a job array: equal jobs that share its blocks, without a process that leads them. A job that
    reaches its time limit goes back into the queue.

    Examples:

      pytc array --jobs 16 --option=--gres=gpu:1 --dry-run -- predict tutorials/cellmap_cos7.yaml --checkpoint best.ckpt

      pytc array --jobs 32 --queue lsf --time 2:00 -- decode outputs/predictions outputs/labels
    """
    from connectomics.pipeline.job_array import array_script, submit_array

    script = array_script(words, queue, jobs, time=time, options=option or (), logs=logs)
    print(script if dry_run else submit_array(script, queue, logs), end="" if dry_run else "\n")


def try_once(
    tasks: Sequence[BlockTask], engine: EngineConfig, overwrite: bool, resume: bool, device: str = "cpu"
) -> None:
    """Print the cost of tasks, from one block that is tried."""
    from connectomics.tasks.estimate import estimate

    with terminal.stage("trying a block"):
        found = estimate(tasks, engine, device, overwrite=overwrite, resume=resume)
    show_estimate(found)


def show_estimate(found: Estimate) -> None:
    """Print the cost of tasks: a row for each stage, then the time."""
    if not found.stages:
        print("nothing to do: all outputs are complete")
        return
    header = ("stage", "blocks", "left", "reads", "writes", "memory per worker", "per block")
    terminal.table(header, [_row(stage) for stage in found.stages], title=f"{found.tasks} task(s)")
    if found.untimed:
        print(f"\nnot all stages are timed: {found.untimed}")
    total = found.worker_seconds
    if total is not None:
        some = "the timed stages" if any(s.worker_seconds is None for s in found.stages) else "all stages"
        workers = found.workers or 1
        shared = "" if workers == 1 else f", {terminal.duration(total / workers)} with {workers} workers"
        print(f"\nabout {terminal.duration(total)} of one worker{shared}, for {some}, judging from the middle block")


def _row(stage: StageEstimate) -> list[object]:
    memory = "-" if stage.cost is None else f"{terminal.size(stage.cost.memory)} + model"
    if stage.held is not None:
        memory = f"{terminal.size(stage.held)} held"
    blocks, left = ("?" if number is None else number for number in (stage.blocks, stage.left))
    seconds = None if stage.seconds is None else f"{stage.seconds:.3g} s"
    return [stage.stage, blocks, left, terminal.size(stage.read), terminal.size(stage.written), memory, seconds]
