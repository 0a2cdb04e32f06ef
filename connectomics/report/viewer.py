"""A slice viewer of three planes: a slider for each axis, truth and prediction of one class at a time over raw.

The slices of a plane are stacked into one tall image per layer (a sprite); the slider moves the SVG's window over it.
A click in a plane takes the two others to that place. Positions are in nm from the viewer's first corner.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from connectomics.geometry import Triple, VoxelGrid
from connectomics.io.multiscale import Multiscale
from connectomics.report import figures, page
from connectomics.report.pictures import scale_bar
from connectomics.report.volumes import Item, plane_grid

_LONGEST = 256  # pixels a side of a slice
MOST_CLASSES = 12  #: that can be chosen in a viewer
_NAMES = ("xy", "xz", "yz")
_AXES = "zyx"


def viewer(items: Sequence[Item], chosen: int, at: Triple, wanted: Sequence[Triple] = (), slices: int = 16) -> str:
    """The viewer of one crop's items (all of one data set).

    Args:
        items: the classes that can be chosen; at most 12 are shown. chosen: the one it opens with.
        at: where it opens, nm, z y x. wanted: places whose slices should be there, the most wanted first.
        slices: of each plane, at most: half of them evenly spread, the others at ``wanted``.

    Empty where there is no raw, or only one slice along some axis.
    """
    raw = items[0].raw
    if raw is None:
        return ""
    shown = list(items[:MOST_CLASSES])
    chosen = min(chosen, len(shown) - 1)
    grid = common_grid(shown)
    if min(grid.shape) < 2:
        return ""
    panes = [_pane(shown, raw, grid, axis, chosen, (at, *wanted), slices) for axis in range(3)]
    return (
        f'<div class="ortho"><div class="controls">{_controls(shown, chosen)}</div>'
        f'<div class="panes">{"".join(panes)}</div></div>'
    )


def _pane(
    items: Sequence[Item],
    raw: Multiscale,
    grid: VoxelGrid,
    axis: int,
    chosen: int,
    places: Sequence[Triple],
    slices: int,
) -> str:
    """One plane with its slider."""
    ahead = [round(float(grid.to_index(place)[axis])) for place in places]
    positions = slice_positions(grid.shape[axis], slices, ahead)
    layers = [plane_grid(grid, axis, index, _LONGEST) for index in positions]
    heights = [float(grid.axes()[axis][index]) for index in positions]
    first = int(np.argmin(np.abs(np.subtract(heights, places[0][axis]))))
    rows, columns = (a for a in range(3) if a != axis)
    extent = np.multiply(layers[0].shape, layers[0].voxel_size)
    height, width = float(extent[rows]), float(extent[columns])
    tall = height * len(layers)
    images = [_image(page.data_uri(_gray(raw, layers, axis), 75), width, tall, "")]
    for k, item in enumerate(items):
        hidden = "" if k == chosen else " hidden"
        for kind, sprite in (("truth", _truth(item, layers, axis)), ("prediction", _prediction(item, layers, axis))):
            if sprite is not None:
                attributes = f'class="over {kind}" data-class="{k}"{hidden}'
                images.append(_image(page.data_uri(sprite), width, tall, attributes))
    lines = "".join(f'<line class="cross" data-of="{a}"/>' for a in (rows, columns))
    scale = f'<g class="fixed" transform="translate(0 {first * height:.6g})">{lines}{scale_bar(width, height, 0.7)}</g>'
    window = f"0 {first * height:.6g} {width:.6g} {height:.6g}"
    name = _NAMES[axis]
    label = f'role="img" aria-label="{name} slices of {page.text(items[0].crop)}"'
    drawing = f'<svg viewBox="{window}" {label}>{"".join(images)}{scale}</svg>'
    corner = grid.box.begin[axis]
    offsets = ",".join(page.number(h - corner) for h in heights)
    data = (
        f'data-axis="{axis}" data-name="{_AXES[axis]}" data-z="{",".join(map(page.number, heights))}" '
        f'data-offsets="{offsets}" data-height="{height:.6g}" data-width="{width:.6g}"'
    )
    slider = (
        f'<input type="range" class="z" aria-label="{name} slice" min="0" max="{len(heights) - 1}" value="{first}">'
    )
    caption = f"<b>{name}</b>{slider}<output>{_AXES[axis]} = {page.number(heights[first])} nm</output>"
    return f'<figure class="viewer" {data}>{drawing}<figcaption>{caption}</figcaption></figure>'


def _controls(shown: Sequence[Item], chosen: int) -> str:
    options = "".join(
        f'<option value="{k}"{" selected" * (k == chosen)}>{page.text(item.class_name)}</option>'
        for k, item in enumerate(shown)
    )
    opacity = (
        '<label>overlay <input type="range" class="opacity" min="0" max="100" value="85" aria-label="overlay opacity">'
        "</label>"
    )
    choice = f'<label>class <select aria-label="class">{options}</select></label>'
    return f"{choice}{_toggle('truth')}{_toggle('prediction')}{opacity}<span>Click a slice to move the others.</span>"


def _gray(raw: Multiscale, layers: Sequence[VoxelGrid], axis: int) -> NDArray[np.uint8]:
    """Raw of all slices, one below the other, with one contrast; dark where there is none."""
    slices = [raw.read_raw(layer) for layer in layers]
    values = np.concatenate([v.squeeze(axis) for v, _ in slices])
    inside = np.concatenate([there.squeeze(axis) for _, there in slices])
    gray = figures.to_gray(values, figures.contrast_limits(values, inside))
    return np.where(inside, gray, np.uint8(40))


def common_grid(items: Sequence[Item]) -> VoxelGrid:
    """A grid over all items' boxes at their finest voxel size."""
    box = items[0].grid.box
    for item in items[1:]:
        box = box.hull(item.grid.box)
    return VoxelGrid.covering(box, np.min([item.grid.voxel_size for item in items], axis=0))


def slice_positions(n: int, most: int, wanted: Sequence[int] = ()) -> list[int]:
    """At most ``most`` layers of ``n``, in order: half of them in the middle of equal parts, then those ``wanted``, the
    first of them first; where these are fewer, more are evenly spread."""
    if n <= most:
        return list(range(n))
    chosen = list(dict.fromkeys(min(max(w, 0), n - 1) for w in wanted))[: most // 2]
    spread = most - len(chosen)
    return sorted({*chosen, *(int((k + 0.5) * n / spread) for k in range(spread))})


def _truth(item: Item, layers: Sequence[VoxelGrid], axis: int) -> NDArray[np.uint8] | None:
    """The truth's outlines (blue) of all slices, one below the other; what is not annotated is veiled."""
    if item.truth is None:
        return None
    sprites = []
    for layer in layers:
        values, known = (v.squeeze(axis) for v in item.truth.read(layer))
        sprite = figures.label_layer(np.where(known, values, 0), figures.TRUTH, fill=0)
        sprite[~known] = figures.ERROR_COLORS[figures.NOT_KNOWN]
        sprites.append(sprite)
    return np.concatenate(sprites)


def _prediction(item: Item, layers: Sequence[VoxelGrid], axis: int) -> NDArray[np.uint8] | None:
    """The prediction (orange, filled) of all slices, one below the other."""
    if item.prediction is None:
        return None
    return np.concatenate(
        [figures.label_layer(item.prediction.read(layer)[0].squeeze(axis), figures.PREDICTION) for layer in layers]
    )


def _toggle(kind: str) -> str:
    box = f'<input type="checkbox" data-kind="{kind}" checked>'
    return f'<label>{box} {kind} <i class="key {kind}"></i></label>'


def _image(uri: str, width: float, height: float, attributes: str) -> str:
    return f'<image {attributes} width="{width:.6g}" height="{height:.6g}" preserveAspectRatio="none" href="{uri}"/>'
