"""Decode a crop into the files of a cache entry, block by block. Imports numba: import it only to build."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numba
import numpy as np
from numpy.typing import NDArray

from connectomics.cellmap.label_codes import LabelStates, StateTable, code_dtype
from connectomics.data.cache.entry import POINTS, describe
from connectomics.geometry import Index, VoxelGrid

if TYPE_CHECKING:
    from connectomics.data.volumes import CropVolume

_BLOCK = (128, 128, 128)
_PIECE = 16 << 20


def build(volume: CropVolume, folder: Path) -> None:
    """Write all files of the crop's entry into an empty folder, ``entry.json`` last.

    Memory is bounded by one row of blocks of 128 voxels and the reader's cache.
    """
    _build_raw(volume, folder)
    states, counts, points = _build_labels(volume, folder)
    np.save(folder / "states.npy", states.to_array())
    np.save(folder / "points.npy", np.concatenate([*points.values(), np.zeros((0, 3), np.int32)]))
    for name in ("raw.npy", "inside.npy", "codes.npy"):
        settle(folder / name)
    n_points = {name: len(found) for name, found in points.items()}
    describe(folder, volume, counts, n_points, states)


def _build_raw(volume: CropVolume, folder: Path) -> None:
    grid = volume.cached_raw_grid
    raw, inside = folder / "raw.npy", folder / "inside.npy"
    new_array(raw, np.dtype(np.uint8), grid.shape)
    for begin, row in _rows(grid):
        values, mask = np.empty(row.shape, np.uint8), np.empty(row.shape, bool)
        for (_, _, x), block in row.blocks(_BLOCK):
            at = (..., slice(x, x + block.shape[2]))
            values[at], mask[at] = volume.decode_raw(block)
        write_rows(raw, begin, values)
        if not inside.exists() and not mask.all():  # the first hole: all earlier rows are complete
            new_array(inside, np.dtype(bool), grid.shape)
            for earlier, whole in _rows(grid):
                if earlier < begin:
                    write_rows(inside, earlier, np.ones(whole.shape, bool))
        if inside.exists():
            write_rows(inside, begin, mask)
    if not inside.exists():
        np.save(inside, np.ones((1, 1, 1), bool))


def _build_labels(
    volume: CropVolume, folder: Path
) -> tuple[LabelStates, dict[str, dict[str, int]], dict[str, NDArray[np.int32]]]:
    """Write the codes; return what they mean, counts by class, and lattice indices of voxels of each class."""
    grid, classes, path = volume.grid, volume.classes, folder / "codes.npy"
    table = StateTable(classes, volume.instances, volume.soft)
    histogram = np.zeros(1, np.int64)
    digests = (hashlib.sha256(f"{volume.crop.key} {name}".encode()).digest() for name in classes)
    seeds = np.array([int.from_bytes(digest[:8], "little") for digest in digests], np.uint64)
    priorities, places = np.zeros((len(classes), POINTS), np.uint64), np.zeros((len(classes), POINTS), np.int64)
    used = np.zeros(len(classes), np.int64)
    dtype = code_dtype(1)
    new_array(path, dtype, grid.shape if classes else (0, 0, 0))
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
        if code_dtype(len(table)) != dtype:
            dtype = code_dtype(len(table))
            widen(path, dtype)
        write_rows(path, begin, values)
    if classes and len(table) == 1:
        new_array(path, dtype, (0, 0, 0))  # nothing is known, as everywhere beyond the codes
    present, known = table.states.tables()
    counts, points = {}, {}
    for number, name in enumerate(classes):
        n_present, n_known = int(histogram[present[number]].sum()), int(histogram[known[number]].sum())
        counts[name] = {"present": n_present, "absent": n_known - n_present, "unknown": grid.size - n_known}
        n = int(used[number])
        order = np.argsort(priorities[number, :n], kind="stable")
        index = np.unravel_index(places[number, :n][order], grid.shape)
        points[name] = np.stack(index, axis=-1).astype(np.int32)
    return table.states, counts, points


def new_array(path: Path, dtype: np.dtype[np.generic], shape: Index) -> None:
    """Make an ``.npy`` file. Its space is allocated first, so that a full disk is an error before the work."""
    np.lib.format.open_memmap(path, "w+", dtype, shape=shape)
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def write_rows(path: Path, begin: tuple[int, int], values: NDArray[np.generic]) -> None:
    """Store ``values`` (d, h, W), which span the last axis, in an ``.npy`` file at planes and lines from ``begin``."""
    at = tuple(slice(b, b + n) for b, n in zip(begin, values.shape, strict=False))
    np.lib.format.open_memmap(path, "r+")[at] = values


def widen(path: Path, dtype: np.dtype[np.generic]) -> None:
    """Replace an ``.npy`` file by one with the same values in another type."""
    narrow = path.rename(path.with_suffix(".narrow"))
    planes = np.load(narrow, mmap_mode="r")
    new_array(path, dtype, planes.shape)
    for z, plane in enumerate(planes):
        write_rows(path, (z, 0), plane[None])
    narrow.unlink()


def settle(path: Path) -> None:
    """Rewrite a finished file in large pieces: the kernel maps a file in pieces as large as it was written in, and
    copying a patch from pieces of megabytes takes a third of the time (Linux, ext4)."""
    settled = path.with_suffix(".settled")
    with path.open("rb") as source, settled.open("wb", buffering=0) as target:
        while piece := source.read(_PIECE):
            left = memoryview(piece)
            while left:  # a write may be short
                left = left[target.write(left) :]
    settled.rename(path)


def _rows(grid: VoxelGrid) -> Iterator[tuple[tuple[int, int], VoxelGrid]]:
    """Split the grid into bars of blocks along x: first plane and line of each bar, and its grid."""
    for (z, y, _), row in grid.blocks((_BLOCK[0], _BLOCK[1], max(1, grid.shape[2]))):
        yield (z, y), row


@numba.njit(cache=True, nogil=True)
def scan_codes(
    codes: NDArray[np.uint32],
    begin: tuple[int, int, int],
    rows: int,
    columns: int,
    starts: NDArray[np.int64],
    members: NDArray[np.int64],
    seeds: NDArray[np.uint64],
    priorities: NDArray[np.uint64],
    places: NDArray[np.int64],
    used: NDArray[np.int64],
    histogram: NDArray[np.int64],
) -> None:
    """Count the codes of a block, and keep for each class the voxels with the smallest priorities.

    A voxel's priority for a class is a pseudo-random number that depends only on the class's seed and the voxel's place
    in the lattice, so the voxels kept are a uniform sample without replacement for any order of blocks.

    Args:
        codes: (d, h, w). begin: lattice index of the block's first voxel. rows, columns: the lattice's H and W.
        starts, members: the classes present in state k are ``members[starts[k]:starts[k + 1]]``.
        seeds: (C,). priorities, places: (C, most), a heap for each class, the largest priority first, of which
            ``used`` (C,) are filled. A place is the voxel's flat index in the lattice.
        histogram: (K,) voxels of each state, added to.
    """
    depth, height, width = codes.shape
    most = priorities.shape[1]
    for z in range(depth):
        for y in range(height):
            place = ((begin[0] + z) * rows + begin[1] + y) * columns + begin[2]
            for x in range(width):
                code = codes[z, y, x]
                histogram[code] += 1
                for m in range(starts[code], starts[code + 1]):
                    c = members[m]
                    priority = _mix(seeds[c], place + x)
                    heap, where, n = priorities[c], places[c], used[c]
                    if n < most:
                        at = n
                        used[c] = n + 1
                        while at > 0:
                            above = (at - 1) // 2
                            if heap[above] >= priority:
                                break
                            heap[at], where[at] = heap[above], where[above]
                            at = above
                        heap[at], where[at] = priority, place + x
                    elif priority < heap[0]:
                        at = 0
                        while True:
                            below = 2 * at + 1
                            if below >= most:
                                break
                            if below + 1 < most and heap[below + 1] > heap[below]:
                                below += 1
                            if heap[below] <= priority:
                                break
                            heap[at], where[at] = heap[below], where[below]
                            at = below
                        heap[at], where[at] = priority, place + x


@numba.njit(inline="always")
def _mix(seed: np.uint64, place: int) -> np.uint64:
    """Number ``place`` of the splitmix64 stream of a seed (Steele, Lea and Flood 2014)."""
    value = seed + np.uint64(place + 1) * np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
