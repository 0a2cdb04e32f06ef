"""Labels that decode wrote, on the grid of a crop: what the page offers for acceptance."""

from __future__ import annotations

from collections import Counter
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
from connectomics.metrics.overlaps import pair_counts


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
        self._found: list[tuple[Multiscale, dict[str, Any]]] = []
        for found, crop, name in find_arrays(root):
            if (found, name) != (dataset, labels.name):
                continue
            place = join(str(root), f"{found}.zarr", crop, name)
            about = require_complete(place, "labels")
            source = Multiscale.open(place)
            if not source.grid.box.intersect(labels.grid.box).is_empty:
                self._found.append((source, about))
                self.crops.append(crop)
        if not self._found:
            raise MissingError(f"{root} has no labels of {labels.name} of {dataset} in {labels.grid.box}")
        #: By crop: ID in the file -> ID that `read` returns.
        self._shown = self._ids() if labels.kind == "instance" else []
        #: Largest ID that `read` may return.
        self.largest = max((number for ids in self._shown for number in ids.values()), default=1)
        labels.widen(self.largest)
        if labels.kind == "instance" and self.largest > np.iinfo(labels.dtype).max:
            raise InputError(f"{labels.name}: predicted IDs up to {self.largest} do not fit into {labels.dtype}")

    def _ids(self) -> list[dict[int, int]]:
        """Return for each crop which ID in the file is shown as which, as far as they occur here.

        Those of a second crop follow the first: crops number their instances alike. An ID that a drawn instance has is
        shown as another one, unless most of what is drawn on the predicted instance has it: then it was accepted.
        """
        counts, drawn = [Counter[tuple[int, int]]() for _ in self._found], set[int]()
        for z in range(self.labels.grid.shape[0]):
            there = self.labels.read(z)[None]
            there = np.where((there == self._unknown) | (there == self.labels.absent), 0, there)
            drawn.update(np.unique(there).tolist())
            for (source, _), count in zip(self._found, counts, strict=True):
                pairs = pair_counts(there, source.read_nearest(self._section(z), level=0)[0])
                for mine, predicted, n in zip(*(values.tolist() for values in pairs), strict=True):
                    count[mine, predicted] += n
        sizes = [max(predicted for _, predicted in count) for count in counts]
        shown, before = list[dict[int, int]](), 0
        for count, size in zip(counts, sizes, strict=True):
            on: Counter[int] = Counter()
            for (mine, predicted), n in count.items():
                on[predicted] += n if mine else 0
            shown.append({})
            for predicted in sorted(on.keys() - {0}):
                number = predicted + before
                while (page := self._free(number)) in drawn and 2 * count[page, predicted] <= on[predicted]:
                    number += sum(sizes)
                shown[-1][predicted] = page
            before += size
        return shown

    def to_page(self, number: int) -> int:
        """Return an ID of the file, of the only crop, as `read` shows it."""
        return self._shown[0].get(number, self._free(number))

    def to_file(self, number: int) -> int:
        """Return an ID that `read` shows as it is in the file of the only crop."""
        found = (mine for mine, page in self._shown[0].items() if page == number)
        return next(found, number - (number > self._unknown))

    def _free(self, number: int) -> int:
        """Make room for the value of unknown."""
        return number + (number >= self._unknown)

    def _section(self, z: int) -> VoxelGrid:
        return self.labels.grid.crop((z, 0, 0), (1, *self.labels.grid.shape[1:]))

    def read(self, z: int) -> NDArray[Any]:
        """Return section ``z`` of the drawn labels' grid in their encoding, (H, W); unknown if not predicted.

        IDs from the value of unknown on are one larger than in the file; see `_ids` for others that differ.
        """
        import fastremap

        grid = self._section(z)
        out = np.full(grid.shape[1:], self._unknown, self.labels.dtype)
        for crop, (source, about) in enumerate(self._found):
            values, inside = source.read_nearest(grid, level=0)
            known = inside.astype(np.uint8)
            clear_unknown(known, about, grid)
            if self.labels.kind == "semantic":
                values = values != 0
            else:
                values = fastremap.remap(values.astype(np.uint64), {0: 0, **self._shown[crop]})
            new = np.where(values == 0, self.labels.absent, values).astype(self.labels.dtype)
            out = np.where(known[0] != 0, new[0], out)
        return out
