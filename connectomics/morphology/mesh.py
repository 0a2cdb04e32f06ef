"""A folder of labels to meshes: ``{out}/{dataset}/{crop}/{class}/{id}.ply``."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from connectomics.config.schema import EngineConfig
from connectomics.decoding.blocks.table import TABLE_FILE as INSTANCES
from connectomics.errors import InputError, UnknownNameError, unknown_name
from connectomics.io.location import local_path
from connectomics.io.tables import read_columns
from connectomics.morphology.measure import Progress, nothing_begun, open_labels, select, tell
from connectomics.morphology.mesh_task import TABLE_FILE, MeshTask
from connectomics.tasks import open_engine, run_task
from connectomics.tasks.block_task import TASK_FILE


@dataclass(frozen=True)
class Meshed:
    """The meshes of one crop: their folder, how many, and how many are of voxels larger than the labels'."""

    folder: Path
    number: int
    coarser: int


def mesh_labels(
    tasks: Sequence[MeshTask],
    *,
    engine: EngineConfig | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> list[Meshed]:
    """Write what is missing of the meshes of some tasks (`mesh_tasks`).

    Args:
        resume: go on only: an error where none of them was begun. With ``overwrite``: keep what is there of
            these.

    Raises:
        MissingError: ``resume``, and nothing was begun.
        InputError: zmesh is not installed, a table of other labels. UnknownNameError: an id that is not there.
        WriteError: meshes of another task are there. BlocksFailedError, EngineError.
    """
    if resume and not overwrite and not any((task.folder / TASK_FILE).exists() for task in tasks):
        raise nothing_begun(tasks[0].folder.parents[2])
    for task in tasks:
        task.check(overwrite=task.starts_over(overwrite=overwrite, resume=resume))
    found = []
    with open_engine(engine) as workers:
        for task in tasks:
            report = None if progress is None else partial(tell, progress, task.name)
            with _nothing_left(task.folder):
                finished = not run_task(task, workers, report, overwrite=overwrite, resume=resume)
            if finished:
                task.clean()
            strides = read_columns(task.folder / TABLE_FILE, ["stride_voxels"])["stride_voxels"]
            found.append(Meshed(task.folder, len(strides), int(np.count_nonzero(strides > 1))))
    return found


@contextlib.contextmanager
def _nothing_left(folder: Path) -> Iterator[None]:
    """Where an id turns out not to be there (without a table that takes a pass over the labels), a folder that was
    made for it goes again, with those above it."""
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        yield
    except UnknownNameError:
        if made:
            shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # something else lies in it
            for place in made[1:]:
                place.rmdir()
        raise


def mesh_tasks(
    labels_dir: str | Path,
    output_dir: str | Path,
    class_name: str,
    *,
    datasets: Collection[str] | None = None,
    crops: Collection[str] | None = None,
    ids: Collection[int] = (),
    file_format: str = "ply",
    simplify: int = 1,
    max_error_nm: float | None = None,
    max_vertices: int = 20_000_000,
) -> list[MeshTask]:
    """The tasks that mesh one class of a folder of labels, ``{dataset}.zarr/{crop}/{class}``; one a crop.

    Where the objects are says the table that decode writes beside them, ``instances.csv``; without it the labels are
    read once more.

    Args:
        datasets, crops: only these; by default all. ids: only these objects, of the one crop that is chosen.
        file_format, simplify, max_error_nm, max_vertices: see `MeshTask`.

    Raises:
        MissingError: no labels there. UnknownNameError: a class, data set or crop that is not there. InputError: ids of
        several crops, an option out of range. IncompleteError, MetadataError: labels that are none, or half written.
    """
    root, out = Path(labels_dir), Path(os.path.abspath(local_path(output_dir)))
    places = select(root, datasets, crops)
    chosen = [place for place in places if place[2] == class_name]
    if not chosen:
        raise unknown_name("class", class_name, {name for _, _, name in places}, str(root))
    if ids and len(chosen) > 1:
        raise InputError(f"an id is of one crop, and {class_name} is in {len(chosen)}: choose one (--dataset, --crop)")
    tasks = []
    for place in chosen:
        labels = open_labels(root, place)
        instances = Path(labels.location) / INSTANCES
        task = MeshTask(
            labels=labels,
            class_name=class_name,
            output=str(out.joinpath(*place)),
            table=str(instances) if instances.exists() else "",
            ids=tuple(sorted(ids)),
            file_format=file_format,
            simplify=simplify,
            max_error_nm=max_error_nm,
            max_vertices=max_vertices,
        )
        tasks.append(task)
    return tasks
