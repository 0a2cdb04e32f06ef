"""Labels of a batch, as a loss takes them: class by class.

Where every class is an array of its own (`DenseLabels`), 48 classes of two 128^3 patches are 800 MB of floats, most of
them zero. `PackedLabels` holds one small number a voxel and a table that says what the number means, 4 MB for the same
patches, and a class is unpacked at the moment that it is looked at.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from connectomics.errors import InputError

_THRESHOLD = 0.5  # label from which a voxel counts as present
_CODES = (torch.uint8, torch.int16, torch.int32)


class Labels(ABC):
    """Labels of a batch: B samples, C classes, D x H x W voxels."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int, int, int]:
        """(B, C, D, H, W), what the logits must have."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where they are."""

    @abstractmethod
    def of(self, channel: int) -> tuple[Tensor, Tensor]:
        """Label float32 0..1 and known bool of a class, both (B, D, H, W); a label says nothing where unknown."""

    @abstractmethod
    def to(self, device: torch.device | str, non_blocking: bool = False) -> Labels:
        """The same labels on a device."""

    def tally(self) -> Tensor:
        """int64 (3, C): samples in which the class is present, voxels where it is present, voxels where it is known.

        Present is a label above 1/2 where known. Exact, on the labels' device.
        """
        rows = []
        for channel in range(self.channels):
            label, known = self.of(channel)
            present = ((label > _THRESHOLD) & known).sum((1, 2, 3))
            rows.append(torch.stack([(present > 0).sum(), present.sum(), known.sum()]))
        return torch.stack(rows, 1)

    @property
    def batch(self) -> int:
        """Number of samples."""
        return self.shape[0]

    @property
    def channels(self) -> int:
        """Number of classes."""
        return self.shape[1]

    @property
    def spatial_shape(self) -> tuple[int, int, int]:
        """(D, H, W)."""
        return self.shape[2:]

    def dense(self) -> DenseLabels:
        """Every class as an array of its own."""
        classes = [self.of(channel) for channel in range(self.channels)]
        return DenseLabels(torch.stack([c[0] for c in classes], 1), torch.stack([c[1] for c in classes], 1))


@dataclass(frozen=True, eq=False)
class DenseLabels(Labels):
    """Labels as they are.

    Attributes:
        label: float32 (B, C, D, H, W), 0..1; anything where unknown.
        known: bool (B, C, D, H, W).
    """

    label: Tensor
    known: Tensor

    def __post_init__(self) -> None:
        if self.label.ndim != 5 or self.label.shape != self.known.shape or self.known.dtype != torch.bool:
            raise InputError(
                "label and known (bool) must have one shape (B, C, D, H, W), found label "
                f"{tuple(self.label.shape)}, known {tuple(self.known.shape)} of {self.known.dtype}"
            )

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """(B, C, D, H, W)."""
        b, c, d, h, w = self.label.shape
        return b, c, d, h, w

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.label.device

    def of(self, channel: int) -> tuple[Tensor, Tensor]:
        """Label and known of a class, (B, D, H, W), views where they can be."""
        return self.label[:, channel].float(), self.known[:, channel]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> DenseLabels:
        """The same labels on a device."""
        return DenseLabels(
            self.label.to(device, non_blocking=non_blocking), self.known.to(device, non_blocking=non_blocking)
        )


@dataclass(frozen=True, eq=False)
class PackedLabels(Labels):
    """Labels as numbers of states: class c is present at voxel (z, y, x) of sample b where
    ``present[b, c, codes[b, z, y, x]]``, and known where ``known[b, c, ...]`` is true.

    Attributes:
        codes: uint8, int16 or int32 (B, D, H, W), all from 0 to K - 1. Checked where the codes are in host memory; on a
            GPU that would make the host wait, so check a batch before it is moved.
        present, known: bool (B, C, K).
    """

    codes: Tensor
    present: Tensor
    known: Tensor

    def __post_init__(self) -> None:
        tables = self.present.shape
        if self.codes.ndim != 4 or self.codes.dtype not in _CODES:
            raise InputError(
                f"codes must be uint8, int16 or int32 (B, D, H, W), found {self.codes.dtype} {tuple(self.codes.shape)}"
            )
        if (
            len(tables) != 3
            or tables[0] != len(self.codes)
            or self.known.shape != tables
            or {self.present.dtype, self.known.dtype} != {torch.bool}
        ):
            raise InputError(
                f"the tables of {len(self.codes)} samples must be two bool (B, C, K), found present {tuple(tables)} of "
                f"{self.present.dtype} and known {tuple(self.known.shape)} of {self.known.dtype}"
            )
        if self.codes.device.type == "cpu" and self.codes.numel():
            low, high = (int(v) for v in torch.aminmax(self.codes))
            if low < 0 or high >= tables[2]:
                raise InputError(
                    f"codes must be from 0 to {tables[2] - 1}, the states of the batch's tables, found {low} to {high}"
                )

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """(B, C, D, H, W)."""
        b, d, h, w = self.codes.shape
        return b, self.present.shape[1], d, h, w

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.codes.device

    @cached_property
    def _rows(self) -> Tensor:
        """int32 (voxels of all samples,): where a voxel's state stands in the tables of all samples, one after another.

        32 bits are half the memory of 64 and as fast; made once, for all classes.
        """
        first = torch.arange(self.batch, dtype=torch.int32, device=self.device) * self.present.shape[2]
        return (self.codes.reshape(self.batch, -1) + first[:, None]).reshape(-1)

    def of(self, channel: int) -> tuple[Tensor, Tensor]:
        """Label and known of a class, (B, D, H, W): two look-ups in tables of B K numbers.

        ``index_select`` of a flat index is the fastest look-up of torch on a CPU (2.6 ms for two 128^3 patches on one
        core; ``take`` 6, indexing 9 to 18, ``embedding`` 11).
        """
        label = self.present[:, channel].reshape(-1).float().index_select(0, self._rows)
        known = self.known[:, channel].reshape(-1).index_select(0, self._rows)
        return label.view(self.codes.shape), known.view(self.codes.shape)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedLabels:
        """The same labels on a device."""
        codes, present, known = (
            t.to(device, non_blocking=non_blocking) for t in (self.codes, self.present, self.known)
        )
        return PackedLabels(codes, present, known)

    def tally(self) -> Tensor:
        """int64 (3, C): samples with the class, voxels present, voxels known; from how often each state occurs."""
        states = self.batch * self.present.shape[2]
        often = torch.bincount(self._rows, minlength=states).view(self.batch, 1, -1)  # (B, 1, K)
        present = ((self.present & self.known) * often).sum(2)  # (B, C)
        return torch.stack([(present > 0).sum(0), present.sum(0), (self.known * often).sum((0, 2))])


def labels_of(batch: Mapping[str, Tensor]) -> Labels:
    """The labels of a batch of a loader.

    ``codes`` (B, D, H, W) with ``present`` and ``known_states`` (B, C, K) are packed, ``label`` and ``known``
    (B, C, D, H, W) dense. Raises `InputError` where neither are there, or where they do not fit each other.
    """
    if {"codes", "present", "known_states"} <= batch.keys():
        return PackedLabels(batch["codes"], batch["present"], batch["known_states"])
    if {"label", "known"} <= batch.keys():
        return DenseLabels(batch["label"], batch["known"].bool())
    raise InputError(
        "a batch must have labels, either codes, present and known_states or label and known, found "
        f"{', '.join(map(str, batch)) or 'nothing'}"
    )
