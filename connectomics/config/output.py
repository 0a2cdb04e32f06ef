"""The group ``output``: how predict and decode store their arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from connectomics.config.values import Group, checked, one_of


def _is_shape(value: Any) -> bool:
    return isinstance(value, Sequence) and len(value) == 3 and all(8 <= n <= 4096 for n in value)


_SHAPE = checked(_is_shape, "must be three numbers of voxels (z, y, x) from 8 to 4096")


@dataclass
class OutputConfig(Group):
    """How predict and decode store probabilities and labels; a submission is Zarr v2 in any case."""

    format: Annotated[str, one_of("0.4", "0.5")] = "0.4"  # OME-Zarr: 0.4 (Zarr v2) | 0.5 (Zarr v3, sharded)
    chunk: Annotated[list[int], _SHAPE] = field(default_factory=lambda: [64, 64, 64])  # voxels, z y x
    shard: Annotated[list[int], _SHAPE] | None = None  # 0.5: voxels of a file; None: a block
