"""Score instance volumes that are larger than memory, slab by slab.

cc3d finds the components of each slab; slabs are joined where equal values touch (26 neighbors). Components are
numbered in reading order of their first voxels, as cc3d numbers a whole volume, so the score equals that in memory.
Component numbers and ground truth are stored in two scratch files.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from connectomics.errors import InputError, WriteError
from connectomics.geometry import index
from connectomics.metrics.challenge.align import Readable
from connectomics.metrics.challenge.instance_distances import Box
from connectomics.metrics.challenge.scoring import prediction_array, truth_array, where_parts
from connectomics.metrics.overlaps import OverlapCounter, Overlaps, label_dtype

_PLANES = 64  # slabs of whole chunks, as chunks usually are


class BlockPair:
    """What `InMemoryPair` is, for volumes that are read slab by slab. Use it in a ``with`` block.

    ``memory_bytes`` limits the memory apart from the instance tables. The scratch files take 4 bytes per voxel and the
    ground truth's own size, in the folder for temporary files; leaving the block removes them. Raises `InputError` for
    ground-truth labels too large for the tables.
    """

    def __init__(self, pred: Readable, truth: Readable, memory_bytes: int) -> None:
        self._pred, self._truth = pred, truth
        self.shape = index(truth.shape)
        self.scratch_bytes = memory_bytes // 2
        self._max_label = max(1 << 16, memory_bytes // 64)
        plane = self.shape[1] * self.shape[2]
        # A slab costs both volumes, its components and cc3d's tables: at most about 32 bytes per voxel.
        planes = max(1, memory_bytes // (32 * plane))
        self._planes = planes // _PLANES * _PLANES if planes >= _PLANES else planes
        self.max_truth = 0
        self.nan_voxels = 0
        self.n_parts = 0

    def __enter__(self) -> BlockPair:
        self._folder = tempfile.TemporaryDirectory(prefix="connectomics-score-")
        try:
            self._label()
        except BaseException:
            self._folder.cleanup()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._folder.cleanup()

    def overlaps(self) -> Overlaps:
        counter = OverlapCounter(self.max_truth, self.n_parts)
        for begin, end in self._slabs():
            parts = self._lut[self._parts.read(begin, end)]
            self._parts.write(begin, parts)
            counter.add(self._labels.read(begin, end), parts, (begin, 0, 0))
        return counter.result()

    def count_truth(self) -> int:
        import fastremap

        found = [fastremap.unique(np.ascontiguousarray(self._labels.read(b, e))) for b, e in self._slabs()]
        return int(np.count_nonzero(np.unique(np.concatenate(found))))

    def truth_mask(self, truth_id: int, box: Box) -> NDArray[np.bool_]:
        return self._mask(self._labels, box, lambda labels: labels == truth_id)

    def parts_mask(self, parts: tuple[int, int], box: Box) -> NDArray[np.bool_]:
        return self._mask(self._parts, box, lambda numbers: where_parts(numbers, parts))

    def _mask(self, volume: _Scratch, box: Box, where: Callable[[NDArray[Any]], NDArray[Any]]) -> NDArray[np.bool_]:
        mask = np.empty([s.stop - s.start for s in box], bool)
        for first in range(box[0].start, box[0].stop, self._planes):
            last = min(first + self._planes, box[0].stop)
            mask[first - box[0].start : last - box[0].start] = where(volume.view(first, last)[:, box[1], box[2]])
        return mask

    def prediction_values(self, parts: NDArray[np.int64], first: NDArray[np.int32]) -> NDArray[Any]:
        return self._values[parts]

    # -- components ----------------------------------------------------------------------------------------------------
    def _slabs(self) -> Iterator[tuple[int, int]]:
        for begin in range(0, self.shape[0], self._planes):
            yield begin, min(begin + self._planes, self.shape[0])

    def _label(self) -> None:
        """Find components slab by slab with provisional numbers, then their final numbers in ``_lut``."""
        folder = Path(self._folder.name)
        self._parts = _Scratch(folder / "components", self.shape, np.dtype(np.uint32))
        self._labels = _Scratch(folder / "truth", self.shape, label_dtype(self._truth.dtype))
        values: list[NDArray[Any]] = [np.zeros(1, self._pred.dtype.newbyteorder("="))]
        components = SlabComponents()
        for begin, end in self._slabs():
            size = (end - begin, *self.shape[1:])
            truth = truth_array(self._truth.read((begin, 0, 0), size))
            self.max_truth = max(self.max_truth, int(truth.max()))
            self._labels.write(begin, truth)
            pred, nan = prediction_array(self._pred.read((begin, 0, 0), size))
            self.nan_voxels += nan
            before = components.count
            parts = components.add(pred)
            if components.count >= np.iinfo(np.uint32).max:
                raise InputError(f"{self._pred.where}: more than {components.count} components; nothing can be matched")
            of_part = np.zeros(components.count - before, pred.dtype)
            _values_of(parts, pred, before, of_part)
            self._parts.write(begin, parts)
            values.append(of_part)
        if self.max_truth > self._max_label:
            raise InputError(
                f"{self._truth.where}: ground-truth labels up to {self.max_truth} need tables larger than the memory; "
                f"renumber the ground truth to at most {self._max_label}"
            )
        parent = components.parents()
        roots = np.flatnonzero(parent == np.arange(parent.size))
        rank = np.zeros(parent.size, np.uint32)
        rank[roots] = np.arange(roots.size)
        self._lut = rank[parent]
        self._values = np.concatenate(values)[roots]
        self.n_parts = int(roots.size) - 1


class _Scratch:
    """A volume in a raw file; a slab is mapped only while it is used."""

    def __init__(self, path: Path, shape: tuple[int, int, int], dtype: np.dtype[Any]) -> None:
        self._path, self._shape, self._dtype = path, shape, dtype
        self._plane = shape[1] * shape[2]

    def write(self, begin: int, slab: NDArray[Any]) -> None:
        try:
            with self._path.open("r+b" if self._path.exists() else "w+b") as stream:
                stream.seek(begin * self._plane * self._dtype.itemsize)
                np.ascontiguousarray(slab, self._dtype).tofile(stream)
        except OSError as error:
            raise WriteError(f"cannot write scratch data to {self._path.parent}: {error}; set TMPDIR") from error

    def read(self, begin: int, end: int) -> NDArray[Any]:
        n = (end - begin) * self._plane
        values = np.fromfile(self._path, self._dtype, n, offset=begin * self._plane * self._dtype.itemsize)
        return values.reshape(end - begin, *self._shape[1:])

    def view(self, begin: int, end: int) -> NDArray[Any]:
        offset = begin * self._plane * self._dtype.itemsize
        return np.memmap(self._path, self._dtype, "r", offset, (end - begin, *self._shape[1:]))


class SlabComponents:
    """The 26-connected components of equal value of a volume that is given slab by slab along z.

    ``count`` is the number of provisional components so far: those of each slab on its own.
    """

    def __init__(self) -> None:
        self.count = 0
        self._joins = [np.zeros((0, 2), np.int64)]
        self._above: tuple[NDArray[Any], NDArray[np.uint32]] | None = None

    def add(self, slab: NDArray[Any]) -> NDArray[np.uint32]:
        """Return the provisional component numbers of the next slab, 0 for background."""
        import cc3d

        local, n = cc3d.connected_components(slab, return_N=True)
        numbers = np.arange(self.count, self.count + n + 1, dtype=np.uint32)
        numbers[0] = 0
        parts: NDArray[np.uint32] = numbers[local]
        if self._above is not None:
            pairs = np.empty((1 << 16, 2), np.int64)
            touching = _touching_runs(*self._above, slab[0], parts[0], pairs)
            if touching > len(pairs):
                pairs = np.empty((touching, 2), np.int64)
                _touching_runs(*self._above, slab[0], parts[0], pairs)
            self._joins.append(np.unique(pairs[:touching], axis=0))
        self._above = slab[-1].copy(), parts[-1].copy()
        self.count += n
        return parts

    def skip(self) -> None:
        """Take the next slab to be background."""
        self._above = None

    def parents(self) -> NDArray[np.int64]:
        """Return, by provisional number, the smallest number of the same component of the whole volume."""
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        one, two = np.concatenate(self._joins).T
        joins = coo_array((np.ones(len(one), bool), (one, two)), (self.count + 1, self.count + 1))
        n, component = connected_components(joins, directed=False)
        smallest = np.empty(n, np.int64)
        smallest[component[::-1]] = np.arange(self.count, -1, -1)  # the last value that is assigned to a place stays
        return smallest[component]


@njit(cache=True, nogil=True)
def _values_of(parts, values, before, out):  # type: ignore[no-untyped-def]  # pragma: no cover
    for z in range(parts.shape[0]):
        for y in range(parts.shape[1]):
            for x in range(parts.shape[2]):
                if parts[z, y, x] != 0:
                    out[parts[z, y, x] - before - 1] = values[z, y, x]


@njit(cache=True, nogil=True)
def _touching_runs(value_a, part_a, value_b, part_b, out):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Pairs of components of two neighboring planes that touch with equal values (26 neighbors), without repeats in a
    row, as far as ``out`` (n, 2) has room; returns their number."""
    n_y, n_x = part_a.shape
    n = 0
    last_a, last_b = np.int64(0), np.int64(0)
    for y in range(n_y):
        for x in range(n_x):
            if part_b[y, x] == 0:
                continue
            for v in range(max(y - 1, 0), min(y + 2, n_y)):
                for u in range(max(x - 1, 0), min(x + 2, n_x)):
                    if part_a[v, u] != 0 and value_a[v, u] == value_b[y, x]:
                        pair_a, pair_b = np.int64(part_a[v, u]), np.int64(part_b[y, x])
                        if pair_a != last_a or pair_b != last_b:
                            if n < out.shape[0]:
                                out[n, 0] = pair_a
                                out[n, 1] = pair_b
                            n += 1
                            last_a, last_b = pair_a, pair_b
    return n
