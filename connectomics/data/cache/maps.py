"""Files mapped into memory, of which a process keeps the latest few."""

from __future__ import annotations

import mmap
import os
from collections import OrderedDict
from pathlib import Path

KEPT_BYTES = 64 << 20
_KEPT_FILES = 64


class Maps:
    """Read-only maps of whole files; those used last are kept.

    Mapping a file is quick, but every page of it costs a fault when it is first touched: for a patch half as much as
    the copy itself. So the latest maps stay, as far as they have ``limit`` bytes in all: pages that are mapped count as
    a process's own memory, and a map holds a file descriptor, of which hundreds of crops would need too many.

    A kept map is used again only while the file is the one that was mapped: reading beyond the end of one that was cut
    short would end the process.
    """

    def __init__(self, limit: int = KEPT_BYTES) -> None:
        self._limit = limit
        self._kept: OrderedDict[str, tuple[tuple[int, int, int], mmap.mmap]] = OrderedDict()

    def get(self, path: Path) -> mmap.mmap:
        """The file's map, as long as something refers to it. Raises `FileNotFoundError`; an empty file cannot be
        mapped (`ValueError`)."""
        name = str(path)
        found = os.stat(name)
        state = (found.st_ino, found.st_size, found.st_mtime_ns)
        kept = self._kept.pop(name, None)
        if kept is None or kept[0] != state:
            descriptor = os.open(name, os.O_RDONLY)
            try:
                kept = state, mmap.mmap(descriptor, os.fstat(descriptor).st_size, access=mmap.ACCESS_READ)
            finally:
                os.close(descriptor)
        if len(kept[1]) <= self._limit:
            self._kept[name] = kept
            self._shrink()
        return kept[1]

    def _shrink(self) -> None:
        total = sum(len(mapped) for _, mapped in self._kept.values())
        while total > self._limit or len(self._kept) > _KEPT_FILES:
            total -= len(self._kept.popitem(last=False)[1][1])

    def __len__(self) -> int:
        return len(self._kept)
