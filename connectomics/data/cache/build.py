"""Decoding a crop into the files of a cache entry, block by block."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from connectomics.cellmap.label_codes import LabelStates, StateTable, code_dtype
from connectomics.data.cache.entry import describe
from connectomics.data.cache.key import VERSION, Decodable
from connectomics.geometry import Index, VoxelGrid

POINTS = 4096  # positions kept of each class: enough that patches differ, small whatever the crop
_BLOCK = (128, 128, 128)
_PIECE = 16 << 20


def build(volume: Decodable, folder: Path) -> None:
    """Write all files of the crop's entry into a folder that is there and empty; ``entry.json`` comes last.

    Memory is a row of blocks of 128 voxels and what the reader caches, whatever the crop's size.
    """
    _build_raw(volume, folder)
    states, counts, points = _build_labels(volume, folder)
    np.save(folder / "states.npy", states.to_array())
    np.save(folder / "points.npy", np.concatenate([*points.values(), np.zeros((0, 3), np.int32)]))
    for name in ("raw.npy", "inside.npy", "codes.npy"):
        settle(folder / name)
    n_points = {name: len(found) for name, found in points.items()}
    describe(folder, volume.crop.key, volume.cached_raw_grid, volume.grid, counts, n_points, states, VERSION)


def _build_raw(volume: Decodable, folder: Path) -> None:
    grid = volume.cached_raw_grid
    raw = RowsFile(folder / "raw.npy", np.dtype(np.uint8), grid.shape)
    inside: RowsFile | None = None
    for begin, row in _rows(grid):
        values, mask = np.empty(row.shape, np.uint8), np.empty(row.shape, bool)
        for (_, _, x), block in row.blocks(_BLOCK):
            at = (..., slice(x, x + block.shape[2]))
            values[at], mask[at] = volume.decode_raw(block)
        raw.write(begin, values)
        if inside is None and not mask.all():  # the first hole: until here there was raw everywhere
            inside = RowsFile(folder / "inside.npy", np.dtype(bool), grid.shape)
            for earlier, whole in _rows(grid):
                if earlier < begin:
                    inside.write(earlier, np.ones(whole.shape, bool))
        if inside is not None:
            inside.write(begin, mask)
    if inside is None:
        np.save(folder / "inside.npy", np.ones((1, 1, 1), bool))


def _build_labels(
    volume: Decodable, folder: Path
) -> tuple[LabelStates, dict[str, dict[str, int]], dict[str, NDArray[np.int32]]]:
    """Write the codes; returns what they mean, counts by class, and lattice indices of voxels of each class."""
    from connectomics.data.cache.packing_kernels import scan_codes

    grid, classes, path = volume.grid, volume.classes, folder / "codes.npy"
    table = StateTable(classes, volume.instances)
    histogram = np.zeros(1, np.int64)
    seeds = np.array([_seed(volume.crop.key, name) for name in classes], np.uint64)
    priorities, places = np.zeros((len(classes), POINTS), np.uint64), np.zeros((len(classes), POINTS), np.int64)
    used = np.zeros(len(classes), np.int64)
    file = RowsFile(path, code_dtype(1), grid.shape if classes else (0, 0, 0))
    for begin, row in _rows(grid) if classes else ():
        values = np.empty(row.shape, np.uint32)
        for (_, _, x), block in row.blocks(_BLOCK):
            codes = table.encode(volume.decode_labels(block))
            values[..., x : x + block.shape[2]] = codes
            present = table.states.tables()[0]  # (C, K)
            histogram = np.concatenate([histogram, np.zeros(len(table) - len(histogram), np.int64)])
            starts = np.concatenate([[0], np.cumsum(present.sum(axis=0))]).astype(np.int64)
            members = np.nonzero(present.T)[1].astype(np.int64)
            scan_codes(
                codes, (*begin, x), grid.shape[1], grid.shape[2],
                starts, members, seeds, priorities, places, used, histogram,
            )  # fmt: skip
        if code_dtype(len(table)) != file.dtype:
            file = file.widened(code_dtype(len(table)))
        file.write(begin, values.astype(file.dtype))
    if classes and len(table) == 1:
        RowsFile(path, code_dtype(1), (0, 0, 0))  # nothing is known: beyond the codes, too, that is how it is
    present, known = table.states.tables()
    counts = {}
    for number, name in enumerate(classes):
        there, said = int(histogram[present[number]].sum()), int(histogram[known[number]].sum())
        counts[name] = {"present": there, "absent": said - there, "unknown": grid.size - said}
    points = {}
    for number, name in enumerate(classes):
        n = int(used[number])
        order = np.argsort(priorities[number, :n], kind="stable")
        index = np.unravel_index(places[number, :n][order], grid.shape)
        points[name] = np.stack(index, axis=-1).astype(np.int32)
    return table.states, counts, points


class RowsFile:
    """An ``.npy`` file of three axes that is written in rows of blocks.

    Its space is taken at once, so that a full disk is an error before the work. `settle` comes last.
    """

    def __init__(self, path: Path, dtype: np.dtype[np.generic], shape: Index) -> None:
        self.path, self.dtype, self.shape = path, dtype, shape
        with path.open("wb") as file:
            header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            file.flush()
            self._offset = file.tell()
            size = int(np.prod(shape)) * dtype.itemsize
            if size and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), self._offset, size)
            else:
                file.truncate(self._offset + size)

    def write(self, begin: tuple[int, int], values: NDArray[np.generic]) -> None:
        """Store ``values`` (d, h, W), which span the last axis, at planes and lines from ``begin``."""
        _, lines, width = self.shape
        with self.path.open("r+b") as file:
            for z, plane in enumerate(values):
                place = ((begin[0] + z) * lines + begin[1]) * width * self.dtype.itemsize
                file.seek(self._offset + place)
                np.ascontiguousarray(plane).tofile(file)

    def widened(self, dtype: np.dtype[np.generic]) -> RowsFile:
        """The same values with another type, in place of this file."""
        narrow = self.path.rename(self.path.with_suffix(".narrow"))
        wide = RowsFile(self.path, dtype, self.shape)
        with narrow.open("rb") as file:
            file.seek(self._offset)
            for z in range(self.shape[0]):
                plane = np.fromfile(file, self.dtype, self.shape[1] * self.shape[2])
                wide.write((z, 0), plane.reshape(1, *self.shape[1:]).astype(dtype))
        narrow.unlink()
        return wide


def settle(path: Path) -> None:
    """Write a finished file once more, in large pieces.

    The kernel keeps a file in memory in pieces as large as it was written in, and maps it piece by piece: 128^3 voxels
    copied from a fresh map cost 0.35 ms of CPU after writes of megabytes, 1.1 ms after writes of planes (0.30 ms from
    memory; measured with Linux on ext4), and every patch is such a copy.
    """
    settled = path.with_suffix(".settled")
    with path.open("rb") as source, settled.open("wb", buffering=0) as target:
        while piece := source.read(_PIECE):
            left = memoryview(piece)
            while left:  # a write may take less than it is given
                left = left[target.write(left) :]
    settled.rename(path)


def _rows(grid: VoxelGrid) -> Iterator[tuple[tuple[int, int], VoxelGrid]]:
    """The grid in rows of blocks along x: first plane and line, and the grid of the row."""
    for (z, y, _), row in grid.blocks((_BLOCK[0], _BLOCK[1], max(1, grid.shape[2]))):
        yield (z, y), row


def _seed(crop: str, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{crop} {name}".encode()).digest()[:8], "little")
