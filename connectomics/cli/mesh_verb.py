"""The verb mesh: surfaces of instances as triangles."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from connectomics.cli import progress
from connectomics.cli.measure_verb import EngineOverrides, engine_config, show_estimate
from connectomics.cli.paths import InArgument, OutArgument
from connectomics.cli.run_verbs import RESUME_HELP


def mesh(
    labels: Annotated[Path, InArgument(help="Folder of labels that decode wrote.")],
    out: Annotated[Path, OutArgument(help="Folder for {dataset}/{crop}/{class}/{id}.ply.")],
    class_name: Annotated[str, typer.Option("--class", help="Of which class.")],
    overrides: EngineOverrides = None,
    ids: Annotated[list[int] | None, typer.Option("--id", help="Only this object; may be repeated.")] = None,
    dataset: Annotated[list[str] | None, typer.Option(help="Only this data set; may be repeated.")] = None,
    crop: Annotated[list[str] | None, typer.Option(help="Only this crop; may be repeated.")] = None,
    file_format: Annotated[str, typer.Option("--format", help="ply, obj or precomputed (Neuroglancer).")] = "ply",
    simplify: Annotated[int, typer.Option(help="Leave one triangle of so many, as far as the error allows.")] = 1,
    max_error_nm: Annotated[
        float | None, typer.Option(help="How far simplifying may move the surface; default: a voxel.")
    ] = None,
    max_vertices: Annotated[
        int, typer.Option(help="Of objects with more, larger voxels are taken; 150 bytes of memory each.")
    ] = 20_000_000,
    overwrite: Annotated[bool, typer.Option(help="Replace other meshes, and begin anew.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help=RESUME_HELP)] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would take; nothing is done.")] = False,
) -> None:
    """Write a closed surface of every instance (world coordinates in nm, x y z). Works object by object, each piece by
    piece, and goes on where it was killed. Needs pip install 'connectomics[mesh]'.

    Examples:

      pytc mesh outputs/labels outputs/meshes --class mito --simplify 10

      pytc mesh outputs/labels outputs/meshes --class mito --crop crop234 --id 3 --id 7 --format precomputed
    """
    from connectomics.pipeline.mesh import mesh_labels, mesh_tasks

    engine = engine_config(overrides)
    tasks = mesh_tasks(
        labels,
        out,
        class_name,
        datasets=dataset,
        crops=crop,
        ids=ids or (),
        file_format=file_format,
        simplify=simplify,
        max_error_nm=max_error_nm,
        max_vertices=max_vertices,
    )
    if dry_run:
        show_estimate(tasks, engine, overwrite, resume)
        return
    with progress.counted("meshing") as advance:
        found = mesh_labels(tasks, engine=engine, overwrite=overwrite, resume=resume, progress=advance)
    for done in found:
        larger = f", {done.coarser} of larger voxels (more than {max_vertices} vertices)" if done.coarser else ""
        print(f"{done.folder}: {done.number} meshes{larger}")
