"""Writing Zarr v2 arrays and OME-NGFF 0.4 multiscales that any tool opens. Local paths only.

Every file (metadata or chunk) is written beside its place and renamed into it, so a killed run leaves whole files or
none. `write_multiscale` does the same with the whole group. Chunks are compressed with Blosc-zstd; chunk keys use "/".
Every chunk that is written is stored, also one of zeros, because an absent chunk of raw means "no raw there".
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import DTypeLike, NDArray

from connectomics.errors import CorruptDataError, InputError, MetadataError, MissingError, WriteError
from connectomics.geometry import VoxelGrid
from connectomics.io.artifacts import publish, put_aside
from connectomics.io.levels import halve_labels, halve_raw, level_grids
from connectomics.io.location import Location, is_url, local_path
from connectomics.io.store import read_json

if TYPE_CHECKING:
    from numcodecs import Blosc

Kind = Literal["raw", "label"]

DEFAULT_CHUNKS = (64, 64, 64)


class ArrayWriter:
    """One Zarr v2 array open for writing (made by `create_array`, `create_multiscale` or `ArrayWriter.open`).

    Picklable. Blocks whose faces lie on chunk borders (or on the array's end) may be written by several processes at
    once; any other block re-reads the chunks that it covers in part and needs a single writer.

    Attributes:
        location: path of the array.
        shape: voxels, z y x. dtype: numpy dtype. chunks: voxels, z y x.
        grid: where the array lies, or None where its attributes do not say.
    """

    def __init__(self, location: Location) -> None:
        self.location = _local(location)
        meta = read_json(Path(self.location, ".zarray"))
        if meta is None:
            raise MissingError(f"no Zarr v2 array at {self.location} (.zarray is not there); create it first")
        try:
            self.shape: tuple[int, ...] = tuple(int(n) for n in meta["shape"])
            self.chunks: tuple[int, ...] = tuple(int(n) for n in meta["chunks"])
            self.dtype = np.dtype(meta["dtype"])
            self.fill_value = meta["fill_value"] if meta["fill_value"] is not None else 0
            self._compressor: dict[str, Any] = meta["compressor"]
            separator, order = meta["dimension_separator"], meta["order"]
        except (KeyError, TypeError) as error:
            raise MetadataError(f"{self.location}/.zarray lacks {error}; it was not written by this program") from error
        if separator != "/" or order != "C" or (self._compressor or {}).get("id") != "blosc" or meta.get("filters"):
            raise MetadataError(
                f"{self.location}: can continue only arrays in C order with keys z/y/x and Blosc, "
                f"found order {order!r}, separator {separator!r}, compressor {self._compressor!r}"
            )
        attrs = read_json(Path(self.location, ".zattrs")) or {}
        self.grid: VoxelGrid | None = None
        if len(self.shape) == 3 and "voxel_size" in attrs and "translation" in attrs:
            self.grid = VoxelGrid(attrs["voxel_size"], attrs["translation"], self.shape)

    @classmethod
    def open(cls, location: Location) -> ArrayWriter:
        """Open an array that this module made, to go on writing it. `MissingError`, `MetadataError`."""
        return cls(location)

    def write(self, begin: Sequence[int], block: NDArray[Any]) -> None:
        """Store ``block`` with its first voxel at index ``begin`` (voxels, z y x).

        The block must lie inside the array and be losslessly castable in kind ("same_kind" cast).

        Raises:
            InputError: the block does not fit. WriteError: disk full, no permission.
        """
        if len(begin) != len(self.shape) or block.ndim != len(self.shape):
            raise InputError(
                f"{self.location} has {len(self.shape)} axes, found begin {tuple(begin)}, block {block.shape}"
            )
        start = [int(b) for b in begin]
        stop = [b + n for b, n in zip(start, block.shape, strict=True)]
        if min(start) < 0 or any(e > n for e, n in zip(stop, self.shape, strict=True)):
            raise InputError(f"{self.location} holds {self.shape} voxels; cannot write {block.shape} at {tuple(start)}")
        if not np.can_cast(block.dtype, self.dtype, casting="same_kind"):
            raise InputError(f"{self.location} holds {self.dtype}; cannot write {block.dtype} without loss: convert it")
        if block.size == 0:
            return
        codec = self._codec()
        first = [b // c for b, c in zip(start, self.chunks, strict=True)]
        last = [(e - 1) // c + 1 for e, c in zip(stop, self.chunks, strict=True)]
        for offset in np.ndindex(*[b - a for a, b in zip(first, last, strict=True)]):
            index = tuple(a + o for a, o in zip(first, offset, strict=True))
            self._write_chunk(codec, index, start, stop, block)

    def read(self, begin: Sequence[int], shape: Sequence[int]) -> NDArray[Any]:
        """What is stored in a block inside the array (voxels); chunks not yet written give the fill value."""
        out = np.full(tuple(shape), self.fill_value, dtype=self.dtype)
        if out.size == 0:
            return out
        codec = self._codec()
        stop = [int(b) + int(n) for b, n in zip(begin, shape, strict=True)]
        first = [int(b) // c for b, c in zip(begin, self.chunks, strict=True)]
        last = [(e - 1) // c + 1 for e, c in zip(stop, self.chunks, strict=True)]
        for offset in np.ndindex(*[b - a for a, b in zip(first, last, strict=True)]):
            index = tuple(a + o for a, o in zip(first, offset, strict=True))
            chunk = self._read_chunk(codec, index)
            if chunk is not None:
                inner, outer = _overlap(index, self.chunks, begin, stop)
                out[outer] = chunk[inner]
        return out

    def _write_chunk(
        self, codec: Blosc, index: tuple[int, ...], start: Sequence[int], stop: Sequence[int], block: NDArray[Any]
    ) -> None:
        inner, outer = _overlap(index, self.chunks, start, stop)
        origin = [i * c for i, c in zip(index, self.chunks, strict=True)]
        valid = [min(c, n - o) for c, n, o in zip(self.chunks, self.shape, origin, strict=True)]
        whole = all(s.start == 0 and s.stop >= v for s, v in zip(inner, valid, strict=True))
        chunk = None if whole else self._read_chunk(codec, index)
        if chunk is None:
            chunk = np.full(self.chunks, self.fill_value, dtype=self.dtype)
        chunk[inner] = block[outer]
        path = Path(self.location, *[str(i) for i in index])
        write_file(path, codec.encode(np.ascontiguousarray(chunk)))

    def _read_chunk(self, codec: Blosc, index: tuple[int, ...]) -> NDArray[Any] | None:
        path = Path(self.location, *[str(i) for i in index])
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        if len(data) < 16 or int.from_bytes(data[12:16], "little") != len(data):  # Blosc itself would read beyond them
            raise CorruptDataError(f"{len(data)} bytes are not a whole chunk: {path}; delete it and write it again")
        try:
            return np.frombuffer(codec.decode(data), dtype=self.dtype).reshape(self.chunks).copy()
        except (RuntimeError, ValueError) as error:
            raise CorruptDataError(f"cannot decode the chunk {path}: {error}; delete it and write it again") from error

    def _codec(self) -> Any:
        return chunk_codec(self._compressor)


def chunk_codec(compressor: Mapping[str, Any]) -> Any:
    """The codec of chunks that are written: the same values give the same bytes in every run."""
    import numcodecs
    from numcodecs import blosc

    blosc.use_threads = False  # its threads append their parts in the order in which they end
    return numcodecs.get_codec(dict(compressor))


def create_array(
    location: Location,
    shape: Sequence[int],
    dtype: DTypeLike,
    *,
    chunks: Sequence[int] = DEFAULT_CHUNKS,
    attrs: Mapping[str, Any] | None = None,
    fill_value: float = 0,
    overwrite: bool = False,
    clevel: int = 1,
    grid: VoxelGrid | None = None,
) -> ArrayWriter:
    """Make an empty Zarr v2 array (any number of axes) and its parent groups, and open it for writing.

    Args:
        location: local path of the array; inside a ``*.zarr`` folder the groups above it are made too.
        shape: voxels (z, y, x). chunks: voxels per chunk, clipped to the shape; its last value serves further axes.
        attrs: attributes; ``grid`` (whose shape must be ``shape``) adds ``voxel_size`` and ``translation`` in nm.
        overwrite: replace an array or group that is already there; otherwise that is a `WriteError`.
        clevel: Blosc-zstd level, 0 to 9.
    """
    path = Path(_local(location))
    size = tuple(int(n) for n in shape)
    steps = [int(c) for c in chunks] + [int(chunks[-1])] * (len(size) - len(chunks))
    if min(size, default=0) < 0 or min(steps) < 1:
        raise InputError(f"{path}: shape must be >= 0 and chunks >= 1, found {size} and {tuple(chunks)}")
    if grid is not None and grid.shape != size:
        raise InputError(f"{path}: the grid has {grid.shape} voxels, the array {size}; they must agree")
    _clear(path, overwrite)
    if any(parent.suffix == ".zarr" for parent in path.parents):
        ensure_group(path.parent)
    meta = {
        "zarr_format": 2,
        "shape": list(size),
        "chunks": [max(1, min(c, n)) for c, n in zip(steps, size, strict=False)],
        "dtype": np.dtype(dtype).str,
        "compressor": {"id": "blosc", "cname": "zstd", "clevel": int(clevel), "shuffle": 1, "blocksize": 0},
        "fill_value": fill_value,
        "order": "C",
        "filters": None,
        "dimension_separator": "/",
    }
    attributes = dict(attrs or {})
    if grid is not None:
        attributes |= {"voxel_size": list(grid.voxel_size), "translation": list(grid.translation)}
    if attributes:
        _write_json(path / ".zattrs", attributes)
    _write_json(path / ".zarray", meta)
    return ArrayWriter(path)


def create_multiscale(
    location: Location,
    grids: Sequence[VoxelGrid],
    dtype: DTypeLike,
    *,
    chunks: Sequence[int] = DEFAULT_CHUNKS,
    attrs: Mapping[str, Any] | None = None,
    name: str = "",
    fill_value: float = 0,
    overwrite: bool = False,
    clevel: int = 1,
) -> list[ArrayWriter]:
    """Make an OME-NGFF 0.4 multiscale group with one empty array per grid (finest first: s0, s1, ...).

    Args:
        location: local path of the group. attrs: further group attributes. name: its name, by default the folder's.
        overwrite: replace what is there; otherwise that is a `WriteError`.

    Returns:
        One `ArrayWriter` per level.
    """
    path = Path(_local(location))
    if not grids:
        raise InputError(f"{path}: a multiscale needs at least one grid")
    _clear(path, overwrite)
    ensure_group(path)
    writers = [
        create_array(path / f"s{k}", grid.shape, dtype, chunks=chunks, fill_value=fill_value, clevel=clevel, grid=grid)
        for k, grid in enumerate(grids)
    ]
    # the group's attributes come last: a group that names its levels has them all
    _write_json(path / ".zattrs", {**dict(attrs or {}), **multiscales_attrs(grids, name or path.name)})
    return writers


def multiscales_attrs(grids: Sequence[VoxelGrid], name: str) -> dict[str, Any]:
    """The OME-NGFF 0.4 ``multiscales`` attribute for levels s0, s1, ... on ``grids`` (z y x, nanometers)."""
    datasets = [
        {
            "path": f"s{k}",
            "coordinateTransformations": [
                {"type": "scale", "scale": list(grid.voxel_size)},
                {"type": "translation", "translation": list(grid.translation)},
            ],
        }
        for k, grid in enumerate(grids)
    ]
    multiscale = {
        "version": "0.4",
        "name": name,
        "axes": [{"name": axis, "type": "space", "unit": "nanometer"} for axis in "zyx"],
        "datasets": datasets,
        "coordinateTransformations": [{"type": "scale", "scale": [1.0, 1.0, 1.0]}],
    }
    return {"multiscales": [multiscale]}


def write_multiscale(
    location: Location,
    data: NDArray[Any],
    grid: VoxelGrid,
    *,
    levels: int = 1,
    kind: Kind = "raw",
    attrs: Mapping[str, Any] | None = None,
    chunks: Sequence[int] = DEFAULT_CHUNKS,
    name: str = "",
    overwrite: bool = False,
    clevel: int = 1,
) -> None:
    """Write a whole volume with its pyramid; the group appears in one step, whole or not at all.

    Args:
        data: (D, H, W) voxels on ``grid``, stored in their dtype (bool as uint8).
        levels: number of levels, s0 included. kind: how to shrink, see `connectomics.io.levels`.
        Others as for `create_multiscale`.
    """
    path = Path(_local(location))
    if data.shape != grid.shape:
        raise InputError(f"{path}: data has shape {data.shape}, its grid {grid.shape}; they must agree")
    grids = level_grids(grid, levels)
    values: NDArray[Any] = data.view(np.uint8) if data.dtype == np.bool_ else data
    _check_replaceable(path, overwrite)
    if any(parent.suffix == ".zarr" for parent in path.parents):
        ensure_group(path.parent)
    part = path.parent / f".{path.name}.part-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    try:
        writers = create_multiscale(
            part, grids, values.dtype, chunks=chunks, attrs=attrs, name=name or path.name, clevel=clevel
        )
        for k, writer in enumerate(writers):
            writer.write((0, 0, 0), values)
            if k + 1 < len(writers):
                values = halve_raw(values) if kind == "raw" else halve_labels(values)
        publish(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def ensure_group(location: Location, attrs: Mapping[str, Any] | None = None) -> None:
    """Make ``location`` a Zarr v2 group, and every folder above it up to the nearest ``*.zarr`` root.

    Groups that are there stay as they are; ``attrs`` are merged into the group's (see `update_attrs`).
    """
    path = Path(_local(location))
    root = next((p for p in (path, *path.parents) if p.suffix == ".zarr"), path)
    if (path / ".zarray").exists():
        raise WriteError(f"cannot make a group at {path}: an array is already there; choose another place")
    folder = path
    while True:
        if not (folder / ".zgroup").exists() and not (folder / "zarr.json").exists():
            _write_json(folder / ".zgroup", {"zarr_format": 2})
        if folder == root:
            break
        folder = folder.parent
    if attrs:
        update_attrs(path, attrs)


def update_attrs(location: Location, attrs: Mapping[str, Any]) -> None:
    """Set top-level attributes of a Zarr v2 group or array, keeping the others, in one atomic rewrite of .zattrs."""
    path = Path(_local(location))
    if not (path / ".zgroup").exists() and not (path / ".zarray").exists():
        raise MissingError(f"no Zarr v2 group or array at {path}; make it first (ensure_group, create_array)")
    old = read_json(path / ".zattrs") or {}
    _write_json(path / ".zattrs", {**old, **attrs})


def write_file(path: Path, data: bytes | bytearray | memoryview) -> None:
    """Write a file in one step: beside its place, then renamed over it; folders are made. `WriteError`."""
    if is_url(path):
        local_path(path)  # raises
    part = path.parent / f".{path.name}.part-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    try:
        try:
            handle = part.open("wb")
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = part.open("wb")
        with handle:
            handle.write(data)
        part.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # where even its folder is no folder
            part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise _write_error(path, error) from error
        raise


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    try:
        text = json.dumps(value, indent=2, default=_plain, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"cannot store these attributes in {path}: {error}") from error
    write_file(path, text.encode())


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"{type(value).__name__} has no place in JSON")


def _overlap(
    index: Sequence[int], chunks: Sequence[int], begin: Sequence[int], end: Sequence[int]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Slices of the part that chunk ``index`` and the block [begin, end) share: inside the chunk, inside the block."""
    inner, outer = [], []
    for i, c, b, e in zip(index, chunks, begin, end, strict=True):
        low, high = max(i * c, b), min((i + 1) * c, e)
        inner.append(slice(low - i * c, high - i * c))
        outer.append(slice(low - b, high - b))
    return tuple(inner), tuple(outer)


def _local(location: Location) -> str:
    return os.path.abspath(local_path(location))


def _clear(path: Path, overwrite: bool) -> None:
    """Make way for a new array or group at ``path``."""
    nodes = (".zarray", ".zgroup", ".zattrs", "zarr.json")
    if not any((path / node).exists() for node in nodes):
        return
    _check_replaceable(path, overwrite)
    put_aside(path)


def _check_replaceable(path: Path, overwrite: bool) -> None:
    """`WriteError` unless nothing, or with ``overwrite`` one array or one multiscale, is at ``path``: a group that
    holds others' arrays or files is more than what would take its place."""
    if not path.exists():
        return
    if not overwrite:
        raise _already_there(path)
    if (path / ".zarray").exists():
        return
    for inner in sorted(path.iterdir()) if path.is_dir() else [path]:
        # hidden: metadata, and what a writer that was killed left
        if not (inner.name == "zarr.json" or inner.name.startswith(".") or _is_level(inner)):
            raise WriteError(f"{path} is not replaced: {inner} is no part of a multiscale; move it away")


def _is_level(path: Path) -> bool:
    """Whether a folder holds an array, or the beginning of one: attributes and no chunk."""
    if not path.is_dir() or (path / ".zgroup").exists():
        return False
    made = (path / ".zarray").exists() or (path / "zarr.json").exists()
    return made or all(inner.name.startswith(".") for inner in path.iterdir())


def _already_there(path: Path) -> WriteError:
    return WriteError(f"{path} is already there; pass overwrite=True to replace it, or choose another place")


def _write_error(path: Path, error: OSError) -> WriteError:
    return WriteError(f"cannot write {path}: {error.strerror or error}; free space or choose a folder you may write to")
