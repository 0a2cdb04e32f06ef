"""Files of the given roots, and volumes that are computed chunk by chunk, over HTTP on this machine.

Two kinds of addresses::

    /{secret}/files/{name}/...   a file below the root of that name, and nothing else of the machine
    /{secret}/made/{name}/...    what is made when it is looked at: a Zarr v2 multiscale group whose chunks a function
                                 computes (three-state labels, maps of classes), or the properties of instances

Only GET and HEAD are answered. Neuroglancer's page comes from another port, so any page may read (CORS); therefore the
server listens on the loopback by default, and its addresses hold a secret that other pages do not know.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from connectomics.geometry import VoxelGrid
from connectomics.io.levels import level_grids
from connectomics.io.metadata import multiscales_attrs
from connectomics.pages.local_server import LOOPBACK, Answer, LocalServer

_EDGE = 64  # voxels of a computed chunk along each axis
_KEPT = 256  # computed chunks in memory, up to 1 MB each


#: What is made when it is looked at: returns the file at a path below its address, None if there is none.
Made = Callable[[str], bytes | None]


@dataclass(frozen=True)
class MadeVolume:
    """A volume that is computed chunk by chunk, with ``levels`` levels.

    ``values`` returns a part of the grid of any level as (D, H, W) of ``dtype``.
    """

    grid: VoxelGrid
    dtype: DTypeLike
    values: Callable[[VoxelGrid], NDArray[Any]]
    levels: int = 1

    @cached_property
    def grids(self) -> list[VoxelGrid]:
        """The grids of the levels, finest first."""
        return level_grids(self.grid, self.levels)

    def __call__(self, path: str) -> bytes | None:
        """Return the file at a path of the multiscale group, None if there is none."""
        if path == ".zgroup":
            return b'{"zarr_format": 2}'
        if path == ".zattrs":
            return json.dumps(multiscales_attrs(self.grids, "made")).encode()
        found = re.fullmatch(r"s(\d)/(?:\.zarray|(\d{1,9})/(\d{1,9})/(\d{1,9}))", path)
        if found is None or int(found[1]) >= self.levels:
            return None
        grid = self.grids[int(found[1])]
        return self._metadata(grid) if found[2] is None else self._chunk(grid, [int(found[n]) for n in (2, 3, 4)])

    def _metadata(self, grid: VoxelGrid) -> bytes:
        dtype = np.dtype(self.dtype).newbyteorder("<").str
        metadata = {
            "zarr_format": 2, "shape": list(grid.shape), "chunks": [_EDGE] * 3, "dtype": dtype, "fill_value": 0,
            "order": "C", "compressor": None, "filters": None, "dimension_separator": "/",
        }  # fmt: skip
        return json.dumps(metadata).encode()

    def _chunk(self, grid: VoxelGrid, index: list[int]) -> bytes | None:
        begin = [i * _EDGE for i in index]
        shape = [min(_EDGE, n - b) for b, n in zip(begin, grid.shape, strict=True)]
        if min(shape) <= 0:
            return None
        out = np.zeros((_EDGE,) * 3, np.dtype(self.dtype).newbyteorder("<"))
        out[: shape[0], : shape[1], : shape[2]] = self.values(grid.crop(begin, shape))
        return out.tobytes()


class VolumeServer(LocalServer):
    """Serves roots and made volumes to any page that knows the secret, until it is closed."""

    any_origin = True

    def __init__(self, roots: Mapping[str, Path], made: Mapping[str, Made], address: str = LOOPBACK) -> None:
        """Start to serve ``roots`` and ``made`` under their names, at any free port."""
        self._places = {name: Path(root).resolve() for name, root in roots.items()}
        self._made = made
        self._document = lru_cache(maxsize=_KEPT)(lambda name, path: made[name](path))
        super().__init__(address)

    def get(self, path: str) -> Answer:
        """Return a file of a root, or a document of a made volume."""
        kind, _, rest = path.partition("/")
        name, _, inner = rest.partition("/")
        if kind == "files" and name in self._places and (file := _file_below(self._places[name], inner)) is not None:
            return Answer(file=file)
        data = self._document(name, inner) if kind == "made" and name in self._made else None
        return Answer(status=404) if data is None else Answer(data)


def _file_below(root: Path, path: str) -> Path | None:
    """Return a file whose real path, with links resolved, is below ``root``; None for anything else."""
    if "\x00" in path or "\\" in path:
        return None
    place = (root / path.lstrip("/")).resolve()
    if not place.is_relative_to(root) or not place.is_file():
        return None
    return place
