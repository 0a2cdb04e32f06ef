"""The verb runs: list what was trained, and compare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from connectomics.cli import show
from connectomics.cli.paths import InArgument

if TYPE_CHECKING:
    from connectomics.pipeline.runs import Run


def runs(
    folders: Annotated[list[Path] | None, InArgument(help="Folders to look in; default outputs.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="What sets these run folders apart.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List runs with their state and best score, or compare some: configuration, scores, code.

    A run is finished, running, interrupted, failed or empty; unknown where it was begun on another machine.

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
            str(run.folder),
            run.state.name,
            f"{run.started:%Y-%m-%d %H:%M}",
            str(run.epochs),
            run.monitor,
            "-" if run.best is None else f"{run.best:.4f}",
            str(run.config.get("model", {}).get("architecture", "-")),
            ",".join(run.config.get("dataset", {}).get("classes", []))[:30],
            _code(run),
        ]
        for run in found
    ]
    show.table(["run", "state", "started (UTC)", "epochs", "monitor", "best", "network", "classes", "code"], rows)
    for run in found:
        if run.state.note:
            print(f"{run.folder}: {run.state.name}: {run.state.note}")


def _print_comparison(found: list[Run], apart: dict[str, list[Any]]) -> None:
    names = [f"[{n}]" for n in range(1, len(found) + 1)]
    for name, run in zip(names, found, strict=True):
        print(f"{name} {run.folder} ({run.state.name}, {run.epochs} epochs, code {_code(run)})")
    settings = [[key, *[_short(value) for value in values]] for key, values in apart.items()]
    if settings:
        show.table(["setting", *names], settings, title="configuration")
    else:
        print("the configurations are the same")
    metrics = dict.fromkeys(name for run in found for name in run.metrics)
    rows = [
        [name, *["-" if name not in run.metrics else f"{run.metrics[name]:.4g}" for run in found]] for name in metrics
    ]
    rows.insert(0, ["best", *["-" if run.best is None else f"{run.best:.4g} {run.monitor}" for run in found]])
    show.table(["last value of", *names], rows, title="metrics")


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
