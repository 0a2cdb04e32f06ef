"""Where a prediction was given up (``unknown`` in its attributes, see `connectomics.inference.gaps`): nothing is known
there, so nothing is found there, and labels say so in an attribute of the same name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.geometry import Box, VoxelGrid
from connectomics.io.multiscale import Multiscale
from connectomics.io.write import ArrayWriter

Attributes = Mapping[str, Any]  # the ``connectomics`` attribute of probabilities or labels


def unknown_of(*sources: Multiscale | None) -> dict[str, Any]:
    """The attribute ``unknown`` of what is decoded from some probabilities; empty if all of them are known."""
    found: list[Any] = []
    for source in sources:
        about = {} if source is None else source.attrs.get("connectomics", {})
        found += [item for item in about.get("unknown", []) if item not in found]
    return {"unknown": found} if found else {}


def unknown_share(about: Attributes) -> float:
    """The share of the volume of an array that is unknown."""
    grid = VoxelGrid.from_dict(about["grid"]) if about.get("unknown") else None
    if grid is None or grid.size == 0:
        return 0.0
    return sum(int(np.prod([s.stop - s.start for s in part])) for part in _parts(about, grid)) / grid.size


def blank(labels: NDArray[Any], about: Attributes, grid: VoxelGrid) -> None:
    """Set labels (on ``grid``) to 0 where they are unknown, also in holes that were filled."""
    for part in _parts(about, grid):
        labels[part] = 0


def blank_stored(array: ArrayWriter, about: Attributes, grid: VoxelGrid) -> None:
    """The same of a stored array."""
    for part in _parts(about, grid):
        array.write([s.start for s in part], np.zeros([s.stop - s.start for s in part], array.dtype))


def _parts(about: Attributes, grid: VoxelGrid) -> Iterator[tuple[slice, slice, slice]]:
    for item in about.get("unknown", []):
        begin, end = item["box"]
        part = grid.slices(Box(begin, end))
        if min(s.stop - s.start for s in part) > 0:
            yield part
