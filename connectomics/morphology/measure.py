"""A folder of labels to tables: one a class and one a contact, over all crops, with a summary.

``{out}/{class}.csv`` (or ``.parquet``): a row an instance. ``{out}/contacts_{A}_{B}_{NM}nm.csv``: a row an instance of
A, with or without contact. Each appears whole, in one step, when its last crop is measured; the columns are those of
`connectomics.morphology.measure_tasks.MeasureTask` and `ContactsTask`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from connectomics.config.schema import EngineConfig
from connectomics.decoding.decode import find_arrays
from connectomics.decoding.label_artifact import BLOCK
from connectomics.errors import InputError, MissingError, unknown_name
from connectomics.geometry import Index
from connectomics.io.location import local_path
from connectomics.io.multiscale import Multiscale
from connectomics.io.tables import FORMATS, check_format
from connectomics.morphology.contacts import ContactSpec, halo_of
from connectomics.morphology.measure_tasks import ContactsTask, MeasureTask
from connectomics.morphology.table_task import Labels, TableTask
from connectomics.tasks import open_engine, run_task
from connectomics.tasks.block_task import TASK_FILE

#: Told now and then: how many blocks are done, how many there are, and of what.
Progress = Callable[[int, int, str], None]
Place = tuple[str, str, str]


def measure_labels(
    labels_dir: str | Path,
    output_dir: str | Path,
    *,
    classes: Collection[str] | None = None,
    datasets: Collection[str] | None = None,
    crops: Collection[str] | None = None,
    contacts: Sequence[ContactSpec] = (),
    table_format: str = "csv",
    block: Sequence[int] = BLOCK,
    engine: EngineConfig | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure the instances of a folder of labels, ``{dataset}.zarr/{crop}/{class}``, and write the tables.

    A semantic class (attribute ``connectomics.kind``) is measured as one instance, 1. Arrays without that attribute
    hold ids. A table that a killed run began is finished; one that is there already, of the same labels, is left.
    Memory: the blocks' own, 20 bytes a voxel (contacts: 30, with the halo), and 50 bytes an instance of a crop.

    Args:
        classes, datasets, crops: only these; by default all. Contacts may name other classes than ``classes``.
        contacts: measured in every crop that holds both classes.
        table_format: ``csv`` or ``parquet``.
        block: voxels, z y x, that are read at once; smaller for contacts over a wide distance.
        engine: who works; None: this process.
        overwrite: replace tables of other labels, and begin anew.

    Returns:
        For JSON: ``labels``, and lists ``classes`` and ``contacts`` with the totals of each table and its ``file``.

    Raises:
        MissingError: no labels there, or no crop holds both classes of a contact. UnknownNameError: a class, data set
            or crop that is not there. IncompleteError: labels are half written. MetadataError: not labels.
            InputError: a distance too far, a format that is none, or whose library is absent. WriteError: tables of
            something else are there. All these before anything is measured. BlocksFailedError, EngineError.
    """
    tasks = measure_tasks(
        labels_dir,
        output_dir,
        classes=classes,
        datasets=datasets,
        crops=crops,
        contacts=contacts,
        table_format=table_format,
        block=block,
    )
    return {"labels": str(labels_dir), **measure_tables(tasks, engine=engine, overwrite=overwrite, progress=progress)}


def measure_tables(
    tasks: Sequence[TableTask],
    *,
    engine: EngineConfig | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Do what is still missing of some tasks of `measure_tasks`; arguments, result and errors as `measure_labels`.

    ``resume``: go on only: `MissingError` where none of them was begun; with ``overwrite``: keep what is there of these
    tasks.
    """
    if resume and not overwrite and not any(task.path.exists() or (task.folder / TASK_FILE).exists() for task in tasks):
        raise nothing_begun(tasks[0].path.parent)
    for task in tasks:
        task.check(overwrite=task.starts_over(overwrite=overwrite, resume=resume))
    with open_engine(engine) as workers:
        for task in tasks:
            report = None if progress is None else partial(tell, progress, task.name)
            if not run_task(task, workers, report, overwrite=overwrite, resume=resume):
                task.clean()
    found = [(task, json.loads(task.summary_file.read_text()) | {"file": str(task.path)}) for task in tasks]
    return {
        "classes": [summary for task, summary in found if isinstance(task, MeasureTask)],
        "contacts": [summary for task, summary in found if isinstance(task, ContactsTask)],
    }


def nothing_begun(place: Path) -> MissingError:
    """What is said to ``--resume`` where there is nothing to go on with."""
    return MissingError(f"--resume: nothing of this was begun below {place}; leave it out to begin")


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
    """The tasks of `measure_labels`, one a table; arguments and errors are the same. Writes nothing."""
    root, out = Path(labels_dir), Path(os.path.abspath(local_path(output_dir)))
    if table_format not in FORMATS:
        raise InputError(f"the format of a table is {' or '.join(FORMATS)}, found {table_format!r}")
    check_format(f"table.{table_format}")
    places = select(root, datasets, crops)
    known = {name for _, _, name in places}
    for name in [*(classes or ()), *(n for spec in contacts for n in (spec.of, spec.to))]:
        if name not in known:
            raise unknown_name("class", name, known, str(root))
    wanted = [name for name in sorted(known) if not classes or name in classes]
    pairs = {spec: _places_of_both(places, spec, root) for spec in contacts}
    needed = {*wanted, *(n for spec in contacts for n in (spec.of, spec.to))}
    opened = {place: open_labels(root, place) for place in places if place[2] in needed}
    z, y, x = (int(n) for n in block)
    tasks: list[TableTask] = [
        MeasureTask(
            class_name=name,
            inputs=tuple(labels for place, labels in opened.items() if place[2] == name),
            output=str(out / f"{name}.{table_format}"),
            block_shape=(z, y, x),
        )
        for name in wanted
    ]
    for spec, both in pairs.items():
        inputs, others = (tuple(opened[pair[k]] for pair in both) for k in (0, 1))
        tasks.append(
            ContactsTask(
                of=spec.of,
                to=spec.to,
                nm=spec.nm,
                inputs=inputs,
                others=others,
                output=str(out / f"contacts_{spec.of}_{spec.to}_{spec.nm:g}nm.{table_format}"),
                block_shape=_contact_block((z, y, x), inputs, spec.nm),
            )
        )
    return tasks


def select(root: Path, datasets: Collection[str] | None, crops: Collection[str] | None) -> list[Place]:
    """The (data set, crop, class) of a folder of labels, of these data sets and crops; by default all.

    Raises `MissingError` (no labels), `UnknownNameError`.
    """
    places = list(find_arrays(root))
    if not places:
        raise MissingError(f"no labels in {root}: expected {{dataset}}.zarr/{{crop}}/{{class}}; run decode first")
    for what, index, asked in (("data set", 0, datasets), ("crop", 1, crops)):
        there = {place[index] for place in places}
        for name in asked or ():
            if name not in there:
                raise unknown_name(what, name, there, str(root))
        places = [place for place in places if not asked or place[index] in asked]
    return places


def _places_of_both(places: Sequence[Place], spec: ContactSpec, root: Path) -> list[tuple[Place, Place]]:
    found = [(place, (*place[:2], spec.to)) for place in places if place[2] == spec.of]
    both = [pair for pair in found if pair[1] in places]
    if not both:
        raise MissingError(f"contact {spec}: no crop in {root} holds both classes")
    return both


def open_labels(root: Path, place: Place) -> Labels:
    """Those of one (data set, crop, class) of a folder; errors as `Labels.open`."""
    dataset, crop, name = place
    return Labels.open(dataset, crop, os.path.abspath(root / f"{dataset}.zarr" / crop / name))


def _contact_block(block: Index, inputs: Sequence[Labels], nm: float) -> Index:
    """That block, halved where its halo would be wider than a quarter of it: what is read stays 3.4 times as much."""
    widest = [0, 0, 0]
    for labels in inputs:
        halo = halo_of(Multiscale.open(labels.location).levels[0].grid, nm)
        widest = [max(a, int(b)) for a, b in zip(widest, halo, strict=True)]
    z, y, x = (b // 2 if b > 64 and 4 * h > b else b for b, h in zip(block, widest, strict=True))
    return z, y, x


def tell(progress: Progress, name: str, stage: str, done: int, number: int) -> None:
    """Hand a stage of a task on to a progress that counts by names."""
    progress(done, number, name)
