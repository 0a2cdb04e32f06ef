"""Masks of volumes of any size: where the probability is above a threshold."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from connectomics.decoding.blocks.labels_task import LabelsTask
from connectomics.decoding.probabilities import above, open_probabilities, read_block
from connectomics.errors import ConfigError
from connectomics.io.write import ArrayWriter, write_file
from connectomics.tasks.block_task import BlockWorker, Cost, Worker

_PRESENT = "present"  # a file that is there once a block held any foreground


@dataclass(frozen=True)
class MaskTask(LabelsTask):
    """The mask of a class whose voxels are decided each for itself: method ``threshold``, no minimum size, no filling.

    Raises:
        ConfigError: other parameters.
    """

    kind: ClassVar[str] = "mask"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.parameters.is_local:
            raise ConfigError(f"the mask of {self.class_name}: expected a threshold alone, found {self.parameters}")

    @property
    def stages(self) -> tuple[str, ...]:
        return ("write",)

    def prepare(self, stage: str) -> None:
        if not self.is_complete:
            self.create_labels(np.dtype(np.uint8))

    def open_worker(self, stage: str, device: str) -> AbstractContextManager[Worker]:
        return nullcontext(_MaskWorker(self))

    def conclude(self) -> int:
        return int((self.scratch / _PRESENT).exists())

    def cost(self, stage: str) -> Cost:
        voxels = self.largest_block
        return Cost(read=2 * voxels, written=voxels, memory=6 * voxels)


class _MaskWorker(BlockWorker):
    def __init__(self, task: MaskTask) -> None:
        self._source, self._lattice = open_probabilities(task.input), task.lattice
        self._writer = ArrayWriter.open(task.folder / "s0")
        self._threshold, self._present = task.parameters.threshold, task.scratch / _PRESENT

    def do(self, number: int) -> None:
        begin, shape = self._lattice.region(number)
        mask = above(read_block(self._source, begin, shape), self._threshold)
        if mask.any() and not self._present.exists():
            write_file(self._present, b"")
        self._writer.write(begin, mask.view(np.uint8))
