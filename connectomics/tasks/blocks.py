"""The blocks that a volume is divided into, and which blocks of a stage are on disk."""

from __future__ import annotations

import ctypes
import io
import os
import struct
import time
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from connectomics.errors import CorruptDataError, WriteError, as_write_error
from connectomics.geometry import Index, index
from connectomics.io.location import StoreError
from connectomics.io.place import S3Path
from connectomics.io.write import write_file
from connectomics.tasks.block_task import BlockTask
from connectomics.tasks.lease import change

RATE_LINES = 64  # changes of a done-map that give the rate
_START = 4096  # bytes of a file of a block: enough for the first of its arrays, a single number
DONE, FAILED = 1, 2  # bytes of a done-map; all others: not done

RANK = {6: 1, 18: 2, 26: 3}  # connectivity -> along how many axes at once a neighbor may lie


@cache
def neighbor_steps(connectivity: int) -> tuple[Index, ...]:
    """Return the steps (z, y, x) from a voxel to its neighbors, in z-y-x order."""
    every = (index(np.subtract(step, 1)) for step in np.ndindex(3, 3, 3))
    return tuple(s for s in every if 0 < sum(map(abs, s)) <= RANK[connectivity])


@dataclass(frozen=True)
class Lattice:
    """Blocks of ``block`` voxels that cover ``shape`` voxels (both z y x), numbered in z-y-x order; the last ones are
    smaller."""

    shape: Index
    block: Index

    @property
    def counts(self) -> Index:
        """Blocks along each axis."""
        return index(-(-n // b) for n, b in zip(self.shape, self.block, strict=True))

    def __len__(self) -> int:
        z, y, x = self.counts
        return z * y * x

    def region(self, number: int) -> tuple[Index, Index]:
        """Return the first voxel and the shape of a block."""
        begin = index(i * b for i, b in zip(self._place(number), self.block, strict=True))
        return begin, index(min(b, n - s) for b, n, s in zip(self.block, self.shape, begin, strict=True))

    def neighbors(self, number: int, connectivity: int, *, behind: bool = False) -> Iterator[tuple[Index, int]]:
        """Yield the blocks that come after this one (``behind``: before it) and touch it by a face (connectivity 6), an
        edge (18) or a corner (26): the step (z, y, x; each -1, 0 or 1) and the number of the block there."""
        place, counts = self._place(number), self.counts
        for step in neighbor_steps(connectivity):
            z, y, x = (p + s for p, s in zip(place, step, strict=True))
            inside = all(0 <= i < n for i, n in zip((z, y, x), counts, strict=True))
            if inside and (step < (0, 0, 0)) == behind:
                yield step, (z * counts[1] + y) * counts[2] + x

    def _place(self, number: int) -> Index:
        return index(np.unravel_index(number, self.counts))


def with_halo(
    begin: Sequence[int], shape: Sequence[int], halo: Sequence[int], whole: Sequence[int]
) -> tuple[Index, Index, Index]:
    """Add ``halo`` voxels on every side of a block, as far as the volume (``whole`` voxels) goes.

    Returns the first voxel, the shape, and where in it the block begins; all z y x.
    """
    first = np.maximum(np.subtract(begin, halo), 0)
    end = np.minimum(np.add(begin, shape) + halo, whole)
    return index(first), index(end - first), index(begin - first)


@dataclass(frozen=True)
class BlockFiles:
    """The files ``folder/0``, ``folder/1``, ... that blocks leave for later stages: arrays by name."""

    folder: Path

    def save(self, number: int, arrays: Mapping[str, Any]) -> None:
        """Store the arrays of a block in one step, compressed; the same arrays give the same bytes."""
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
            for name, values in arrays.items():
                with file.open(f"{name}.npy", "w", force_zip64=True) as part:
                    np.lib.format.write_array(part, np.asanyarray(values), allow_pickle=False)
        write_file(self.folder / str(number), buffer.getbuffer())

    def load(self, number: int, *names: str) -> dict[str, NDArray[Any]]:
        """Read some arrays of a block, or all; `CorruptDataError` if that fails."""
        path = self.folder / str(number)
        with _readable(path):
            file = io.BytesIO(path.read_bytes()) if isinstance(path, S3Path) else path
            with np.load(file, allow_pickle=False) as stored:
                return {name: stored[name] for name in names or stored.files}

    def integer(self, number: int, name: str) -> int:
        """Read one number of a block; from S3 without the rest of the file, if it was stored first."""
        path = self.folder / str(number)
        if isinstance(path, S3Path):
            with _readable(path):  # zipfile would read the list at the end, and more: six requests instead of one
                start = path.read_start(_START)
                title, more = struct.unpack_from("<HH", start, 26)  # lengths of what precedes the data in a ZIP file
                if start[30 : 30 + title] == f"{name}.npy".encode():
                    data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(start[30 + title + more :])
                    return int(np.lib.format.read_array(io.BytesIO(data), allow_pickle=False))
        return int(self.load(number, name)[name])


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn the errors of a file that cannot be read into `CorruptDataError`."""
    try:
        yield
    except StoreError:  # the store does not answer: nothing is wrong with the file
        raise
    except (OSError, ValueError, KeyError, EOFError, struct.error, zlib.error, zipfile.BadZipFile) as error:
        raise CorruptDataError(f"cannot read {path}: {error}; start again with --overwrite") from error


class DoneMap:
    """A file beside the output: a line that names the task, then one byte per block, 1 once its data is written.

    A block that was being computed when a run was killed stays 0 and is done again; so is one that has `FAILED`. The
    leading process writes it, or with ``engine.share`` each process the blocks that it has claimed. The file beside it,
    ``.rate``, has a line for each change: the time (s) and the number of finished blocks.
    """

    def __init__(self, path: Path, blocks: int, key: str) -> None:
        """Open or create the map of the ``blocks`` blocks of the task ``key`` (`BlockTask.key`).

        Raises `WriteError` for the map of another task, or of another number of blocks.
        """
        self.path = path
        self._head = f"connectomics done-map {key}\n".encode()
        self._done: NDArray[np.bool_] = np.zeros(blocks, dtype=bool)
        stored = path.read_bytes() if path.exists() else b""
        if not stored:
            write_file(self.path, self._head + bytes(blocks))
            return
        if not stored.startswith(self._head) or len(stored) != len(self._head) + blocks:
            raise WriteError(
                f"the done-map {path} is of another task (expected {key} with {blocks} blocks); overwrite the "
                "output, or choose another output folder"
            )
        self._take(stored)

    @classmethod
    def of(cls, task: BlockTask, stage: str) -> Self:
        """Open or create the map of a stage; see `DoneMap`."""
        return cls(done_file(task.folder, stage), task.blocks(stage), task.key)

    def reload(self) -> None:
        """Read what other processes have marked; if one has finished the task and removed the map, all is done."""
        try:
            stored = self.path.read_bytes()
        except FileNotFoundError:
            self._done[:] = True
        else:
            self._take(stored)

    def _take(self, stored: bytes) -> None:
        self._done = np.frombuffer(stored, np.uint8, offset=len(self._head)) == DONE  # a new array

    def __len__(self) -> int:
        return len(self._done)

    @property
    def count(self) -> int:
        """Number of finished blocks."""
        return int(np.count_nonzero(self._done))

    @property
    def missing(self) -> NDArray[np.int64]:
        """Numbers of the blocks that are not done, ascending."""
        return np.flatnonzero(~self._done)

    def mark(self, blocks: Iterable[int], state: int = 1) -> None:
        """Record that ``blocks`` are finished (or another state: `FAILED`, 0); on disk when this returns."""
        numbers = sorted(blocks)
        if not numbers:
            return
        if isinstance(self.path, S3Path):
            self._mark_object(self.path, numbers, state)
            return
        with as_write_error(f"cannot write the done-map {self.path}", "free space there"):
            with self.path.open("r+b") as file:
                for number in numbers:
                    file.seek(len(self._head) + number)
                    file.write(bytes([state]))
                file.flush()
                os.fsync(file.fileno())
            self._done[numbers] = state == DONE
            with self.path.with_name(f"{self.path.name}.rate").open("a") as rate:
                rate.write(f"{time.time():.3f} {self.count}\n")

    def _mark_object(self, path: S3Path, numbers: list[int], state: int) -> None:
        places = np.add(numbers, len(self._head))

        def marked(stored: bytes) -> bytes:
            values = np.frombuffer(stored, np.uint8).copy()
            values[places] = state
            return values.tobytes()

        stored = change(path, marked)
        if stored is None:
            raise WriteError(f"the done-map {path} is gone: the output was replaced; rerun the same command")
        self._take(stored)
        rate = path.with_name(f"{path.name}.rate")
        lines = (rate.read_bytes() if rate.is_file() else b"").splitlines(keepends=True)[-RATE_LINES:]
        write_file(rate, b"".join(lines) + f"{time.time():.3f} {self.count}\n".encode())


def done_file(folder: Path, stage: str) -> Path:
    """Return the place of the done-map of a stage in the folder of a task."""
    return folder / f".done-{stage}"


def remove_traces(folder: Path, *, maps: bool = False) -> None:
    """Remove what lies beside the done-maps of a task that is about to be finished; with ``maps`` these too."""
    for path in folder.glob(".done-*" if maps else ".done-*.*"):
        path.unlink(missing_ok=True)


def sync(folder: str) -> None:
    """Wait until everything that this machine has written to the file system of ``folder`` is on its disk."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return  # nothing was written there
    try:
        syncfs = getattr(ctypes.CDLL(None, use_errno=True), "syncfs", None)  # Linux; elsewhere all file systems
        if syncfs is None or syncfs(handle) != 0:
            os.sync()
    finally:
        os.close(handle)
