"""What one block says about the instances in it, and the sum of that over all blocks.

A block's part of an instance is a row of whole numbers; rows of one id are added (boxes: smallest and largest), so the
sum does not depend on how the volume is cut nor on the order of the blocks.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.errors import CorruptDataError
from connectomics.geometry import VoxelGrid
from connectomics.io.write import write_file

_FAR = np.iinfo(np.int64).max
#: Ids whose rows are summed at a time: 200 MB with their columns, whatever the number of instances.
IDS_AT_ONCE = 1 << 19
_IDS, _PAIRS = "ids", "pairs"


@dataclass(frozen=True)
class Partial:
    """A block's part.

    Attributes:
        ids: (n,) uint64, each once. tables: by name (n, width) int64; ``boxes`` smallest z y x, largest z y x.
        pairs: (m, 2) uint64 id here and id of the other class, for contacts; each once.
    """

    ids: NDArray[np.uint64]
    tables: dict[str, NDArray[np.int64]]
    pairs: NDArray[np.uint64]

    def save(self, path: Path) -> None:
        """Store in one step."""
        import numcodecs

        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **{_IDS: self.ids, _PAIRS: self.pairs, **self.tables})
        write_file(path, numcodecs.Blosc(cname="zstd", clevel=1, shuffle=1).encode(buffer.getvalue()))

    @classmethod
    def load(cls, path: Path) -> Partial:
        """What `save` stored; `CorruptDataError`."""
        import numcodecs

        try:
            with np.load(io.BytesIO(numcodecs.Blosc().decode(path.read_bytes())), allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in stored.files}
            return cls(arrays.pop(_IDS), arrays, arrays.pop(_PAIRS))
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            raise CorruptDataError(f"cannot read {path}: {error}; measure anew with --overwrite") from error


NO_PAIRS = np.zeros((0, 2), np.uint64)


def rows(columns: Mapping[str, int], n: int) -> dict[str, NDArray[np.int64]]:
    """Tables of n rows to which nothing has been added yet; ``columns``: their names and widths."""
    made = {name: np.zeros((n, width), np.int64) for name, width in columns.items()}
    if "boxes" in made:
        made["boxes"][:, :3], made["boxes"][:, 3:] = _FAR, -1
    return made


def united(
    number: int, load: Callable[[int], Partial], columns: Mapping[str, int], at_once: int = IDS_AT_ONCE
) -> Iterator[Partial]:
    """The sums over blocks ``0 .. number - 1``, in parts of ``at_once`` ids, ascending.

    Every block is loaded once for its ids, and once more for each part that its ids reach into. Memory: about 40 bytes
    an instance for the list of ids, 16 a block, and the rows of one part.
    """
    ranges = np.zeros((number, 2), np.uint64)
    ranges[:, 0] = 1  # an empty range: reaches into nothing
    every = _distinct(_noted(number, load, ranges))
    for begin in range(0, len(every), at_once):
        ids = every[begin : begin + at_once]
        tables, pairs = rows(columns, len(ids)), []
        for block in np.flatnonzero((ranges[:, 0] <= ids[-1]) & (ranges[:, 1] >= ids[0])).tolist():
            part = load(block)
            chosen = (part.ids >= ids[0]) & (part.ids <= ids[-1])
            _add(tables, np.searchsorted(ids, part.ids[chosen]), part.tables, chosen)
            if len(part.pairs):
                pairs.append(part.pairs[(part.pairs[:, 0] >= ids[0]) & (part.pairs[:, 0] <= ids[-1])])
        yield Partial(ids, tables, np.unique(np.concatenate(pairs), axis=0) if pairs else NO_PAIRS)


def united_whole(parts: Sequence[Partial], columns: Mapping[str, int]) -> Partial:
    """The sum of parts that are in memory."""
    found = next(united(len(parts), parts.__getitem__, columns, at_once=1 << 62), None)
    return Partial(np.zeros(0, np.uint64), rows(columns, 0), NO_PAIRS) if found is None else found


def _noted(number: int, load: Callable[[int], Partial], ranges: NDArray[np.uint64]) -> Iterator[NDArray[np.uint64]]:
    """The ids of every block; smallest and largest go to ``ranges`` (blocks, 2)."""
    for block in range(number):
        ids = load(block).ids
        if len(ids):
            ranges[block] = ids.min(), ids.max()
            yield ids


def _distinct(each: Iterable[NDArray[np.uint64]]) -> NDArray[np.uint64]:
    """All ids, each once, ascending; united whenever as many wait as are known."""
    known, waiting, n = np.zeros(0, np.uint64), list[NDArray[np.uint64]](), 0
    for ids in each:
        waiting.append(ids)
        n += len(ids)
        if n > max(IDS_AT_ONCE, len(known)):
            known, waiting, n = np.unique(np.concatenate([known, *waiting])), [], 0
    return np.unique(np.concatenate([known, *waiting]))


def _add(
    tables: dict[str, NDArray[np.int64]],
    to: NDArray[np.intp],
    found: Mapping[str, NDArray[np.int64]],
    chosen: NDArray[np.bool_],
) -> None:
    """Add the chosen rows, of different ids, to the rows ``to``."""
    for name, table in tables.items():
        part = found[name][chosen]
        if name == "boxes":
            table[to, :3] = np.minimum(table[to, :3], part[:, :3])
            table[to, 3:] = np.maximum(table[to, 3:], part[:, 3:])
        else:
            table[to] += part


def compact(labels: NDArray[Any], *, semantic: bool) -> tuple[NDArray[np.uint32], NDArray[np.uint64]]:
    """Labels of a block as 0 and 1..n, and the ids (n,) that these stand for; semantic: everything above 0 is id 1."""
    import fastremap

    if semantic or labels.dtype == np.bool_:
        mask = labels > 0
        return mask.astype(np.uint32), np.ones(int(mask.any()), np.uint64)
    numbered, names = fastremap.renumber(labels, preserve_zero=True)
    ids = np.zeros(len(names) - (0 in names), np.uint64)
    for old, new in names.items():
        if new:
            ids[int(new) - 1] = old
    return np.ascontiguousarray(numbered, np.uint32), ids


def margins(
    grid: VoxelGrid, begin: Sequence[int], shape: Sequence[int]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """A block with one voxel around it as far as the grid goes: its first voxel and its shape, and the begin of the
    block in it (the block's end there is ``low + shape``)."""
    first = np.maximum(np.asarray(begin, np.int64) - 1, 0)
    end = np.minimum(np.asarray(begin, np.int64) + shape + 1, grid.shape)
    return first, end - first, np.asarray(begin, np.int64) - first
