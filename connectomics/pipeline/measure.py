"""Measure the labels of a folder: one table per class and one per contact, over all crops, with a summary.

``{out}/{class}.csv`` (or ``.parquet``) has one row per instance, ``{out}/contacts_{A}_{B}_{NM}nm.csv`` one per instance
of A, with or without contact. Each appears in one step when its last crop is measured; see
`connectomics.morphology.MeasureTask` and `ContactsTask` for the columns.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from connectomics.errors import MissingError, require_known
from connectomics.geometry import Index, index
from connectomics.io.location import absolute
from connectomics.io.place import array_place, output_place
from connectomics.io.place import place as place_of
from connectomics.io.tables import check_format
from connectomics.morphology.block_sums import BLOCK
from connectomics.morphology.contacts import ContactSpec, halo_of
from connectomics.morphology.label_volume import LabelVolume
from connectomics.morphology.measure_tasks import ContactsTask, MeasureTask, TableTask
from connectomics.morphology.mesh_task import MeshTask
from connectomics.pipeline.results import Place, find_labels
from connectomics.progress import Progress, named, silent
from connectomics.tasks import open_engine, run_task
from connectomics.tasks.block_task import TASK_FILE, require_begun

if TYPE_CHECKING:
    from connectomics.config.schema import EngineConfig
    from connectomics.decoding.edit_task import EditTask


def measure_labels(
    tasks: Sequence[TableTask],
    *,
    engine: EngineConfig | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write the missing tables of the tasks of `measure_tasks`.

    Unfinished tables of a killed run are completed; finished tables of the same labels are kept. Memory: 20 bytes per
    voxel of a block (contacts: 30, with the halo), and 50 bytes per instance of a crop.

    Args:
        engine: the processes that work; None: this process.
        overwrite: replace tables of other labels, and start over.
        resume: raise `MissingError` if none of the tasks was started. With ``overwrite``: keep their output.

    Returns:
        For JSON: lists ``classes`` and ``contacts`` with the totals of each table and its ``file``.

    Raises:
        WriteError: the output holds something else; raised before anything is measured. BlocksFailedError, EngineError.
    """
    run_tasks(tasks, tasks[0].path.parent, engine, progress, overwrite=overwrite, resume=resume)
    found = [(task, json.loads(task.summary_file.read_text()) | {"file": str(task.path)}) for task in tasks]
    return {
        "classes": [summary for task, summary in found if isinstance(task, MeasureTask)],
        "contacts": [summary for task, summary in found if isinstance(task, ContactsTask)],
    }


def run_tasks(
    tasks: Sequence[TableTask | MeshTask | EditTask],
    out: Path,
    engine: EngineConfig | None,
    progress: Progress,
    *,
    overwrite: bool,
    resume: bool,
    around: Callable[[Path], AbstractContextManager[None]] = lambda folder: nullcontext(),
) -> None:
    """Check all tasks with output below ``out``, then do what is missing of each, within ``around`` of its folder."""
    begun = any((task.folder / TASK_FILE).exists() or place_of(task.output).exists() for task in tasks)
    require_begun(begun, out, overwrite=overwrite, resume=resume)
    for task in tasks:
        task.check(overwrite=task.starts_over(overwrite=overwrite, resume=resume))
    with open_engine(engine) as workers:
        for task in tasks:
            with around(task.folder):
                done = run_task(task, workers, named(progress, task.name), overwrite=overwrite, resume=resume)
                if not done and isinstance(task, TableTask | MeshTask):
                    task.clean()


def measure_tasks(
    labels_dir: str | Path,
    output_dir: str | Path,
    *,
    classes: Collection[str] | None = None,
    datasets: Collection[str] | None = None,
    crops: Collection[str] | None = None,
    contacts: Sequence[ContactSpec] = (),
    table_format: str = "csv",
    block: Sequence[int] = BLOCK,
) -> list[TableTask]:
    """Return the tasks that measure the instances of a folder of labels, ``{dataset}.zarr/{crop}/{class}``.

    There is one for each table. A semantic class (attribute ``connectomics.kind``) is measured as one instance with ID
    1. Arrays without that attribute hold IDs. Writes nothing.

    Args:
        classes, datasets, crops: only these; by default all. Contacts may name other classes than ``classes``.
        contacts: contacts to measure in every crop that has both classes.
        table_format: ``csv`` or ``parquet``.
        block: voxels to read at once, z y x; choose smaller blocks for contacts over a large distance.

    Raises:
        MissingError: no labels there, or no crop has both classes of a contact.
        UnknownNameError: a class, data set or crop does not exist.
        IncompleteError: labels are half written.
        MetadataError: not labels.
        InputError: the contact distance is too far, or the format is unknown.
    """
    root, out = place_of(labels_dir), place_of(absolute(output_place(output_dir)))
    check_format(f"table.{table_format}")
    places = find_labels(root, datasets, crops)
    known = {name for _, _, name in places}
    require_known("class", [*(classes or ()), *(n for spec in contacts for n in (spec.of, spec.to))], known, str(root))
    opened, shape = cache(partial(open_labels, root)), index(block)
    tasks: list[TableTask] = [
        MeasureTask(
            class_name=name,
            inputs=tuple(opened(place) for place in places if place[2] == name),
            output=str(out / f"{name}.{table_format}"),
            block_shape=shape,
        )
        for name in sorted(known)
        if not classes or name in classes
    ]
    for spec in contacts:
        both = [place for place in places if place[2] == spec.of and (*place[:2], spec.to) in places]
        if not both:
            raise MissingError(f"contact {spec}: no crop in {root} holds both classes")
        inputs = tuple(map(opened, both))
        tasks.append(
            ContactsTask(
                of=spec.of,
                to=spec.to,
                nm=float(spec.nm),
                inputs=inputs,
                others=tuple(opened((*place[:2], spec.to)) for place in both),
                output=str(out / f"contacts_{spec.of}_{spec.to}_{spec.nm:g}nm.{table_format}"),
                block_shape=_contact_block(shape, inputs, spec.nm),
            )
        )
    return tasks


def open_labels(root: Path, place: Place) -> LabelVolume:
    """Return one label volume of a folder; errors as `LabelVolume.open`."""
    return LabelVolume.open(*place[:2], absolute(array_place(root, *place)))


def _contact_block(block: Index, inputs: Sequence[LabelVolume], nm: float) -> Index:
    """Halve the block where its halo would be wider than a quarter of it: then 3.4 times as much is read at most."""
    halos = [halo_of(labels.grid, nm).tolist() for labels in inputs]
    widest = [max(along) for along in zip(*halos, strict=True)]
    return index(b // 2 if b > 64 and 4 * h > b else b for b, h in zip(block, widest, strict=True))
