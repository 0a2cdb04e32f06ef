"""The label artifact: the labels of one class of one crop, their instance table and what they say of themselves.

Labels are a multiscale group that appears whole or not at all. Where predict gave blocks up, the attribute ``unknown``
lists their boxes; labels are 0 there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectomics import __version__
from connectomics.config.values import plain
from connectomics.decoding.blocks.pieces import Pieces
from connectomics.decoding.parameters import DecodeParameters
from connectomics.errors import WriteError
from connectomics.geometry import Box, VoxelGrid, index, slices_of
from connectomics.io import store
from connectomics.io.artifacts import Difference, Provenance, about, changed_inputs, identity, publish
from connectomics.io.levels import halve_labels
from connectomics.io.location import is_s3
from connectomics.io.multiscale import Multiscale
from connectomics.io.place import S3Path, remove_tree
from connectomics.io.sharded import Storage
from connectomics.io.tables import ROWS, Column, table
from connectomics.io.write import ArrayWriter, create_multiscale, ensure_group
from connectomics.tasks.block_task import TASK_FILE
from connectomics.tasks.lock import leading

BLOCK = (256, 256, 256)  # voxels held at once; whole chunks of the arrays that are written
TABLE_FILE, PARQUET_FILE = "instances.csv", "instances.parquet"
COLUMNS = (
    "id", "voxels", "volume_nm3",
    "begin_z_nm", "begin_y_nm", "begin_x_nm", "end_z_nm", "end_y_nm", "end_x_nm",
    "center_z_nm", "center_y_nm", "center_x_nm",
)  # fmt: skip
#: What decode writes into the folder of a class.
_OURS = re.compile(rf"\..*|s\d+|{re.escape(TASK_FILE)}|{re.escape(TABLE_FILE)}|{re.escape(PARQUET_FILE)}|zarr\.json")


@contextmanager
def label_array(
    location: Path, grids: Sequence[VoxelGrid], dtype: np.dtype[Any], attrs: Mapping[str, Any], storage: Storage
) -> Iterator[list[ArrayWriter]]:
    """Open writers for the levels of the labels at ``location`` (``{out}/{dataset}.zarr/{crop}/{class}``).

    Everything goes to a hidden folder beside it. It replaces ``location`` when the block ends without an error, else it
    is removed. Only one process at a time may do this (`connectomics.tasks.lock.leading`).

    Args:
        location: folder of the group; see `existing_labels` for what may be replaced.
        grids: of the levels, finest first.
        dtype: unsigned integer that holds every id.
        attrs: what `label_attrs` returns. storage: how the array is stored.
    """
    partial = partial_of(location)
    ensure_group(location.parent, zarr_format=storage.zarr_format)
    shards = (storage.shard or storage.block(BLOCK)) if storage.is_sharded else None
    remove_tree(partial)
    try:
        yield create_multiscale(
            partial, grids, dtype, chunks=storage.chunk, shards=shards, codec="zstd",
            attrs={"connectomics": dict(attrs)}, name=attrs["class_name"],
        )  # fmt: skip
        publish(partial, location)
    finally:
        remove_tree(partial)


def title_of(location: Path) -> str:
    """Return ``{dataset}/{crop}/{class}`` of an array at ``{dataset}.zarr/{crop}/{class}``."""
    return f"{location.parent.parent.name.removesuffix('.zarr')}/{location.parent.name}/{location.name}"


def partial_of(location: Path) -> Path:
    """Return the hidden folder beside ``location`` that holds unfinished labels."""
    return location.with_name(f".{location.name}.partial")


def remove_rest(location: Path) -> None:
    """Remove what a run that was killed at its very end has left on S3 beside ``location``; not what another run has
    begun, or works on."""
    partial = partial_of(location)
    if isinstance(partial, S3Path) and partial.is_dir():
        with suppress(WriteError), leading(partial):
            if not (partial / TASK_FILE).exists():
                remove_tree(partial)


def label_attrs(
    grid: VoxelGrid,
    class_name: str,
    parameters: DecodeParameters,
    source: Mapping[str, Any],
    provenance: Provenance,
    objects: int,
) -> dict[str, Any]:
    """Return the ``connectomics`` attribute of finished labels.

    source: what the probabilities were made from; its ``unknown`` holds for the labels too. objects: a mask: 0 or 1.
    """
    return {
        "artefact": "labels", "class_name": class_name, "kind": parameters.kind, "grid": grid.to_dict(),
        "version": __version__, "decode": plain(parameters), "source": dict(source), **provenance.to_dict(),
        "objects": objects, **({"unknown": source["unknown"]} if "unknown" in source else {}), "complete": True,
    }  # fmt: skip


def inputs_of(location: str, parameters: DecodeParameters) -> dict[str, str]:
    """Return role -> identity of the probabilities at ``location`` and of the boundary class.

    Heads are written with the probabilities, by the same run, and have the same identity.
    """
    found = {"probabilities": identity(Multiscale.open(location))}
    if parameters.boundary:
        crop = location.rstrip("/").rpartition("/")[0]
        found["boundary"] = identity(Multiscale.open(store.join(crop, parameters.boundary)))
    return found


def existing_labels(
    location: Path,
    parameters: DecodeParameters,
    made_from: Mapping[str, str],
    storage: Storage,
    *,
    overwrite: bool = False,
) -> dict[str, Any] | None:
    """Return the ``connectomics`` attribute of complete labels with these parameters and inputs at ``location``.

    Args:
        made_from: role -> identity of the inputs, `connectomics.io.artifacts`. storage: how labels are to be stored;
            another version of OME-Zarr makes other labels.
        overwrite: labels may be replaced and count as absent.

    Returns:
        None if there are no labels, or they may be replaced.

    Raises:
        WriteError: other labels are there (without ``overwrite``), or files that decode did not write.
    """
    entries = list(location.iterdir()) if location.is_dir() else []
    if not entries and not location.exists():
        return None
    there = about(location)
    foreign = [path for path in entries if not _OURS.fullmatch(path.name)]
    if (entries or location.is_file()) and (there.get("artefact") != "labels" or foreign):
        what = foreign[0] if foreign and there.get("artefact") == "labels" else location
        raise WriteError(f"{what} was not written by decode; choose another output folder, or move it away")
    if overwrite or not entries:
        return None
    mine = plain(parameters)
    names = [name for name in mine if there.get("decode", {}).get(name) != mine[name]]
    if (location / "zarr.json").exists() != storage.is_sharded:
        names.append("output.format")
    difference = Difference(names, changed_inputs(there.get("made_from", {}), made_from))
    if difference:
        raise WriteError(
            f"{location} holds labels {difference}; overwrite them (--overwrite), or choose another output folder"
        )
    if there.get("complete") is not True:
        if is_s3(location):  # a killed run was moving these very labels here
            return None
        raise WriteError(f"{location} holds labels that are only half written; overwrite them (--overwrite)")
    return there


def has_tables(location: Path, kind: str, table: str) -> bool:
    """Return whether the instance tables that ``decoding.table`` asks for are in the folder of labels of this kind."""
    return kind != "instance" or all((location / name).exists() for name in _table_files(table))


def write_whole(levels: Sequence[ArrayWriter], labels: NDArray[Any]) -> None:
    """Write an array that is in memory, and its coarser levels, block by block, to avoid a second copy."""
    for number, writer in enumerate(levels):
        if number:
            labels = halve_labels(labels)
        whole = [max(1, b // c) * c for b, c in zip(BLOCK, writer.chunks, strict=True)]
        for begin, block in VoxelGrid((1, 1, 1), (0, 0, 0), index(labels.shape)).blocks(whole):
            writer.write(begin, labels[slices_of(begin, block.shape)])


# -- the instance table ------------------------------------------------------------------------------------------------
def write_tables(
    folder: Path, objects: Pieces, grid: VoxelGrid, table: str = "csv", ids: NDArray[np.uint64] | None = None
) -> None:
    """Write the objects of a volume on ``grid`` as ``instances.csv`` (and with ``parquet`` ``instances.parquet``).

    A row has the `COLUMNS`. ``begin`` and ``end`` are the outer faces of the bounding box, ``center`` is the mean of
    the voxel centers; world coordinates in nm, in CSV rounded to a thousandth.
    """
    for name in _table_files(table):
        write_table(folder / name, objects, grid, ids)


def _table_files(table: str) -> list[str]:
    return [TABLE_FILE, PARQUET_FILE] if table == "parquet" else [TABLE_FILE]


def write_table(path: Path, objects: Pieces, grid: VoxelGrid, ids: NDArray[np.uint64] | None = None) -> None:
    """Write a row per instance: ID, voxels, volume in nm3, and box and centroid in world nm (z, y, x).

    objects: instances on ``grid`` in the order of their ``ids``, None: 1, 2, ... The suffix of ``path`` is the format.
    A box reaches from outer face to outer face of its voxels; the centroid is the mean of voxel centers.
    """
    columns = [
        Column("id", "id"),
        Column("voxels", "count"),
        Column("volume_nm3", "number", "nm3"),
        *(Column(name, "number", "nm") for name in COLUMNS[3:]),
    ]
    size, first = np.asarray(grid.voxel_size), np.asarray(grid.translation)
    with table(path, columns) as out:
        for start in range(0, len(objects), ROWS):
            part = objects.take(np.arange(start, min(start + ROWS, len(objects))))
            low = first + (part.boxes[:, :3] - 0.5) * size
            high = first + (part.boxes[:, 3:] + 0.5) * size
            center = first + part.sums / part.sizes[:, None] * size
            numbers = np.arange(start + 1, start + len(part) + 1, dtype=np.uint64)
            numbers = numbers if ids is None else ids[start : start + len(part)]
            values = (numbers, part.sizes, part.sizes * np.prod(size), *low.T, *high.T, *center.T)
            out.write(dict(zip(COLUMNS, values, strict=True)))


# -- parts that are unknown --------------------------------------------------------------------------------------------
def unknown_of(*sources: Multiscale | None) -> dict[str, Any]:
    """Return the attribute ``unknown`` of labels decoded from some probabilities; empty if all is known."""
    found: list[Any] = []
    for source in sources:
        attrs = {} if source is None else source.attrs.get("connectomics", {})
        found += [item for item in attrs.get("unknown", []) if item not in found]
    return {"unknown": found} if found else {}


def unknown_share(about: Mapping[str, Any]) -> float:
    """Return the unknown share of the volume of an array with this ``connectomics`` attribute."""
    grid = VoxelGrid.from_dict(about["grid"]) if about.get("unknown") else None
    if grid is None or grid.size == 0:
        return 0.0
    return sum(int(np.prod([s.stop - s.start for s in part])) for part in unknown_parts(about, grid)) / grid.size


def clear_unknown(labels: NDArray[Any] | ArrayWriter, about: Mapping[str, Any], grid: VoxelGrid) -> None:
    """Set labels (or a mask) on ``grid``, in memory or stored, to 0 where they are unknown."""
    for part in unknown_parts(about, grid):
        if isinstance(labels, ArrayWriter):
            labels.write([s.start for s in part], np.zeros([s.stop - s.start for s in part], labels.dtype))
        else:
            labels[part] = 0


def unknown_parts(about: Mapping[str, Any], grid: VoxelGrid) -> Iterator[tuple[slice, slice, slice]]:
    """Yield the unknown parts of an array on ``grid``; they may overlap."""
    for item in about.get("unknown", []):
        begin, end = item["box"]
        part = grid.slices(Box(begin, end))
        if min(s.stop - s.start for s in part) > 0:
            yield part
