"""Write arrays and OME-NGFF multiscales that any tool opens: 0.4 (Zarr v2) or 0.5 (Zarr v3, sharded). Local paths only.

Every file (metadata or chunk) is written under a temporary name and renamed, so a killed run leaves whole files or
none; `write_multiscale` does the same with the whole group. Chunks of v2 are compressed with Blosc-zstd; chunk keys use
"/". Every written chunk of v2 is stored, also one of zeros, because an absent chunk of raw means "no raw there"; shards
are described in `connectomics.io.sharded`.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike, NDArray

from connectomics.errors import CorruptDataError, InputError, MetadataError, MissingError, WriteError
from connectomics.geometry import VoxelGrid
from connectomics.io.array import StoredArray
from connectomics.io.levels import halve_labels, halve_raw, level_grids
from connectomics.io.location import Location, StoreOptions, local_path
from connectomics.io.metadata import multiscales_attrs as multiscales_attrs  # re-exported
from connectomics.io.replacing import publish, put_aside, require_replaceable, write_json
from connectomics.io.replacing import write_file as write_file  # re-exported
from connectomics.io.sharded import Codec, array_metadata, encode
from connectomics.io.store import is_array, read_json

Kind = Literal["raw", "label"]

DEFAULT_CHUNKS = (64, 64, 64)


class ArrayWriter:
    """An array open for writing (returned by `create_array`, `create_multiscale` and `ArrayWriter.open`).

    Picklable. Several processes may write at once if the faces of their blocks lie on the borders of ``chunks`` (or
    the array's end). Any other block re-reads the chunks that it covers in part and needs a single writer.

    Attributes:
        location: path of the array.
        shape: voxels, z y x. dtype: numpy dtype. chunks: voxels of a stored file, z y x.
        grid: where the array lies, or None if its attributes do not say.
    """

    def __init__(self, location: Location) -> None:
        self.location = _local(location)
        meta = read_json(Path(self.location, ".zarray"))
        self._sharded: StoredArray | None = None
        if meta is None:
            self._open_sharded()
            return
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
                f"{self.location}: expected an array in C order with keys z/y/x and Blosc, "
                f"got order {order!r}, separator {separator!r}, compressor {self._compressor!r}"
            )
        self.grid = _grid_of(read_json(Path(self.location, ".zattrs")) or {}, self.shape)

    def _open_sharded(self) -> None:
        if not is_array(Path(self.location)):
            raise MissingError(f"no Zarr array at {self.location} (.zarray is missing); create it first")
        self._sharded = stored = StoredArray(self.location, StoreOptions(cache_bytes=0))
        names = [codec.get("name") for codec in stored.metadata.get("codecs", [])]
        if names != ["sharding_indexed"] or not stored.absent_is_fill:
            raise MetadataError(f"{self.location}: expected a sharded array of this program, got the codecs {names}")
        self.shape, self.chunks, self.dtype = stored.shape, stored.chunks, stored.dtype
        self.fill_value, self.grid = stored.fill_value, _grid_of(stored.attrs, stored.shape)

    @classmethod
    def open(cls, location: Location) -> ArrayWriter:
        """Open an array that this module created, to continue writing it. `MissingError`, `MetadataError`."""
        return cls(location)

    def write(self, begin: Sequence[int], block: NDArray[Any]) -> None:
        """Store ``block`` with its first voxel at index ``begin`` (voxels, z y x).

        The block must lie inside the array, and its dtype must be castable ("same_kind").

        Raises:
            InputError: the block does not fit. WriteError: disk full, no permission.
        """
        if len(begin) != len(self.shape) or block.ndim != len(self.shape):
            raise InputError(
                f"{self.location} has {len(self.shape)} axes, got begin {tuple(begin)}, block {block.shape}"
            )
        start = [int(b) for b in begin]
        stop = [b + n for b, n in zip(start, block.shape, strict=True)]
        if min(start) < 0 or any(e > n for e, n in zip(stop, self.shape, strict=True)):
            raise InputError(f"{self.location} holds {self.shape} voxels; cannot write {block.shape} at {tuple(start)}")
        if not np.can_cast(block.dtype, self.dtype, casting="same_kind"):
            raise InputError(f"{self.location} holds {self.dtype}; cannot write {block.dtype} without loss: convert it")
        if block.size == 0:
            return
        for index, inner, outer in self._chunks_of(start, stop):
            origin = [i * c for i, c in zip(index, self.chunks, strict=True)]
            valid = [min(c, n - o) for c, n, o in zip(self.chunks, self.shape, origin, strict=True)]
            whole = all(s.start == 0 and s.stop >= v for s, v in zip(inner, valid, strict=True))
            chunk = None if whole else self._read_chunk(index)
            if chunk is None:
                chunk = np.full(self.chunks, self.fill_value, dtype=self.dtype)
            chunk[inner] = block[outer]
            self._write_chunk(index, chunk)

    def _write_chunk(self, index: tuple[int, ...], chunk: NDArray[Any]) -> None:
        if self._sharded is None:
            path, data = Path(self.location, *map(str, index)), chunk_codec(self._compressor).encode(chunk)
        else:
            path, data = Path(self._sharded.chunk_location(index)), encode(self._sharded.metadata, chunk)
        if data is None:  # all of it is the fill value
            path.unlink(missing_ok=True)
        else:
            write_file(path, data)

    def read(self, begin: Sequence[int], shape: Sequence[int]) -> NDArray[Any]:
        """Return the stored values of a block inside the array (voxels); unwritten chunks give the fill value."""
        out = np.full(tuple(shape), self.fill_value, dtype=self.dtype)
        if out.size == 0:
            return out
        if self._sharded is not None:
            return self._sharded.read(begin, shape)[0]
        stop = [int(b) + int(n) for b, n in zip(begin, shape, strict=True)]
        for index, inner, outer in self._chunks_of(begin, stop):
            chunk = self._read_chunk(index)
            if chunk is not None:
                out[outer] = chunk[inner]
        return out

    def _chunks_of(
        self, begin: Sequence[int], end: Sequence[int]
    ) -> Iterator[tuple[tuple[int, ...], tuple[slice, ...], tuple[slice, ...]]]:
        """Chunks of the block [begin, end): index, and the shared part inside the chunk and inside the block."""
        spans = [range(int(b) // c, (e - 1) // c + 1) for b, e, c in zip(begin, end, self.chunks, strict=True)]
        for index in product(*spans):
            low = [max(i * c, b) for i, c, b in zip(index, self.chunks, begin, strict=True)]
            high = [min((i + 1) * c, e) for i, c, e in zip(index, self.chunks, end, strict=True)]
            origin = [i * c for i, c in zip(index, self.chunks, strict=True)]
            inner = tuple(slice(lo - o, h - o) for lo, h, o in zip(low, high, origin, strict=True))
            yield index, inner, tuple(slice(lo - b, h - b) for lo, h, b in zip(low, high, begin, strict=True))

    def _read_chunk(self, index: tuple[int, ...]) -> NDArray[Any] | None:
        if self._sharded is not None:
            return self._sharded.read([i * c for i, c in zip(index, self.chunks, strict=True)], self.chunks)[0]
        path = Path(self.location, *map(str, index))
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        if len(data) < 16 or int.from_bytes(data[12:16], "little") != len(data):  # Blosc itself would read beyond them
            raise CorruptDataError(f"{len(data)} bytes are not a whole chunk: {path}; delete it and write it again")
        try:
            return (
                np.frombuffer(chunk_codec(self._compressor).decode(data), dtype=self.dtype).reshape(self.chunks).copy()
            )
        except (RuntimeError, ValueError) as error:
            raise CorruptDataError(f"cannot decode the chunk {path}: {error}; delete it and write it again") from error


def chunk_codec(compressor: Mapping[str, Any]) -> Any:
    """Return the codec for written chunks: the same values give the same bytes in every run."""
    import numcodecs
    from numcodecs import blosc

    blosc.use_threads = False  # its threads append their parts in the order in which they finish
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
    shards: Sequence[int] | None = None,
    codec: Codec = "blosc",
) -> ArrayWriter:
    """Create an empty array (any number of axes) and its parent groups, and open it for writing.

    Args:
        location: local path of the array; inside a ``*.zarr`` folder the groups above it are created, too.
        shape: voxels (z, y, x). chunks: voxels per chunk, clipped to the shape; the last value is used for more axes.
        attrs: attributes; ``grid`` (whose shape must be ``shape``) adds ``voxel_size`` and ``translation`` in nm.
        overwrite: replace an existing array or group; without it that is a `WriteError`.
        clevel: Blosc-zstd level, 0 to 9.
        shards: voxels of a file: Zarr v3, sharded; clipped to as many chunks as the shape has. None: Zarr v2.
        codec: of a sharded array, see `connectomics.io.sharded`.
    """
    path = Path(_local(location))
    size = tuple(int(n) for n in shape)
    steps = [int(c) for c in chunks] + [int(chunks[-1])] * (len(size) - len(chunks))
    if min(size, default=0) < 0 or min(steps) < 1:
        raise InputError(f"{path}: expected shape >= 0 and chunks >= 1, got {size} and {tuple(chunks)}")
    if grid is not None and grid.shape != size:
        raise InputError(f"{path}: the grid has {grid.shape} voxels, the array {size}; they must agree")
    _clear(path, overwrite)
    if any(parent.suffix == ".zarr" for parent in path.parents):
        ensure_group(path.parent, zarr_format=2 if shards is None else 3)
    attributes = dict(attrs or {})
    if grid is not None:
        attributes |= {"voxel_size": list(grid.voxel_size), "translation": list(grid.translation)}
    if shards is not None:
        files = [min(int(s), -(-max(1, n) // c) * c) for s, n, c in zip(shards, size, steps, strict=True)]
        how: dict[str, Any] = {"codec": codec, "clevel": int(clevel), "fill_value": fill_value}
        write_json(
            path / "zarr.json", array_metadata(size, np.dtype(dtype), steps, files, attributes=attributes, **how)
        )
        return ArrayWriter(path)
    meta = {
        "zarr_format": 2, "shape": list(size), "chunks": [max(1, min(c, n)) for c, n in zip(steps, size, strict=False)],
        "dtype": np.dtype(dtype).str,
        "compressor": {"id": "blosc", "cname": "zstd", "clevel": int(clevel), "shuffle": 1, "blocksize": 0},
        "fill_value": fill_value, "order": "C", "filters": None, "dimension_separator": "/",
    }  # fmt: skip
    if attributes:
        write_json(path / ".zattrs", attributes)
    write_json(path / ".zarray", meta)
    return ArrayWriter(path)


def create_multiscale(
    location: Location,
    grids: Sequence[VoxelGrid],
    dtype: DTypeLike,
    *,
    chunks: Sequence[int] = DEFAULT_CHUNKS,
    attrs: Mapping[str, Any] | None = None,
    name: str = "",
    overwrite: bool = False,
    clevel: int = 1,
    fill_value: float = 0,
    shards: Sequence[int] | None = None,
    codec: Codec = "blosc",
) -> list[ArrayWriter]:
    """Create an OME-NGFF multiscale group with one empty array per grid (finest first: s0, s1, ...).

    Args:
        location: local path of the group. attrs: further group attributes. name: its name, by default the folder's.
        fill_value: value of voxels that are never written.
        overwrite: replace an existing array or group; without it that is a `WriteError`.
        shards, codec: as for `create_array`; with ``shards``, OME-NGFF 0.5, else 0.4.

    Returns:
        One `ArrayWriter` per level.
    """
    path = Path(_local(location))
    if not grids:
        raise InputError(f"{path}: a multiscale needs at least one grid")
    _clear(path, overwrite)
    zarr_format = 2 if shards is None else 3
    ensure_group(path, zarr_format=zarr_format)
    how: dict[str, Any] = {"chunks": chunks, "clevel": clevel, "shards": shards, "codec": codec}
    how["fill_value"] = fill_value
    writers = [create_array(path / f"s{k}", grid.shape, dtype, grid=grid, **how) for k, grid in enumerate(grids)]
    # the group's attributes come last: a group that names its levels has them all
    update_attrs(path, {**dict(attrs or {}), **multiscales_attrs(grids, name or path.name, zarr_format)})
    return writers


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
) -> None:
    """Write a whole volume with its pyramid; the group appears in one step, whole or not at all.

    Args:
        data: (D, H, W) voxels on ``grid``, stored in their dtype (bool as uint8).
        levels: number of levels, s0 included. kind: how levels are downsampled, see `connectomics.io.levels`.
        The other arguments are those of `create_multiscale`.
    """
    path = Path(_local(location))
    if data.shape != grid.shape:
        raise InputError(f"{path}: data has shape {data.shape}, its grid {grid.shape}; they must agree")
    grids = level_grids(grid, levels)
    values: NDArray[Any] = data.view(np.uint8) if data.dtype == np.bool_ else data
    require_replaceable(path, overwrite)
    if any(parent.suffix == ".zarr" for parent in path.parents):
        ensure_group(path.parent)
    part = path.parent / f".{path.name}.part-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    try:
        writers = create_multiscale(part, grids, values.dtype, chunks=chunks, attrs=attrs, name=name or path.name)
        for k, writer in enumerate(writers):
            writer.write((0, 0, 0), values)
            if k + 1 < len(writers):
                values = halve_raw(values) if kind == "raw" else halve_labels(values)
        publish(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def build_levels(location: Location, levels: int, kind: Kind) -> None:
    """Add levels s1 .. s(levels - 1), block by block, to a multiscale of this program whose s0 is written.

    The group lists the new levels only when they are complete; levels left by a killed run are written again. Memory: a
    few chunks of source, whatever the volume's size.

    Args:
        location: local path of the group. kind: "raw" (mean) or "label" (majority of eight).
    """
    path = Path(_local(location))
    if kind not in ("raw", "label"):
        raise InputError(f"kind must be 'raw' or 'label', got {kind!r}")
    finest = source = ArrayWriter.open(path / "s0")
    if finest.grid is None:
        raise MetadataError(f"{path}/s0 has no voxel_size and translation; create it with create_multiscale")
    grids = level_grids(finest.grid, levels)
    halve = halve_raw if kind == "raw" else halve_labels
    for k in range(1, levels):
        target = create_array(
            path / f"s{k}", grids[k].shape, source.dtype, chunks=finest.chunks, fill_value=finest.fill_value,
            overwrite=True, grid=grids[k],
        )  # fmt: skip
        for begin, block in grids[k].blocks(target.chunks):
            first = [2 * b for b in begin]
            shape = [min(2 * n, m - b) for n, m, b in zip(block.shape, source.shape, first, strict=True)]
            target.write(begin, halve(source.read(first, shape)))
        source = target
    name = (read_json(path / ".zattrs") or {}).get("multiscales", [{}])[0].get("name", path.name)
    update_attrs(path, multiscales_attrs(grids, name))


def ensure_group(location: Location, attrs: Mapping[str, Any] | None = None, zarr_format: int = 2) -> None:
    """Make ``location`` a Zarr group, and every folder above it up to the nearest ``*.zarr`` root.

    Existing groups stay as they are; ``attrs`` are merged into the group's (see `update_attrs`). A group of Zarr v3 in
    one of v2 is a `WriteError`, since other tools would not find it.
    """
    path = Path(_local(location))
    root = next((p for p in (path, *path.parents) if p.suffix == ".zarr"), path)
    if is_array(path):
        raise WriteError(f"cannot create a group at {path}: an array is already there; choose another place")
    for folder in (path, *path.parents):
        is_v3 = (folder / "zarr.json").exists()
        if zarr_format == 3 and not is_v3 and (folder / ".zgroup").exists():
            raise WriteError(
                f"{folder} is a Zarr v2 group, in which OME-Zarr 0.5 (Zarr v3) cannot be written; choose another "
                "output folder, or output.format=0.4"
            )
        if not is_v3 and zarr_format == 3:
            write_json(folder / "zarr.json", {"zarr_format": 3, "node_type": "group", "attributes": {}})
        elif not is_v3 and not (folder / ".zgroup").exists():
            write_json(folder / ".zgroup", {"zarr_format": 2})
        if folder == root:
            break
    if attrs:
        update_attrs(path, attrs)


def update_attrs(location: Location, attrs: Mapping[str, Any]) -> None:
    """Set top-level attributes of a Zarr group or array, keeping the others, in one atomic rewrite of their file."""
    path = Path(_local(location))
    node = read_json(path / "zarr.json")
    if node is not None and not (path / ".zgroup").exists() and not (path / ".zarray").exists():
        write_json(path / "zarr.json", {**node, "attributes": {**node.get("attributes", {}), **attrs}})
        return
    if not (path / ".zgroup").exists() and not (path / ".zarray").exists():
        raise MissingError(f"no Zarr group or array at {path}; make it first (ensure_group, create_array)")
    old = read_json(path / ".zattrs") or {}
    write_json(path / ".zattrs", {**old, **attrs})


def _grid_of(attrs: Mapping[str, Any], shape: Sequence[int]) -> VoxelGrid | None:
    if len(shape) != 3 or "voxel_size" not in attrs or "translation" not in attrs:
        return None
    return VoxelGrid(attrs["voxel_size"], attrs["translation"], (shape[0], shape[1], shape[2]))


def _local(location: Location) -> str:
    return os.path.abspath(local_path(location))


def _clear(path: Path, overwrite: bool) -> None:
    if any((path / node).exists() for node in (".zarray", ".zgroup", ".zattrs", "zarr.json")):
        require_replaceable(path, overwrite)
        put_aside(path)
