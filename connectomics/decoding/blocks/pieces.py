"""What is kept of a labelled block: its pieces (a table) and the labels on its six faces."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from connectomics.errors import CorruptDataError
from connectomics.geometry import Index
from connectomics.io.write import write_file
from connectomics.tasks.blocks import RANK

Number = TypeVar("Number", bound=np.generic)


@dataclass(frozen=True)
class Pieces:
    """The connected pieces 1..n of a block, or the objects of a volume (row i: label i + 1). 64 bytes a row.

    Attributes:
        sizes: (n,) int64 voxels.
        first: (n,) int64 number of the first voxel in z-y-x order of the whole volume.
        boxes: (n, 6) int32 smallest z y x, largest z y x (voxels of the volume, both inside).
        sums: (n, 3) int64 sums of z, y and x over the voxels.
    """

    sizes: NDArray[np.int64]
    first: NDArray[np.int64]
    boxes: NDArray[np.int32]
    sums: NDArray[np.int64]

    @classmethod
    def empty(cls, n: int) -> Pieces:
        """Rows of zeros."""
        return cls(np.zeros(n, np.int64), np.zeros(n, np.int64), np.zeros((n, 6), np.int32), np.zeros((n, 3), np.int64))

    @classmethod
    def measured(cls, labels: NDArray[Any], n: int, begin: Sequence[int], shape: Sequence[int]) -> Pieces:
        """The labels 1..n of a block (d, h, w) that starts at voxel ``begin`` of a volume of ``shape``."""
        from connectomics.decoding.blocks.component_kernels import measure

        found = cls.empty(n)
        where = np.asarray(begin, np.int64), np.asarray(shape, np.int64)
        measure(labels, *where, found.sizes, found.first, found.boxes, found.sums)
        return found

    def __len__(self) -> int:
        return len(self.sizes)

    def take(self, rows: NDArray[Any]) -> Pieces:
        """Some of the rows (indices or a mask)."""
        return Pieces(self.sizes[rows], self.first[rows], self.boxes[rows], self.sums[rows])

    def inside(self, begin: Sequence[int], block: Sequence[int], shape: Sequence[int]) -> NDArray[np.bool_]:
        """(n,) which pieces reach no face that the block shares with another: they are whole."""
        low, high = np.asarray(begin), np.asarray(begin) + block - 1
        reaches = (self.boxes[:, :3] == low) & (low > 0)
        reaches |= (self.boxes[:, 3:] == high) & (high < np.asarray(shape) - 1)
        found: NDArray[np.bool_] = ~reaches.any(axis=1)
        return found

    @property
    def columns(self) -> dict[str, NDArray[Any]]:
        """The arrays by their names."""
        return {"sizes": self.sizes, "first": self.first, "boxes": self.boxes, "sums": self.sums}


def faces_of(labels: NDArray[Number]) -> dict[str, NDArray[Number]]:
    """The labels of a block's faces by axis and side: ``0-`` is z at its begin (h, w), ``2+`` x at its end (d, h)."""
    sides = {"-": 0, "+": -1}
    return {f"{axis}{sign}": np.take(labels, at, axis=axis) for axis in range(3) for sign, at in sides.items()}


def border(faces: dict[str, NDArray[Number]], step: Index) -> NDArray[Number]:
    """The labels of a block next to its neighbour in direction ``step``: face (h, w), edge (1, n), corner (1, 1)."""
    axis = next(a for a in range(3) if step[a])
    plane = faces[f"{axis}{'+' if step[axis] > 0 else '-'}"]
    for other, direction in zip((0, 1), (s for a, s in enumerate(step) if a != axis), strict=True):
        if direction:
            end = plane.shape[other] - 1
            plane = np.take(plane, [end if direction > 0 else 0], axis=other)
    return np.ascontiguousarray(plane if plane.shape[1] != 1 else plane.T)


def reach(step: Index, connectivity: int) -> int:
    """How far voxels on both sides of that border may be apart along it (sum over its axes) and hold together."""
    return RANK[connectivity] - sum(map(abs, step))


def save_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Store named arrays in one step, compressed; the same arrays give the same bytes. `WriteError`."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        for name, values in arrays.items():
            about = zipfile.ZipInfo(f"{name}.npy")  # with a date that is always the same
            about.compress_type = zipfile.ZIP_DEFLATED
            with file.open(about, "w", force_zip64=True) as part:
                np.lib.format.write_array(part, np.asanyarray(values), allow_pickle=False)
    write_file(path, buffer.getbuffer())


def load_arrays(path: Path, names: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
    """What `save_arrays` stored, or some of it, by name; `CorruptDataError` where it cannot be read."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in (stored.files if names is None else names)}
    except (OSError, ValueError, KeyError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise CorruptDataError(f"cannot read {path}: {error}; begin again with --overwrite") from error
