"""A slice viewer of three planes: a slider for each axis, truth and prediction of one class at a time over raw.

The slices of a plane are stacked into one tall image per layer; the slider moves the SVG's window over it. A click in a
plane moves the two others to that place. Positions are in nm from the viewer's first corner.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from connectomics.geometry import Box, Triple, VoxelGrid, other_axes
from connectomics.io.multiscale import Multiscale
from connectomics.pages import colors, figures, page
from connectomics.pages.report.volumes import Item, LabelReader, plane_grid

MOST_CLASSES = 12  #: that one viewer offers
_LONGEST = 256  # pixels a side of a slice
_NO_RAW = np.uint8(40)  # gray value


def viewer(items: Sequence[Item], chosen: int, at: Triple, wanted: Sequence[Triple] = (), slices: int = 16) -> Markup:
    """Return the viewer of one crop; empty without raw, or if some axis has only one slice.

    Args:
        items: the classes to offer (all of one data set); at most 12 are shown. chosen: the one it opens with.
        at: where it opens, nm, z y x. wanted, slices: as `slice_positions` takes them.
    """
    raw = items[0].raw
    shown = list(items[:MOST_CLASSES])
    grid = common_grid(shown)
    if raw is None or min(grid.shape) < 2:
        return Markup("")
    return page.render(
        "report/slice_viewer", items=shown, chosen=min(chosen, len(shown) - 1),
        panes=[_pane(shown, raw, grid, axis, (at, *wanted), slices) for axis in range(3)],
    )  # fmt: skip


def _pane(
    items: Sequence[Item], raw: Multiscale, grid: VoxelGrid, axis: int, places: Sequence[Triple], slices: int
) -> dict[str, Any]:
    """Return what the template shows of one plane."""
    ahead = [round(float(grid.to_index(place)[axis])) for place in places]
    positions = slice_positions(grid.shape[axis], slices, ahead)
    layers = [plane_grid(grid, axis, index, _LONGEST) for index in positions]
    at = [float(grid.axes()[axis][index]) for index in positions]
    rows, columns = other_axes(axis)
    extent = np.multiply(layers[0].shape, layers[0].voxel_size)
    overlays = [
        (number, kind, np.concatenate([draw(reader, layer, axis) for layer in layers]))
        for number, item in enumerate(items)
        for kind, draw, reader in (("truth", _truth, item.truth), ("prediction", _prediction, item.prediction))
        if reader is not None
    ]
    return {
        "axis": axis,
        "raw": _gray(raw, layers, axis),
        "overlays": overlays,
        "positions": at,
        "offsets": [position - grid.box.begin[axis] for position in at],
        "first": int(np.argmin(np.abs(np.subtract(at, places[0][axis])))),
        "height": float(extent[rows]),
        "width": float(extent[columns]),
        "others": (rows, columns),
    }


def common_grid(items: Sequence[Item]) -> VoxelGrid:
    """Return a grid over all items' boxes at their finest voxel size."""
    box = reduce(Box.hull, [item.grid.box for item in items])
    return VoxelGrid.covering(box, np.min([item.grid.voxel_size for item in items], axis=0))


def slice_positions(n: int, most: int, wanted: Sequence[int] = ()) -> list[int]:
    """Return at most ``most`` of ``n`` layers, in order: up to half of them from ``wanted``, which lists the most
    important first, the others in the middle of equal parts."""
    if n <= most:
        return list(range(n))
    chosen = list(dict.fromkeys(min(max(w, 0), n - 1) for w in wanted))[: most // 2]
    spread = most - len(chosen)
    return sorted({*chosen, *(int((k + 0.5) * n / spread) for k in range(spread))})


def _gray(raw: Multiscale, layers: Sequence[VoxelGrid], axis: int) -> NDArray[np.uint8]:
    """Return raw of all slices, one below the other, with one contrast; dark where there is none."""
    slices = [raw.read_raw(layer) for layer in layers]
    values = np.concatenate([v.squeeze(axis) for v, _ in slices])
    inside = np.concatenate([there.squeeze(axis) for _, there in slices])
    return np.where(inside, figures.to_gray(values, figures.contrast_limits(values, inside)), _NO_RAW)


def _truth(labels: LabelReader, layer: VoxelGrid, axis: int) -> NDArray[np.uint8]:
    """Return the outlines of the truth in a slice; unknown voxels are veiled."""
    values, known = (v.squeeze(axis) for v in labels.read(layer))
    picture = figures.label_layer(np.where(known, values, 0), colors.TRUTH, fill=0)
    picture[~known] = colors.ERROR_COLORS[colors.NOT_KNOWN]
    return picture


def _prediction(labels: LabelReader, layer: VoxelGrid, axis: int) -> NDArray[np.uint8]:
    """Return the filled prediction in a slice."""
    return figures.label_layer(labels.read(layer)[0].squeeze(axis), colors.PREDICTION)
