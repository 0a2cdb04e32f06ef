"""What a prediction lacks, and what it says of that: voxels without raw, and blocks that were given up.

Both are kept in files, so that they survive a killed run, and end up in the attributes of the region and its classes::

    .missing-raw.npy   int64, for each block the number of its voxels without raw
    .unknown.json      number of each block that failed and was accepted -> why it failed

    missing_raw        share of the voxels without raw; they hold probability 0
    unknown            blocks that were given up, each with its number, box (nm) and reason; they hold probability 0

A target voxel has raw if the chunk of the raw voxel at its center is stored (at the faces of the volume: of the nearest
raw voxel, if the target voxel overlaps the volume). No chunk is read; counting takes one matrix product per axis.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from connectomics.errors import InputError, MetadataError
from connectomics.geometry import shape_between
from connectomics.inference.layout import Layout
from connectomics.inference.raw import Mask
from connectomics.io import store
from connectomics.io.multiscale import Multiscale
from connectomics.io.store import StoreError
from connectomics.io.write import write_file
from connectomics.tasks.blocks import DoneMap, done_file

if TYPE_CHECKING:
    from connectomics.inference.predict_task import PredictTask

log = logging.getLogger(__name__)

_COUNTS, _UNKNOWN = ".missing-raw.npy", ".unknown.json"
_CHUNKS_PER_QUERY = 2**16


@dataclass(frozen=True, eq=False)
class Presence:
    """Where one target grid has raw, from which chunks are stored now."""

    source: Multiscale
    layout: Layout

    @cached_property
    def _level(self) -> int:
        return self.source.level_for(self.layout.model.voxel_size)  # as `Multiscale.read_raw` chooses it

    @cached_property
    def _chunk_of(self) -> list[NDArray[np.int64]]:
        """Per axis, the raw's chunk that each target voxel lies in; -1 beyond the raw."""
        level, target = self.source.levels[self._level], self.layout.target
        found = []
        for axis, centers in enumerate(target.axes()):
            size, half = level.grid.voxel_size[axis], target.voxel_size[axis] / 2
            low, high = level.grid.box.begin[axis], level.grid.box.end[axis]
            index = np.floor((centers - low) / size + 1e-6).astype(np.int64)
            chunk = np.clip(index, 0, level.grid.shape[axis] - 1) // level.chunks[axis]
            overlaps = (centers + half > low + 1e-6 * size) & (centers - half < high - 1e-6 * size)
            found.append(np.where(overlaps, chunk, -1))
        return found

    def _stored(self, low: Sequence[int], high: Sequence[int]) -> NDArray[np.bool_]:
        """Whether the chunks with indices ``low`` to ``high`` (exclusive) are stored."""
        level = self.source.levels[self._level]
        begin = [a * c for a, c in zip(low, level.chunks, strict=True)]
        end = [min(b * c, n) for b, c, n in zip(high, level.chunks, level.grid.shape, strict=True)]
        return self.source.stored_chunks(level.grid.crop(begin, shape_between(begin, end)))

    def missing(self) -> NDArray[np.int64]:
        """Return (blocks,): how many target voxels of each block have no raw. Raises `StoreError`."""
        per_axis, counts, low, high = [], [], [], []
        for chunk, step in zip(self._chunk_of, self.layout.block_shape, strict=True):
            block, there = np.arange(len(chunk)) // step, chunk >= 0
            first, last = (int(chunk[there].min()), int(chunk.max()) + 1) if there.any() else (0, 0)
            table = np.zeros((int(block[-1]) + 1, last - first), np.int64)
            np.add.at(table, (block[there], chunk[there] - first), 1)
            per_axis.append(table)
            counts.append(np.bincount(block))
            low.append(first)
            high.append(last)
        missing = np.einsum("a,b,c->abc", *counts)
        depth = max(1, _CHUNKS_PER_QUERY // max(1, (high[1] - low[1]) * (high[2] - low[2])))
        if min(shape_between(low, high)) > 0:
            for z in range(low[0], high[0], depth):
                end = min(z + depth, high[0])
                stored = self._stored((z, *low[1:]), (end, *high[1:])).astype(np.int64)
                along_z = per_axis[0][:, z - low[0] : end - low[0]]
                missing -= np.einsum("az,by,cx,zyx->abc", along_z, *per_axis[1:], stored, optimize=True)
        return missing.reshape(-1)

    def absent(self, number: int) -> NDArray[np.bool_]:
        """Return which voxels of a block have no raw; bool of the block's shape."""
        begin, block = self.layout.blocks[number]
        chunks = [chunk[b : b + n] for chunk, b, n in zip(self._chunk_of, begin, block.shape, strict=True)]
        there = [chunk >= 0 for chunk in chunks]
        if not all(inside.any() for inside in there):
            return np.ones(block.shape, bool)
        low = [int(chunk[inside].min()) for chunk, inside in zip(chunks, there, strict=True)]
        stored = self._stored(low, [int(chunk.max()) + 1 for chunk in chunks])
        has_raw = stored[np.ix_(*(np.maximum(chunk - b, 0) for chunk, b in zip(chunks, low, strict=True)))]
        return ~(has_raw & there[0][:, None, None] & there[1][:, None] & there[2])

    def first(self, number: int) -> str:
        """Describe where the first voxel without raw of a block is."""
        voxel = np.add(self.layout.blocks[number][0], np.argwhere(self.absent(number))[0])
        chunks = [int(chunk[i]) for chunk, i in zip(self._chunk_of, voxel, strict=True)]
        place = " ".join(f"{p:.10g}" for p in self.layout.target.to_world(voxel))
        level = self.source.levels[self._level]
        if min(chunks) < 0:
            return f"at {place} nm, beyond {self.source.location}, which covers {level.grid.box}"
        corner = level.grid.crop([k * c for k, c in zip(chunks, level.chunks, strict=True)], (1, 1, 1))
        return f"at {place} nm, where {self.source.chunk_locations(corner)[1][0]} is not stored"


def presences(task: PredictTask) -> list[Presence]:
    """Return for every target of the task, in their order, which of its raw is stored."""
    source = Multiscale.open(task.raw)
    return [Presence(source, layout) for layout, _ in task.layouts]


def missing_raw(task: PredictTask) -> NDArray[np.int64]:
    """Return (blocks,): how many target voxels of each block have no raw now; 0 for blocks wholly outside the mask.

    Raises `InputError` if a target has no raw at all, `StoreError` if the store does not answer.
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
            index, inside = task.locate(int(number))
            if not mask.touches(where[index].layout.blocks[inside][1]):
                counts[number] = 0
    return counts


def require_raw(task: PredictTask, counts: NDArray[np.int64]) -> None:
    """Raise `InputError` if voxels have no raw and the task does not allow that."""
    if counts.any() and not task.allow_missing_raw:
        raise InputError(
            f"{task.name}: {_percent(task, counts)} of the voxels to predict have no raw ({int(counts.sum())} of "
            f"{_voxels(task)}, the first {_first(task, counts)}); fetch that raw, predict a smaller region, or set "
            "data.allow_missing_raw=true to store probability 0 there"
        )


def keep_missing(task: PredictTask, counts: NDArray[np.int64]) -> None:
    """Store what is missing before a run; blocks that are done already keep what was missing then."""
    before = kept_missing(task)
    if (done := _done_map(task)) is not None:
        done_before = np.ones(len(counts), bool)
        done_before[done.missing] = False
        counts = np.where(done_before, before, counts)
    _store_counts(task, counts, before)
    if counts.any():
        log.warning("%s: %s of the voxels have no raw and get probability 0", task.name, _percent(task, counts))


def kept_missing(task: PredictTask) -> NDArray[np.int64]:
    """Return (blocks,): voxels without raw as `keep_missing` has stored them; zeros if nothing is stored."""
    file, blocks = task.folder / _COUNTS, sum(len(layout.blocks) for layout, _ in task.layouts)
    if not file.exists():
        return np.zeros(blocks, np.int64)
    try:
        counts: NDArray[np.int64] = np.load(io.BytesIO(file.read_bytes()))
    except (OSError, ValueError) as error:
        raise MetadataError(f"cannot read {file} ({error}); predict again with --overwrite") from error
    if counts.shape != (blocks,):
        raise MetadataError(f"{file} counts {len(counts)} blocks, expected {blocks}; predict again with --overwrite")
    return counts


def confirm_missing(task: PredictTask) -> None:
    """After the last block, also record raw that disappeared during the run.

    Raises `StoreError` unless missing raw is allowed; the blocks concerned are then predicted again by the next run.
    """
    before = kept_missing(task)
    counts = np.maximum(before, missing_raw(task))
    gone = np.flatnonzero(counts > before)
    if len(gone) and not task.allow_missing_raw:
        if (done := _done_map(task)) is not None:
            done.mark(map(int, gone), 0)
        for stage in task.stages[1:]:  # coarser levels, which were made from these blocks
            done_file(task.folder, stage).unlink(missing_ok=True)
        raise StoreError(
            f"{task.name}: raw under {len(gone)} blocks went missing while they were predicted (the first "
            f"{_first(task, counts - before)}); restore it, then rerun the same command to predict them again"
        )
    _store_counts(task, counts, before)


def give_up(task: PredictTask, failed: Mapping[int, str]) -> None:
    """Store blocks (number -> why they failed) as 0, and record them."""
    for number in failed:
        index, inside = task.locate(number)
        layout = task.layouts[index][0]
        begin, block = layout.blocks[inside]
        for group in task.groups:
            if group.layout is layout:
                writer = group.array()
                writer.write(begin, np.zeros(block.shape, writer.dtype))
    known = {str(number): why for number, why in sorted((_given_up(task.folder) | dict(failed)).items())}
    write_file(task.folder / _UNKNOWN, json.dumps(known, indent=2).encode())


def forget(folder: Path) -> None:
    """Remove all records of blocks: none of them is done."""
    for file in (*folder.glob(".done-*"), folder / _COUNTS, folder / _UNKNOWN):
        file.unlink(missing_ok=True)


def attributes(task: PredictTask, layout: Layout | None = None) -> dict[str, Any]:
    """Return what the attributes of the region, or of the classes of one target grid, say of what is missing."""
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


def _voxels(task: PredictTask) -> int:
    return sum(layout.target.size for layout, _ in task.layouts)


def _percent(task: PredictTask, counts: NDArray[np.int64]) -> str:
    return f"{100 * int(counts.sum()) / _voxels(task):.3g} %"


def _first(task: PredictTask, counts: NDArray[np.int64]) -> str:
    """Describe where the first voxel without raw is, in the first block with a count."""
    index, inside = task.locate(int(np.flatnonzero(counts)[0]))
    return presences(task)[index].first(inside)


def _done_map(task: PredictTask) -> DoneMap | None:
    stage = task.stages[0]
    return DoneMap.of(task, stage) if done_file(task.folder, stage).exists() else None


def _store_counts(task: PredictTask, counts: NDArray[np.int64], before: NDArray[np.int64]) -> None:
    if counts.any() or before.any():
        content = io.BytesIO()
        np.save(content, counts)
        write_file(task.folder / _COUNTS, content.getvalue())


def _given_up(folder: Path) -> dict[int, str]:
    return {int(number): str(why) for number, why in (store.read_json(folder / _UNKNOWN) or {}).items()}
