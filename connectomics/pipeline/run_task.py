"""Run a task that is stored beside its output, of whatever kind."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from connectomics.errors import require_known
from connectomics.progress import Progress, named, silent
from connectomics.tasks import BlockTask, run_task
from connectomics.tasks.block_task import TASK_FILE, fields_of, read_task, require_begun
from connectomics.tasks.failures import accepted_of

if TYPE_CHECKING:
    from connectomics.config.schema import EngineConfig

#: `BlockTask.kind` -> its class, which is imported when a task of the kind is run.
TASK_KINDS: dict[str, str] = {
    "predict": "connectomics.pipeline.network_task:NetworkPredictTask",
    "average": "connectomics.decoding.average_task:AverageTask",
    "measure": "connectomics.morphology.measure_tasks:MeasureTask",
    "mask": "connectomics.decoding.blocks.labels_task:MaskTask",
    "watershed": "connectomics.decoding.watershed.watershed_task:WatershedTask",
    "components": "connectomics.decoding.blocks.stitched_task:ComponentsTask",
    "affinities": "connectomics.decoding.affinities.affinity_task:AffinitiesTask",
    "edits": "connectomics.decoding.edit_task:EditTask",
    "contacts": "connectomics.morphology.measure_tasks:ContactsTask",
    "mesh": "connectomics.morphology.mesh_task:MeshTask",
}


def load_task(path: Path) -> BlockTask:
    """Return the task that is stored in a file (JSON or YAML).

    Raises:
        MissingError: no such file. MetadataError: it holds no task. UnknownNameError: no such kind of task.
    """
    data = read_task(path)
    kind = data["kind"]
    require_known("kind of task", [kind], TASK_KINDS, str(path))
    module, _, name = TASK_KINDS[kind].partition(":")
    task: BlockTask = getattr(import_module(module), name).from_dict(fields_of(data), str(path))
    return task


def run_stored_task(
    task: BlockTask,
    engine: EngineConfig,
    *,
    device: str = "cpu",
    overwrite: bool = False,
    resume: bool = False,
    accept: Mapping[str, Collection[int]] | None = None,
    progress: Progress | None = None,
) -> str:
    """Do the missing blocks of a task of `load_task` on an engine; return a line about the result.

    Args:
        overwrite: start over, and replace the output of another task. resume: fail if nothing was started.
        accept: blocks that may fail.
    """
    (accepted,) = accepted_of([task], accept or {})
    replaces = task.starts_over(overwrite=overwrite, resume=resume)
    if not task.check(overwrite=replaces):
        return f"nothing to do: {task.name} is complete"
    require_begun((task.folder / TASK_FILE).exists(), task.folder, overwrite=overwrite, resume=resume)
    advance = named(progress or silent, task.name)
    run_task(task, engine, advance, device=device, overwrite=replaces, accept=accepted)
    return f"{task.name}: complete"


def task_device(name: str | None) -> str:
    """Return the device ``name`` (``cpu``, ``cuda``, ``cuda:1``) if it exists; by default a GPU if there is one."""
    from connectomics.tasks.pool import gpu_count

    if name is None:
        return "cuda" if gpu_count() else "cpu"
    from connectomics.pipeline.predict import known_device

    return known_device(name)
