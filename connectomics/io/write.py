"""Write arrays and OME-NGFF multiscales that any tool opens: 0.4 (Zarr v2) or 0.5 (Zarr v3, sharded); local or on S3.

Every file (metadata or chunk) appears whole or not at all (`connectomics.io.place`), also if a run is killed;
`write_multiscale` does the same with the whole group. Chunks of v2 are compressed with Blosc-zstd; chunk keys use
"/". Every written chunk of v2 is stored, also one of zeros, because an absent chunk of raw means "no raw there"; shards
are described in `connectomics.io.sharded`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike, NDArray

from connectomics.errors import InputError, MetadataError, MissingError, WriteError
from connectomics.geometry import VoxelGrid
from connectomics.io.array_writer import ArrayWriter as ArrayWriter  # re-exported
from connectomics.io.array_writer import chunk_codec as chunk_codec
from connectomics.io.array_writer import output_of
from connectomics.io.levels import halve_labels, halve_raw, level_grids
from connectomics.io.location import Location
from connectomics.io.metadata import multiscales_attrs as multiscales_attrs  # re-exported
from connectomics.io.place import remove_tree
from connectomics.io.replacing import part_of, publish, put_aside, require_replaceable, write_json
from connectomics.io.replacing import write_file as write_file  # re-exported
from connectomics.io.sharded import Codec, array_metadata
from connectomics.io.store import is_array, read_json

Kind = Literal["raw", "label"]

DEFAULT_CHUNKS = (64, 64, 64)


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
        location: path or s3:// URL of the array; inside a ``*.zarr`` folder the groups above it are created, too.
        shape: voxels (z, y, x).
        chunks: voxels per chunk, clipped to the shape; the last value is used for more axes.
        attrs: attributes; ``grid`` (whose shape must be ``shape``) adds ``voxel_size`` and ``translation`` in nm.
        overwrite: replace an existing array or group; without it that is a `WriteError`.
        clevel: Blosc-zstd level, 0 to 9.
        shards: voxels of a file: Zarr v3, sharded; clipped to as many chunks as the shape has. None: Zarr v2.
        codec: of a sharded array, see `connectomics.io.sharded`.
    """
    path = output_of(location)
    size = tuple(map(int, shape))
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
        location: path or s3:// URL of the group.
        attrs: further group attributes.
        name: its name, by default the last part of the location.
        fill_value: value of voxels that are never written.
        overwrite: replace an existing array or group; without it that is a `WriteError`.
        shards, codec: as for `create_array`; with ``shards``, OME-NGFF 0.5, else 0.4.

    Returns:
        One `ArrayWriter` per level.
    """
    path = output_of(location)
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
        levels: number of levels, s0 included.
        kind: how levels are downsampled, see `connectomics.io.levels`. The other arguments are those of
            `create_multiscale`.
    """
    path = output_of(location)
    if data.shape != grid.shape:
        raise InputError(f"{path}: data has shape {data.shape}, its grid {grid.shape}; they must agree")
    grids = level_grids(grid, levels)
    values: NDArray[Any] = data.view(np.uint8) if data.dtype == np.bool_ else data
    require_replaceable(path, overwrite)
    if any(parent.suffix == ".zarr" for parent in path.parents):
        ensure_group(path.parent)
    part = part_of(path)
    try:
        writers = create_multiscale(part, grids, values.dtype, chunks=chunks, attrs=attrs, name=name or path.name)
        for k, writer in enumerate(writers):
            writer.write((0, 0, 0), values)
            if k + 1 < len(writers):
                values = halve_raw(values) if kind == "raw" else halve_labels(values)
        publish(part, path)
    finally:
        remove_tree(part)


def build_levels(location: Location, levels: int, kind: Kind) -> None:
    """Add levels s1 .. s(levels - 1), block by block, to a multiscale of this program whose s0 is written.

    The group lists the new levels only when they are complete; levels left by a killed run are written again. Memory: a
    few chunks of source, whatever the volume's size.

    Args:
        location: path or s3:// URL of the group.
        kind: "raw" (mean) or "label" (majority of eight).
    """
    path = output_of(location)
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
    path = output_of(location)
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
    path = output_of(location)
    if (path / ".zgroup").exists() or (path / ".zarray").exists():
        write_json(path / ".zattrs", {**(read_json(path / ".zattrs") or {}), **attrs})
        return
    node = read_json(path / "zarr.json")
    if node is None:
        raise MissingError(f"no Zarr group or array at {path}; make it first (ensure_group, create_array)")
    write_json(path / "zarr.json", {**node, "attributes": {**node.get("attributes", {}), **attrs}})


def _clear(path: Path, overwrite: bool) -> None:
    if any((path / node).exists() for node in (".zarray", ".zgroup", ".zattrs", "zarr.json")):
        require_replaceable(path, overwrite)
        put_aside(path)
