"""A task for `bench_engine.py` whose blocks write nothing: they do nothing, or as much arithmetic as they are told."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from connectomics.tasks import BlockTask
from connectomics.tasks.block_task import TASK_FILE


@dataclass(frozen=True)
class IdleTask(BlockTask):
    """``count`` blocks, in each of which ``sines`` million sines are taken, by one thread."""

    kind: ClassVar[str] = "idle"

    output: str
    count: int
    sines: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "the task") -> Self:
        return cls(**data)

    @property
    def name(self) -> str:
        return "idle"

    @property
    def folder(self) -> Path:
        return Path(self.output)

    @property
    def stages(self) -> tuple[str, ...]:
        return ("idle",)

    def check(self, *, overwrite: bool = False) -> bool:
        return True

    def claim(self, *, overwrite: bool = False) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.save(self.folder / TASK_FILE)

    def prepare(self, stage: str) -> None:
        pass

    def blocks(self, stage: str) -> int:
        return self.count

    def open_worker(self, stage: str, device: str) -> AbstractContextManager[IdleWorker]:
        return nullcontext(IdleWorker(self.sines))

    def finish(self) -> None:
        pass


class IdleWorker:
    """Takes sines."""

    def __init__(self, sines: int) -> None:
        self._sines, self._values = sines, np.linspace(0, 1, 1_000_000)

    def run(self, blocks: Sequence[int]) -> Iterator[int]:
        for number in blocks:
            for _ in range(self._sines):
                np.sin(self._values)
            yield number
