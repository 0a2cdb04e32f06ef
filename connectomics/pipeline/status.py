"""How far an output is: blocks done and failed, rate and time left, from the files beside it, while others write it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from connectomics.errors import ConnectomicsError, MissingError
from connectomics.io.artifacts import is_complete
from connectomics.io.place import S3Path, place, walk
from connectomics.pipeline.run_task import load_task
from connectomics.tasks.block_task import TASK_FILE
from connectomics.tasks.blocks import DONE, FAILED, RATE_LINES, done_file

_LINE_BYTES = 40
_ARRAYS = ("s", "c", ".blocks")  # folders of levels, of chunks and of scratch, which hold no task


@dataclass(frozen=True)
class StageStatus:
    """A stage of one output.

    Attributes:
        output: folder of the task, below the folder that was asked for.
        stage: its name.
        is_complete: whether the whole output is, and this stage, which may be added later.
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

    Only reads; the processes that write may run on any machine that sees the same disk or bucket.

    Raises:
        MissingError: there is no such folder, or no task in it.
    """
    root = place(folder)
    found = [stage for path in sorted(_task_files(root)) for stage in _stages(path, root)]
    if not found:
        raise MissingError(
            f"no {TASK_FILE} below {root}: expected an output of predict, decode (block by block), measure or mesh"
        )
    return found


def _task_files(root: Path) -> Iterator[Path]:
    for folder, folders, files in walk(root):
        folders[:] = [n for n in folders if n not in _ARRAYS and not (n[:1] == "s" and n[1:].isdigit())]
        if TASK_FILE in files:
            yield folder / TASK_FILE


def _stages(path: Path, root: Path) -> Iterator[StageStatus]:
    output = path.parent
    name = "/".join(output.relative_to(root).parts) or "."
    begun = sorted(file.name.removeprefix(".done-") for file in output.glob(".done-*") if not file.suffix)
    try:
        stages = load_task(path).stages
    except (ConnectomicsError, OSError):  # its input has moved; what was done can still be counted
        stages = ()
    stages = (*stages, *(stage for stage in begun if stage not in stages))  # levels may have been asked for later
    complete = is_complete(output)
    for stage in stages:
        file = done_file(output, stage)
        blocks, done, failed = _counts(file)
        ended = complete and blocks == done
        yield StageStatus(name, stage, ended, blocks, done, failed, *((None, None) if ended else _rate(file)))


def _counts(file: Path) -> tuple[int | None, int | None, int | None]:
    """Return the blocks of a done-map: all, done, failed; None if there is none."""
    try:
        states = file.read_bytes().partition(b"\n")[2]
    except OSError:
        return None, None, None
    return len(states), states.count(DONE), states.count(FAILED)


def _end_of(path: Path) -> bytes:
    """The last lines of a file; all of an object, which has no more (`connectomics.tasks.DoneMap`)."""
    if isinstance(path, S3Path):
        return path.read_bytes()
    with path.open("rb") as lines:
        lines.seek(max(0, os.fstat(lines.fileno()).st_size - RATE_LINES * _LINE_BYTES))
        return lines.read()


def _rate(file: Path) -> tuple[float | None, float | None]:
    """Return blocks per second over the latest changes of a done-map, and the seconds since the last one."""
    try:
        rows = [line.split() for line in _end_of(file.with_name(f"{file.name}.rate")).splitlines()]
    except OSError:
        return None, None
    changes = [(float(row[0]), int(row[1])) for row in rows if len(row) == 2 and b"." in row[0]][1:]
    if len(changes) < 2:
        return None, None if not changes else time.time() - changes[-1][0]
    (begin, first), (end, last) = changes[0], changes[-1]
    return (last - first) / (end - begin) if end > begin and last > first else None, time.time() - end
