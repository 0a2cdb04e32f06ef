"""Labels of a batch as a loss takes them: class by class.

`DenseLabels` has one array per class: 800 MB for 48 classes of two 128^3 patches. `PackedLabels` has one small number
per voxel and a table of what it means, 4 MB for the same patches; a class is unpacked only while a loss reads it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from connectomics.cellmap.labels import FRACTION_STEPS
from connectomics.errors import InputError

_THRESHOLD = 0.5  # a voxel with a label above this counts as present
_FEW_STATES = 64  # that a GPU counts one by one
_CODES = (torch.uint8, torch.int16, torch.int32)


@dataclass(frozen=True, eq=False)
class Labels(ABC):
    """Labels of a batch: B samples, C classes, D x H x W voxels."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """(B, C, D, H, W), which the logits must have."""

    @abstractmethod
    def of(self, channel: int) -> tuple[Tensor, Tensor]:
        """Return label float32 0..1 and known bool of a class, both (B, D, H, W); labels mean nothing if unknown."""

    def _tensors(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    @property
    def device(self) -> torch.device:
        """The device that holds the labels."""
        return next(iter(self._tensors().values())).device

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Return the same labels on a device."""
        moved = {name: tensor.to(device, non_blocking=non_blocking) for name, tensor in self._tensors().items()}
        return replace(self, **moved)

    def tally(self) -> Tensor:
        """Count per class: samples where it is present, voxels where it is present, voxels where it is known.

        Returns int64 (3, C) on the device of the labels. Present is a known label above 1/2.
        """
        counts = []
        for channel in range(self.channels):
            label, known = self.of(channel)
            present = ((label > _THRESHOLD) & known).sum((1, 2, 3))
            counts.append(torch.stack([(present > 0).sum(), present.sum(), known.sum()]))
        return torch.stack(counts, 1)

    @property
    def batch(self) -> int:
        """Number of samples."""
        return self.shape[0]

    @property
    def channels(self) -> int:
        """Number of classes."""
        return self.shape[1]

    def dense(self) -> DenseLabels:
        """Return the labels with one array per class."""
        label, known = zip(*(self.of(channel) for channel in range(self.channels)), strict=True)
        return DenseLabels(torch.stack(label, 1), torch.stack(known, 1))


@dataclass(frozen=True, eq=False)
class DenseLabels(Labels):
    """Labels with one array per class."""

    label: Tensor  # float32 (B, C, D, H, W), 0..1; anything where unknown
    known: Tensor  # bool (B, C, D, H, W)

    def __post_init__(self) -> None:
        if self.label.ndim != 5 or self.label.shape != self.known.shape or self.known.dtype != torch.bool:
            raise InputError(
                "label and known (bool) must have one shape (B, C, D, H, W), got label "
                f"{tuple(self.label.shape)}, known {tuple(self.known.shape)} of {self.known.dtype}"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, C, D, H, W)."""
        return tuple(self.label.shape)

    def of(self, channel: int) -> tuple[Tensor, Tensor]:
        """Return label and known of a class, (B, D, H, W), as torch views if possible."""
        return self.label[:, channel].float(), self.known[:, channel]


@dataclass(frozen=True, eq=False)
class PackedLabels(Labels):
    """Labels as one code per voxel: class c is present at voxel (z, y, x) of sample b if
    ``present[b, c, codes[b, z, y, x]]`` and known if ``known[b, c, codes[b, z, y, x]]``.
    """

    #: uint8, int16 or int32 (B, D, H, W), from 0 to K - 1; checked in host memory only: a GPU would make the host wait
    codes: Tensor
    present: Tensor  # bool (B, C, K)
    known: Tensor  # bool (B, C, K)
    fraction: Tensor | None = None  # uint8 (B, C, K), soft labels in sixteenths; the label is then fraction / 16

    def __post_init__(self) -> None:
        tables = self.present.shape
        if self.codes.ndim != 4 or self.codes.dtype not in _CODES:
            raise InputError(
                f"codes must be uint8, int16 or int32 (B, D, H, W), got {self.codes.dtype} {tuple(self.codes.shape)}"
            )
        shapes_fit = len(tables) == 3 and tables[0] == len(self.codes) and self.known.shape == tables
        if not shapes_fit or {self.present.dtype, self.known.dtype} != {torch.bool}:
            raise InputError(
                f"the tables of {len(self.codes)} samples must be two bool (B, C, K), got present {tuple(tables)} of "
                f"{self.present.dtype} and known {tuple(self.known.shape)} of {self.known.dtype}"
            )
        if self.fraction is not None and (self.fraction.shape != tables or self.fraction.dtype != torch.uint8):
            raise InputError(
                f"the fractions must be uint8 {tuple(tables)}, as present, got {self.fraction.dtype} "
                f"{tuple(self.fraction.shape)}"
            )
        if self.codes.device.type == "cpu" and self.codes.numel():
            low, high = (int(v) for v in torch.aminmax(self.codes))
            if low < 0 or high >= tables[2]:
                raise InputError(
                    f"codes must be from 0 to {tables[2] - 1}, the states of the batch's tables, got {low} to {high}"
                )

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, C, D, H, W)."""
        return len(self.codes), self.present.shape[1], *self.codes.shape[1:]

    @cached_property
    def _places(self) -> Tensor:
        """int32 (voxels of all samples,): place of a voxel's state in the concatenated tables of all samples.

        Computed once for all classes.
        """
        first = torch.arange(self.batch, dtype=torch.int32, device=self.device) * self.present.shape[2]
        return (self.codes.reshape(self.batch, -1) + first[:, None]).reshape(-1)

    def of(self, channel: int) -> tuple[Tensor, Tensor]:
        """Return label and known of a class, (B, D, H, W): two look-ups in tables of B K numbers."""
        # index_select of a flat index is torch's fastest look-up on a CPU
        table = self.present if self.fraction is None else self.fraction
        values = table[:, channel].reshape(-1).float()
        if self.fraction is not None:
            values = values / FRACTION_STEPS
        label = values.index_select(0, self._places)
        known = self.known[:, channel].reshape(-1).index_select(0, self._places)
        return label.view(self.codes.shape), known.view(self.codes.shape)

    def tally(self) -> Tensor:
        """Count as `Labels.tally`, from the number of voxels in each state."""
        often = self.often(self.present.shape[2])[:, None]  # (B, 1, K)
        present = ((self.present & self.known) * often).sum(2)  # (B, C)
        return torch.stack([(present > 0).sum(0), present.sum(0), (self.known * often).sum((0, 2))])

    def often(self, states: int, one_by_one: bool | None = None) -> Tensor:
        """Return the number of voxels in each state, int64 (B, K); ``one_by_one`` is faster on a GPU for few states,
        since `torch.bincount` makes the host wait for the smallest and the largest code."""
        if states <= _FEW_STATES and self.codes.is_cuda if one_by_one is None else one_by_one:
            return torch.stack([(self.codes == state).sum((1, 2, 3)) for state in range(states)], 1)
        return torch.bincount(self._places, minlength=self.batch * states).view(self.batch, states)


def labels_of(batch: Mapping[str, Tensor]) -> Labels:
    """Return the labels of a batch: ``codes``, ``present``, ``known_states`` and, if they are soft, ``fraction``; or
    ``label`` and ``known``.

    Raises `InputError` if neither are there or they do not fit each other.
    """
    if {"codes", "present", "known_states"} <= batch.keys():
        return PackedLabels(batch["codes"], batch["present"], batch["known_states"], batch.get("fraction"))
    if {"label", "known"} <= batch.keys():
        return DenseLabels(batch["label"], batch["known"].bool())
    raise InputError(
        "a batch must have labels, either codes, present and known_states or label and known, got "
        f"{', '.join(map(str, batch)) or 'nothing'}"
    )
