"""Verbs of labels and instances: decode, apply-edits, measure, mesh."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from connectomics.cli import options as opt
from connectomics.cli import terminal
from connectomics.cli.options import InArgument, InOption, InPlaceArgument, OutOption, OutPlaceArgument, OutPlaceOption
from connectomics.cli.predict_verbs import show_estimate, try_once


def decode(
    predictions: Annotated[Path, InPlaceArgument(help="Folder that predict wrote.")],
    out: Annotated[Path, OutPlaceArgument(help="Folder for the labels, in the same layout.")],
    config: Annotated[Path | None, InOption(help="Its decoding is used (RUN/config.yaml); default: by class.")] = None,
    class_name: opt.Classes = None,
    overrides: opt.Overrides = None,
    overwrite: opt.Overwrite = False,
    resume: opt.Resume = False,
    dry_run: opt.DryRun = False,
) -> None:
    """Turn probabilities into labels: thresholds, and instances by connected components, watershed or affinities.
    Large arrays are decoded block by block on the engine. Rerun the same command to resume.

    Examples:

      pytc decode outputs/predictions outputs/labels --config runs/first/config.yaml

      pytc decode outputs/predictions outputs/labels --class mito decoding.classes.mito.threshold=0.6

      pytc decode outputs/predictions outputs/labels engine.workers=8 --dry-run
    """
    from connectomics.config import load_config
    from connectomics.pipeline.decode import decode as run
    from connectomics.pipeline.decode import decode_estimate

    composed = load_config(config, overrides)
    if dry_run:
        with terminal.stage("trying a block"):
            text, found = decode_estimate(
                predictions, out, composed, classes=class_name, overwrite=overwrite, resume=resume
            )
        print(text)
        if found is not None:
            show_estimate(found)
        return
    with terminal.stage("decoding"), terminal.stages() as advance:
        made = run(
            predictions, out=out, config=composed, classes=class_name, overwrite=overwrite, resume=resume,
            progress=advance,
        )  # fmt: skip
    for location in made.written:
        print(location)


def apply_edits(
    labels: Annotated[Path, InArgument(help="Folder of labels that decode wrote.")],
    edits: Annotated[Path, InArgument(help="Log of edits, one (JSON) a line.")],
    out: Annotated[Path, OutOption(help="Folder for the edited labels.")],
    overrides: opt.EngineOverrides = None,
    undo: Annotated[int, typer.Option(help="Leave out so many of the last edits.")] = 0,
    overwrite: opt.Overwrite = False,
    resume: opt.Resume = False,
    dry_run: opt.DryRun = False,
    as_json: opt.AsJson = False,
) -> None:
    """Apply a log of edits (merge, split, delete, reclassify) to instances, block by block. The labels themselves stay;
    a shorter log undoes the last edits.

    Examples:

      pytc apply-edits outputs/labels edits.jsonl --out outputs/proofread

      pytc apply-edits outputs/labels edits.jsonl --out outputs/proofread --undo 1 --overwrite
    """
    from connectomics.pipeline.apply_edits import edit_tasks, run_edits

    engine = opt.engine_config(overrides)
    tasks = edit_tasks(labels, edits, out, undo=undo)
    if dry_run:
        try_once(tasks, engine, overwrite, resume)
        return
    with terminal.stages() as advance:
        done = run_edits(tasks, engine, overwrite=overwrite, resume=resume, progress=advance)
    if as_json:
        print(json.dumps(done, indent=1))
        return
    keys = ("line", "op", "dataset", "crop", "class", "ids", "to", "new", "voxels")
    terminal.table(keys, [[" ".join(map(str, e[k])) if k == "ids" else e.get(k) for k in keys] for e in done])
    print(out)


def measure(
    labels: Annotated[Path, InPlaceArgument(help="Folder of labels that decode wrote.")],
    out: Annotated[Path, OutPlaceOption(help="Folder for {class}.csv and contacts_{A}_{B}_{NM}nm.csv.")],
    overrides: opt.EngineOverrides = None,
    class_name: opt.Classes = None,
    dataset: opt.Datasets = None,
    crop: opt.Crops = None,
    contact: Annotated[
        list[str] | None,
        typer.Option(
            help="A:B:NM, where the surface of A's instances lies within NM nm (default 30) of B; may be repeated.",
            show_default=False,
        ),
    ] = None,
    table_format: Annotated[str, typer.Option("--format", help="csv or parquet.")] = "csv",
    overwrite: opt.Overwrite = False,
    resume: opt.Resume = False,
    dry_run: opt.DryRun = False,
    as_json: opt.AsJson = False,
) -> None:
    """Measure every instance: volume, surface, sphericity, centroid and box in nm, and contacts between classes. Works
    block by block; rerun the same command to resume. Semantic classes count as one instance per crop.

    Examples:

      pytc measure outputs/labels --out outputs/measures

      pytc measure outputs/labels --class mito --contact mito:er:30 --out outputs/measures

      pytc measure outputs/labels --out outputs/measures --format parquet engine.workers=8
    """
    from connectomics.morphology import ContactSpec
    from connectomics.pipeline.measure import measure_labels, measure_tasks

    engine = opt.engine_config(overrides)
    specs = [ContactSpec.parse(text) for text in contact or ()]
    tasks = measure_tasks(
        labels, out, classes=class_name, datasets=dataset, crops=crop, contacts=specs, table_format=table_format
    )
    if dry_run:
        try_once(tasks, engine, overwrite, resume)
        return
    with terminal.counted("measuring") as advance:
        made = measure_labels(tasks, engine=engine, overwrite=overwrite, resume=resume, progress=advance)
    found = {"labels": str(labels), **made}
    if as_json:
        print(json.dumps(found, indent=1))
        return
    _print_measures(found)


def _print_measures(found: Mapping[str, Any]) -> None:
    header = ["class", "kind", "crops", "instances", "at border", "median nm3", "total nm3", "surface nm2"]
    keys = ("class", "kind", "crops", "instances", "touch_border", "median_volume_nm3", "volume_nm3", "surface_nm2")
    terminal.table(header, [[row[key] for key in keys] for row in found["classes"]])
    if found["contacts"]:
        print()
        header = ["contact", "crops", "instances", "with contact", "pairs", "contact nm2", "of surface"]
        rows = []
        for row in found["contacts"]:
            share = "-" if row["surface_nm2"] == 0 else f"{row['contact_nm2'] / row['surface_nm2']:.1%}"
            numbers = [row[key] for key in ("crops", "instances", "with_contact", "pairs", "contact_nm2")]
            rows.append([f"{row['of']}:{row['to']}:{row['nm']:g}", *numbers, share])
        terminal.table(header, rows)
    if any(row["kind"] == "semantic" for row in found["classes"]):
        print("\nsemantic classes have no instances: each is measured as one per crop")
    for row in [*found["classes"], *found["contacts"]]:
        print(row["file"])


def mesh(
    labels: Annotated[Path, InPlaceArgument(help="Folder of labels that decode wrote.")],
    out: Annotated[Path, OutPlaceArgument(help="Folder for {dataset}/{crop}/{class}/{id}.ply.")],
    class_name: Annotated[str, typer.Option("--class", help="Class to mesh.")],
    overrides: opt.EngineOverrides = None,
    ids: Annotated[list[int] | None, typer.Option("--id", help="Only this instance; may be repeated.")] = None,
    dataset: opt.Datasets = None,
    crop: opt.Crops = None,
    file_format: Annotated[
        str, typer.Option("--format", help="ply, obj, or for neuroglancer precomputed or multilod (levels of detail).")
    ] = "ply",
    simplify: Annotated[int, typer.Option(help="Keep one triangle of so many, as far as the error allows.")] = 1,
    max_error_nm: Annotated[
        float | None, typer.Option(help="How far simplification may move the surface; default: a voxel.")
    ] = None,
    max_vertices: Annotated[
        int, typer.Option(help="Instances with more vertices get larger voxels; 150 bytes of memory per vertex.")
    ] = 20_000_000,
    overwrite: opt.Overwrite = False,
    resume: opt.Resume = False,
    dry_run: opt.DryRun = False,
) -> None:
    """Write a closed surface of every instance (world coordinates in nm, x y z), in bounded memory. Rerun the same
    command to resume. Needs pip install 'connectomics-cellmap[mesh]'.

    Examples:

      pytc mesh outputs/labels outputs/meshes --class mito --simplify 10

      pytc mesh outputs/labels outputs/meshes --class mito --crop crop234 --id 3 --id 7 --format precomputed
    """
    from connectomics.pipeline.mesh import mesh_labels, mesh_tasks

    engine = opt.engine_config(overrides)
    tasks = mesh_tasks(
        labels, out, class_name, datasets=dataset, crops=crop, ids=ids or (), file_format=file_format,
        simplify=simplify, max_error_nm=max_error_nm, max_vertices=max_vertices,
    )  # fmt: skip
    if dry_run:
        try_once(tasks, engine, overwrite, resume)
        return
    with terminal.counted("meshing") as advance:
        found = mesh_labels(tasks, engine=engine, overwrite=overwrite, resume=resume, progress=advance)
    for done in found:
        larger = f", {done.coarser} with larger voxels (more than {max_vertices} vertices)" if done.coarser else ""
        print(f"{done.folder}: {done.number} meshes{larger}")
