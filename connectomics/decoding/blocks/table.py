"""The table of instances: one row an object, in nanometres."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from connectomics.decoding.blocks.pieces import Pieces
from connectomics.errors import WriteError
from connectomics.geometry import VoxelGrid

TABLE_FILE = "instances.csv"
COLUMNS = (
    "id", "voxels", "volume_nm3",
    "begin_z_nm", "begin_y_nm", "begin_x_nm", "end_z_nm", "end_y_nm", "end_x_nm",
    "center_z_nm", "center_y_nm", "center_x_nm",
)  # fmt: skip
_ROWS = 100_000


def write_table(path: Path, objects: Pieces, grid: VoxelGrid) -> None:
    """Write the objects 1..n of a volume on ``grid`` as CSV with the columns `COLUMNS`.

    ``begin`` and ``end`` are the outer faces of the bounding box, ``center`` is the mean of the voxels' centres; nm in
    the world, to a thousandth. `WriteError` where the disk is full.
    """
    size, first = np.asarray(grid.voxel_size), np.asarray(grid.translation)
    try:
        with path.open("w", encoding="ascii", newline="\n") as file:
            file.write(",".join(COLUMNS) + "\n")
            for start in range(0, len(objects), _ROWS):
                part = objects.take(np.arange(start, min(start + _ROWS, len(objects))))
                low = first + (part.boxes[:, :3] - 0.5) * size
                high = first + (part.boxes[:, 3:] + 0.5) * size
                center = first + part.sums / part.sizes[:, None] * size
                volume = part.sizes[:, None] * np.prod(size)
                numbers = np.hstack([volume, low, high, center]).tolist()
                for row, (voxels, values) in enumerate(zip(part.sizes.tolist(), numbers, strict=True), start=start + 1):
                    file.write(f"{row},{voxels}," + ",".join(f"{v:.3f}" for v in values) + "\n")
    except OSError as error:
        raise WriteError(f"cannot write {path}: {error.strerror or error}; free space there") from error
