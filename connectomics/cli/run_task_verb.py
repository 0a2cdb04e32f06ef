"""`pytc run-task`: a stored task, again or to its end, on any engine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from connectomics.cli import progress, show
from connectomics.cli.paths import InArgument
from connectomics.cli.run_verbs import RESUME_HELP

if TYPE_CHECKING:
    from connectomics.tasks.estimate import Estimate, StageEstimate


def run_task(
    file: Annotated[Path, InArgument(help="A task.json (or .yaml) that predict, decode or measure left.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="engine.key=value ..., as in engine.workers=4", show_default=False)
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default: a GPU where there is one.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Begin anew, also over the output of another task.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help=RESUME_HELP)] = False,
    accept_failed: Annotated[
        list[str] | None,
        typer.Option(help="Blocks that may fail, as in 12,20-35; stored as unknown.", show_default=False),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would take; nothing is done.")] = False,
) -> None:
    """Run a stored task: what is missing of its output is done, on the engine that is asked for.

    Examples:

      pytc run-task outputs/labels/jrc_cos7-1a.zarr/crop234/mito/task.json --dry-run

      pytc run-task task.json engine.name=dask engine.address=tcp://10.0.0.1:8786 --device cuda
    """
    from connectomics.cli.task_kinds import load_task
    from connectomics.config import load_config
    from connectomics.errors import ConfigError, MissingError

    foreign = next((o for o in overrides or [] if not o.lstrip("+").startswith("engine.")), None)
    if foreign is not None:
        raise ConfigError(f"run-task takes engine.key=value only, found {foreign!r}: all else is in the task's file")
    composed = load_config(None, overrides or [])
    engine = composed.engine
    task = load_task(file)

    from connectomics.tasks import run_task as run
    from connectomics.tasks.block_task import TASK_FILE
    from connectomics.tasks.failures import accepted_of, parse_accepted

    (accepted,) = accepted_of([task], parse_accepted(accept_failed or ()))
    must_be_begun = resume and not overwrite
    overwrite = task.starts_over(overwrite=overwrite, resume=resume)
    if not task.check(overwrite=overwrite):
        print(f"nothing to do: {task.name} is complete")
        return
    if must_be_begun and not (task.folder / TASK_FILE).exists():
        raise MissingError(f"--resume: nothing of {task.name} was begun at {task.folder}; leave it out to begin")
    if device is None:
        chosen = default_device()
    else:  # before anything is replaced
        from connectomics.pipeline.predict import chosen_device

        chosen = chosen_device(composed, device)
    if dry_run:
        from connectomics.tasks.estimate import estimate

        with show.stage("trying a block"):
            found = estimate([task], engine, chosen, overwrite=overwrite)
        show_estimate(found)
        return
    with progress.stages(task.name) as advance:
        run(task, engine, advance, device=chosen, overwrite=overwrite, accept=accepted)
    print(f"{task.name}: complete")


def default_device() -> str:
    """``cuda`` where this machine has a GPU, else ``cpu``."""
    from connectomics.tasks.pool import gpu_count

    return "cuda" if gpu_count() else "cpu"


def show_estimate(found: Estimate) -> None:
    """Print what tasks will take: a row for each stage, then the time."""
    if not found.stages:
        print("nothing to do: all outputs are complete")
        return
    header = ("stage", "blocks", "left", "reads", "writes", "memory a worker", "a block")
    show.table(header, [_row(stage) for stage in found.stages], title=f"{found.tasks} task(s)")
    if found.untimed:
        print(f"\nnot all is timed: {found.untimed}")
    total = found.worker_seconds
    if total is not None:
        some = "the timed stages" if any(s.worker_seconds is None for s in found.stages) else "all stages"
        shared = "" if found.workers in (None, 1) else f", {_time(total / (found.workers or 1))} of {found.workers}"
        print(f"\nabout {_time(total)} of one worker{shared}, for {some}, at the pace of the middle block here")


def _row(stage: StageEstimate) -> list[str]:
    memory = "-" if stage.cost is None else f"{_bytes(stage.cost.memory)} + model"
    if stage.held is not None:
        memory = f"{_bytes(stage.held)} held"
    return [
        stage.stage,
        "?" if stage.blocks is None else str(stage.blocks),
        "?" if stage.left is None else str(stage.left),
        _bytes(stage.read),
        _bytes(stage.written),
        memory,
        "-" if stage.seconds is None else f"{stage.seconds:.3g} s",
    ]


def _bytes(number: int | None) -> str:
    if number is None:
        return "-"
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number} B"


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.2g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{seconds / 3600:.3g} h"
