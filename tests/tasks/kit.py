"""A task that is small and does real work: cubes numbers, block by block, to files; blocks can be made to fail, to kill
their process, to hang, and to take too much memory."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from connectomics.errors import CorruptDataError, MetadataError, MissingError, WriteError
from connectomics.geometry import Box
from connectomics.io.place import place
from connectomics.io.store import StoreError
from connectomics.tasks import BlockTask, Cost
from connectomics.tasks.block_task import TASK_FILE


@dataclass(frozen=True)
class CubeTask(BlockTask):
    """Two stages: block n writes n + offset to ``first/n``; then n**3 of what lies there to ``second/n``.

    Attributes:
        fail: blocks of the first stage that fail as long as the file ``mended`` is not there.
        full, lost, poor: block of the first stage at which the disk is full, the store is lost, and memory runs out,
            likewise.
        kill, hang, hog: blocks of the first stage whose process is killed, which never end, and which take half a
            gigabyte, the first ``times`` times that they are tried.
        pause: seconds that a block takes. opening: why no worker can be opened, or "".
        run: consecutive blocks that go to one worker.
        accepting: whether blocks of the first stage can be accepted as failed; they then have boxes.
    """

    kind: ClassVar[str] = "cube"
    free: ClassVar[frozenset[str]] = frozenset({"pause", "opening", "run", "accepting"})

    output: str
    count: int = 8
    offset: int = 0
    fail: tuple[int, ...] = ()
    full: int = -1
    lost: int = -1
    poor: int = -1
    kill: tuple[int, ...] = ()
    hang: tuple[int, ...] = ()
    hog: tuple[int, ...] = ()
    times: int = 1000
    pause: float = 0.0
    opening: str = ""
    run: int = 1
    accepting: bool = False

    def to_dict(self) -> dict[str, Any]:
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "the task") -> Self:
        try:
            return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in data.items()})
        except TypeError as error:
            raise MetadataError(f"{where}: {error}") from error

    @property
    def name(self) -> str:
        return Path(self.output).name

    @property
    def folder(self) -> Path:
        return place(self.output)

    @property
    def stages(self) -> tuple[str, ...]:
        return "first", "second"

    def check(self, *, overwrite: bool = False) -> bool:
        file = self.folder / TASK_FILE
        if not overwrite and file.exists() and (difference := self.difference(file)):
            raise WriteError(f"{self.output} is of another task, {difference}")
        return overwrite or not (self.folder / "sum").exists()

    def claim(self, *, overwrite: bool = False) -> None:
        if overwrite:
            for path in sorted(self.folder.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.save(self.folder / TASK_FILE)

    def prepare(self, stage: str) -> None:
        (self.folder / stage).mkdir(exist_ok=True)

    def blocks(self, stage: str) -> int:
        return self.count

    def open_worker(self, stage: str, device: str) -> AbstractContextManager[CubeWorker]:
        if self.opening == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.opening:
            raise MissingError(self.opening)
        (self.folder / f"{stage}.{os.getpid()}.opened").write_text(device)
        return nullcontext(CubeWorker(self, stage))

    def finish(self) -> None:
        total = sum(int(np.load(self.folder / "second" / f"{n}.npy")) for n in range(self.count))
        (self.folder / "sum").write_text(json.dumps(total))

    def relocated(self, folder: Path) -> Self:
        return replace(self, output=str(folder))

    def block_box(self, stage: str, block: int) -> Box | None:
        return Box((block, 0, 0), (block + 1, 1, 1)) if self.accepting else None

    def accepts(self, stage: str) -> str:
        return f"set/{self.name}" if stage == "first" and self.accepting else ""

    def accept(self, stage: str, failed: Mapping[int, str]) -> None:
        for number, why in failed.items():
            np.save(self.folder / stage / f"{number}.npy", np.asarray(0))
            (self.folder / f"unknown-{number}").write_text(why)

    def run_length(self, stage: str) -> int:
        return self.run

    def cost(self, stage: str) -> Cost:
        return Cost(read=8, written=8, memory=16)


@dataclass(frozen=True)
class CubeWorker:
    task: CubeTask
    stage: str

    def run(self, blocks: Sequence[int]) -> Iterator[int]:
        folder = self.task.folder
        for number in blocks:
            if self.task.pause:
                time.sleep(self.task.pause)
            with (folder / f"{self.stage}.log").open("a") as log:
                log.write(f"{number}\n")
            if self.stage == "second":
                np.save(folder / "second" / f"{number}.npy", np.load(folder / "first" / f"{number}.npy") ** 3)
            else:
                mended = (folder / "mended").exists()
                if number in self.task.fail and not mended:
                    raise CorruptDataError(f"no good data for {number}")
                self._trouble(number)
                if number == self.task.full and not mended:
                    raise WriteError(f"cannot write {number}: no space left on the device")
                if number == self.task.lost and not mended:
                    raise StoreError(f"cannot read {number}: the disk is not mounted")
                if number == self.task.poor and not mended:
                    raise MemoryError(f"no memory for {number}")
                np.save(folder / "first" / f"{number}.npy", np.asarray(number + self.task.offset))
            yield number

    def _trouble(self, number: int) -> None:
        task = self.task
        if number not in (*task.kill, *task.hang, *task.hog) or self.tried(task, "first").count(number) > task.times:
            return
        if number in task.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        held = np.ones(2**26) if number in task.hog else None  # half a gigabyte
        time.sleep(3600)
        del held

    @staticmethod
    def tried(task: CubeTask, stage: str) -> list[int]:
        return [int(line) for line in (task.folder / f"{stage}.log").read_text().split()]


def outputs(task: CubeTask) -> dict[str, bytes]:
    """All that the task is there for, by file."""
    files = [*task.folder.glob("first/*"), *task.folder.glob("second/*"), task.folder / "sum"]
    return {str(file.relative_to(task.folder)): file.read_bytes() for file in files}
