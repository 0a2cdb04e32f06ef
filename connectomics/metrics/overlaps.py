"""Count which labels overlap, in one pass over two volumes (Numba).

`pair_counts` is the contingency table; `OverlapCounter` also counts sizes and bounding boxes, block by block. Both look
up the hash table once per run of equal voxels along x.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

from connectomics.errors import InputError

_FIRST_CAPACITY = 1 << 12
_Table = tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.int64]]


# -- a hash table of pairs ---------------------------------------------------------------------------------------------
@njit(cache=True, nogil=True, inline="always")
def _slot(first, second, keys_a, keys_b, counts):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Return the slot of a pair, or the free slot for it (linear probing, power-of-two table)."""
    mask = np.uint64(counts.size - 1)
    h = first * np.uint64(0x9E3779B97F4A7C15) ^ (second + np.uint64(0x7F4A7C15)) * np.uint64(0xC2B2AE3D27D4EB4F)
    h ^= h >> np.uint64(29)
    i = h & mask
    while counts[i] != 0 and not (keys_a[i] == first and keys_b[i] == second):
        i = (i + np.uint64(1)) & mask
    return i


@njit(cache=True, nogil=True)
def _grown(keys_a, keys_b, counts):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Return the same pairs in a table four times as large."""
    size = counts.size * 4
    new_a = np.zeros(size, np.uint64)
    new_b = np.zeros(size, np.uint64)
    new_counts = np.zeros(size, np.int64)
    for i in range(counts.size):
        if counts[i] != 0:
            j = _slot(keys_a[i], keys_b[i], new_a, new_b, new_counts)
            new_a[j] = keys_a[i]
            new_b[j] = keys_b[i]
            new_counts[j] = counts[i]
    return new_a, new_b, new_counts


@njit(cache=True, nogil=True, inline="always")
def _count(first, second, number, keys_a, keys_b, counts, used):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Add to one pair; return the table (maybe a larger one) and the number of used slots."""
    slot = _slot(first, second, keys_a, keys_b, counts)
    if counts[slot] == 0:
        if 2 * used >= counts.size:
            keys_a, keys_b, counts = _grown(keys_a, keys_b, counts)
            slot = _slot(first, second, keys_a, keys_b, counts)
        keys_a[slot] = first
        keys_b[slot] = second
        used += 1
    counts[slot] += number
    return keys_a, keys_b, counts, used


@njit(cache=True, nogil=True)
def _count_pairs(first, second, known, use_known, keys_a, keys_b, counts, used):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Add the pairs of two flat volumes; return the table (maybe a larger one) and the number of used slots."""
    n, i = first.size, 0
    while i < n:
        if use_known and not known[i]:
            i += 1
            continue
        a, b, start = first[i], second[i], i
        i += 1
        while i < n and first[i] == a and second[i] == b and (not use_known or known[i]):
            i += 1
        keys_a, keys_b, counts, used = _count(np.uint64(a), np.uint64(b), i - start, keys_a, keys_b, counts, used)
    return keys_a, keys_b, counts, used


def label_array(values: ArrayLike, what: str) -> NDArray[Any]:
    """Return labels as native unsigned integers of any shape; bool and whole floats are accepted.

    Negative labels keep their identity (two's complement). Raises `InputError` for fractions, NaN and other types.
    """
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise InputError(f"{what} must hold bool, integer or whole float labels, got dtype {array.dtype}")
    if array.dtype.kind == "f":
        if not np.all(np.isfinite(array)) or np.any(array != np.floor(array)):
            raise InputError(f"{what} must hold whole label numbers, got fractions or NaN in {array.dtype} values")
        array = array.astype(np.int64)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    return array.view(label_dtype(array.dtype))


def label_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the unsigned type that `label_array` makes of ``dtype``."""
    return np.dtype(np.uint64) if dtype.kind == "f" else np.dtype(f"u{dtype.itemsize}")


def pair_counts(first: ArrayLike, second: ArrayLike, known: ArrayLike | None = None) -> _Table:
    """Return the contingency table of two label volumes of one shape: label, label, number of voxels.

    Sorted by (first, second); label 0 is a label like any other. Only voxels where ``known`` is true count (default:
    all). Raises `InputError` if shapes differ.
    """
    a, b = label_array(first, "the first volume"), label_array(second, "the second volume")
    if a.shape != b.shape:
        raise InputError(f"two label volumes of one shape are needed, got {a.shape} and {b.shape}")
    width = max(a.dtype.itemsize, b.dtype.itemsize)  # one compiled version per width, not one per pair of types
    common = np.dtype(f"u{width}")
    mask = np.ones(1, dtype=bool) if known is None else known_mask(known, a.shape)
    *table, _ = _count_pairs(
        np.ravel(a).astype(common, copy=False), np.ravel(b).astype(common, copy=False), np.ravel(mask),
        known is not None, *_empty_table(), 0,
    )  # fmt: skip
    return _sorted(*table)


def known_mask(known: ArrayLike, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Return the mask of known voxels of volumes of a shape; raise `InputError` if it has another one."""
    mask = np.asarray(known).astype(bool, copy=False)
    if mask.shape != shape:
        raise InputError(f"the mask of known voxels must have the volumes' shape {shape}, got {mask.shape}")
    return mask


def _empty_table() -> _Table:
    n = _FIRST_CAPACITY
    return np.zeros(n, np.uint64), np.zeros(n, np.uint64), np.zeros(n, np.int64)


def _sorted(keys_a: NDArray[np.uint64], keys_b: NDArray[np.uint64], counts: NDArray[np.int64]) -> _Table:
    filled = counts > 0
    a, b, n = keys_a[filled], keys_b[filled], counts[filled]
    order = np.lexsort((b, a))
    return a[order], b[order], n[order]


# -- what the challenge's score needs ----------------------------------------------------------------------------------
@njit(cache=True, nogil=True, inline="always")
def _widen(box, z, y, x, x_end):  # type: ignore[no-untyped-def]  # pragma: no cover
    box[0], box[1] = min(box[0], z), max(box[1], z + 1)
    box[2], box[3] = min(box[2], y), max(box[3], y + 1)
    box[4], box[5] = min(box[4], x), max(box[5], x_end)


@njit(cache=True, nogil=True)
def _count_block(  # type: ignore[no-untyped-def]  # pragma: no cover
    truth, parts, begin, t_size, t_box, p_size, p_box, p_first, keys_a, keys_b, counts, used
):
    """Count one block: sizes and boxes of both volumes' labels, and the pairs that are both nonzero."""
    nz, ny, nx = truth.shape
    for z in range(nz):
        for y in range(ny):
            x = 0
            while x < nx:
                t = truth[z, y, x]
                p = parts[z, y, x]
                start = x
                x += 1
                while x < nx and truth[z, y, x] == t and parts[z, y, x] == p:
                    x += 1
                if t == 0 and p == 0:
                    continue
                n = x - start
                gz, gy, gx = begin[0] + z, begin[1] + y, begin[2] + start
                if t != 0:
                    ti = np.int64(t)
                    t_size[ti] += n
                    _widen(t_box[ti], gz, gy, gx, gx + n)
                if p != 0:
                    pi = np.int64(p)
                    if p_size[pi] == 0:
                        p_first[pi, 0] = gz
                        p_first[pi, 1] = gy
                        p_first[pi, 2] = gx
                    p_size[pi] += n
                    _widen(p_box[pi], gz, gy, gx, gx + n)
                if t != 0 and p != 0:
                    keys_a, keys_b, counts, used = _count(np.uint64(t), np.uint64(p), n, keys_a, keys_b, counts, used)
    return keys_a, keys_b, counts, used


@dataclass(frozen=True)
class Overlaps:
    """How a ground truth and the components of a prediction overlap; label 0 is background in both.

    Attributes:
        truth_ids: the ground-truth labels, ascending, (T,).
        truth_sizes, truth_boxes: voxels (T,) and boxes (T, 6) as z0 z1 y0 y1 x0 x1, end exclusive, of those labels.
        part_sizes, part_boxes, part_first: the same of components 1..P, and the first voxel (z y x) of each in reading
            order; row 0 is background and empty.
        pair_truth, pair_part, pair_voxels: overlapping pairs, sorted by (truth label, component), (E,).
    """

    truth_ids: NDArray[np.int64]
    truth_sizes: NDArray[np.int64]
    truth_boxes: NDArray[np.int32]
    part_sizes: NDArray[np.int64]
    part_boxes: NDArray[np.int32]
    part_first: NDArray[np.int32]
    pair_truth: NDArray[np.int64]
    pair_part: NDArray[np.int64]
    pair_voxels: NDArray[np.int64]

    @property
    def n_parts(self) -> int:
        """Return the number of components P."""
        return int(self.part_sizes.size) - 1

    @property
    def pair_row(self) -> NDArray[np.int64]:
        """Return the row in ``truth_ids`` of the label of every pair, (E,)."""
        return np.searchsorted(self.truth_ids, self.pair_truth)

    def pair_iou(self) -> NDArray[np.float64]:
        """Return the intersection over union of every pair, (E,)."""
        union = self.truth_sizes[self.pair_row] + self.part_sizes[self.pair_part] - self.pair_voxels
        return self.pair_voxels / union


class OverlapCounter:
    """Collects `Overlaps` from blocks that tile two volumes.

    Labels run from 0 to ``max_truth`` and 0 to ``n_parts``. The tables have that length: renumber sparse labels first.
    """

    def __init__(self, max_truth: int, n_parts: int) -> None:
        self._t_size = np.zeros(max_truth + 1, np.int64)
        self._p_size = np.zeros(n_parts + 1, np.int64)
        self._t_box = _empty_boxes(max_truth + 1)
        self._p_box = _empty_boxes(n_parts + 1)
        self._p_first = np.zeros((n_parts + 1, 3), np.int32)
        self._table = _empty_table()
        self._used = 0

    def add(self, truth: NDArray[Any], parts: NDArray[Any], begin: tuple[int, int, int] = (0, 0, 0)) -> None:
        """Count one block (unsigned, D H W, both of one shape) whose first voxel is at ``begin`` (z y x)."""
        keys_a, keys_b, counts, self._used = _count_block(
            truth, parts, np.asarray(begin, np.int64), self._t_size, self._t_box, self._p_size, self._p_box,
            self._p_first, *self._table, self._used,
        )  # fmt: skip
        self._table = keys_a, keys_b, counts

    def result(self) -> Overlaps:
        """Return everything counted so far."""
        ids = np.flatnonzero(self._t_size)
        truth, part, voxels = _sorted(*self._table)
        return Overlaps(
            ids, self._t_size[ids], self._t_box[ids], self._p_size, self._p_box, self._p_first,
            truth.astype(np.int64), part.astype(np.int64), voxels,
        )  # fmt: skip


def _empty_boxes(n: int) -> NDArray[np.int32]:
    boxes = np.zeros((n, 6), np.int32)
    boxes[:, ::2] = np.iinfo(np.int32).max
    return boxes
