"""Apply a log of edits to a folder of labels: proofreading that can be repeated and undone."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from connectomics.config.values import read
from connectomics.decoding.edit_task import EditTask
from connectomics.decoding.edits import Edit, linked, read_edits
from connectomics.decoding.label_artifact import BLOCK
from connectomics.decoding.parameters import METHODS, DecodeParameters
from connectomics.errors import InputError, number_of
from connectomics.io.artifacts import about
from connectomics.io.location import local_path
from connectomics.io.multiscale import Multiscale
from connectomics.io.place import array_place
from connectomics.io.sharded import Storage
from connectomics.io.write import update_attrs, write_file
from connectomics.pipeline.measure import run_tasks
from connectomics.pipeline.results import Labels, Place, find_labels
from connectomics.progress import Progress, silent

if TYPE_CHECKING:
    from connectomics.config.schema import EngineConfig

log = logging.getLogger(__name__)

#: In the output folder: what each edit did, and the IDs of new instances.
SUMMARY = "edits.json"


def apply_edits(
    labels: Labels | str | Path,
    edits: str | Path,
    *,
    out: str | Path,
    undo: int = 0,
    engine: EngineConfig | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> Labels:
    """Apply a log of edits to instance labels, and write the result to another folder, block by block.

    The labels themselves do not change: the same log gives the same result, and a shorter log undoes its last edits.
    Arrays without edits are copied, so that the result is as complete as ``labels``. IDs that no edit names stay.

    Args:
        labels: what `decode` returned, or a folder with instance IDs in the same layout.
        edits: the log, see `connectomics.decoding.edits`.
        undo: leave out so many of its last edits.
        out: folder for the edited labels, not within them; also gets ``edits.json``, with the IDs of new instances.
        engine: the processes that work; None: this process.
        overwrite: replace what another log gave.
        resume: fail if nothing was started; with ``overwrite``, keep what this log gave.
        progress: called for the blocks of each array.

    Raises:
        MissingError, InputError: there is no such log, array or instance, or a seed is not in its instance; with the
            line of the log.
        WriteError: other labels are in the way, or the disk is full. BlocksFailedError.
    """
    tasks = edit_tasks(labels, edits, out, undo=undo)
    source = labels.config if isinstance(labels, Labels) else None
    run_edits(tasks, engine, overwrite=overwrite, resume=resume, progress=progress or silent)
    return Labels(local_path(out), source, written=tuple(Path(task.output) for task in tasks))


def edit_tasks(labels: Labels | str | Path, edits: str | Path, out: str | Path, *, undo: int = 0) -> list[EditTask]:
    """Return the tasks of `apply_edits`, one for each array. Writes nothing; raises as it does."""
    root, target = Labels.open(labels).folder, local_path(out)
    if target.resolve().is_relative_to(root.resolve()):
        raise InputError(
            f"{target} lies in {root}, the labels themselves, which are never changed; give another folder"
        )
    places = find_labels(root)
    lines = read_edits(edits)
    if not 0 <= undo <= len(lines):
        raise InputError(f"undo must be from 0 to the {number_of(len(lines), 'edit')} of {edits}, got {undo}")
    placed = [_placed(edit, places, edits) for edit in lines[: len(lines) - undo]]
    return [_task(root, target, place, [e for e in placed if (e.dataset, e.crop) == place[:2]]) for place in places]


def _placed(edit: Edit, places: Sequence[Place], log: str | Path) -> Edit:
    """Return an edit with its data set and crop."""
    crop = f"crop{edit.crop}" if edit.crop.isdigit() else edit.crop
    fits = [p for p in places if p[2] == edit.class_name and edit.dataset in ("", p[0]) and crop in ("", p[1])]
    where = f"{log}, line {edit.line}"
    if len(fits) != 1:
        named = "/".join(filter(None, (edit.dataset, crop, edit.class_name)))
        reason = f"{len(fits)} arrays fit; give dataset and crop" if fits else "there are no such labels"
        raise InputError(f"{where}: {named}: {reason}")
    dataset, crop, _ = fits[0]
    if edit.to and (dataset, crop, edit.to) not in places:
        raise InputError(f"{where}: {dataset}/{crop} has no labels of {edit.to} to reclassify to")
    return replace(edit, dataset=dataset, crop=crop)


def _task(root: Path, out: Path, place: Place, edits: Sequence[Edit]) -> EditTask:
    name = place[2]
    folder = array_place(root, *place).parent
    names, own = linked(edits, name)
    said = about(folder / name)
    parameters = DecodeParameters(method="cc3d")
    if said.get("decode", {}).get("method") in METHODS:  # else a decoder of a plugin, or labels from elsewhere
        parameters = read(DecodeParameters, said["decode"], str(folder / name))
    storage = Storage.like(folder / name)
    return EditTask(
        input=str(folder / name), output=str(array_place(out, *place)), class_name=name,
        parameters=parameters, block_shape=storage.block(BLOCK), source=said.get("source", {}), storage=storage,
        pyramid=len(Multiscale.open(folder / name).levels) > 1, edits=tuple(own),
        others={other: str(folder / other) for other in names[1:]},
    )  # fmt: skip


def run_edits(
    tasks: Sequence[EditTask], engine: EngineConfig | None, *, overwrite: bool, resume: bool, progress: Progress
) -> list[dict[str, Any]]:
    """Do what is missing of the tasks; return, and store in ``edits.json``, what each edit did.

    Warns of new instances without voxels: the other class has instances at all voxels of what was reclassified.
    """
    out = Path(tasks[0].output).parents[2]
    run_tasks(tasks, out, engine, progress, overwrite=overwrite, resume=resume)
    found: dict[int, dict[str, Any]] = {}
    for task in tasks:
        *_, dataset, crop, _ = Path(task.output).parts
        update_attrs(Path(task.output).parent, {"connectomics": {"artefact": "labels", "complete": True}})
        done = linked(task.edits, task.class_name)[1]  # their lines may be others than those of a log that came before
        for step in [{**s, "line": e.line} for s, e in zip(about(task.output).get("edits", []), done, strict=True)]:
            if step["line"] not in found or "to" in step or "voxels" in step:  # elsewhere what leaves is deleted
                found[step["line"]] = {**step, "dataset": dataset.removesuffix(".zarr"), "crop": crop}
    summary = [found[line] for line in sorted(found)]
    for number, step in enumerate(summary):
        own = tuple(step.get(key) for key in ("dataset", "crop", "to", "new"))
        lost, then = "to" in step and step.get("voxels") == 0, summary[number + 1 :]
        if lost and own not in [(e["dataset"], e["crop"], e["class"], i) for e in then for i in e["ids"]]:
            log.warning(
                "line %d: instance %d of %s is lost: as instance %d of %s it has no voxels, since %s has other "
                "instances there; delete those in a line before",
                step["line"], step["ids"][0], step["class"], step["new"], step["to"], step["to"],
            )  # fmt: skip
    write_file(out / SUMMARY, json.dumps(summary, indent=1).encode())
    return summary
