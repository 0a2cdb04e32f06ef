"""The table of instances: one row an object, in nanometres."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from connectomics.decoding.blocks.pieces import Pieces
from connectomics.geometry import VoxelGrid

TABLE_FILE, PARQUET_FILE = "instances.csv", "instances.parquet"
COLUMNS = (
    "id", "voxels", "volume_nm3",
    "begin_z_nm", "begin_y_nm", "begin_x_nm", "end_z_nm", "end_y_nm", "end_x_nm",
    "center_z_nm", "center_y_nm", "center_x_nm",
)  # fmt: skip


def write_tables(folder: Path, objects: Pieces, grid: VoxelGrid, table: str = "csv") -> None:
    """Write the table of labels to their ``folder``: ``instances.csv`` and, with ``parquet``, ``instances.parquet``."""
    write_table(folder / TABLE_FILE, objects, grid)
    if table == "parquet":
        write_table(folder / PARQUET_FILE, objects, grid)


def write_table(path: Path, objects: Pieces, grid: VoxelGrid) -> None:
    """Write the objects 1..n of a volume on ``grid`` with the columns `COLUMNS`, as CSV or (``.parquet``) as Parquet.

    ``begin`` and ``end`` are the outer faces of the bounding box, ``center`` is the mean of the voxels' centres; nm in
    the world, in CSV to a thousandth. Rows are made and written part by part (in Parquet: a row group each).

    Raises:
        WriteError: the disk is full. InputError: Parquet without pyarrow.
    """
    from connectomics.io.tables import ROWS, Column, table

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
            volume = part.sizes * np.prod(size)
            ids = np.arange(start + 1, start + len(part) + 1, dtype=np.uint64)
            values = (ids, part.sizes, volume, *low.T, *high.T, *center.T)
            out.write(dict(zip(COLUMNS, values, strict=True)))
