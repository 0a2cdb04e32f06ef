"""The kinds of tasks, for `pytc run-task`: a class is imported when a task of its kind is run."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from connectomics.errors import unknown_name

if TYPE_CHECKING:
    from connectomics.tasks import BlockTask

#: `BlockTask.kind` -> where its class is
TASK_KINDS: dict[str, str] = {
    "predict": "connectomics.pipeline.network_task:NetworkPredictTask",
    "measure": "connectomics.morphology.measure_tasks:MeasureTask",
    "mask": "connectomics.decoding.blocks.labels_task:MaskTask",
    "watershed": "connectomics.decoding.watershed.watershed_task:WatershedTask",
    "components": "connectomics.decoding.blocks.stitched_task:ComponentsTask",
    "affinities": "connectomics.decoding.affinities.affinity_task:AffinitiesTask",
    "contacts": "connectomics.morphology.measure_tasks:ContactsTask",
    "mesh": "connectomics.morphology.mesh_task:MeshTask",
}


def load_task(path: Path) -> BlockTask:
    """The task that is stored in a file (JSON or YAML), of whatever kind; `MissingError`, `MetadataError`,
    `UnknownNameError`."""
    from connectomics.tasks.block_task import fields_of, read_task

    data = read_task(path)
    kind = data["kind"]
    if kind not in TASK_KINDS:
        raise unknown_name("kind of task", kind, TASK_KINDS, str(path))
    module, _, name = TASK_KINDS[kind].partition(":")
    task: BlockTask = getattr(import_module(module), name).from_dict(fields_of(data), str(path))
    return task
