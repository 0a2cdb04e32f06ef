"""A small slice viewer: one slider through z, truth and prediction of one class at a time over raw.

The slices of a crop are stacked into one tall image per layer (a sprite); the slider moves the SVG's window over it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from connectomics.geometry import VoxelGrid
from connectomics.io.multiscale import Multiscale
from connectomics.report import figures, page
from connectomics.report.pictures import scale_bar
from connectomics.report.volumes import Item

_LONGEST = 320  # pixels a side of a slice
_MOST_SLICES = 16
_MOST_CLASSES = 12


def viewer(items: Sequence[Item], chosen: int, start: float) -> str:
    """The viewer of one crop's items (all of one data set), opened at item ``chosen`` near z = ``start`` nm.

    Empty where there is no raw or only one slice.
    """
    raw = items[0].raw
    shown = list(items[:_MOST_CLASSES])
    chosen = min(chosen, len(shown) - 1)
    grid = common_grid(shown)
    positions = slice_positions(grid.shape[0])
    if raw is None or len(positions) < 2:
        return ""
    layers = [grid.crop((z, 0, 0), (1, *grid.shape[1:])) for z in positions]
    heights = [float(layer.translation[0]) for layer in layers]
    first = int(np.argmin(np.abs(np.subtract(heights, start))))
    width, height = grid.shape[2] * grid.voxel_size[2], grid.shape[1] * grid.voxel_size[1]
    tall = height * len(layers)
    images = [_image(page.data_uri(_gray(raw, layers), 75), width, tall, "")]
    for k, item in enumerate(shown):
        hidden = "" if k == chosen else " hidden"
        for kind, sprite in (("truth", _truth(item, layers)), ("prediction", _prediction(item, layers))):
            if sprite is not None:
                attributes = f'class="over {kind}" data-class="{k}"{hidden}'
                images.append(_image(page.data_uri(sprite), width, tall, attributes))
    scale = f'<g class="fixed" transform="translate(0 {first * height:.6g})">{scale_bar(width, height, 0.5)}</g>'
    window = f"0 {first * height:.6g} {width:.6g} {height:.6g}"
    label = f'role="img" aria-label="slices of {page.text(items[0].crop)}"'
    drawing = f'<svg viewBox="{window}" {label}>{"".join(images)}{scale}</svg>'
    data = f'data-z="{",".join(map(page.number, heights))}" data-height="{height:.6g}" data-width="{width:.6g}"'
    controls = _controls(shown, chosen, heights, first)
    return f'<figure class="viewer" {data}>{drawing}<figcaption>{controls}</figcaption></figure>'


def _controls(shown: Sequence[Item], chosen: int, heights: Sequence[float], first: int) -> str:
    options = "".join(
        f'<option value="{k}"{" selected" * (k == chosen)}>{page.text(item.class_name)}</option>'
        for k, item in enumerate(shown)
    )
    slider = f'<input type="range" class="z" aria-label="slice" min="0" max="{len(heights) - 1}" value="{first}">'
    return (
        f"<label>slice {slider}</label><output>z = {page.number(heights[first])} nm</output>"
        f'<label>class <select aria-label="class">{options}</select></label>{_toggle("truth")}{_toggle("prediction")}'
    )


def _gray(raw: Multiscale, layers: Sequence[VoxelGrid]) -> NDArray[np.uint8]:
    """Raw of all slices, one below the other, with one contrast; dark where there is none."""
    slices = [raw.read_raw(layer) for layer in layers]
    values = np.concatenate([v[0] for v, _ in slices])
    inside = np.concatenate([there[0] for _, there in slices])
    gray = figures.to_gray(values, figures.contrast_limits(values, inside))
    return np.where(inside, gray, np.uint8(40))


def common_grid(items: Sequence[Item]) -> VoxelGrid:
    """A grid over all items' boxes at their finest voxel size along z, at most 320 pixels wide and high."""
    box = items[0].grid.box
    for item in items[1:]:
        box = box.hull(item.grid.box)
    finest = np.min([item.grid.voxel_size for item in items], axis=0)
    extent = np.asarray(box.extent)
    scale = max(1.0, float(np.max(extent[1:] / finest[1:])) / _LONGEST)
    return VoxelGrid.covering(box, (finest[0], finest[1] * scale, finest[2] * scale))


def slice_positions(n: int) -> list[int]:
    """At most 16 layers of ``n``, evenly spread over the middle of equal parts."""
    wanted = min(n, _MOST_SLICES)
    return [int((k + 0.5) * n / wanted) for k in range(wanted)] if wanted else []


def _truth(item: Item, layers: Sequence[VoxelGrid]) -> NDArray[np.uint8] | None:
    """The truth's outlines (blue) of all slices, one below the other; what is not annotated is veiled."""
    if item.truth is None:
        return None
    sprites = []
    for layer in layers:
        values, known = (v[0] for v in item.truth.read(layer))
        sprite = figures.label_layer(np.where(known, values, 0), figures.TRUTH, fill=0)
        sprite[~known] = figures.ERROR_COLORS[figures.NOT_KNOWN]
        sprites.append(sprite)
    return np.concatenate(sprites)


def _prediction(item: Item, layers: Sequence[VoxelGrid]) -> NDArray[np.uint8] | None:
    """The prediction (orange, filled) of all slices, one below the other."""
    if item.prediction is None:
        return None
    return np.concatenate(
        [figures.label_layer(item.prediction.read(layer)[0][0], figures.PREDICTION) for layer in layers]
    )


def _toggle(kind: str) -> str:
    box = f'<input type="checkbox" data-kind="{kind}" checked>'
    return f'<label>{box} {kind} <i class="key {kind}"></i></label>'


def _image(uri: str, width: float, height: float, attributes: str) -> str:
    return f'<image {attributes} width="{width:.6g}" height="{height:.6g}" preserveAspectRatio="none" href="{uri}"/>'
