"""A task that is small and does real work: cubes a volume, block by block, to files; blocks can be made to fail."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from connectomics.errors import CorruptDataError, WriteError
from connectomics.tasks import BlockTask, Cost
from connectomics.tasks.task import TASK_FILE


@dataclass(frozen=True)
class CubeTask(BlockTask):
    """Two stages: block n writes n + offset to ``first/n``; then n**3 of what lies there to ``second/n``.

    Attributes:
        fail: blocks of the first stage that fail as long as the file ``mended`` is not there.
        full: block of the first stage at which the disk is full, likewise.
        pause: seconds that a block takes.
    """

    kind: ClassVar[str] = "cube"
    free: ClassVar[frozenset[str]] = frozenset({"pause"})

    output: str
    count: int = 8
    offset: int = 0
    fail: tuple[int, ...] = ()
    full: int = -1
    pause: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "fail": list(self.fail)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "the task") -> Self:
        return cls(**{**data, "fail": tuple(data["fail"])})

    @property
    def name(self) -> str:
        return Path(self.output).name

    @property
    def folder(self) -> Path:
        return Path(self.output)

    @property
    def stages(self) -> tuple[str, ...]:
        return "first", "second"

    def check(self, *, overwrite: bool = False) -> bool:
        file = self.folder / TASK_FILE
        if not overwrite and file.exists() and (differing := self.differences(CubeTask.load(file))):
            raise WriteError(f"{self.output} is of another task ({', '.join(differing)} differ)")
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
        return nullcontext(CubeWorker(self, stage))

    def finish(self) -> None:
        total = sum(int(np.load(self.folder / "second" / f"{n}.npy")) for n in range(self.count))
        (self.folder / "sum").write_text(json.dumps(total))

    def cost(self, stage: str) -> Cost:
        return Cost(read=8, written=8, memory=16)


@dataclass(frozen=True)
class CubeWorker:
    task: CubeTask
    stage: str

    def run(self, blocks: Sequence[int]) -> Iterator[int]:
        folder = self.task.folder
        for number in blocks:
            time.sleep(self.task.pause)
            with (folder / f"{self.stage}.log").open("a") as log:
                log.write(f"{number}\n")
            if self.stage == "second":
                np.save(folder / "second" / f"{number}.npy", np.load(folder / "first" / f"{number}.npy") ** 3)
            else:
                mended = (folder / "mended").exists()
                if number in self.task.fail and not mended:
                    raise CorruptDataError(f"no good data for {number}")
                if number == self.task.full and not mended:
                    raise WriteError(f"cannot write {number}: no space left on the device")
                np.save(folder / "first" / f"{number}.npy", np.asarray(number + self.task.offset))
            yield number

    @staticmethod
    def tried(task: CubeTask, stage: str) -> list[int]:
        return [int(line) for line in (task.folder / f"{stage}.log").read_text().split()]
