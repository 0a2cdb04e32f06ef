"""Verbs that work block by block: predict, decode, measure, mesh, run-task."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from connectomics.cli import options as opt
from connectomics.cli import terminal
from connectomics.cli.options import InOption, InPlaceArgument, OutPlaceArgument, OutPlaceOption
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
            "checkpoint was not trained on; default: all crops of the data root."
        ),
    ] = None,
    box: Annotated[
        str | None, typer.Option(help="DATASET:z0,y0,x0:z1,y1,x1 in nm, instead of crops.", show_default=False)
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
    """Predict whole crops by sliding window, block by block. Rerun the same command to resume.

    Without a configuration, the one of the checkpoint's run (or of the package) is used.

    Examples:

      pytc predict tutorials/cellmap_cos7.yaml --checkpoint best.ckpt --crops challenge --out outputs/predictions

      pytc predict tutorials/cellmap_cos7.yaml --checkpoint best.ckpt --box jrc_cos7-1a:0,0,0:800,800,800

      pytc predict tutorials/cellmap_cos7.yaml --checkpoint a.ckpt --checkpoint b.ckpt inference.tta=flips

      pytc predict --checkpoint runs/first --crops val --out outputs/val

      pytc predict tutorials/cellmap_cos7.yaml --checkpoint best.ckpt engine.workers=0 --dry-run

      pytc predict --checkpoint mito.pytc dataset.data_root=data --box jrc_cos7-1a:0,0,0:800,800,800
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
        _try(tasks, engine, overwrite, resume, where)
        return
    with terminal.stage("predicting"), terminal.stages() as advance:
        made = run(
            checkpoint, out=out, config=config, overrides=words, crops=crops, box=box, device=device,
            overwrite=overwrite, resume=resume, accept_failed=accepted, progress=advance,
        )  # fmt: skip
    for folder in made.written:
        print(folder)


def decode(
    predictions: Annotated[Path, InPlaceArgument(help="Folder that predict wrote.")],
    out: Annotated[Path, OutPlaceArgument(help="Folder for the labels, in the same layout.")],
    config: Annotated[Path | None, InOption(help="Configuration with decoding.default and decoding.classes.")] = None,
    class_name: opt.Classes = None,
    overrides: opt.Overrides = None,
    overwrite: opt.Overwrite = False,
    resume: opt.Resume = False,
    dry_run: opt.DryRun = False,
) -> None:
    """Turn probabilities into labels: thresholds, and instances by connected components, watershed or affinities.
    Large arrays are decoded block by block on the engine. Rerun the same command to resume.

    Examples:

      pytc decode outputs/predictions outputs/labels --config tutorials/cellmap_mito.yaml

      pytc decode outputs/predictions outputs/labels --class mito decoding.classes.mito.threshold=0.6

      pytc decode outputs/predictions outputs/labels engine.workers=8 --dry-run
    """
    from connectomics.config import load_config
    from connectomics.pipeline.decode import decode as run
    from connectomics.pipeline.decode import decode_estimate

    composed = load_config(config, overrides or ())
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
        _try(tasks, engine, overwrite, resume)
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
    file_format: Annotated[str, typer.Option("--format", help="ply, obj or precomputed (neuroglancer).")] = "ply",
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
        _try(tasks, engine, overwrite, resume)
        return
    with terminal.counted("meshing") as advance:
        found = mesh_labels(tasks, engine=engine, overwrite=overwrite, resume=resume, progress=advance)
    for done in found:
        larger = f", {done.coarser} with larger voxels (more than {max_vertices} vertices)" if done.coarser else ""
        print(f"{done.folder}: {done.number} meshes{larger}")


def run_task(
    file: Annotated[Path, InPlaceArgument(help="A task.json (or .yaml) that predict, decode or measure left.")],
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
        _try([task], engine, overwrite, resume, place)
        return
    with terminal.stages() as advance:
        said = run_stored_task(
            task, engine, device=place, overwrite=overwrite, resume=resume, accept=accepted, progress=advance
        )
    print(said)


def _try(tasks: Sequence[BlockTask], engine: EngineConfig, overwrite: bool, resume: bool, device: str = "cpu") -> None:
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
