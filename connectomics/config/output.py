"""The group ``output``: how predict and decode store their arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from connectomics.config.values import Group, checked, one_of

_LARGE = 512**3  # voxels: smaller arrays open at once without coarser levels
_PYRAMID = checked(lambda value: value in (True, False, "auto"), "must be auto, true or false")
_SHAPE = checked(
    lambda value: isinstance(value, Sequence) and len(value) == 3 and all(8 <= n <= 4096 for n in value),
    "must be three numbers of voxels (z, y, x) from 8 to 4096",
)


@dataclass
class OutputConfig(Group):
    """How predict and decode store probabilities and labels; a submission is Zarr v2 in any case."""

    format: Annotated[str, one_of("0.4", "0.5")] = "0.4"  # OME-Zarr: 0.4 (Zarr v2) | 0.5 (Zarr v3, sharded)
    chunk: Annotated[list[int], _SHAPE] = field(default_factory=lambda: [64, 64, 64])  # voxels, z y x
    shard: Annotated[list[int], _SHAPE] | None = None  # 0.5: voxels of a file; None: a block
    #: coarser levels, for viewers: true, false, or auto: of arrays with more than 512^3 voxels
    pyramid: Annotated[Any, _PYRAMID] = "auto"


def wants_pyramid(pyramid: bool | str, voxels: int) -> bool:
    """Return whether ``output.pyramid`` asks for coarser levels of an array with so many voxels."""
    return voxels > _LARGE if pyramid == "auto" else bool(pyramid)
