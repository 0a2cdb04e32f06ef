"""Labels that decode wrote, on the grid of a crop: what the page offers for acceptance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.cellmap.editing import EditableLabels
from connectomics.decoding.label_artifact import clear_unknown
from connectomics.decoding.prediction import find_arrays
from connectomics.errors import InputError, MissingError
from connectomics.geometry import VoxelGrid
from connectomics.io.artifacts import require_complete
from connectomics.io.multiscale import Multiscale
from connectomics.io.store import join

_BLOCK = (64, 512, 512)  # voxels held at a time


class PredictedLabels:
    """Decoded labels of one class that overlap the drawn ones, whatever the name of their crop or box."""

    def __init__(self, root: Path, dataset: str, labels: EditableLabels) -> None:
        """Open what a folder of ``pytc decode`` has of the class.

        Raises:
            MissingError: nothing of the class overlaps. MetadataError, IncompleteError: it is no decoded label.
            InputError: the drawn labels have no value for unknown voxels, or its IDs do not fit into their type.
        """
        if labels.unknown is None:
            raise InputError(f"{labels.name} has no value for unknown voxels, so there is nothing to accept into it")
        self.labels, self._unknown, self.dataset = labels, labels.unknown, dataset
        #: The crops of the prediction that have the class here.
        self.crops: list[str] = []
        #: Each with what it says of itself, and what is added to its IDs: crops number their instances alike.
        self._found: list[tuple[Multiscale, dict[str, Any], int]] = []
        largest = 0
        for found, crop, name in find_arrays(root):
            if (found, name) != (dataset, labels.name):
                continue
            place = join(str(root), f"{found}.zarr", crop, name)
            about = require_complete(place, "labels")
            source = Multiscale.open(place)
            if not source.grid.box.intersect(labels.grid.box).is_empty:
                self._found.append((source, about, largest))
                self.crops.append(crop)
                if labels.kind == "instance":
                    parts = (source.read_nearest(part, level=0)[0] for _, part in labels.grid.blocks(_BLOCK))
                    largest += max(int(values.max(initial=0)) for values in parts)
        if not self._found:
            raise MissingError(f"{root} has no labels of {labels.name} of {dataset} in {labels.grid.box}")
        #: Largest ID that `read` may return.
        self.largest = largest + 1
        if labels.kind == "instance" and self.largest > np.iinfo(labels.dtype).max:
            raise InputError(f"{labels.name}: predicted IDs up to {self.largest} do not fit into {labels.dtype}")

    def to_page(self, number: int) -> int:
        """Return an ID of the file as `read` shows it."""
        return number + (number >= self._unknown)

    def to_file(self, number: int) -> int:
        """Return an ID that `read` shows as it is in the file."""
        return number - (number > self._unknown)

    def read(self, z: int) -> NDArray[Any]:
        """Return section ``z`` of the drawn labels' grid in their encoding, (H, W); unknown if not predicted.

        IDs from the value of unknown on are one larger than in the file, and those of a second crop follow the first.
        """
        grid: VoxelGrid = self.labels.grid.crop((z, 0, 0), (1, *self.labels.grid.shape[1:]))
        out = np.full(grid.shape[1:], self._unknown, self.labels.dtype)
        for source, about, more in self._found:
            values, inside = source.read_nearest(grid, level=0)
            known = inside.astype(np.uint8)
            clear_unknown(known, about, grid)
            if self.labels.kind == "semantic":
                values = values != 0
            else:
                values = np.where(values != 0, values.astype(np.uint64) + np.uint64(more), 0)
                values = np.where(values >= self._unknown, values + np.uint64(1), values)
            new = np.where(values == 0, self.labels.absent, values).astype(self.labels.dtype)
            out = np.where(known[0] != 0, new[0], out)
        return out
