"""What a run has been shown: patches and voxels by class, counted exactly over an epoch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from connectomics.errors import InputError

_NAMES = ("patches", "present", "known")  # rows of `Labels.tally`


class ClassCounts:
    """Counts of the training patches of an epoch, by class.

    ``patches`` in which the class is present somewhere, voxels where it is ``present`` (labelled, and known), voxels
    where it is ``known``; a patch counts as often as it was drawn, and as the network got it, augmented. 64-bit
    integers on the device of the batches, so that counting makes no step wait.
    """

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = tuple(classes)
        self.values = self._none()

    def _none(self) -> Tensor:
        return torch.zeros((len(_NAMES), len(self.classes)), dtype=torch.int64)

    def reset(self) -> None:
        """Forget everything."""
        self.values = self._none()

    def add(self, tally: Tensor) -> None:
        """Count a batch: `Labels.tally`, int64 (3, C)."""
        self.values = self.values.to(tally.device) + tally

    def metrics(self, total: Tensor) -> dict[str, int]:
        """``data/<class>/patches``, ``.../present``, ``.../known`` of counts (3, C), of all processes added up."""
        rows = total.tolist()
        return {
            f"data/{name}/{what}": rows[row][channel]
            for channel, name in enumerate(self.classes)
            for row, what in enumerate(_NAMES)
        }

    def load(self, values: Tensor) -> None:
        """Go on from counts (3, C); `InputError` where they are of another number of classes."""
        if values.shape != self.values.shape:
            raise InputError(
                f"counts of {len(self.classes)} classes have shape {tuple(self.values.shape)}, found "
                f"{tuple(values.shape)}: the checkpoint is of other classes"
            )
        self.values = values.to(torch.int64).clone()
