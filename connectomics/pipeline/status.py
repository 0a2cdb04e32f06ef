"""How far an output is: blocks done and failed, rate and forecast, from the files beside it, while others write it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from connectomics.errors import ConnectomicsError, MissingError
from connectomics.io.artifacts import is_complete
from connectomics.pipeline.run_task import load_task
from connectomics.tasks.block_task import TASK_FILE
from connectomics.tasks.blocks import DONE, FAILED

_LINES = 64  # changes of a done-map that give the rate
_LINE_BYTES = 40
_ARRAYS = ("s", "c", ".blocks")  # folders of levels, of chunks and of scratch, which hold no task


@dataclass(frozen=True)
class StageStatus:
    """A stage of one output.

    Attributes:
        output: folder of the task, below the folder that was asked for. stage: its name.
        is_complete: whether the whole output is.
        blocks, done, failed: number of blocks; None: not known. Failed ones are done again by the next run.
        rate: blocks per second of all processes, over the latest changes; None: unknown.
        idle_s: seconds since a block was last marked as done; None: unknown.
    """

    output: str
    stage: str
    is_complete: bool
    blocks: int | None
    done: int | None
    failed: int | None
    rate: float | None = None
    idle_s: float | None = None

    @property
    def left_s(self) -> float | None:
        """Seconds until the stage is done at this rate; None if the rate is unknown."""
        if self.blocks is None or self.done is None or not self.rate:
            return None
        return (self.blocks - self.done) / self.rate

    @property
    def state(self) -> str:
        """``complete``, ``running``, ``unfinished`` or ``waiting`` (for the stages before it)."""
        if self.is_complete or (self.blocks is not None and self.done == self.blocks):
            return "complete"
        if self.blocks is None:
            return "waiting"
        recent = self.idle_s is not None and self.idle_s < max(60.0, 5 / (self.rate or 1.0))
        return "running" if recent else "unfinished"


def status(folder: str | Path) -> list[StageStatus]:
    """Return the stages of every output of `predict`, blockwise `decode`, `measure` and `mesh` below a folder.

    Only reads; the processes that write may run on any machine that sees the same disk.

    Raises:
        MissingError: there is no such folder, or no task in it.
    """
    root = Path(folder)
    found = [stage for path in sorted(_task_files(root)) for stage in _stages(path, root)]
    if not found:
        raise MissingError(
            f"no {TASK_FILE} below {root}: expected an output of predict, decode (block by block), measure or mesh"
        )
    return found


def _task_files(root: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(root):
        folders[:] = [n for n in folders if n not in _ARRAYS and not (n[:1] == "s" and n[1:].isdigit())]
        if TASK_FILE in files:
            yield Path(place, TASK_FILE)


def _stages(path: Path, root: Path) -> Iterator[StageStatus]:
    place = path.parent
    name = os.path.relpath(place, root)
    try:
        stages = load_task(path).stages
    except (ConnectomicsError, OSError):  # its input has moved; what was done can still be counted
        stages = tuple(sorted(file.name.removeprefix(".done-") for file in place.glob(".done-*") if not file.suffix))
    complete = is_complete(place)
    for stage in stages:
        file = place / f".done-{stage}"
        yield StageStatus(name, stage, complete, *_counts(file), *((None, None) if complete else _rate(file)))


def _counts(file: Path) -> tuple[int | None, int | None, int | None]:
    """Return the blocks of a done-map: all, done, failed; None if there is none."""
    try:
        states = file.read_bytes().partition(b"\n")[2]
    except OSError:
        return None, None, None
    return len(states), states.count(DONE), states.count(FAILED)


def _rate(file: Path) -> tuple[float | None, float | None]:
    """Return blocks per second over the latest changes of a done-map, and the seconds since the last one."""
    try:
        with file.with_name(f"{file.name}.rate").open("rb") as lines:
            lines.seek(max(0, os.fstat(lines.fileno()).st_size - _LINES * _LINE_BYTES))
            rows = [line.split() for line in lines.read().splitlines()]
    except OSError:
        return None, None
    changes = [(float(row[0]), int(row[1])) for row in rows if len(row) == 2 and b"." in row[0]][1:]
    if len(changes) < 2:
        return None, None if not changes else time.time() - changes[-1][0]
    (begin, first), (end, last) = changes[0], changes[-1]
    return (last - first) / (end - begin) if end > begin and last > first else None, time.time() - end
