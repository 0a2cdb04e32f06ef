"""Show proposals in neuroglancer, each at the link that its row and the page of proposals have."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import cycle
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from connectomics.cellmap.catalog import Catalog
from connectomics.errors import MissingError
from connectomics.geometry import Box, VoxelGrid
from connectomics.pages.colors import CLASS_COLORS
from connectomics.pages.local_server import LOOPBACK
from connectomics.pages.view.layers import Layer, Layers, add_raw
from connectomics.pages.view.neuroglancer_page import Viewing, open_viewers
from connectomics.pages.view.volume_server import MadeVolume
from connectomics.pipeline.proposals import MAP, TABLE, UNKNOWN, Proposal, opened_labels, read_table


def open_proposals(root: str | Path, folder: str | Path, address: str = LOOPBACK, port: int = 0) -> list[Viewing]:
    """Serve a page for each proposal, in the order of the table, until one of them is closed.

    Args:
        root: data root with the raw. folder: that `propose` wrote. address: who may connect.
        port: of the pages; 0: that of the links in the table, which then lead to the pages.

    Raises:
        MissingError, MetadataError, InputError: the table, a label file or the raw; neuroglancer is not installed; or
            the port is not available. UnknownNameError: the data root has no such data set.
    """
    rows = read_table(folder)
    if not rows:
        raise MissingError(f"{Path(folder, TABLE)} lists no proposal")
    links = [re.fullmatch(r"http://[\w.]+:([1-5]?\d{1,4}|6[0-4]\d{3})/v/([\w-]+)/", row.link) for row in rows]
    tokens = [link and link[2] for link in links]
    known = next((int(link[1]) for link in links if link), 0)
    return open_viewers(proposal_layers(str(root), Path(folder), rows), address, port or known, tokens)


def proposal_layers(root: str, folder: Path, rows: Sequence[Proposal]) -> list[Layers]:
    """Return what to show of each proposal: raw, its labels as the files hold them, and the boxes of its data set."""
    catalog, pages = Catalog.open(root), []
    boxes: dict[str, dict[str, Box]] = {}
    for row in rows:
        boxes.setdefault(row.dataset, {})[row.crop] = row.grid.box
    for row in rows:
        found = Layers(row.dataset, boxes=boxes[row.dataset], position=row.grid.box.center)
        found.extent = max(row.grid.box.extent)
        add_raw(found, catalog.raw_location(row.dataset), f"raw-{row.dataset}")
        for (name, kind), color in zip((row.classes or {MAP: "instance"}).items(), cycle(CLASS_COLORS), strict=False):
            read, shown = _reader(folder, row, name), f"{row.dataset}-{row.crop}-{name}"
            read(row.grid.crop((0, 0, 0), (1, 1, 1)))  # a file that is missing is an error now
            found.made[shown] = MadeVolume(row.grid, np.uint32 if kind == "instance" else np.uint8, read)
            what: Literal["ids", "mask"] = "ids" if kind == "instance" else "mask"
            found.layers.append(Layer("proposed", what, f"made/{shown}", name, row.crop, color))
        pages.append(found)
    return pages


def _reader(folder: Path, row: Proposal, name: str) -> Callable[[VoxelGrid], NDArray[Any]]:
    """Return what reads a part of the labels, unknown voxels as background."""

    def read(part: VoxelGrid) -> NDArray[Any]:
        with ExitStack() as stack:
            source, _ = opened_labels(folder, row, name, stack)
            begin = row.grid.index_range(part.box)[0]
            values = source.read(begin, part.shape)
        return np.where(values == UNKNOWN, 0, values if row.classes.get(name) != "semantic" else values != 0)

    return read
