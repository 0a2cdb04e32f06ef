"""Mesh the labels of a folder: ``{out}/{dataset}/{crop}/{class}/{id}.ply``."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from connectomics.decoding.label_artifact import TABLE_FILE as INSTANCE_TABLE
from connectomics.errors import InputError, UnknownNameError, require_known
from connectomics.io import s3
from connectomics.io.location import absolute
from connectomics.io.place import S3Path, output_place, remove_tree
from connectomics.io.place import place as place_of
from connectomics.io.store import DEFAULT_OPTIONS, split_s3
from connectomics.io.tables import read_columns
from connectomics.morphology.mesh_task import TABLE_FILE, MeshTask
from connectomics.pipeline.measure import open_labels, run_tasks
from connectomics.pipeline.results import find_labels
from connectomics.progress import Progress, silent

if TYPE_CHECKING:
    from connectomics.config.schema import EngineConfig


@dataclass(frozen=True)
class Meshed:
    """The meshes of one crop: folder, number, and how many of them were made from coarser voxels than the labels'."""

    folder: Path
    number: int
    coarser: int


def mesh_labels(
    tasks: Sequence[MeshTask],
    *,
    engine: EngineConfig | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress = silent,
) -> list[Meshed]:
    """Write the missing meshes of the tasks of `mesh_tasks`.

    Args:
        resume: raise `MissingError` if none of the tasks was started. With ``overwrite``: keep their output.

    Raises:
        InputError: zmesh is not installed, or the instance table is of other labels.
        UnknownNameError: an ID does not exist.
        WriteError: the output holds meshes of another task. BlocksFailedError, EngineError.
    """
    run_tasks(
        tasks, tasks[0].folder.parents[2], engine, progress, overwrite=overwrite, resume=resume,
        around=_removed_if_unknown,
    )  # fmt: skip
    found = []
    for task in tasks:
        strides = read_columns(task.folder / TABLE_FILE, ["stride_voxels"])["stride_voxels"]
        found.append(Meshed(task.folder, len(strides), int(np.count_nonzero(strides > 1))))
    return found


@contextlib.contextmanager
def _removed_if_unknown(folder: Path) -> Iterator[None]:
    """Remove the folders made for a task if an ID turns out not to exist, which without a table takes a pass over all
    labels to know."""
    above = () if isinstance(folder, S3Path) else folder.parents  # prefixes go with their objects
    made = [place for place in (folder, *above) if not place.exists()]
    try:
        yield
    except UnknownNameError:
        if made:
            remove_tree(folder)
        with contextlib.suppress(OSError):  # not empty
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
    """Return the tasks that mesh one class of a folder of labels, ``{dataset}.zarr/{crop}/{class}``; one per crop.

    The positions of the objects come from the table ``instances.csv`` that decode writes; without it, or if the labels
    were changed since, the labels are read once more.

    Args:
        datasets, crops: only these; by default all.
        ids: only these objects, of a single crop.
        file_format, simplify, max_error_nm, max_vertices: see `MeshTask`.

    Raises:
        MissingError: no labels there.
        UnknownNameError: a class, data set or crop does not exist.
        InputError: IDs of several crops, or an option out of range.
        IncompleteError: labels are half written.
        MetadataError: not labels.
    """
    root, out = place_of(labels_dir), place_of(absolute(output_place(output_dir)))
    places = find_labels(root, datasets, crops)
    require_known("class", [class_name], {name for _, _, name in places}, str(root))
    chosen = [place for place in places if place[2] == class_name]
    if ids and len(chosen) > 1:
        raise InputError(
            f"IDs need a single crop, but {class_name} is in {len(chosen)}; choose one (--dataset, --crop)"
        )
    tasks = []
    for place in chosen:
        labels = open_labels(root, place)
        instances = place_of(labels.location) / INSTANCE_TABLE
        task = MeshTask(
            labels=labels, class_name=class_name, output=str(out.joinpath(*place)),
            table=str(instances) if _is_current(instances) else "", ids=tuple(sorted(ids)), file_format=file_format,
            simplify=simplify, max_error_nm=max_error_nm, max_vertices=max_vertices,
        )  # fmt: skip
        tasks.append(task)
    return tasks


def _is_current(table: Path) -> bool:
    """Whether an instance table exists, and no chunk of its labels is newer."""
    if not table.exists():
        return False
    if isinstance(table, S3Path):
        labels, own = (s3.newest(*split_s3(path), DEFAULT_OPTIONS) for path in (table.parent / "s0", table))
        return labels is None or (own is not None and labels <= own)
    written = table.stat().st_mtime_ns
    return all(file.is_dir() or file.stat().st_mtime_ns <= written for file in (table.parent / "s0").rglob("*"))
