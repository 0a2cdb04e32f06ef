"""Decoding a crop into the files of a cache entry, block by block."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from connectomics.cellmap.label_codes import LabelStates, StateTable, code_dtype
from connectomics.data.cache.entry import describe
from connectomics.data.cache.key import VERSION, Decodable
from connectomics.geometry import VoxelGrid

POINTS = 4096  # positions kept of each class: enough that patches differ, small whatever the crop
_BLOCK = 128


def build(volume: Decodable, folder: Path) -> None:
    """Write all files of the crop's entry into a folder that is there and empty; ``entry.json`` comes last.

    Memory is some blocks of 128 voxels and what the reader caches, whatever the crop's size; files that are mapped are
    mapped a layer of blocks at a time.
    """
    _build_raw(volume, folder)
    states, counts, points = _build_labels(volume, folder)
    np.save(folder / "states.npy", states.to_array())
    np.save(folder / "points.npy", np.concatenate([*points.values(), np.zeros((0, 3), np.int32)]))
    n_points = {name: len(found) for name, found in points.items()}
    describe(folder, volume.crop.key, volume.cached_raw_grid, volume.grid, counts, n_points, volume.classes, VERSION)


def _build_raw(volume: Decodable, folder: Path) -> None:
    grid = volume.cached_raw_grid
    raw = LayeredFile(folder / "raw.npy", np.dtype(np.uint8), grid.shape)
    inside: LayeredFile | None = None
    for begin, end in _layers(grid):
        layer = raw.layer(begin, end)
        mask = None if inside is None else inside.layer(begin, end)
        for at, block in _blocks(grid, begin, end):
            layer[at], found = volume.decode_raw(block)
            if mask is None and not found.all():  # the first hole: until here there was raw everywhere
                inside = LayeredFile(folder / "inside.npy", np.dtype(bool), grid.shape)
                for earlier in _layers(grid):
                    if earlier[0] < begin:
                        inside.layer(*earlier)[:] = True
                mask = inside.layer(begin, end)
                mask[:] = True  # also the blocks to come, which are written over
            if mask is not None:
                mask[at] = found
    if inside is None:
        np.save(folder / "inside.npy", np.ones((1, 1, 1), bool))


def _build_labels(
    volume: Decodable, folder: Path
) -> tuple[LabelStates, dict[str, dict[str, int]], dict[str, NDArray[np.int32]]]:
    """Write the codes; returns what they mean, counts by class, and lattice indices of voxels of each class."""
    from connectomics.data.cache.kernels import scan_codes

    grid, classes, path = volume.grid, volume.classes, folder / "codes.npy"
    table = StateTable(classes)
    histogram = np.zeros(1, np.int64)
    seeds = np.array([_seed(volume.crop.key, name) for name in classes], np.uint64)
    priorities, places = np.zeros((len(classes), POINTS), np.uint64), np.zeros((len(classes), POINTS), np.int64)
    used = np.zeros(len(classes), np.int64)
    file = LayeredFile(path, code_dtype(1), grid.shape if classes else (0, 0, 0))
    for begin, end in _layers(grid) if classes else ():
        layer = file.layer(begin, end)
        for at, block in _blocks(grid, begin, end):
            codes = table.encode(volume.decode_labels(block))
            if code_dtype(len(table)) != file.dtype:
                del layer
                file = file.widened(code_dtype(len(table)))
                layer = file.layer(begin, end)
            layer[at] = codes
            present = table.states.tables()[0]  # (C, K)
            histogram = np.concatenate([histogram, np.zeros(len(table) - len(histogram), np.int64)])
            starts = np.concatenate([[0], np.cumsum(present.sum(axis=0))]).astype(np.int64)
            members = np.nonzero(present.T)[1].astype(np.int64)
            first = (begin, at[1].start, at[2].start)
            scan_codes(
                codes, first, grid.shape[1], grid.shape[2], starts, members, seeds, priorities, places, used, histogram
            )
        del layer
    if classes and len(table) == 1:
        LayeredFile(path, code_dtype(1), (0, 0, 0))  # nothing is known: beyond the codes, too, that is how it is
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


class LayeredFile:
    """An ``.npy`` file of three axes that is written a few planes at a time. Its space is taken at once: a mapped file
    is sparse, and on a full disk writing to it would kill the process (SIGBUS) without a word."""

    def __init__(self, path: Path, dtype: np.dtype[np.generic], shape: tuple[int, int, int]) -> None:
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

    def layer(self, begin: int, end: int) -> NDArray[np.generic]:
        """Planes ``begin`` to ``end`` (exclusive), mapped for writing."""
        plane = self.shape[1] * self.shape[2]
        shape = (end - begin, *self.shape[1:])
        if 0 in shape:
            return np.zeros(shape, self.dtype)
        offset = self._offset + begin * plane * self.dtype.itemsize
        return np.memmap(self.path, self.dtype, "r+", offset, shape)

    def widened(self, dtype: np.dtype[np.generic]) -> LayeredFile:
        """The same values with another type, in place of this file."""
        own = self.path
        self.path = own.rename(own.with_suffix(".narrow"))
        wide = LayeredFile(own, dtype, self.shape)
        for begin in range(0, self.shape[0], _BLOCK):
            end = min(begin + _BLOCK, self.shape[0])
            wide.layer(begin, end)[:] = self.layer(begin, end)
        self.path.unlink()
        return wide


def _layers(grid: VoxelGrid) -> list[tuple[int, int]]:
    depth = grid.shape[0]
    return [(begin, min(begin + _BLOCK, depth)) for begin in range(0, depth, _BLOCK)]


def _blocks(grid: VoxelGrid, begin: int, end: int) -> list[tuple[tuple[slice, slice, slice], VoxelGrid]]:
    """The blocks of a layer: where they are in it, and their grids."""
    found = []
    layer = grid.crop((begin, 0, 0), (end - begin, *grid.shape[1:]))
    for (z, y, x), block in layer.blocks((_BLOCK,) * 3):
        d, h, w = block.shape
        found.append(((slice(z, z + d), slice(y, y + h), slice(x, x + w)), block))
    return found


def _seed(crop: str, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{crop} {name}".encode()).digest()[:8], "little")
