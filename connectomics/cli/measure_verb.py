"""The verb measure: instances and contacts of labels in numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from connectomics.cli import progress, show
from connectomics.cli.paths import InArgument, OutOption
from connectomics.cli.run_verbs import RESUME_HELP

if TYPE_CHECKING:
    from connectomics.config.schema import EngineConfig
    from connectomics.tasks import BlockTask

EngineOverrides = Annotated[
    list[str] | None, typer.Argument(help="engine.key=value ..., as in engine.workers=8", show_default=False)
]


def measure(
    labels: Annotated[Path, InArgument(help="Folder of labels that decode wrote.")],
    out: Annotated[Path, OutOption(help="Folder for {class}.csv and contacts_{A}_{B}_{NM}nm.csv.")],
    overrides: EngineOverrides = None,
    class_name: Annotated[list[str] | None, typer.Option("--class", help="Only this class; may be repeated.")] = None,
    dataset: Annotated[list[str] | None, typer.Option(help="Only this data set; may be repeated.")] = None,
    crop: Annotated[list[str] | None, typer.Option(help="Only this crop; may be repeated.")] = None,
    contact: Annotated[
        list[str] | None,
        typer.Option(
            help="A:B:NM, where the surface of A's instances lies within NM nm (default 30) of B; may be repeated.",
            show_default=False,
        ),
    ] = None,
    table_format: Annotated[str, typer.Option("--format", help="csv or parquet.")] = "csv",
    overwrite: Annotated[bool, typer.Option(help="Replace tables of other labels, and begin anew.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help=RESUME_HELP)] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would take; nothing is done.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Measure every instance of labels: volume, surface, sphericity, centroid and box in nm, and contacts between
    classes. Works block by block, and goes on where it was killed; semantic classes count as one instance a crop.

    Examples:

      pytc measure outputs/labels --out outputs/measures

      pytc measure outputs/labels --class mito --contact mito:er:30 --out outputs/measures

      pytc measure outputs/labels --out outputs/measures --format parquet engine.workers=8
    """
    from connectomics.morphology import ContactSpec
    from connectomics.pipeline.measure import measure_tables, measure_tasks

    engine = engine_config(overrides)
    specs = [ContactSpec.parse(text) for text in contact or ()]
    tasks = measure_tasks(
        labels, out, classes=class_name, datasets=dataset, crops=crop, contacts=specs, table_format=table_format
    )
    if dry_run:
        show_estimate(tasks, engine, overwrite, resume)
        return
    with progress.counted("measuring") as advance:
        made = measure_tables(tasks, engine=engine, overwrite=overwrite, resume=resume, progress=advance)
    found = {"labels": str(labels), **made}
    if as_json:
        print(json.dumps(found, indent=1))
        return
    _print(found)


def engine_config(overrides: Sequence[str] | None) -> EngineConfig:
    """Who works, from ``engine.key=value``; `ConfigError` for a key of another part, which these verbs do not read."""
    from connectomics.config import load_config
    from connectomics.errors import ConfigError

    for override in overrides or ():
        if not override.startswith("engine."):
            raise ConfigError(f"only engine.key=value can be set here, found {override!r}; see --help for the options")
    return load_config(None, overrides or ()).engine


def show_estimate(tasks: Sequence[BlockTask], engine: EngineConfig, overwrite: bool, resume: bool) -> None:
    """Print what tasks would take, from one block that is tried."""
    from connectomics.cli import run_task_verb
    from connectomics.tasks.estimate import estimate

    with show.stage("trying a block"):
        found = estimate(tasks, engine, overwrite=overwrite, resume=resume)
    run_task_verb.show_estimate(found)


def _print(found: Mapping[str, Any]) -> None:
    rows = [
        [
            row["class"],
            row["kind"],
            str(row["crops"]),
            str(row["instances"]),
            str(row["touch_border"]),
            "-" if row["median_volume_nm3"] is None else f"{row['median_volume_nm3']:.4g}",
            f"{row['volume_nm3']:.4g}",
            f"{row['surface_nm2']:.4g}",
        ]
        for row in found["classes"]
    ]
    header = ["class", "kind", "crops", "instances", "at border", "median nm3", "total nm3", "surface nm2"]
    show.table(header, rows)
    if found["contacts"]:
        header = ["contact", "crops", "instances", "with contact", "pairs", "contact nm2", "of surface"]
        rows = [
            [
                f"{row['of']}:{row['to']}:{row['nm']:g}",
                str(row["crops"]),
                str(row["instances"]),
                str(row["with_contact"]),
                str(row["pairs"]),
                f"{row['contact_nm2']:.4g}",
                "-" if row["surface_nm2"] == 0 else f"{row['contact_nm2'] / row['surface_nm2']:.1%}",
            ]
            for row in found["contacts"]
        ]
        print()
        show.table(header, rows)
    if any(row["kind"] == "semantic" for row in found["classes"]):
        print("\nsemantic classes have no instances: each is measured as one a crop")
    for row in [*found["classes"], *found["contacts"]]:
        print(row["file"])
