"""What a prediction lacks, and what it says of that: voxels without raw, and blocks that were given up.

Both are kept in files of the prediction's folder, so that they survive a run that is killed, and end up in the
attributes of the region and of its classes::

    .missing-raw.npy   int64, for each block how many of its voxels had no raw
    .unknown.json      number of each block that failed and was accepted -> why it failed

    missing_raw        share of the voxels that had no raw; they hold probability 0
    unknown            blocks that were given up, each with its number, box (nm) and reason; they hold probability 0
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from connectomics.errors import InputError, MetadataError
from connectomics.inference.layout import Layout
from connectomics.inference.mask import Mask
from connectomics.inference.missing import Presence
from connectomics.io import store
from connectomics.io.multiscale import Multiscale
from connectomics.io.store import StoreError
from connectomics.io.write import write_file
from connectomics.tasks.done import DoneMap

if TYPE_CHECKING:
    from connectomics.inference.predict_task import PredictTask

log = logging.getLogger(__name__)

_COUNTS, _UNKNOWN = ".missing-raw.npy", ".unknown.json"


# -- raw that is missing ---------------------------------------------------------------------------------------------
def presences(task: PredictTask) -> list[Presence]:
    """Where each target grid of a task has raw."""
    source = Multiscale.open(task.raw)
    return [Presence(source, layout) for layout, _ in task.layouts]


def missing_raw(task: PredictTask) -> NDArray[np.int64]:
    """(blocks,) how many target voxels of each block have no raw now; none in blocks that lie wholly outside the mask.

    Raises `InputError` if a target has no raw at all, `StoreError` if that cannot be said.
    """
    where = presences(task)
    found = [presence.missing() for presence in where]
    for presence, missing in zip(where, found, strict=True):
        target, raw = presence.layout.target, presence.source
        if int(missing.sum()) == target.size:
            finest = raw.levels[0].grid.box
            beyond = finest.intersect(target.box).is_empty
            reason = f"it covers {finest}" if beyond else "the chunks there are absent"
            raise InputError(f"{raw.location} has no raw for {task.name}, which lies at {target.box}: {reason}")
    counts = np.concatenate(found)
    if task.mask is not None:
        mask = Mask(task.mask, task.voxel_size)
        for number in np.flatnonzero(counts):
            layout, inside = _located(task, int(number))
            if not mask.touches(layout.blocks[inside][1]):
                counts[number] = 0
    return counts


def require_raw(task: PredictTask, counts: NDArray[np.int64]) -> None:
    """Raise `InputError` if voxels have no raw and the task does not allow that."""
    lost = int(counts.sum())
    if not lost or task.allow_missing_raw:
        return
    number = int(np.flatnonzero(counts)[0])
    index, inside = task.locate(number)
    raise InputError(
        f"{task.name}: {_percent(task, counts)} of the voxels to predict have no raw ({lost} of {_voxels(task)}, the "
        f"first {presences(task)[index].first(inside)}); fetch that raw, predict a smaller region, or set "
        "data.allow_missing_raw=true to store probability 0 there"
    )


def keep_missing(task: PredictTask, counts: NDArray[np.int64]) -> None:
    """Store what is missing before a run; for blocks that are done already, what was missing then is kept."""
    before = kept_missing(task)
    if (done := _done_map(task)) is not None:
        done_before = np.ones(len(counts), bool)
        done_before[done.missing] = False
        counts = np.where(done_before, before, counts)
    _store_counts(task, counts, before)
    if counts.any():
        log.warning("%s: %s of the voxels have no raw and get probability 0", task.name, _percent(task, counts))


def kept_missing(task: PredictTask) -> NDArray[np.int64]:
    """(blocks,) voxels without raw as `keep_missing` has stored them; zeros if nothing is stored."""
    file, blocks = task.folder / _COUNTS, sum(len(layout.blocks) for layout, _ in task.layouts)
    if not file.exists():
        return np.zeros(blocks, np.int64)
    try:
        counts: NDArray[np.int64] = np.load(file)
    except (OSError, ValueError) as error:
        raise MetadataError(f"cannot read {file} ({error}); predict again with --overwrite") from error
    if counts.shape != (blocks,):
        raise MetadataError(f"{file} counts {len(counts)} blocks, expected {blocks}; predict again with --overwrite")
    return counts


def confirm_missing(task: PredictTask) -> None:
    """After the last block: raw that went missing meanwhile counts too. Unless missing raw is allowed, blocks that it
    touches are to be done again.

    Raises `StoreError` for these.
    """
    before = kept_missing(task)
    counts = np.maximum(before, missing_raw(task))
    gone = np.flatnonzero(counts > before)
    if len(gone) and not task.allow_missing_raw:
        if (done := _done_map(task)) is not None:
            done.forget(int(number) for number in gone)
        index, inside = task.locate(int(gone[0]))
        raise StoreError(
            f"{task.name}: raw under {len(gone)} blocks went missing while they were predicted (the first "
            f"{presences(task)[index].first(inside)}); restore it, then rerun the same command to predict them again"
        )
    _store_counts(task, counts, before)


# -- blocks that are given up ----------------------------------------------------------------------------------------
def give_up(task: PredictTask, failed: Mapping[int, str]) -> None:
    """Store blocks (number -> why they failed) as 0, and record them."""
    for number in failed:
        layout, inside = _located(task, number)
        begin, block = layout.blocks[inside]
        for group in task.groups:
            if group.layout is layout:
                writer = group.array()
                writer.write(begin, np.zeros(block.shape, writer.dtype))
    known = {str(number): why for number, why in sorted((_given_up(task.folder) | dict(failed)).items())}
    write_file(task.folder / _UNKNOWN, json.dumps(known, indent=2).encode())


def forget(folder: Path) -> None:
    """Remove what is recorded of blocks, since none of them is done."""
    for file in (*folder.glob(".done-*"), folder / _COUNTS, folder / _UNKNOWN):
        file.unlink(missing_ok=True)


def attributes(task: PredictTask, layout: Layout | None = None) -> dict[str, Any]:
    """What the attributes of the region, or of the classes of one target grid, say of what they lack."""
    chosen = [(index, one) for index, (one, _) in enumerate(task.layouts) if layout is None or one is layout]
    counts, first = kept_missing(task), np.cumsum([0, *(len(one.blocks) for one, _ in task.layouts)])
    lost = sum(int(counts[first[index] : first[index + 1]].sum()) for index, _ in chosen)
    unknown = []
    for number, why in _given_up(task.folder).items():
        index, inside = task.locate(number)
        if index in dict(chosen):
            box = task.layouts[index][0].blocks[inside][1].box
            unknown.append({"block": number, "box": [list(box.begin), list(box.end)], "reason": why})
    found: dict[str, Any] = {"missing_raw": lost / sum(one.target.size for _, one in chosen)}
    return {**found, "unknown": unknown} if unknown else found


# -- within ----------------------------------------------------------------------------------------------------------
def _located(task: PredictTask, number: int) -> tuple[Layout, int]:
    index, inside = task.locate(number)
    return task.layouts[index][0], inside


def _voxels(task: PredictTask) -> int:
    return sum(layout.target.size for layout, _ in task.layouts)


def _percent(task: PredictTask, counts: NDArray[np.int64]) -> str:
    return f"{100 * int(counts.sum()) / _voxels(task):.3g} %"


def _done_map(task: PredictTask) -> DoneMap | None:
    """The done-map of the blocks of the network, if there is one."""
    stage = task.stages[0]
    file = task.folder / f".done-{stage}"
    return DoneMap(file, task.blocks(stage), task.key) if file.exists() else None


def _store_counts(task: PredictTask, counts: NDArray[np.int64], before: NDArray[np.int64]) -> None:
    if counts.any() or before.any():
        content = io.BytesIO()
        np.save(content, counts)
        write_file(task.folder / _COUNTS, content.getvalue())


def _given_up(folder: Path) -> dict[int, str]:
    return {int(number): str(why) for number, why in (store.read_json(folder / _UNKNOWN) or {}).items()}
