"""Numba kernels for open hash tables of pairs of nodes; the length of a table is a power of two."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from connectomics.decoding.blocks.component_kernels import Array, Flags, Keys

EMPTY = np.uint64(0xFFFFFFFFFFFFFFFF)  # a free place
SHIFT, LOW = np.uint64(32), np.uint64(0xFFFFFFFF)  # a key >> SHIFT is its first node, a key & LOW its second one


@numba.njit(cache=True, nogil=True)
def pair_key(a: Any, b: Any) -> Any:
    """One number for an unordered pair of nodes."""
    low, high = (a, b) if a < b else (b, a)
    return (np.uint64(low) << SHIFT) | np.uint64(high)


def filled(table: Keys, *values: Array) -> list[Any]:
    """The first and the second node of each key in a table (int64), and the values beside the keys."""
    chosen = np.flatnonzero(table != EMPTY)
    keys = table[chosen]
    return [(keys >> SHIFT).astype(np.int64), (keys & LOW).astype(np.int64), *(v[chosen] for v in values)]


@numba.njit(cache=True, nogil=True)
def slot_of(table: Keys, key: Any) -> Any:
    """Where ``key`` is in a table, or the free place where it belongs."""
    mask = np.uint64(len(table) - 1)
    # the finalizer of MurmurHash3 (A. Appleby, public domain): every bit of the key moves every bit of the place
    mixed = key
    mixed ^= mixed >> np.uint64(33)
    mixed *= np.uint64(0xFF51AFD7ED558CCD)
    mixed ^= mixed >> np.uint64(33)
    mixed *= np.uint64(0xC4CEB9FE1A85EC53)
    mixed ^= mixed >> np.uint64(33)
    at = mixed & mask
    while table[at] != EMPTY and table[at] != key:
        at = (at + np.uint64(1)) & mask
    return at


@numba.njit(cache=True, nogil=True)
def enlarged(table: Keys, kept: Flags) -> Any:
    """A table of the ``kept`` places of another one, at most a quarter full, and how many there are."""
    size, live = len(table), 0
    for at in range(size):
        live += kept[at]
    while size < 4 * live:
        size *= 2
    larger = np.full(size, EMPTY, np.uint64)
    for at in range(len(table)):
        if kept[at]:
            larger[slot_of(larger, table[at])] = table[at]
    return larger, live


@numba.njit(cache=True, nogil=True)
def moved(values: Array, table: Keys, kept: Flags, larger: Keys) -> Array:
    """The values beside the keys of a table, beside those of its `enlarged` one."""
    found = np.empty(len(larger), values.dtype)
    for at in range(len(table)):
        if kept[at]:
            found[slot_of(larger, table[at])] = values[at]
    return found
