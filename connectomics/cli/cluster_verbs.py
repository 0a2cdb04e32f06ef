"""Verbs for large volumes: status, array."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from connectomics.cli import options as opt
from connectomics.cli import terminal
from connectomics.cli.options import InPlaceArgument, OutOption


def status(
    out: Annotated[Path, InPlaceArgument(help="Folder that predict, decode, measure or mesh writes, or one above it.")],
    as_json: opt.AsJson = False,
) -> None:
    """Print how far an output is: blocks done and failed, rate and forecast. Only reads, and works on any machine that
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
