"""What each block says about the instances in it, and the sums over all blocks.

A block stores one row of whole numbers per instance. Rows of the same ID are added (boxes: minimum and maximum), so
the sums do not depend on the block shape or on the order of the blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics.errors import InputError

#: Voxels of a block unless a task says otherwise, z y x.
BLOCK = (256, 256, 256)
#: IDs whose rows are summed at a time: 200 MB with their columns, whatever the number of instances.
IDS_AT_ONCE = 1 << 19
NO_PAIRS = np.zeros((0, 2), np.uint64)


@dataclass(frozen=True)
class BlockSums:
    """Sums over a block, or over several.

    Attributes:
        ids: (n,) uint64, without repetition.
        tables: name -> (n, width) int64; ``boxes`` holds smallest z y x, largest z y x.
        pairs: (m, 2) uint64, for contacts: ID here and ID of the other class, without repetition.
    """

    ids: NDArray[np.uint64]
    tables: dict[str, NDArray[np.int64]]
    pairs: NDArray[np.uint64]

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """All arrays by name, as a block stores them."""
        return {"ids": self.ids, "pairs": self.pairs, **self.tables}

    @classmethod
    def of(cls, arrays: Mapping[str, NDArray[Any]]) -> BlockSums:
        """Invert `arrays`."""
        tables = {name: table for name, table in arrays.items() if name not in ("ids", "pairs")}
        return cls(arrays["ids"], tables, arrays["pairs"])

    def select(self, rows: NDArray[np.bool_] | slice) -> BlockSums:
        """Return the sums of some rows, with all pairs."""
        return BlockSums(self.ids[rows], {name: table[rows] for name, table in self.tables.items()}, self.pairs)


def empty_tables(widths: Mapping[str, int], n: int) -> dict[str, NDArray[np.int64]]:
    """Return tables of n rows to which nothing has been added yet; ``widths``: columns by table name."""
    made = {name: np.zeros((n, width), np.int64) for name, width in widths.items()}
    if "boxes" in made:
        made["boxes"][:, :3], made["boxes"][:, 3:] = np.iinfo(np.int64).max, -1
    return made


def sum_blocks(
    number: int, load: Callable[[int], BlockSums], widths: Mapping[str, int], at_once: int = IDS_AT_ONCE
) -> Iterator[BlockSums]:
    """Yield the sums over blocks ``0 .. number - 1`` in parts of ``at_once`` ascending IDs.

    Every block is loaded once for its IDs, and once more for each part that its IDs reach into. Memory: about 40 bytes
    per instance for the list of IDs, 16 per block, and the rows of one part.
    """
    ranges = np.zeros((number, 2), np.uint64)  # smallest and largest ID of every block
    ranges[:, 0] = 1  # an empty range: reaches into nothing
    every = _distinct_ids(number, load, ranges)
    for begin in range(0, len(every), at_once):
        ids = every[begin : begin + at_once]
        tables, pairs = empty_tables(widths, len(ids)), [NO_PAIRS]
        for block in np.flatnonzero((ranges[:, 0] <= ids[-1]) & (ranges[:, 1] >= ids[0])).tolist():
            part = load(block)
            chosen = part.select((part.ids >= ids[0]) & (part.ids <= ids[-1]))
            rows = np.searchsorted(ids, chosen.ids)
            for name, table in tables.items():
                found = chosen.tables[name]
                if name == "boxes":
                    table[rows, :3] = np.minimum(table[rows, :3], found[:, :3])
                    table[rows, 3:] = np.maximum(table[rows, 3:], found[:, 3:])
                else:
                    table[rows] += found
            pairs.append(part.pairs[(part.pairs[:, 0] >= ids[0]) & (part.pairs[:, 0] <= ids[-1])])
        yield BlockSums(ids, tables, np.unique(np.concatenate(pairs), axis=0))


def sum_in_memory(parts: Sequence[BlockSums], widths: Mapping[str, int]) -> BlockSums:
    """Return the sum of parts that are in memory."""
    nothing = BlockSums(np.zeros(0, np.uint64), empty_tables(widths, 0), NO_PAIRS)
    return next(sum_blocks(len(parts), parts.__getitem__, widths, at_once=1 << 62), nothing)


def _distinct_ids(number: int, load: Callable[[int], BlockSums], ranges: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """All IDs in ascending order; fills ``ranges``. Unites whenever as many IDs wait as are known."""
    known, waiting, n = np.zeros(0, np.uint64), list[NDArray[np.uint64]](), 0
    for block in range(number):
        if not len(ids := load(block).ids):
            continue
        ranges[block] = ids.min(), ids.max()
        waiting.append(ids)
        n += len(ids)
        if n > max(IDS_AT_ONCE, len(known)):
            known, waiting, n = np.unique(np.concatenate([known, *waiting])), [], 0
    return np.unique(np.concatenate([known, *waiting]))


def compact(labels: NDArray[Any], *, semantic: bool) -> tuple[NDArray[np.uint32], NDArray[np.uint64]]:
    """Return the labels of a block as 0 and 1..n, and the IDs (n,) of these; semantic: everything above 0 is ID 1."""
    import fastremap

    if semantic or labels.dtype == np.bool_:
        mask = labels > 0
        return mask.astype(np.uint32), np.ones(int(mask.any()), np.uint64)
    if labels.dtype.kind == "i" and (smallest := int(labels.min(initial=0))) < 0:
        raise InputError(f"the labels hold {smallest}, expected IDs from 0 on; give them other values")
    numbered, names = fastremap.renumber(labels, preserve_zero=True)
    ids = np.zeros(len(names) - (0 in names), np.uint64)
    for old, new in names.items():
        if new:
            ids[int(new) - 1] = old
    return np.ascontiguousarray(numbered, np.uint32), ids
